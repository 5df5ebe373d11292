"""Pages in a notebook, each in a frame that keeps its style to itself, and the curves of a run that goes on."""

import time
from collections.abc import Mapping, Sequence

from markupsafe import escape

from ..notebooks import in_kernel
from .charts import charts
from .frame import ENVIRONMENT

SECONDS = 1  # at least, between two drawings of the curves


class Framed:
    """A page as the last value of a cell shows it; the frame's lower edge can be dragged.

    html: a whole page. height: in CSS pixels.
    """

    def __init__(self, html: str, height: int = 560) -> None:
        self.html = html
        self.height = height

    def _repr_html_(self) -> str:
        # The page's script runs, and reaches nothing outside of the frame.
        style = f"width: 100%; height: {self.height}px; border: 0; resize: vertical; overflow: auto"
        return f'<iframe srcdoc="{escape(self.html)}" sandbox="allow-scripts" style="{style}"></iframe>'


class LiveCurves:
    """The curves of a run below the cell that trains, drawn anew as they grow; outside of a notebook nothing."""

    def __init__(self, colors: tuple[Mapping[str, str], Mapping[str, str]]) -> None:
        self.colors = colors
        self._handle = None
        self._drawn = 0.0

    def draw(self, log_history: Sequence[Mapping], progress: tuple[int, int], at_once: bool = False) -> None:
        """log_history: TRL's. progress: steps done, of how many. at_once: also if the last drawing is just done."""
        if not in_kernel() or not (at_once or time.monotonic() - self._drawn > SECONDS):
            return
        from IPython.display import display

        drawn, _, _ = charts(log_history)
        shown = Framed(str(ENVIRONMENT.get_template("run.html.j2").module.curves(drawn, progress, self.colors)), 460)
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)
        self._drawn = time.monotonic()
