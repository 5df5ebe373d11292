"""The page of all flags that `make docs` makes has each flag of each script, as its own --help has it; and CITATION.cff
names this version."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import yaml
from trl import GRPOConfig

from mlppl.config import RewardConfig
from mlppl.reward.configured import read_settings
from mlppl.reward.function import MultiLevelPPLRewardFunction
from mlppl.training.settings import config_words

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "rl_training" / "examples"


@cache
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def sections() -> dict[str, str]:
    """What the page says of each flag, by each of its names."""
    parts = re.split(r"^### (.*) \{ #.* \}\n", hooks().flags_page(), flags=re.MULTILINE)
    headings, texts = parts[1::2], (part.partition("\n## ")[0] for part in parts[2::2])
    return {flag: text for heading, text in zip(headings, texts, strict=True) for flag in re.findall(r"--\w+", heading)}


def flags_of(script: str) -> dict[str, str]:
    """By flag, the rest of what --help says of it."""
    environment = {**os.environ, "COLUMNS": "10000"}
    command = [sys.executable, EXAMPLES / f"{script}.py", "--help"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    entries = re.findall(r"^  (--.*?)(?: {2,}|\n {4,})(.*)$", text, re.MULTILINE)
    return {flag: help for usage, help in entries for flag in re.findall(r"(?:^|, )(--\w+)(?![\w-])", usage)}


# What they are, whatever the parsers say.
KNOWN = {
    "train_grpo_multilevel_unsloth": {
        "--learning_rate": "5e-05", "--max_new_tokens": "128", "--reward_form": "thresholds", "--temperature": "1.0",
        "--loop_penalty": "20.0", "--levels": "word phrase sentence", "--dataset_name": "tiny-stories",
    },
    "compute_baselines_trl": {"--output_path": "baselines.pkl", "--aggregation": "geometric", "--top_k": "0"},
    "multi_level_ppl_trl": {"--model_name": "tiny-stories", "--language": "en"},
    "test_multilevel_ppl_trl": {"--dtype": "auto"},
}  # fmt: skip


@pytest.mark.parametrize("script", KNOWN)
def test_each_flag_of_a_script_is_on_the_page_with_its_default(script):
    flags = flags_of(script)
    assert len(flags) >= 5 and "--debug" in flags
    [name] = [name for name, module in hooks().SCRIPTS.items() if module == script]
    for flag, help in flags.items():
        [facts] = [line for line in sections()[flag].splitlines() if re.match(rf"Default: .* · (\w+, )*{name}\b", line)]
        if default := re.search(r"\(default: ([^()]*)\)$", help):
            assert f"Default: `{default[1]}` ·" in facts or "Default: as above" in facts, flag
    for flag, default in KNOWN[script].items():
        assert flag in flags and f"Default: `{default}` ·" in sections()[flag], flag


def test_no_flag_is_on_the_page_that_no_script_has():
    assert {*sections()} == {flag for script in KNOWN for flag in flags_of(script)}


def names_after(pattern: str) -> list[str]:
    found = [re.findall(r"`([\w.]+)`", names) for text in sections().values() for names in re.findall(pattern, text)]
    return [name for names in found for name in names]


def test_a_file_of_flags_may_have_each_name_that_the_page_says(tmp_path):
    for script in ("train", "baselines"):
        names = names_after(rf" · (?:\w+, )*{script}\b.* · YAML: (.*?) in `--config`")
        assert len(names) > 30
        actions = hooks().parser_of(hooks().SCRIPTS[script])._option_string_actions
        path = tmp_path / f"{script}.yaml"
        path.write_text(yaml.safe_dump(dict.fromkeys(names)))
        assert config_words([str(path)], actions, set()) == []  # none is unknown, and null stands for the default


def test_a_file_for_other_programs_may_have_each_name_that_the_page_says(tmp_path):
    names = names_after(r"YAML: (.*?) in .*`PPL_REWARD_CONFIG`")
    assert {"form", "reward_form", "baselines", "others", "device", "model_name"} <= {*names}
    path = tmp_path / "reward.yaml"
    path.write_text(yaml.safe_dump({**dict.fromkeys(names), "model_name": "tiny-stories"}))
    assert read_settings(path) == {"model_name": "tiny-stories"}


def test_python_has_each_name_that_the_page_says():
    names = names_after(r"Python: (.*)")
    of_trl = {name.removeprefix("GRPOConfig.") for name in names if name.startswith("GRPOConfig.")}
    assert {"temperature", "max_completion_length"} <= of_trl <= {one.name for one in fields(GRPOConfig)}
    ours = {name for name in names if not name.startswith("GRPOConfig.")}
    settings = ours - {*inspect.signature(MultiLevelPPLRewardFunction).parameters}
    assert {"form", "levels", "target"} <= settings and "baselines" in ours
    RewardConfig.of(dict.fromkeys(settings))  # raises for a name that is none


def test_the_citation_names_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in project and f'license = "{citation["license"]}"' in project
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(f"# {citation['title']}\n")


def test_the_papers_that_the_readme_names_are_in_the_paper_index():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    papers = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
    rows = re.findall(r"(\w[\w-]*) \((?:arXiv )?(\d{4}\.\d{5})\)", readme)
    assert {name for name, _ in rows} == {"VR-CLI", "RLPR", "VeriFree", "NOVER", "JEPO", "CPMI", "MIPO"}
    for name, paper in rows:
        assert f"https://arxiv.org/abs/{paper}" in papers and name in papers, name
