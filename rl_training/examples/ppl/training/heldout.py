"""The same held-out prompts before and after training: what the model writes, and what the reward says of it."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..data import Text, render_prompt
from ..definitions import LEVELS
from ..files import write_text
from ..processes import from_all, is_sharded, share
from ..reward.function import MultiLevelPPLRewardFunction, row_baselines
from ..sampling import prompt_ids, sample
from ..scoring.surprisal import SurprisalScorer
from ..scoring.tokens import Sampled, TextEncoder
from ..variety import distinct


@dataclass(frozen=True)
class HeldOut:
    """prompts; `num_generations` completions a prompt and their rewards, nan where skipped; scores: means, by name;
    completion_ids: what was sampled, of which the completions are the text."""

    prompts: list
    completions: list[list[str]]
    rewards: list[list[float]]
    scores: dict[str, float]
    completion_ids: list[list[list[int]]] | None = None


def evaluate(
    model,
    tokenizer,
    reward_fn: MultiLevelPPLRewardFunction,
    rows,
    penalties: Sequence[tuple[Callable, float]] = (),
    *,
    start,
    num_generations: int,
    **sampling,
) -> HeldOut:
    """Sample completions for the prompts of `rows` and score them with the reward, before its `normalize`.

    Several processes must all call; each does its share of the rows, and all get the whole.

    rows: a data set of `prepare_dataset`. penalties: the reward functions of completion ids beside it, with their
    weights (`ppl.reward.loop_guard`); their mean is the score "loop penalty". start: the model as it was before
    training: `model` itself if it trains adapters, a frozen copy, or None without one. sampling: keywords of
    `ppl.sampling.sample`.
    """
    # Weights spread over processes are gathered for every forward pass, so all must sample equally often.
    places = share(len(rows), padded=is_sharded(model))
    columns = {name: [rows[name][place] for place in places] for name in rows.column_names}
    groups = sample(model, tokenizer, columns["prompt"], num_generations=num_generations, **sampling)
    completions = [[completion.text for completion in group] for group in groups]
    texts = [text for group in completions for text in group]
    ids = [completion.ids for group in groups for completion in group]

    def repeated(column):
        return None if column is None else [value for value in column for _ in range(num_generations)]

    def measured():
        return reward_fn.compute_rewards(
            texts,
            prompts=repeated(columns["prompt"]),
            references=repeated(columns.get("reference")),
            ids=repeated(columns.get("id")),
            baselines=repeated(row_baselines(columns)),
            completion_ids=ids,
            return_details=True,
        )[1]

    # Without baselines, completions make their prompt's at the first visit, and are measured at the second: before
    # training against the same ones as after it.
    details = measured()
    if reward_fn.target == "completion" and reward_fn.baselines is None:
        details = measured()
    moved = kl_by_text(model, start, tokenizer, repeated(columns["prompt"]), ids)
    levels = [details[name][level] for name in ("improvements", "ppls") for level in LEVELS]
    table = np.stack([np.asarray(column) for column in (details["rewards"], *levels)], axis=1)
    table = np.concatenate([table, np.reshape(moved, (-1, 2))], axis=1).reshape(len(places), num_generations, -1)
    grouped = [[completion.ids for completion in group] for group in groups]
    found = dict(zip(from_all(places), from_all(zip(completions, grouped, table.tolist(), strict=True)), strict=True))
    completions, grouped, table = zip(*(found[place] for place in range(len(rows))), strict=True)
    texts = [text for group in completions for text in group]
    rewards, *levels, moved, tokens = np.moveaxis(np.array(table), -1, 0)
    means = [float(torch.from_numpy(values.ravel()).nanmean()) for values in (rewards, *levels)]
    names = ["reward", *(f"{level} improvement %" for level in LEVELS), *(f"{level} PPL" for level in LEVELS)]
    scores = {
        **dict(zip(names, means, strict=True)),
        "KL": kl_a_token(moved, tokens),
        "distinct-2": distinct(texts, 2),
        "repetition": 1 - distinct(texts, 3),
        "words": sum(len(text.split()) for text in texts) / len(texts),
    }
    if penalties:
        ids = [one for group in grouped for one in group]
        means = [weight * float(np.mean(penalty(completion_ids=ids))) for penalty, weight in penalties]
        scores["loop penalty"] = sum(means)
    return HeldOut(list(rows["prompt"]), list(completions), rewards.tolist(), scores, list(grouped))


def write_heldout(path: Path, sampling: dict, before: HeldOut, after: HeldOut | None = None) -> None:
    """JSON `{"sampling", "before": {"prompts", "completions", "rewards", "scores", ...}, "after": the same or null}`.

    sampling: how `evaluate` sampled. What is nan becomes null.
    """
    content = {"sampling": sampling, "before": asdict(before), "after": after and asdict(after)}
    text = json.dumps(_without_nan(content), ensure_ascii=False, indent=1, allow_nan=False)
    write_text(path, text, "surrogatepass")


def read_before(path: Path, rows, sampling: dict) -> HeldOut | None:
    """What a run that is resumed has measured before its first step; None if it was with other prompts or sampling."""
    if not path.exists():
        return None
    kept = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
    if kept["sampling"] != sampling or kept["before"]["prompts"] != list(rows["prompt"]):
        return None
    before = kept["before"]
    rewards = [[math.nan if reward is None else reward for reward in group] for group in before["rewards"]]
    scores = {name: math.nan if score is None else score for name, score in before["scores"].items()}
    return HeldOut(before["prompts"], before["completions"], rewards, scores, before.get("completion_ids"))


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def kl_by_text(
    model, start, tokenizer, prompts: Sequence[Text], completions: Sequence[str] | Sequence[Sequence[int]]
) -> list[tuple]:
    """How far training has moved the model from its start, per completion: (sum over its tokens, their number).

    The start's surprisal of a token minus the model's own, in nats. `start`: `model` itself stands for it with its
    adapters off; None: 0 of 0 tokens. completions: the ids that were sampled, or texts.
    """
    if start is None:
        return [(0.0, 0)] * len(completions)
    pairs = [
        (render_prompt(prompt, tokenizer), one) if isinstance(one, str) else Sampled(tuple(given), tuple(one))
        for prompt, given, one in zip(prompts, prompt_ids(prompts, tokenizer), completions, strict=True)
    ]
    encoded, _ = TextEncoder(tokenizer).encode_pairs(pairs)
    own = SurprisalScorer(model, adapters=True).score(encoded)
    of_start = SurprisalScorer(start).score(encoded)
    return [((b - a).sum(), len(a)) for a, b in zip(own, of_start, strict=True)]


def kl_a_token(sums: np.ndarray, tokens: np.ndarray) -> float:
    """An estimate of KL(model || start) a token, in nats, from what `kl_by_text` gives; nan without a token.

    Unbiased if the model wrote the completions at temperature 1.
    """
    return float(np.sum(sums) / np.sum(tokens)) if np.sum(tokens) else float("nan")
