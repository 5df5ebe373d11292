"""A script's `main` called in a notebook: its flags are not the kernel's, its errors are one line of the cell."""

import functools
import sys
from collections.abc import Callable, Sequence

from .errors import InputError


class CellError(InputError):
    """Ends a notebook's cell, so that no later one runs on, with the one line that a script prints."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows of it
        return [f"error: {self}"]


def in_kernel() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython and ipython.get_ipython(), "kernel", None) is not None


def script(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """`main(argv)` of a script such that `main()` takes the command line, or nothing if that is the kernel's own.

    --help, and what the parser refuses, are an exit code like any other: `SystemExit` would be an error of the cell.
    """

    @functools.wraps(main)
    def called(argv: Sequence[str] | None = None) -> int:
        if argv is None:
            argv = [] if _of_the_kernel() else sys.argv[1:]
        try:
            return main(list(argv))
        except SystemExit as end:
            return int(end.code or 0)

    return called


def script_name(default: str) -> str:
    """The script that this process was started with; `default` in a notebook, whose kernel is none of ours."""
    return default if _of_the_kernel() else sys.argv[0]


def _of_the_kernel() -> bool:
    """Whether the command line is the kernel's: a script that `%run` starts has one of its own."""
    return in_kernel() and sys.argv[1:] == sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1 :]
