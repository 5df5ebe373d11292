"""Scoring on one GPU: its speed against that of matrix products, a group behind one prompt, memory, precision."""

import functools
import json
import statistics
from pathlib import Path
from typing import NamedTuple

from common import (
    EXAMPLES,
    OTHERS,
    OUTER,
    SHOWN,
    Rows,
    alternate,
    behind_prompts,
    device,
    in_turn,
    peak_bytes,
    ratio,
    time_outer_levels,
    whole_rows,
)
from gpu_models import PUBLISHED, TOY, in_4bit, parameters, random_model, random_texts, word_tokenizer


class Sizes(NamedTuple):
    models: dict  # the largest last
    matrix: int  # side of the square matrices whose product is timed
    texts: int  # of 20 to 700 tokens
    prompt: int  # tokens
    group: int
    completion: int
    long_text: int  # 8 of them for the peak memory
    rounds: int


FULL = Sizes(PUBLISHED, 8192, 96, 4096, 8, 256, 4096, 3)
SMALL = Sizes(TOY, 64, 6, 256, 4, 16, 256, 1)


def sizes_of(toy: bool) -> Sizes:
    return SMALL if toy else FULL


def make_4bit(rows: Rows, toy: bool, folder: str) -> None:
    """Saves the largest model in 4 bit, with its tokenizer, to `folder`."""
    name = list(sizes_of(toy).models)[-1]
    kind, shape = sizes_of(toy).models[name]
    in_4bit(random_model(kind, shape)).save_pretrained(folder)
    word_tokenizer(shape["vocab_size"]).save_pretrained(folder)
    size = sum(file.stat().st_size for file in Path(folder).iterdir())
    rows.add(f"{name} made of random numbers, 4-bit weights saved", size / 1e9, "GB")


def largest(rows: Rows, toy: bool, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    sizes = sizes_of(toy)
    name = list(sizes.models)[-1]
    tokenizer = word_tokenizer(sizes.models[name][1]["vocab_size"])
    rate = matrix_rate(rows, sizes.matrix)
    model = random_model(*sizes.models[name])
    count = parameters(model)
    scoring_rows(rows, f"{name}, bf16", model, tokenizer, count, sizes, rate, target=None if toy else 0.5)
    del model
    small = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device()}).eval()
    scoring_rows(rows, f"{name}, 4-bit", small, tokenizer, count, sizes, rate)


def middle(rows: Rows, toy: bool, folder: str) -> None:
    _one_size(rows, toy, -2)


def smallest(rows: Rows, toy: bool, folder: str) -> None:
    _one_size(rows, toy, 0)


def _one_size(rows: Rows, toy: bool, index: int) -> None:
    sizes = sizes_of(toy)
    name = list(sizes.models)[index]
    tokenizer = word_tokenizer(sizes.models[name][1]["vocab_size"])
    rate = matrix_rate(rows, sizes.matrix)
    model = random_model(*sizes.models[name])
    count = parameters(model)
    scoring_rows(rows, f"{name}, bf16", model, tokenizer, count, sizes, rate)
    scoring_rows(rows, f"{name}, 4-bit", in_4bit(model), tokenizer, count, sizes, rate)
    memory_row(rows, f"{name}, bf16", model, tokenizer, sizes)


def memory_of_largest(rows: Rows, toy: bool, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    sizes = sizes_of(toy)
    name = list(sizes.models)[-1]
    tokenizer = word_tokenizer(sizes.models[name][1]["vocab_size"])
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device()}).eval()
    memory_row(rows, f"{name}, 4-bit", model, tokenizer, sizes)


def matrix_rate(rows: Rows, side: int) -> float:
    """Operations a second of a product of two bf16 matrices, the median of several."""
    import torch

    a, b = (torch.randn(side, side, device=device()).bfloat16() for _ in range(2))
    times = alternate({"product": lambda: [a @ b for _ in range(20)]}, 5)["product"]
    rate = 20 * 2 * side**3 / statistics.median(times)
    rows.add(f"product of two {side} x {side} bf16 matrices", rate / 1e12, "TFLOP/s")
    return rate


def scoring_rows(rows: Rows, title: str, model, tokenizer, count: int, sizes: Sizes, rate: float, target=None) -> None:
    import numpy as np

    from mlppl.scoring.calculator import MultiLevelPPLCalculator
    from mlppl.scoring.surprisal import SurprisalScorer
    from mlppl.scoring.tokens import TextEncoder

    lengths = [int(20 * 35 ** (n / (sizes.texts - 1))) for n in range(sizes.texts)]
    pairs = [("", text) for text in random_texts(tokenizer, lengths)]
    calculators = {name: MultiLevelPPLCalculator(tokenizer, aggregation=name) for name in ("geometric", "nested")}
    runs = {name: lambda one=one: one.score_pairs(model, pairs) for name, one in calculators.items()}
    seconds = alternate(runs, sizes.rounds)
    speed = statistics.median(seconds["geometric"])
    share = 2 * count * sum(lengths) / speed / rate
    span = f"{title}: {len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens"
    scorer, alone = SurprisalScorer(model), whole_rows()(model)
    scorer.score(TextEncoder(tokenizer).encode(*zip(*pairs[:1], strict=True)))
    of = f"2 x parameters x tokens, to the matrix rate; {scorer.way}"
    rows.add(span, sum(lengths) / speed, "tokens/s", share, target, of=of)
    slower = ratio(seconds["nested"], seconds["geometric"])
    rows.add(f"{span}, nested", statistics.median(seconds["nested"]), "s", slower, of="its time to geometric's")

    if scorer.window <= sizes.prompt + sizes.completion:
        return
    lengths = ([sizes.prompt] + [sizes.completion] * sizes.group) * (sizes.rounds + 1)
    groups = behind_prompts(random_texts(tokenizer, lengths), sizes.group)
    encoded = [TextEncoder(tokenizer).encode(*zip(*pairs, strict=True)) for pairs in groups]
    a, b = (np.concatenate(one.score(encoded[0])) for one in (scorer, alone))
    runs = {"alone": in_turn(alone.score, encoded), "shared": in_turn(scorer.score, encoded)}
    runs |= {name: in_turn(functools.partial(one.score_pairs, model), groups) for name, one in calculators.items()}
    seconds = alternate(runs, sizes.rounds)
    group = f"{title}: {sizes.group} x {sizes.completion} tokens behind the same {sizes.prompt}"
    rows.add(f"{group}, without sharing", statistics.median(seconds["alone"]), "s")
    ideal = sizes.group * (sizes.prompt + sizes.completion) / (sizes.prompt + sizes.group * sizes.completion)
    speedup = ratio(seconds["alone"], seconds["shared"])
    of = f"its speed-up, {speedup:.2f}, to the ideal one, {ideal:.2f}"
    median = statistics.median(seconds["shared"])
    rows.add(f"{group}, shared", median, "s", speedup / ideal, target and 0.85, of=of)
    rows.add(f"{group}: mean difference of a token's surprisal", float(np.mean(abs(a - b))), "nats")
    slower = ratio(seconds["nested"], seconds["geometric"])
    rows.add(f"{group}, nested", statistics.median(seconds["nested"]), "s", slower, of="its time to geometric's")
    outer_row(rows, title, model, tokenizer, sizes, target and OUTER)


def outer_row(rows: Rows, title: str, model, tokenizer, sizes: Sizes, target=None) -> None:
    """Levels prompt and examples, with other rows and examples as long as the group's own prompt and completions."""
    prompt, completion = sizes.prompt // 8, sizes.completion // 2
    texts = random_texts(tokenizer, [prompt, completion] * (SHOWN + OTHERS + 1))
    lengths = ([prompt] + [completion] * sizes.group) * (sizes.rounds + 1)
    groups = behind_prompts(random_texts(tokenizer, lengths, seed=1), sizes.group)
    _, seconds = time_outer_levels(model, tokenizer, texts, groups, sizes.rounds)
    geometric, outer = seconds.values()
    what = f"{title}: levels prompt and examples of {sizes.group} x {completion} tokens behind {prompt}"
    of = f"its time to geometric's, {SHOWN} examples and {OTHERS} other rows as long"
    rows.add(what, statistics.median(outer), "s", ratio(outer, geometric), target, least=False, of=of)


def memory_row(rows: Rows, title: str, model, tokenizer, sizes: Sizes) -> None:
    from mlppl.scoring.surprisal import SurprisalScorer
    from mlppl.scoring.tokens import TextEncoder

    scorer = SurprisalScorer(model)
    length = min(sizes.long_text, scorer.window - 1)
    encoded = TextEncoder(tokenizer).encode([""] * 8, random_texts(tokenizer, [length] * 8))
    scorer.score(encoded[:1])
    peak = peak_bytes(lambda: scorer.score(encoded))
    share = peak / (4 * 8 * length * len(tokenizer))
    of = "one float32 log-softmax of them"
    rows.add(f"{title}: memory beyond the weights, 8 x {length} tokens", peak / 1e9, "GB", share, of=of)


def precision(rows: Rows, toy: bool, folder: str) -> None:
    """A trained model, the embedded one, on stories it has not seen: its random twin would be right about nothing."""
    from mlppl.models import load_model
    from mlppl.scoring.calculator import MultiLevelPPLCalculator

    stories = json.loads((EXAMPLES / "tiny_stories" / "test.json").read_text(encoding="utf-8"))
    pairs = [("", row["prompt"] + row["completion"]) for row in stories]
    loads = {
        "float32": {"dtype": "float32"},
        "bf16": {"dtype": "bfloat16"},
        "4-bit": {"dtype": "bfloat16", "load_in_4bit": True},
    }
    model, tokenizer, _ = load_model("tiny-stories", device="cpu", dtype="float32")
    exact = MultiLevelPPLCalculator(tokenizer).score_pairs(model, pairs)
    for name, options in loads.items():
        model, tokenizer, _ = load_model("tiny-stories", **options)
        values = MultiLevelPPLCalculator(tokenizer).score_pairs(model, pairs)
        deviation(rows, f"embedded model, {name} on {device()}, against float32 on a CPU", values, exact)


def deviation(rows: Rows, what: str, values, exact) -> None:
    off = 100 * abs(values / exact - 1)
    rows.add(f"{what}: mean deviation of a perplexity", float(off.mean()), "%", of=f"largest {off.max():.2g} %")
