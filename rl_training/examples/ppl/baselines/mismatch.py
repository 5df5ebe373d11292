"""Whether a baselines file fits a scorer, and the command that makes the one that does."""

import json
import shlex
from collections.abc import Iterable, Mapping

from ..definitions import (
    DEFAULT_AGGREGATION,
    DEFAULT_LANGUAGE,
    DEFAULT_PHRASE_WORDS,
    DEFAULT_PROMPT_TEMPLATE,
    DEFAULT_TARGET,
    DEFAULT_TEMPLATE,
)
from ..errors import BaselineError
from ..identity import BEHIND_AN_ADDRESS, differences
from .file import Baselines


def check_meta(baselines: Baselines, expected: Mapping) -> None:
    """Refuse baselines made for another target, with other definitions, or by another model than the scorer.

    expected: "target", "definitions", "prompt", "tokenizer", "model" as `ppl.models.describe_model` gives it, and
    "window", the most tokens the scorer takes at once. Compares what both name: a dict without a meta file is taken at
    its word, a model's name is told but not compared, and another window only matters if a text was longer. Raises
    `BaselineError`.
    """
    differing = differences(baselines.meta, expected)
    if differing:
        made, scorer = (", ".join(f"{key} {both[side]}" for key, both in differing.items()) for side in (0, 1))
        raise BaselineError(
            f"{baselines.source} was made by {_named(baselines.meta)} with {made}; the scorer here, {_named(expected)}"
            f", has {scorer}: make the right one with `{_command(baselines, expected, differing)}`, or insist with "
            "--allow_baseline_mismatch (in Python allow_baseline_mismatch=True)"
        )


def _named(identity: Mapping) -> str:
    name = identity.get("model", {}).get("name")
    return repr(name) if name else "a model of unknown name"


def _command(baselines: Baselines, expected: Mapping, differing: Iterable[str]) -> str:
    """The call of compute_baselines_trl.py that makes the file as `expected` has it."""
    model = {**baselines.meta.get("model", {}), **expected.get("model", {})}
    made_from = baselines.meta.get("dataset", {})
    flags = {"model_name": model.get("name") or "MODEL"}
    if model.get("quantization") == "4bit":
        flags["load_in_4bit"] = None
    if model.get("weights") == BEHIND_AN_ADDRESS:
        flags["scorer_url"] = "URL"
    if "dtype" in differing:
        flags["dtype"] = model["dtype"]
    if "window" in differing and expected["window"]:
        flags["max_seq_length"] = expected["window"]
    prompt = {**baselines.meta.get("prompt", {}), **expected.get("prompt", {})}
    flags |= {name: prompt[name] for name in ("prompt_sentences", "system_prompt", "user_prompt") if prompt.get(name)}
    if prompt.get("chat"):
        flags["chat"] = None
    if prompt.get("chat_template_kwargs"):
        flags["chat_template_kwargs"] = json.dumps(prompt["chat_template_kwargs"])
    flags |= {f"dataset_{key}": made_from.get(key) for key in ("name", "config", "split") if made_from.get(key)}
    flags |= {f"{key}_column": name for key, name in dict(made_from.get("columns") or {}).items() if name}
    if made_from.get("num_samples"):
        flags["num_samples"] = made_from["num_samples"]
    if expected.get("target") != "reference":  # of the model's own writing, again
        generated = dict(baselines.meta.get("generated") or {})
        if generated.get("generation_kwargs"):
            generated["generation_kwargs"] = json.dumps(generated["generation_kwargs"])
        flags |= {name: value for name, value in generated.items() if value is not None}
    usual = {
        "target": DEFAULT_TARGET,
        "max_phrase_words": DEFAULT_PHRASE_WORDS,
        "language": DEFAULT_LANGUAGE,
        "aggregation": DEFAULT_AGGREGATION,
        "template": DEFAULT_TEMPLATE,
        "prompt_template": DEFAULT_PROMPT_TEMPLATE,
    }
    wanted = {"target": expected.get("target"), **expected.get("definitions", {}), **prompt}
    flags |= {key: wanted[key] for key in usual if wanted.get(key) not in (None, usual[key])}
    flags |= {"output_path": baselines.source, "overwrite": None}
    words = [word for key, value in flags.items() for word in (f"--{key}", value) if word is not None]
    return shlex.join(["python", "compute_baselines_trl.py", *map(str, words)])
