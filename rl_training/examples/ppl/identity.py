"""What two numbers must share to be compared: what the baselines file keeps, and the reward asks of it."""

import math
from collections.abc import Mapping

from .models import describe_model, tokenizer_fingerprint


def identity(
    model,
    tokenizer,
    *,
    name: str,
    window: int | None,
    target: str,
    definitions: Mapping,
    template: str,
    prompt: Mapping,
) -> dict:
    """What perplexities were computed with: the same keys in a baselines file's meta and in a reward.

    name: the model's, which is told but not compared. window: most tokens the scorer takes at once, None without a
    limit. definitions: the calculator's. template: how a reference stands behind its prompt; only of that target.
    prompt: how prompts are made of a data set's texts, and how chat messages become text, as far as it is known.
    """
    return {
        "target": target,
        "definitions": with_template(definitions, template, target),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "model": {**describe_model(model), "name": name},
        "window": window,
        "prompt": dict(prompt),
    }


def with_template(definitions: Mapping, template: str, target: str) -> dict:
    """The definitions that a baseline must share: for references also how they stand behind their prompt."""
    return {**definitions, **({"template": template} if target == "reference" else {})}


def differences(made: Mapping, expected: Mapping) -> dict[str, tuple]:
    """Where two identities differ, by name, each with both values.

    Compares what both name. The model's name is not compared, and another window only matters if a text was longer:
    `made["longest"]` tokens, if that is known.
    """
    theirs, mine = _flat(made), _flat(expected)
    differing = {key: (theirs[key], mine[key]) for key in mine if key in theirs and theirs[key] != mine[key]}
    windows = [side["window"] for side in (made, expected) if "window" in side]
    if len(set(windows)) == 2 and made.get("longest", math.inf) > min(window for window in windows if window):
        made_with, now = (f"{window} tokens" if window else "without limit" for window in windows)
        differing["window"] = made_with, now
    return differing


def _flat(identity: Mapping) -> dict:
    """What is compared, by the name a message gives it."""
    return {
        **{key: identity[key] for key in ("target", "tokenizer") if key in identity},
        **identity.get("definitions", {}),
        **identity.get("prompt", {}),
        **{key: value for key, value in identity.get("model", {}).items() if key != "name"},
    }
