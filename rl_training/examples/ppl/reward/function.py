"""The reward function that GRPOTrainer calls: perplexities, baselines and thresholds put together."""

import copy
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

from ..baselines.file import Baselines
from ..baselines.mismatch import check_meta
from ..chat import Turn, Turns, chat_identity, refuse_begun
from ..data import Text, message_text
from ..definitions import (
    DEFAULT_TARGET,
    DEFAULT_TEMPLATE,
    DEFAULT_THRESHOLDS,
    DEFAULT_WEIGHTS,
    FORMS,
    LEVELS,
    MISSING,
    NATS_CLIP,
    TARGETS,
)
from ..errors import BaselineError, InputError, one_of, without_retired
from ..identity import identity
from ..processes import of_this
from ..reference_context import ReferenceContext
from ..sampling import given_by_trainer, refuse_appended
from ..scoring.calculator import MultiLevelPPLCalculator
from ..scoring.scorer import Scorer, as_scorer, is_scorer
from ..scoring.tokens import Sampled
from .cache import PerplexityCache
from .earned import HIGHEST, details_of, earned
from .first_visits import FirstVisits
from .given import given_baselines, refuse, row_baselines
from .last_call import LastCall, log
from .references import measured
from .sampled import Policy, as_scored
from .thresholds import Thresholds, checked_weights, normalized

Veto = Callable[..., Sequence[bool]]  # of the columns that TRL gives a reward function


class MultiLevelPPLRewardFunction:
    """A reward for GRPOTrainer: how much less a text surprises the frozen model than its baseline did.

    Per level, improvement = 100 * (baseline - current) / baseline, in percent; the three are averaged by `weights`, and
    the reward is that of the highest of `reward_thresholds` reached. "current" is the perplexity of the completion
    given its prompt (`target="completion"`), or of the row's reference given prompt and completion
    (`target="reference"`: VR-CLI, https://arxiv.org/abs/2503.22828, whose thresholds are 0.05:0.5 1:0.9 2:1).

    Under several processes each calls for its share of the completions, all of them equally often, and gets what one
    process would: first visits and `normalize` are over the completions of all.

    baseline_model: the scorer; used with adapters off, in eval mode, and left as it was. It may be the policy.
    baselines: a file of compute_baselines_trl.py, a dict `{id or prompt: {"word", "phrase", "sentence"}}`, or None:
        the data set's columns `baseline_word`, ...; else, for references, their perplexity given the prompt alone; else
        each prompt's first completions, which get 0.
    weights: of word, phrase and sentence; None: 0.2, 0.3, 0.5, of nested levels 1, 1, 1.
    reward_thresholds: (improvement in %, reward), in any order.
    normalize: shift and scale each call's rewards to mean 0 and (sample) standard deviation 1.
    device: moves the model there; None: it stays. use_cache: keep perplexities already computed, by content.
    form: "nats" takes the log-likelihood ratio instead of thresholds, within `NATS_CLIP` of 0.
    target, missing ("error" or "skip" a row that `baselines` lacks), allow_baseline_mismatch (use a file made by
        another model or with other definitions).
    scorer: instead of a baseline_model, something that scores, such as `ppl.scoring.server.ServerScorer`; it may be
        given as baseline_model, too.
    policy: (model, tokenizer) of what is trained, if it is another model than the scorer: its tokenizer says what the
        sampled ids are as text, and both say which of them end it. Its ids are scored if the scorer would make the same
        ids of the prompt and has the same vocabulary, otherwise their text. None: the scorer's own tokenizer.
    extract, template: for references, the part of a completion that counts and how the three texts are put together:
        see `ppl.reference_context.ReferenceContext`.
    Further keywords go to `MultiLevelPPLCalculator`.

    Raises `InputError` (a `ValueError`) for settings or columns that make no sense, `BaselineError` for baselines.
    """

    def __init__(
        self,
        baseline_model=None,
        tokenizer=None,
        baselines: str | Path | Mapping | None = None,
        weights: Sequence[float] | None = None,
        reward_thresholds: Sequence[tuple[float, float]] = DEFAULT_THRESHOLDS,
        normalize: bool = False,
        device: str | torch.device | None = None,
        use_cache: bool = True,
        *,
        target: str = DEFAULT_TARGET,
        form: str = "thresholds",
        missing: str = "error",
        allow_baseline_mismatch: bool = False,
        extract: str | None = None,
        template: str = DEFAULT_TEMPLATE,
        scorer: Scorer | None = None,
        policy: tuple[Any, Any] | None = None,
        **calculator_options,
    ) -> None:
        self.__name__ = "multi_level_ppl"
        if (baseline_model is None) == (scorer is None) or tokenizer is None:
            raise InputError("expected a baseline_model or a scorer, not both, and its tokenizer")
        self.model = scorer if baseline_model is None else baseline_model
        if not is_scorer(self.model):
            self.model = extract_model_from_parallel(self.model, keep_torch_compile=True)
            if device is not None and torch.device(device) != self.model.device:
                self.model = self.model.to(device)
        elif device is not None:
            raise InputError(f"device is {device!r}, but the scorer has a place of its own: leave device out")
        self.calculator = MultiLevelPPLCalculator(tokenizer, **without_retired(calculator_options))
        self.tokenizer = self.calculator.tokenizer
        self.policy = Policy(self.calculator, self.model, policy)
        self.weights = checked_weights(DEFAULT_WEIGHTS[self.calculator.aggregation] if weights is None else weights)
        self.thresholds = Thresholds(reward_thresholds)
        self.form = one_of("form", form, FORMS)
        if form == "nats" and tuple(reward_thresholds) != DEFAULT_THRESHOLDS:
            raise InputError("form='nats' has no thresholds: leave out reward_thresholds")
        self.normalize = normalize
        self.use_cache = use_cache
        self.target = one_of("target", target, TARGETS)
        self.missing = one_of("missing", missing, MISSING)
        self.reference_context = ReferenceContext(extract, template, target)
        if isinstance(baselines, str | Path):
            baselines = Baselines.load(baselines)
        elif baselines is not None and not isinstance(baselines, Baselines):
            if not baselines:
                raise BaselineError("baselines holds no row: expected one for each row, or None for the first visits")
            baselines = Baselines(baselines)
        self.baselines = baselines
        if self.baselines is not None and self.baselines.meta and not allow_baseline_mismatch:
            check_meta(self.baselines, self.identity)
        self.first_visits = FirstVisits()
        self._cache = PerplexityCache()
        # What the last `compute_rewards` found, for `__call__` to log and to show the observer. It cannot be returned:
        # a subclass may override `compute_rewards` with one that returns a tensor of rewards. Then this stays None.
        self._last: LastCall | None = None
        self.level: str | None = None  # of `per_level`: the one whose reward this function gives
        self.veto: Veto | None = None
        self.observer: Any = None  # `ppl.training.diagnostics.Diagnostics`: is shown every call of a trainer

    @property
    def device(self) -> torch.device:
        return getattr(self.model, "device", torch.device("cpu"))

    @property
    def highest(self) -> float:
        """The most that a completion can earn, before `normalize`."""
        return NATS_CLIP if self.form == "nats" else self.thresholds.highest

    @property
    def lowest(self) -> float:
        """The least that a level can earn: what a blank completion gets there."""
        return -NATS_CLIP if self.form == "nats" else min(0.0, self.thresholds.lowest)

    @property
    def vetoed(self) -> float:
        """What a vetoed completion gets at each level: a tenth of the range less than the lowest. Not further below,
        since an outlier widens its group's standard deviation, by which the others are divided."""
        return self.lowest - 0.1 * (self.highest - self.lowest)

    @property
    def identity(self) -> dict:
        """What a baselines file must have been made with to be compared with this reward's numbers."""
        return identity(
            as_scorer(self.model, self.tokenizer),
            self.tokenizer,
            name=getattr(getattr(self.model, "config", None), "_name_or_path", ""),
            target=self.target,
            definitions=self.calculator.definitions,
            template=self.reference_context.template,
            prompt=chat_identity(self.tokenizer, **self.calculator.chat),
        )

    def __call__(self, prompts, completions, **columns) -> list[float | None]:
        """One reward a completion, None for a skipped row: TRL's calling convention.

        columns: the data set's own, as lists (`id`, `reference`, `baseline_word`, ...), and TRL's `completion_ids` and
        `log_metric`. Where the policy got other ids than those that `prompts` make here, `prompt_ids` are what it got.
        Raises `InputError` for a prompt that has begun the answer if GRPOTrainer itself calls: see `refuse_begun`.
        """
        rewards, seconds = self._timed(prompts, completions, columns)
        skipped = self._last.skipped.tolist() if self._last else [False] * len(completions)
        for reward, skip in zip(rewards, skipped, strict=True):
            if not (skip or math.isfinite(reward)):
                raise FloatingPointError(f"{self.__name__} gave a reward of {reward}, expected a finite number")
        rewards = [None if skip else reward for reward, skip in zip(rewards, skipped, strict=True)]
        self._report(prompts, completions, rewards, seconds, columns)
        return rewards

    def per_level(self, veto: Veto | None = None) -> "list[MultiLevelPPLRewardFunction]":
        """Three reward functions, of word, phrase and sentence, for trainers that normalise each by itself before they
        add, so that a level with a large spread does not drown one with a small spread: TRL with
        `multi_objective_aggregation="normalize_then_sum"` (GDPO, https://arxiv.org/abs/2601.05242).

        Each is this function with all the weight on its level, but for blank completions, which get `lowest` in both
        forms. They share model and cache: what the first has scored the others look up (with use_cache=False each
        scores). Called for the same completions, each has the same first visits. Give `weights` to the trainer, too.

        veto: of `ppl.reward.loop_guard.loop_veto`. What it says True of gets `vetoed` at each level, less than anything
        else. Normalising within a group keeps the order at each level, and so does a sum with weights that are not
        negative. So within its group a vetoed completion's advantage is below that of every one that is not vetoed,
        whatever the model makes of the texts, as long as a level has a weight and no further reward stands beside the
        levels. Where a whole group is vetoed, all are alike and nothing is learned from it.
        Raises `InputError` with `normalize`, and for a subclass whose `compute_rewards` is its own.
        """
        if self.normalize:
            raise InputError("per_level: the trainer normalises each level itself: leave out normalize=True")
        if type(self).compute_rewards is not MultiLevelPPLRewardFunction.compute_rewards:
            raise InputError(
                f"{type(self).__name__} has a compute_rewards of its own, which knows no levels: use it whole, or "
                "per_level() of MultiLevelPPLRewardFunction"
            )
        rewards = [copy.copy(self) for _ in LEVELS]
        for one, level in zip(rewards, LEVELS, strict=True):
            one.__name__, one.level, one.veto = f"{self.__name__}_{level}", level, veto
            one.first_visits = copy.deepcopy(self.first_visits)
        return rewards

    def skips(self, prompts, completions, **columns) -> list[bool]:
        """Of each completion of a call in TRL's calling convention, whether its row is skipped (`missing="skip"`): what
        stands beside this function has nothing to say of it, either. Scored anew only where another call was last."""
        of = (list(prompts), [message_text(completion) for completion in completions])
        if self._last is None or self._last.of != of:
            self._timed(prompts, completions, columns)
        return self._last.skipped.tolist() if self._last else [False] * len(completions)

    def _timed(self, prompts, completions, columns: Mapping) -> tuple[list[float], float]:
        """(what `compute_rewards` gives for TRL's columns, seconds it took)"""
        if "trainer_state" in columns and not given_by_trainer(columns):
            refuse_begun(prompts, "GRPOTrainer", "train with ppl.training.trainer.ResumableGRPOTrainer, or ")
            refuse_appended(prompts, self.policy.tokenizer)
        texts = [message_text(completion) for completion in completions]
        arguments = {"prompts": prompts, "references": columns.get("reference"), "ids": columns.get("id")}
        if any(not isinstance(completion, str) and len(completion) > 1 for completion in completions):
            arguments["completions"] = completions
        if self.veto is not None:
            arguments["vetoed"] = self.veto(prompts=prompts, completions=completions, **columns)
        if rows := row_baselines(columns):
            arguments["baselines"] = rows
        arguments |= {name: columns[name] for name in ("completion_ids", "prompt_ids") if name in columns}
        self._last = None
        start = time.perf_counter()
        rewards = torch.as_tensor(self.compute_rewards(texts, **arguments)).tolist()
        return rewards, time.perf_counter() - start

    def _report(self, prompts, completions, rewards: list[float | None], seconds: float, columns: Mapping) -> None:
        """Log the last call, and show it to the observer: of the levels the first one does, for all three."""
        if self._last is None or self.level not in (None, LEVELS[0]):
            return
        if log_metric := columns.get("log_metric"):
            log(self._last, self.reference_context.extracts, log_metric, columns.get("log_extra"))
            log_metric("reward_time", seconds)  # as TRL's step_time
        if self.observer is not None:
            texts = [message_text(completion) for completion in completions]
            if self.level is not None:
                rewards = [None if math.isnan(one) else one for one in self._last.details["rewards"].tolist()]
            self.observer.observe(self._last, self.highest, prompts, texts, rewards, **columns)

    def compute_rewards(
        self,
        texts: Sequence[Text],
        prompts: Sequence[Text] | None = None,
        references: Sequence[Text] | None = None,
        ids: Sequence | None = None,
        return_details: bool = False,
        baselines: Sequence[Mapping | None] | None = None,
        completions: Sequence[Text] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        vetoed: Sequence[bool] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """float32 [B] rewards, nan for a skipped row; with `return_details` also what they were made from.

        baselines: per row, before those of the constructor; None where a row has none. completions: the messages that
        `texts` are of, where there are several in one: only the assistant's are scored, each behind what stood before.
        completion_ids: what the policy sampled. Where they are the scorer's (see `policy`) and their text is that of
        `texts`, they are scored, up to the end token, behind `prompt_ids` (None: what GRPOTrainer makes of `prompts`).
        vetoed: see `per_level`.
        details: "ppls" and "baselines", each `{level: float64 [B]}`, nan where there is none; "improvements",
        `{level or "avg": float64 [B]}` in percent, 0 for a completion without a scored token; "rewards", float64 [B],
        before `normalize`, of a level's function the levels' sum by `weights`; "level_rewards", `{level: float64 [B]}`,
        what each level earns alone (`per_level`).
        """
        n = len(texts)
        for name, column in {
            "prompts": prompts,
            "references": references,
            "ids": ids,
            "baselines": baselines,
            "completions": completions,
            "completion_ids": completion_ids,
            "prompt_ids": prompt_ids,
            "vetoed": vetoed,
        }.items():
            if column is not None and len(column) != n:
                raise InputError(f"{len(column)} {name} for {n} texts: there must be one for each")
        if self.target == "reference" and references is None:
            raise InputError("target='reference' needs a column `reference`: rename the data set's column to it")
        if not is_scorer(self.model):
            self._cache.forget_if_trained(self.model)
        prompts = [None] * n if prompts is None else list(prompts)
        references = [None] * n if references is None else list(references)
        contexts = [self.calculator.render(prompt) for prompt in prompts]
        completions = texts if completions is None else completions
        pairs, written = self.written(prompts, completions, completion_ids, prompt_ids)

        of_reference = self.target == "reference"
        baseline = given_baselines(self.baselines, of_reference, prompts, references, ids, baselines)
        absent = np.isnan(baseline).any(axis=1)
        first_visit = np.zeros(n, dtype=bool)
        if of_reference:
            current, alone, has_part = measured(self, contexts, written, references, absent)
            baseline[absent] = alone[absent]
        else:
            current = np.minimum(self.perplexities(pairs), HIGHEST)
            if self.baselines is None:
                rows = np.flatnonzero(absent)
                visited = [contexts[row] for row in rows]
                baseline[rows], first_visit[rows] = self.first_visits.measure(visited, current[rows])
            elif absent.any() and self.missing == "error":
                refuse(self.baselines, absent, prompts, references, ids)

        unscorable = np.isnan(current).any(axis=1)
        skipped = np.isnan(baseline).any(axis=1) & ~first_visit
        if of_reference:
            if unscorable.any() and self.missing == "error":
                index = np.flatnonzero(unscorable)[0]
                raise InputError(f"row {index} of this call has a blank reference: drop it, or use missing='skip'")
            skipped |= unscorable
        one = earned(self, current, baseline, first_visit, skipped, unscorable, vetoed)
        details = details_of(one, current, baseline)
        rewards = one.rewards if self.level is None else one.of_levels[:, LEVELS.index(self.level)]
        if self.normalize:
            every, mine = of_this(rewards[~skipped].tolist())
            rewards[~skipped] = normalized(np.array(every))[mine]
        extracted = np.array(has_part, dtype=bool) if of_reference else np.ones(n, dtype=bool)
        scored, of = ~(skipped | unscorable), (prompts, list(map(message_text, texts)))
        self._last = LastCall(details, skipped, scored, first_visit, extracted, one.clipped, vetoed, of)
        result = torch.from_numpy(rewards).float().to(self.device)
        return (result, details) if return_details else result

    def state_dict(self) -> dict:
        """What a resumed run needs: the zero-shot baselines recorded so far, and the observer's state."""
        state = {"first_visits": self.first_visits.state_dict()}
        return state if self.observer is None else {**state, "diagnostics": self.observer.state_dict()}

    def load_state_dict(self, state: Mapping) -> None:
        self.first_visits.load_state_dict(state["first_visits"])
        if self.observer is not None and "diagnostics" in state:
            self.observer.load_state_dict(state["diagnostics"])

    def written(
        self,
        prompts: Sequence[Text | None],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        given_ids: Sequence[Sequence[int]] | None = None,
    ) -> tuple[list[Turn | Turns | Sampled], list[str]]:
        """(what the policy wrote, as it is scored: ids where they are the scorer's; the same as text, behind its
        prompt)"""
        return as_scored(self.calculator, self.model, self.policy, prompts, completions, completion_ids, given_ids)

    def perplexities(self, pairs: Sequence[Turn | Turns | Sampled]) -> np.ndarray:
        """float64 [B, 3], from the cache where it has them."""
        score = functools.partial(self.calculator.score_pairs, self.model)
        return self._cache.perplexities(pairs, score) if self.use_cache else score(pairs)
