"""What `make docs` built, and CITATION.cff by its schema."""

import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from importlib.metadata import files
from pathlib import Path
from urllib.parse import unquote

import jsonschema
import pytest
import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
SITE = ROOT / "output_docs"
sys.path.insert(0, str(ROOT / "tests"))
NAV = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
WRITTEN = [path for path in NAV if (ROOT / path).exists()]


class Page(HTMLParser):
    """tags: of the article, without the links beside headings. text: of it, without white space."""

    def __init__(self, html: str, inside: bool = False) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.text = ""
        self._inside = inside
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self._inside |= tag == "article"
        self.links += [given[name] for name in ("href", "src") if name in given and tag != "link"]
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if self._inside and given.get("class") != "headerlink":
            self.tags[tag] += 1

    def handle_endtag(self, tag):
        self._inside &= tag != "article"

    def handle_data(self, data):
        if self._inside:
            self.text += re.sub(r"[\s¶]", "", data)


PAGES = {
    path: Page(path.read_text(encoding="utf-8")) for path in sorted(SITE.rglob("*.html")) if path.name != "404.html"
}


def built(path: str) -> Path:
    return SITE / re.sub(r"README\.md$", "index.md", path).replace(".md", ".html")


def test_every_link_and_picture_of_every_page_leads_somewhere():
    assert len(PAGES) > len(NAV)
    for path, page in PAGES.items():
        for link in page.links:
            name, _, anchor = unquote(link).partition("#")
            if "://" not in name:
                there = (path.parent / name).resolve() if name else path
                assert there.exists(), f"{path.relative_to(SITE)} -> {link}"
                assert not anchor or anchor in PAGES[there].anchors, f"{path.relative_to(SITE)} -> {link}"


@pytest.mark.parametrize("path", WRITTEN)
def test_a_page_is_what_a_git_host_shows(path):
    """By another parser of Markdown, which reads it as they do: the same lists, tables, code and text."""
    text = re.sub(r"\A---\n.*?\n---\n", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.DOTALL)
    host, page = Page(MarkdownIt().enable("table").render(text), inside=True), PAGES[built(path)]
    for tag in ("ul", "ol", "li", "table", "tr", "td", "pre", "code", "strong", "em", "img", "h1", "h2", "h3", "h4"):
        assert page.tags[tag] == host.tags[tag], tag
    assert page.text == host.text


@pytest.mark.parametrize(
    "name",
    ["MultiLevelPPLCalculator", "MultiLevelPPLRewardFunction", "DEFAULT_THRESHOLDS", "LEVELS", "RewardConfig"],
)
def test_the_python_page_has_each_public_name(name):
    anchors = PAGES[SITE / "api.html"].anchors
    assert any(anchor.startswith("mlppl.") and anchor.endswith(f".{name}") for anchor in anchors)


def test_the_python_page_has_defaults_as_values_and_parameters_as_a_list():
    html = (SITE / "api.html").read_text(encoding="utf-8")
    assert "DEFAULT_PHRASE_WORDS" not in html and "_setting(" not in html
    assert "<code>max_phrase_words</code>: most words of a phrase.</li>" in html.replace("<li>\n<p>", "<li>")
    assert "&gt;&gt;&gt; " in html and "<blockquote>" not in html


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 400])
def test_pages_fit_load_nothing_from_elsewhere_and_have_no_error(width):
    from chromium import Chromium

    with Chromium() as browser:
        for name in ("index.html", "MULTILEVEL_PPL_GUIDE.html", "flags.html", "api.html", "studies/index.html"):
            browser.open(SITE / name, width)
            assert browser.value("document.documentElement.scrollWidth") == width, name
            assert not browser.console, name
            assert all(address.startswith("file:") for address in browser.requests), name


def test_the_citation_is_valid():
    [schema] = [path for path in files("cffconvert") if path.match("schemas/1.2.0/schema.json")]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    jsonschema.validate(citation, json.loads(schema.read_text(encoding="utf-8")))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**citation, "authors": []}, json.loads(schema.read_text(encoding="utf-8")))
