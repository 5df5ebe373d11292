"""What `pip install .` gives, outside of the checkout: a wheel beside the packages that it asks for, and no others."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "rl_training" / "examples"
NAME = "multilevel-ppl-rewards"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        EXAMPLES, folder / "source" / EXAMPLES.relative_to(ROOT), ignore=shutil.ignore_patterns("*.egg-info")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    [made] = folder.glob("*.whl")
    return made


def pip(*words) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def requirements(wheel: Path) -> list[Requirement]:
    folder = f"{wheel.name.partition('-py3')[0]}.dist-info/"
    return [Requirement(line) for line in metadata.PathDistribution(zipfile.Path(wheel, folder)).requires]


def installed(needs: list[Requirement], extras=(), found=None) -> dict[str, metadata.Distribution]:
    """The packages of this Python that these requirements ask for, and what those ask for in turn."""
    found = {} if found is None else found
    for need in needs:
        asked = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        key = (canonicalize_name(need.name), *need.extras)
        if asked and key not in found:
            try:
                one = metadata.distribution(need.name)
            except metadata.PackageNotFoundError:  # the libraries of another build of torch
                continue
            found[key] = one
            installed([Requirement(line) for line in one.requires or ()], need.extras, found)
    return found


def environment(folder: Path, wheel: Path, *extras: str) -> Path:
    """The bin of a virtual environment with the wheel and the packages that these extras ask for."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip("--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    [site] = folder.glob("lib/python*/site-packages")
    for one in installed(requirements(wheel), extras).values():
        for name in {file.parts[0] for file in one.files} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(one.locate_file(name))
    return folder / "bin"


def run(program: Path, *words, code: int = 0) -> subprocess.CompletedProcess:
    """A program in a folder of its own, as a shell starts it in which the environment is not activated."""
    here = program.parent.parent / "here"
    here.mkdir(exist_ok=True)
    names = {**os.environ, "OMP_NUM_THREADS": "1"}
    names.pop("PYTHONPATH", None)
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, cwd=here, env=names)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def base(tmp_path_factory, wheel) -> Path:
    return environment(tmp_path_factory.mktemp("base"), wheel)


def test_a_wheel_has_few_names_of_its_own_at_the_top_and_all_data(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    ours = {path.name for path in EXAMPLES.glob("*.py")} | {"mlppl", f"{wheel.name.partition('-py3')[0]}.dist-info"}
    assert {file.partition("/")[0] for file in files} == ours
    data = {path for folder in ("mlppl", "tiny_stories") for path in (EXAMPLES / folder).rglob("*.*")}
    data = {path.relative_to(EXAMPLES).as_posix() for path in data if path.suffix not in (".pyc", ".pyi")}
    assert {path.replace("tiny_stories/", "mlppl/tiny_stories/") for path in data} <= files


def test_a_text_is_scored_without_an_extra(base):
    shown = run(base / "mlppl-score", "--text", "Once upon a time.", "--html", "page.html").stdout
    assert re.search(r"sentence +[\d.]+ +1 +\d", shown)
    assert "Once" in (base.parent / "here" / "page.html").read_text(encoding="utf-8")
    assert "All tests passed" in run(base / "mlppl-test").stdout


def test_baselines_are_computed_without_an_extra(base):
    run(base / "mlppl-baselines", "--num_samples", "3", "--output_path", "own.json", "--plot", "own.png")
    assert len(json.loads((base.parent / "here" / "own.json").read_text())) == 3


def test_the_reward_is_imported_in_a_foreign_folder(base):
    code = (
        "from mlppl.models import load_model\n"
        "from multi_level_ppl_trl import MultiLevelPPLRewardFunction\n"
        "reward = MultiLevelPPLRewardFunction(*load_model('tiny-stories')[:2], aggregation='nested', form='nats')\n"
        "print(len(reward(prompts=['One day'] * 2, completions=[' a dog ran.', ' dog dog a.'])))"
    )
    assert run(base / "python", "-c", code).stdout == "2\n"


def test_a_missing_package_is_named_in_one_line_with_its_extra(base):
    def told(*words) -> str:
        [line] = run(base / words[0], *words[1:], code=2).stderr.splitlines()
        return line

    folder = base.parent / "here" / "adapter"
    shutil.copytree(EXAMPLES / "tiny_stories", folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "."}')
    remedy = f": pip install '{NAME}[train]'"
    assert told("mlppl-train", "--beta", "0.1", "--output_dir", "out").endswith(f" has no package trl{remedy}")
    assert told("mlppl-train", "--output_dir", "out").endswith(f" has no package trl{remedy}")
    assert told("mlppl-score", "--model_name", folder, "--text", "A fox.").endswith(f" has no package peft{remedy}")
    assert "requires bitsandbytes: `pip install" in told("mlppl-score", "--text", "A fox.", "--load_in_4bit")


@pytest.mark.slow
def test_training_needs_no_unsloth(tmp_path, wheel):
    programs = environment(tmp_path, wheel, "train")
    assert run(programs / "python", "-c", "import unsloth", code=1)
    flags = ["--max_steps", "2", "--max_new_tokens", "8", "--max_samples", "8", "--heldout_samples", "2"]
    shown = run(programs / "mlppl-train", *flags, "--output_dir", "out").stdout
    assert "No module named 'unsloth'" in shown
    out = tmp_path / "here" / "out"
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8") and (out / "adapter_model.safetensors").exists()
    run(programs / "mlppl-score", "--model_name", "out", "--adapter", "on", "--text", "Once upon a time.")


@pytest.mark.parametrize("file", ["requirements-cpu.txt", "requirements-smollm2.txt", "Makefile"])
def test_the_pins_lie_in_the_ranges(file, wheel):
    """The Makefile's are the newest known to work, which are for those without Unsloth."""
    ranges = {canonicalize_name(one.name): one for one in requirements(wheel)}
    pins = re.findall(r"([\w-]+)==([\w.]+)", re.sub(r"(?m)^#.*", "", (ROOT / file).read_text(encoding="utf-8")))
    found = [(name, pin) for name, pin in pins if canonicalize_name(name) in ranges]
    assert len(found) >= {"requirements-cpu.txt": 18, "requirements-smollm2.txt": 1, "Makefile": 3}[file]
    for name, pin in found:
        assert ranges[canonicalize_name(name)].specifier.contains(pin), f"{name}=={pin}"


def test_every_package_that_is_imported_is_asked_for(wheel):
    """But those that a setting or launcher asks for by name, those of a notebook, and what comes with one of these."""
    optional = {"wandb", "trackio", "deepspeed", "IPython"}
    brought = {  # by which
        "huggingface_hub": "transformers", "safetensors": "transformers", "tokenizers": "transformers",
        "yaml": "transformers", "markupsafe": "jinja2", "pandas": "datasets", "pyarrow": "datasets",
        "requests": "datasets",
    }  # fmt: skip
    asked = {canonicalize_name(one.name) for one in requirements(wheel)}
    ours = {path.stem for path in EXAMPLES.glob("*.py")} | {"mlppl"}
    for path in [*EXAMPLES.glob("*.py"), *(EXAMPLES / "mlppl").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - ours - optional:
                assert canonicalize_name(brought.get(name, name)) in asked, f"{path.name} imports {name}"
