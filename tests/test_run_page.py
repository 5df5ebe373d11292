"""The report of a training run: its charts as numbers, and the page in a real browser, whatever texts it holds."""

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import toys
from chromium import Chromium
from matplotlib.axes import Axes
from psutil import AccessDenied
from test_heatmap import contrast

from mlppl.config import ALL_LEVELS, RewardConfig
from mlppl.pages import charts, run
from mlppl.pages.run import Completion, RunPage, command_line, explain_heldout
from mlppl.reward.function import MultiLevelPPLRewardFunction
from mlppl.training.results import HeldOut
from mlppl.training.settings import launched

NAN = math.nan
HOSTILE = [
    "<script>window.hacked = 1</script> and </script><script>window.hacked = 2</script> <img src=x onerror=alert(1)>",
    "مرحبا بالعالم، هذه قصة. \u202egnorw",
    "😀 👩‍👩‍👧 {{ 7 * 7 }} {% raw %} \x00\x07\r\n &amp; &lt;b&gt;",
    "long " * 1000,
    "x" * 5000,
    "",
    " \n ",
    "\ud800 half a pair",
]


def log(steps: int) -> list[dict]:
    """A log as TRL's, with the reward rising from 0 to 1."""
    return [
        {
            "step": step, "reward": step / steps, "reward_std": 0.25, "reward_word": 10.0 * step, "reward_phrase": -1.0,
            "reward_sentence": 2.0, "completions/mean_length": 50.0, "completions/min_length": 3.0,
            "completions/max_length": 64.0, "entropy": 2.5, "frac_reward_zero_std": 0.5, "loss": -0.01,
            "rewards/multi_level_ppl/mean": step / steps, "rewards/multi_level_ppl/std": 0.25, "num_tokens": 7.0,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip


def by_title(log_history) -> dict[str, charts.Chart]:
    drawn, others, _ = charts.charts(log_history)
    return {chart.title: chart for chart in drawn + others}


# --- charts ----------------------------------------------------------------------------------------------------------


def test_nested_levels_are_in_nats_on_an_axis_each():
    names = RewardConfig(aggregation="nested").nested_names(["prompt"])
    levels = {"ppl/word": 1200.0, "ppl/phrase": 0.14, "ppl/sentence": 0.2, "eval_ppl/phrase": 0.22}
    entries = [{"step": step, **levels, "reward_phrase": -372.0, "eval_reward_phrase": -372.0} for step in (1, 2)]
    drawn, others, _ = charts.charts([entries[0], {**entries[1], "ppl/phrase": 0.09, "ppl/word": None}], names)
    shown = {chart.title: (chart.unit, [line.last for line in chart.lines]) for chart in drawn + others}
    assert shown == {  # ln 1200, 0.09, 0.2, 0.22, and -ln 4.72
        "Improvement over the baseline": ("nats a token", ["−1.55"]),
        "Words in their phrase": ("nats a token, ln of ppl/word", ["7.1"]),
        "Helped by phrases": ("nats a token, ln of ppl/phrase", ["−2.408"]),
        "Helped by sentences and prompt": ("nats a token, ln of ppl/sentence", ["−1.61"]),
        "eval_ppl/phrase": ("nats a token", ["−1.51"]),
        "eval_reward_phrase": ("nats a token", ["−1.55"]),
    }
    alike = by_title([{"step": 1, "ppl/word": 40.0, "ppl/phrase": 30.0, "ppl/sentence": 28.0}])
    assert len(alike["Perplexity"].lines) == 3


def test_levels_have_dashes_of_their_own_in_the_picture_too(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, *_, **style: drawn.append(style))
    levels = {f"reward_{level}": 1.0 for level in ALL_LEVELS}
    run.plot_training([{"step": step, "reward": 0.5, **levels} for step in (1, 2)], tmp_path / "reward.png")
    styles = [(style["color"], style["linestyle"]) for style in drawn if style.get("label") in ALL_LEVELS]
    assert len(styles) == len(set(styles)) == len({dashes for _, dashes in styles}) == len(ALL_LEVELS)


def test_only_what_was_logged_is_drawn_and_nothing_is_left_out():
    drawn, others, merged = charts.charts([{**entry, "guard/new_metric": 3.0} for entry in log(4)])
    assert [chart.title for chart in drawn] == [
        "Reward", "Improvement over the baseline", "Completion length", "Entropy", "What the groups have to compare",
        "Loss",
    ]  # fmt: skip
    assert [chart.title for chart in others] == ["guard/new_metric"]
    assert merged == 1
    assert charts.charts([]) == ([], [], 1)
    assert charts.charts([{"step": 9, "train_runtime": 3.0}]) == ([], [], 1)


def test_two_reward_functions_are_told_apart():
    entries = [{**entry, "rewards/other/mean": -0.5} for entry in log(3)]
    lines = by_title(entries)["Reward functions"].lines
    assert [(line.label, line.last) for line in lines] == [("multi_level_ppl", "1.00"), ("other", "−0.50")]


@pytest.mark.parametrize("count", [2, 3, 4, 7, 20])
def test_no_two_reward_functions_share_colour_and_dashes(count):
    means = {f"rewards/{index}/mean": index / 10 for index in range(count)}
    lines = by_title([{"step": step, **means} for step in (1, 2)])["Reward functions"].lines
    assert [line.label for line in lines] == [str(index) for index in range(count)]
    assert len({(line.colour, line.dashes) for line in lines}) == count


def test_every_level_that_is_logged_has_a_line_of_its_own():
    levels = ("word", "phrase", "sentence", "prompt", "examples")
    lines = by_title([{"step": step, **{f"reward_{level}": 1.0 for level in levels}} for step in (1, 2)])
    lines = lines["Improvement over the baseline"].lines
    assert [(line.label, line.colour) for line in lines] == [(level, level) for level in levels]
    assert len({line.dashes for line in lines}) == 5
    assert all(line.colour in colours for line in lines for colours in run.LINE_COLORS)


def test_places_are_percent_of_the_plot():
    entries = [{"step": 5, "reward": 0.5, "reward_std": 0.25}, {"step": 10, "reward": 1.0, "reward_std": 0.0}]
    chart = by_title(entries)["Reward"]
    assert chart.y_ticks == [(100, "0.0"), (80, "0.2"), (60, "0.4"), (40, "0.6"), (20, "0.8"), (0, "1.0")]
    assert chart.x_ticks == [(0, "0"), (50, "5"), (100, "10")]
    assert chart.lines[0].path == "M50.0 50.0L100.0 0.0"
    assert chart.lines[0].dots == "M50.0 50.0h0M100.0 0.0h0"
    assert chart.band == ("± standard deviation", "M50.0 25.0L100.0 0.0L100.0 0.0L50.0 75.0Z")
    assert chart.columns == ["mean", "± standard deviation"]
    assert chart.rows == [(50.0, "5", ["0.50", "± 0.25"]), (100.0, "10", ["1.00", "± 0.00"])]
    assert chart.description == (
        "mean: 0.50 at step 5, 1.00 at step 10; lowest 0.50 at step 5, highest 1.00 at step 10."
    )


def test_a_value_that_is_no_number_is_a_gap_in_the_line_and_said_in_the_table():
    entries = [{"step": step, "entropy": value} for step, value in enumerate([1.0, NAN, 2.0, math.inf, 3.0, 1.0], 1)]
    chart = by_title(entries)["Entropy"]
    assert chart.lines[0].path.count("M") == 3 and "nan" not in chart.lines[0].path
    assert [cells for *_, cells in chart.rows] == [["1.00"], ["NaN"], ["2.00"], ["∞"], ["3.00"], ["1.00"]]
    assert "Entropy" not in by_title([{"step": 1, "entropy": NAN}])


def test_an_evaluation_now_and_then_is_a_line_without_gaps():
    entries = [*log(6), {"step": 3, "eval_reward": 0.3}, {"step": 6, "eval_reward": 0.6}]
    line = by_title(entries)["Reward"].lines[1]
    assert (line.label, line.last, line.path.count("M"), line.path.count("L")) == ("held-out split", "0.60", 1, 1)


def test_a_long_log_is_averaged_to_what_a_page_can_show():
    entries = log(1000)
    entries[4]["reward"] = NAN
    drawn, _, merged = charts.charts(entries)
    assert merged == 5
    assert [row[1] for row in drawn[0].rows] == [f"{step:,}" for step in range(5, 1001, 5)]
    assert drawn[0].rows[1][2][0] == "0.01"  # of steps 6 to 10, whose mean is 0.008
    assert drawn[0].rows[0][2][0] == "0.00"  # of steps 1 to 4: 0.0025
    assert drawn[0].lines[0].dots == ""


@pytest.mark.parametrize("value", [0.0, 1e-9, -3e-5, 0.5, 7.0, -1e9, 1e80])
def test_a_constant_of_any_size_has_an_axis_that_holds_it(value):
    chart = by_title([{"step": step, "loss": value} for step in (1, 2)])["Loss"]
    heights = [float(up) for up in re.findall(r"[ML][\d.]+ (-?[\d.]+)", chart.lines[0].path)]
    assert len(heights) == 2 and all(0 <= up <= 100 for up in heights)
    assert len({label for _, label in chart.y_ticks}) == len(chart.y_ticks) >= 2


# --- what stands on it -----------------------------------------------------------------------------------------------


def test_the_command_can_be_run_again_and_tells_no_secret(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    words = ["--hub_token", "hf_abc", "--run_name", "a b", "--push_to_hub_token=hf_def", "--hub_token"]
    shown = command_line(launched(words))
    assert shown == "python train.py --hub_token '***' --run_name 'a b' '--push_to_hub_token=***' --hub_token"


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        ("python /env/bin/accelerate launch --config_file a.yaml train.py", "accelerate launch --config_file a.yaml"),
        ("/env/bin/python -m torch.distributed.run --nproc_per_node 2 train.py",
         "python -m torch.distributed.run --nproc_per_node 2"),
        ("/usr/sbin/slurmstepd: [12.0]", "accelerate launch --num_processes 2"),
        ("bash", "accelerate launch --num_processes 2"),
        (None, "accelerate launch --num_processes 2"),
        (AccessDenied(), "accelerate launch --num_processes 2"),
    ],
)  # fmt: skip
def test_under_a_launcher_the_command_is_the_launchers(monkeypatch, parent, expected):
    class Parent:
        def cmdline(self):
            if isinstance(parent, AccessDenied):
                raise parent
            return parent.split()

    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("mlppl.training.settings.Process.parent", lambda self: Parent() if parent else None)
    assert command_line(launched(["--x", "2"])) == f"{expected} train.py --x 2"


@pytest.fixture(scope="module")
def hard() -> HeldOut:
    completions = [[text, "never shown"] for text in HOSTILE]
    rewards = [[NAN if index == 1 else 0.5, 1.0] for index in range(len(HOSTILE))]
    prompts = [*(f"<b>Prompt</b> {'y' * 90}" for _ in HOSTILE[1:]), [{"role": "user", "content": "</script><i>Hi"}]]
    scores = {"reward": 0.5, "word PPL": NAN, "<u>": -1e7, "phrase PPL": 3e9}
    by_prompt = {name: [score] * len(prompts) for name, score in scores.items()}
    return HeldOut(prompts, completions, rewards, scores, by_prompt=by_prompt)


@pytest.fixture(scope="module")
def shown(hard) -> list[Completion]:
    """The hostile completions as a small random model, whose tokenizer takes any text, sees them."""
    reward_fn = MultiLevelPPLRewardFunction(toys.llama(), toys.byte_level(chat=True))
    readable = [[text.encode("utf-8", "replace").decode(), "never shown"] for text in HOSTILE]
    return explain_heldout(reward_fn, dataclasses.replace(hard, completions=readable), [""] * len(HOSTILE))


def test_completions_are_explained_given_their_prompts(hard, shown):
    reward_fn = MultiLevelPPLRewardFunction(toys.llama(), toys.byte_level(chat=True))
    one = shown[0]
    assert (one.lead, one.text, one.reward) == ("", HOSTILE[0], 0.5)
    expected = reward_fn.calculator.compute_all_levels(reward_fn.model, HOSTILE[0], hard.prompts[0])
    assert one.perplexities == pytest.approx(expected, rel=1e-5)
    total = sum(unit["surprisal"] for unit in one.explained["word"])
    assert total == pytest.approx(sum(unit["surprisal"] for unit in one.explained["sentence"]))
    assert shown[5].explained == {"word": [], "phrase": [], "sentence": []}


def test_with_references_as_target_they_are_coloured_behind_what_counts_of_the_completion():
    placed = {"target": "reference", "extract": "So:(.*)", "template": "{prompt}|{completion}|{reference}"}
    reward_fn = MultiLevelPPLRewardFunction(toys.llama(), toys.byte_level(), **placed)
    held_out = HeldOut(["Once"], [["Hm. So: it runs"]], [[0.5]], {"reward": 0.5})
    [one] = explain_heldout(reward_fn, held_out, ["The fox ran."])
    assert (one.lead, one.text) == ("Hm. So: it runs", "The fox ran.")
    expected = reward_fn.calculator.compute_all_levels(reward_fn.model, "The fox ran.", "Once| it runs|")
    assert one.perplexities == pytest.approx(expected, rel=1e-5)


def test_a_chat_that_is_read_as_text_is_coloured_where_its_words_are():
    reward_fn = MultiLevelPPLRewardFunction(toys.llama(), toys.byte_level(chat=True), score_without_chat=True)
    held_out = HeldOut([[{"role": "user", "content": "Once"}]], [["It fell down."]], [[0.5]], {"reward": 0.5})
    [one] = explain_heldout(reward_fn, held_out, [""])
    words = [one.text[unit["start"] : unit["end"]].strip() for unit in one.explained["word"]]
    assert one.text == " It fell down." and words == ["It", "fell", "down."]


def state(step: int, first: bool = True) -> SimpleNamespace:
    entries = log(step) if step else []
    return SimpleNamespace(global_step=step, max_steps=10, log_history=entries, is_world_process_zero=first)


def test_it_is_brought_up_to_date_at_every_log_line_by_one_process(tmp_path, hard, shown):
    (tmp_path / "config.yaml").write_text("# Run\nlr: 1\n")
    page = RunPage(tmp_path / "r.html", "Run", {}, "python x", tmp_path / "config.yaml", hard, shown)

    def step_told():
        return re.search(r"Step (\d+) of 10", page.path.read_text())[1]

    page.on_train_begin(None, state(0, first=False), None)
    assert not page.path.exists()
    page.on_train_begin(None, state(0), None)
    assert step_told() == "0" and "Nothing has been logged yet" in page.path.read_text()
    page.on_log(None, state(1), None, {})
    assert step_told() == "1"
    page.on_log(None, state(2), None, {})
    assert step_told() == "2"
    arguments = SimpleNamespace(report_to=["none"])
    page.on_log(arguments, state(3), None, {"train_runtime": 1.0})  # the last entry
    assert step_told() == "3"
    page.on_train_end(None, state(4), None)
    assert step_told() == "4"
    page.write(state(3), hard, shown)
    assert "Finished after 3 steps" in page.path.read_text()


# --- the page in a browser -------------------------------------------------------------------------------------------

CONFIG = (
    "# The settings\nmodel_name: <script>window.hacked = 3</script>\nlong: " + "z" * 300 + "\n\n# Rest\n# seed: 42\n"
)


def render(path: Path, hard, shown, entries, finished: bool = True) -> Path:
    facts = {"Data": "d" * 120, "<i>": "<script>window.hacked = 4</script>"}
    (config := path.with_suffix(".yaml")).write_text(CONFIG)
    state = SimpleNamespace(global_step=len(entries), max_steps=1000, log_history=entries, is_world_process_zero=True)
    command = "python x '</script><script>window.hacked = 5</script>' " + "w" * 300
    page = RunPage(path, "A <title> " + "t" * 80, facts, command, config, hard, shown)
    page.write(state, *((hard, shown) if finished else ()))
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory, hard, shown) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    entries = [*log(12), {"step": 6, "eval_reward": 0.4, "</script><b>x": 2.0, "loss": 1e30}]
    entries[3] |= {"reward": NAN, "reward_std": NAN, "entropy": math.inf}
    wide = [
        {
            "step": step, f"rewards/{'n' * 90}/mean": 0.1, "rewards/other/mean": 0.2, "loss": -99999.25 + step / 100,
            "grad_norm": 1e-9 * step, "kl": 1e-6 * step, "m" * 90: 12345678.0,
        }
        for step in (999_990, 1_000_000)
    ]  # fmt: skip
    return {
        "wide": render(folder / "wide.html", hard, shown, wide),
        "hard": render(folder / "hard.html", hard, shown, entries),
        "empty": render(folder / "empty.html", hard, shown, [], finished=False),
        "long": render(folder / "long.html", hard, shown, [{**one, "kl": 1e6} for one in log(3000)], finished=False),
        "one": render(folder / "one.html", hard, shown, log(1), finished=False),
    }


@pytest.fixture(scope="module")
def browser():
    with Chromium() as opened:
        yield opened


OPEN_EVERYTHING = "document.querySelectorAll('details').forEach(one => one.open = true)"
# Whatever has its own scroll bar may be wider inside.
OVERFLOW = """[...document.querySelectorAll('body *')].filter(e => !e.closest('svg, .scroll, .tip')
    && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.browser
@pytest.mark.parametrize("name", ["hard", "empty", "long", "one"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overflows_nothing_is_logged_and_nothing_is_fetched(browser, pages, name, width, dark):
    browser.open(pages[name], width, dark=dark)
    browser.value(OPEN_EVERYTHING)
    assert browser.value("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert browser.value(OVERFLOW) == []
    assert browser.console == []
    assert browser.requests == [pages[name].as_uri()]
    assert browser.value("window.hacked === undefined")


@pytest.mark.browser
def test_hostile_texts_are_shown_as_they_are(browser, pages, shown):
    browser.open(pages["hard"])
    texts = "[...document.querySelectorAll('section[data-level=word] .text')].map(e => e.textContent)"
    expected = [one.text.replace("\0", "�") for one in shown for _ in ("before", "after")]
    assert browser.value(texts) == expected
    assert browser.value("document.querySelectorAll('script').length") == 1
    assert browser.value("document.querySelectorAll('img, iframe, object, link:not([rel=icon])').length") == 0
    assert browser.value("document.querySelector('.prompt').textContent").startswith("<b>Prompt</b>")
    assert browser.value("[...document.querySelectorAll('.prompt')].at(-1).textContent") == "user: </script><i>Hi"
    assert browser.value("document.querySelector('#command pre').textContent").startswith("python x '</script>")
    settings = browser.value("[...document.querySelectorAll('#settings pre')].map(e => e.textContent).join('\\n')")
    assert settings == CONFIG
    # Right to left where the text is.
    direction = "getComputedStyle(document.querySelectorAll('section[data-level=word] .text')[2]).direction"
    assert browser.value(direction) == "rtl"


@pytest.mark.browser
def test_scores_stand_beside_each_other_and_what_is_no_number_is_a_dash(browser, pages):
    browser.open(pages["hard"])
    rows = browser.value(
        "[...document.querySelectorAll('.scores tbody tr')]"
        ".map(tr => [...tr.cells].map(td => td.firstChild.textContent))"
    )
    assert rows == [
        ["reward", "0.500", "0.500", "no difference seen ±\xa00.000"],
        ["word PPL", "–", "–", "–"],
        ["<u>", "−1.00e+07", "−1.00e+07", "no difference seen ±\xa00.000"],
        ["phrase PPL", "3.00e+09", "3.00e+09", "no difference seen ±\xa00.000"],
    ]
    tiles = browser.value("[...document.querySelectorAll('.tiles div')].map(e => [e.className, e.lastChild.innerText])")
    assert [name for name, _ in tiles] == ["unseen", "", "unseen"] and "no difference seen" in tiles[0][1]
    weights = "[...document.querySelectorAll('.tiles strong')].map(e => getComputedStyle(e).fontWeight)"
    assert browser.value(weights) == ["400", "650", "400"]
    captions = browser.value(
        "[...document.querySelectorAll('.heatmap figcaption')].slice(0, 4).map(e => e.textContent)"
    )
    assert captions == ["Before: reward 0.50", "After: reward 0.50", "Before: skipped", "After: skipped"]


@pytest.mark.browser
def test_before_and_after_stand_side_by_side_and_on_a_phone_below_each_other(browser, pages):
    boxes = (
        "[...document.querySelector('.pair').querySelectorAll('figure')]"
        ".map(f => (r => [r.left, r.top])(f.getBoundingClientRect()))"
    )
    browser.open(pages["hard"], 1280)
    before, after = browser.value(boxes)
    assert before[1] == after[1] and before[0] < after[0]
    browser.open(pages["hard"], 390)
    before, after = browser.value(boxes)
    assert before[0] == after[0] and before[1] < after[1]


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_letters_are_large_enough_and_those_of_an_axis_do_not_touch(browser, pages, width):
    for name in ("hard", "long", "one"):
        browser.open(pages[name], width)
        browser.value(OPEN_EVERYTHING)
        sizes = browser.value(
            "[...document.querySelectorAll('body *')].filter(e => e.offsetHeight && "
            "[...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()))"
            ".map(e => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(sizes) >= 11.5
        assert browser.value("document.querySelectorAll('svg text').length") == 0  # would shrink with the drawing
        touching = browser.value(
            """[...document.querySelectorAll('.xs, .ys')].flatMap(axis => {
                const boxes = [...axis.children].map(e => e.getBoundingClientRect());
                return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => a.left < b.right && b.left < a.right
                    && a.top < b.bottom && b.top < a.bottom).map(() => axis.parentNode.parentNode.innerText)) })"""
        )
        assert touching == []
        # The numbers of the y axis stay inside their card.
        out = browser.value(
            """[...document.querySelectorAll('.ys span')].filter(e => e.getBoundingClientRect().left
                < e.closest('.chart').getBoundingClientRect().left).map(e => e.textContent)"""
        )
        assert out == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_labels_stay_inside_their_card(browser, pages, width):
    for name in ("hard", "long", "one", "wide"):
        browser.open(pages[name], width)
        browser.value(OPEN_EVERYTHING)
        outside = browser.value(
            """[...document.querySelectorAll('.charts figure, .tiles div')].flatMap(card => {
                const edge = card.getBoundingClientRect();
                return [...card.querySelectorAll('*')]
                    .filter(e => e.textContent.trim() && e.offsetParent && !e.closest('svg, .scroll'))
                    .filter(e => (r => r.left < edge.left || r.right > edge.right + 0.5)(e.getBoundingClientRect()))
                    .map(e => e.textContent.trim()) })"""
        )
        assert outside == [], name


@pytest.mark.browser
def test_a_single_dot_is_a_number_and_no_chart(browser, pages):
    browser.open(pages["one"])
    assert browser.value("document.querySelectorAll('.plot').length") == 0
    assert "Entropy nats a token" in (text := browser.value("document.querySelector('#curves').innerText"))
    assert "policy 2.50" in " ".join(text.split())
    browser.open(pages["hard"])  # its charts have twelve steps, and what was logged once has no plot
    assert browser.value("document.querySelectorAll('.charts figure').length") == 7
    assert browser.value("document.querySelectorAll('.plot').length") == 6


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_words_and_lines_can_be_told_from_the_paper(browser, pages, dark):
    browser.open(pages["hard"], dark=dark)
    browser.value(OPEN_EVERYTHING)
    paper = browser.value("getComputedStyle(document.querySelector('.chart')).backgroundColor")
    for selector in (
        "h1",
        ".kicker",
        ".status",
        "nav a",
        "h2 + p",
        ".chart li",
        ".ys",
        ".name",
        "summary",
        "td",
        "pre span",
    ):
        ink = browser.value(f"getComputedStyle(document.querySelector('{selector}')).color")
        assert contrast(paper, ink) >= 4.5, selector
    strokes = "[...document.querySelectorAll('.plot .line')].map(e => getComputedStyle(e).stroke)"
    assert all(contrast(paper, stroke) >= 3 for stroke in browser.value(strokes))
    # Not by colour alone: no two lines of a chart share their dashes.
    dashes = browser.value(
        "[...document.querySelectorAll('.plot')].map(p => [...p.querySelectorAll('.line')]"
        ".map(e => getComputedStyle(e).strokeDasharray))"
    )
    assert max(map(len, dashes)) == 3 and all(len(set(one)) == len(one) for one in dashes)


@pytest.mark.browser
def test_every_chart_has_a_title_a_description_and_a_table(browser, pages):
    browser.open(pages["hard"])
    for title, text, cells, points in browser.value(
        """[...document.querySelectorAll('.chart')].map(chart => {
            const svg = chart.querySelector('.plot svg');
            const ids = svg.getAttribute('aria-labelledby').split(' ');
            const cells = chart.querySelectorAll('tbody td'), rows = chart.querySelectorAll('tbody tr');
            return [...ids.map(id => document.getElementById(id).textContent), cells.length, rows.length] })"""
    ):
        assert title.endswith("over optimizer steps") and " at step " in text
        assert points > 0 and cells >= 2 * points


@pytest.mark.browser
def test_a_charts_numbers_are_read_out_with_the_keyboard_and_the_pointer(browser, pages):
    browser.open(pages["hard"], 390)
    tip = "document.querySelector('.tip').textContent"
    browser.value("document.querySelector('.plot').focus()")
    browser.key("ArrowRight")
    assert browser.value(tip) == "step 1 · mean 0.08 · held-out split – · ± standard deviation ± 0.25"
    browser.key("ArrowLeft")
    assert browser.value(tip).startswith("step 12 · mean 1.00")
    edges = "(r => [r.left, r.right])(document.querySelector('.tip').getBoundingClientRect())"
    left, right = browser.value(edges)
    assert left >= 0 and right <= 390
    browser.key("Escape")
    assert browser.value(tip) == ""
    browser.value("document.querySelector('.plot').scrollIntoView({ block: 'center' })")
    x, y, width = browser.value(
        "(r => [r.left, r.top + 20, r.width])(document.querySelector('.plot').getBoundingClientRect())"
    )
    browser.move(x + width / 2, y)
    assert browser.value(tip).startswith("step 6 · mean 0.50 · held-out split 0.40")
    assert browser.console == []


@pytest.mark.browser
def test_a_script_that_got_into_the_page_would_not_run(browser, pages, tmp_path):
    path = tmp_path / "injected.html"
    page = pages["empty"].read_text()
    path.write_text(page.replace("<h1>", "<script>window.hacked = 9</script><img src=x onerror='window.hacked=9'><h1>"))
    browser.open(path)
    assert browser.value("window.hacked === undefined")
    assert browser.console and all("Content Security Policy" in told for told in browser.console)
