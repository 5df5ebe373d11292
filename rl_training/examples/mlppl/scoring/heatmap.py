"""A text coloured by how much each of its words, phrases and sentences surprises the model, as one HTML file."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from ..config import ALL_LEVELS, OUTER

# Of all HTML pages: one file each, nothing is loaded from anywhere, every string is shown as text.
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader([Path(__file__).parent, Path(__file__).parent.parent / "pages"]),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def characters(text: str) -> Markup:
    """Text that an HTML parser reads back as it was: it would turn a bare CR into LF, and drop a NUL."""
    return Markup(str(escape(text)).replace("\r", "&#13;").replace("\0", "�"))


def script_hash(script: str) -> str:
    """The name by which a Content-Security-Policy allows this inline script, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


@dataclass(frozen=True)
class Framed:
    """A page as the last value of a cell shows it; the frame's lower edge can be dragged.

    html: a whole page. height: in CSS pixels.
    """

    html: str
    height: int = 560

    def _repr_html_(self) -> str:
        # The page's script runs, and reaches nothing outside of the frame.
        style = f"width: 100%; height: {self.height}px; border: 0; resize: vertical; overflow: auto"
        return f'<iframe srcdoc="{escape(self.html)}" sandbox="allow-scripts" style="{style}"></iframe>'


def _palette(backgrounds: str, ink: str, first: int, other_ink: str) -> list[tuple[str, str]]:
    """[(background, text)]. ink: of the text on the first so many backgrounds; it is the other one on the rest."""
    return [(f"#{one}", ink if index < first else other_ink) for index, one in enumerate(backgrounds.split())]


# A colour for each half doubling of perplexity, so that a step is half a bit a token and the scale is the same for
# every text, level and model: 21 colours from 1 to 2 ** 10 and beyond. (background, text) for a light and a dark page,
# evenly spaced in OKLCH, in order of lightness; text on its background has a contrast of 4.5 or more (WCAG 2.2 AA).
STEPS_PER_DOUBLING = 2
LIGHT = _palette(
    "f8f7f1 f6f4e6 f5f0da f5eccd f5e7bd f6e1ae f6d99e f6d18e f7c77e f7bc6f f8b160 "
    "f7a454 f5964a f28740 ee7738 e96634 da532f cb402c b72f2c a0212e 89132d",
    "#15120f", 17, "#ffffff",
)  # fmt: skip
DARK = _palette(
    "1e1d23 25202f 2e2139 372342 42234a 4d2450 5b2553 692555 782654 882850 982b4a "
    "a83244 b73b3c c64832 d25829 dd691e e67d1d ed9223 f3a732 f8bd48 fbd35f",
    "#ffffff", 14, "#0f0c0a",
)  # fmt: skip
# The same downwards from 1, for what nested levels measure at phrases and sentences: how much what stands before helps.
LIGHT_HELPED = _palette(
    "f0f6fc d5e5f4 bbd5eb a1c4e3 86b3da 6ba3d2 4f92c9 3584c1 1671af 00619d 00518c",
    "#15120f", 8, "#ffffff",
)  # fmt: skip
DARK_HELPED = _palette(
    "172028 1e2f3d 253e52 2c4d68 335d7f 3a6e97 417fb0 4890c9 58a2dd 6ab3f0 7bc5ff",
    "#ffffff", 6, "#0f0c0a",
)  # fmt: skip


def heatmap(
    explained: Mapping[str, Sequence[dict]],
    text: str,
    perplexities: Mapping[str, float],
    *,
    caption: str = "",
    context: str = "",
    context_name: str = "Context, not scored",
    language: str | None = None,
    top: int = 10,
    names: Mapping[str, str] | None = None,
) -> Markup:
    """One text as a fragment for `page`: every level's units coloured, its perplexity, its most surprising units.

    explained: of `MultiLevelPPLCalculator.explain`. text: the text it explains. perplexities: per level, of
    `compute_all_levels`. context: shown before the text under `context_name`, not coloured. language: the text's, for
    hyphens and voices. top: rows of the table of surprising units. names: of nested levels, which are shown in nats a
    token (`RewardConfig.nested_names`). Whatever the strings hold is shown as text.
    """
    levels = [
        {
            "name": level,
            "nested": (names or {}).get(level),
            "unit": "word" if level in OUTER else level,
            "perplexity": perplexities[level],
            "units": len(explained[level]),
            "tokens": sum(unit["n_tokens"] for unit in explained[level]),
            "pieces": list(_pieces(explained[level], text)),
            "top": most_surprising(explained[level], top),
        }
        for level in explained
    ]
    return _template().heatmap(levels, caption, context, context_name, language)


def page(title: str, heatmaps: Sequence[Markup], facts: Mapping[str, str] | None = None) -> str:
    """A self-contained HTML page of fragments, side by side where there is room, with one switch for all their levels.

    facts: names and values shown below the title.
    """
    return str(_template().page(title, heatmaps, facts or {}))


def most_surprising(units: Sequence[dict], count: int) -> list[dict]:
    """The `count` units of highest perplexity, highest first."""
    return sorted(units, key=lambda unit: -unit["perplexity"])[:count]


def colour(perplexity: float) -> int:
    """The index in `LIGHT` and `DARK` of a unit's perplexity."""
    return max(0, math.floor(min(STEPS_PER_DOUBLING * math.log2(perplexity), len(LIGHT) - 1)))


def shade(perplexity: float) -> str:
    """The CSS class of a unit: c and its index in `LIGHT` and `DARK`; below 1, d and that in `LIGHT_HELPED`.

    >>> shade(4.0), shade(0.9), shade(0.25)
    ('c4', 'd0', 'd4')
    """
    if perplexity >= 1 - 1e-6:  # up to rounding
        return f"c{colour(perplexity)}"
    halvings = -math.log2(perplexity) if perplexity > 0 else math.inf
    return f"d{math.floor(min(STEPS_PER_DOUBLING * halvings, len(LIGHT_HELPED) - 1))}"


def number(value: float) -> str:
    """Three digits or more: 1.04, 12.3, 45,678, 1.2e+07."""
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def rate(perplexity: float, nested: object = True) -> str:
    """A perplexity as it is shown; of a nested level its logarithm, in nats a token.

    >>> rate(0.22), rate(1640.0), rate(1640.0, nested=False)
    ('−1.51', '7.40', '1,640')
    """
    if not nested:
        return number(perplexity)
    return f"{math.log(perplexity) if perplexity else -math.inf:.2f}".replace("-", "−")


def one_line(text: str) -> str:
    """For a table: white space as single spaces, nothing that moves a cursor."""
    return "".join(char if char >= " " and not "\x7f" <= char <= "\x9f" else "�" for char in " ".join(text.split()))


def _pieces(units: Sequence[dict], text: str):
    """(characters, the unit they are coloured as, or None), in order: together the text.

    White space at a unit's ends stays uncoloured: it sets the units apart, and colour would say nothing there.
    """
    end = 0
    for unit in units:
        visible = text[unit["start"] : unit["end"]].strip()
        start = text.index(visible, unit["start"])
        yield text[end:start], None
        yield visible, unit
        end = start + len(visible)
    yield text[end:], None


def levels(heatmaps: Sequence[Markup | None]) -> list[str]:
    """The levels that the fragments of a page show."""
    return [level for level in ALL_LEVELS if any(f'data-level="{level}"' in (one or "") for one in heatmaps)]


def are_nested(heatmaps: Sequence[Markup | None]) -> bool:
    """Whether the fragments of a page show nested levels."""
    return any("data-nested" in (one or "") for one in heatmaps)


def _template():
    return ENVIRONMENT.get_template("heatmap.html.j2").module


ENVIRONMENT.filters |= {
    one.__name__: one for one in (characters, script_hash, shade, rate, one_line, levels, are_nested)
} | {"ln": math.log}
ENVIRONMENT.globals |= {
    "LEVELS": ALL_LEVELS, "LIGHT": LIGHT, "DARK": DARK, "LIGHT_HELPED": LIGHT_HELPED, "DARK_HELPED": DARK_HELPED,
    "STEPS_PER_DOUBLING": STEPS_PER_DOUBLING,
}  # fmt: skip
