"""In a notebook: the notebook of the examples in a real kernel, scripts called there, results that show themselves."""

import html
import json
import pickle
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import toys
from chromium import Chromium
from nbclient import NotebookClient
from waiting import PATIENCE

from mlppl import cli
from mlppl.config import LEVELS
from mlppl.scoring.calculator import MultiLevelPPLCalculator
from mlppl.scoring.heatmap import Framed, number

EXAMPLES = Path(__file__).parent.parent / "rl_training" / "examples"
NOTEBOOK = EXAMPLES / "multi_level_ppl.ipynb"
# As the notebook has them, and at toy size.
SHORTER = {'"60"': '"12"', '"32"': '"8"', '"20"': '"3"', '"8", *SHORT': '"2", *SHORT'}
MORE = {
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
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clone") / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("__pycache__", "output*", "unsloth_compiled_cache"))
    return folder


@pytest.fixture(scope="module")
def cells(folder) -> dict[str, nbformat.NotebookNode]:
    """The cells by how they begin, run in one kernel, and behind them those of `MORE`."""
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    whole = "".join(cell.source for cell in notebook.cells)
    for name, source in MORE.items():
        notebook.cells.append(nbformat.v4.new_code_cell(f"# {name}\n{source}", metadata={"tags": ["raises-exception"]}))
    for cell in notebook.cells:
        for as_it_is, short in SHORTER.items() if "SHORT" in cell.source else ():
            assert as_it_is in whole
            cell.source = cell.source.replace(as_it_is, short)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder / ".ipython"))
        patch.setenv("PYTHONPATH", str(folder))
        client = NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(folder)}})
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


@pytest.mark.slow
def test_a_text_is_shown_with_its_numbers_and_they_are_those_by_hand(cells):
    [frame] = shown(cell(cells, "from multi_level_ppl_trl import MultiLevelPPLCalculator"), "text/html")
    page = page_of(frame)
    for level, line in zip(LEVELS, printed(cell(cells, "import math")).splitlines(), strict=True):
        assert line.startswith(level) and f"<strong>{number(float(line.split()[1]))}</strong>" in page
    assert "'refrigerator'" in printed(cell(cells, "import math"))


@pytest.mark.slow
def test_the_better_text_earns_more_and_baselines_are_there(cells, folder):
    rewards = re.findall(r"reward (\S+)", printed(cell(cells, "from multi_level_ppl_trl import MultiLevelPPLReward")))
    assert rewards == ["1.0", "0.0"]
    assert len(pickle.loads((folder / "output_notebook" / "baselines.pkl").read_bytes())) == 12
    [picture] = shown(cell(cells, "from IPython.display"), "image/png")
    assert picture.startswith("iVBOR")  # PNG


@pytest.mark.slow
def test_the_run_shows_one_progress_and_curves_that_grow(cells):
    trained = cell(cells, "from train_grpo_multilevel_unsloth")
    assert printed(cell(cells, "progress")).strip() == "NotebookProgressCallback"  # what transformers gives a notebook
    assert not [page for page in shown(trained, "text/html") if "Training Loss" in page]
    assert "step 3: reward" in printed(trained)
    [curves] = [page_of(page) for page in shown(trained, "text/html") if page.startswith("<iframe")]
    assert "Step 3 of 3" in curves and "Reward over optimizer steps" in curves
    assert not shown(trained, "text/plain")[-1:] or shown(trained, "text/plain")[-1] != "0"  # no exit code below it


@pytest.mark.slow
def test_the_report_names_the_command_and_not_the_kernels(cells, folder):
    report = (folder / "output_notebook" / "training" / "report.html").read_text(encoding="utf-8")
    assert ">python train_grpo_multilevel_unsloth.py --baselines_path output_notebook/baselines.pkl" in report
    assert "ipykernel" not in report
    [frame] = shown(cell(cells, "from pathlib import Path"), "text/html")
    assert page_of(frame) == report


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
