"""Training, held-out prompts and baselines of own writing sample alike, and by nothing that a model brings along."""

import json
from dataclasses import asdict

import pytest
import torch
import toys
import zoo
from datasets import Dataset
from training_runs import SHORT, refusal, train
from transformers import GenerationConfig

import compute_baselines_trl
import train_grpo_multilevel_unsloth
from mlppl.baselines.file import Baselines, read_meta
from mlppl.baselines.job import generation
from mlppl.cli import sampling
from mlppl.config import GENERATION_KWARGS, Sampling
from mlppl.errors import InputError
from mlppl.scoring.sampling import ignores_padding, sample
from mlppl.scoring.tokens import Sampled
from mlppl.training.rewards import other_sampling
from mlppl.training.settings import grpo_config, plan_batches
from multi_level_ppl_trl import LEVELS, MultiLevelPPLCalculator

PROMPTS = ["Once upon a time", "The fox said: ", "They walked home together,"]
EVERY_KWARG = {
    "typical_p": 0.9, "top_h": 0.9, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4, "no_repeat_ngram_size": 2,
    "min_new_tokens": 3, "suppress_tokens": [7], "begin_suppress_tokens": [9], "bad_words_ids": [[11], [12, 13]],
}  # fmt: skip
NARROW = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2}
SETTINGS = [{}, NARROW, {"generation_kwargs": EVERY_KWARG}]


def grpo(tmp_path, tokenizer, model=None, reward=lambda completions, **_: [0.0] * len(completions), **config):
    """The project's trainer over the toy Llama, two completions a step."""
    from trl import GRPOConfig

    from mlppl.training.trainer import ResumableGRPOTrainer

    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=2, num_generations=2,
        report_to="none", max_steps=1, **{"max_completion_length": 12, **config},
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    return ResumableGRPOTrainer(
        model=model or toys.llama(), args=config, reward_funcs=[reward], train_dataset=rows, processing_class=tokenizer
    )


def written(trainer, seed=1):
    trainer.model.eval()
    torch.manual_seed(seed)
    return trainer._generate(PROMPTS)[1]


# --- one description of sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_training_samples_as_held_out_prompts_are_sampled(tokenizer, tmp_path, settings):
    """The same ids from the same seed; and other ones than by another description."""
    trainer = grpo(tmp_path, tokenizer, **settings)
    ours = sample(trainer.model, tokenizer, PROMPTS, seed=1, max_new_tokens=12, **settings)
    assert written(trainer) == [one.ids for [one] in ours]
    assert ours != sample(trainer.model, tokenizer, PROMPTS, seed=1, max_new_tokens=12, temperature=0.9)


FLAGS = {
    "--temperature": "0.5", "--top_p": "0.3", "--top_k": "2", "--min_p": "0.9", "--repetition_penalty": "0.01",
    "--generation_kwargs": '{"bad_words_ids": [[' + "], [".join(map(str, range(3, 300))) + "]]}",
}  # fmt: skip


@pytest.fixture(scope="module")
def without_flags(tokenizer):
    return [one.ids for [one] in sample(toys.llama(), tokenizer, PROMPTS, seed=1, max_new_tokens=12)]


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_reaches_training_held_out_prompts_and_baselines(tokenizer, tmp_path, without_flags, flag):
    """What is written changes, to the same ids in all three."""
    words = [flag, FLAGS[flag], "--max_new_tokens", "12"]
    args, rest = train_grpo_multilevel_unsloth.parse_args([*words, "--output_dir", str(tmp_path)])
    config = grpo_config(args, rest, plan_batches(2, None, 2))[0]
    trainer = grpo(
        tmp_path,
        tokenizer,
        **{name: getattr(config, name) for name in asdict(Sampling()) if name != "max_new_tokens"},
        max_completion_length=12,
    )
    ours = sample(trainer.model, tokenizer, PROMPTS, seed=1, **asdict(sampling(args)))
    assert written(trainer) == [one.ids for [one] in ours] != without_flags
    of_baselines = generation(compute_baselines_trl.parse_args([*words, "--generate", "2"]))
    assert {name: of_baselines[name] for name in asdict(sampling(args))} == asdict(sampling(args))
    notice = other_sampling(Baselines({}, {"generated": {"max_new_tokens": 12}}, "b.pkl"), sampling(args))
    assert f"this run samples with {flag.removeprefix('--')} " in notice


def test_baselines_of_own_writing_are_sampled_as_they_say(tokenizer, tmp_path):
    model, folder, baselines = toys.llama(), tmp_path / "model", tmp_path / "baselines.json"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": prompt, "id": str(number)} for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = {**NARROW, "max_new_tokens": 12, "generation_kwargs": {"no_repeat_ngram_size": 2}}
    words = [word for name, value in settings.items()
             for word in (f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value))]  # fmt: skip
    assert compute_baselines_trl.main([
        "--model_name", str(folder), "--dataset_name", str(tmp_path / "rows.json"), "--generate", "2", "--seed", "3",
        "--output_path", str(baselines), *words,
    ]) == 0  # fmt: skip
    assert read_meta(baselines)["generated"] == {"generate": 2, "seed": 3, **settings}
    groups = sample(model, tokenizer, PROMPTS, num_generations=2, seed=3, **settings)
    pairs = [Sampled(tuple(one.prompt_ids), tuple(one.written)) for group in groups for one in group]
    levels = MultiLevelPPLCalculator(tokenizer).score_pairs(model, pairs).reshape(-1, 2, 3).mean(axis=1)
    found = json.loads(baselines.read_text())
    for row, expected in enumerate(levels):
        assert [found[str(row)][level] for level in LEVELS] == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_run_samples_everywhere_as_its_flags_say_and_names_baselines_of_other_sampling(tmp_path):
    """One token is left to choose from, so that all completions of a prompt are alike: in training and in the table."""
    own = tmp_path / "own.json"
    assert compute_baselines_trl.main([
        "--generate", "2", "--num_samples", "12", "--max_new_tokens", "8", "--no_unsloth",
        "--output_path", str(own),
    ]) == 0  # fmt: skip
    done = train(
        *SHORT, "--no_unsloth", "--output_dir", tmp_path / "out", "--baselines_path", own, "--max_steps", "1",
        "--max_samples", "12", "--max_new_tokens", "8", "--top_k", "1", "--repetition_penalty", "1.3",
    )  # fmt: skip
    named = "sampled with top_k 0, repetition_penalty 1.0, and this run samples with top_k 1, repetition_penalty 1.3"
    assert named in done.stderr
    held_out = json.loads((tmp_path / "out" / "heldout.json").read_text())
    expected = asdict(Sampling(max_new_tokens=8, top_k=1, repetition_penalty=1.3))
    assert {name: held_out["sampling"][name] for name in expected} == expected
    for side in ("before", "after"):
        assert [len(set(group)) for group in held_out[side]["completions"]] == [1, 1]


def test_what_baselines_do_not_say_of_their_sampling_was_off():
    made = {"generate": 4, "max_new_tokens": 64, "temperature": 0.9, "seed": 7}
    baselines = Baselines({}, {"generated": made}, "b.pkl")
    assert other_sampling(baselines, Sampling(max_new_tokens=64, temperature=0.9)) is None
    notice = other_sampling(baselines, Sampling(max_new_tokens=64, temperature=0.9, top_p=0.5))
    assert notice.startswith("b.pkl: ") and "with top_p 1.0, and this run samples with top_p 0.5," in notice
    for meta in ({}, {"generated": None}):  # of a data set's texts, or of unknown make
        assert other_sampling(Baselines({}, meta, "b.pkl"), Sampling(top_p=0.5)) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_p": 1.5}, "--top_p is 1.5, expected a number from 0 to 1"),
        ({"min_p": -0.1}, "--min_p is -0.1, expected a number from 0 to 1"),
        ({"top_k": -1}, "--top_k is -1, expected a number of at least 0"),
        ({"temperature": 0}, "--temperature is 0, expected a number above 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens is 0, expected a number above 0"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty is 0.0, expected a number above 0"),
        ({"generation_kwargs": {"top_p": 0.5}}, "holds 'top_p': use the flag --top_p"),
        ({"generation_kwargs": {"no_repeat_ngram": 2}}, "did you mean no_repeat_ngram_size?"),
        ({"generation_kwargs": {"num_beams": 2}}, "holds 'num_beams': expected what changes the probability"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "holds 'num_return_sequences'"),
        ({"generation_kwargs": {"return_dict_in_generate": True}}, "holds 'return_dict_in_generate'"),
        ({"generation_kwargs": {"stop_strings": ["."]}}, "holds 'stop_strings'"),
        ({"generation_kwargs": {"do_sample": False}}, "holds 'do_sample'"),
        ({"generation_kwargs": {"eos_token_id": 3}}, "holds 'eos_token_id'"),
        ({"generation_kwargs": {"typical_p": 3}}, "'typical_p': 3, expected a number above 0 and below 1"),
        ({"generation_kwargs": {"no_repeat_ngram_size": "2"}}, "expected a whole number of at least 1"),
        ({"generation_kwargs": {"bad_words_ids": [3]}}, "expected a list of lists of token ids"),
    ],
)
def test_what_cannot_be_sampled_alike_everywhere_is_refused(settings, words):
    with pytest.raises(InputError) as caught:
        Sampling(**settings)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["suppress_tokens", "begin_suppress_tokens", "bad_words_ids"])
def test_the_id_of_a_token_that_the_model_has_not_is_refused(tokenizer, name):
    value = [[3], [toys.VOCABULARY]] if name == "bad_words_ids" else [3, toys.VOCABULARY]
    with pytest.raises(InputError, match=f"holds '{name}' with the id 512: expected ids below 512"):
        sample(toys.llama(), tokenizer, PROMPTS, generation_kwargs={name: value})


def test_every_kwarg_that_is_allowed_is_tried_and_known_to_transformers():
    assert set(EVERY_KWARG) == set(GENERATION_KWARGS) <= set(vars(GenerationConfig()))


# --- generation_config.json ------------------------------------------------------------------------------------------


LEAKS = [
    {"min_p": 0.3},
    {"num_beams": 2},
    {"num_beams": 2, "early_stopping": True, "length_penalty": 3.0, "num_return_sequences": 2},
    {"no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 1},
    {"do_sample": True, "num_return_sequences": 2},
    {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    {"stop_strings": ["the", "e"]},
    {"temperature": 0.1, "top_k": 1, "top_p": 0.1, "do_sample": False, "repetition_penalty": 5.0},
    {"typical_p": 0.1},
    {"top_h": 0.1},
    {"epsilon_cutoff": 0.9},
    {"eta_cutoff": 0.9},
    {"encoder_repetition_penalty": 5.0},
    {"suppress_tokens": list(range(3, 200))},
    {"begin_suppress_tokens": list(range(3, 300))},
    {"bad_words_ids": [[token] for token in range(3, 200)]},
    {"sequence_bias": [[[5], 50.0]]},
    {"forced_bos_token_id": 5},
    {"forced_eos_token_id": 5},
    {"exponential_decay_length_penalty": [1, 5.0]},
    {"min_new_tokens": 12},
    {"min_length": 40},
    {"max_length": 5, "max_time": 1e-9},
    {"guidance_scale": 5.0},
    {"watermarking_config": {"greenlist_ratio": 0.1, "bias": 20.0}},
    {"prompt_lookup_num_tokens": 3},
    {"renormalize_logits": True, "remove_invalid_values": True, "use_cache": False},
    {"cache_implementation": "static", "max_cache_len": 4},
    {"bos_token_id": 9, "decoder_start_token_id": 9, "token_healing": True},
    {"penalty_alpha": 0.6, "num_beam_groups": 2, "diversity_penalty": 1.0},
    {"custom_key": 1},
]


@pytest.fixture(scope="module")
def plain(tokenizer, tmp_path_factory):
    """The toy Llama's trainer, and what is written with generation settings that say nothing but the end token."""
    trainer = grpo(tmp_path_factory.mktemp("plain"), tokenizer)
    ours = sample(trainer.model, tokenizer, PROMPTS, num_generations=2, max_new_tokens=12, seed=1)
    return trainer, written(trainer), ours


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: " ".join(leak))
def test_nothing_of_a_models_generation_settings_acts_on_the_sampling(plain, tokenizer, leak):
    trainer, trained, ours = plain
    model, before = trainer.model, trainer.model.generation_config
    settings = GenerationConfig(eos_token_id=before.eos_token_id, pad_token_id=before.pad_token_id, **leak)
    model.generation_config, kept = settings, settings.to_dict()
    try:
        assert sample(model, tokenizer, PROMPTS, num_generations=2, max_new_tokens=12, seed=1) == ours
        assert written(trainer) == trained
        assert model.generation_config is settings and settings.to_dict() == kept
    finally:
        model.generation_config = before


def test_its_end_tokens_still_end_a_completion(tokenizer, tmp_path):
    model = toys.llama()
    model.generation_config.eos_token_id = [1, *range(20, 80)]
    [group] = sample(model, tokenizer, PROMPTS[:1], num_generations=16, max_new_tokens=12)
    ended = [one for one in group if len(one.ids) < 12]
    assert len(ended) >= 8 and all(one.ids[-1] in model.generation_config.eos_token_id for one in ended)
    trainer = grpo(tmp_path, tokenizer, model=model)
    ours = sample(model, tokenizer, PROMPTS, max_new_tokens=12, seed=5)
    assert written(trainer, seed=5) == [one.ids for [one] in ours]


@pytest.mark.parametrize("sampled", [True, None])  # transformers refuses to save `min_p` beside None
def test_the_model_is_saved_with_the_settings_its_author_wrote(tokenizer, tmp_path, sampled):
    model = toys.llama()
    model.generation_config = GenerationConfig(min_p=0.3, do_sample=sampled, eos_token_id=1)
    trainer = grpo(tmp_path, tokenizer, model=model, save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for folder in ("saved", "checkpoint-1"):
        kept = GenerationConfig.from_pretrained(tmp_path / folder)
        assert (kept.min_p, kept.do_sample) == (0.3, sampled)


def test_the_base_model_of_an_adapter_is_asked_without_its_settings(tokenizer):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(toys.llama(), LoraConfig(target_modules=["q_proj"]))
    before = sample(model, tokenizer, PROMPTS, max_new_tokens=12)
    model.get_base_model().generation_config.min_p = 0.3
    assert sample(model, tokenizer, PROMPTS, max_new_tokens=12) == before


# --- models that read padding ----------------------------------------------------------------------------------------


READ_PADDING = ("rwkv", "bart", "xlnet", "doge", "reformer", "prophetnet", "whisper")
DO_NOT = ("llama", "gpt2", "bloom", "opt", "mamba", "mamba2", "falcon_mamba", "falcon_h1", "lfm2", "openai-gpt", "mpt")


@pytest.mark.parametrize("name", READ_PADDING + DO_NOT)
def test_a_prompt_is_continued_beside_a_longer_one_as_it_is_alone(name, tokenizer):
    """By the likeliest token, so that no random number tells them apart."""
    model = zoo.toy(name)
    prompts = ["The fox", "Once upon a time the fox ran home to the old mill", "Once upon a time", "The fox"]
    asked = {"max_new_tokens": 6, "temperature": 1e-4}
    alone = [sample(model, tokenizer, [prompt], **asked)[0] for prompt in prompts]
    assert sample(model, tokenizer, prompts, **asked) == alone
    assert ignores_padding(model) == (name in DO_NOT)


def test_a_policy_that_reads_padding_is_not_trained_on_batches_of_unequal_prompts(tokenizer, tmp_path):
    folder, rows = tmp_path / "model", tmp_path / "rows.json"
    zoo.toy("rwkv").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows.write_text(json.dumps([{"prompt": "The fox ran. " * (row + 1)} for row in range(12)]))
    line = refusal(
        "--model_name", folder, "--dataset_name", rows, "--no_unsloth", "--no-load_in_4bit", "--max_new_tokens", "8",
        "--per_device_train_batch_size", "4", "--num_generations", "2", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert "rwkv reads the padding" in line and "--per_device_train_batch_size 2" in line
