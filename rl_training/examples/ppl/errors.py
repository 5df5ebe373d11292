"""What is the user's to mend."""

from collections.abc import Mapping, Sequence

from .retired import SETTINGS, retired


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
