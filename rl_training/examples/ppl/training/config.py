"""Flags of the training script -> how the model is loaded, the reward's settings, TRL's GRPOConfig."""

import argparse
import importlib.util
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from .. import cli
from ..definitions import DEFAULT_THRESHOLDS
from ..errors import InputError
from ..models import model_path
from ..reference_context import ReferenceContext
from ..reward.loop_guard import check_weight
from .flags import NAMESAKES
from .trl_settings import REFUSALS, check_evaluation, check_settings, counts_refused

# (field of GRPOConfig, least, most): beyond these TRL trains nothing, or fails once a model is loaded.
_BOUNDS = (
    *((name, 1, math.inf) for name in ("num_iterations", "steps_per_generation", "generation_batch_size")),
    *((name, 1, math.inf) for name in ("num_generations_eval", "per_device_eval_batch_size", "pad_to_multiple_of")),
    *((name, 0, math.inf) for name in ("learning_rate", "beta", "epsilon", "epsilon_high", "delta", "max_grad_norm")),
    *((name, 0, math.inf) for name in ("weight_decay", "warmup_steps", "dataloader_num_workers")),
)
_ABOVE_0 = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps")

REPORTERS = ("none", "wandb", "tensorboard", "trackio")


def reward_settings(args: argparse.Namespace) -> dict:
    """The keywords of `MultiLevelPPLRewardFunction` that the flags set, checked."""
    from ..reward.thresholds import Thresholds, checked_weights

    thresholds = args.reward_thresholds or DEFAULT_THRESHOLDS
    Thresholds(thresholds)
    if args.reward_form == "nats" and args.reward_thresholds:
        raise InputError("--reward_form nats has no thresholds: leave out --reward_thresholds")
    checked_weights(args.ppl_weights)
    check_weight(args.loop_penalty)
    ReferenceContext(args.extract, args.template, args.target)
    return {
        "weights": tuple(args.ppl_weights),
        "reward_thresholds": thresholds,
        "target": args.target,
        "extract": args.extract,
        "template": args.template,
        "form": args.reward_form,
        "missing": args.missing,
        "allow_baseline_mismatch": args.allow_baseline_mismatch,
        **cli.definitions(args),
        **cli.chat_options(args),
    }


def loading(args: argparse.Namespace, meta: Mapping) -> tuple[dict, dict]:
    """(how the policy is loaded, how the scorer is), keywords of `load_model`: the same, if an adapter is trained.

    4-bit unless asked otherwise or the baselines were made without: the scorer must be what they were made by. Full
    fine-tuning trains float32 weights unless asked otherwise: smaller steps than a bfloat16 can hold would be lost.
    Raises `InputError` for what excludes another.
    """
    made_by = meta.get("model", {})
    in_4bit = args.load_in_4bit
    if in_4bit is None:
        in_4bit = made_by.get("quantization", "4bit") == "4bit"
    scorer = {"load_in_4bit": in_4bit, "dtype": made_by.get("dtype", "auto") if args.dtype == "auto" else args.dtype}
    if not args.full_finetuning:
        return scorer, scorer
    if args.load_in_4bit:
        raise InputError("--full_finetuning trains the weights that --load_in_4bit freezes: drop one of them")
    if args.save_merged:
        raise InputError("--save_merged merges an adapter, --full_finetuning trains none: --output_dir is the model")
    if Path(model_path(args.model_name), "adapter_config.json").exists():
        raise InputError(f"--full_finetuning: {args.model_name} is an adapter: merge it first, with --save_merged")
    policy = {"load_in_4bit": False, "dtype": "float32" if args.dtype == "auto" else args.dtype}
    return policy, {
        "load_in_4bit": made_by.get("quantization") == "4bit",
        "dtype": made_by.get("dtype", policy["dtype"]),
    }


def check_reporters(args: argparse.Namespace) -> None:
    """Raises `InputError` for a reporter whose package is not installed, and for one beside none."""
    if args.report_to and "none" in args.report_to and len(args.report_to) > 1:
        raise InputError(f"--report_to is {' '.join(args.report_to)}: none stands alone, or leave it out")
    for name in args.report_to or ():
        if name != "none" and importlib.util.find_spec(name) is None:
            raise InputError(f"--report_to {name} needs the package {name}: pip install {name}")


def check_values(config) -> None:
    """Raises `InputError` for a number of GRPOConfig that is none, or out of range."""
    for name, least, most in _BOUNDS:
        value = getattr(config, name, None)
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            span = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise InputError(f"--{name} is {value}, expected a number {span}")
    for name in _ABOVE_0:
        value = getattr(config, name, None)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} is {value}, expected a number above 0")
    if config.max_steps < 1 and config.max_steps != -1:
        raise InputError(f"--max_steps is {config.max_steps}, expected at least 1, or -1 for --num_train_epochs")


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
    reporters = args.report_to or (["wandb"] if args.wandb_project else ["none"])
    ours = {name: value for name, value in vars(args).items() if name in defaults and name not in NAMESAKES}
    derived = {
        "max_completion_length": args.max_new_tokens,
        "report_to": reporters,
        "log_completions": "wandb" in reporters or "trackio" in reporters,
        "num_completions_to_print": 0,
        "multi_objective_aggregation": "normalize_then_sum" if args.per_level else "sum_then_normalize",
        "eval_strategy": "steps" if args.eval_split else "no",
        "eval_on_start": args.eval_split is not None,
        # The least that holds whole groups, which TRL asks for.
        "per_device_eval_batch_size": plan.num_generations
        * math.ceil(args.per_device_train_batch_size / plan.num_generations),
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "fp16": cuda and not torch.cuda.is_bf16_supported(),
        "use_cpu": not cuda,  # without it, several processes on a CPU do not find each other
        "ddp_find_unused_parameters": False,  # every adapter is used in every pass
    }
    parser.set_defaults(**{**ours, **plan._asdict(), **derived})
    if args.wandb_project:
        os.environ["WANDB_PROJECT"] = args.wandb_project
    asked = vars(parser.parse_args(rest))
    check_values(argparse.Namespace(**asked))

    def make(fields: Mapping) -> GRPOConfig:
        # TRL's own default, of which transformers 5.24 says in each run that it has a new name.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            return GRPOConfig(**fields)

    try:
        config = make(asked)
    # What GRPOConfig finds when it is made: values that do not go together, a file of DeepSpeed that is not there.
    except REFUSALS as error:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        raise counts_refused(asked, make, processes, error) or InputError(str(error)) from error
    check_evaluation(config, asked, args.eval_split)
    check_settings(config)
    if config.use_vllm and config.generation_kwargs:
        raise InputError(
            "--generation_kwargs are transformers' names, and --use_vllm has names of its own, which the held-out "
            "completions would not follow: drop one of them"
        )
    if config.remove_unused_columns:
        raise InputError(
            "--remove_unused_columns true takes id and reference from the rows, which the reward needs: leave it out"
        )
    return config, asked, defaults
