"""Where a real model matters: SmolLM2-135M-Instruct, pretrained and chat-tuned, on text that people wrote."""

import json
import math

import brute_force
import pytest
import torch
import warm
from safetensors.torch import load_file
from training_runs import EXAMPLES, run_code, train

from mlppl.models import load_model
from mlppl.prompts import render_prompt
from mlppl.scoring.calculator import MultiLevelPPLCalculator
from mlppl.scoring.sampling import prompt_ids
from mlppl.scoring.tokens import TextEncoder

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]

# Aesop, in the translation of G. F. Townsend, 1867.
BEGINNING = "A Dog, crossing a bridge over a stream with a piece of flesh in his mouth, saw his own shadow in the water"
END = " and took it for that of another Dog, with a piece of meat double his own in size."
OTHER_END = " The Ant lent her ear to the Grasshopper, who sang through the summer."
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def smollm2():
    """(model, tokenizer), float32"""
    return load_model("smollm2")[:2]


def test_human_text_equals_the_slow_twin(smollm2):
    model, tokenizer = smollm2
    for aggregation, context, text in (
        ("geometric", BEGINNING, END),
        ("geometric", "", BEGINNING[:41]),
        ("nested", BEGINNING[:41], BEGINNING[41:75]),
    ):
        calculator = MultiLevelPPLCalculator(tokenizer, aggregation=aggregation)
        found = calculator.compute_all_levels(model, [text], [context])
        slow = brute_force.all_levels(model, tokenizer, text, context, aggregation=aggregation)
        for level, value in slow.items():
            assert math.isclose(float(found[level]), value, rel_tol=1e-4), (aggregation, level)


def test_it_makes_use_of_what_stands_before(smollm2):
    """What the embedded model does not: so weights, rotation and tokenizer are read as they were meant."""
    model, tokenizer = smollm2
    contexts = ["", BEGINNING, "dog, shadow, water, meat, size. " + BEGINNING, OTHER_END]
    levels = MultiLevelPPLCalculator(tokenizer).compute_all_levels(model, [END] * 4, contexts)
    alone, behind_its_beginning, behind_its_words, behind_another = levels["word"].tolist()
    assert behind_its_words < behind_its_beginning < alone and behind_its_beginning < behind_another
    assert behind_its_words < 0.7 * behind_another


def test_in_a_chat_the_scorer_reads_what_the_policy_reads(smollm2):
    model, tokenizer = smollm2
    [ids] = prompt_ids([CHAT], tokenizer)
    rendered = render_prompt(CHAT, tokenizer)
    assert rendered.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(ids) == rendered
    [encoded] = TextEncoder(tokenizer).encode([rendered], [BEGINNING])
    assert encoded.ids.tolist()[: len(ids)] == ids  # one <|im_start|> at the beginning, which is the BOS, too
    assert encoded.positions[0] == len(ids) and ids.count(tokenizer.bos_token_id) == 3
    assert (
        tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == model.generation_config.eos_token_id
    )
    # An answer is ended by the token that a turn ends with.
    with torch.no_grad():
        answer = tokenizer("The capital of France is Paris.<|im_end|>")["input_ids"]
        logits = model(torch.tensor([[*ids, *answer]])).logits[0, -2]
    assert logits.argmax() == tokenizer.eos_token_id


LOAD = """
import unsloth
from mlppl.models import load_model
from mlppl.scoring.calculator import MultiLevelPPLCalculator
model, tokenizer, reason = load_model("smollm2", load_in_4bit=True, unsloth=True)
assert reason is None, reason
levels = MultiLevelPPLCalculator(tokenizer).compute_all_levels(model, [{end!r}], [{beginning!r}])
kinds = {{type(module).__name__ for module in model.modules()}}
print(float(levels["word"]), "Linear4bit" in kinds, tokenizer.pad_token, tokenizer.eos_token, model.config.vocab_size)
"""


def test_unsloth_loads_it_in_4_bit(smollm2):
    import subprocess

    model, tokenizer = smollm2
    command = [warm.python(), "-c", LOAD.format(end=END, beginning=BEGINNING)]
    printed = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=True).stdout
    perplexity, *facts = printed.strip().splitlines()[-1].split()
    assert facts == ["True", "<|endoftext|>", "<|im_end|>", "49152"]
    in_32_bit = MultiLevelPPLCalculator(tokenizer).compute_all_levels(model, [END], [BEGINNING])["word"]
    assert 0 < abs(math.log(float(perplexity) / float(in_32_bit))) < 0.4  # quantised twice


STEP = [
    *("--model_name", "smollm2", "--chat", "--max_samples", "6", "--heldout_samples", "1", "--max_new_tokens", "8"),
    *("--per_device_train_batch_size", "4", "--num_generations", "4", "--max_steps", "1", "--logging_steps", "1"),
    *("--reward_form", "nats", "--learning_rate", "1e-3", "--save_strategy", "no", "--aggregation", "nested"),
    *("--prompt_template", "Continue the story: {prompt}", "--ppl_weights", "1", "1", "1"),
]
FLAT = {"word": 60.0, "phrase": 1.0, "sentence": 1.0}  # about what it writes: with equal weights the product counts


@pytest.mark.parametrize("target", ["completion", "reference"])
def test_a_step_of_training_moves_the_policy(tmp_path, target):
    """In 4 bit by Unsloth for the first target, in 32 bit by transformers and PEFT for the second."""
    stories = json.loads((EXAMPLES / "tiny_stories" / "train.json").read_text())[:6]
    rows = [{name: value.split(".")[0] for name, value in story.items()} for story in stories]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    if target == "completion":
        (tmp_path / "flat.json").write_text(json.dumps({row["id"]: FLAT for row in rows}))
        way = ["--baselines_path", tmp_path / "flat.json"]
    else:
        way = ["--no_unsloth", "--no-load_in_4bit"]
    done = train(
        *STEP, *way, "--dataset_name", tmp_path / "rows.json", "--target", target, "--output_dir", tmp_path / "out"
    )
    assert ("Training with Unsloth\n" in done.stdout) == (target == "completion")
    heldout = json.loads((tmp_path / "out" / "heldout.json").read_text())
    before, after = heldout["before"]["scores"], heldout["after"]["scores"]
    assert abs(before["KL"]) < 1e-3 and before["KL"] != after["KL"]
    assert all(math.isfinite(value) for value in after.values())
    # A plan of eight tokens moves the reference by some percent, and never by half.
    assert target == "completion" or abs(before["reward"]) < 0.4
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    moved = [weights.abs().max() for name, weights in adapter.items() if "lora_B" in name]  # which begin at 0
    assert len(moved) == 30 * 7 and all(5e-4 < one < 2e-3 for one in moved)  # a step of Adam is the learning rate
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"].rpartition("/")[2].startswith("SmolLM2-135M-Instruct")
    if target == "reference":
        [message] = heldout["before"]["prompts"][0]
        written = run_code((tmp_path / "out" / "README.md").read_text(), tmp_path)
        assert f"user\n{message['content']}\nassistant\n" in written and (tmp_path / "out" / "merged").is_dir()
