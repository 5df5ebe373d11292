"""Flags of the training script -> how the model is loaded, the reward's settings, TRL's GRPOConfig."""

import argparse
import ast
import dataclasses
import difflib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import cli
from .errors import InputError
from .thresholds import DEFAULT_THRESHOLDS, Thresholds, checked_weights


def reward_settings(args: argparse.Namespace) -> dict:
    """The keywords of `MultiLevelPPLRewardFunction` that the flags set, checked."""
    thresholds = args.reward_thresholds or DEFAULT_THRESHOLDS
    Thresholds(thresholds)
    checked_weights(args.ppl_weights)
    return {
        "weights": tuple(args.ppl_weights),
        "reward_thresholds": thresholds,
        "normalize": args.normalize_rewards,
        "target": args.target,
        "interpolate": args.interpolate,
        "missing": args.missing,
        "allow_baseline_mismatch": args.allow_baseline_mismatch,
        **cli.definitions(args),
    }


def loading(args: argparse.Namespace, meta: Mapping) -> dict:
    """4-bit unless asked otherwise or the baselines were made without: the scorer must be what they were made by."""
    made_by = meta.get("model", {})
    in_4bit = args.load_in_4bit
    if in_4bit is None:
        in_4bit = made_by.get("quantization", "4bit") == "4bit"
    dtype = made_by.get("dtype", "auto") if args.dtype == "auto" else args.dtype
    return {"load_in_4bit": in_4bit, "dtype": dtype}


def check_flags(rest: Iterable[str], ours: Iterable[str]) -> None:
    """Refuse a flag that is neither one of `ours` nor a field of GRPOConfig, with the nearest name there is.

    rest: the words of the command line that are not ours. Reads TRL's source instead of importing it, which takes
    seconds. Raises `InputError`.
    """
    names = grpo_fields()
    for flag in rest:
        name = flag.removeprefix("--").partition("=")[0]
        known = name in names or name.removeprefix("no_") in names or name.startswith("unsloth_")  # Unsloth adds some
        if flag.startswith("--") and not known:
            near = difflib.get_close_matches(name, [*names, *ours], n=1)
            raise InputError(f"unknown flag {flag}" + (f", did you mean --{near[0]}?" if near else ": see --help"))


def grpo_fields() -> set[str]:
    """The names of GRPOConfig's fields, its parents' too, as the installed TRL and transformers have them."""
    names = set()
    for package, *parts in (("trl", "trainer", "grpo_config.py"), ("trl", "trainer", "base_config.py"),
                            ("transformers", "training_args.py")):  # fmt: skip
        folder = importlib.util.find_spec(package).submodule_search_locations[0]
        tree = ast.parse(Path(folder, *parts).read_text(encoding="utf-8"))
        for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            names |= {line.target.id for line in node.body if isinstance(line, ast.AnnAssign)}
    return names


def grpo_config(args: argparse.Namespace, rest: list[str], plan):
    """TRL's GRPOConfig from our flags and `rest`, by TRL's own parser. Raises `InputError` for what TRL refuses."""
    import torch
    from trl import GRPOConfig, TrlParser

    names = {field.name for field in dataclasses.fields(GRPOConfig)}
    cuda = torch.cuda.is_available()
    parser = TrlParser([GRPOConfig])
    parser.set_defaults(
        **({name: value for name, value in vars(args).items() if name in names - {"debug"}} | plan._asdict()),
        max_completion_length=args.max_new_tokens,
        report_to="wandb" if args.wandb_project else "none",
        bf16=cuda and torch.cuda.is_bf16_supported(),
        fp16=cuda and not torch.cuda.is_bf16_supported(),
    )
    if args.wandb_project:
        os.environ["WANDB_PROJECT"] = args.wandb_project
    try:
        (config,) = parser.parse_args_and_config(rest)
    except ValueError as error:
        raise InputError(str(error)) from error
    return config
