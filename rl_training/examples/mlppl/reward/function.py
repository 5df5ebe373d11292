"""The reward function that GRPOTrainer calls: perplexities, baselines and thresholds put together.

compute_rewards  ->  measure  ->  Measured  ->  earned (terms.py)  ->  rewards, log, listeners
"""

import copy
import functools
import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

from ..baselines.file import Baselines, check_meta
from ..config import DEFAULT_PROMPT_TEMPLATE, RewardConfig
from ..data import Shown, Text, message_text, stable_id
from ..errors import BaselineError, InputError
from ..processes import from_all, of_this
from ..prompts import Turn, Turns, chat_identity, refuse_begun
from ..scoring.calculator import MultiLevelPPLCalculator
from ..scoring.differences import differences
from ..scoring.identity import architecture, identity, of_texts
from ..scoring.sampling import given_by_trainer, refuse_appended
from ..scoring.surprisal import Scorer, as_scorer, check_model, is_scorer
from ..scoring.tokens import Sampled
from .memory import FirstVisits, PerplexityCache
from .terms import HIGHEST, Earned, Measured, details_of, earned, normalized
from .written import Policy, as_scored, is_parsed

# One call at a time: AsyncGRPO calls from several threads, and a call makes first visits.
_ONE_CALL = threading.RLock()


def _one_call(method: Callable) -> Callable:
    @functools.wraps(method)
    def alone(*args, **kwargs):
        with _ONE_CALL:
            return method(*args, **kwargs)

    return alone


Veto = Callable[..., Sequence[bool]]  # of the columns that TRL gives a reward function


class Call(NamedTuple):
    """A call of the reward function by a trainer, for who listens."""

    measured: Measured
    earned: Earned
    prompts: Sequence[Text]
    texts: list[str]
    rewards: list[float | None]  # what it returned
    columns: Mapping[str, Any]  # as TRL gives them


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
        each prompt's first completions, each compared with the mean of the others.
    weights, reward_thresholds, normalize, settings: the fields of `mlppl.config.RewardConfig`, which says what each is.
        normalize shifts and scales each call's rewards to mean 0 and (sample) standard deviation 1.
    examples: (prompt, reference) of rows that the scorer reads before every prompt, in the form of the prompts; the
        policy never sees them. They must be in neither training nor held-out rows.
    others: (prompt, reference) of the rows that `contrast` draws from: all rows, or some hundred of them.
    device: moves the model there; None: it stays. use_cache: keep perplexities already computed, by content.
    scorer: instead of a baseline_model, something that scores, such as `mlppl.scoring.server.ServerScorer`; it may be
        given as baseline_model, too.
    policy: (model, tokenizer) of what is trained, if it is another model than the scorer: its tokenizer says what the
        sampled ids are as text, and both say which of them end it. Its ids are scored if the scorer would make the same
        ids of the prompt and has the same vocabulary, otherwise their text. None: the scorer's own tokenizer.
    batch_size, max_batch_tokens, chat_template_kwargs, tools, prompt_template: of `MultiLevelPPLCalculator`.

    Raises `InputError` (a `ValueError`) for settings or columns that make no sense, `BaselineError` for baselines.
    """

    def __init__(
        self,
        baseline_model=None,
        tokenizer=None,
        baselines: str | Path | Mapping | None = None,
        weights: Sequence[float] | None = None,
        reward_thresholds: Sequence[tuple[float, float]] | None = None,
        normalize: bool = False,
        device: str | torch.device | None = None,
        use_cache: bool = True,
        *,
        scorer: Scorer | None = None,
        policy: tuple[Any, Any] | None = None,
        batch_size: int | None = None,
        max_batch_tokens: int | None = None,
        chat_template_kwargs: Mapping | None = None,
        tools: Sequence | None = None,
        examples: Sequence[Shown] = (),
        others: Sequence[Shown] = (),
        prompt_template: str = DEFAULT_PROMPT_TEMPLATE,
        **settings,
    ) -> None:
        self.__name__ = "multi_level_ppl"
        if (baseline_model is None) == (scorer is None) or tokenizer is None:
            raise InputError("expected a baseline_model or a scorer, not both, and its tokenizer")
        self.model = scorer if baseline_model is None else baseline_model
        if not is_scorer(self.model):
            check_model(self.model)
            self.model = extract_model_from_parallel(self.model, keep_torch_compile=True)
            if device is not None and torch.device(device) != self.model.device:
                self.model = self.model.to(device)
        elif device is not None:
            raise InputError(f"device is {device!r}, but the scorer has a place of its own: leave device out")
        self.config = config = RewardConfig.of(
            {"weights": weights, "reward_thresholds": reward_thresholds, "normalize": normalize, **settings},
            others=inspect.signature(MultiLevelPPLRewardFunction).parameters,
        )
        self.calculator = MultiLevelPPLCalculator(
            tokenizer, config.max_phrase_words, config.language, config.aggregation, batch_size, max_batch_tokens,
            chat_template_kwargs, tools, config.levels, examples, others, config.contrast, config.score_without_chat,
            prompt_template,
        )  # fmt: skip
        self.tokenizer, self.prompt_template = self.calculator.tokenizer, prompt_template
        self.policy = Policy(self.calculator, self.model, policy)
        self.use_cache = use_cache
        if isinstance(baselines, str | Path):
            baselines = Baselines.load(baselines, config.levels)
        elif baselines is not None and not isinstance(baselines, Baselines):
            if not baselines:
                raise BaselineError("baselines holds no row: expected one for each row, or None for the first visits")
            baselines = Baselines(baselines, levels=config.levels)
        self.baselines = baselines
        if self.baselines is not None and self.baselines.meta and not config.allow_baseline_mismatch:
            check_meta(self.baselines, self.identity)
        self.first_visits = FirstVisits()
        self.cache = PerplexityCache()
        self._listeners: list[Callable[[Call], None]] = []
        self.level: str | None = None  # of `per_level`: the one whose reward this function gives
        self.veto: Veto | None = None

    def listen(self, listener: Callable[[Call], None]) -> None:
        """Have a function called with what each call of a trainer found: `mlppl.training.diagnostics.Diagnostics`."""
        self._listeners.append(listener)

    @property
    def device(self) -> torch.device:
        return getattr(self.model, "device", torch.device("cpu"))

    @property
    def nested_names(self) -> dict[str, str]:
        """What the numbers of nested levels are called where they are shown; {} if they are not nested."""
        return self.calculator.nested_names(*self.config.before)

    @property
    def identity(self) -> dict:
        """What a baselines file must have been made with to be compared with this reward's numbers."""
        return identity(
            as_scorer(self.model, self.tokenizer),
            self.tokenizer,
            self.config,
            name=getattr(getattr(self.model, "config", None), "_name_or_path", ""),
            prompt=self._prompt_identity,
            shown=self.calculator.contexts.identity,
        )

    @property
    def _prompt_identity(self) -> dict:
        # A template that is taken off has to be the one that was put on.
        template = {"prompt_template": self.prompt_template} if self.config.score_without_chat else {}
        return {**chat_identity(self.tokenizer, **self.calculator.chat), **template}

    @property
    def _measured_with(self) -> dict:
        """The identity but for the scorer's weights, which may be spread over processes while it trains."""
        shown, of_model = self.calculator.contexts.identity, {}
        if not is_scorer(self.model):
            of_model = {"model": architecture(self.model)}
        return {**of_texts(self.tokenizer, self.config, self._prompt_identity, shown), **of_model}

    @_one_call
    def __call__(self, prompts, completions, **columns) -> list[float | None]:
        """One reward a completion, None for a skipped row: TRL's calling convention.

        columns: the data set's own, as lists (`id`, `reference`, `baseline_word`, ...), and TRL's `completion_ids` and
        `log_metric`. Where the policy got other ids than those that `prompts` make here, `prompt_ids` are what it got.
        Raises `InputError` for a prompt that has begun the answer if GRPOTrainer itself calls: see `refuse_begun`.
        """
        texts = [message_text(completion) for completion in completions]
        arguments = self._arguments(prompts, completions, columns)
        record: list[tuple[Measured, Earned]] = []
        start = time.perf_counter()
        rewards = torch.as_tensor(self.compute_rewards(texts, record=record, **arguments)).tolist()
        seconds = time.perf_counter() - start
        # A subclass may override `compute_rewards` with one that measures nothing: then there is nothing to tell.
        measured, one = record[-1] if record else (None, None)
        skipped = [False] * len(texts) if measured is None else measured.skipped.tolist()
        for reward, skip in zip(rewards, skipped, strict=True):
            if not (skip or math.isfinite(reward)):
                raise FloatingPointError(f"{self.__name__} gave a reward of {reward}, expected a finite number")
        rewards = [None if skip else reward for reward, skip in zip(rewards, skipped, strict=True)]
        if measured is not None and self.level in (None, self.config.levels[0]):  # of several levels one tells for all
            if log_metric := columns.get("log_metric"):
                log(measured, one, self.config.levels, log_metric, columns.get("log_extra"))
                log_metric("reward_time", seconds)  # as TRL's step_time
            given = rewards
            if self.level is not None:
                given = [None if skip else sum_ for sum_, skip in zip(one.rewards.tolist(), skipped, strict=True)]
            for listener in self._listeners:
                listener(Call(measured, one, prompts, texts, given, columns))
        return rewards

    def _arguments(self, prompts, completions, columns: Mapping) -> dict:
        """What `compute_rewards` takes beside the texts, from TRL's columns."""
        if "trainer_state" in columns and not given_by_trainer(columns):
            refuse_begun(prompts, "GRPOTrainer", "train with mlppl.training.trainer.ResumableGRPOTrainer, or ")
            refuse_appended(prompts, self.policy.tokenizer)
        arguments = {"prompts": prompts, "references": columns.get("reference"), "ids": columns.get("id")}
        if any(not isinstance(one, str) and (len(one) > 1 or is_parsed(one)) for one in completions):
            arguments["completions"] = completions
        if self.veto is not None:
            arguments["vetoed"] = self.veto(prompts=prompts, completions=completions, **columns)
        if rows := row_baselines(columns, self.config.levels):
            arguments["baselines"] = rows
        return arguments | {name: columns[name] for name in ("completion_ids", "prompt_ids") if name in columns}

    def skips(self, prompts, completions, **columns) -> list[bool]:
        """Whether each row is skipped (`missing="skip"`): what stands beside this function has nothing to say of it,
        either."""
        prompts, references, ids = list(prompts), columns.get("reference"), columns.get("id")
        references = [None] * len(prompts) if references is None else list(references)
        if self.config.target == "reference":
            contexts, targets = map(self.reference_context, prompts), [message_text(one or "") for one in references]
            return [not len(one.positions) for one in self.calculator.encoder.encode(list(contexts), targets)]
        rows = row_baselines(columns, self.config.levels)
        if self.baselines is None and rows is None:
            return [False] * len(prompts)
        return np.isnan(self._baselines(prompts, references, ids, rows)).any(axis=1).tolist()

    def per_level(self, veto: Veto | None = None) -> "list[MultiLevelPPLRewardFunction]":
        """A reward function for each level, for trainers that normalise each by itself before they add, so that a level
        with a large spread does not drown one with a small spread: TRL with
        `multi_objective_aggregation="normalize_then_sum"` (GDPO, https://arxiv.org/abs/2601.05242).

        Each is this function with all the weight on its level. They share model and cache: what the first has scored
        the others look up (with use_cache=False each scores). Called for the same completions, each has the same first
        visits. Give `weights` to the trainer, too.

        veto: of `mlppl.reward.loop_guard.loop_veto`. What it says True of gets `config.vetoed` at each level, less than
        anything else. Normalising within a group keeps the order at each level, and so does a sum with weights that are
        not negative. So within its group a vetoed completion's advantage is below that of every one that is not vetoed,
        whatever the model makes of the texts, as long as a level has a weight and no further reward stands beside the
        levels. Where a whole group is vetoed, all are alike and nothing is learned from it.
        Raises `InputError` with `normalize`, and for a subclass whose `compute_rewards` is its own.
        """
        if self.config.normalize:
            raise InputError("per_level: the trainer normalises each level itself: leave out normalize=True")
        if type(self).compute_rewards is not MultiLevelPPLRewardFunction.compute_rewards:
            raise InputError(
                f"{type(self).__name__} has a compute_rewards of its own, which knows no levels: use it whole, or "
                "per_level() of MultiLevelPPLRewardFunction"
            )
        rewards = [copy.copy(self) for _ in self.config.levels]
        for one, level in zip(rewards, self.config.levels, strict=True):
            one.__name__, one.level, one.veto = f"{self.__name__}_{level}", level, veto
            one.first_visits = copy.deepcopy(self.first_visits)
        return rewards

    @_one_call
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
        record: list | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """float32 [B] rewards, nan for a skipped row; with `return_details` also what they were made from.

        baselines: per row, before those of the constructor; None where a row has none. completions: the messages that
        `texts` are of, where there are several in one: only the assistant's are scored, each behind what stood before.
        completion_ids: what the policy sampled. Where they are the scorer's (see `policy`) and their text is that of
        `texts`, they are scored, up to the end token, behind `prompt_ids` (None: what GRPOTrainer makes of `prompts`).
        vetoed: see `per_level`. record: gets what was measured and earned (`mlppl.reward.terms`) as one more item.
        details: "ppls" and "baselines", each `{level: float64 [B]}`, nan where there is none; "improvements",
        `{level or "avg": float64 [B]}` in percent, 0 for a completion without a scored token; "rewards", float64 [B],
        before `normalize`, of a level's function the levels' sum by `weights`; "level_rewards", `{level: float64 [B]}`,
        what each level earns alone (`per_level`).
        """
        measured = self.measure(
            texts, prompts, references, ids, baselines, completions, completion_ids, prompt_ids, vetoed
        )
        one = earned(measured, self.config, by_level=self.level is not None)
        if record is not None:
            record.append((measured, one))
        rewards = one.rewards if self.level is None else one.of_levels[:, self.config.levels.index(self.level)]
        if self.config.normalize:
            rewards = rewards.copy()
            every, mine = of_this(rewards[~measured.skipped].tolist())
            rewards[~measured.skipped] = normalized(np.array(every))[mine]
        result = torch.from_numpy(rewards).float().to(self.device)
        return (result, details_of(measured, one, self.config.levels)) if return_details else result

    def measure(
        self, texts, prompts=None, references=None, ids=None, baselines=None, completions=None, completion_ids=None,
        prompt_ids=None, vetoed=None,
    ) -> Measured:  # fmt: skip
        """What `compute_rewards` makes rewards of. The arguments are the same."""
        n, of_reference = len(texts), self.config.target == "reference"
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
        if of_reference and references is None:
            raise InputError("target='reference' needs a column `reference`: rename the data set's column to it")
        if not is_scorer(self.model):
            self.cache.forget_if_trained(self.model)
        prompts = [None] * n if prompts is None else list(prompts)
        references = [None] * n if references is None else list(references)
        completions = texts if completions is None else completions
        pairs, written = self.written(prompts, completions, completion_ids, prompt_ids)

        baseline = self._baselines(prompts, references, ids, baselines)
        absent = np.isnan(baseline).any(axis=1)
        first_visit, has_part, others = np.zeros(n, dtype=bool), None, None
        if of_reference:
            current, alone, others, has_part = self._behind(prompts, written, references, absent)
            baseline[absent] = alone[absent]
        else:
            # A text of one message as it was written: up to its end token, with the space that decoding lost.
            whole = [
                text if isinstance(completion, str) or len(completion) == 1 else completion
                for completion, text in zip(completions, written, strict=True)
            ]
            scored = list(map(self.calculator.contexts.of, prompts, whole, pairs))
            current = np.minimum(self.perplexities(scored), HIGHEST)
            if self.baselines is None and baselines is None:
                rows = np.flatnonzero(absent)
                visited = [self.calculator.render(prompts[row]) for row in rows]
                baseline[rows], first_visit[rows] = self.first_visits.measure(visited, current[rows])
            elif absent.any() and self.config.missing == "error":
                source = "the data set" if self.baselines is None else self.baselines.source
                refuse(source, absent, prompts, references, ids)

        skipped = np.isnan(baseline).any(axis=1) & ~first_visit
        if of_reference:
            blank = np.isnan(current).any(axis=1)
            if blank.any() and self.config.missing == "error":
                index = np.flatnonzero(blank)[0]
                raise InputError(f"row {index} of this call has a blank reference: drop it, or use missing='skip'")
            skipped |= blank
        veto = None if vetoed is None else np.array(vetoed, dtype=bool)
        return Measured(current, baseline, others, first_visit, skipped, has_part, veto)

    def _baselines(self, prompts: Sequence, references: Sequence, ids, rows) -> np.ndarray:
        """float64 [B, L], nan where a row has none. rows: of `row_baselines`, which come first."""
        values = np.full((len(prompts), len(self.config.levels)), np.nan)
        if rows is not None:
            given = {index: row for index, row in enumerate(rows) if row is not None}
            for index, of_row in Baselines(given, source="the data set", levels=self.config.levels).items():
                values[index] = of_row
        if self.baselines is not None:
            of_reference = self.config.target == "reference"
            for index in np.flatnonzero(np.isnan(values[:, 0])).tolist():
                reference = (references[index] or "") if of_reference else None
                key = _row_key(ids, prompts, references, index)
                row = self.baselines.find(key, prompts[index], reference, index)
                if row is not None:
                    values[index] = row
        return values

    def _behind(
        self, prompts: Sequence[Text | None], texts: Sequence[str], references: Sequence[Text | None], absent
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """What completions do for references: (their perplexities behind prompt and completion, float64 [B, L]; the
        same without the completion where `absent`; those of other rows' references, `Measured.others`; whether a
        completion has the part that `extract` wants, bool [B], None without it)

        absent: bool [B], rows without a baseline.
        """
        put, n = self.config.reference_context, len(texts)
        parts, has_part = zip(*map(put.extracted, texts), strict=True) if texts else ((), ())
        targets = [message_text(reference or "") for reference in references]
        with_text = list(zip(map(self.reference_context, prompts, parts), targets, strict=True))
        unknown = [
            (self.reference_context(prompts[index]), targets[index]) for index in np.flatnonzero(absent).tolist()
        ]
        others, m = [], self.config.contrast
        for prompt, part, target in zip(prompts, parts, targets, strict=True) if m else ():
            for other, reference in self.calculator.contexts.others_of(prompt, target, 1):
                for written in (part, ""):
                    others.append((self.reference_context(other, written), message_text(reference)))
        # One call, so that they share the prompts' forward passes.
        values = np.minimum(self.perplexities(with_text + unknown + others), HIGHEST)
        alone = np.full((n, values.shape[1]), np.nan)
        alone[absent] = values[n : n + len(unknown)]
        contrast = values[n + len(unknown) :].reshape(n, m, 2, -1).transpose(2, 0, 1, 3) if m else None
        return values[:n], alone, contrast, np.array(has_part, dtype=bool) if put.extracts else None

    def reference_context(self, prompt: Text | None, part: str = "") -> str:
        """What stands before a reference: examples, its prompt and what of a completion counts, put together."""
        return self.calculator.contexts.before_reference(self.config.reference_context, prompt, part)

    @property
    def keeps_first_visits(self) -> bool:
        return self.baselines is None and self.config.target == "completion"

    def state_dict(self) -> dict:
        """What a resumed run needs: the zero-shot baselines recorded so far, and what they were measured with."""
        made_with = {"identity": self._measured_with} if self.keeps_first_visits else {}
        return {"first_visits": self.first_visits.state_dict(), **made_with}

    def load_state_dict(self, state: Mapping) -> None:
        """Raises `InputError` for first visits that were measured otherwise."""
        visits = state["first_visits"]
        if self.keeps_first_visits and visits:
            differing = differences(state.get("identity", {}), self._measured_with)
            if sizes := {len(levels) for levels in visits.values()} - {len(self.config.levels)}:
                differing["levels"] = (f"{sizes.pop()} of them", self.config.levels)
            if differing:
                theirs, mine = (", ".join(f"{key} {both[side]}" for key, both in differing.items()) for side in (0, 1))
                raise InputError(
                    f"the checkpoint's first completions of {len(visits)} prompts, which are their baselines, were "
                    f"measured with {theirs}, and this run has {mine}: go on with the settings of before, or begin anew"
                )
        self.first_visits.load_state_dict(visits)

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

    def perplexities(self, texts: Sequence) -> np.ndarray:
        """float64 [B, L], of what `MultiLevelPPLCalculator.score` takes, from the cache where it has them."""
        score = functools.partial(self.calculator.score_pairs, self.model)
        return self.cache.perplexities(texts, score) if self.use_cache else score(texts)


def row_baselines(columns: Mapping[str, Sequence], levels: Sequence[str]) -> list[dict | None] | None:
    """Per row the baseline in the columns `baseline_word`, `baseline_phrase`, ...; None without."""
    names = [f"baseline_{level}" for level in levels]
    present = [name for name in names if name in columns]
    if not present:
        return None
    if len(present) < len(names):
        raise BaselineError(f"the data set has {', '.join(present)}, all of {', '.join(names)} are needed")
    rows = zip(*(columns[name] for name in names), strict=True)
    return [None if None in row else dict(zip(levels, row, strict=True)) for row in rows]


def refuse(source: str, absent: np.ndarray, prompts: Sequence, references: Sequence, ids) -> None:
    """Raises `BaselineError` for rows without a baseline. absent: bool [B]."""
    first = [_row_key(ids, prompts, references, index) for index in np.flatnonzero(absent)[:3].tolist()]
    raise BaselineError(
        f"{source} has no baseline for {absent.sum()} of {len(absent)} rows, the first are {first}: "
        "compute them with compute_baselines_trl.py on this data set, or skip such rows with missing='skip'"
    )


def _row_key(ids, prompts, references, index: int):
    if ids is not None:
        return ids[index]
    return None if prompts[index] is None else stable_id(prompts[index], references[index] or "")


def log(measured: Measured, one: Earned, levels: Sequence[str], log_metric, log_extra=None) -> None:
    """Means over all processes, the same names at every call on every process; nan of nothing, which TRL leaves out.

    log_extra: takes a column of TRL's table of completions.
    """
    scored = measured.scored
    shares = {
        "diagnostics/not_extracted": None if measured.extracted is None else ~measured.extracted,
        "diagnostics/bent": None if one.bent is None else one.bent[scored],
        "diagnostics/vetoed": None if measured.vetoed is None else measured.vetoed[~measured.skipped],
        "reward_others": None if one.others is None else one.others[scored],
    }
    for name, values in shares.items():
        if values is not None:
            every = from_all(values.tolist())
            log_metric(name, sum(every) / len(every) if every else math.nan)
    columns = {f"reward_{level}": one.improvement[:, index] for index, level in enumerate(levels)}
    columns |= {f"ppl/{level}": measured.perplexities[:, index] for index, level in enumerate(levels)}
    rows = np.stack([column[scored] for column in columns.values()], axis=1)
    means = np.array(from_all(rows.tolist())).reshape(-1, len(columns))
    means = means.mean(axis=0) if len(means) else np.full(len(columns), np.nan)
    for (name, column), mean in zip(columns.items(), means, strict=True):
        log_metric(name, float(mean))
        if log_extra is not None:
            log_extra(name, column.tolist())
