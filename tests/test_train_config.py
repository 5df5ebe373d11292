"""The training script's flags and its YAML file: names known without an import, and what is made of them."""

import dataclasses

import pytest

from ppl.reward.loop_guard import WEIGHT
from ppl.training.config import grpo_config
from ppl.training.flags import grpo_fields, write_config
from ppl.training.plan import plan_batches
from train_grpo_multilevel_unsloth import parse_args


@pytest.mark.parametrize(("word", "found"), [("-50:0", -50), ("-.5:0", -0.5), ("-1e9:0", -1e9), ("-2E-1:0", -0.2)])
def test_a_threshold_below_0_is_no_flag(word, found):
    args, rest = parse_args(["--reward_thresholds", word, "1:1", "--beta", "0.1"])
    assert args.reward_thresholds == [(found, 0), (1, 1)] and rest == ["--beta", "0.1"]


def test_nested_levels_weigh_the_same_where_nobody_says_otherwise():
    assert parse_args([])[0].ppl_weights == [0.2, 0.3, 0.5]
    assert parse_args(["--aggregation", "nested"])[0].ppl_weights == [1, 1, 1]
    assert parse_args(["--aggregation", "nested", "--ppl_weights", "3", "0", "1"])[0].ppl_weights == [3, 0, 1]


def test_the_field_names_read_from_the_source_are_those_of_the_class():
    from trl import GRPOConfig

    assert grpo_fields() == {field.name for field in dataclasses.fields(GRPOConfig)}


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as exit:
        parse_args(list(map(str, argv)))
    output = capsys.readouterr()
    assert exit.value.code == 2 and output.out == "" and output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--warmup_step", "--warmup_steps?"),
        ("--lr_sheduler_type", "--lr_scheduler_type?"),
        ("--bta=0.1", "--beta?"),
        ("--ppl_weight", "--ppl_weights?"),
        ("--xyzzy", "see --help"),
    ],
)
def test_a_flag_nobody_has_is_refused_with_the_nearest_one(capsys, tmp_path, flag, near):
    assert f"unknown flag {flag.partition('=')[0]}" in (line := refused(capsys, flag, 1)) and near in line
    path = tmp_path / "run.yaml"
    path.write_text(f"{flag.removeprefix('--').partition('=')[0]}: 1\n")
    assert str(path) in (line := refused(capsys, "--config", path)) and near in line


def test_flags_of_grpo_config_are_left_to_it():
    flags = ["--beta", "0.04", "--no_gradient_checkpointing", "--warmup_steps=3", "--use_vllm"]
    assert parse_args(flags)[1] == flags


def test_what_a_loop_costs_does_not_reach_the_sampling(tmp_path):
    """GRPOConfig's repetition_penalty divides logits while sampling: with 20 in it the policy would write no two words
    alike. It is TRL's, and what loops cost has a name of its own."""
    args, rest = parse_args(["--loop_penalty", "20", "--output_dir", str(tmp_path)])
    config, _, defaults = grpo_config(args, rest, plan_batches(4, None, None))
    assert args.loop_penalty == 20 and config.repetition_penalty == defaults["repetition_penalty"] == 1
    args, rest = parse_args(["--repetition_penalty", "1.1", "--output_dir", str(tmp_path)])
    config, _, _ = grpo_config(args, rest, plan_batches(4, None, None))
    assert args.loop_penalty == WEIGHT and config.repetition_penalty == 1.1


def test_variables_of_the_chat_template_are_the_trainers_too(tmp_path):
    words = ["--chat_template_kwargs", '{"enable_thinking": false}', "--output_dir", str(tmp_path)]
    args, rest = parse_args(words)
    config, asked, defaults = grpo_config(args, rest, plan_batches(4, None, None))
    assert args.chat_template_kwargs == config.chat_template_kwargs == {"enable_thinking": False}
    write_config(tmp_path / "run.yaml", vars(args), asked, defaults)
    again, _ = parse_args(["--config", str(tmp_path / "run.yaml")])
    assert again.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- 1", "expected 'name: value' lines"),
        ("a: [", "expected a YAML file of flags"),
        ("no_unsloth: 1", "no_unsloth is 1, expected true or false"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        # YAML reads 3:0.5 as a number in the base 60.
        ("reward_thresholds: [3:0.5]", "'180.5', expected PERCENT:REWARD"),
        ("max_new_tokens: 0", "expected a whole number of at least 1"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(capsys, tmp_path, content, words):
    (tmp_path / "run.yaml").write_text(content)
    assert words in refused(capsys, "--config", tmp_path / "run.yaml")


def test_a_value_without_a_flag_is_refused(capsys):
    assert "'fast' belongs to no flag" in refused(capsys, "fast", "--beta", 1)


def test_every_kind_of_value_in_a_file_and_the_command_line_wins(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "load_in_4bit: false\nno_unsloth: true\nallow_copies: false\nppl_weights: [1, 2, 3]\nlora_r: 4\nbeta: 5e-2\n"
        "reward_thresholds: [[-50, 0], ['0:0.5'], [50, 1]]\nlearning_rate: 1e-3\ndataset_config: null\n"
        "use_vllm: false\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    args, rest = parse_args(["--lora_r", "2", "--config", str(tmp_path / "run.yaml")])
    assert (args.load_in_4bit, args.no_unsloth, args.allow_copies, args.lora_r) == (False, True, False, 2)
    assert args.ppl_weights == [1, 2, 3] and args.reward_thresholds == [(-50, 0), (0, 0.5), (50, 1)]
    assert (args.learning_rate, args.dataset_config) == (1e-3, None)
    assert rest == ["--beta=5e-2", "--use_vllm=False", '--lr_scheduler_kwargs={"num_cycles": 2}']
