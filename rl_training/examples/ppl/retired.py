"""What is gone since version 0.2, refused by name for one version, and what to use instead. Imports nothing."""

_SINCE = "retired in 0.2"
# setting: (the value with which it asked for nothing, what to use instead). A file of before that has it so is read.
SETTINGS = {
    "openings": ("false", "leave it out, a unit alone stands behind BOS"),
    "normalize_rewards": ("false", "leave it out, GRPO normalises within each group (in Python: normalize=True)"),
    "interpolate": ("false", "use the reward form nats, which is dense"),
    "reference_tokens": ("all", "leave it out, all tokens of a reference count: fewer did not make plans say more"),
}
# (setting, value): what to use instead
_VALUES = {
    ("aggregation", "selective"): "use nested (or geometric)",
    ("aggregation", "arithmetic"): "use nested (or geometric)",
}


def retired(name: str, value) -> str | None:
    """What to say of a setting, or of its value, if it asks for what is gone; else None."""
    usual, instead = SETTINGS.get(name, (None, _VALUES.get((name, str(value)))))
    asks = instead is not None and value is not None and str(value).lower() != usual
    return f"{_SINCE}: {instead}" if asks else None
