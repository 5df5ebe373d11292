"""Flags of the training script -> how the model is loaded, the reward's settings, TRL's GRPOConfig."""

import argparse
import os
from collections.abc import Mapping

from . import cli
from .errors import InputError
from .guard import check_weight
from .placement import DEFAULT_TEMPLATE, Placement
from .thresholds import DEFAULT_THRESHOLDS, Thresholds, checked_weights
from .train_flags import NAMESAKES


def reward_settings(args: argparse.Namespace) -> dict:
    """The keywords of `MultiLevelPPLRewardFunction` that the flags set, checked."""
    thresholds = args.reward_thresholds or DEFAULT_THRESHOLDS
    Thresholds(thresholds)
    checked_weights(args.ppl_weights)
    check_weight(args.repetition_penalty)
    Placement(args.extract, args.template)
    if args.target == "completion" and (args.extract or args.template != DEFAULT_TEMPLATE):
        raise InputError("--extract and --template say what stands before a reference: they need --target reference")
    return {
        "weights": tuple(args.ppl_weights),
        "reward_thresholds": thresholds,
        "normalize": args.normalize_rewards,
        "target": args.target,
        "extract": args.extract,
        "template": args.template,
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


def grpo_config(args: argparse.Namespace, rest: list[str], plan):
    """(TRL's GRPOConfig, its fields as they were asked for, its fields' defaults), by TRL's own parser.

    args: our flags, of which those that are fields of GRPOConfig are its values. rest: the other words of the command
    line. Raises `InputError` for what TRL refuses.
    """
    import torch
    from trl import GRPOConfig, TrlParser

    class Parser(TrlParser):
        def error(self, message: str):  # the usage of 189 flags would hide it
            raise InputError(f"{message}: see --help")

    parser = Parser([GRPOConfig], allow_abbrev=False)
    defaults = vars(parser.parse_args([]))
    cuda = torch.cuda.is_available()
    # Its repetition_penalty would divide the logits while sampling.
    shared = defaults.keys() - set(NAMESAKES)
    parser.set_defaults(
        **({name: value for name, value in vars(args).items() if name in shared} | plan._asdict()),
        max_completion_length=args.max_new_tokens,
        report_to="wandb" if args.wandb_project else "none",
        bf16=cuda and torch.cuda.is_bf16_supported(),
        fp16=cuda and not torch.cuda.is_bf16_supported(),
        use_cpu=not cuda,  # without it, several processes on a CPU do not find each other
        ddp_find_unused_parameters=False,  # every adapter is used in every pass
    )
    if args.wandb_project:
        os.environ["WANDB_PROJECT"] = args.wandb_project
    try:
        asked = vars(parser.parse_args(rest))
        (config,) = parser.parse_args_and_config(rest)
    # What GRPOConfig finds when it is made: values that do not go together, a file of DeepSpeed that is not there.
    except (ValueError, TypeError, OSError) as error:
        raise InputError(str(error)) from error
    return config, asked, defaults
