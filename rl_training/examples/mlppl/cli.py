"""The flags that scripts share, and how a script ends."""

import argparse
import ast
import functools
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import (
    DEFAULT_EXAMPLES,
    DEFAULT_PROMPT_TEMPLATE,
    DEFAULT_SEED,
    DTYPES,
    GENERATION_KWARGS,
    LOOP_PENALTY,
    RewardConfig,
    Sampling,
)
from .data import PromptForm, Shown, draw, read_shown
from .errors import SETTINGS, InputError, retired
from .models import model_path
from .prompts import read_template, read_tools

LATEST = "latest"  # checkpoint
REPORTERS = ("none", "wandb", "tensorboard", "trackio")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default unless that is None or False, or the help says what happens without it."""

    def _get_help_string(self, action):
        told = not action.default or "(default" in action.help
        return action.help if told else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Ends with one line instead of the whole usage."""

    def error(self, message: str):
        message = f"{message}: see {self.prog} --help"
        if in_kernel():
            raise CellError(message)
        self.exit(2, f"error: {message}\n")


class _Retired(argparse.Action):
    """A flag that is gone."""

    def __call__(self, parser, namespace, values, option_string=None):
        if gone := retired(self.dest, values):
            raise argparse.ArgumentError(self, gone)


def parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    name = Path(script_name("main")).name
    # A shortened flag would hide a typo, and flags of other parsers.
    made = _Parser(prog=name, description=description, epilog=epilog, formatter_class=_Help, allow_abbrev=False)
    made._negative_number_matcher = re.compile(r"-(\d|\.|inf|nan)")  # a value, as the threshold -50:0 is
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    hidden = argparse.SUPPRESS
    for name in SETTINGS:
        made.add_argument(f"--{name}", action=_Retired, nargs="?", const="true", default=hidden, help=hidden)
    return made


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model_name", default="tiny-stories",
        help="hub name, folder, GGUF file, the embedded tiny-stories, or smollm2")  # fmt: skip
    add("--load_in_4bit", action=argparse.BooleanOptionalAction, help="bitsandbytes NF4 weights (default: as the "
        "checkpoint is; in training on, unless the baselines were made without)")  # fmt: skip
    add("--dtype", choices=DTYPES, default="auto", help="auto: float32 on a CPU, else the checkpoint's")
    add("--device", help="cuda, cuda:1, cpu (default: the GPU if there is one)")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data set").add_argument
    add("--dataset_name", default="tiny-stories", help="hub name, folder, file, or tiny-stories")
    add("--dataset_config", help="configuration of the data set, where it has several")
    add("--dataset_split", default="train", help="split")
    add("--prompt_column", help="default: prompt, else query, text, input")
    add("--reference_column", help="default: reference, else completion")
    add("--id_column", help="default: id, else a hash of prompt and reference")


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompts (the same for baselines and training)").add_argument
    add("--prompt_template", default=DEFAULT_PROMPT_TEMPLATE, metavar="TEXT",
        help="what the prompt column's text becomes, such as 'Continue the story: {prompt}'")  # fmt: skip
    add("--prompt_sentences", type=positive_int, metavar="N", help="make both of one column, text or --prompt_column: "
        "its first N sentences are the prompt, the rest is the reference")  # fmt: skip
    add("--chat", action="store_true", help="send the prompt as a user's message through the chat template")
    add("--system_prompt", metavar="TEXT", help="with --chat, the system's message before it")
    add("--user_prompt", metavar="TEXT", help="with --chat, the user's message; the prompt becomes the start of the "
        "assistant's message, which the model continues")  # fmt: skip
    add("--chat_template_path", metavar="FILE", help="chat template in Jinja (default: the tokenizer's)")
    add("--chat_template_kwargs", type=_json_object, metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'")  # fmt: skip
    add("--tools", metavar="FILE", help="JSON list of tools' schemas that the chat template shows")
    _add_reward_flags(add, "prompts")


def _add_sampling_flags(add: Callable) -> None:
    """The fields of `Sampling`, with the names that GRPOConfig has for them. add: `add_argument` of a group."""
    usual = Sampling()
    add("--max_new_tokens", type=positive_int, default=usual.max_new_tokens, help="longest completion")
    add("--temperature", type=positive, default=usual.temperature, help="of sampling")
    add("--top_p", type=float, default=usual.top_p, help="share of probability to sample from")
    add("--top_k", type=int, default=usual.top_k, help="sample from so many tokens (0: from all)")
    add("--min_p", type=float, help="drop tokens below this share of the likeliest one's probability")
    add("--repetition_penalty", type=float, default=usual.repetition_penalty,
        help="divides the logits of what stands before (a loop's penalty in training is --loop_penalty)")  # fmt: skip
    add("--generation_kwargs", type=_json_object, metavar="JSON",
        help=f"more of transformers' GenerationConfig: {', '.join(GENERATION_KWARGS)}")  # fmt: skip


def _add_reward_flags(add: Callable, *where: str) -> None:
    """The fields of `RewardConfig` that belong there. The class itself says what is wrong with a choice or a number."""
    for one in fields(RewardConfig):
        if one.metadata.get("where") in where:
            options = dict(one.metadata["of_flag"])
            if choices := options.pop("choices", None):
                options["metavar"] = "{" + ",".join(choices) + "}"
            flags = [f"--{name}" for name in (one.name, one.metadata["also"]) if name]
            add(*flags, dest=one.name, default=one.default, help=one.metadata["help"], **options)


def add_definition_flags(parser: argparse.ArgumentParser, rows: str) -> None:
    """rows: what --examples takes."""
    add = parser.add_argument_group("definitions").add_argument
    _add_reward_flags(add, "definitions")
    add("--examples", metavar=rows, help="rows, prompt and reference, that the scorer reads before every prompt and "
        "the policy never sees (default: none; with level examples 3)")  # fmt: skip


def _add_flags_of_both(parser: argparse.ArgumentParser) -> None:
    """The flags that training and baselines share, beside those of sampling."""
    add_model_flags(parser)
    add = parser.add_argument_group("Unsloth, or a server").add_argument
    add("--max_seq_length", type=window, default=2048, help="window in tokens")
    add("--no_unsloth", action="store_true", help="load with transformers and PEFT instead of Unsloth")
    add("--scorer_url", metavar="URL", help="score through a server of vLLM, such as http://127.0.0.1:8000 (default: a "
        "model in this process)")  # fmt: skip
    add_data_flags(parser)
    add_prompt_flags(parser)
    add_definition_flags(parser, "N|FILE")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of train_grpo_multilevel_unsloth.py."""
    _add_flags_of_both(parser)
    trained = parser.add_argument_group("what is trained (default: a LoRA adapter; the folder of one goes on with it)")
    add = trained.add_argument
    add("--full_finetuning", action="store_true", help="train all weights; a frozen copy is the scorer")
    add("--scorer_model", help="scorer (default: the model itself as it was before training); with --scorer_url, what "
        "is served there")  # fmt: skip
    add("--save_merged", action="store_true", help="also save model and adapter as one 16-bit model, OUTPUT_DIR/merged")

    add = parser.add_argument_group("training data").add_argument
    add("--max_samples", type=positive_int, help="use the first rows only (default: all)")
    add("--heldout_samples", type=positive_int,
        help="prompts kept out of training and scored before and after it (default: a fifth, at most 16)")  # fmt: skip
    add("--eval_split", help="split evaluated while training, for instance test or test[:64]")
    add("--eval_steps", type=float, default=100, help="steps between two evaluations of it")

    add = parser.add_argument_group("reward").add_argument
    add("--baselines_path", "--baselines",
        help="of compute_baselines_trl.py (default: each prompt's first completions)")  # fmt: skip
    _add_reward_flags(add, "both", "training")
    add("--per_level", action="store_true",
        help="a reward a level, over one cache, each normalised in its group (GDPO); --weights weigh them")  # fmt: skip
    add("--loop_penalty", type=float, default=LOOP_PENALTY, metavar="W", help="what loops and copies of the prompt "
        "cost, in ranges of the reward; with --per_level, one over the share that is vetoed; 0: nothing")  # fmt: skip
    add("--allow_copies", action="store_true", help="do not penalise copying, from the prompt or, with a --template "
        "without {prompt}, from the reference")  # fmt: skip

    add = parser.add_argument_group("training (every other field of TRL's GRPOConfig is a flag, too)").add_argument
    add("--config", action="append", help="YAML file of flags; those on the command line win")
    add("--output_dir", default="output_grpo", help="adapter, tokenizer, checkpoints, report")
    add("--overwrite", action="store_true", help="replace the run that is in --output_dir")
    add(
        "--dry_run",
        action="store_true",
        help="say what the run will do, show the completions and rewards of its first step, and stop; write nothing",
    )
    add("--num_train_epochs", type=float, default=1.0, help="passes over the prompts")
    add("--per_device_train_batch_size", type=positive_int, default=4, help="in completions")
    add("--gradient_accumulation_steps", type=positive_int, help="(default: the least that fits)")
    add("--num_generations", type=positive_int, help="completions a prompt (default: 8 if it fits)")
    _add_sampling_flags(add)
    add("--learning_rate", type=float, default=5e-5, help="peak")
    add("--lora_r", type=positive_int, default=16, help="rank of the adapter")
    add("--lora_alpha", type=positive_int, default=16, help="scale of the adapter")
    add("--logging_steps", type=float, default=0.05, help="steps between log lines; below 1: what share of the run")
    add("--save_steps", type=float, default=500, help="steps between checkpoints")
    add("--seed", type=seed, default=DEFAULT_SEED, help="random seed")
    add("--wandb_project", help="log to this project of Weights & Biases")
    add("--report_to", nargs="+", choices=REPORTERS,
        help="where logs go (default: wandb with --wandb_project; without one, nothing is sent anywhere)")  # fmt: skip
    add("--run_name", help="name of the run")
    add("--resume_from_checkpoint", nargs="?", const=LATEST, metavar="PATH",
        help="go on with this checkpoint, without PATH with the last one in --output_dir")  # fmt: skip


def add_baseline_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of compute_baselines_trl.py."""
    add = parser.add_argument
    add("--config", action="append", help="YAML file of flags, the training's too; those on the command line win")
    add("--output_path", default="baselines.pkl", help="file to make: .pkl or .json")
    add("--overwrite", action="store_true", help="replace what is there under that name")
    add("--output_dataset", metavar="DIR", help="also write the data set with the baselines as columns")
    add("--plot", metavar="OUT.png", help="also draw the distribution of each level")
    _add_reward_flags(add, "both")
    add("--num_samples", type=positive_int, help="only the first rows with text (default: all)")
    add("--batch_size", type=positive_int, help="most texts in one forward pass (default: as many as fit)")
    add("--streaming", action="store_true", help="read the data set as it is scored, and keep no copy")
    own = parser.add_argument_group("baselines of the model's own writing (sampled as in training: the same flags)")
    add = own.add_argument
    add("--generate", type=positive_int, metavar="N", help="sample N completions a prompt and take their mean")
    _add_sampling_flags(add)
    add("--seed", type=seed, default=DEFAULT_SEED, help="of the sampling")
    _add_flags_of_both(parser)


def flags_of(add: Callable[[argparse.ArgumentParser], None]) -> set[str]:
    """The flags that `add_training_flags` or `add_baseline_flags` adds."""
    made = argparse.ArgumentParser(add_help=False)
    add(made)
    return set(made._option_string_actions)


def grpo_fields() -> set[str]:
    """The names of GRPOConfig's fields, its parents' too, as the installed TRL and transformers have them.

    Read from their source, which takes 0.02 s: importing them takes several seconds.
    """
    names = set()
    for file in ("trl/trainer/grpo_config.py", "trl/trainer/base_config.py", "transformers/training_args.py"):
        name = file.partition("/")[0]
        if (package := importlib.util.find_spec(name)) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        tree = ast.parse(Path(package.origin).parent.parent.joinpath(file).read_text(encoding="utf-8"))
        lines = (line for node in tree.body if isinstance(node, ast.ClassDef) for line in node.body)
        names |= {ast.unparse(line.target) for line in lines if isinstance(line, ast.AnnAssign)}
    return names


def parsed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The flags that were parsed, the reward's as `RewardConfig` has them where they are given: a run's file, which may
    be read with other flags, holds nothing derived. Ends the process with one line where those make no sense."""
    try:
        config = vars(reward_config(args))
    except InputError as error:
        parser.error(str(error))
    vars(args).update({name: config[name] for name in config if getattr(args, name, None) is not None})
    return args


def _named(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The flags of these names that a script has."""
    return {name: getattr(args, name) for name in names if name in args}


def reward_config(args: argparse.Namespace) -> RewardConfig:
    """What the flags of `RewardConfig` say. Raises `InputError` if it makes no sense, as the next two do."""
    return RewardConfig.of(_named(args, RewardConfig.__dataclass_fields__))


def shown_rows(args: argparse.Namespace, rows: Iterable[Shown]) -> dict[str, list[Shown]]:
    """What the scorer reads beside a text's own prompt, `examples` and `others`: drawn from the data set's rows, the
    examples also from a file, whose prompts become what the flags make of the data set's. Raises `InputError`."""
    config, asked = reward_config(args), args.examples
    if asked is None and "examples" in config.levels:
        asked = str(DEFAULT_EXAMPLES)
    if asked is None and not config.contrast:
        return {"examples": [], "others": []}
    if asked is None or asked.isdecimal():
        examples: int | list[Shown] = int(asked or 0)
    else:
        form = prompt_form(args)._replace(prompt_sentences=None)
        examples = [(form.shaped(prompt), reference) for prompt, reference in read_shown(asked)]
    drawn = draw(rows, examples, config.contrast, of_prompts=config.target == "completion")
    return dict(zip(("examples", "others"), drawn, strict=True))


def sampling(args: argparse.Namespace) -> Sampling:
    """What the flags of sampling say."""
    return Sampling(**_named(args, Sampling.__dataclass_fields__))


def prompt_form(args: argparse.Namespace) -> PromptForm:
    """What `add_prompt_flags` and --language say of prompts."""
    form = PromptForm(**_named(args, PromptForm._fields))
    form.check()
    return form


def column_options(args: argparse.Namespace) -> tuple:
    """What `mlppl.data.find_columns` takes after the columns' names."""
    return args.prompt_column, args.reference_column, args.id_column, args.prompt_sentences is not None


def chat_options(args: argparse.Namespace) -> dict:
    """The keywords of `mlppl.prompts.render_prompt` set by `add_prompt_flags`. Raises `InputError` for a bad file."""
    if args.chat_template_path is not None:
        read_template(args.chat_template_path)
    return {"chat_template_kwargs": args.chat_template_kwargs, "tools": read_tools(args.tools)}


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r}, expected a JSON object such as {{"enable_thinking": false}}')
    return value


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0")
    return value


def _whole(least: int, most: int, text: str) -> int:
    if not text.strip().isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least {least}, at most {most:,}")
    return int(text)


positive_int = functools.partial(_whole, 1, 10**9)
window = functools.partial(_whole, 2, 10**9)  # one token, and the one it predicts
seed = functools.partial(_whole, 0, 2**32 - 1)  # what NumPy takes


def run(args: argparse.Namespace, body: Callable[[argparse.Namespace], int]) -> int:
    """The exit code of `body(args)`; 2 and one line on stderr if the input is at fault, 130 after Ctrl-C.

    In a notebook that line is a `CellError`.
    """
    # Libraries neither draw progress bars between the lines of a report nor repeat what is one line of ours.
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # A terminal that lacks a sign is shown its number instead.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        for name in (getattr(args, "model_name", None), getattr(args, "scorer_model", None)):
            # Now, since to import what loads it takes seconds. What a server scores with is not loaded here.
            if name is not None and not getattr(args, "scorer_url", None):
                model_path(name)
        return body(args)
    except InputError as error:
        if args.debug:
            raise
        line = " ".join(str(error).split())
        if in_kernel():
            raise CellError(line) from error
        print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


# A script's `main` called in a notebook: its flags are not the kernel's, its errors are one line of the cell.


class CellError(InputError):
    """Ends a notebook's cell, so that no later one runs on, with the one line that a script prints."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows of it
        return [f"error: {self}"]


def in_kernel() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython and ipython.get_ipython(), "kernel", None) is not None


def script(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """`main(argv)` of a script such that `main()` takes the command line, or nothing if that is the kernel's own.

    --help, and what the parser refuses, are an exit code like any other: `SystemExit` would be an error of the cell.
    """

    @functools.wraps(main)
    def called(argv: Sequence[str] | None = None) -> int:
        if argv is None:
            argv = [] if _of_the_kernel() else sys.argv[1:]
        try:
            return main(list(argv))
        except SystemExit as end:
            return int(end.code or 0)

    return called


def runnable(words: Sequence[str]) -> str:
    """A command line to paste into this shell. Its first word is a program of this Python, such as python itself: with
    its folder, unless the shell finds the same one without."""
    program = Path(sys.executable).with_name(words[0])
    found = shutil.which(words[0])
    known = found is not None and (words[0] != "python" or Path(found).parent == program.parent)
    return shlex.join([words[0] if known else str(program), *words[1:]])


def script_name(default: str) -> str:
    """The script that this process was started with; `default` in a notebook, whose kernel is none of ours."""
    return default if _of_the_kernel() else sys.argv[0]


def _of_the_kernel() -> bool:
    """Whether the command line is the kernel's: a script that `%run` starts has one of its own."""
    return in_kernel() and sys.argv[1:] == sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1 :]
