"""Errors that the user can fix, and what is retired."""

from collections.abc import Mapping, Sequence

# What is gone since version 0.2, refused by name for one version, and what to use instead.

_SINCE = "retired in 0.2"
# setting: (the value with which it asked for nothing, what to use instead). A file of before that has it so is read.
SETTINGS = {
    "openings": ("false", "leave it out, a unit alone stands behind BOS"),
    "normalize_rewards": ("false", "leave it out, GRPO normalises within each group (in Python: normalize=True)"),
    "interpolate": ("false", "use the reward form nats, which is dense"),
    "reference_tokens": ("all", "leave it out, all tokens of a reference count: fewer did not make plans say more"),
}
# (setting, end of its value): what to use instead
_VALUES = {
    ("aggregation", "selective"): "use nested (or geometric)",
    ("aggregation", "arithmetic"): "use nested (or geometric)",
    ("baselines", ".parquet"): "use .pkl or .json, or a data set that carries its baselines (--output_dataset)",
}


def retired(name: str, value) -> str | None:
    """What to say of a setting, or of its value, if it asks for what is gone; else None."""
    if name in SETTINGS:
        usual, instead = SETTINGS[name]
        return None if value is None or str(value).lower() == usual else f"{_SINCE}: {instead}"
    gone = (instead for (setting, end), instead in _VALUES.items() if name == setting and str(value).endswith(end))
    return next((f"{_SINCE}: {instead}" for instead in gone), None)


class InputError(ValueError):
    """Says which value is wrong, what was expected, and the remedy, in one line. Scripts exit with code 2 on it."""


class BaselineError(InputError):
    """A baselines file that cannot be used as it is; the message says what to do."""


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """`value`, or `InputError` if it is none of `choices`."""
    if value not in choices:
        gone = retired(name, value)
        raise InputError(f"{name} is {value!r}" + (f": {gone}" if gone else f", expected one of {', '.join(choices)}"))
    return value


def without_retired(settings: Mapping) -> dict:
    """The settings but those that are gone and ask for nothing. Raises `InputError` for what is gone: see `retired`."""
    for name, value in settings.items():
        if gone := retired(name, value):
            raise InputError(f"{name} is {value!r}: {gone}")
    return {name: value for name, value in settings.items() if name not in SETTINGS}
