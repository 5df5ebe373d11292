"""A GRPO step on one GPU, with its parts and its peak memory: with Unsloth, with transformers + PEFT, one at a time."""

from typing import NamedTuple

from common import Rows, grpo_step, read_rows
from gpu_models import random_texts

UNSLOTH, PEFT = "GRPO with Unsloth", "GRPO with transformers + PEFT"


class Sizes(NamedTuple):
    prompts: int
    tokens: int  # of a completion; its prompt has half as many
    batch: int  # completions of one forward and backward pass
    steps: int  # of which the first, with its compilation, is not counted


FULL = Sizes(8, 256, 8, 2)
SMALL = Sizes(2, 16, 4, 2)


def unsloth(rows: Rows, toy: bool, folder: str) -> None:
    sizes = SMALL if toy else FULL
    _step(rows, UNSLOTH, sizes, folder, unsloth=True, most_gigabytes=24, most_reward=0.1)


def batch_of_one(rows: Rows, toy: bool, folder: str) -> None:
    sizes = (SMALL if toy else FULL)._replace(prompts=1, batch=1)
    _step(rows, f"{UNSLOTH}, batch 1", sizes, folder, unsloth=True, most_gigabytes=10)


def peft(rows: Rows, toy: bool, folder: str) -> None:
    sizes = SMALL if toy else FULL
    measured = _step(rows, PEFT, sizes, folder, unsloth=False)
    theirs = [row for row in read_rows(rows.path) if row["what"].startswith(f"{UNSLOTH}: ")]
    other = {row["what"].removeprefix(f"{UNSLOTH}: "): row["value"] for row in theirs}
    if "step" in other:
        speedup = measured["step"] / other["step"]
        rows.add("Unsloth against transformers + PEFT", ratio=speedup, target=1.5, of="their step times")
    if "perplexity" in other:
        off = 100 * abs(other["perplexity"] / measured["perplexity"] - 1)
        rows.add("Unsloth's perplexity of a text against transformers': deviation", off, "%")


def _step(rows: Rows, title: str, sizes: Sizes, folder: str, unsloth: bool, most_gigabytes=None, most_reward=None):
    from transformers import AutoTokenizer

    prompts = random_texts(AutoTokenizer.from_pretrained(folder), [sizes.tokens // 2] * sizes.prompts * sizes.steps)
    measured = grpo_step(
        model=folder, unsloth=unsloth, in_4bit=True, prompts=prompts, group=8, batch=sizes.batch,
        new_tokens=sizes.tokens, steps=sizes.steps,
    )  # fmt: skip
    size = f"{sizes.prompts} x 8 completions of {sizes.tokens} tokens, {sizes.batch} at a time"
    rows.add(f"{title}: step", measured["step"], "s", of=size)
    for part in ("generation", "reward", "rest"):
        target = most_reward if part == "reward" else None
        share = measured[part] / measured["step"]
        rows.add(f"{title}: {part}", measured[part], "s", share, target, least=False, of="the step")
    for name, seconds in measured["rewards"].items():
        target = {"geometric": 0.1, "nested": 0.2}[name] if most_reward else None
        share = seconds / (measured["step"] - measured["reward"] + seconds)
        rows.add(f"{title}: the reward alone, {name}", seconds, "s", share, target, least=False, of="a step with it")
    of = "weights included, what PyTorch reserved"
    rows.add(f"{title}: peak memory", measured["peak"] / 1e9, "GB", None, most_gigabytes, least=False, of=of)
    rows.add(f"{title}: peak memory in tensors", measured["allocated"] / 1e9, "GB")
    rows.add(f"{title}: perplexity", measured["perplexity"], of="of the first prompt, after training, adapter off")
    return measured
