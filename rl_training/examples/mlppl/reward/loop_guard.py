"""Reward functions beside the perplexity's, against loops and copies: what stood there before is easy to predict, so
perplexity pays for saying it again; and a document is likeliest behind its own words."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..config import DEFAULT_THRESHOLDS, LOOP_PENALTY, NATS_KNEE, ReferenceContext
from ..data import Text, message_text
from ..errors import InputError
from ..prompts import of_text

QUOTED = 4  # tokens of a document, said again; summaries copy 3 % of such runs, quotations nearly all
NGRAM = 8  # tokens; human stories repeat 0.08 % of theirs, a sentence said over and over nearly all


def loop_guard(
    weight: float = LOOP_PENALTY,
    reward_thresholds: Sequence[tuple[float, float]] | None = DEFAULT_THRESHOLDS,
    normalized_over: int | None = None,
    form: str = "thresholds",
    tokenizer=None,
    chat: Mapping | None = None,
    skips: Callable[..., Sequence[bool]] | None = None,
) -> tuple[Callable, float]:
    """(a penalty on repetition, its weight for GRPOConfig's `reward_weights`), to stand beside the perplexity reward.

    The penalty is minus the share of a completion's token n-grams (`NGRAM` tokens) that stood there before: earlier in
    the completion, or, given a tokenizer, in its prompt: 1 - (distinct n-grams that the prompt has not) / (all). A
    quotation of fewer than `NGRAM` tokens is free. Without a tokenizer it is TRL's repetition penalty
    (`trl.rewards.get_repetition_penalty_reward`, after https://arxiv.org/abs/2502.03373). The weight is `weight` * R, R
    being what two perplexity rewards can differ by at most: from the lowest of `reward_thresholds`, or 0, to the
    highest, with `form="nats"` four times its knee, or with `normalize` over B completions the widest that standard
    deviation 1 allows, sqrt(2 (B - 1)).

    What that guarantees, whatever the model makes of the texts: of two completions, the one whose share of repeated
    n-grams is larger by more than 1 / weight earns less in sum, as its penalty outweighs R. A run of m tokens said
    over and over from some place on, l tokens of L in all, repeats at least l - m - NGRAM + 1 of its L - NGRAM + 1
    n-grams, so the guarantee holds from l = m + NGRAM - 1 + (L - NGRAM + 1) / weight on over a text without
    repetition: from a twentieth of the text beyond the first time. A copy of l tokens of the prompt repeats
    l - NGRAM + 1, so for a copy it holds from l = NGRAM - 1 + (L - NGRAM + 1) / weight on.

    TRL must add the rewards up before it normalises them, as it does by default (`multi_objective_aggregation`). Where
    each is normalised by itself (`normalize_then_sum`, GDPO), a penalty is as large as its group's spread makes it, and
    nothing is guaranteed: there `loop_veto` is the guard.

    weight: 0 or more. normalized_over: completions in one call of a reward with `normalize=True`, else None.
    tokenizer: the policy's, whose ids the completions are; None: copies of the prompt are free. chat: keywords of
    `mlppl.prompts.render_prompt`. skips: `MultiLevelPPLRewardFunction.skips` of the reward beside it: a row that it
    skips gets None, so that no 0 of the guard's counts as its reward. Raises `InputError` for a weight that is not
    finite or below 0.

    >>> penalty, weight = loop_guard()
    >>> [weight * share for share in penalty(completion_ids=[list(range(20)), [1, 2, 3, 4] * 5])]
    [0.0, -13.846153846153847]
    """
    check_weight(weight)
    values = [0.0, *(reward for _, reward in reward_thresholds or ())]
    widest = 4 * NATS_KNEE if form == "nats" else max(values) - min(values)
    if normalized_over:
        widest = math.sqrt(2 * (normalized_over - 1))
    return LoopPenalty(RepeatedShare(tokenizer, chat), skips), weight * widest


def loop_veto(weight: float = LOOP_PENALTY, tokenizer=None, chat: Mapping | None = None) -> "LoopVeto":
    """The guard of `MultiLevelPPLRewardFunction.per_level`: who repeats more than 1 / weight of its n-grams is vetoed.

    The arguments are those of `loop_guard`. The guarantee is that of the veto: see there.

    >>> loop_veto()(prompts=["a", "a"], completion_ids=[list(range(20)), [1, 2, 3, 4] * 5])
    [False, True]
    """
    check_weight(weight)
    return LoopVeto(RepeatedShare(tokenizer, chat), 1 / weight if weight else math.inf)


class RepeatedShare:
    """The share of each completion's n-grams that stood before: in it or, given a tokenizer, in its prompt.

    >>> RepeatedShare()([[1, 2, 3, 4] * 5])
    [0.6923076923076923]
    """

    def __init__(self, tokenizer=None, chat: Mapping | None = None) -> None:
        self.tokenizer = tokenizer
        self.chat = dict(chat or {})

    def __call__(
        self,
        completion_ids: Sequence[Sequence[int]],
        prompts: Sequence[Text] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[float]:
        """float [B], from 0 to 1. prompt_ids: what the policy was given, where that is known; else made of prompts."""
        before: list[set[tuple]] = [set() for _ in completion_ids]
        if self.tokenizer is not None:
            if prompt_ids is None:
                from ..scoring.sampling import prompt_ids as ids_of_prompts

                prompt_ids = ids_of_prompts(list(prompts or ()), self.tokenizer, **self.chat)
            before = [set(_ngrams(ids)) for ids in prompt_ids]
        return [_repeated(_ngrams(ids), there) for ids, there in zip(completion_ids, before, strict=True)]


class LoopPenalty:
    """Minus the repeated share, in TRL's calling convention. A class, since TRL may have to pickle it."""

    __name__ = "loop_penalty"

    def __init__(self, share: RepeatedShare, skips: Callable[..., Sequence[bool]] | None = None) -> None:
        self.share = share
        self.skips = skips

    def __call__(self, completion_ids, prompts=None, prompt_ids=None, **columns) -> list[float | None]:
        shares = self.share(completion_ids, prompts, prompt_ids)
        skipped = [False] * len(shares)
        if self.skips is not None:
            given = {} if prompt_ids is None else {"prompt_ids": prompt_ids}
            skipped = self.skips(prompts, completion_ids=completion_ids, **given, **columns)
        return [None if skip else -share if share else 0.0 for share, skip in zip(shares, skipped, strict=True)]


def copy_guard(
    most: float, tokenizer, skips: Callable | None = None, put: ReferenceContext | None = None
) -> tuple[Callable, float]:
    """(a penalty on quoting the reference, its weight), for references that the scorer reads without their prompt: to
    quote a document makes it likelier than to say what happens in it.

    The penalty is minus the share of the completion's runs of `QUOTED` tokens that stand in the reference. The weight
    is three times `most`, the most that a completion can earn or lose: under SmolLM2 summaries of five sentences earned
    1.6 to 3.0 nats for a share of 1, so that a quotation costs what it earns or more.

    most: of `mlppl.config.RewardConfig`. tokenizer: any. skips: as for `loop_guard`. put: of which part of a completion
    the scorer reads; None: all of it.
    """
    return CopyPenalty(tokenizer, skips, put), 3 * most


class CopyPenalty:
    """Minus the share of quoted runs, in TRL's calling convention."""

    __name__ = "copy_penalty"

    def __init__(self, tokenizer, skips: Callable | None = None, put: ReferenceContext | None = None) -> None:
        self.tokenizer = of_text(tokenizer)
        self.skips = skips
        self.put = put or ReferenceContext()

    def __call__(self, prompts, completions, reference, **columns) -> list[float | None]:
        said = self._runs([self.put.extracted(message_text(one))[0] for one in completions])
        quoted = [set(runs) for runs in self._runs(message_text(one or "") for one in reference)]
        skipped = [False] * len(said)
        if self.skips is not None:
            skipped = self.skips(prompts, completions, reference=reference, **columns)
        return [
            None if skip else -sum(run in there for run in runs) / len(runs) if runs else 0.0
            for runs, there, skip in zip(said, quoted, skipped, strict=True)
        ]

    def _runs(self, texts: Iterable[str]) -> list[list[tuple]]:
        # With a space in front, where most words of a text have one.
        spaced = [f" {text.strip()}" for text in texts]
        every = self.tokenizer(spaced, add_special_tokens=False)["input_ids"] if spaced else []
        return [list(zip(*(ids[start:] for start in range(QUOTED)), strict=False)) for ids in every]


class LoopVeto:
    """Whether the repeated share is beyond `most`, of the columns that TRL gives a reward function."""

    def __init__(self, share: RepeatedShare, most: float) -> None:
        self.share = share
        self.most = most

    def __call__(self, completion_ids, prompts=None, prompt_ids=None, **columns) -> list[bool]:
        return [share > self.most for share in self.share(completion_ids, prompts, prompt_ids)]


def _ngrams(ids: Sequence[int]) -> list[tuple[int, ...]]:
    ids = list(map(int, ids))
    return list(zip(*(ids[start:] for start in range(NGRAM)), strict=False))


def _repeated(ngrams: list[tuple], before: set[tuple]) -> float:
    return 1 - len(set(ngrams) - before) / len(ngrams) if ngrams else 0.0


def check_weight(weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise InputError(f"--loop_penalty is {weight}, expected 0 (no guard against loops) or more, such as 20")
