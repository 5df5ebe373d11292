"""The heat-map: colours and numbers as facts, and the page in a real browser."""

import math
import re
from pathlib import Path

import pytest
import toys
from chromium import Chromium

from mlppl.config import LEVELS
from mlppl.scoring import heatmap
from mlppl.scoring.calculator import MultiLevelPPLCalculator

TEXT = (
    "  Once upon a time there was a <script>window.hacked = 1</script> fox & an <b>owl</b>.\r\n"
    'It said: "Come in, &amp; sit!" — “Why?”\r中文没有空格，对吗？ 😀\n\n\tشكرا\x0b \'; alert(1) //\n'
    + "x" * 120
    + "\n "
)
CONTEXT = "<i>A prompt</i>\nof two lines, with " + "y" * 90


def unit(start: int, end: int, perplexity: float, n_tokens: int = 1) -> dict:
    surprisal = n_tokens * math.log(perplexity)
    return {
        "text": "The fox ran. "[start:end], "start": start, "end": end,
        "n_tokens": n_tokens, "surprisal": surprisal, "perplexity": perplexity,
    }  # fmt: skip


# "ran. " holds no token of its own, so the explanation leaves it out.
EXPLAINED = {
    "word": [unit(0, 4, 3.0), unit(4, 8, 2000.0, 3)],
    "phrase": [unit(0, 13, 11.5, 4)],
    "sentence": [unit(0, 13, 11.5, 4)],
}


def fragment() -> str:
    return heatmap.heatmap(EXPLAINED, "The fox ran. ", {"word": 77.46, "phrase": 11.5, "sentence": 11.5})


# --- colours and numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "perplexity, step",
    [
        *[(1.0, 0), (1.41, 0), (1.42, 1), (1.99, 1), (2.0, 2), (4.0, 4), (64.0, 12), (1023.9, 19), (1024.0, 20)],
        *[(1e9, 20), (math.inf, 20), (0.9999999, 0)],
    ],
)
def test_a_colour_is_half_a_doubling_of_perplexity(perplexity, step):
    assert heatmap.colour(perplexity) == step


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" or "rgb(r, g, b)". Source: WCAG 2.2."""
    if colour.startswith("#"):
        parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    else:
        parts = [int(part) for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in parts)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_measured_as_wcag_does():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize(
    "palette, direction, size",
    [(heatmap.LIGHT, -1, 21), (heatmap.DARK, 1, 21), (heatmap.LIGHT_HELPED, -1, 11), (heatmap.DARK_HELPED, 1, 11)],
)
def test_text_is_legible_on_each_colour_and_lightness_orders_them(palette, direction, size):
    assert len(palette) == size
    assert min(contrast(background, text) for background, text in palette) >= 4.5
    ordered = [direction * luminance(background) for background, _ in palette]
    assert ordered == sorted(ordered) and len(set(ordered)) == size


@pytest.mark.parametrize(
    "ratio, shade",
    [(1.0, "c0"), (0.9999999, "c0"), (2.0, "c2"), (0.99, "d0"), (0.71, "d0"), (0.7, "d1"), (0.5, "d2"), (1e-9, "d10"),
     (0.0, "d10")],
)  # fmt: skip
def test_below_one_a_second_hue_has_a_colour_for_half_a_halving(ratio, shade):
    assert heatmap.shade(ratio) == shade


def test_nested_units_have_the_hue_of_their_sign_and_show_their_three_surprisals():
    units = {
        level: [unit(0, 8, ratio, 3) | {"a": 9.5, "b": 8.25, "c": 7.0}]
        for level, ratio in (("word", 77.46), ("phrase", 0.5), ("sentence", 1.5))
    }
    levels, names = {"word": 77.46, "phrase": 0.5, "sentence": 1.5}, dict.fromkeys(LEVELS, "helped <by> it")
    found = heatmap.heatmap(units, "The fox ran. ", levels, names=names)
    assert re.findall(r'<span class="([cd]\d+)" title="([^"]*)"', found) == [
        (name, f"{shown} nats a token · 3 tokens · surprisal in its phrase 9.50, sentence 8.25, text 7.00 nats")
        for name, shown in (("c12", "4.35"), ("d2", "−0.69"), ("c1", "0.41"))
    ]
    assert re.findall(r"<strong>(.*?)</strong>\s*<span>(.*?)<br>", found)[1] == (
        "−0.69", "nats a token, helped &lt;by&gt; it"
    )  # fmt: skip
    page = heatmap.page("Nested", [found])
    assert "erplexity" not in re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    assert [shown for shown in re.findall(r"<b>(\S+)</b>", page)] == [
        "0.0", "1.4", "2.8", "4.2", "5.5", "6.9+", "0.0", "−1.4", "−2.8",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value, shown",
    [(1.0, "1.00"), (9.994, "9.99"), (12.345, "12.3"), (456.7, "457"), (45678.0, "45,678"), (12345678.0, "1.2e+07")],
)
def test_numbers_keep_at_least_three_digits(value, shown):
    assert heatmap.number(value) == shown


def test_the_most_surprising_units_come_first_and_ties_in_order():
    units = [unit(0, 4, 3.0), unit(4, 8, 5.0), unit(8, 13, 5.0)]
    assert [one["start"] for one in heatmap.most_surprising(units, 2)] == [4, 8]


# --- the fragment ----------------------------------------------------------------------------------------------------


def test_white_space_and_what_holds_no_token_stay_uncoloured():
    found = re.findall(r'<span class="(c\d+)" title="([^"]*)">([^<]*)</span>([^<]*)', fragment())
    assert found == [
        ("c3", "perplexity 3.00 · 1 token · surprisal 1.10 nats", "The", " "),
        ("c20", "perplexity 2,000 · 3 tokens · surprisal 22.80 nats", "fox", " ran. "),
        ("c7", "perplexity 11.5 · 4 tokens · surprisal 9.77 nats", "The fox ran.", " "),
        ("c7", "perplexity 11.5 · 4 tokens · surprisal 9.77 nats", "The fox ran.", " "),
    ]


def test_the_fragment_gives_each_levels_perplexity_units_and_tokens():
    summaries = re.findall(r"<strong>(.*?)</strong>\s*<span>(\w+) perplexity<br>(.*?)</span>", fragment())
    assert summaries == [
        ("77.5", "word", "2 words, 4 tokens"),
        ("11.5", "phrase", "1 phrase, 4 tokens"),
        ("11.5", "sentence", "1 sentence, 4 tokens"),
    ]


def test_a_page_names_no_other_resource():
    page = heatmap.page("Title", [fragment()], {"Model": "<m>"})
    assert re.findall(r"""(?:src|href|url|@import|action)\s*[=(]\s*["']?([^"')>]*)""", page) == ["data:,"]
    assert "&lt;m&gt;" in page and "<m>" not in page


# --- the page in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with Chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def explained():
    """The hard text under a small random model, and its perplexities."""
    model, calculator = toys.llama(), MultiLevelPPLCalculator(toys.byte_level())
    options = {"model": model, "context": CONTEXT}
    return (
        calculator.explain(text=TEXT, **options),
        calculator.compute_all_levels(model=model, texts=TEXT, contexts=CONTEXT),
    )


@pytest.fixture(scope="module")
def page(explained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    drawn = heatmap.heatmap(explained[0], TEXT, explained[1], context=CONTEXT, caption="One <text>", language="en")
    path.write_bytes(heatmap.page("A <title>", [drawn], {"Model": "m" * 80}).encode())
    return path


def switch(browser, level: str) -> None:
    browser.value(f"document.querySelector('input[value={level}]').click()")


def visible(browser) -> list[str]:
    return browser.value(
        "[...document.querySelectorAll('section')].filter(s => s.offsetHeight).map(s => s.dataset.level)"
    )


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overflows_nothing_is_logged_and_nothing_is_fetched(browser, page, width, dark):
    browser.open(page, width, dark=dark)
    for level in LEVELS:
        switch(browser, level)
        assert visible(browser) == [level]
        assert browser.value("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
        # Nor does anything reach beyond the right edge unseen.
        edges = "[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right)"
        assert browser.value(f"Math.max(...{edges})") <= width
    assert browser.console == []
    assert browser.requests == [page.as_uri()]


@pytest.mark.browser
def test_the_text_on_the_page_is_the_text(browser, page):
    browser.open(page)
    for level in LEVELS:
        assert browser.value(f"document.querySelector('section[data-level={level}] .text').textContent") == TEXT
    assert browser.value("document.querySelector('.plain').textContent") == CONTEXT
    assert browser.value("document.title") == "A <title>"
    assert browser.value("window.hacked === undefined && document.querySelectorAll('.text script').length === 0")
    assert browser.value("getComputedStyle(document.querySelector('.text')).whiteSpace") == "pre-wrap"


@pytest.mark.browser
def test_every_unit_has_its_colour_its_numbers_and_legible_text(browser, page, explained):
    units, perplexities = explained
    for dark, palette in ((False, heatmap.LIGHT), (True, heatmap.DARK)):
        browser.open(page, dark=dark)
        for level in LEVELS:
            spans = browser.value(
                f"[...document.querySelectorAll('section[data-level={level}] .text span')].map(s => "
                "[s.textContent, s.title, getComputedStyle(s).backgroundColor, getComputedStyle(s).color])"
            )
            assert [span[0] for span in spans] == [one["text"].strip() for one in units[level]]
            for (_, title, background, ink), one in zip(spans, units[level], strict=True):
                assert title.startswith(f"perplexity {heatmap.number(one['perplexity'])} · {one['n_tokens']} token")
                wanted = palette[heatmap.colour(one["perplexity"])]
                assert luminance(background) == pytest.approx(luminance(wanted[0]))
                assert contrast(background, ink) >= 4.5
            big = browser.value(f"document.querySelector('section[data-level={level}] strong').textContent")
            assert big == heatmap.number(perplexities[level])
        # What is around the text is legible, too.
        for selector in ("h1", "dt", "dd", "legend", "label span", ".scale p", ".context", ".summary span", "th", "td"):
            style = f"getComputedStyle(document.querySelector('{selector}')).color"
            paper = browser.value("getComputedStyle(document.body).backgroundColor")
            assert contrast(paper, browser.value(style)) >= 4.5, (selector, dark)


@pytest.mark.browser
def test_the_legend_has_the_numbers_at_which_its_colours_start(browser, page):
    browser.open(page)
    numbers = browser.value("[...document.querySelectorAll('.scale > ol > li')].map(li => li.textContent)")
    assert len(numbers) == 21
    assert {index: shown for index, shown in enumerate(numbers) if shown} == {
        0: "1", 4: "4", 8: "16", 12: "64", 16: "256", 20: "1024+",
    }  # fmt: skip
    for index, shown in enumerate(numbers):
        if shown:
            assert heatmap.colour(float(shown.rstrip("+"))) == index


@pytest.mark.browser
def test_pointing_at_a_unit_shows_its_numbers_inside_the_window(browser, page, explained):
    browser.open(page, 390)
    spans = "document.querySelectorAll('section[data-level=word] .text span')"
    for index in (0, 5, 11):
        x, y = browser.value(
            f"(s => {{ s.scrollIntoView({{block: 'center'}}); const r = s.getClientRects()[0];"
            f" return [r.x + r.width / 2, r.y + r.height / 2] }})({spans}[{index}])"
        )
        browser.move(x, y)
        one = explained[0]["word"][index]
        shown = browser.value("document.querySelector('.tip').textContent")
        assert shown.startswith(f"perplexity {heatmap.number(one['perplexity'])} · {one['n_tokens']} token")
        assert shown.endswith(f"surprisal {one['surprisal']:.2f} nats")
        left, right = browser.value("(r => [r.left, r.right])(document.querySelector('.tip').getBoundingClientRect())")
        assert left >= 0 and right <= 390


@pytest.mark.browser
def test_the_page_can_be_used_with_the_keyboard_alone(browser, page, explained):
    browser.open(page)
    tip = "document.querySelector('.tip').textContent"
    browser.value("document.querySelector('input:checked').focus()")
    browser.key("ArrowRight")
    assert visible(browser) == ["phrase"]
    browser.value("document.querySelector('section[data-level=phrase] .text').focus()")
    assert browser.value(tip) == ""
    for index in (0, 1):
        browser.key("ArrowRight")
        surprisal = explained[0]["phrase"][index]["surprisal"]
        assert browser.value(tip).endswith(f"surprisal {surprisal:.2f} nats")
    browser.key("Escape")
    assert browser.value(tip) == ""


@pytest.mark.browser
def test_before_and_after_stand_side_by_side_under_one_switch(browser, explained, tmp_path):
    path = tmp_path / "two.html"
    before = heatmap.heatmap(explained[0], TEXT, explained[1], caption="Before")
    path.write_text(heatmap.page("Two", [before, fragment()]), encoding="utf-8")
    boxes = (
        "[...document.querySelectorAll('figure')].map(f => (r => [r.left, r.top, r.width])(f.getBoundingClientRect()))"
    )
    browser.open(path, 1280)
    left, right = browser.value(boxes)
    assert left[1] == right[1] and left[2] == right[2] and right[0] >= left[0] + left[2]
    switch(browser, "sentence")
    assert visible(browser) == ["sentence", "sentence"]
    browser.resize(390)
    above, below = browser.value(boxes)
    assert above[0] == below[0] and below[1] > above[1]
    assert browser.value("document.documentElement.scrollWidth") == 390
    assert browser.console == []
