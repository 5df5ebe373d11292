"""A run's settings on the command line and in a YAML file: read, checked by name, and written beside the model."""

import argparse
import ast
import difflib
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from ..errors import InputError
from ..files import write_text

CONFIG_FILE = "training_config.yaml"
NAMESAKES = ("debug",)  # our flags whose name GRPOConfig gives to something else
_NOT_KEPT = ("debug", "config", "resume_from_checkpoint")  # of one call, not of the run
_OF_THE_MACHINE = ("bf16", "fp16", "use_cpu")  # told in the file, chosen again where it is used


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(the flags of `parser`, the other words: flags of GRPOConfig), those of `--config FILE` filled in.

    Ends the process with one line for a name that is neither, before anything heavy is imported.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    try:
        if file := _config_file(argv):
            argv = config_words(file, actions) + argv
        # argparse would take the threshold -50:0 for a flag; with a space in front it does not.
        args, rest = parser.parse_known_args(
            [f" {word}" if re.match(r"-(\d|\.|inf|nan)[^\s:]*:", word) else word for word in argv]
        )
        check_names([word for word in rest if word.startswith("--")], actions)
        if rest and not rest[0].startswith("--"):
            raise InputError(f"{rest[0]!r} belongs to no flag: see --help")
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    return args, rest


def _config_file(argv: Sequence[str]) -> str | None:
    """What `--config` names; None without it, and without a name, of which argparse tells. Raises `InputError` for
    several."""
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--config", nargs="?", action="append", default=[])
    files = only.parse_known_args(argv)[0].config
    if len(files) > 1:
        raise InputError(f"--config is given {len(files)} times, {' and '.join(map(str, files))}: expected one file")
    return files[0] if files else None


def config_words(path: str, actions: Mapping[str, argparse.Action]) -> list[str]:
    """The YAML mapping in the file as words of a command line.

    A list is several values, pairs in it are thresholds, a mapping is JSON, null is left out. Raises `InputError` for
    a file or a name that is none.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: {' '.join(str(error).split())}: expected a YAML file of flags") from error
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: expected 'name: value' lines, found {settings!r:.80}")
    if "config" in settings:
        raise InputError(f"--config {path}: config is {settings['config']!r}, but a file names no other: leave it out")
    check_names([f"--{name}" for name in settings], actions, f"--config {path}: ")
    words = []
    for name, value in settings.items():
        flag, action = f"--{name}", actions.get(f"--{name}")
        if value is None:
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


def write_config(path: Path, ours: Mapping, asked: Mapping, defaults: Mapping) -> None:
    """Write every setting of a run as a YAML file that `--config` reads.

    ours: our flags. asked, defaults: GRPOConfig's fields as they were asked for, and as they are otherwise
    (`ppl.training.config`).
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
