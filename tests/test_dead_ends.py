"""What a user may bring that once crashed, or was passed over without a word: it works, or is said in one line."""

import json
from types import SimpleNamespace

import datasets
import peft
import pytest
import toys
from training_runs import SHORT, refusal, train
from transformers import AutoModelForCausalLM

import compute_baselines_trl
from mlppl.data import Columns, PromptForm, prepare_rows
from mlppl.errors import BaselineError, InputError
from mlppl.models import load_model, model_path
from mlppl.reward.loop_guard import copy_guard
from mlppl.scoring.sampling import prompt_ids, sample
from mlppl.scoring.tokens import TextEncoder
from mlppl.training.job import check_batch
from mlppl.training.policy import Loaded, check_prompts, check_trl, save_merged
from mlppl.training.settings import grpo_config, plan_batches
from multi_level_ppl_trl import LEVELS, MultiLevelPPLCalculator, MultiLevelPPLRewardFunction
from train_grpo_multilevel_unsloth import parse_args

# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_special_tokens_that_the_tokenizer_splits_are_split_here_too():
    tokenizer = toys.byte_level()
    text = "The <s> fox</s>"
    whole = TextEncoder(tokenizer).encode([""], [text])[0].ids.tolist()
    tokenizer.split_special_tokens = True
    split = TextEncoder(tokenizer).encode([""], [text])[0]
    assert split.ids.tolist() == [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert len(split.positions) == len(split.ids) - 1 > len(whole)


class Processor:
    """As those of Gemma 3 and Qwen-VL: it reads images, too, and has a tokenizer for the text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, images=None, text=None):
        raise AssertionError("asked for more than text")


def test_a_processor_stands_for_its_tokenizer(model, tokenizer):
    processor = Processor(tokenizer)
    texts = {"texts": " said nothing.", "contexts": "The fox"}
    expected = MultiLevelPPLCalculator(tokenizer).compute_all_levels(model, **texts)
    assert MultiLevelPPLCalculator(processor).compute_all_levels(model, **texts) == expected
    document = "The fox ran home and slept."
    assert copy_guard(1.0, processor)[0](None, [document], [document]) == [-1]
    call = {"prompts": ["The fox"], "completions": [" said"], "completion_ids": [tokenizer(" said")["input_ids"]]}
    reward = MultiLevelPPLRewardFunction(model, processor)
    assert reward(**call) == [0] and reward(**call) == [0]
    assert prompt_ids(["The fox"], processor) == prompt_ids(["The fox"], tokenizer)
    assert sample(model, processor, ["The fox"], max_new_tokens=4) == sample(
        model, tokenizer, ["The fox"], max_new_tokens=4
    )


@pytest.mark.parametrize(("call", "words"), [
    (lambda m, t: MultiLevelPPLRewardFunction("gpt2", "gpt2"), "the model is 'gpt2', expected a loaded one"),
    (lambda m, t: MultiLevelPPLRewardFunction(t, m), "the model comes before its tokenizer"),
    (lambda m, t: MultiLevelPPLRewardFunction(m, "gpt2"), "the tokenizer is 'gpt2', expected a loaded"),
    (lambda m, t: MultiLevelPPLRewardFunction(m, m), "the tokenizer is 'LlamaForCausalLM"),
    (lambda m, t: MultiLevelPPLRewardFunction(m, t, policy=(t, m)), "the tokenizer is"),
    (lambda m, t: MultiLevelPPLCalculator(m), "the tokenizer is 'LlamaForCausalLM"),
    (lambda m, t: MultiLevelPPLCalculator(t).compute_all_levels("gpt2", "A fox."), "is 'gpt2'"),
    (lambda m, t: MultiLevelPPLCalculator(t).explain(t, "A fox."), "expected a loaded one"),
    (lambda m, t: MultiLevelPPLRewardFunction(m, t, baseline={"a": {}}), "mean baselines?"),
])  # fmt: skip
def test_what_is_no_model_no_tokenizer_or_no_setting_is_told_in_one_line(model, tokenizer, call, words):
    with pytest.raises(InputError) as error:
        call(model, tokenizer)
    assert words in str(error.value) and "\n" not in str(error.value)


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [("a \ud83d b", "half of a pair of surrogates, '\\ud83d'"), (None, "None, expected a string"),
     (3, "3, expected a string"), (b"a fox", "b'a fox', expected a string"), ([3], "[3], expected a string")],
)  # fmt: skip
def test_what_is_no_text_is_named(model, tokenizer, text, words):
    calculator = MultiLevelPPLCalculator(tokenizer)
    reward = MultiLevelPPLRewardFunction(model, tokenizer)
    for what, call in {
        "text 1": lambda: calculator.compute_all_levels(model, ["A fox.", text]),
        "text": lambda: calculator.explain(model, text),
        "completion 1": lambda: reward.compute_rewards(["A fox.", text]),
    }.items():
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value).startswith(what) and words in str(error.value)


CELLS = {"null": None, "empty": "", "number": 7, "boolean": True}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("column", ["prompt", "reference"])
def test_a_cell_that_is_no_text_is_named_or_empty(column, cell):
    """The same rows for training and baselines: null is empty, a number has no place among texts."""
    rows = [{"prompt": "The fox", "reference": " ran."}, {"prompt": "A crow", "reference": " flew."}]
    if not isinstance(CELLS[cell], str | None):
        rows = [{**row, column: CELLS[cell]} for row in rows]
    else:
        rows[1][column] = CELLS[cell]
    dataset = datasets.Dataset.from_list(rows)
    if isinstance(CELLS[cell], str | None):
        prepared = prepare_rows(dataset, Columns("prompt", "reference", None), PromptForm())
        assert prepared["prompt"] == (["The fox"] if column == "prompt" else ["The fox", "A crow"])
        assert prepared["reference"] == ([" ran."] if column == "prompt" else [" ran.", ""])
    else:
        with pytest.raises(InputError, match=f"row 0: column {column} holds {CELLS[cell]}, expected a string"):
            prepare_rows(dataset, Columns("prompt", "reference", None), PromptForm())


def test_a_row_that_is_no_utf_8_is_named():
    import pyarrow

    offsets = pyarrow.array([0, 1, 3], pyarrow.int32()).buffers()[1]
    prompts = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"aa\xa8"))
    dataset = datasets.Dataset(pyarrow.table({"prompt": prompts}))
    with pytest.raises(InputError, match=r"row \d of the data set is not UTF-8 .*: convert the file"):
        prepare_rows(dataset, Columns("prompt", None, None), PromptForm())


def test_what_the_model_writes_itself_needs_no_reference(tmp_path, monkeypatch):
    rows = [{"prompt": "The fox ran to the", "completion": None if n % 2 else " mill."} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({**row, "id": str(n)}) for n, row in enumerate(rows)))
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset_name", "rows.jsonl", "--output_path", "b.json", "--max_new_tokens", "8"]
    assert compute_baselines_trl.main([*flags, "--generate", "1"]) == 0
    assert sorted(json.loads((tmp_path / "b.json").read_text())) == ["0", "1", "2", "3"]
    assert compute_baselines_trl.main([*flags, "--overwrite"]) == 0  # of the data set's own texts there are two
    assert sorted(json.loads((tmp_path / "b.json").read_text())) == ["0", "2"]


# --- baselines --------------------------------------------------------------------------------------------------------


def test_baselines_without_a_row_are_refused(model, tokenizer, tmp_path):
    (tmp_path / "b.json").write_text("{}")
    for baselines in ({}, str(tmp_path / "b.json")):
        with pytest.raises(BaselineError, match="holds no row"):
            MultiLevelPPLRewardFunction(model, tokenizer, baselines)
    one = MultiLevelPPLRewardFunction(model, tokenizer, {"x": dict.fromkeys(LEVELS, 9.0)})
    assert len(one.baselines) == 1


# --- training ---------------------------------------------------------------------------------------------------------


def config(*flags):
    args, rest = parse_args(["--max_new_tokens", "12", "--per_device_train_batch_size", "8", *flags])
    return grpo_config(args, rest, plan_batches(8, None, 4, 1))[0]


def test_a_data_set_smaller_than_one_batch_is_refused():
    settings = config()
    prompts = settings.generation_batch_size // settings.num_generations
    check_batch(prompts, settings)
    with pytest.raises(InputError, match=rf"{prompts - 1} rows are left to train on, .* for {prompts} prompts"):
        check_batch(prompts - 1, settings)
    assert "one batch samples completions for 8 prompts" in refusal(
        "--max_samples", "6", "--per_device_train_batch_size", "64", "--num_generations", "8", "--no_unsloth"
    )


def test_the_columns_that_the_reward_needs_stay():
    assert config().remove_unused_columns is False
    with pytest.raises(InputError, match="--remove_unused_columns true takes id and reference"):
        config("--remove_unused_columns", "true")


def test_a_prompt_beyond_the_models_positions_is_refused_before_training(tokenizer):
    policy = Loaded(toys.gpt2(n_positions=32), tokenizer)
    job = SimpleNamespace(chat={}, config=SimpleNamespace(max_completion_length=12))
    prompt = "The fox " * 40
    fits = tokenizer.decode(tokenizer(prompt)["input_ids"][:20])
    assert len(tokenizer(fits)["input_ids"]) == 20
    check_prompts([fits], policy, policy, job)
    longer = tokenizer.decode(tokenizer(prompt)["input_ids"][:21])
    with pytest.raises(InputError, match=r"a prompt of 21 tokens, 'The fox .* up to 12 are more than the model's 32"):
        check_prompts([fits, longer], policy, policy, job)


def adapted(tmp_path, base=None, **options):
    """A trained adapter, by default on a model whose embeddings the LM head shares, and where it was saved."""
    base = base or toys.llama(tie_word_embeddings=True)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **options))
    model.save_pretrained(tmp_path / "adapter")
    return model


def test_a_merged_model_is_the_trained_one(tmp_path, tokenizer):
    model = adapted(tmp_path, target_modules=["q_proj", "v_proj"])
    save_merged(model, tokenizer, tmp_path / "adapter", tmp_path / "merged")
    ids = toys.torch.tensor([[5, 6, 7, 8]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    with toys.torch.no_grad():
        difference = merged(ids).logits.log_softmax(-1) - model.eval()(ids).logits.log_softmax(-1)
    assert difference.abs().mean() < 0.1


def test_a_merged_gpt2_of_4_bits_is_the_trained_one(tmp_path, tokenizer):
    """transformers' own `dequantize()` leaves its weights transposed: saved, they cannot be loaded."""
    toys.gpt2().save_pretrained(tmp_path / "gpt2")
    base, *_ = load_model(str(tmp_path / "gpt2"), load_in_4bit=True)
    options = {"r": 4, "init_lora_weights": False, "target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    model.save_pretrained(tmp_path / "adapter")
    save_merged(model, tokenizer, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    ids = toys.torch.tensor([[5, 6, 7, 8]])
    with toys.torch.no_grad():
        difference = merged(ids).logits.log_softmax(-1) - model(ids).logits.log_softmax(-1)
        with model.disable_adapter():
            moved = merged(ids).logits.log_softmax(-1) - model(ids).logits.log_softmax(-1)
    assert difference.abs().mean() < 0.1 * moved.abs().mean()


def test_a_model_that_rules_out_a_token_merges(tmp_path, tokenizer):
    """Minus infinity minus itself is NaN, and no difference."""
    base = toys.gpt2()
    with toys.torch.no_grad():
        base.transformer.wpe.weight[:, 0] = 1e3  # which the last norm makes 8 of, and the head minus infinity
        base.transformer.wte.weight[3, 0] = -toys.torch.inf
    model = adapted(tmp_path, base, target_modules=["c_attn"])
    assert model(input_ids=toys.torch.tensor([[5, 6]])).logits[0, 0, 3] == -toys.torch.inf
    save_merged(model, tokenizer, tmp_path / "adapter", tmp_path / "merged")


def test_a_merged_model_that_is_another_one_is_not_written(tmp_path, tokenizer):
    """An adapter on an embedding that is the head, too: merged, it would change both."""
    model = adapted(tmp_path, target_modules=["embed_tokens"])
    with pytest.raises(InputError, match=r"--save_merged: .* the adapter is saved unmerged in"):
        save_merged(model, tokenizer, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_an_adapter_of_single_tokens_merges_or_is_refused(tmp_path, tokenizer):
    model = adapted(tmp_path, target_modules=["q_proj"], trainable_token_indices=[5, 6])
    try:
        save_merged(model, tokenizer, tmp_path / "adapter", tmp_path / "merged")
    except InputError as error:
        assert "--save_merged" in str(error) and not (tmp_path / "merged").exists()
    else:
        ids = toys.torch.tensor([[5, 6, 7, 8]])
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
        with toys.torch.no_grad():
            difference = merged(ids).logits.log_softmax(-1) - model.eval()(ids).logits.log_softmax(-1)
        assert difference.abs().mean() < 0.1


def test_a_merge_that_is_refused_comes_after_all_else(tmp_path):
    """The adapter, the report and the held-out scores of the run are there; the adapter is one of embeddings."""
    base, tokenizer, _ = load_model("tiny-stories")
    options = {"target_modules": ["embed_tokens"], "r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    peft.get_peft_model(base, peft.LoraConfig(**options)).save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = model_path("tiny-stories")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    tokenizer.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    done = train(
        "--model_name", tmp_path / "adapter", "--output_dir", out, "--save_merged", "--no_unsloth", "--max_steps", "1",
        *SHORT, code=2,
    )  # fmt: skip
    assert done.stderr.strip().splitlines()[-1].startswith("error: --save_merged")
    assert (out / "adapter_model.safetensors").exists() and not (out / "merged").exists()
    assert json.loads((out / "heldout.json").read_text())["after"] is not None
    assert "after" in (out / "report.html").read_text()


@pytest.mark.parametrize(("version", "gpu", "works"), [
    ("1.14.2", False, True), ("1.15.0", False, False), ("1.15.0", True, True), ("1.16.0", False, True),
])  # fmt: skip
def test_a_trl_that_cannot_train_here_without_unsloth_is_said_in_one_line(monkeypatch, version, gpu, works):
    """Its log-probabilities ended in `'NoneType' object has no attribute 'apply'`."""
    monkeypatch.setattr("trl.__version__", version)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    if works:
        return check_trl("--no_unsloth")
    with pytest.raises(InputError, match=r"^TRL 1\.15\.0 cannot train .*--no_unsloth.*install trl==1\.14\.2 or .*$"):
        check_trl("--no_unsloth")
