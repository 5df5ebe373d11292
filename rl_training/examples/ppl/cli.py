"""The flags that scripts share, and how a script ends."""

import argparse
import ast
import functools
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from .config import (
    DEFAULT_PROMPT_TEMPLATE,
    DEFAULT_SEED,
    DTYPES,
    GENERATION_KWARGS,
    LOOP_PENALTY,
    RewardConfig,
    Sampling,
)
from .data import PromptForm
from .errors import SETTINGS, InputError, retired
from .prompts import read_template, read_tools

LATEST = "latest"  # checkpoint
REPORTERS = ("none", "wandb", "tensorboard", "trackio")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default unless that is None or False: then the help says what happens without it."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help


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
    made = _Parser(
        prog=Path(script_name("main")).name,
        description=description,
        epilog=epilog,
        formatter_class=_Help,
        allow_abbrev=False,  # a shortened flag would hide a typo, and flags of other parsers
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for name in SETTINGS:
        made.add_argument(
            f"--{name}", action=_Retired, nargs="?", const="true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return made


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_name",
        default="tiny-stories",
        help="hub name, folder, GGUF file, the embedded tiny-stories, or smollm2",
    )
    group.add_argument(
        "--load_in_4bit",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="bitsandbytes NF4 weights (default: as the checkpoint is; in training on, unless the baselines were made "
        "without)",
    )
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: float32 on a CPU, else the checkpoint's")
    group.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU if there is one)")


def add_unsloth_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Unsloth")
    group.add_argument("--max_seq_length", type=window, default=2048, help="window in tokens")
    group.add_argument("--no_unsloth", action="store_true", help="load with transformers and PEFT instead of Unsloth")


def add_server_flag(parser) -> None:
    parser.add_argument(
        "--scorer_url", metavar="URL",
        help="score through a server of vLLM, such as http://127.0.0.1:8000 (default: a model in this process)",
    )  # fmt: skip


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data set")
    group.add_argument("--dataset_name", default="tiny-stories", help="hub name, folder, file, or tiny-stories")
    group.add_argument("--dataset_config", help="configuration of the data set, where it has several")
    group.add_argument("--dataset_split", default="train", help="split")
    group.add_argument("--prompt_column", help="default: prompt, else query, text, input")
    group.add_argument("--reference_column", help="default: reference, else completion")
    group.add_argument("--id_column", help="default: id, else a hash of prompt and reference")


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts (the same for baselines and training)")
    group.add_argument(
        "--prompt_template", default=DEFAULT_PROMPT_TEMPLATE, metavar="TEXT",
        help="what the prompt column's text becomes, such as 'Continue the story: {prompt}'",
    )  # fmt: skip
    group.add_argument(
        "--prompt_sentences", type=positive_int, metavar="N",
        help="make both of one column, text or --prompt_column: its first N sentences are the prompt, the rest is the "
        "reference",
    )  # fmt: skip
    group.add_argument(
        "--chat", action="store_true", help="send the prompt as a user's message through the chat template"
    )
    group.add_argument("--system_prompt", metavar="TEXT", help="with --chat, the system's message before it")
    group.add_argument(
        "--user_prompt", metavar="TEXT",
        help="with --chat, the user's message; the prompt becomes the start of the assistant's message, which the "
        "model continues",
    )  # fmt: skip
    group.add_argument("--chat_template_path", metavar="FILE", help="chat template in Jinja (default: the tokenizer's)")
    group.add_argument(
        "--chat_template_kwargs", type=_json_object, metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'",
    )  # fmt: skip
    group.add_argument("--tools", metavar="FILE", help="JSON list of tools' schemas that the chat template shows")


def add_sampling_flags(group) -> None:
    """The fields of `Sampling`, with the names that GRPOConfig has for them."""
    usual = Sampling()
    group.add_argument("--max_new_tokens", type=positive_int, default=usual.max_new_tokens, help="longest completion")
    group.add_argument("--temperature", type=positive, default=usual.temperature, help="of sampling")
    group.add_argument("--top_p", type=float, default=usual.top_p, help="share of probability to sample from")
    group.add_argument("--top_k", type=int, default=usual.top_k, help="sample from so many tokens (0: from all)")
    group.add_argument("--min_p", type=float, help="drop tokens below this share of the likeliest one's probability")
    group.add_argument(
        "--repetition_penalty", type=float, default=usual.repetition_penalty,
        help="divides the logits of what stands before (a loop's penalty in training is --loop_penalty)",
    )  # fmt: skip
    group.add_argument(
        "--generation_kwargs", type=_json_object, metavar="JSON",
        help=f"more of transformers' GenerationConfig: {', '.join(GENERATION_KWARGS)}",
    )  # fmt: skip


def sampling(args: argparse.Namespace) -> Sampling:
    """What `add_sampling_flags` says. Raises `InputError` if it makes no sense."""
    return Sampling(**{name: getattr(args, name) for name in Sampling.__dataclass_fields__})


def add_reward_flags(parser, *names: str) -> None:
    """The fields of `RewardConfig` of these names; of its choices and numbers the class itself says what is wrong."""
    for one in fields(RewardConfig):
        if one.name in names:
            options = {name: value for name, value in one.metadata["of_flag"].items() if name != "choices"}
            if choices := one.metadata["of_flag"].get("choices"):
                options["metavar"] = "{" + ",".join(choices) + "}"
            flags = [f"--{name}" for name in (one.name, one.metadata["also"]) if name]
            parser.add_argument(*flags, dest=one.name, default=one.default, help=one.metadata["help"], **options)


def add_definition_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("definitions")
    add_reward_flags(group, "max_phrase_words", "language", "aggregation")


def parsed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The flags that were parsed, the reward's as `RewardConfig` has them. Ends the process with one line where those
    make no sense."""
    try:
        config = reward_config(args)
    except InputError as error:
        parser.error(str(error))
    for one in fields(config):
        if hasattr(args, one.name):
            setattr(args, one.name, getattr(config, one.name))
    return args


def reward_config(args: argparse.Namespace) -> RewardConfig:
    """What the flags that a script has of `add_reward_flags` say. Raises `InputError` if it makes no sense."""
    names = [one.name for one in fields(RewardConfig) if hasattr(args, one.name)]
    return RewardConfig.of({name: getattr(args, name) for name in names})


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of train_grpo_multilevel_unsloth.py."""
    add_model_flags(parser)
    add_unsloth_flags(parser)
    add_data_flags(parser)
    add_prompt_flags(parser)
    add_definition_flags(parser)
    model = parser.add_argument_group("what is trained (default: a LoRA adapter; the folder of one goes on with it)")
    model.add_argument("--full_finetuning", action="store_true", help="train all weights; a frozen copy is the scorer")
    model.add_argument(
        "--scorer_model",
        help="scorer (default: the model itself as it was before training); with --scorer_url, what is served there",
    )
    add_server_flag(model)
    model.add_argument(
        "--save_merged", action="store_true", help="also save model and adapter as one 16-bit model, OUTPUT_DIR/merged"
    )

    data = parser.add_argument_group("training data")
    data.add_argument("--max_samples", type=positive_int, help="use the first rows only (default: all)")
    data.add_argument(
        "--heldout_samples", type=positive_int,
        help="prompts kept out of training and scored before and after it (default: a fifth, at most 16)",
    )  # fmt: skip

    data.add_argument("--eval_split", help="split evaluated while training, for instance test or test[:64]")
    data.add_argument("--eval_steps", type=float, default=100, help="steps between two evaluations of it")

    reward = parser.add_argument_group("reward")
    reward.add_argument(
        "--baselines_path", "--baselines", help="of compute_baselines_trl.py (default: each prompt's first completions)"
    )
    add_reward_flags(reward, "target", "extract", "template", "form", "weights", "reward_thresholds")
    reward.add_argument(
        "--per_level", action="store_true",
        help="three rewards over one cache, each normalised within its group (GDPO); --weights weigh them",
    )  # fmt: skip
    reward.add_argument(
        "--loop_penalty", type=float, default=LOOP_PENALTY, metavar="W",
        help="what loops and copies of the prompt cost, in ranges of the reward; with --per_level, one over the share "
        "that is vetoed; 0: nothing",
    )  # fmt: skip
    reward.add_argument("--allow_copies", action="store_true", help="do not penalise copying from the prompt")
    add_reward_flags(reward, "missing", "allow_baseline_mismatch")

    training = parser.add_argument_group("training (every other field of TRL's GRPOConfig is a flag, too)")
    training.add_argument("--config", help="YAML file of flags; those on the command line win")
    training.add_argument("--output_dir", default="output_grpo", help="adapter, tokenizer, checkpoints, report")
    training.add_argument("--num_train_epochs", type=float, default=1.0, help="passes over the prompts")
    training.add_argument("--per_device_train_batch_size", type=positive_int, default=4, help="in completions")
    training.add_argument("--gradient_accumulation_steps", type=positive_int, help="(default: the least that fits)")
    training.add_argument("--num_generations", type=positive_int, help="completions a prompt (default: 8 if it fits)")
    add_sampling_flags(training)
    training.add_argument("--learning_rate", type=float, default=5e-5, help="peak")
    training.add_argument("--lora_r", type=positive_int, default=16, help="rank of the adapter")
    training.add_argument("--lora_alpha", type=positive_int, default=16, help="scale of the adapter")
    training.add_argument("--logging_steps", type=float, default=10, help="steps between log lines")
    training.add_argument("--save_steps", type=float, default=500, help="steps between checkpoints")
    training.add_argument("--seed", type=seed, default=DEFAULT_SEED, help="random seed")
    training.add_argument("--wandb_project", help="log to this project of Weights & Biases")
    training.add_argument(
        "--report_to", nargs="+", choices=REPORTERS,
        help="where logs go (default: wandb with --wandb_project; without one, nothing is sent anywhere)",
    )  # fmt: skip
    training.add_argument("--run_name", help="name of the run")
    training.add_argument(
        "--resume_from_checkpoint", nargs="?", const=LATEST, metavar="PATH",
        help="go on with this checkpoint, without PATH with the newest in --output_dir",
    )  # fmt: skip


def add_baseline_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of compute_baselines_trl.py."""
    parser.add_argument("--config", help="YAML file of flags, the training's too; those on the command line win")
    parser.add_argument("--output_path", default="baselines.pkl", help="file to make: .pkl or .json")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there under that name")
    parser.add_argument("--output_dataset", metavar="DIR", help="also write the data set with the baselines as columns")
    parser.add_argument("--plot", metavar="OUT.png", help="also draw the distribution of the three levels")
    add_reward_flags(parser, "target", "template")
    parser.add_argument("--num_samples", type=positive_int, help="only the first rows with text (default: all)")
    parser.add_argument(
        "--batch_size", type=positive_int, help="most texts in one forward pass (default: as many as fit)"
    )
    own = parser.add_argument_group("baselines of the model's own writing (sampled as in training: the same flags)")
    own.add_argument(
        "--generate", type=positive_int, metavar="N", help="sample N completions a prompt and take their mean"
    )
    add_sampling_flags(own)
    own.add_argument("--seed", type=seed, default=DEFAULT_SEED, help="of the sampling")
    add_server_flag(parser)
    parser.add_argument("--streaming", action="store_true", help="read the data set as it is scored, and keep no copy")
    add_model_flags(parser)
    add_unsloth_flags(parser)
    add_data_flags(parser)
    add_prompt_flags(parser)
    add_definition_flags(parser)


def flags_of(add: Callable[[argparse.ArgumentParser], None]) -> set[str]:
    """The flags that `add_training_flags` or `add_baseline_flags` adds."""
    made = argparse.ArgumentParser(add_help=False)
    add(made)
    return set(made._option_string_actions)


def grpo_fields() -> set[str]:
    """The names of GRPOConfig's fields, its parents' too, as the installed TRL and transformers have them.

    Read from their source, since importing them takes seconds.
    """
    names = set()
    for package, *parts in (("trl", "trainer", "grpo_config.py"), ("trl", "trainer", "base_config.py"),
                            ("transformers", "training_args.py")):  # fmt: skip
        folder = importlib.util.find_spec(package).submodule_search_locations[0]
        tree = ast.parse(Path(folder, *parts).read_text(encoding="utf-8"))
        for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            names |= {ast.unparse(line.target) for line in node.body if isinstance(line, ast.AnnAssign)}
    return names


def column_options(args: argparse.Namespace) -> tuple:
    """What `ppl.data.find_columns` takes after the columns' names."""
    return args.prompt_column, args.reference_column, args.id_column, args.prompt_sentences is not None


def prompt_form(args: argparse.Namespace) -> PromptForm:
    """What `add_prompt_flags` and --language say of prompts. Raises `InputError` if it makes no sense."""
    form = PromptForm(*(getattr(args, name) for name in PromptForm._fields))
    form.check()
    return form


def chat_options(args: argparse.Namespace) -> dict:
    """The keywords of `ppl.prompts.render_prompt` that `add_prompt_flags` sets. Raises `InputError` for a bad file."""
    if args.chat_template_path is not None:
        read_template(args.chat_template_path)
    return {"chat_template_kwargs": args.chat_template_kwargs, "tools": read_tools(args.tools)}


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r}, expected a JSON object such as {{"enable_thinking": false}}')
    return value


def positive_int(text: str) -> int:
    return _whole(text, 1, 10**9)


def window(text: str) -> int:
    return _whole(text, 2, 10**9)  # one token, and the one it predicts


def seed(text: str) -> int:
    return _whole(text, 0, 2**32 - 1)  # what NumPy takes


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0")
    return value


def _whole(text: str, least: int, most: int) -> int:
    if not text.strip().isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least {least}, at most {most:,}")
    return int(text)


def run(args: argparse.Namespace, body: Callable[[argparse.Namespace], int]) -> int:
    """The exit code of `body(args)`; 2 and one line on stderr if the input is at fault, 130 after Ctrl-C.

    In a notebook that line is a `CellError`.
    """
    # No progress bars of libraries between the lines of a report; our own long work shows its own.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # What goes wrong is one line of ours, not also one for each time that the hub was asked.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    # A terminal that lacks a sign is shown its number instead.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
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


# --- notebooks -------------------------------------------------------------------------------------------------------

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


def script_name(default: str) -> str:
    """The script that this process was started with; `default` in a notebook, whose kernel is none of ours."""
    return default if _of_the_kernel() else sys.argv[0]


def _of_the_kernel() -> bool:
    """Whether the command line is the kernel's: a script that `%run` starts has one of its own."""
    return in_kernel() and sys.argv[1:] == sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1 :]
