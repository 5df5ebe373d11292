"""Fields of GRPOConfig that cannot work, refused before a model is loaded: TRL, transformers and torch are asked."""

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import InputError

# TRL wants groups that are whole: in a batch that is sampled at once, and in one that is evaluated.
_COUNTS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size",
    "num_generations", "num_generations_eval", "per_device_eval_batch_size",
)  # fmt: skip
_FAR = 64  # a number further from the given one is not proposed

# Words that TRL compares with words of its own only when it trains.
_WORDS = (
    "loss_type", "scale_rewards", "importance_sampling_level", "multi_objective_aggregation",
    "vllm_importance_sampling_mode",
)  # fmt: skip

REFUSALS = (ValueError, TypeError, OSError, ImportError)  # what GRPOConfig raises when it is made


def counts_refused(asked: Mapping, make: Callable, processes: int, error: Exception) -> InputError | None:
    """What to say where GRPOConfig refuses with `error` and takes another number in place of one of `_COUNTS`; None
    where it does not. asked: its fields. make: GRPOConfig of such fields."""
    numbers = {name: asked[name] for name in _COUNTS}
    numbers["num_generations_eval"] = asked["num_generations_eval"] or asked["num_generations"]
    remedies = {}
    for name, given in numbers.items():
        if given is None:
            continue
        near = (given + off * sign for off in range(1, _FAR + 1) for sign in (-1, 1))
        fits = next((one for one in near if one >= 1 and _takes(make, asked, name, one)), None)
        if fits is not None:
            remedies[name] = f"--{name} {fits}"
        elif _takes(make, asked, name, None):
            remedies[name] = f"no --{name}"
    if not remedies:
        return None
    given = ", ".join(f"--{name} {numbers[name]}" for name in remedies)
    return InputError(
        f"{given} on {processes} process(es) make no whole groups of completions ({str(error).rstrip('.')}): use "
        f"{' or '.join(remedies.values())}"
    )


def _takes(make: Callable, asked: Mapping, name: str, value: int | None) -> bool:
    try:
        make({**asked, name: value})
    except REFUSALS:
        return False
    return True


def check_evaluation(config, asked: Mapping, split: str | None) -> None:
    """Raises `InputError` for an evaluation without rows, and for what asks for one."""
    needs = {
        "eval_strategy": asked["eval_strategy"] if config.eval_strategy != "no" else None,
        "save_strategy": "best" if config.save_strategy == "best" else None,
        **{name: asked[name] for name in ("num_generations_eval", "eval_on_start", "load_best_model_at_end")},
    }
    for name, value in needs.items():
        if value and split is None:
            raise InputError(f"--{name} {value} needs rows to evaluate: add --eval_split, or leave it out")
    if (config.save_strategy == "best" or config.load_best_model_at_end) and config.metric_for_best_model is None:
        raise InputError("--save_strategy best needs --metric_for_best_model, for instance eval_reward")


def check_settings(config) -> None:
    """Raises `InputError` for a word or an object that TRL does not know, and for a package that is not installed."""
    trl = Path(importlib.util.find_spec("trl").submodule_search_locations[0])
    source = (trl / "trainer" / "grpo_trainer.py").read_text(encoding="utf-8")
    for name in _WORDS:
        compared = re.findall(rf'{name} (?:==|!=|in|not in) [\[(]?((?:"\w+",?\s*)+)', source)
        known = sorted({word for words in compared for word in re.findall(r"\w+", words)})
        if known and getattr(config, name) not in known:
            raise InputError(f"--{name} is {getattr(config, name)!r}, expected one of {', '.join(known)}")
    for name in ("gradient_checkpointing_kwargs", "lr_scheduler_kwargs", "liger_kernel_config"):
        if isinstance(value := getattr(config, name, None), str):
            raise InputError(f"--{name} is {value!r}, expected a JSON object such as {json.dumps({'name': 1})!r}")
    for name, package in (("use_vllm", "vllm"), ("use_liger_kernel", "liger_kernel")):
        if getattr(config, name) and importlib.util.find_spec(package) is None:
            raise InputError(f"--{name} needs the package {package}: install it, or leave --{name} out")
    if config.fsdp and config.world_size == 1:
        raise InputError(f"--fsdp {config.fsdp} needs several processes: start the script with accelerate launch")
    _check_made(config)


def _check_made(config) -> None:
    """Raises `InputError` if the optimizer, its schedule, checkpoints of gradients or the loader cannot be made."""
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers import Trainer, get_scheduler

    parameter, flags = torch.nn.Parameter(torch.zeros(2, 2)), f"--optim {config.optim.value}"
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(config)
        # One that is made of a whole model is left to the trainer.
        is_plain = (
            isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and "optimizer_dict" not in options
        )
        optimizer = kind([parameter], **options) if is_plain else torch.optim.SGD([parameter])
        flags = f"--lr_scheduler_type {config.lr_scheduler_type.value}"
        flags += f" with --lr_scheduler_kwargs {config.lr_scheduler_kwargs}"
        get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.get_warmup_steps(1000),
            num_training_steps=1000,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
        flags = f"--gradient_checkpointing_kwargs {config.gradient_checkpointing_kwargs}"
        if config.gradient_checkpointing:
            checkpoint(torch.neg, parameter, **{"use_reentrant": False, **(config.gradient_checkpointing_kwargs or {})})
        flags = f"--dataloader_num_workers {config.dataloader_num_workers}"
        torch.utils.data.DataLoader(
            [0],
            num_workers=config.dataloader_num_workers,
            persistent_workers=config.dataloader_persistent_workers,
            prefetch_factor=config.dataloader_prefetch_factor,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"{flags}: {error}") from error
    except AttributeError:  # GaLore and its kind ask for the model, which is not loaded
        return
