"""The same held-out prompts before and after training: what the model writes, and what the reward says of it."""

from dataclasses import dataclass
from itertools import pairwise

from .data import message_text
from .reward import MultiLevelPPLRewardFunction, row_baselines
from .sampling import sample_completions
from .units import LEVELS


@dataclass(frozen=True)
class HeldOut:
    """prompts and completions: `num_generations` completions a prompt. scores: means over them, by name."""

    prompts: list
    completions: list[list[str]]
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
    return HeldOut(columns["prompt"], completions, scores)


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
