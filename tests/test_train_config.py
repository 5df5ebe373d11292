"""The training script's flags and its YAML file: names known without an import, and what is made of them."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys

import pytest
from training_runs import EXAMPLES, train

from mlppl.cli import grpo_fields, reward_config
from mlppl.config import LOOP_PENALTY
from mlppl.errors import InputError
from mlppl.training.settings import config_text, grpo_config, plan_batches
from train_grpo_multilevel_unsloth import parse_args


@pytest.mark.parametrize(("word", "found"), [("-50:0", -50), ("-.5:0", -0.5), ("-1e9:0", -1e9), ("-2E-1:0", -0.2)])
def test_a_threshold_below_0_is_no_flag(word, found):
    args, rest = parse_args(["--reward_thresholds", word, "1:1", "--beta", "0.1"])
    assert reward_config(args).reward_thresholds == ((found, 0), (1, 1)) and rest == ["--beta", "0.1"]


def test_nested_levels_weigh_the_same_where_nobody_says_otherwise():
    def weights(*words):
        return reward_config(parse_args(words)[0]).weights

    assert weights() == (0.2, 0.3, 0.5)
    assert weights("--aggregation", "nested") == (1, 1, 1)
    assert weights("--aggregation", "nested", "--ppl_weights", "3", "0", "1") == (3, 0, 1)
    assert weights("--weights", "3", "0", "1") == (3, 0, 1)


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
    assert args.loop_penalty == LOOP_PENALTY and config.repetition_penalty == 1.1


def test_variables_of_the_chat_template_are_the_trainers_too(tmp_path):
    words = ["--chat_template_kwargs", '{"enable_thinking": false}', "--output_dir", str(tmp_path)]
    args, rest = parse_args(words)
    config, asked, defaults = grpo_config(args, rest, plan_batches(4, None, None))
    assert args.chat_template_kwargs == config.chat_template_kwargs == {"enable_thinking": False}
    (tmp_path / "run.yaml").write_text(config_text(vars(args), asked, defaults))
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
    config = reward_config(args)
    assert config.weights == (1, 2, 3) and config.reward_thresholds == ((-50, 0), (0, 0.5), (50, 1))
    assert (args.learning_rate, args.dataset_config) == (1e-3, None)
    assert rest == ["--beta=5e-2", "--use_vllm=False", '--lr_scheduler_kwargs={"num_cycles": 2}']


def made(tmp_path, *words):
    """GRPOConfig of the words of a command line."""
    args, rest = parse_args(["--output_dir", str(tmp_path), *words])
    sampled_apart = any("generation" in word and "num_" not in word for word in rest)
    numbers = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_generations
    return grpo_config(args, rest, plan_batches(*numbers, sampled_apart=sampled_apart))[0]


EVALUATED = ["--eval_split", "test"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        # 4 completions are half a group of 8.
        (["--steps_per_generation", "1"], ["_batch_size 4, --steps_per_generation 1, --num_generations 8 on 1 process",
         "use --per_device_train_batch_size 8 or --steps_per_generation 2 or --num_generations 4"]),
        (["--generation_batch_size", "12"], ["--generation_batch_size 12", "--num_generations 6", "size 8 or"]),
        (["--generation_batch_size", "6"], ["--generation_batch_size 8"]),
        (["--generation_batch_size", "8", "--steps_per_generation", "2"],
         ["no --steps_per_generation or no --generation_batch_size"]),
        (["--num_generations_eval", "3", *EVALUATED], ["--num_generations_eval 3", "--per_device_eval_batch_size 8",
         "use --num_generations_eval 2 or --per_device_eval_batch_size 9"]),
        (["--per_device_eval_batch_size", "3", *EVALUATED], ["--num_generations_eval 3", "_eval_batch_size 8"]),
        (["--num_generations_eval", "0", *EVALUATED], ["--num_generations_eval is 0", "at least 1"]),
        (["--num_generations_eval", "-2", *EVALUATED], ["--num_generations_eval is -2", "at least 1"]),
        (["--per_device_eval_batch_size", "0", *EVALUATED], ["--per_device_eval_batch_size is 0"]),
        (["--steps_per_generation", "0"], ["--steps_per_generation is 0", "at least 1"]),
        (["--generation_batch_size", "-8"], ["--generation_batch_size is -8"]),
        (["--eval_strategy", "steps"], ["--eval_strategy steps", "--eval_split"]),
        (["--eval_on_start", "true"], ["--eval_on_start True", "--eval_split"]),
        (["--num_generations_eval", "4"], ["--num_generations_eval 4", "--eval_split"]),
        (["--save_strategy", "best"], ["--save_strategy best", "--eval_split"]),
        (["--save_strategy", "best", *EVALUATED], ["--metric_for_best_model"]),
        (["--loss_type", "foo"], ["--loss_type is 'foo'", "bnpo, cispo, dapo"]),
        (["--scale_rewards", "foo"], ["--scale_rewards is 'foo'", "batch, group, none"]),
        (["--importance_sampling_level", "foo"], ["sequence, token"]),
        (["--multi_objective_aggregation", "foo"], ["normalize_then_sum, sum_then_normalize"]),
        (["--use_vllm", "true"], ["--use_vllm needs the package vllm"]),
        (["--use_liger_kernel", "true"], ["--use_liger_kernel needs the package"]),
        (["--fsdp", "full_shard"], ["--fsdp", "accelerate launch"]),
        (["--deepspeed", "missing.json"], ["deepspeed"]),
        (["--optim", "foo"], ["--optim", "'foo'", "adamw_torch"]),
        (["--optim", "lomo"], ["--optim lomo", "lomo"]),
        (["--optim", "galore_adamw"], ["galore"]),
        (["--optim_args", "lr"], ["--optim"]),
        (["--adam_beta1", "2"], ["--optim", "beta"]),
        (["--lr_scheduler_type", "foo"], ["--lr_scheduler_type", "'foo'"]),
        (["--lr_scheduler_type", "cosine_with_min_lr"], ["--lr_scheduler_kwargs", "min_lr"]),
        (["--lr_scheduler_type", "warmup_stable_decay"], ["--lr_scheduler_kwargs", "num_decay_steps"]),
        (["--lr_scheduler_kwargs", '{"foo": 1}'], ["--lr_scheduler_kwargs", "foo"]),
        (["--gradient_checkpointing_kwargs", '{"foo": 1}'], ["--gradient_checkpointing_kwargs", "foo"]),
        (["--gradient_checkpointing_kwargs", "foo"], ["--gradient_checkpointing_kwargs", "JSON object"]),
        (["--tf32", "true"], ["--tf32"]),
        (["--dataloader_persistent_workers", "true"], ["--dataloader_num_workers 0", "persistent_workers"]),
        (["--pad_to_multiple_of", "0"], ["--pad_to_multiple_of is 0"]),
        (["--auto_find_batch_size", "true"], ["auto_find_batch_size"]),
    ],
)  # fmt: skip
def test_what_trl_or_transformers_would_not_take_is_refused_before_loading(tmp_path, flags, words):
    with pytest.raises(InputError) as error:
        made(tmp_path, *flags)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("flags", [
    ["--steps_per_generation", "2"],
    ["--steps_per_generation", "2", "--gradient_accumulation_steps", "1", "--num_generations", "8"],
    ["--generation_batch_size", "8", "--gradient_accumulation_steps", "1"],
    ["--steps_per_generation", "8", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"],
    ["--num_generations_eval", "2", *EVALUATED],
    ["--num_generations_eval", "3", "--per_device_eval_batch_size", "9", *EVALUATED],
    ["--save_strategy", "best", "--metric_for_best_model", "eval_reward", *EVALUATED],
    ["--loss_type", "dr_grpo", "--scale_rewards", "none"],
    ["--optim", "adamw_8bit"],
    ["--optim", "adafactor", "--lr_scheduler_type", "polynomial"],
    ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-6}'],
    ["--lr_scheduler_type", "reduce_lr_on_plateau", *EVALUATED],
    ["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'],
    ["--max_steps", "2", "--num_train_epochs", "3"],
], ids=" ".join)  # fmt: skip
def test_what_they_take_is_taken(tmp_path, flags):
    config = made(tmp_path, *flags)
    assert config.generation_batch_size % config.num_generations == 0


def test_a_remedy_that_is_proposed_is_taken(tmp_path):
    """Each in place of what was given, whatever numbers do not fit."""
    tried = 0
    for batch, steps, generations in itertools.product((3, 4), (1, 5), (6, 8)):
        numbers = {"per_device_train_batch_size": batch, "steps_per_generation": steps, "num_generations": generations}

        def words(numbers):
            return [word for name, value in numbers.items() for word in (f"--{name}", str(value))]

        try:
            made(tmp_path, *words(numbers))
        except InputError as error:
            assert batch * steps % generations
            for name, value in re.findall(r"--(\w+) (\d+)", str(error).split(": use ")[1]):
                made(tmp_path, *words({**numbers, name: value}))
                tried += 1
        else:
            assert batch * steps % generations == 0
    assert tried > 8


def test_one_file_is_read_by_both_scripts_and_the_names_are_those_of_a_rewards_file(tmp_path, monkeypatch):
    """What only the other script knows is passed over, and what neither knows is refused by both."""
    from compute_baselines_trl import parse_args as parse_baselines
    from mlppl.cli import sampling
    from mlppl.reward.configured import read_settings

    reward = "form: nats\naggregation: nested\nweights: [1, 2, 3]\nmax_phrase_words: 3\nlanguage: de-AT\n"
    path = tmp_path / "run.yaml"
    path.write_text(
        f"{reward}model_name: tiny-stories\ntemperature: 0.7\ntop_k: 50\ngenerate: 4\nlearning_rate: 1e-3\nbeta: 0.04\n"
        "lora_r: 4\nload_in_4bit: false\nbaselines_path: b.pkl\noutput_path: b.pkl\n"
        "prompt_template: 'Go on: {prompt}'\n"
    )
    training, rest = parse_args(["--config", str(path)])
    baselines = parse_baselines(["--config", str(path), "--top_k", "40"])
    assert (training.learning_rate, training.lora_r, training.baselines_path, rest) == (
        1e-3,
        4,
        "b.pkl",
        ["--beta=0.04"],
    )
    assert (baselines.generate, baselines.output_path, baselines.load_in_4bit) == (4, "b.pkl", False)
    assert baselines.prompt_template == training.prompt_template == "Go on: {prompt}"
    assert sampling(training).top_k == 50 and sampling(baselines).top_k == 40
    assert sampling(training).temperature == sampling(baselines).temperature == 0.7
    definitions = {"max_phrase_words": 3, "language": "de", "aggregation": "nested"}
    assert reward_config(training).definitions == reward_config(baselines).definitions == definitions

    (tmp_path / "b.pkl").write_bytes(b"")
    of_reward = read_settings(path)
    assert of_reward["baselines"] == str(tmp_path / "b.pkl") and "learning_rate" not in of_reward
    (tmp_path / "tools.json").write_text('[{"name": "add"}]')
    (tmp_path / "reward.yaml").write_text("model_name: tiny-stories\ntools: tools.json\n")
    assert read_settings(tmp_path / "reward.yaml")["tools"] == [{"name": "add"}]  # as --tools reads it
    of_training = vars(reward_config(training))
    assert {name: of_reward[name] for name in ("form", "aggregation", "weights")} == {
        "form": of_training["form"], "aggregation": of_training["aggregation"], "weights": [1, 2, 3],
    }  # fmt: skip

    path.write_text("aggregaton: nested\n")
    for parse in (parse_args, parse_baselines):
        with pytest.raises(SystemExit):
            parse(["--config", str(path)])
    path.write_text("model_name: tiny-stories\naggregaton: nested\n")
    with pytest.raises(InputError, match="unknown setting 'aggregaton', did you mean aggregation"):
        read_settings(path)


def test_weights_and_biases_without_a_key_are_refused_before_anything_is_loaded(tmp_path):
    quiet = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    flags = ["--wandb_project", "ppl", "--no_unsloth", "--output_dir", str(tmp_path / "out")]
    [line] = train(*flags, code=2, python=sys.executable, **quiet).stderr.splitlines()
    assert line.startswith("error: Weights & Biases has no key for ") and "WANDB_MODE=offline" in line
    assert not (tmp_path / "out").exists()

    (tmp_path / "netrc").write_text("machine wandb.example login user password secret")
    known = {"WANDB_BASE_URL": "https://wandb.example", "NETRC": str(tmp_path / "netrc")}
    code = "from mlppl.training.settings import check_reporters; check_reporters(['wandb'])"
    for more in ({"WANDB_API_KEY": "0" * 40}, known, {"WANDB_MODE": "offline"}, {"WANDB_MODE": "disabled"}):
        command = [sys.executable, "-c", code]
        subprocess.run(command, cwd=EXAMPLES, env={**os.environ, **quiet, **more}, check=True)
