"""Flags and YAML files -> how models are loaded, TRL's GRPOConfig, and where a stopped run goes on."""

import argparse
import difflib
import importlib.util
import json
import math
import os
import re
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
from ..models import model_path

CONFIG_FILE = "training_config.yaml"
STATE_FILE = "reward_state.json"  # of `mlppl.training.trainer.RewardState`: the last file of a checkpoint
SCRIPT = "train_grpo_multilevel_unsloth.py"
_NOT_KEPT = ("debug", "config", "resume_from_checkpoint", "overwrite", "dry_run")  # of one call, not of the run
_OF_THE_MACHINE = ("bf16", "fp16", "use_cpu")  # told in the file, chosen again where it is used

# --- flags and files of them -----------------------------------------------------------------------------------------


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], trains: bool = True
) -> tuple[argparse.Namespace, list[str]]:
    """(the flags of `parser`, the other words: flags of GRPOConfig), those of `--config FILE` filled in.

    trains: whether it is the training script, whose other flags are GRPOConfig's; compute_baselines_trl.py has none. In
    a file, which both read, the flags of the other script are passed over. Ends the process with one line for a name
    that is none of these, before anything heavy is imported.
    """
    actions = parser._option_string_actions
    args, rest = parser.parse_known_args(argv)
    try:
        if args.config:
            others = flags_of(add_training_flags) | flags_of(add_baseline_flags)
            others |= set() if trains else {f"--{name}" for name in grpo_fields()}
            args, rest = parser.parse_known_args([*config_words(args.config, actions, others - actions.keys()), *argv])
        if rest and not trains:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            check_names([word for word in rest if word.startswith("--")], actions)
            if not rest[0].startswith("--"):
                raise InputError(f"{rest[0]!r} belongs to no flag: see --help")
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    return cli.parsed(parser, args), rest


def config_words(
    files: Sequence[str], actions: Mapping[str, argparse.Action], passed_over: Collection[str]
) -> list[str]:
    """The YAML mapping in the one file as words of a command line.

    A list is several values, pairs in it are thresholds, a mapping is JSON, null is left out. passed_over: flags that
    another script reads. Raises `InputError` for several files, for a file that is none, and for such a name.
    """
    if len(files) > 1:
        raise InputError(f"--config is given {len(files)} times, {' and '.join(files)}: expected one file")
    path, where = files[0], f"--config {files[0]}: "
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{where}{' '.join(str(error).split())}: expected a YAML file of flags") from error
    if not isinstance(settings, dict):
        raise InputError(f"{where}expected 'name: value' lines, found {settings!r:.80}")
    if "config" in settings:
        raise InputError(f"{where}config is {settings['config']!r}, but a file names no other: leave it out")
    check_names([f"--{name}" for name in settings], {*actions, *passed_over}, where)
    words = []
    for name, value in settings.items():
        flag, action = f"--{name}", actions.get(f"--{name}")
        if value is None or flag in passed_over:
            continue
        if action is not None and action.nargs == 0:  # --debug, --load_in_4bit: without a value, and perhaps --no-
            if not isinstance(value, bool):
                raise InputError(f"{where}{name} is {value!r}, expected true or false")
            words += [flag] if value else [f"--no-{name}"] if f"--no-{name}" in actions else []
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
            hint = f", did you mean --{near[0]}?" if near else ": see --help"
            raise InputError(f"{where}unknown flag --{name}{hint}")


def config_text(ours: Mapping, asked: Mapping, defaults: Mapping) -> str:
    """Every setting of a run as a YAML file that `--config` reads.

    ours: our flags. asked, defaults: GRPOConfig's fields, see `grpo_config`.
    """
    ours = {name: asked.get(name, value) for name, value in ours.items() if name not in _NOT_KEPT}
    ours["max_new_tokens"] = asked["max_completion_length"]
    hidden = {*ours, *_NOT_KEPT, *_OF_THE_MACHINE, "max_completion_length", "hub_token"}  # a secret is not written down
    theirs = {name: value for name, value in asked.items() if name not in hidden}
    chosen = {name: value for name, value in theirs.items() if value != defaults[name]}

    def block(title: str, settings: Mapping, mark: str = "") -> str:
        lines = [f"# {title}"]
        for name, value in settings.items():
            plain = json.loads(json.dumps(value))  # enumerations and tuples as YAML has them
            text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
            lines.append(f"{mark}{name}: " + text.removesuffix("...\n").rstrip())
        return "\n".join([*lines, ""])

    return "\n".join([
        block(f"The settings of this run. The same again: {SCRIPT} --config THIS_FILE", {**ours, **chosen}),
        block("Of TRL's GRPOConfig, as this machine has it", {name: asked[name] for name in _OF_THE_MACHINE}, "# "),
        block("Of TRL's GRPOConfig, left at their defaults", {n: theirs[n] for n in theirs if n not in chosen}, "# "),
    ])  # fmt: skip


# --- models ----------------------------------------------------------------------------------------------------------


class Models(NamedTuple):
    """What is trained and what scores it, by names that `mlppl.models.load_model` takes."""

    name: str
    scorer: str | None  # None: the model itself as it was before training
    scorer_url: str | None  # of the server that scores
    policy_load: dict  # keywords of `load_model`
    scorer_load: dict
    lora: dict | None  # keywords of `add_lora`; None: all weights are trained
    save_merged: bool


def models(args: argparse.Namespace, meta: Mapping) -> Models:
    """What the flags say of models; meta: how the baselines were made.

    4-bit unless asked otherwise or the baselines were made without: the scorer must be what they were made by. Full
    fine-tuning trains float32 weights unless asked otherwise: smaller steps than a bfloat16 can hold would be lost.
    Raises `InputError` for what excludes another, and for names that are no models.
    """
    path = model_path(args.model_name)
    if args.scorer_model and not args.scorer_url:  # what a server scores with is not loaded here
        model_path(args.scorer_model)
    made_by = meta.get("model", {})
    if args.full_finetuning:
        if args.load_in_4bit:
            raise InputError("--full_finetuning trains the weights that --load_in_4bit freezes: drop one of them")
        if args.save_merged:
            raise InputError(
                "--save_merged merges an adapter, --full_finetuning trains none: --output_dir is the model"
            )
        if Path(path, "adapter_config.json").exists():
            raise InputError(f"--full_finetuning: {args.model_name} is an adapter: merge it first, with --save_merged")
        policy = {"load_in_4bit": False, "dtype": "float32" if args.dtype == "auto" else args.dtype}
        in_4bit, dtype = made_by.get("quantization") == "4bit", made_by.get("dtype", policy["dtype"])
        scorer = {"load_in_4bit": in_4bit, "dtype": dtype}
    else:
        in_4bit = made_by.get("quantization", "4bit") == "4bit" if args.load_in_4bit is None else args.load_in_4bit
        dtype = made_by.get("dtype", "auto") if args.dtype == "auto" else args.dtype
        policy = scorer = {"load_in_4bit": in_4bit, "dtype": dtype}
    both = {name: getattr(args, name) for name in ("device", "max_seq_length", "chat_template_path")}
    lora = None if args.full_finetuning else {"r": args.lora_r, "alpha": args.lora_alpha, "seed": args.seed}
    names = args.model_name, args.scorer_model, args.scorer_url
    return Models(*names, {**policy, **both}, {**scorer, **both}, lora, args.save_merged)


# --- batches ---------------------------------------------------------------------------------------------------------

GROUP = 8  # completions a prompt, where the batch allows it: TRL's default
MOST = 4096  # a larger group is not proposed


class BatchPlan(NamedTuple):
    gradient_accumulation_steps: int
    num_generations: int


def plan_batches(
    batch: int, accumulation: int | None, generations: int | None, processes: int = 1, sampled_apart: bool = False
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


def find_checkpoint(asked: str | None, output_dir: str) -> str | None:
    """The checkpoint to resume from; None if none is asked for. asked: its folder, or `LATEST`: of the whole ones in
    `output_dir` the one with the most steps, since in a copy of a folder the times of files mean nothing.

    Raises `InputError` if there is none, or if it is not whole: a killed process leaves half of one.
    """
    if asked is None:
        return None
    if asked == LATEST:
        latest = max(whole_checkpoints(output_dir), key=steps_of, default=None)
        if latest is None:
            raise InputError(f"--resume_from_checkpoint: no whole checkpoint in --output_dir {output_dir}")
        asked = str(latest)
    for name in ("trainer_state.json", STATE_FILE):
        path = Path(asked, name)
        if not path.is_file():
            raise InputError(
                f"--resume_from_checkpoint {asked} holds no {name}: expected a checkpoint-N folder of this script, "
                "written to its end; without a value, the last one in --output_dir is taken"
            )
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}): go on with another checkpoint") from error
    return asked


def whole_checkpoints(output_dir: str) -> list[Path]:
    return [state.parent for state in Path(output_dir).glob(f"checkpoint-*/{STATE_FILE}")]


def steps_of(checkpoint: Path) -> tuple[int, float]:
    """Its optimizer steps; between checkpoints that do not say it, the time decides."""
    try:
        steps = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")).get("global_step", 0)
    except (OSError, ValueError):  # what is wrong with it is said when it is taken
        steps = 0
    return steps, (checkpoint / STATE_FILE).stat().st_mtime


def check_unused(output_dir: str) -> None:
    """Raises `InputError` for a folder with a run in it: two runs in one folder cannot be told from each other."""
    heldout, checkpoints = Path(output_dir, "heldout.json"), whole_checkpoints(output_dir)
    try:
        finished = json.loads(heldout.read_text(encoding="utf-8", errors="surrogatepass"))["after"] is not None
    except (OSError, ValueError, LookupError, TypeError):
        finished = False
    if finished or checkpoints:
        raise InputError(
            f"--output_dir {output_dir} holds {'a finished run' if finished else 'the checkpoints of a run'}: choose "
            "another folder, replace that run with --overwrite"
            + (", or continue it with --resume_from_checkpoint" if checkpoints else "")
        )


def resume_command(argv: Sequence[str], checkpoint: str) -> str:
    """The command line of this process with the checkpoint to go on from in place of an earlier one."""
    words = list(argv)
    for index, word in enumerate(words):
        if word.partition("=")[0] == "--resume_from_checkpoint":
            has_value = "=" not in word and index + 1 < len(words) and not words[index + 1].startswith("--")
            del words[index : index + 1 + has_value]
            break
    return cli.runnable([*launched(words), "--resume_from_checkpoint", checkpoint])


def launched(argv: Sequence[str]) -> list[str]:
    """The words of the command line that started this process, its launcher's included, with these arguments."""
    processes, script = os.environ.get("WORLD_SIZE", "1"), script_name(SCRIPT)
    if processes == "1":
        return [*(["python", script] if script.endswith(".py") else [Path(script).name]), *argv]
    return [*(_launcher() or ["accelerate", "launch", "--num_processes", processes]), script, *argv]


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


# --- TRL's settings --------------------------------------------------------------------------------------------------

# Fields of GRPOConfig that cannot work are refused before a model is loaded: TRL, transformers and torch are asked.

# What TRL trains nothing without, or fails at once a model is loaded.
_AT_LEAST = {
    1: ("num_iterations", "steps_per_generation", "generation_batch_size", "num_generations_eval",
        "per_device_eval_batch_size", "max_completion_length"),
    0: ("learning_rate", "beta", "epsilon", "epsilon_high", "delta", "max_grad_norm", "weight_decay", "warmup_steps",
        "dataloader_num_workers"),
}  # fmt: skip
_ABOVE_0 = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps")
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
_REFUSALS = (ValueError, TypeError, OSError, ImportError)  # what GRPOConfig raises when it is made


def grpo_config(args: argparse.Namespace, rest: list[str], plan: BatchPlan):
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
    # GRPOConfig's `debug` is something else.
    ours = {name: value for name, value in vars(args).items() if name in defaults and name != "debug"}
    group, batch = plan.num_generations, args.per_device_train_batch_size
    derived = {
        "max_completion_length": args.max_new_tokens,
        "report_to": reporters,
        "log_completions": "wandb" in reporters or "trackio" in reporters,
        "num_completions_to_print": 0,
        "multi_objective_aggregation": "normalize_then_sum" if args.per_level else "sum_then_normalize",
        "eval_strategy": "steps" if args.eval_split else "no",
        "eval_on_start": args.eval_split is not None,
        "per_device_eval_batch_size": group * math.ceil(batch / group),  # whole groups, which TRL asks for
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "fp16": cuda and not torch.cuda.is_bf16_supported(),
        "use_cpu": not cuda,  # without it, several processes on a CPU do not find each other
        "ddp_find_unused_parameters": False,  # every adapter is used in every pass
    }
    parser.set_defaults(**{**ours, **plan._asdict(), **derived})
    if args.wandb_project:
        os.environ["WANDB_PROJECT"] = args.wandb_project
    asked = vars(parser.parse_args(rest))
    _check_numbers(asked)

    def make(**other):
        # TRL's own default, of which transformers 5.24 says in each run that it has a new name.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            return GRPOConfig(**{**asked, **other})

    try:
        config = make()
    # What GRPOConfig finds when it is made: values that do not go together, a file of DeepSpeed that is not there.
    except _REFUSALS as error:
        raise _counts_refused(asked, make, error) or InputError(str(error)) from error
    _check_settings(config, asked, args.eval_split)
    _check_made(config)
    return config, asked, defaults


def _check_numbers(asked: Mapping) -> None:
    """Raises `InputError` for a number of GRPOConfig that is none, or out of range."""
    for least, names in _AT_LEAST.items():
        for name in names:
            value = asked.get(name)
            if value is not None and not least <= value < math.inf:
                raise InputError(f"--{name} is {value}, expected a number of at least {least}")
    for name in _ABOVE_0:
        if not 0 < asked[name] < math.inf:
            raise InputError(f"--{name} is {asked[name]}, expected a number above 0")
    if asked["max_steps"] < 1 and asked["max_steps"] != -1:
        raise InputError(f"--max_steps is {asked['max_steps']}, expected at least 1, or -1 for --num_train_epochs")


def _counts_refused(asked: Mapping, make: Callable, error: Exception) -> InputError | None:
    """What to say where GRPOConfig refuses with `error` and takes another number, or none, in place of one of
    `_COUNTS`; None where it does not. asked: its fields. make: GRPOConfig of them, but for those that it is given."""

    def taken(name: str, value: int | None) -> bool:
        try:
            make(**{name: value})
        except _REFUSALS:
            return False
        return True

    numbers = {name: asked[name] for name in _COUNTS}
    numbers["num_generations_eval"] = asked["num_generations_eval"] or asked["num_generations"]
    remedies = {}
    for name, given in numbers.items():
        if given is None:
            continue
        near = (given + off * sign for off in range(1, _FAR + 1) for sign in (-1, 1))
        fit = next((one for one in near if one >= 1 and taken(name, one)), None)
        if fit is not None or taken(name, None):
            remedies[name] = f"no --{name}" if fit is None else f"--{name} {fit}"
    if not remedies:
        return None
    given = ", ".join(f"--{name} {numbers[name]}" for name in remedies)
    return InputError(
        f"{given} on {os.environ.get('WORLD_SIZE', '1')} process(es) make no whole groups of completions "
        f"({str(error).rstrip('.')}): use {' or '.join(remedies.values())}"
    )


def check_reporters(names: Sequence[str]) -> None:
    """Raises `InputError` for a reporter whose package is not installed, for one beside none, and for Weights & Biases
    without a key, which it would ask for when the models are loaded."""
    if "none" in names and len(names) > 1:
        raise InputError(f"--report_to is {' '.join(names)}: none stands alone, or leave it out")
    for name in names:
        if name != "none" and importlib.util.find_spec(name) is None:
            raise InputError(f"--report_to {name} needs the package {name}: pip install {name}")
    if "wandb" in names:
        import wandb
        from requests.utils import get_netrc_auth

        settings = wandb.setup().settings
        key = settings.api_key or settings.identity_token_file or get_netrc_auth(settings.base_url)
        if settings.mode in ("online", "shared") and not key:
            raise InputError(
                f"Weights & Biases has no key for {settings.base_url}: call `wandb login`, or set WANDB_API_KEY; with "
                "WANDB_MODE=offline it needs none"
            )


def _check_settings(config, asked: Mapping, eval_split: str | None) -> None:
    """Raises `InputError` for a word or an object that TRL does not know, for a package that is not installed, for an
    evaluation without rows, and for settings that do not go together. asked: the fields of config as asked for."""
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
    best = config.save_strategy == "best"
    for name in ("eval_strategy", "save_strategy", "num_generations_eval", "eval_on_start", "load_best_model_at_end"):
        evaluates = best if name == "save_strategy" else asked[name] not in (None, False, "no")
        if evaluates and eval_split is None:
            raise InputError(f"--{name} {asked[name]} needs rows to evaluate: add --eval_split, or leave it out")
    if (best or config.load_best_model_at_end) and config.metric_for_best_model is None:
        raise InputError("--save_strategy best needs --metric_for_best_model, for instance eval_reward")
    if str(config.pad_to_multiple_of) == "0":  # a string in TRL 1.16, where it may be "auto"
        raise InputError("--pad_to_multiple_of is 0, expected at least 1, or leave it out")
    if config.fsdp and config.world_size == 1:
        raise InputError(f"--fsdp {config.fsdp} needs several processes: start the script with accelerate launch")
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
    for name, package in (("use_vllm", "vllm"), ("use_liger_kernel", "liger_kernel")):
        if getattr(config, name) and importlib.util.find_spec(package) is None:
            raise InputError(f"--{name} needs the package {package}: install it, or leave --{name} out")


def _check_made(config) -> None:
    """Raises `InputError` if the optimizer, its schedule, checkpoints of gradients or the loader cannot be made."""
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers import Trainer, get_scheduler

    parameter, flags = torch.nn.Parameter(torch.zeros(2, 2)), f"--optim {config.optim.value}"
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(config)
        # One that is made of a whole model is left to the trainer.
        is_class = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        is_plain = is_class and "optimizer_dict" not in options
        optimizer = kind([parameter], **options) if is_plain else torch.optim.SGD([parameter])
        flags = f"--lr_scheduler_type {config.lr_scheduler_type.value}"
        flags += f" with --lr_scheduler_kwargs {config.lr_scheduler_kwargs}"
        steps = {"num_warmup_steps": config.get_warmup_steps(1000), "num_training_steps": 1000}
        of_schedule = {"scheduler_specific_kwargs": config.lr_scheduler_kwargs}
        get_scheduler(config.lr_scheduler_type, optimizer, **steps, **of_schedule)
        flags = f"--gradient_checkpointing_kwargs {config.gradient_checkpointing_kwargs}"
        if config.gradient_checkpointing:
            checkpoint(torch.neg, parameter, **{"use_reentrant": False, **(config.gradient_checkpointing_kwargs or {})})
        flags = f"--dataloader_num_workers {config.dataloader_num_workers}"
        names = ("num_workers", "persistent_workers", "prefetch_factor")
        torch.utils.data.DataLoader([0], **{name: getattr(config, f"dataloader_{name}") for name in names})
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"{flags}: {error}") from error
    except AttributeError:  # GaLore and its kind ask for the model, which is not loaded
        return
