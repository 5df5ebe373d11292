"""The same held-out prompts before and after training: what the model writes, and what the reward says of it."""

import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from .baselines import write_atomically
from .data import message_text
from .reward import MultiLevelPPLRewardFunction, row_baselines
from .sampling import sample_completions
from .units import LEVELS


@dataclass(frozen=True)
class HeldOut:
    """prompts; `num_generations` completions a prompt and their rewards, nan where skipped; scores: means, by name."""

    prompts: list
    completions: list[list[str]]
    rewards: list[list[float]]
    scores: dict[str, float]


def evaluate(
    model, tokenizer, reward_fn: MultiLevelPPLRewardFunction, rows, *, num_generations: int, **sampling
) -> HeldOut:
    """Sample completions for the prompts of `rows` and score them with the reward, before its `normalize`.

    rows: a data set of `prepare_dataset`. sampling: keywords of `sample_completions`.
    """
    columns = {name: list(rows[name]) for name in rows.column_names}
    completions = sample_completions(model, tokenizer, columns["prompt"], num_generations=num_generations, **sampling)
    texts = [text for group in completions for text in group]

    def repeated(column):
        return None if column is None else [value for value in column for _ in range(num_generations)]

    _, details = reward_fn.compute_rewards(
        texts,
        prompts=repeated(columns["prompt"]),
        references=repeated(columns.get("reference")),
        ids=repeated(columns.get("id")),
        baselines=repeated(row_baselines(columns)),
        return_details=True,
    )
    scores = {
        "reward": float(details["rewards"].nanmean()),
        **{f"{level} improvement %": float(details["improvements"][level].nanmean()) for level in LEVELS},
        **{f"{level} PPL": float(details["ppls"][level].nanmean()) for level in LEVELS},
        "distinct-2": distinct_2(texts),
        "words": sum(len(text.split()) for text in texts) / len(texts),
    }
    rewards = details["rewards"].reshape(-1, num_generations).tolist()
    return HeldOut(columns["prompt"], completions, rewards, scores)


def write_heldout(path: Path, before: HeldOut, after: HeldOut | None) -> None:
    """JSON `{"before": {"prompts", "completions", "rewards", "scores"}, "after": the same or null}`; null for nan."""
    content = {name: side and asdict(side) for name, side in (("before", before), ("after", after))}
    text = json.dumps(_without_nan(content), ensure_ascii=False, indent=1, allow_nan=False)
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogatepass")))


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def distinct_2(texts: list[str]) -> float:
    """Mean over texts of their distinct word pairs over all their word pairs: 1 says nothing twice.

    Source: Li et al., "A Diversity-Promoting Objective Function", https://arxiv.org/abs/1510.03055, within each text.
    """
    shares = []
    for text in texts:
        words = message_text(text).lower().split()
        pairs = list(pairwise(words))
        if pairs:
            shares.append(len(set(pairs)) / len(pairs))
    return sum(shares) / len(shares) if shares else float("nan")
