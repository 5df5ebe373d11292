"""What MkDocs does here. Its pages are the repository's Markdown files under their own paths, so that their links and
pictures also work on a git host; files of other kinds that they link to become pages that show them. Two pages are
made of the code: all flags, and Python."""

import argparse
import contextlib
import importlib
import inspect
import json
import posixpath
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parent.parent

FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")
AS_THEY_ARE = (".css", ".md", ".png")


def on_config(config):
    sys.path.insert(0, str(ROOT / "rl_training" / "examples"))


def on_files(files, config):
    from mkdocs.structure.files import File

    for file in list(files):
        if file.src_dir == config.docs_dir:  # docs/ comes back under its path in the repository
            files.remove(file)
    made = {"flags.md": flags_page, "api.md": api_page}
    pages = [path for entry in config.nav for path in entry.values() if path not in made]
    paths = {"docs/pages.css", *pages, *(path for page in pages for path in linked(page))}
    for path in sorted(path for path in paths if (ROOT / path).exists()):  # of others MkDocs says that they are missing
        if path.endswith(AS_THEY_ARE):
            files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
        else:
            files.append(File.generated(config, f"{path}.md", content=shown(path)))
    for path, content in made.items():
        files.append(File.generated(config, path, content=content()))
    return files


def on_page_markdown(markdown, page, **_):
    """Python-Markdown wants four spaces and blank lines around what is in a list item, and no escape of | in code."""
    parts = FENCED.split(markdown)
    for index in range(0, len(parts), 2):
        prose = re.sub(r"^  (?=\S)", "    ", parts[index], flags=re.MULTILINE)
        prose = re.sub(r"(\n(?:\n    .*)+)(?=\n- )", r"\1\n", prose)
        prose = re.sub(r"`[^`\n]+`", lambda code: code[0].replace(r"\|", "|"), prose)
        parts[index] = LINK.sub(lambda link: f"]({_page_of(page.file.src_uri, link[1])}{link[2] or ''})", prose)
    return "".join(parts)


def linked(page: str) -> Iterator[str]:
    """The paths in the repository that one of its pages links to."""
    for prose in FENCED.split((ROOT / page).read_text(encoding="utf-8"))[::2]:
        for link in LINK.finditer(prose):
            yield posixpath.normpath(posixpath.join(posixpath.dirname(page), link[1]))


def _page_of(page: str, target: str) -> str:
    """What a link of that page leads to here."""
    shows = not target.endswith(AS_THEY_ARE) and (ROOT / page).parent.joinpath(target).exists()
    return f"{target}.md" if shows else target


def shown(path: str) -> str:
    """A page that shows a file, or says what is in a folder. Search leaves it out."""
    there = ROOT / path
    if there.is_dir():
        text = "\n".join(f"- `{one.name}`" for one in sorted(there.iterdir()) if one.name[0] not in "._")
    elif there.suffix == ".ipynb":
        cells = json.loads(there.read_text(encoding="utf-8"))["cells"]
        sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
        text = "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in sources)
    else:
        text = f"```{there.suffix[1:]}\n{there.read_text(encoding='utf-8')}\n```"
    return f"---\ntitle: {there.name}\nsearch: {{exclude: true}}\n---\n\n# `{path}`\n\n{text}\n"


# --- all flags --------------------------------------------------------------------------------------------------------

# By the names that the page has for them. The first one that has a flag says in which group it stands.
SCRIPTS = {
    "train": "train_grpo_multilevel_unsloth",
    "baselines": "compute_baselines_trl",
    "score": "multi_level_ppl_trl",
    "check": "test_multilevel_ppl_trl",
}
FLAGS = """# All flags

The scripts are {scripts}. Beside a flag stand

- its default, and the scripts that have it;
- **YAML**: its names in a file. Such files are those of `--config`, which train and baselines read, and those that
  `PPL_REWARD_CONFIG` names, for [other programs](rl_training/examples/engines/README.md);
- **Python**: the keyword of [`MultiLevelPPLRewardFunction`](api.md), or the field of TRL's `GRPOConfig`.

What they do together is in [the guide](MULTILEVEL_PPL_GUIDE.md#settings)."""


class Flag(NamedTuple):
    """What one flag is in `scripts`; in others it may have another help or default."""

    takes: str
    default: str
    help: str
    yaml: str
    python: str
    scripts: list[str]


def all_flags() -> dict[str, dict[tuple[str, ...], list[Flag]]]:
    """By group and by the flag's names, what it is in which scripts."""
    from mlppl.cli import grpo_fields
    from mlppl.config import RewardConfig
    from mlppl.reward.configured import NAMES
    from mlppl.reward.function import MultiLevelPPLRewardFunction

    keywords = {*inspect.signature(MultiLevelPPLRewardFunction).parameters, *(one.name for one in fields(RewardConfig))}
    of_trl = {name: f"GRPOConfig.{name}" for name in grpo_fields() - {"debug"}}  # which is something else there
    of_trl["max_new_tokens"] = "GRPOConfig.max_completion_length"
    group_of: dict[tuple[str, ...], str] = {}
    found: dict[str, dict[tuple[str, ...], dict[tuple, Flag]]] = {}
    for script, module in SCRIPTS.items():
        parser = parser_of(module)
        for group in parser._action_groups:
            for action in group._group_actions:
                if argparse.SUPPRESS in (action.default, action.help):  # --help, and what is retired
                    continue
                names = tuple(name for name in action.option_strings if not name.startswith("--no-"))
                words = [name.removeprefix("--") for name in names]
                files = ["`--config`"] * (script in ("train", "baselines") and words != ["config"])
                files += ["`PPL_REWARD_CONFIG`"] * any(word in NAMES for word in words)
                python = [word for word in words if word in keywords] or [
                    of_trl[word] for word in words if word in of_trl
                ]
                flag = Flag(
                    takes=""
                    if action.nargs == 0
                    else parser._get_formatter()._format_args(action, action.dest.upper()),
                    default=_default(action),
                    help=action.help.replace("%%", "%"),
                    yaml=f"{_code(words)} in {' and '.join(files)}" if files else "",
                    python=_code(python),
                    scripts=[],
                )
                flags = found.setdefault(group_of.setdefault(names, group.title), {})
                flags.setdefault(names, {}).setdefault(flag[:3], flag).scripts.append(script)
    return {group: {names: [*one.values()] for names, one in flags.items()} for group, flags in found.items()}


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script makes."""
    made = []

    def stop(parser, *_):
        made.append(parser)
        raise SystemExit

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop), contextlib.suppress(SystemExit):
        importlib.import_module(script).parse_args([])
    return made[0]


def _default(action: argparse.Action) -> str:
    value = action.default
    if value is None or value == "":
        return "as above" if "default" in action.help else "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def _code(words: Sequence[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def flags_page() -> str:
    from mlppl.cli import grpo_fields

    found = all_flags()
    found["others"] = found.pop("options")  # what a script adds without a group
    lines = [FLAGS.format(scripts=", ".join(f"{script} (`{module}.py`)" for script, module in SCRIPTS.items()))]
    for group, flags in found.items():
        lines.append(f"## {group[0].upper()}{group[1:]}")
        for names, variants in flags.items():
            lines.append(f"### {_code(names)} {{ #{names[0].removeprefix('--')} }}")
            for flag in variants:
                facts = [f"Default: {flag.default}", ", ".join(flag.scripts)]
                facts += [f"YAML: {flag.yaml}"] * bool(flag.yaml) + [f"Python: {flag.python}"] * bool(flag.python)
                usage = f"`{names[0]} {flag.takes}`: " if flag.takes else ""
                text = re.sub(r"[\\`*_<\[]", r"\\\g<0>", flag.help)
                lines.append(f"{usage}{text}  \n{' · '.join(facts)}")
    ours = {name for flags in found.values() for names in flags for name in names}
    theirs = [name for name in sorted(grpo_fields()) if f"--{name}" not in ours]
    lines += ["## Fields of GRPOConfig", f"TRL {version('trl')} has these, and train a flag of each: {_code(theirs)}."]
    return "\n\n".join(lines) + "\n"


# --- Python -----------------------------------------------------------------------------------------------------------

API = """# Python

`multi_level_ppl_trl` has the first four names below, `mlppl` the others. What the fields of `RewardConfig` mean
is said of [the flags](flags.md) with their names.

{}
"""
OF_MLPPL = (
    "config.RewardConfig", "reward.configured.multi_level_ppl", "reward.loop_guard.loop_guard",
    "reward.loop_guard.loop_veto", "reward.loop_guard.copy_guard", "training.diagnostics.Diagnostics",
    "scoring.surprisal.Scorer", "scoring.server.connect",
)  # fmt: skip


def api_page() -> str:
    """What the plugin mkdocstrings makes of names and docstrings."""
    from multi_level_ppl_trl import _EXPORTS

    exported = [f"{module}.{name}" for name, module in _EXPORTS.items()]
    return API.format("\n\n".join(f"::: mlppl.{name}" for name in (*exported, *OF_MLPPL)))
