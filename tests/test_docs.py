"""Every command and snippet of README, guide and engines/README.md, as it stands there.

They run in a copy of the project where folders stand under the names that the documents use for models and data sets on
the hub: `gpt2`, `unsloth/llama-3-8b-bnb-4bit`, `your/dataset`, `wikitext`.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warm
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from waiting import PATIENCE

from mlppl.scoring.levels import level_perplexities
from mlppl.scoring.units import segment

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name: str) -> list[tuple[str, str]]:
    return FENCE.findall((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def playground(tmp_path_factory) -> Path:
    """A copy of the examples, with models and data under the documents' names beside the scripts."""
    examples = tmp_path_factory.mktemp("clone") / "rl_training" / "examples"
    ignored = shutil.ignore_patterns("__pycache__", "output*", "*.pkl*")
    shutil.copytree(ROOT / "rl_training" / "examples", examples, ignore=ignored)
    stories = json.loads((examples / "tiny_stories" / "train.json").read_text())
    llama = examples / "unsloth" / "llama-3-8b-bnb-4bit"
    shutil.copytree(examples / "tiny_stories", llama, ignore=shutil.ignore_patterns("*.py", "train.json", "test.json"))
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.save_pretrained(examples / "gpt2")
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=1)).save_pretrained(examples / "gpt2")
    rows = [{"prompt": story["prompt"], "completion": story["completion"]} for story in stories[:6]]
    write_rows(examples / "your" / "dataset" / "train.json", rows)
    texts = [*(story["completion"] for story in stories[:5]), ""]
    write_rows(examples / "wikitext" / "test.json", [{"text": text} for text in texts])
    return examples


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(map(json.dumps, rows)))


def run(command: list[str], cwd: Path) -> str:
    folders = [str(Path(python).parent) for python in (warm.python(), sys.executable)]
    environment = {**os.environ, "PATH": os.pathsep.join([*folders, os.environ["PATH"]]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


ENGINES = "rl_training/examples/engines/README.md"


@pytest.mark.parametrize("name", ["README.md", "MULTILEVEL_PPL_GUIDE.md", ENGINES])
def test_every_command_and_snippet_runs(playground, name):
    found = [block for block in blocks(name) if "smollm2" not in block[1]]  # which a test below runs
    assert len(found) >= 2
    for made_by_another in playground.glob("output*/heldout.json"):  # documents may share names
        shutil.rmtree(made_by_another.parent)
    run_blocks(found, playground)


@pytest.mark.smollm2
def test_every_command_with_smollm2_runs(playground):
    found = [block for block in blocks("MULTILEVEL_PPL_GUIDE.md") if "smollm2" in block[1]]
    assert found
    run_blocks(found, playground)


def run_blocks(found: list[tuple[str, str]], playground: Path) -> None:
    for kind, text in found:
        if kind == "bash":
            folder = playground.parent.parent if "cd rl_training" in text else playground
            run(["bash", "-euo", "pipefail", "-c", text], folder)
        else:
            run([warm.python(), "-c", text], playground)


def test_the_example_by_hand_is_what_the_code_computes():
    text = "The cat, however, sat down. It slept."
    tokens = ["The", " cat", ",", " however", ",", " sat", " down", ".", " It", " slept", "."]
    bits = np.array([2, 3, 1, 4, 1, 3, 2, 1, 2, 4, 1])
    starts = np.cumsum([0, *map(len, tokens)])[:-1]
    chars = np.array([start + token.startswith(" ") for start, token in zip(starts, tokens, strict=True)])
    word, phrase, sentence = level_perplexities(segment([text]), [chars], [bits * math.log(2)])[0]
    assert (round(word, 2), round(phrase, 2), round(sentence, 2)) == (4.64, 4.62, 4.69)
    design = (ROOT / "docs" / "DESIGN.md").read_text(encoding="utf-8")
    for number in ("**4.64**", "**4.62**", "**4.69**", "4.54"):
        assert number in design
    assert round(2 ** (bits.sum() / len(bits)), 2) == 4.54


def test_readme_and_maps_name_every_module():
    """The README names the scripts and the wings' maps; a map names what is in its folder."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = ROOT / "rl_training" / "examples"
    for path in [*examples.glob("*.py"), *(examples / "engines").glob("*.py")]:
        assert re.search(rf"\b{re.escape(path.name)}\b", readme), f"the README does not name {path.name}"
    for folder in [examples / "mlppl", *(path.parent for path in (examples / "mlppl").glob("*/__init__.py"))]:
        assert f"({folder.relative_to(ROOT)}/__init__.py)" in readme
        text = (folder / "__init__.py").read_text(encoding="utf-8")
        for path in folder.glob("*.*"):
            if path.name not in ("__init__.py", "__pycache__"):
                assert re.search(rf"\b{re.escape(path.stem)}\b", text), f"the map of {folder.name} lacks {path.name}"


DOCUMENTS = [
    "README.md", "CONTRIBUTING.md", "MULTILEVEL_PPL_GUIDE.md", "docs/DESIGN.md", "benchmarks/README.md",
    "studies/README.md", ENGINES,
]  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, heading = target.partition("#")
            there = (ROOT / name).parent / path if path else ROOT / name
            assert there.exists() and (not heading or heading in headings(there)), target


def headings(path: Path) -> set[str]:
    """As links name them."""
    lines = [line.lstrip("# ").lower() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    return {re.sub(r"[^a-z0-9_ -]", "", line).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("name", ["README.md", "MULTILEVEL_PPL_GUIDE.md", "studies/README.md"])
def test_every_picture_is_there(name):
    paths = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert paths
    for path in paths:
        assert ((ROOT / name).parent / path).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", path
