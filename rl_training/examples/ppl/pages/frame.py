"""What the HTML pages share: one file each, nothing is loaded from anywhere, every string is shown as text."""

import base64
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
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


ENVIRONMENT.filters.update(characters=characters, script_hash=script_hash)
