"""What is gone since version 0.2, refused by name for one version, and what to use instead. Imports nothing."""

_SINCE = "retired in 0.2"
# (setting, value): what to use instead.
_VALUES = {
    ("aggregation", "selective"): "use nested (or geometric)",
    ("aggregation", "arithmetic"): "use nested (or geometric)",
}


def retired(name: str, value) -> str | None:
    """What to say of a value of a setting that is gone; None for one that is not."""
    instead = _VALUES.get((name, str(value)))
    return f"{_SINCE}: {instead}" if instead else None
