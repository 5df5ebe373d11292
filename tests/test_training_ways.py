"""What can be trained: adapters anew and further, all weights, other architectures, chat models; and what is saved."""

import json
import shutil

import pytest
import torch
import toys
from peft import PeftModel
from training_runs import EXAMPLES, SHORT, log_history, refusal, train
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration, pipeline

from mlppl import models
from mlppl.errors import InputError

TINY = EXAMPLES / "tiny_stories"
STEP = [*SHORT, "--learning_rate", "1e-2", "--save_steps", "1", "--heldout_samples", "1"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Prompts with baselines that some completions reach and some do not: a step teaches something. Two splits."""
    stories = json.loads((TINY / "train.json").read_text())[:22]
    levels = dict.fromkeys(("baseline_word", "baseline_phrase", "baseline_sentence"), 30.0)
    rows = [{"id": story["id"], "prompt": story["prompt"], **levels} for story in stories]
    folder = tmp_path_factory.mktemp("rows")
    (folder / "train.json").write_text(json.dumps(rows[:20]))
    (folder / "test.json").write_text(json.dumps(rows[20:]))
    return ["--dataset_name", folder]


@pytest.fixture(scope="module")
def merged(tmp_path_factory, rows):
    """A 4-bit adapter of one step, merged, with an evaluation before and after it."""
    out = tmp_path_factory.mktemp("merged") / "out"
    train(
        *STEP, *rows, "--output_dir", out, "--max_steps", "1", "--save_merged", "--eval_split", "test[:2]",
        "--eval_steps", "1", "--report_to", "tensorboard",
    )  # fmt: skip
    return out


def logits(model, tokenizer):
    ids = tokenizer("Once upon a time there was a small fox.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float().log_softmax(-1)


def test_card_and_page_say_that_the_data_carried_the_baselines(merged):
    assert "| Baselines | the data set's columns |" in (merged / "README.md").read_text(encoding="utf-8")
    assert "the data set&#39;s columns" in (merged / "report.html").read_text(encoding="utf-8")


def test_a_merged_model_needs_no_peft_and_is_the_one_that_was_trained(merged):
    tokenizer = AutoTokenizer.from_pretrained(merged / "merged")
    model = AutoModelForCausalLM.from_pretrained(merged / "merged")
    assert not hasattr(model.config, "quantization_config") and model.dtype == torch.bfloat16
    quantized = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    from transformers import BitsAndBytesConfig

    base = AutoModelForCausalLM.from_pretrained(TINY, quantization_config=BitsAndBytesConfig(**quantized))
    start = logits(base, tokenizer)
    trained = logits(PeftModel.from_pretrained(base, merged), tokenizer)
    found = logits(model, tokenizer)
    moved = (trained - start).abs().mean()
    assert moved > 0.02
    assert (found - trained).abs().mean() < 0.5 * moved  # bfloat16 of a model this small: about 0.01
    [written] = pipeline("text-generation", model=str(merged / "merged"))("Once", max_new_tokens=4)
    assert written["generated_text"].startswith("Once")


def test_a_held_out_split_is_evaluated_with_the_reward(merged):
    evaluations = [entry for entry in log_history(merged, 1) if "eval_reward" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 1]
    assert not (merged / "reward.png").exists()  # of one step there is no curve
    assert {"eval_reward_word", "eval_reward_phrase", "eval_reward_sentence", "eval_ppl/word"} <= set(evaluations[0])


def test_tensorboard_has_the_rewards_and_names_the_report(merged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [folder] = (merged / "runs").iterdir()
    logged = EventAccumulator(str(folder)).Reload()
    assert "eval/reward_word" in logged.Tags()["scalars"]
    [text] = logged.Tensors("report/text_summary")
    assert text.step == 1 and f"]({(merged / 'report.html').as_uri()})" in text.tensor_proto.string_val[0].decode()


def test_training_goes_on_with_an_adapter(merged, rows, tmp_path):
    train(*STEP, *rows, "--model_name", merged, "--output_dir", tmp_path / "further", "--max_steps", "1")
    first, second = (json.loads((folder / "heldout.json").read_text()) for folder in (merged, tmp_path / "further"))
    # The scorer is the base model, so that the further run starts where the first one ended.
    assert second["before"]["scores"]["KL"] == pytest.approx(first["after"]["scores"]["KL"], abs=1e-3)
    assert second["before"]["completions"] == first["after"]["completions"]
    config = json.loads((tmp_path / "further" / "adapter_config.json").read_text())
    assert (
        config["base_model_name_or_path"]
        == json.loads((merged / "adapter_config.json").read_text())["base_model_name_or_path"]
    )


@pytest.mark.parametrize("way", [[], ["--no_unsloth"]])
def test_full_fine_tuning_trains_all_weights_against_a_frozen_copy(tmp_path, rows, way):
    printed = train(*STEP, *rows, "--full_finetuning", "--output_dir", tmp_path, "--max_steps", "1", *way).stdout
    assert "Model and tokenizer" in printed and not (tmp_path / "adapter_config.json").exists()
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (TINY, tmp_path))
    assert all((after[name] != value.to(after[name].dtype)).any() for name, value in before.items())
    scores = json.loads((tmp_path / "heldout.json").read_text())
    assert scores["before"]["scores"]["KL"] == pytest.approx(0, abs=1e-4) and scores["after"]["scores"]["KL"] > 0.01


def test_unsloth_in_16_bit(tmp_path):
    printed = train(
        *STEP, "--no-load_in_4bit", "--dtype", "bfloat16", "--output_dir", tmp_path, "--max_steps", "1"
    ).stdout
    assert "Training with Unsloth" in printed and "4-bit = False" in printed and "bfloat16" in printed
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_gpt2_has_lora_on_its_own_projections(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model = toys.gpt2()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "gpt2")
    train(
        *STEP, "--no_unsloth", "--no-load_in_4bit", "--model_name", tmp_path / "gpt2", "--output_dir", tmp_path / "out",
        "--max_steps", "1", "--save_merged",
    )  # fmt: skip
    names = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    targets = {name.rpartition(".")[2] for name in names}
    assert targets == {"c_attn", "c_proj", "c_fc"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").config.model_type == "gpt2"


def test_a_chat_model_with_conversational_prompts(tmp_path):
    shutil.copytree(TINY, tmp_path / "chat", ignore=shutil.ignore_patterns("*.py", "train.json", "test.json"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    stories = json.loads((TINY / "train.json").read_text())[:20]
    rows = [{"id": s["id"], "prompt": [{"role": "user", "content": s["prompt"]}]} for s in stories]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    train(
        *STEP, "--model_name", tmp_path / "chat", "--dataset_name", tmp_path / "rows.json",
        "--output_dir", tmp_path / "out", "--max_steps", "2",
    )  # fmt: skip
    held_out = json.loads((tmp_path / "out" / "heldout.json").read_text())
    assert held_out["before"]["prompts"][0][0]["role"] == "user"
    assert any(text.strip() for text in held_out["after"]["completions"][0])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--full_finetuning", "--load_in_4bit"], ["--full_finetuning", "--load_in_4bit", "drop one"]),
        (["--full_finetuning", "--save_merged"], ["--save_merged", "--full_finetuning"]),
        (["--scorer_model", "./nowhere"], ["./nowhere", "does not exist"]),
        (["--eval_split", "dev"], ["dev", "train, test"]),
        (["--report_to", "trackio"], ["trackio", "pip install trackio"]),
    ],
)
def test_what_does_not_go_together_is_refused_before_loading(tmp_path, flags, words):
    line = refusal(*flags, "--output_dir", tmp_path / "out")
    for word in words:
        assert word in line


# --- models that see, too ---------------------------------------------------------------------------------------------


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def linear(model):
    return {name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}


@pytest.mark.parametrize("renamed", [False, True], ids=["seven projections", "all linear layers"])
def test_adapters_are_in_the_text_model_only(renamed, monkeypatch):
    """An adapter in the vision tower gets no gradient from a text, and DDP dies of it."""
    model = toys.gemma3()
    if renamed:
        monkeypatch.setattr(models, "LORA_TARGETS", ["c_attn", "c_proj"])
    text = {name for name in linear(model) if name.startswith("model.language_model.")}
    seeing = linear(model) - text - {"lm_head"}
    assert len(text) == 14 and any("q_proj" in name for name in seeing)
    adapted = models.add_lora(model, 4, 8, 0, unsloth=False)
    found = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    assert {name.removeprefix("base_model.model.") for name in found} == text
    adapted(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(one.grad is not None for one in adapted.parameters() if one.requires_grad)


def test_all_weights_are_those_that_a_text_passes_through():
    for model in (toys.gemma3(), toys.llama(), toys.gpt2()):
        models.train_text_only(model)
        model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
        frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
        assert all((one.grad is not None) == one.requires_grad for one in model.parameters())
        assert frozen == {name for name, _ in model.named_parameters() if "vision" in name or "projector" in name}


@pytest.mark.parametrize("make", [toys.qwen2_5_vl, t5])
def test_what_is_no_causal_language_model_is_called_by_its_name(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    toys.byte_level().save_pretrained(tmp_path)
    kind = "a vision-language model" if make is toys.qwen2_5_vl else "no causal language model"
    with pytest.raises(InputError, match=f"is {type(model).__name__}, {kind}: expected a model that transformers") as e:
        models.load_model(str(tmp_path))
    assert "\n" not in str(e.value)
