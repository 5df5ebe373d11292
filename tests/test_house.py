"""The rules of the house: which wing imports which, that a wing's map names what is there, that --help is instant."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PPL = Path(__file__).parent.parent / "rl_training" / "examples" / "mlppl"
ROOT = "the root"
# What a wing may import beside itself and the root; the root imports no wing.
ALLOWED = {
    ROOT: set(),
    "scoring": set(),
    "baselines": {"scoring"},
    "reward": {"scoring", "baselines"},
    "training": {"scoring", "baselines", "reward"},
    "pages": {"scoring", "baselines", "reward", "training"},
}
FILES = sorted(PPL.rglob("*.py"))


def room(path: Path) -> str:
    """The wing that a module is of, or the root."""
    parts = path.relative_to(PPL).parts
    return parts[0] if len(parts) > 1 else ROOT


def imported(path: Path) -> set[Path]:
    """The modules of mlppl that one imports, also within its functions and under `if TYPE_CHECKING`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = ["mlppl", *path.relative_to(PPL).parts]
            start = ".".join(folder[: len(folder) - node.level]) if node.level else ""
            module = ".".join(filter(None, [start, node.module]))
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            top, *parts = name.split(".")
            if top == "mlppl":
                found |= {
                    module
                    for module in (PPL.joinpath(*parts).with_suffix(".py"), PPL.joinpath(*parts, "__init__.py"))
                    if module.exists()
                }
    return found


def rooms_imported(path: Path) -> set[str]:
    return {room(one) for one in imported(path)} - {ROOT, room(path)}


def test_the_imports_are_seen():
    """Known in advance, so that the rule below does not hold for want of looking."""
    assert rooms_imported(PPL / "reward" / "function.py") == {"scoring", "baselines"}
    assert PPL / "scoring" / "surprisal.py" in imported(PPL / "reward" / "function.py")
    assert PPL / "baselines" / "safe_pickle.py" in imported(PPL / "baselines" / "file.py")  # from . import ...
    assert PPL / "processes.py" in imported(PPL / "gguf.py")  # within a function
    assert PPL / "cli.py" in imported(PPL / "training" / "settings.py")  # from .. import ...
    assert {room(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PPL)))
def test_a_wing_imports_only_the_wings_below_it(path):
    forbidden = rooms_imported(path) - ALLOWED[room(path)]
    assert not forbidden, f"{path.relative_to(PPL)} imports {', '.join(sorted(forbidden))}"


def test_the_flags_of_a_run_end_in_its_job():
    """What reads a job has its settings by name, and no argparse.Namespace."""
    for path in FILES:
        if room(path) in ("training", "pages") and path.name not in ("settings.py", "job.py"):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            of_jobs = {
                node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "job"
            }
            assert "args" not in of_jobs, path
            assert not [node for node in nodes if isinstance(node, ast.Import) and node.names[0].name == "argparse"], (
                path
            )


def test_no_module_imports_a_script():
    scripts = {path.stem for path in PPL.parent.glob("*.py")}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not scripts & {name.partition(".")[0] for name in names}, path


def test_scoring_imports_no_page_before_one_is_asked_for():
    """A page needs libraries that scoring does not."""
    code = "import sys, mlppl.scoring.calculator; print('mlppl.scoring.heatmap' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PPL.parent)
    assert done.stdout.strip() == "False", done.stderr


def test_no_import_comes_back_to_where_it_began():
    """A circle of imports is one concern in two files."""
    arrows = {path: imported(path) for path in FILES}
    while leaves := [path for path, to in arrows.items() if not to & set(arrows)]:
        for path in leaves:
            del arrows[path]
    assert not arrows, sorted(str(path.relative_to(PPL)) for path in arrows)


@pytest.mark.parametrize("wing", [".", *sorted(set(ALLOWED) - {ROOT})])
def test_a_map_names_every_file_of_its_wing_and_no_other(wing):
    folder = PPL / wing
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    named = set(re.findall(r"^(\w+\.py) ", text, flags=re.MULTILINE))
    assert named == {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    if wing == ".":
        assert set(re.findall(r"^(\w+)/ ", text, flags=re.MULTILINE)) == set(ALLOWED) - {ROOT}


def test_a_map_imports_nothing():
    for path in PPL.rglob("__init__.py"):
        assert not imported(path), path


def test_files_are_written_in_one_place():
    """`open` for writing, `os.replace` and the like stand in files.py; what stands elsewhere is named here."""
    writers = {
        PPL / "baselines" / "job.py": {"replace"},  # files that are whole already get their names
        PPL / "baselines" / "parts.py": {"open"},  # the lock, which a process keeps open
        PPL / "training" / "policy.py": {"replace"},  # a folder
        PPL / "gguf.py": {"replace"},  # a folder
    }
    for path in FILES:
        calls = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function, modes = node.func, [one.value for one in node.args[1:] if isinstance(one, ast.Constant)]
            if isinstance(function, ast.Name) and function.id == "open" and set("wax+") & set("".join(modes[:1])):
                calls.add("open")
            if isinstance(function, ast.Attribute):
                of_os = isinstance(function.value, ast.Name) and function.value.id == "os"
                if function.attr in ("write_text", "write_bytes", "rename") or (of_os and function.attr == "replace"):
                    calls.add(function.attr)
        if path != PPL / "files.py":
            assert calls == writers.get(path, set()), path


@pytest.mark.parametrize("module", ["mlppl.training.job", "mlppl.baselines.job"])
def test_unsloth_can_come_first(module):
    """It patches trl, transformers and peft, so what runs before it is imported must not import them."""
    code = f"import sys, {module}; print({{'trl', 'transformers', 'peft'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PPL.parent)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


@pytest.mark.parametrize("flags", [[], ["--levels", "word", "prompt", "--aggregation", "nested"], ["--examples", "1"]])
def test_a_job_is_read_before_unsloth_is_imported_and_imports_nothing_that_it_patches(flags, tmp_path):
    baselines = {"train-001": dict.fromkeys(("word", "phrase", "sentence", "prompt"), 9.0)}
    (tmp_path / "b.json").write_text(json.dumps(baselines))
    (tmp_path / "b.json.meta.json").write_text(json.dumps({"definitions": {"aggregation": "nested"}}))
    words = ["--max_samples", "20", "--output_dir", "out", "--baselines_path", "b.json", "--missing", "skip", *flags]
    words += ["--allow_baseline_mismatch"] if "--levels" not in flags else []
    code = f"""
import sys
import train_grpo_multilevel_unsloth as script
from mlppl.training import job
def import_unsloth():
    print({{"trl", "transformers", "peft"}} & set(sys.modules))
    sys.exit()
job.import_unsloth = import_unsloth
args, rest = script.parse_args({words})
try:
    job.Job(args, rest, [], script.prepare_dataset)
except ValueError as error:
    assert "levels" in str(error)
    print({{"trl", "transformers", "peft"}} & set(sys.modules))
"""
    environment = {**os.environ, "PYTHONPATH": str(PPL.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


SCRIPTS = ["test_multilevel_ppl_trl", "multi_level_ppl_trl", "compute_baselines_trl", "train_grpo_multilevel_unsloth"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_instant(script):
    """It imports no library that takes time; how long that is depends on the machine."""
    command = [sys.executable, "-X", "importtime", PPL.parent / f"{script}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--model_name" in done.stdout
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert {"mlppl", "argparse"} <= names
    slow = {"numpy", "torch", "transformers", "datasets", "trl", "peft", "unsloth", "pandas", "matplotlib", "sentencex"}
    assert not names & slow


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_the_packages_is_told_in_one_line(script):
    """-S leaves out the folder of installed packages, as the system's Python has none of them."""
    done = subprocess.run([sys.executable, "-S", "-E", PPL.parent / f"{script}.py"], capture_output=True, text=True)
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .* has no package \w+: .*/\.venv/bin/activate` .*", line)


def test_a_package_that_is_missed_later_is_told_in_one_line_too(tmp_path):
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError(\"No module named 'rich'\", name='rich')")
    command = [sys.executable, PPL.parent / "multi_level_ppl_trl.py", "--text", "A fox."]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and " has no package rich: " in line
    done = subprocess.run([*command, "--debug"], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("flags", [[], ["--no_unsloth"]])
def test_nothing_but_our_line_is_printed_until_a_model_is_there(flags):
    """In a fresh process, with what libraries print when they are imported."""
    code = (
        "import sys, logging, warnings\n"
        "from mlppl.models import import_unsloth, load_model, where\n"
        "unsloth = not sys.argv[1:]\n"
        "assert not unsloth or import_unsloth() is None\n"
        "model, *_ = load_model('tiny-stories', load_in_4bit=True, unsloth=unsloth)\n"
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('Failed to load CPU gemm_4bit_forward')\n"
        "warnings.warn('IProgress not found. Please update jupyter')\n"
        "print(where('tiny-stories', model))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, cwd=PPL.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.stdout == "tiny-stories on cpu: dtype = float32, 4-bit = True\n", done.stdout
    assert done.stderr == ""
