"""What two numbers must share to be compared: what the baselines file keeps, and the reward asks of it."""

import math
from collections.abc import Mapping, Sequence

from .models import tokenizer_fingerprint

BEHIND_AN_ADDRESS = "behind an address"  # in place of a hash of weights that are not here
# How far a token of the fixed text may be off, in the mean. In bfloat16 two ways to compute attention differ by 0.04
# (SmolLM2-135M); a server's kernels depend on what it batches. In float32 another device differs by 0.0001.
PROBE_NATS, FLOAT32_NATS = 0.1, 0.01


def identity(
    scorer,
    tokenizer,
    *,
    name: str,
    target: str,
    definitions: Mapping,
    template: str,
    prompt: Mapping,
) -> dict:
    """What perplexities were computed with: the same keys in a baselines file's meta and in a reward.

    scorer: a `ppl.scoring.scorer.Scorer`. name: its model's, which is told but not compared; a server names its own.
    definitions: the calculator's. template: how a reference stands behind its prompt; only of that target.
    prompt: how prompts are made of a data set's texts, and how chat messages become text, as far as it is known.
    """
    return {
        "target": target,
        "definitions": of_target(definitions, target, template),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "model": {"name": name, **scorer.identity},
        "window": scorer.window,
        "prompt": dict(prompt),
    }


def of_target(definitions: Mapping, target: str, template: str) -> dict:
    """The definitions that a baseline must share: for references also how they stand behind their prompt."""
    return {**definitions, **({"template": template} if target == "reference" else {})}


def differences(made: Mapping, expected: Mapping) -> dict[str, tuple]:
    """Where two identities differ, by name, each with both values.

    Compares what both name. The model's name is not compared, and another window only matters if a text was longer:
    `made["longest"]` tokens, if that is known.
    """
    theirs, mine = _flat(made), _flat(expected)
    differing = {key: (theirs[key], mine[key]) for key in mine if key in theirs and theirs[key] != mine[key]}
    if "probe" in differing:
        probes = differing.pop("probe")
        exact = (mine.get("dtype"), mine.get("quantization")) == ("float32", "none")
        if not _is_same_text(*probes, FLOAT32_NATS if exact else PROBE_NATS):
            before, after = (f"{sum(one) / max(1, len(one)):.4f} nats a token" for one in probes)
            differing["probe"] = before, after
    windows = [side["window"] for side in (made, expected) if "window" in side]
    if len(set(windows)) == 2 and made.get("longest", math.inf) > min(window for window in windows if window):
        made_with, now = (f"{window} tokens" if window else "without limit" for window in windows)
        differing["window"] = made_with, now
    return differing


def _is_same_text(a: Sequence[float], b: Sequence[float], nats: float) -> bool:
    """Whether two lists of surprisals, in nats, are of one text under the same model: as far as both go, since a model
    with a small window reads less of it."""
    both = list(zip(a, b, strict=False))
    apart = math.fsum(0.0 if x == y else abs(x - y) for x, y in both)  # two infinities are equal
    return bool(both) and apart <= nats * len(both)


def _flat(identity: Mapping) -> dict:
    """What is compared, by the name a message gives it."""
    # All of a reference's tokens count; with version 0.1 it could be fewer.
    usual = {"reference_tokens": "all"} if "template" in identity.get("definitions", {}) else {}
    model = dict(identity.get("model", {}))
    return {
        **{key: identity[key] for key in ("target", "tokenizer") if key in identity},
        **usual,
        **identity.get("definitions", {}),
        **identity.get("prompt", {}),
        **model.pop("config", {}),
        **{key: value for key, value in model.items() if key != "name"},
    }
