"""Flags of the training script -> how the model is loaded, the reward's settings, TRL's GRPOConfig."""

import argparse
import difflib
import importlib.util
import json
import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from psutil import Error, Process

from .. import cli
from ..cli import LATEST, add_baseline_flags, add_training_flags, flags_of, grpo_fields, script_name
from ..errors import InputError
from ..files import write_text
from ..models import model_path
from ..reward.loop_guard import check_weight

# --- flags -----------------------------------------------------------------------------------------------------------

# A run's settings on the command line and in a YAML file: read, checked by name, and written beside the model.

CONFIG_FILE = "training_config.yaml"
NAMESAKES = ("debug",)  # our flags whose name GRPOConfig gives to something else
_NOT_KEPT = ("debug", "config", "resume_from_checkpoint")  # of one call, not of the run
_OF_THE_MACHINE = ("bf16", "fp16", "use_cpu")  # told in the file, chosen again where it is used


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(the flags of `parser`, the other words: flags of GRPOConfig), those of `--config FILE` filled in.

    In a file the flags of compute_baselines_trl.py, which reads the same one, are passed over. Ends the process with
    one line for a name that is none of these, before anything heavy is imported.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    actions = parser._option_string_actions
    try:
        if file := _config_file(argv):
            argv = config_words(file, actions, flags_of(add_baseline_flags) - actions.keys()) + argv
        # argparse would take the threshold -50:0 for a flag; with a space in front it does not.
        args, rest = parser.parse_known_args(
            [f" {word}" if re.match(r"-(\d|\.|inf|nan)[^\s:]*:", word) else word for word in argv]
        )
        check_names([word for word in rest if word.startswith("--")], actions)
        if rest and not rest[0].startswith("--"):
            raise InputError(f"{rest[0]!r} belongs to no flag: see --help")
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    return cli.parsed(parser, args), rest


def parse_baselines(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of compute_baselines_trl.py, those of `--config FILE` filled in, which may be a file of the training's:
    its flags, and the fields of GRPOConfig, are passed over."""
    argv = list(sys.argv[1:] if argv is None else argv)
    actions = parser._option_string_actions
    try:
        if file := _config_file(argv):
            passed_over = {*flags_of(add_training_flags), *(f"--{name}" for name in grpo_fields())} - actions.keys()
            argv = config_words(file, actions, passed_over) + argv
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    return cli.parsed(parser, parser.parse_args(argv))


def _config_file(argv: Sequence[str]) -> str | None:
    """What `--config` names; None without it, and without a name, of which argparse tells. Raises `InputError` for
    several."""
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--config", nargs="?", action="append", default=[])
    files = only.parse_known_args(argv)[0].config
    if len(files) > 1:
        raise InputError(f"--config is given {len(files)} times, {' and '.join(map(str, files))}: expected one file")
    return files[0] if files else None


def config_words(path: str, actions: Mapping[str, argparse.Action], passed_over: Collection[str] = ()) -> list[str]:
    """The YAML mapping in the file as words of a command line.

    A list is several values, pairs in it are thresholds, a mapping is JSON, null is left out. passed_over: flags that
    another script reads. Raises `InputError` for a file or a name that is none.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: {' '.join(str(error).split())}: expected a YAML file of flags") from error
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: expected 'name: value' lines, found {settings!r:.80}")
    if "config" in settings:
        raise InputError(f"--config {path}: config is {settings['config']!r}, but a file names no other: leave it out")
    check_names([f"--{name}" for name in settings], {*actions, *passed_over}, f"--config {path}: ")
    words = []
    for name, value in settings.items():
        flag, action = f"--{name}", actions.get(f"--{name}")
        if value is None or flag in passed_over:
            continue
        if action is not None and action.nargs == 0:  # --debug, --load_in_4bit: without a value, and perhaps --no-
            if not isinstance(value, bool):
                raise InputError(f"--config {path}: {name} is {value!r}, expected true or false")
            negative = f"--no-{name}" if f"--no-{name}" in actions else None
            words += [flag] if value else [negative] if negative else []
        elif isinstance(value, list):
            words += [flag, *(":".join(map(str, item)) if isinstance(item, list) else str(item) for item in value)]
        else:
            words.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def check_names(flags: Iterable[str], ours: Iterable[str], where: str = "") -> None:
    """Raises `InputError`, with the nearest name there is, for a flag neither of `ours` nor of GRPOConfig."""
    names = grpo_fields()
    known = {flag.removeprefix("--") for flag in ours} | names | {f"no_{name}" for name in names}
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0]
        if name not in known and not name.startswith("unsloth_"):  # Unsloth's GRPOConfig has some more
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"{where}unknown flag --{name}" + (f", did you mean --{near[0]}?" if near else ": see --help")
            )


def write_config(path: Path, ours: Mapping, asked: Mapping, defaults: Mapping) -> None:
    """Write every setting of a run as a YAML file that `--config` reads.

    ours: our flags. asked, defaults: GRPOConfig's fields as they were asked for, and as they are otherwise
    (`ppl.training.settings`).
    """
    ours = {
        name: value if name in NAMESAKES else asked.get(name, value)
        for name, value in ours.items()
        if name not in _NOT_KEPT
    }
    ours["max_new_tokens"] = asked["max_completion_length"]
    hidden = {*ours, *_NOT_KEPT, *_OF_THE_MACHINE, "max_completion_length", "hub_token"}  # a secret is not written down
    theirs = {name: value for name, value in asked.items() if name not in hidden}
    chosen = {name: value for name, value in theirs.items() if value != defaults[name]}
    lines = ["# The settings of this run. The same again: train_grpo_multilevel_unsloth.py --config THIS_FILE"]
    lines += [_line(name, value) for name, value in ours.items()]
    lines += ["", "# Of TRL's GRPOConfig"] + [_line(name, value) for name, value in chosen.items()]
    lines += ["", "# Of TRL's GRPOConfig, as this machine has it"]
    lines += [f"# {_line(name, asked[name])}" for name in _OF_THE_MACHINE]
    lines += ["", "# Of TRL's GRPOConfig, left at their defaults"]
    lines += [f"# {_line(name, value)}" for name, value in theirs.items() if name not in chosen]
    write_text(path, "\n".join([*lines, ""]))


def _line(name: str, value) -> str:
    plain = json.loads(json.dumps(value))  # enumerations and tuples as YAML has them
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    return f"{name}: {text.removesuffix('...' + chr(10)).rstrip()}"


# --- plan ------------------------------------------------------------------------------------------------------------

# Batch size, accumulation and group size such that TRL accepts them.

GROUP = 8  # completions a prompt, where the batch allows it: TRL's default
MOST = 4096  # a larger group is not proposed


class BatchPlan(NamedTuple):
    gradient_accumulation_steps: int
    num_generations: int


def plan_batches(
    batch: int,
    accumulation: int | None,
    generations: int | None,
    processes: int = 1,
    sampled_apart: bool = False,
) -> BatchPlan:
    """Fill in what is None so that batch x processes x accumulation is a multiple of the group size.

    Without accumulation, the least one that fits; without a group size, the largest divisor up to `GROUP`.
    Raises `InputError` with the nearest numbers that fit if the given ones do not.

    sampled_apart: --steps_per_generation or --generation_batch_size says how many completions are sampled at once, so
    TRL tells whether these are whole groups.
    """
    if generations is not None and generations < 2:
        raise InputError(f"--num_generations is {generations}, expected at least 2: GRPO compares within a group")
    per_step = batch * processes

    def least(group: int) -> int:
        """The accumulation, and with it every multiple, that makes whole groups."""
        return group // math.gcd(per_step, group)

    if accumulation is None:
        generations = generations or GROUP
        return BatchPlan(least(generations), generations)
    total = per_step * accumulation
    if generations is not None and (sampled_apart or total % generations == 0):
        return BatchPlan(accumulation, generations)
    divisors = [n for n in range(2, min(total, MOST) + 1) if total % n == 0]
    if generations is None and (sampled_apart or divisors):
        return BatchPlan(accumulation, max((n for n in divisors if n <= GROUP), default=min(divisors, default=GROUP)))
    wanted = generations or 2
    nearest = min(divisors, key=lambda n: abs(n - wanted), default=None)
    raise InputError(
        f"--per_device_train_batch_size {batch} x {processes} process(es) x --gradient_accumulation_steps "
        f"{accumulation} = {total} completions a step, no multiple of --num_generations {wanted}: use "
        f"--gradient_accumulation_steps {-(-accumulation // least(wanted)) * least(wanted)}"
        + (f" or --num_generations {nearest}" if nearest else "")
    )


# --- resume ----------------------------------------------------------------------------------------------------------

# Where a stopped run goes on: its newest whole checkpoint, and the command for it.

STATE_FILE = "reward_state.json"  # of `ppl.training.trainer.RewardState`: written last
SCRIPT = "train_grpo_multilevel_unsloth.py"


def find_checkpoint(asked: str | None, output_dir: str) -> str | None:
    """The checkpoint to resume from; None if none is asked for. asked: its folder, or `LATEST` of `output_dir`.

    Raises `InputError` if there is none, or if it is not whole: a killed process leaves half of one.
    """
    if asked is None:
        return None
    if asked == LATEST:
        states = Path(output_dir).glob(f"checkpoint-*/{STATE_FILE}")
        newest = max(states, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            raise InputError(f"--resume_from_checkpoint: no whole checkpoint in --output_dir {output_dir}")
        asked = str(newest.parent)
    for name in ("trainer_state.json", STATE_FILE):
        if not Path(asked, name).is_file():
            raise InputError(
                f"--resume_from_checkpoint {asked} holds no {name}: expected a checkpoint-N folder of this script, "
                "written to its end; without a value, the newest in --output_dir is taken"
            )
        try:
            json.loads(Path(asked, name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{Path(asked, name)} is damaged ({error}): go on with another checkpoint") from error
    return asked


def resume_command(argv: Sequence[str], checkpoint: str) -> str:
    """The command line of this process with the checkpoint to go on from in place of an earlier one."""
    words = list(argv)
    for index, word in enumerate(words):
        if word.partition("=")[0] == "--resume_from_checkpoint":
            has_value = "=" not in word and index + 1 < len(words) and not words[index + 1].startswith("--")
            del words[index : index + 1 + has_value]
            break
    return shlex.join([*launched(words), "--resume_from_checkpoint", checkpoint])


def launched(argv: Sequence[str]) -> list[str]:
    """The words of the command line that started this process, its launcher's included, with these arguments."""
    processes = os.environ.get("WORLD_SIZE", "1")
    launcher = ["python"] if processes == "1" else _launcher() or ["accelerate", "launch", "--num_processes", processes]
    return [*launcher, script_name(SCRIPT), *argv]


def _launcher() -> list[str]:
    """What stands before the script in the command line of the process that started this one; [] if it did not."""
    try:
        parent = Process().parent()  # the first process of a container has none
        words = parent.cmdline() if parent else []  # python /usr/bin/accelerate launch --config_file FILE script.py ...
    except Error:  # it belongs to somebody else, or has just ended
        return []
    if sys.argv[0] not in words[2:]:
        return []
    first = 0 if words[1].startswith("-") else 1  # python -m torch.distributed.run ...
    return [Path(words[first]).name, *words[first + 1 : words.index(sys.argv[0])]]


# --- trl settings ----------------------------------------------------------------------------------------------------

# Fields of GRPOConfig that cannot work, refused before a model is loaded: TRL, transformers and torch are asked.

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
    if str(config.pad_to_multiple_of) == "0":  # a string in TRL 1.16, where it may be "auto"
        raise InputError("--pad_to_multiple_of is 0, expected at least 1, or leave it out")
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


# --- config ----------------------------------------------------------------------------------------------------------

# (field of GRPOConfig, least, most): beyond these TRL trains nothing, or fails once a model is loaded.
_BOUNDS = (
    *((name, 1, math.inf) for name in ("num_iterations", "steps_per_generation", "generation_batch_size")),
    *((name, 1, math.inf) for name in ("num_generations_eval", "per_device_eval_batch_size", "max_completion_length")),
    *((name, 0, math.inf) for name in ("learning_rate", "beta", "epsilon", "epsilon_high", "delta", "max_grad_norm")),
    *((name, 0, math.inf) for name in ("weight_decay", "warmup_steps", "dataloader_num_workers")),
)
_ABOVE_0 = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps")


def reward_settings(args: argparse.Namespace) -> dict:
    """The keywords of `MultiLevelPPLRewardFunction` that the flags set, checked: `RewardConfig`'s, and the chat's."""
    check_weight(args.loop_penalty)
    return {**vars(cli.reward_config(args)), **cli.chat_options(args)}


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
    if config.use_vllm and config.generation_kwargs:
        raise InputError(
            "--generation_kwargs are transformers' names, and --use_vllm has names of its own, which the held-out "
            "completions would not follow: drop one of them"
        )
    if config.use_transformers_continuous_batching and (config.generation_kwargs or config.repetition_penalty != 1):
        raise InputError(
            "--use_transformers_continuous_batching drops --repetition_penalty and some of --generation_kwargs, which "
            "the held-out completions would follow: leave it out, or them"
        )
    if config.remove_unused_columns:
        raise InputError(
            "--remove_unused_columns true takes id and reference from the rows, which the reward needs: leave it out"
        )
    check_settings(config)
    return config, asked, defaults
