"""What is gone since version 0.2, refused by name for one version, and what to use instead. Imports nothing."""

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
