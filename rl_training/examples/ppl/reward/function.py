"""The reward function that GRPOTrainer calls: perplexities, baselines and thresholds put together."""

import copy
import functools
import hashlib
import json
import logging
import math
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

from ..baselines.file import Baselines, check_meta
from ..config import BASELINE_COLUMNS, LEVELS, RewardConfig
from ..data import Text, check_text, message_text, stable_id
from ..errors import BaselineError, InputError
from ..processes import from_all, of_this
from ..prompts import Turn, Turns, chat_identity, of_text, refuse_begun
from ..scoring.calculator import MultiLevelPPLCalculator
from ..scoring.frozen import base_parameters
from ..scoring.identity import identity
from ..scoring.sampling import GivenIds, end_tokens, given_by_trainer, prompt_ids, refuse_appended, up_to_end
from ..scoring.surprisal import Scorer, as_scorer, is_scorer
from ..scoring.tokens import Pair, Sampled, TextEncoder
from .terms import HIGHEST, Earned, Measured, details_of, earned, normalized

# --- given -----------------------------------------------------------------------------------------------------------

# The baselines that a call's rows are given: by the data set's columns, else by the file.


def row_baselines(columns: Mapping[str, Sequence]) -> list[dict | None] | None:
    """Per row the baseline in the columns `baseline_word`, `baseline_phrase`, `baseline_sentence`; None without."""
    present = [name for name in BASELINE_COLUMNS if name in columns]
    if not present:
        return None
    if len(present) < len(BASELINE_COLUMNS):
        raise BaselineError(f"the data set has {', '.join(present)}, all of {', '.join(BASELINE_COLUMNS)} are needed")
    rows = zip(*(columns[name] for name in BASELINE_COLUMNS), strict=True)
    return [None if None in row else dict(zip(LEVELS, row, strict=True)) for row in rows]


def given_baselines(
    baselines: Baselines | None, of_reference: bool, prompts: Sequence, references: Sequence, ids, rows
) -> np.ndarray:
    """float64 [B, 3], nan where a row has none. rows: of `row_baselines`, which come first. of_reference: references
    are what is measured."""
    values = np.full((len(prompts), len(LEVELS)), np.nan)
    if rows is not None:
        given = {index: row for index, row in enumerate(rows) if row is not None}
        for index, of_row in Baselines(given, source="the data set").items():
            values[index] = of_row
    if baselines is not None:
        for index in np.flatnonzero(np.isnan(values[:, 0])).tolist():
            reference = (references[index] or "") if of_reference else None
            row = baselines.find(_row_key(ids, prompts, references, index), prompts[index], reference, index)
            if row is not None:
                values[index] = row
    return values


def refuse(baselines: Baselines, absent: np.ndarray, prompts: Sequence, references: Sequence, ids) -> None:
    """Raises `BaselineError` for rows without a baseline. absent: bool [B]."""
    first = [_row_key(ids, prompts, references, index) for index in np.flatnonzero(absent)[:3].tolist()]
    raise BaselineError(
        f"{baselines.source} has no baseline for {absent.sum()} of {len(absent)} rows, the first are {first}: "
        "compute them with compute_baselines_trl.py on this data set, or skip such rows with missing='skip'"
    )


def _row_key(ids, prompts, references, index: int):
    if ids is not None:
        return ids[index]
    return None if prompts[index] is None else stable_id(prompts[index], references[index] or "")


# --- cache -----------------------------------------------------------------------------------------------------------

# Perplexities already computed, for as long as the scorer's weights stay as they are.


class PerplexityCache:
    """The newest `ENTRIES` perplexities by what was scored. The same prompt comes again in every epoch."""

    ENTRIES = 100_000  # about 20 MB

    def __init__(self) -> None:
        self._perplexities: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._weights_version: tuple | None = None
        self._warned_of_training = False

    def perplexities(self, pairs: Sequence[Pair], score: Callable[[list[Pair]], np.ndarray]) -> np.ndarray:
        """float64 [B, 3]. score: computes those that are not here; it is asked also for none, since a model that is
        spread over processes has to be asked in each of them."""
        keys = list(map(_key, pairs))
        known = {key: self._perplexities[key] for key in keys if key in self._perplexities}
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
        known.update(zip(new, score(list(new.values())), strict=True))
        self._perplexities.update((key, known[key]) for key in new)
        while len(self._perplexities) > self.ENTRIES:
            self._perplexities.popitem(last=False)
        return np.array([known[key] for key in keys]).reshape(len(pairs), len(LEVELS))

    def forget_if_trained(self, model) -> None:
        """Drop what was computed before the scorer's own weights changed, and say so once if they are being trained."""
        parameters = list(base_parameters(model))
        # Optimizers of 8 bits write behind autograd's back, which counts no version then: of what may be trained, some
        # values are looked at as well.
        version = sum(parameter._version for parameter in parameters), tuple(map(_some, parameters))
        if self._weights_version is not None and version != self._weights_version:
            # When DDP starts it writes every parameter, with the same values: only one that is trained is worth a word.
            trained = any(parameter.requires_grad for parameter in parameters)
            if trained and not self._warned_of_training:
                warnings.warn(
                    "the scorer's own weights change during training, so its baselines lose their meaning: train "
                    "adapters (LoRA), or pass a frozen copy of the model as baseline_model",
                    stacklevel=3,
                )
                self._warned_of_training = True
            self.clear()
        self._weights_version = version

    def clear(self) -> None:
        self._perplexities.clear()

    def __len__(self) -> int:
        return len(self._perplexities)

    def __getstate__(self) -> dict:
        # A copy's parameters count their changes anew.
        return {**self.__dict__, "_weights_version": None}


def _some(parameter) -> tuple:
    """A few values of a parameter that may be trained, of a frozen one none."""
    if not parameter.requires_grad:
        return ()
    values = parameter.detach().flatten()
    return tuple(values[:: max(1, len(values) // 8)].tolist())


def _key(pair: Pair) -> bytes:
    """16 bytes that name what is scored: of a sampled completion its ids, since others can have the same text."""
    content = json.dumps([isinstance(pair, Sampled), *pair]).encode()
    return hashlib.blake2b(content, digest_size=16).digest()


# --- first visits ----------------------------------------------------------------------------------------------------

# Without baselines: the first completions of a prompt make its own, and later ones are measured against them.


class FirstVisits:
    """The mean perplexities of each prompt's first completions, float64 [3] by the prompt's hash."""

    def __init__(self) -> None:
        self._baselines: dict[str, np.ndarray] = {}

    def measure(self, contexts: Sequence[str], perplexities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(baselines float64 [B, 3], nan where no completion of a prompt could be scored yet; first visits bool [B]).

        contexts: the prompts as the scorer reads them. perplexities: float64 [B, 3], of the completions. Several
        processes must all call: a group may be split over them, and its mean is the same in each.
        """
        groups: dict[str, list[int]] = {}
        for index, context in enumerate(contexts):
            groups.setdefault(stable_id(context), []).append(index)
        mine = {key: perplexities[rows] for key, rows in groups.items() if key not in self._baselines}
        new: dict[str, list[np.ndarray]] = {}
        for key, rows in from_all(mine.items()):
            new.setdefault(key, []).append(rows[~np.isnan(rows).any(axis=1)])
        for key, parts in new.items():
            if len(scored := np.concatenate(parts)):
                self._baselines[key] = scored.mean(axis=0)
        baselines = np.full((len(contexts), len(LEVELS)), np.nan)
        first_visit = np.zeros(len(contexts), dtype=bool)
        for key, rows in groups.items():
            first_visit[rows] = key in mine
            baselines[rows] = self._baselines.get(key, np.nan)
        return baselines, first_visit

    def state_dict(self) -> dict[str, list[float]]:
        return {key: levels.tolist() for key, levels in self._baselines.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self._baselines = {key: np.array(levels) for key, levels in state.items()}


# --- sampled ---------------------------------------------------------------------------------------------------------

# What the policy wrote, as it is scored: the ids that it sampled, or their text where the scorer has other ids.

logger = logging.getLogger(__name__)


class Policy:
    """Who wrote the completions: its tokenizer says what their ids are as text, its end tokens where they end.

    calculator, scorer: of the reward. policy: (model, tokenizer); None: it is the scorer, or has its tokenizer.
    """

    def __init__(self, calculator: MultiLevelPPLCalculator, scorer, policy: tuple | None) -> None:
        model, tokenizer = policy or (scorer, calculator.tokenizer)
        self._calculator = calculator
        self._warned = False
        self._told = policy is not None
        self.tokenizer = of_text(tokenizer)
        is_scorers = self.tokenizer is calculator.tokenizer
        self.encoder = calculator.encoder if is_scorers else TextEncoder(self.tokenizer)
        vocabulary = calculator.tokenizer.get_vocab()
        self._tokens = set(vocabulary.values())
        # A model can have rows beyond the tokens of its tokenizer, and sample them.
        of_model = self.tokenizer.get_vocab() == vocabulary and hasattr(scorer, "config")
        self._rows = scorer.config.get_text_config().vocab_size if of_model else 0
        # Another model may have written with the scorer's tokenizer, and gone on behind what ends a text of the scorer.
        self._ends = end_tokens(None if policy is None else model, self.tokenizer)
        self._trailing = {*self.encoder.special_ids, *end_tokens(model, self.tokenizer)}

    def shares_ids(
        self, prompts: Sequence[Text | None], given_ids: Sequence[Sequence[int]] | None = None
    ) -> list[bool]:
        """Per prompt, whether policy and scorer make the same ids of it, and mean the same tokens by them.

        given_ids: of `read`. If nothing is known of the policy they have to be the scorer's, or the end of those.
        """
        of_scorer, of_policy = self._calculator.tokenizer, self.tokenizer
        unknown = [] if self._told or given_ids is None else list(given_ids)
        for ids in unknown:
            if isinstance(ids, GivenIds):  # a trainer's are all of one tokenizer
                unknown, of_policy = [], ids.tokenizer
                break
        if not unknown and of_policy is of_scorer:
            return [True] * len(prompts)
        if _division(of_policy, len(of_policy)) != _division(of_scorer, len(of_scorer)):
            return [False] * len(prompts)
        mine = prompt_ids(prompts, of_scorer, **self._calculator.chat)
        if not unknown:
            theirs = prompt_ids(prompts, of_policy, **self._calculator.chat)
            return [one == other for one, other in zip(mine, theirs, strict=True)]
        start = self.encoder.start
        given = [list(map(int, ids)) for ids in unknown]
        ends = [ids[len(start) :] if ids[: len(start)] == start else ids for ids in given]
        return [one[len(one) - len(end) :] == end for one, end in zip(mine, ends, strict=True)]

    def read(
        self,
        prompts: Sequence[Text | None],
        texts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        given_ids: Sequence[Sequence[int]] | None,
        parsed: Sequence[bool],
    ) -> list[tuple[Sampled | None, str] | None]:
        """Per completion (its ids, None if they are not the scorer's; what it adds to its prompt's text); None if the
        ids are not those of its text, which was then changed on its way here.

        given_ids: what the policy was given as prompts; None: what GRPOTrainer makes of them. parsed: whether a text is
        what a trainer calls the content, a part of what was written.
        """
        completion_ids = [list(map(int, ids)) for ids in completion_ids]
        if not completion_ids:  # of which transformers would decode one text
            return []
        shared = self.shares_ids(prompts, given_ids)
        if given_ids is None:
            given_ids = prompt_ids(prompts, self.tokenizer, **self._calculator.chat)
        given_ids = [tuple(map(int, ids)) for ids in given_ids]
        written = list(map(self._written, completion_ids))
        # As TRL decodes them; or as they stand behind their prompt, where a space or a mark of continuation is another.
        alone = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        behind = self.encoder.decoding.texts(given_ids, written)
        found: list[tuple[Sampled | None, str] | None] = []
        for index, (prompt, (before, text)) in enumerate(zip(prompts, behind, strict=True)):
            given, ids = given_ids[index], tuple(written[index])
            part = parsed[index] or (self._parses and isinstance(prompt, list))
            if not any(_is_of(texts[index], one, part) for one in (alone[index], text)):
                found.append(None)
            elif shared[index] and self._tokens.issuperset([*given, *(one for one in ids if one >= self._rows)]):
                found.append((Sampled(given, ids), text))
            else:
                # Words joined by spaces: a decoder writes the one that the prompt's ids have lost, or that the policy's
                # chat template does not end in and the scorer's does.
                space = isinstance(prompt, str) or self.encoder.decoding.loses_a_space
                lost = space and self._calculator.render(prompt)[-1:].isspace() and not before[-1:].isspace()
                found.append((None, text.removeprefix(" ") if lost else text))
        return found

    def warn_once(self) -> None:
        if not self._warned:
            logger.warning(
                "completion_ids are not the scorer's, or not those of the completions, so their text is scored: the "
                "policy has another tokenizer or chat template (of which policy=(model, tokenizer) tells the reward), "
                "or the texts were changed"
            )
        self._warned = True

    @property
    def _parses(self) -> bool:
        """Whether the trainer takes messages apart: what is thought, or said to tools, is then no part of a content."""
        return any(getattr(self.tokenizer, f"response_{name}", None) is not None for name in ("template", "schema"))

    def _written(self, ids: list[int]) -> list[int]:
        """Up to the first end token; special tokens behind the last text are left out like it."""
        ids = up_to_end(ids, self._ends)
        size = next((size for size in range(len(ids), 0, -1) if ids[size - 1] not in self._trailing), 0)
        return ids[:size]


@functools.lru_cache(maxsize=8)
def _division(tokenizer, size: int) -> str:
    """A hash of what makes tokens of a text, their ids included. size: of the vocabulary, which may have grown."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    content = [tokenizer.get_vocab(), *(parts[name] for name in ("model", "normalizer", "pre_tokenizer"))]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode()).hexdigest()


def as_scored(
    calculator: MultiLevelPPLCalculator,
    model,
    policy: Policy,
    prompts: Sequence[Text | None],
    completions: Sequence[Text],
    completion_ids: Sequence[Sequence[int]] | None,
    given_ids: Sequence[Sequence[int]] | None,
) -> tuple[list[Turn | Turns | Sampled], list[str]]:
    """(each completion behind its prompt: ids where they are the scorer's; the completions' texts)

    given_ids: what the policy was given as prompts; None: what GRPOTrainer makes of them.
    """
    for index, completion in enumerate(completions):
        check_text(completion, f"completion {index}")
    texts = [message_text(completion) for completion in completions]
    pairs = list(map(calculator.turns, prompts, completions))
    read = [None] * len(texts)
    if completion_ids is not None:
        read = policy.read(prompts, texts, completion_ids, given_ids, list(map(_is_parsed, completions)))
    one_turn = [isinstance(completion, str) or len(completion) == 1 for completion in completions]
    for index in np.flatnonzero(one_turn):
        if read[index] is not None:
            ids, texts[index] = read[index]
            pairs[index] = ids or (pairs[index][0], texts[index])
        if not (completion_ids is None or isinstance(pairs[index], Sampled)):
            policy.warn_once()
    # The rest came as text, decoded without what stands before it.
    alone = [index for index, (found, one) in enumerate(zip(read, one_turn, strict=True)) if not (found and one)]
    turns = [list(pairs[index]) if isinstance(pairs[index], Turns) else [pairs[index]] for index in alone]
    restored = iter(calculator.restore_spaces(model, list(chain(*turns)), policy.encoder.decoding))
    for index, of_one in zip(alone, turns, strict=True):
        whole = Turns((context, next(restored)) for context, _ in of_one)
        pairs[index] = whole if isinstance(pairs[index], Turns) else whole[0]
        if one_turn[index]:
            texts[index] = whole[0][1]
    return pairs, texts


def _is_parsed(completion: Text) -> bool:
    """Whether a trainer took it apart: what was thought, or said to tools, stands beside its content."""
    return not isinstance(completion, str) and any(
        value for one in completion for key, value in one.items() if key not in ("role", "content")
    )


def _is_of(text: str, decoded: str, parsed: bool) -> bool:
    """Decoding may lose or add white space; and of a parsed message the text is a part."""
    text, decoded = "".join(text.split()), "".join(decoded.split())
    return text == decoded or bool(parsed and text and text in decoded)


# --- references ------------------------------------------------------------------------------------------------------

# What completions do for their references: perplexities with and without them.


def behind(
    reward_fn, contexts: Sequence[str], texts: Sequence[str], references: Sequence[Text | None], absent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Sequence[bool]]:
    """(perplexities of the references behind prompt and completion, the same behind the prompt alone where `absent`,
    float64 [B, 3] each; whether a completion has the part that `extract` wants)

    contexts: the prompts as the scorer reads them. absent: bool [B], rows without a baseline.
    """
    put = reward_fn.config.reference_context
    targets = [message_text(reference or "") for reference in references]
    parts, has_part = zip(*map(put.extracted, texts), strict=True) if texts else ((), ())
    with_text = list(zip(map(put.context, contexts, parts), targets, strict=True))
    without = list(zip(map(put.context, contexts), targets, strict=True))
    alone = np.full((len(texts), len(LEVELS)), np.nan)
    # One call, so that they share the prompts' forward passes.
    unknown = [pair for pair, wanted in zip(without, absent, strict=True) if wanted]
    values = np.minimum(reward_fn.perplexities(with_text + unknown), HIGHEST)
    current, alone[absent] = values[: len(texts)], values[len(texts) :]
    return current, alone, has_part


# --- last call -------------------------------------------------------------------------------------------------------

# What a call of the reward function found: for the log, and for who looks on.


class LastCall(NamedTuple):
    measured: Measured
    earned: Earned
    details: dict  # the same, as `compute_rewards` returns it
    of: tuple[list, list[str]]  # its prompts and texts


def log(call: LastCall, extracts: bool, log_metric, log_extra=None) -> None:
    """Means over all processes, the same names at every call on every process; nan of nothing, which TRL leaves out.

    extracts: whether the reward takes a part of each completion. log_extra: takes a column of TRL's table of
    completions.
    """
    measured, scored = call.measured, call.measured.scored
    shares = {
        "not_extracted": ~measured.extracted if extracts else None,
        "clipped": None if call.earned.clipped is None else call.earned.clipped[scored],
        "vetoed": None if measured.vetoed is None else measured.vetoed[~measured.skipped],
    }
    for name, flags in shares.items():
        if flags is not None:
            every = from_all(flags.tolist())
            log_metric(f"diagnostics/{name}", sum(every) / len(every) if every else math.nan)
    columns = {f"reward_{level}": call.details["improvements"][level] for level in LEVELS}
    columns |= {f"ppl/{level}": call.details["ppls"][level] for level in LEVELS}
    rows = np.stack([column.numpy()[scored] for column in columns.values()], axis=1)
    means = np.array(from_all(rows.tolist())).reshape(-1, len(columns))
    means = means.mean(axis=0) if len(means) else np.full(len(columns), np.nan)
    for (name, column), mean in zip(columns.items(), means, strict=True):
        log_metric(name, float(mean))
        if log_extra is not None:
            log_extra(name, column.tolist())


# --- function --------------------------------------------------------------------------------------------------------

# One call at a time: AsyncGRPO calls from several threads, and a call is more than its rewards (`_last`, first visits).
_ONE_CALL = threading.RLock()


def _one_call(method: Callable) -> Callable:
    @functools.wraps(method)
    def alone(*args, **kwargs):
        with _ONE_CALL:
            return method(*args, **kwargs)

    return alone


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
    weights, reward_thresholds, normalize, settings: the fields of `ppl.config.RewardConfig`, which says what each is.
        normalize shifts and scales each call's rewards to mean 0 and (sample) standard deviation 1.
    device: moves the model there; None: it stays. use_cache: keep perplexities already computed, by content.
    scorer: instead of a baseline_model, something that scores, such as `ppl.scoring.server.ServerScorer`; it may be
        given as baseline_model, too.
    policy: (model, tokenizer) of what is trained, if it is another model than the scorer: its tokenizer says what the
        sampled ids are as text, and both say which of them end it. Its ids are scored if the scorer would make the same
        ids of the prompt and has the same vocabulary, otherwise their text. None: the scorer's own tokenizer.
    batch_size, max_batch_tokens, chat_template_kwargs, tools: of `MultiLevelPPLCalculator`.

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
        **settings,
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
        self.config = config = RewardConfig.of(
            {"weights": weights, "reward_thresholds": reward_thresholds, "normalize": normalize, **settings}
        )
        definitions = (config.max_phrase_words, config.language, config.aggregation)
        self.calculator = MultiLevelPPLCalculator(
            tokenizer, *definitions, batch_size, max_batch_tokens, chat_template_kwargs, tools
        )
        self.tokenizer = self.calculator.tokenizer
        self.policy = Policy(self.calculator, self.model, policy)
        self.use_cache = use_cache
        if isinstance(baselines, str | Path):
            baselines = Baselines.load(baselines)
        elif baselines is not None and not isinstance(baselines, Baselines):
            if not baselines:
                raise BaselineError("baselines holds no row: expected one for each row, or None for the first visits")
            baselines = Baselines(baselines)
        self.baselines = baselines
        if self.baselines is not None and self.baselines.meta and not config.allow_baseline_mismatch:
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
    def identity(self) -> dict:
        """What a baselines file must have been made with to be compared with this reward's numbers."""
        return identity(
            as_scorer(self.model, self.tokenizer),
            self.tokenizer,
            self.config,
            name=getattr(getattr(self.model, "config", None), "_name_or_path", ""),
            prompt=chat_identity(self.tokenizer, **self.calculator.chat),
        )

    @_one_call
    def __call__(self, prompts, completions, **columns) -> list[float | None]:
        """One reward a completion, None for a skipped row: TRL's calling convention.

        columns: the data set's own, as lists (`id`, `reference`, `baseline_word`, ...), and TRL's `completion_ids` and
        `log_metric`. Where the policy got other ids than those that `prompts` make here, `prompt_ids` are what it got.
        Raises `InputError` for a prompt that has begun the answer if GRPOTrainer itself calls: see `refuse_begun`.
        """
        rewards, seconds = self._timed(prompts, completions, columns)
        skipped = self._last.measured.skipped.tolist() if self._last else [False] * len(completions)
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

        Each is this function with all the weight on its level, but for blank completions, which get `config.lowest` in
        both forms. They share model and cache: what the first has scored the others look up (with use_cache=False each
        scores). Called for the same completions, each has the same first visits. Give `weights` to the trainer, too.

        veto: of `ppl.reward.loop_guard.loop_veto`. What it says True of gets `config.vetoed` at each level, less than
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
        rewards = [copy.copy(self) for _ in LEVELS]
        for one, level in zip(rewards, LEVELS, strict=True):
            one.__name__, one.level, one.veto = f"{self.__name__}_{level}", level, veto
            one.first_visits = copy.deepcopy(self.first_visits)
        return rewards

    @_one_call
    def skips(self, prompts, completions, **columns) -> list[bool]:
        """Of each completion of a call in TRL's calling convention, whether its row is skipped (`missing="skip"`): what
        stands beside this function has nothing to say of it, either. Scored anew only where another call was last."""
        of = (list(prompts), [message_text(completion) for completion in completions])
        if self._last is None or self._last.of != of:
            self._timed(prompts, completions, columns)
        return self._last.measured.skipped.tolist() if self._last else [False] * len(completions)

    def _timed(self, prompts, completions, columns: Mapping) -> tuple[list[float], float]:
        """(what `compute_rewards` gives for TRL's columns, seconds it took)"""
        if "trainer_state" in columns and not given_by_trainer(columns):
            refuse_begun(prompts, "GRPOTrainer", "train with ppl.training.trainer.ResumableGRPOTrainer, or ")
            refuse_appended(prompts, self.policy.tokenizer)
        texts = [message_text(completion) for completion in completions]
        arguments = {"prompts": prompts, "references": columns.get("reference"), "ids": columns.get("id")}
        if any(not isinstance(one, str) and (len(one) > 1 or _is_parsed(one)) for one in completions):
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
            log(self._last, self.config.extract is not None, log_metric, columns.get("log_extra"))
            log_metric("reward_time", seconds)  # as TRL's step_time
        if self.observer is not None:
            texts = [message_text(completion) for completion in completions]
            if self.level is not None:
                rewards = [None if math.isnan(one) else one for one in self._last.details["rewards"].tolist()]
            self.observer.observe(self._last, self.config.highest, prompts, texts, rewards, **columns)

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
        if self.config.target == "reference" and references is None:
            raise InputError("target='reference' needs a column `reference`: rename the data set's column to it")
        if not is_scorer(self.model):
            self._cache.forget_if_trained(self.model)
        prompts = [None] * n if prompts is None else list(prompts)
        references = [None] * n if references is None else list(references)
        contexts = [self.calculator.render(prompt) for prompt in prompts]
        completions = texts if completions is None else completions
        pairs, written = self.written(prompts, completions, completion_ids, prompt_ids)

        of_reference = self.config.target == "reference"
        baseline = given_baselines(self.baselines, of_reference, prompts, references, ids, baselines)
        absent = np.isnan(baseline).any(axis=1)
        first_visit = np.zeros(n, dtype=bool)
        if of_reference:
            current, alone, has_part = behind(self, contexts, written, references, absent)
            baseline[absent] = alone[absent]
        else:
            current = np.minimum(self.perplexities(pairs), HIGHEST)
            if self.baselines is None:
                rows = np.flatnonzero(absent)
                visited = [contexts[row] for row in rows]
                baseline[rows], first_visit[rows] = self.first_visits.measure(visited, current[rows])
            elif absent.any() and self.config.missing == "error":
                refuse(self.baselines, absent, prompts, references, ids)

        unscorable = np.isnan(current).any(axis=1)
        skipped = np.isnan(baseline).any(axis=1) & ~first_visit
        if of_reference:
            if unscorable.any() and self.config.missing == "error":
                index = np.flatnonzero(unscorable)[0]
                raise InputError(f"row {index} of this call has a blank reference: drop it, or use missing='skip'")
            skipped |= unscorable
        extracted = np.array(has_part, dtype=bool) if of_reference else np.ones(n, dtype=bool)
        veto = None if vetoed is None else np.array(vetoed, dtype=bool)
        measured = Measured(current, baseline, first_visit, skipped, extracted, veto)
        one = earned(measured, self.config, by_level=self.level is not None)
        details = details_of(measured, one)
        rewards = one.rewards if self.level is None else one.of_levels[:, LEVELS.index(self.level)]
        if self.config.normalize:
            every, mine = of_this(rewards[~skipped].tolist())
            rewards[~skipped] = normalized(np.array(every))[mine]
        self._last = LastCall(measured, one, details, (prompts, list(map(message_text, texts))))
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
