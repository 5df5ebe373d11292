"""Where two identities differ. Imports nothing that takes time, nor what Unsloth has to be imported before."""

import math
from collections.abc import Mapping

from ..config import LEVELS

BEHIND_AN_ADDRESS = "behind an address"  # in place of a hash of weights that are not here
# How far a token of the fixed text may be off, in the mean. In bfloat16 two ways to compute attention differ by 0.04
# (SmolLM2-135M); a server's kernels depend on what it batches. In float32 another device differs by 0.0001.
PROBE_NATS, FLOAT32_NATS = 0.1, 0.01


def differences(made: Mapping, expected: Mapping) -> dict[str, tuple]:
    """Where two identities differ, by name, each with both values.

    Compares what both name. The model's name is not compared, and another window only matters if a text was longer:
    `made["longest"]` tokens, if that is known.
    """
    if "definitions" in made:  # version 0.2.0 knew no rows to show
        made = {"shown": {}, **made}
    theirs, mine = _flat(made), _flat(expected)
    differing: dict[str, tuple] = {
        key: (theirs[key], mine[key]) for key in mine if key in theirs and theirs[key] != mine[key]
    }
    if "probe" in differing:
        before, after = differing["probe"]
        exact = (mine.get("dtype"), mine.get("quantization")) == ("float32", "none")
        # As far as both go: a model with a small window reads less of the text. Two infinities are equal.
        apart = [0.0 if x == y else abs(x - y) for x, y in zip(before, after, strict=False)]
        if apart and math.fsum(apart) <= (FLOAT32_NATS if exact else PROBE_NATS) * len(apart):
            del differing["probe"]
        else:
            differing["probe"] = tuple(f"{sum(one) / max(1, len(one)):.4f} nats a token" for one in (before, after))
    sizes = [side["window"] for side in (made, expected) if "window" in side]
    if len(set(sizes)) == 2 and made.get("longest", math.inf) > min(filter(None, sizes)):
        differing["window"] = tuple(f"{size} tokens" if size else "without limit" for size in sizes)
    return differing


def _flat(identity: Mapping) -> dict:
    """What is compared, by the name a message gives it."""
    # All of a reference's tokens count; with version 0.1 it could be fewer.
    usual: dict = {"reference_tokens": "all"} if "template" in identity.get("definitions", {}) else {}
    if "definitions" in identity:  # what it does not say is off
        usual |= {"levels": LEVELS, "contrast": 0, "score_without_chat": False}
    if "shown" in identity:
        usual |= {"examples": None, "others": None}
    model = dict(identity.get("model", {}))
    return {
        **{key: identity[key] for key in ("target", "tokenizer") if key in identity},
        **usual,
        **{name: tuple(one) if isinstance(one, list) else one for name, one in identity.get("definitions", {}).items()},
        **identity.get("shown", {}),
        **identity.get("prompt", {}),
        **model.pop("config", {}),
        **{key: value for key, value in model.items() if key != "name"},
    }
