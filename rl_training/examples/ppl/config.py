"""Tables that many files need: what there is to choose from, and what is chosen where nobody says. Imports nothing."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import InputError

# --- definitions -----------------------------------------------------------------------------------------------------

LEVELS = ("word", "phrase", "sentence")
BASELINE_COLUMNS = tuple(f"baseline_{level}" for level in LEVELS)  # of a data set that carries its baselines

# Choices
AGGREGATIONS = ("geometric", "nested")
TARGETS = ("completion", "reference")
FORMS = ("thresholds", "nats")  # of the reward
MISSING = ("error", "skip")  # what to do with a row without a baseline
DTYPES = ("auto", "float32", "bfloat16", "float16")

# What two numbers must share, where nobody says otherwise
DEFAULT_PHRASE_WORDS = 4
DEFAULT_LANGUAGE = "en"
DEFAULT_AGGREGATION = "geometric"
DEFAULT_TARGET = "completion"
DEFAULT_TEMPLATE = "{prompt}{completion}{reference}"
DEFAULT_PROMPT_TEMPLATE = "{prompt}"

# From improvement to reward
# By aggregation, of word, phrase and sentence. Nested levels are alike: a weight above another one pays for words that
# surprise by themselves (studies/README.md).
DEFAULT_WEIGHTS = {name: (1.0, 1.0, 1.0) if name == "nested" else (0.2, 0.3, 0.5) for name in AGGREGATIONS}
# (improvement in %, reward), as the guide that this project began with has them. Those of VR-CLI (Gurung & Lapata,
# https://arxiv.org/abs/2503.22828) are (0.05, 0.5), (1, 0.9), (2, 1).
DEFAULT_THRESHOLDS = ((0.05, 0.2), (0.5, 0.5), (1.0, 0.7), (2.0, 0.9), (3.0, 1.0))

NATS_CLIP = 0.5  # how far form="nats" goes from 0: a perplexity that is 39 % lower or 65 % higher

# Of sampling, for baselines as in training
DEFAULT_MAX_NEW_TOKENS = 128
DEFAULT_TEMPERATURE = 1.0
DEFAULT_SEED = 42

# In plots. Distinguishable by people who see red and green alike, and in grey.
COLORS = {"word": "#0072b2", "phrase": "#e69f00", "sentence": "#444444"}


# --- sampling settings -----------------------------------------------------------------------------------------------

# How completions are sampled: one description for training, held-out prompts, and baselines of own writing.


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
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"--repetition_penalty is {self.repetition_penalty}, expected a number above 0")
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

    def differences(self, made: Mapping[str, Any]) -> dict[str, tuple]:
        """By name, how `made` and this differ. made: `asdict` of another one; what it does not name is off."""
        theirs, mine = {**asdict(Sampling()), **made}, asdict(self)
        return {name: (theirs[name], mine[name]) for name in mine if theirs[name] != mine[name]}
