"""The same held-out prompts before and after training: what the model writes, and what the reward says of it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..data import Text
from ..processes import from_all, is_first, is_sharded, share
from ..prompts import render_prompt
from ..reward.function import row_baselines
from ..reward.terms import as_nats
from ..scoring.sampling import GivenIds, end_tokens, prompt_ids, sample, up_to_end
from ..scoring.surprisal import SurprisalScorer
from ..scoring.tokens import Sampled, TextEncoder
from .diagnostics import described
from .found import found_among
from .job import Job
from .policy import Loaded
from .results import FOUND, PPL, HeldOut, mean, read_heldout, write_heldout
from .rewards import GUARDS, Reward, call_as_trl, name_of, perplexity_rewards

SWAPPED, SWAPPED_NATS = "improvement % with another row's", "improvement, nats, with another row's"


class HeldOutPrompts:
    """The held-out prompts of a run: `before()` its first step and `after()` its last one, kept in heldout.json."""

    def __init__(self, job: Job, policy: Loaded, scorer: Loaded, rewards: Sequence[Reward], trainer) -> None:
        self.job, self.policy, self.rewards, self.trainer = job, policy, rewards, trainer
        self.path = job.output / "heldout.json"
        self.sampling = {
            "num_generations": 4,
            "seed": job.config.seed,
            **asdict(job.sampling),
        }
        # As JSON has it, to be compared with what a file says.
        weights = [[name_of(function), weight] for function, weight in rewards]
        shown = perplexity_rewards(rewards)[0].calculator.contexts.identity
        by = {"scorer": job.models.scorer or job.models.name, "baselines": job.baselines and str(job.baselines.source)}
        self.rewarded = json.loads(json.dumps({**vars(job.reward), **job.chat, **shown, **by, "rewards": weights}))
        # The model before training: itself without its adapter, or a frozen copy, if that is what scores.
        copy = None if job.models.scorer or job.models.scorer_url else scorer.model
        self.scorers = kl_scorers(policy.model, copy if job.models.lora is None else policy.model)

    def before(self) -> HeldOut:
        """Of a run that goes on: what it measured before its first step."""
        before = None
        if self.job.checkpoint:
            kept = Path(self.job.checkpoint).parent / self.path.name
            before = read_before(kept, self.job.heldout_rows, self.sampling, self.rewarded)
        self._before = before or self._evaluate("held-out, before")
        if is_first():
            write_heldout(self.path, self.sampling, self.rewarded, self._before)
        return self._before

    def after(self) -> HeldOut:
        after = self._evaluate("held-out, after")
        if is_first():
            write_heldout(self.path, self.sampling, self.rewarded, self._before, after)
        return after

    def kl(self, prompts: list, completions: list) -> float | None:
        """How far the policy is from its start, in nats a token, by what it has just written: ids, or texts.

        None where there is no start to compare with. Several processes must all call.
        """
        if self.scorers is None:
            return None
        ends = end_tokens(*self.policy)
        written = [one if isinstance(one, str) else up_to_end(list(map(int, one)), ends) for one in completions]
        sums = kl_by_text(self.scorers, self.policy.tokenizer, prompts, written, **self.job.chat)
        kl = kl_a_token(*zip(*from_all(sums), strict=True))
        return None if math.isnan(kl) else kl

    def _evaluate(self, progress: str) -> HeldOut:
        return evaluate(
            *self.policy, self.rewards, self.job.heldout_rows, scorers=self.scorers,
            state=self.trainer.state, progress=progress, **self.sampling,
        )  # fmt: skip


def evaluate(
    model,
    tokenizer,
    rewards: Sequence[Reward],
    rows,
    *,
    scorers: tuple[SurprisalScorer, SurprisalScorer] | None,
    state,
    num_generations: int,
    **sampling,
) -> HeldOut:
    """Sample completions for the prompts of `rows` and score them with the rewards, as training weighs them. A score is
    the mean over prompts of the means over their completions, of perplexities the geometric one.

    Several processes must all call; each does its share of the rows, and all get the whole.

    With references as target there is one more score: what the completions of the next row do for a row's reference.

    rewards: of `mlppl.training.rewards.weighted`. The mean of the first one, before its `normalize`, is the score
    "reward", or of its three levels the sum's; the mean of each other one, and of a level, that of the function's name.
    rows: a data set of `prepare_dataset`. scorers: of `kl_scorers`, or None without a KL. state: the trainer's.
    sampling: keywords of `mlppl.scoring.sampling.sample`.
    """
    reward_fn = perplexity_rewards(rewards)[0]
    chat = reward_fn.calculator.chat
    # Weights spread over processes are gathered for every forward pass, so all must sample equally often.
    indices = share(len(rows), padded=is_sharded(model))
    columns = {name: [rows[name][index] for index in indices] for name in rows.column_names}
    sampled = sample(model, tokenizer, columns["prompt"], num_generations=num_generations, **sampling, **chat)
    groups = _of_all_rows(indices, [[(one.text, one.ids) for one in group] for group in sampled], len(rows))

    columns = {name: [value for value in column for _ in range(num_generations)] for name, column in columns.items()}
    columns["prompt_ids"] = [
        GivenIds(one.prompt_ids, tokenizer) for group in sampled for one in group
    ]  # as in training
    own = [one for index in indices for one in groups[index]]
    scores = _scores(rewards, columns, own, state)
    if reward_fn.config.target == "reference" and len(rows) > 1:
        strangers = [one for index in indices for one in groups[(index + 1) % len(rows)]]
        swapped = _measured(reward_fn, columns, strangers)["improvements"]
        levels = [np.asarray(swapped[level]) for level in reward_fn.config.levels]
        nested = reward_fn.config.aggregation == "nested"
        scores.append((SWAPPED_NATS if nested else SWAPPED, np.mean(as_nats(levels) if nested else levels, axis=0)))
    written = [one.written for group in sampled for one in group]
    moved = kl_by_text(scorers, tokenizer, columns["prompt"], written, **chat)

    names, values = zip(*scores, strict=True)
    table = np.concatenate([np.stack(values, axis=1), np.reshape(moved, (-1, 2))], axis=1)
    table = table.reshape(len(indices), num_generations, table.shape[1]).tolist()
    *values, moved, tokens = np.moveaxis(np.array(_of_all_rows(indices, table, len(rows))), -1, 0)
    completions = [[text for text, _ in group] for group in groups]
    by_prompt = {name: mean(name, of).tolist() for name, of in zip(names, values, strict=True)}
    more = [*by_prompt][1 + 2 * len(reward_fn.config.levels) :]  # what others give stands at the end
    others = {name: by_prompt.pop(name) for name in more}
    by_prompt["KL"] = list(map(kl_a_token, moved, tokens))
    of_texts = list(map(described, completions))
    by_prompt |= {name: [one[name] for one in of_texts] for name in of_texts[0]} | others
    going = found_among(
        reward_fn, rows["prompt"], completions, rows["reference"] if "reference" in rows.column_names else None
    )
    if going is not None:
        by_prompt[f"{FOUND}{going[0]}"] = going[1].by_row
    scores = {name: float(mean(name, of)) for name, of in by_prompt.items()}
    if going is not None:
        scores["p of it"] = float(going[1].p)
    completion_ids = [[ids for _, ids in group] for group in groups]
    return HeldOut(
        list(rows["prompt"]), completions, values[0].tolist(), scores, completion_ids, by_prompt, reward_fn.nested_names
    )


def _of_all_rows(indices: Sequence[int], values: Sequence, rows: int) -> list:
    """From what each process has for the rows `indices`: what there is for each of the rows, in their order."""
    by_index = dict(zip(from_all(indices), from_all(values), strict=True))
    return [by_index[index] for index in range(rows)]


def _scores(rewards: Sequence[Reward], columns: Mapping[str, list], written: Sequence[tuple], state) -> list[tuple]:
    """(name, float [completions]) of the perplexities' reward, improvements and perplexities, and of what each other
    function gives.

    columns: of the data set, a value a completion. written: text and ids of each completion.
    """
    reward_fn, *levels = perplexity_rewards(rewards)
    others = rewards if levels else rewards[1:]
    # Without baselines, completions make their prompt's at the first visit, and are measured at the second: before
    # training against the same ones as after it.
    if reward_fn.config.target == "completion" and reward_fn.baselines is None:
        for one in (reward_fn, *levels):
            _measured(one, columns, written)
    details = _measured(reward_fn, columns, written)
    texts, ids = [text for text, _ in written], [ids for _, ids in written]
    called = call_as_trl([function for function, _ in others], columns["prompt"], texts, ids, columns, state)
    earned = [weight * one for (_, weight), one in zip(others, called, strict=True)]
    total = sum(earned[: len(levels) + 1]) if levels else rewards[0][1] * np.asarray(details["rewards"])
    improved = {level: details["improvements"][level] for level in reward_fn.config.levels}
    if reward_fn.config.aggregation == "nested":
        measured = {f"{level} improvement, nats": as_nats(of) for level, of in improved.items()}
    else:
        measured = {f"{level} improvement %": np.asarray(of) for level, of in improved.items()}
    measured |= {f"{level}{PPL}": np.asarray(details["ppls"][level]) for level in improved}
    return [
        ("reward", np.asarray(total)),
        *measured.items(),
        *((row_name(function), np.asarray(one)) for (function, _), one in zip(others, earned, strict=True)),
    ]


def _measured(reward_fn, columns: Mapping[str, list], written: Sequence[tuple]) -> dict:
    """The details of `compute_rewards`."""
    return reward_fn.compute_rewards(
        [text for text, _ in written],
        prompts=columns["prompt"],
        references=columns.get("reference"),
        ids=columns.get("id"),
        baselines=row_baselines(columns, reward_fn.config.levels),
        completion_ids=[ids for _, ids in written],
        prompt_ids=columns["prompt_ids"],
        return_details=True,
    )[1]


def row_name(function) -> str:
    """What a reward beside the perplexities is called in the table."""
    name = name_of(function)
    return name.replace("_", " ") if name in GUARDS else name


def read_before(path: Path, rows, sampling: dict, rewarded: dict) -> HeldOut | None:
    """What a run that is resumed has measured before its first step; None if it was with other prompts, sampling or
    rewards.

    Raises `InputError` for a file that is damaged.
    """
    if not path.exists():
        return None
    its_sampling, theirs, before, _ = read_heldout(path)
    if (
        its_sampling != sampling
        or {name: theirs.get(name) for name in rewarded} != rewarded  # a run of version 0.1 had more settings
        or before.prompts != list(rows["prompt"])
        or not before.rewards
    ):
        return None
    return before


def kl_scorers(model, start) -> tuple[SurprisalScorer, SurprisalScorer] | None:
    """Of a model as it is and of its start, kept for a run, since a scorer compares its ways before its first text.

    start: the model as it was before training: `model` itself, whose adapters are then off, if it trains adapters; a
    frozen copy; None without one.
    """
    return None if start is None else (SurprisalScorer(model, adapters=True), SurprisalScorer(start))


def kl_by_text(
    scorers: tuple[SurprisalScorer, SurprisalScorer] | None,
    tokenizer,
    prompts: Sequence[Text],
    completions: Sequence[str] | Sequence[Sequence[int]],
    **chat,
) -> list[tuple]:
    """How far training has moved the model from its start, per completion: (sum over its tokens, their number).

    The start's surprisal of a token minus the model's own, in nats. scorers: of `kl_scorers`; None: 0 of 0 tokens.
    completions: the ids that were written, without an end token, or texts. chat: keywords of
    `mlppl.prompts.render_prompt`.
    """
    if scorers is None:
        return [(0.0, 0)] * len(completions)
    pairs = [
        (render_prompt(prompt, tokenizer, **chat), one) if isinstance(one, str) else Sampled(tuple(given), tuple(one))
        for prompt, given, one in zip(prompts, prompt_ids(prompts, tokenizer, **chat), completions, strict=True)
    ]
    encoded, _ = TextEncoder(tokenizer).encode_pairs(pairs)
    own, of_start = (scorer.score(encoded) for scorer in scorers)
    return [((b - a).sum(), len(a)) for a, b in zip(own, of_start, strict=True)]


def kl_a_token(sums: np.ndarray, tokens: np.ndarray) -> float:
    """An estimate of KL(model || start) a token, in nats, from what `kl_by_text` gives; nan without a token.

    Unbiased if the model wrote the completions at temperature 1.
    """
    return float(np.sum(sums) / np.sum(tokens)) if np.sum(tokens) else float("nan")
