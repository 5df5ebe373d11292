"""What can be set about a reward and about sampling: choices, defaults, help texts and what makes no sense, each once.

`RewardConfig` is the only table of a reward's settings. Flags and names in YAML files are made of it, the identity of a
baselines file holds what it defines, the model card prints it, and `MultiLevelPPLRewardFunction(**settings)` makes one.
Imports nothing that takes time.
"""

import difflib
import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import regex

from .errors import InputError, one_of, without_retired


class Level(NamedTuple):
    """color: in plots; they are told apart by people who see red and green alike, and in grey. behind: for a level of
    what stands before a text, the prompts that its view has, of `mlppl.scoring.contexts.Contexts` and the text's own.
    enough: how far below 0 the level is paid for, in nats a token; None: all the way. called: what the nested level's
    number is called; None: helped by its name."""

    color: str
    behind: Callable[[Any, Any], list] | None = None
    enough: float | None = None
    called: str | None = None


# Outward. A nested level is the difference of its view to the one before it (`mlppl.scoring.levels`).
TABLE = {
    "word": Level("#0072b2", called="words in their phrase"),
    "phrase": Level("#e69f00", called="helped by phrases"),
    "sentence": Level("#444444", called="helped by sentences"),  # and by what else its view adds
    # Of true continuations the median is 0.56. What has more says the prompt again, or is written at a low temperature.
    "prompt": Level("#009e73", lambda contexts, own: [own], enough=0.5, called="helped by its own prompt"),
    "examples": Level("#cc79a7", lambda contexts, own: [contexts.behind_examples(own)]),
}
ALL_LEVELS = tuple(TABLE)
OUTER = tuple(name for name, level in TABLE.items() if level.behind)
COLORS = {name: level.color for name, level in TABLE.items()}
LEVELS = tuple(name for name in TABLE if name not in OUTER)  # measured if nothing else is asked for

AGGREGATIONS = ("geometric", "nested")
TARGETS = ("completion", "reference")
FORMS = ("thresholds", "nats")  # of the reward
MISSING = ("error", "skip")  # what to do with a row without a baseline
DTYPES = ("auto", "float32", "bfloat16", "float16")

DEFAULT_PHRASE_WORDS = 4
DEFAULT_LANGUAGE = "en"
DEFAULT_AGGREGATION = "geometric"
DEFAULT_TEMPLATE = "{prompt}{completion}{reference}"
DEFAULT_PROMPT_TEMPLATE = "{prompt}"
# By aggregation, of word, phrase and sentence. Nested levels are alike: a weight above another one pays for words that
# surprise by themselves (studies/README.md).
DEFAULT_WEIGHTS = {"geometric": (0.2, 0.3, 0.5), "nested": (1.0, 1.0, 1.0)}
# (improvement in %, reward), as the guide that this project began with has them. Those of VR-CLI (Gurung & Lapata,
# https://arxiv.org/abs/2503.22828) are (0.05, 0.5), (1, 0.9), (2, 1).
DEFAULT_THRESHOLDS = ((0.05, 0.2), (0.5, 0.5), (1.0, 0.7), (2.0, 0.9), (3.0, 1.0))
LOOP_PENALTY = 20.0  # the loop guard's weight, in what the perplexity reward can differ by
# form="nats" is the log-likelihood ratio up to this, a perplexity that is 39 % lower or 65 % higher; beyond, it bends
# and stays within twice that, so that a group of which all are there still has a spread.
NATS_KNEE = 0.5
DEFAULT_EXAMPLES, DEFAULT_CONTRAST = 3, 2  # rows, where a level needs them
# How much is earned at most by harming other rows' references, in nats a token. At 0 a text in the right
# manner that says nothing still beats one that says something and harms others a little (studies/README.md).
MOST_HARM = 0.2

# Of sampling, for baselines as in training
DEFAULT_MAX_NEW_TOKENS = 128
DEFAULT_TEMPERATURE = 1.0
DEFAULT_SEED = 42


def _setting(where: str, default, help: str, also: str = "", **of_flag) -> Any:
    """A field: which scripts have its flag (`mlppl.cli`), its default, the flag's help, another name of flag and YAML,
    and what else `add_argument` takes."""
    return field(default=default, metadata={"where": where, "help": help, "also": also, "of_flag": of_flag})


@dataclass(frozen=True)
class RewardConfig:
    """What a reward measures, and what it pays. Raises `InputError` for what makes no sense, alone or beside others.

    >>> RewardConfig(form="nats", aggregation="nested").weights
    (1.0, 1.0, 1.0)
    >>> RewardConfig(reward_thresholds=["3:1", (1, 0.5)]).reward_thresholds
    ((1.0, 0.5), (3.0, 1.0))
    """

    target: str = _setting("both", "completion", "whose perplexity", choices=TARGETS)
    aggregation: str = _setting(
        "definitions", DEFAULT_AGGREGATION,
        "geometric: the mean over a level's units; nested: each level is given something else",
        choices=AGGREGATIONS,
    )  # fmt: skip
    levels: Sequence[str] = _setting(
        "definitions", LEVELS,
        "levels that count (default: word phrase sentence); with --aggregation nested also prompt, what a "
        "completion's own prompt adds to other rows', and examples, what --examples add", nargs="+", metavar="LEVEL",
    )  # fmt: skip
    max_phrase_words: int = _setting("definitions", DEFAULT_PHRASE_WORDS, "most words of a phrase")
    language: str = _setting("definitions", DEFAULT_LANGUAGE, "ISO 639 code for splitting sentences")
    template: str = _setting(
        "both", DEFAULT_TEMPLATE,
        "with --target reference, how prompt and completion are put together before it; a baseline "
        "has an empty completion", metavar="TEXT",
    )  # fmt: skip
    extract: str | None = _setting(
        "training", None,
        "with --target reference, the part of a completion that counts: the first group or the match, such as "
        "'.*In summary[:,]\\s*(.*?)\\s*$' (default, and without a match: all of it)", metavar="REGEX",
    )  # fmt: skip
    form: str = _setting(
        "training", "thresholds",
        "nats: the log-likelihood ratio to the baseline, dense, instead of thresholds", "reward_form",
        choices=FORMS,
    )  # fmt: skip
    weights: Sequence[float] | None = _setting(
        "training", None, "one for each of --levels (default: 0.2 0.3 0.5; with --aggregation nested all alike)",
        "ppl_weights", type=float, nargs="+", metavar="W",
    )  # fmt: skip
    reward_thresholds: Sequence | None = _setting(
        "training", None, "from improvement to reward (default: 0.05:0.2 0.5:0.5 1:0.7 2:0.9 3:1)", nargs="+",
        metavar="PERCENT:REWARD",
    )  # fmt: skip
    contrast: int = _setting("definitions",
        0, "other rows to compare with: with --target reference, what a completion does for their references is taken "
        "off; level prompt compares with their prompts (default there: 2)", metavar="M",
    )  # fmt: skip
    score_without_chat: bool = _setting(
        "prompts", False, "the scorer reads the prompt as text, though the policy is asked through its chat template",
        action="store_true",
    )  # fmt: skip
    missing: str = _setting("training", "error", "rows without a baseline", choices=MISSING)
    allow_baseline_mismatch: bool = _setting("training", False, "use baselines made otherwise", action="store_true")
    normalize: bool = field(default=False)  # without a flag: GRPO normalises within each group

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if choices := one.metadata.get("of_flag", {}).get("choices"):
                one_of(one.name, value, choices)
            elif isinstance(one.default, bool) and not isinstance(value, bool):
                raise InputError(f"{one.name} is {value!r}, expected true or false")
        _set(self, "max_phrase_words", checked_count("max_phrase_words", self.max_phrase_words))
        _set(self, "language", checked_language(self.language))
        _set(self, "levels", self._checked_levels())
        usual = dict(zip(ALL_LEVELS, DEFAULT_WEIGHTS[self.aggregation], strict=False))
        weights = [usual.get(level, 1.0) for level in self.levels] if self.weights is None else self.weights
        _set(self, "weights", checked_weights(weights, self.levels))
        least = 1 if "prompt" in self.levels else 0
        contrast = DEFAULT_CONTRAST if self.contrast == 0 and least else self.contrast
        _set(self, "contrast", checked_count("contrast", contrast, least))
        if self.contrast and self.target == "completion" and "prompt" not in self.levels:
            raise InputError("contrast compares completions by their level prompt: expected it among the levels, or 0")
        if self.form == "thresholds":
            thresholds = DEFAULT_THRESHOLDS if self.reward_thresholds is None else self.reward_thresholds
            _set(self, "reward_thresholds", checked_thresholds(thresholds))
        elif self.reward_thresholds is not None:
            raise InputError("form is 'nats', which has no thresholds: leave out reward_thresholds")
        self.reference_context  # noqa: B018  raises

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str = "", others: Iterable[str] = ()) -> "RewardConfig":
        """Of names and values as flags and files have them, where None stands for the default; what is retired and asks
        for nothing is left out. where: what a message begins with. others: names that may have been meant."""
        try:
            known, settings = [one.name for one in fields(cls)], without_retired(settings)
            for name in settings:
                if name not in known:
                    raise InputError(f"unknown setting {name!r}{did_you_mean(name, [*known, *others])}")
            return cls(**{name: value for name, value in settings.items() if value is not None})
        except InputError as error:
            raise InputError(f"{where}{error}") from error

    def _checked_levels(self) -> tuple[str, ...]:
        if isinstance(self.levels, str) or not self.levels:
            raise InputError(f"levels is {self.levels!r}, expected a list of {', '.join(ALL_LEVELS)}")
        for level in self.levels:
            one_of("levels", level, ALL_LEVELS)
        if outer := [level for level in self.levels if level in OUTER]:
            if self.aggregation != "nested":
                raise InputError(f"level {outer[0]} is what stands before adds: it needs aggregation 'nested'")
            if self.target == "reference":
                raise InputError(
                    f"level {outer[0]} is of completions: with target 'reference' use contrast or examples"
                )
        if len(set(self.levels)) < len(self.levels):
            raise InputError(f"levels are {' '.join(self.levels)}, expected each once")
        return tuple(level for level in ALL_LEVELS if level in self.levels)

    def nested_names(self, before: Sequence[str], examples: bool = False) -> dict[str, str]:
        """What the number of each nested level is called, which is shown in nats a token; {} if they are not nested.

        before: what stands before a text, such as the prompt. examples: whether examples stand before that.

        >>> RewardConfig(aggregation="nested").nested_names(["prompt"])["sentence"]
        'helped by sentences and prompt'
        """
        if self.aggregation != "nested":
            return {}
        names = {level: TABLE[level].called or f"helped by {level}" for level in self.levels}
        if "sentence" in names:  # its view adds all that none further out does
            others = ["other prompts"] if "prompt" in names else list(before)
            others += ["examples"] * (examples and "examples" not in names)
            names["sentence"] = " and ".join([", ".join([names["sentence"], *others[:-1]]), *others[-1:]])
        return names

    @property
    def before(self) -> list[str]:
        """What stands before the text that a reward scores, but for examples."""
        if self.target == "completion":
            return ["prompt"]
        return [*(["prompt"] if self.reference_context.reads_prompt else []), "completion"]

    @property
    def definitions(self) -> dict:
        """What two numbers must share to be compared, target and examples apart."""
        names = ["max_phrase_words", "language", "aggregation", *(["template"] if self.target == "reference" else [])]
        # What files made before these settings do not say is that they are off.
        names += ["levels"] * (self.levels != LEVELS) + ["contrast"] * ("prompt" in self.levels)
        names += ["score_without_chat"] * self.score_without_chat
        return {name: getattr(self, name) for name in names}

    @property
    def baseline_columns(self) -> list[str]:
        """The columns of a data set that carries its baselines."""
        return [f"baseline_{level}" for level in self.levels]

    @property
    def reference_context(self) -> "ReferenceContext":
        return ReferenceContext(self.extract, self.template, self.target)

    @property
    def highest(self) -> float:
        """The most that a completion can earn, before `normalize`."""
        return 2 * NATS_KNEE if self.form == "nats" else max(0.0, *(reward for _, reward in self.reward_thresholds))

    @property
    def lowest(self) -> float:
        """The least that a completion can earn: what a blank one gets."""
        return -2 * NATS_KNEE if self.form == "nats" else min(0.0, *(reward for _, reward in self.reward_thresholds))

    @property
    def most(self) -> float:
        """The most that a completion can earn or lose."""
        return max(self.highest, -self.lowest)

    @property
    def vetoed(self) -> float:
        """What a vetoed completion gets at each level: a tenth of the range less than the lowest. Not further below,
        since an outlier widens its group's standard deviation, by which the others are divided."""
        return self.lowest - 0.1 * (self.highest - self.lowest)


def _set(config: RewardConfig, name: str, value) -> None:
    object.__setattr__(config, name, value)


ALIASES = {one.metadata["also"]: one.name for one in fields(RewardConfig) if one.metadata.get("also")}


def did_you_mean(name: object, known: Sequence[str]) -> str:
    """What a message says of a name that is none, from the comma on."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {near[0]}?" if near else f", expected one of {', '.join(known)}"


def checked_count(name: str, value, least: int = 1) -> int:
    """A whole number of at least `least`, from a flag as a string. Raises `InputError`."""
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal() or not least <= int(text) <= 10**9:
        raise InputError(f"{name} is {value!r}, expected a whole number of at least {least}, at most 1,000,000,000")
    return int(text)


def checked_weights(weights: Sequence[float], levels: Sequence[str]) -> tuple[float, ...]:
    """One for each level. Raises `InputError` unless finite, not negative and not all 0."""
    try:
        values = tuple(map(float, weights))
    except (TypeError, ValueError):
        values = ()
    if len(values) != len(levels) or not all(0 <= one < math.inf for one in values) or not sum(values):
        shown = weights if isinstance(weights, str) or not isinstance(weights, Sequence) else tuple(weights)
        raise InputError(f"weights are {shown}, expected ({', '.join(levels)}), none negative, not all 0")
    return values


def checked_thresholds(points: Sequence) -> tuple[tuple[float, float], ...]:
    """(improvement in %, reward), ascending, from such pairs or from words like "0.5:0.7", in any order.

    Raises `InputError` if one is not finite or stands twice, and without one.
    """
    if isinstance(points, str) or not isinstance(points, Sequence):
        raise InputError(f"reward_thresholds is {points!r}, expected a list of (improvement %, reward)")
    made: list[tuple[float, float]] = []
    for point in points:
        try:
            improvement, reward = map(float, point.split(":") if isinstance(point, str) else point)
        except (TypeError, ValueError) as error:
            raise InputError(f"reward_thresholds holds {point!r}, expected PERCENT:REWARD such as 0.5:0.7") from error
        if not (math.isfinite(improvement) and math.isfinite(reward)):
            raise InputError(f"reward_thresholds holds {(improvement, reward)}, expected finite numbers")
        if improvement in dict(made):
            raise InputError(f"reward_thresholds holds {improvement:g} % twice, expected each improvement once")
        made.append((improvement, reward))
    if not made:
        raise InputError("reward_thresholds is empty, expected at least one (improvement %, reward)")
    return tuple(sorted(made))


def checked_language(code: str) -> str:
    """The ISO 639 code of a language, its region cut off: `de` of `de-DE` and `DE`. Raises `InputError` for what is
    none. Of a language that sentencex has no rules for it takes those of another one.
    """
    from langcodes import Language, LanguageTagError  # here, since --help imports this file
    from langcodes.registry_parser import parse_registry

    short = code.strip().lower().replace("_", "-").partition("-")[0]
    try:
        if Language.get(short, normalize=False).is_valid():
            return short
        short = Language.get(short).language  # de of deu
    except LanguageTagError:
        pass
    registered = [one for one in parse_registry() if one["Type"] == "language" and len(one["Subtag"]) == 2]
    names = {one["Subtag"]: one["Description"][0] for one in registered if "Deprecated" not in one}
    by_name = {name.lower(): subtag for subtag, name in names.items()}
    [near] = difflib.get_close_matches(short, [*by_name, *names], n=1, cutoff=0.5) or ["english"]
    near = by_name.get(near, near)
    raise InputError(
        f"language is {code!r}, expected an ISO 639 code such as de or pt-BR: did you mean {near!r} ({names[near]})?"
    )


def format_fields(name: str, template: str) -> list[str]:
    """What stands in the braces of a format string. Raises `InputError`, with the setting's name, for one that is none.

    >>> format_fields("template", "{prompt}: {reference!r}")
    ['prompt', 'referencer']
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{name} is {template!r}: {error}; a brace that is text is written twice") from error
    return [field + (conversion or "") + (form or "") for _, field, form, conversion in parts if field is not None]


SECONDS = 2.0  # for one completion; a pattern that backtracks for longer would hold up the training


class ReferenceContext:
    """Context of a reference: its prompt and a completion, put together.

    extract: a regular expression (`.` also matches line breaks); of a completion only the first match's first group
        counts, or the match if it has none. A completion without a match counts whole, as in VR-CLI
        (https://arxiv.org/abs/2503.22828), where it is what follows the last "In summary:" or "In summary,", stripped:
        that is the expression of the example.
    template: a format string with {prompt}, {completion} and {reference} once each and in this order, {reference} last;
        what stands between is context. For models that need turns marked. Without {prompt} the scorer reads only what
        was written: a summary before the document that it is of.
    target: what the reward measures; both belong to "reference" alone.

    Raises `InputError` for an expression or a template that is none, or with another target.

    >>> template = "{prompt}\\nPlan: {completion}\\nChapter: {reference}"
    >>> joined = ReferenceContext(extract=r".*In summary[:,]\\s*(.*?)\\s*$", template=template)
    >>> joined.context("A fox.", joined.extracted("In summary: what? Let me think. In summary, it runs.")[0])
    'A fox.\\nPlan: it runs.\\nChapter: '
    """

    def __init__(self, extract: str | None = None, template: str = DEFAULT_TEMPLATE, target: str = "reference") -> None:
        if target != "reference" and (extract or template != DEFAULT_TEMPLATE):
            raise InputError(
                "--extract and --template say what stands before a reference: they need --target reference (in Python "
                "they need target='reference')"
            )
        try:
            self._pattern = regex.compile(extract, regex.DOTALL) if extract else None
        except regex.error as error:
            raise InputError(f"extract is {extract!r}, expected a regular expression: {error}") from error
        self.extracts = self._pattern is not None
        self.template, fields = template, format_fields("template", template)
        self.reads_prompt = fields[:1] == ["prompt"]
        if fields[self.reads_prompt :] != ["completion", "reference"] or not template.endswith("{reference}"):
            raise InputError(
                f"template is {template!r}, expected {{prompt}} (or without it), {{completion}} and {{reference}} once "
                "each, in this order, and nothing behind {reference}"
            )
        self._context = template.removesuffix("{reference}")

    def extracted(self, completion: str) -> tuple[str, bool]:
        """(the part of a completion that counts, whether there was one). Raises `InputError` if it takes too long."""
        if self._pattern is None:
            return completion, True
        try:
            match = self._pattern.search(completion, timeout=SECONDS)
        except TimeoutError as error:
            raise InputError(
                f"extract {self._pattern.pattern!r} takes more than {SECONDS:g} s for one completion: write it so that "
                "it does not try the same text in many ways"
            ) from error
        if match is None:
            return completion, False
        return match.group(1 if self._pattern.groups else 0) or "", True

    def context(self, prompt: str, completion: str = "") -> str:
        """What the reference's perplexity is conditioned on."""
        return self._context.format(prompt=prompt, completion=completion)


# --- how completions are sampled: for training, held-out prompts, and baselines of own writing ------------------------


def _is_whole(value, least: int) -> bool:
    return type(value) is int and value >= least


def _is_ids(value) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(_is_whole(token, 0) for token in value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "a number above 0 and below 1": lambda value: type(value) is float and 0 < value < 1,
    "a whole number of at least 1": lambda value: _is_whole(value, 1),
    "a list of token ids": _is_ids,
    "a list of lists of token ids": lambda value: isinstance(value, list) and value != [] and all(map(_is_ids, value)),
}
_SHARE, _WHOLE, _IDS, _SEQUENCES = _KINDS
# What `generation_kwargs` may hold: what changes the probability of the next token. The rest of transformers'
# GenerationConfig has a flag of its own, samples something else than one completion a row (beams, several sequences,
# another return value), or ends a completion in a way that the reward does not know.
GENERATION_KWARGS = {
    **dict.fromkeys(("typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"), _SHARE),
    **dict.fromkeys(("no_repeat_ngram_size", "min_new_tokens"), _WHOLE),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _IDS),
    "bad_words_ids": _SEQUENCES,
}


@dataclass(frozen=True)
class Sampling:
    """max_new_tokens: of the longest completion. The others are those of TRL's GRPOConfig, which are off as they stand
    here. Raises `InputError` for a value that makes no sense.

    Only at temperature 1 and with all others off is what is sampled drawn from the model's own distribution, so that
    minus its log-probability is the surprisal that is scored.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = DEFAULT_TEMPERATURE
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: Mapping | None = None

    def __post_init__(self) -> None:
        for name, most in (("top_p", 1), ("min_p", 1), ("top_k", math.inf)):
            value = getattr(self, name)
            if value is not None and not (0 <= value <= most and math.isfinite(value)):
                span = "of at least 0" if most == math.inf else f"from 0 to {most}"
                raise InputError(f"--{name} is {value}, expected a number {span}")
        for name in ("max_new_tokens", "temperature", "repetition_penalty"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name} is {getattr(self, name)}, expected a number above 0")
        for name, value in (self.generation_kwargs or {}).items():
            if name in self.__dataclass_fields__:
                raise InputError(f"--generation_kwargs holds {name!r}: use the flag --{name}")
            if name not in GENERATION_KWARGS:
                near = difflib.get_close_matches(name, GENERATION_KWARGS, n=3)
                hint = f", did you mean {' or '.join(near)}?" if near else ""
                raise InputError(
                    f"--generation_kwargs holds {name!r}{hint}: expected what changes the probability of the next "
                    f"token: {', '.join(GENERATION_KWARGS)}"
                )
            if not _KINDS[GENERATION_KWARGS[name]](value):
                raise InputError(
                    f"--generation_kwargs holds {name!r}: {value!r:.60}, expected {GENERATION_KWARGS[name]}"
                )
        least = (self.generation_kwargs or {}).get("min_new_tokens", 0)
        if least > self.max_new_tokens:
            raise InputError(
                f"--generation_kwargs holds 'min_new_tokens': {least}, expected at most --max_new_tokens, which is "
                f"{self.max_new_tokens}"
            )

    def differences(self, made: Mapping[str, Any]) -> dict[str, tuple]:
        """By name, how `made` and this differ. made: `asdict` of another one; what it does not name is off."""
        theirs, mine = {**asdict(Sampling()), **made}, asdict(self)
        return {name: (theirs[name], mine[name]) for name in mine if theirs[name] != mine[name]}
