"""In a notebook: the notebook of the examples in a real kernel, scripts called there, results that show themselves."""

import html
import json
import math
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
import toys
from chromium import Chromium
from nbclient import NotebookClient
from packaging.requirements import Requirement
from waiting import PATIENCE

from mlppl import cli
from mlppl.config import LEVELS
from mlppl.scoring.calculator import MultiLevelPPLCalculator
from mlppl.scoring.heatmap import Framed, number

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "rl_training" / "examples"
NOTEBOOK = EXAMPLES / "multi_level_ppl.ipynb"
# The settings for data of one's own, run at toy size after the rest; and what else is tried in the same kernel.
OWN = {
    'DATA = "tiny-stories"': 'DATA = "own.jsonl"',
    '"--max_new_tokens", "32"]': '"--max_new_tokens", "8", "--prompt_sentences", "2"]',
    'ROWS, STEPS = "80", "40"': 'ROWS, STEPS = "10", "2"',
    'OUTPUT = "output_notebook"': 'OUTPUT = "output_own"',
}
MORE = {
    "own.jsonl": 'lines = [json.dumps({"text": story["prompt"] + story["completion"]}) for story in stories[:10]]\n'
    'Path("own.jsonl").write_text("\\n".join(lines))',
    "its own files": "import mlppl\nprint(mlppl.__file__)",
    "without arguments": "from multi_level_ppl_trl import main as score\nscore()",
    "help": 'score(["--help"])',
    "a typo": 'score(["--texd", "x"])',
    "run": '%run multi_level_ppl_trl.py --text "The fox ran home."',
    "progress": "from transformers.trainer import DEFAULT_PROGRESS_CALLBACK\nprint(DEFAULT_PROGRESS_CALLBACK.__name__)",
    "async": "from mlppl.training.rewards import call_as_trl\n"
    "async def length(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    'print(*call_as_trl([length], ["a"], ["four"], [[1]], {}, None))',
}


# --- the notebook ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """What the notebook clones: a git repository of the examples."""
    folder = tmp_path_factory.mktemp("repository")
    ignored = shutil.ignore_patterns("__pycache__", "output*", "unsloth_compiled_cache")
    shutil.copytree(EXAMPLES, folder / "rl_training" / "examples", ignore=ignored)
    for words in ("init -q", "add .", "-c user.name=test -c user.email=test commit -q -m examples"):
        subprocess.run(["git", *words.split()], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The examples in the notebook's own clone, which is made in an empty folder, as on Colab."""
    return tmp_path_factory.mktemp("content") / "multilevel-ppl" / "rl_training" / "examples"


@pytest.fixture(scope="module")
def cells(folder, repository) -> dict[str, nbformat.NotebookNode]:
    """The cells by how they begin, run in one kernel with nothing but an address; behind them those of `MORE`, and the
    second half once more with data of one's own, their names with "own: " before them."""
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    install = next(cell for cell in notebook.cells if "REPOSITORY" in cell.source and cell.cell_type == "code")
    assert 'REPOSITORY = ""' in install.source and "    %pip install" in install.source
    install.source = install.source.replace('REPOSITORY = ""', f'REPOSITORY = "{repository}"')
    install.source = install.source.replace("    %pip install", "    # %pip install")  # the kernel has the packages
    link = (
        'REPOSITORY = "https://github.com/owner/name.git"\n' + install.source[install.source.index('if "github.com"') :]
    )
    more = MORE | {"an address on GitHub": link}
    for name, source in more.items():
        notebook.cells.append(nbformat.v4.new_code_cell(f"# {name}\n{source}", metadata={"tags": ["raises-exception"]}))
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    [settings] = [index for index, source in enumerate(sources) if source.startswith("MODEL =")]
    for source in sources[settings : len(sources) - len(more)]:
        for as_it_is, own in OWN.items() if source == sources[settings] else ():
            assert as_it_is in source
            source = source.replace(as_it_is, own)
        notebook.cells.append(nbformat.v4.new_code_cell(f"# own: {source.splitlines()[0]}\n{source}"))
    folder.parents[2].mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder.parents[2] / ".ipython"))
        patch.delenv("PYTHONPATH", raising=False)
        client = NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(folder.parents[2])}})
        client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return {cell.source.splitlines()[0].removeprefix("# "): cell for cell in code}


def cell(cells, start: str):
    [one] = [cell for first, cell in cells.items() if first.startswith(start)]
    return one


def printed(one) -> str:
    return "".join(output.text for output in one.outputs if output.output_type == "stream")


def shown(one, kind: str) -> list[str]:
    return [output.data[kind] for output in one.outputs if kind in getattr(output, "data", {})]


def test_no_output_of_a_machine_is_kept():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for one in notebook["cells"]:
        assert one["cell_type"] == "markdown" or (one["outputs"] == [] and one["execution_count"] is None)
        assert one["metadata"] == {}
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


def test_it_installs_the_versions_that_are_tested():
    text = "".join((ROOT / f"requirements-{kind}.txt").read_text(encoding="utf-8") for kind in ("cpu", "smollm2"))
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", text, flags=re.MULTILINE))
    [install] = [cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if "%pip install" in cell.source]
    packages = [word for line in re.findall(r"%pip install -q (.*)", install) for word in line.split()]
    asked = [Requirement(word.strip('"')) for word in packages if "==" in word or "<" in word]
    assert len(asked) == 7 and all(one.specifier.contains(pins[one.name]) for one in asked)


def test_what_a_t4_does_is_calculated_from_what_an_h100_did():
    measured = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    seconds = sum(map(float, re.search(r"(\S+) s generation, (\S+) s the rest", measured).groups()))
    seconds += float(re.search(r"these completions, geometric \| (\S+) s", measured)[1])
    [text] = [cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if "On a T4" in cell.source]
    on_h100 = 8 * 8 * 256 / seconds
    assert f"{round(on_h100, -1):.0f} tokens a second" in text
    for name, total, embedded in (
        ("Llama-3.2-1B", 1.236e9, 128256 * 2048),
        ("Qwen2.5-1.5B", 1.544e9, 151936 * 1536),
        ("Llama-3.2-3B", 3.213e9, 128256 * 3072),
    ):
        rate = on_h100 * 8.03e9 / total * 65 / 989
        step, weights = 16 * 128 / rate, ((total - embedded) * 0.5625 + 2 * embedded) / 1e9
        row = f"| {round(rate, -1):.0f} | {step:.0f} s | {100 * step / 60:.0f} min | {weights:.1f} GB |"
        assert f"`unsloth/{name}-bnb-4bit` {row}" in text


@pytest.mark.slow
def test_an_address_is_all_that_it_needs(cells, folder):
    assert printed(cell(cells, "its own files")).strip() == str(folder / "mlppl" / "__init__.py")
    [link] = shown(cell(cells, "an address on GitHub"), "text/markdown")
    page = "github/owner/name/blob/main/rl_training/examples/multi_level_ppl.ipynb"
    assert f"(https://colab.research.google.com/{page})" in link


@pytest.mark.slow
def test_a_text_is_shown_with_its_numbers_and_they_are_those_by_hand(cells):
    [frame] = shown(cell(cells, "from mlppl.models import load_model"), "text/html")
    page = page_of(frame)
    for level, line in zip(LEVELS, printed(cell(cells, "import math")).splitlines(), strict=True):
        assert line.startswith(level) and f"<strong>{number(float(line.split()[1]))}</strong>" in page
    assert "'refrigerator'" in printed(cell(cells, "import math"))


@pytest.mark.slow
def test_the_better_text_earns_more(cells):
    better, worse = printed(cell(cells, "from multi_level_ppl_trl import MultiLevelPPLReward")).splitlines()
    ratios = [float(baseline) / float(ppl) for ppl, baseline in re.findall(r"(\d+) \((\d+)\)", better)]
    by_hand = sum(map(math.prod, zip((0.2, 0.3, 0.5), map(math.log, ratios), strict=True)))
    assert better.startswith("reward +") and math.isclose(float(better.split()[1].strip(",")), by_hand, abs_tol=0.05)
    assert worse.startswith("reward -")


@pytest.mark.slow
@pytest.mark.smollm2
def test_levels_beyond_the_sentence_tell_the_true_continuation(cells):
    [page] = map(page_of, shown(cell(cells, "import json"), "text/html"))
    assert '<section data-level="prompt"' in page and '<section data-level="examples"' in page
    lines = printed(cell(cells, "import random")).splitlines()
    sums = [float(line.split()[-1]) for line in lines]
    assert lines[0].startswith("true continuation") and sums[0] == max(sums)
    prompt, examples = (float(number) for number in re.findall(r"[+-]\S+", lines[0])[:2])
    assert math.isclose(prompt + examples, sums[0], abs_tol=0.011)


@pytest.mark.slow
def test_baselines_are_there(cells, folder):
    assert len(pickle.loads((folder / "output_notebook" / "baselines.pkl").read_bytes())) == 80
    [picture] = shown(cell(cells, "from IPython.display"), "image/png")
    assert picture.startswith("iVBOR")  # PNG


@pytest.mark.slow
def test_the_run_shows_one_progress_and_curves_that_grow(cells):
    trained = cell(cells, "from train_grpo_multilevel_unsloth")
    assert printed(cell(cells, "progress")).strip() == "NotebookProgressCallback"  # what transformers gives a notebook
    assert not [page for page in shown(trained, "text/html") if "Training Loss" in page]
    assert "step 40: reward" in printed(trained)
    [curves] = [page_of(page) for page in shown(trained, "text/html") if page.startswith("<iframe")]
    assert "Step 40 of 40" in curves and "Reward over optimizer steps" in curves
    assert not shown(trained, "text/plain")[-1:] or shown(trained, "text/plain")[-1] != "0"  # no exit code below it


@pytest.mark.slow
def test_the_report_names_the_command_and_not_the_kernels(cells, folder):
    report = (folder / "output_notebook" / "training" / "report.html").read_text(encoding="utf-8")
    assert ">python train_grpo_multilevel_unsloth.py --model_name tiny-stories" in report
    assert "ipykernel" not in report
    [frame] = shown(cell(cells, "from mlppl.pages.run"), "text/html")
    assert page_of(frame) == report


@pytest.mark.slow
def test_it_ends_with_a_clear_rise_and_writes(cells, folder):
    """With the seeds 42, 1 and 2 it was 0.436 ± 0.064, 0.329 ± 0.051 and 0.315 ± 0.056 nats."""
    told = printed(cell(cells, "from mlppl.training import results"))
    rise, error = map(float, re.search(r": (\S+) ± (\S+)", told).groups())
    assert rise > 0.15 and rise > 3 * error
    heldout = json.loads((folder / "output_notebook" / "training" / "heldout.json").read_text(encoding="utf-8"))
    scores = [heldout[when]["scores"]["reward"] for when in ("before", "after")]
    assert "16 prompts: reward {:.3f} before, {:.3f} after:".format(*scores) in told
    stories = printed(cell(cells, "from mlppl.scoring.sampling")).strip().split("\n\n")
    assert [story.splitlines()[0] for story in stories] == heldout["after"]["prompts"][:3]
    untrained, trained = zip(*(re.findall("trained: +(.*)", story) for story in stories), strict=True)
    assert all(trained) and untrained != trained


@pytest.mark.slow
def test_data_of_ones_own_go_the_same_way(cells, folder):
    prompts = json.loads((folder / "output_own" / "training" / "heldout.json").read_text(encoding="utf-8"))["after"][
        "prompts"
    ]
    texts = [json.loads(line)["text"] for line in (folder / "own.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(prompts) == 2 and all(any(text.startswith(prompt) for text in texts) for prompt in prompts)
    assert prompts[0] in printed(cell(cells, "own: from mlppl.scoring.sampling"))


# --- scripts in a notebook -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("without arguments", "error: give the text to score with --text TEXT or with --file FILE, one of the two"),
        ("a typo", "error: unrecognized arguments: --texd x: see main --help"),
    ],
)
def test_an_error_ends_the_cell_with_one_line(cells, name, line):
    [error] = cell(cells, name).outputs
    assert (error.output_type, error.traceback) == ("error", [line])


@pytest.mark.slow
def test_help_is_no_error_and_run_has_its_own_flags(cells):
    asked = cell(cells, "help")
    assert printed(asked).startswith("usage: main ") and shown(asked, "text/plain") == ["0"]
    tables = "".join(shown(cell(cells, "run"), "text/plain"))
    assert "sentence" in tables and "Perplexity" in tables


@pytest.mark.slow
def test_an_async_reward_runs_beside_the_kernels_own_loop(cells):
    assert printed(cell(cells, "async")).strip() == "[4.]"


def test_outside_of_a_notebook_a_script_has_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--flag"])
    assert not cli.in_kernel()
    assert cli.script(len)() == 1 and cli.script(len)(["a", "b"]) == 2
    assert cli.script_name("train.py") == "script.py"


# --- an explained text -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explained():
    text = 'A "fox" & <b>a dog</b> ran home. So did I, they said.'
    return MultiLevelPPLCalculator(toys.byte_level()).explain(toys.llama(), text, context="<i>Once</i>")


def page_of(frame: str) -> str:
    [page] = re.findall(r'srcdoc="([^"]*)"', frame)
    return html.unescape(page)


def test_it_is_the_dict_that_it_is(explained):
    plain = {level: list(explained[level]) for level in LEVELS}
    assert explained == plain and isinstance(explained, dict) and list(explained) == list(LEVELS)
    assert json.loads(json.dumps(explained)) == plain
    again = pickle.loads(pickle.dumps(explained))
    assert again == plain and again.perplexities == explained.perplexities
    assert again._repr_html_() == explained._repr_html_()


def test_a_text_without_a_scored_token_is_shown_too():
    blank = MultiLevelPPLCalculator(toys.byte_level()).explain(toys.llama(), " ")
    assert blank["word"] == [] and "nan" in page_of(blank._repr_html_())


@pytest.mark.browser
def test_neither_the_notebook_nor_the_page_has_the_others_style(explained, tmp_path):
    outer = tmp_path / "notebook.html"
    outer.write_text(
        f"<style>.text, span {{ color: rgb(1, 2, 3) !important }}</style><body><p class='text'>outside</p>"
        f"{explained._repr_html_()}</body>",
        encoding="utf-8",
    )
    inner = tmp_path / "page.html"
    inner.write_text(page_of(explained._repr_html_()), encoding="utf-8")
    with Chromium() as browser:
        browser.open(outer, 900, 900)
        assert browser.value("getComputedStyle(document.querySelector('.text')).color") == "rgb(1, 2, 3)"
        assert browser.value("getComputedStyle(document.body).margin") == "8px"  # the browser's own
        assert browser.value("document.querySelector('iframe').contentDocument") is None  # nor can either reach over
        assert browser.value("document.querySelector('iframe').getBoundingClientRect().height") == 560
        assert not browser.console and len(browser.requests) <= 2  # itself, and the frame's own source
        browser.open(inner)
        assert browser.value("document.querySelector('.text').textContent") == explained.text
        assert browser.value("getComputedStyle(document.querySelector('.text')).color") != "rgb(1, 2, 3)"


def test_a_frame_holds_any_page():
    page = '<p title="\'">a &amp; b</p>'
    assert page_of(Framed(page)._repr_html_()) == page
