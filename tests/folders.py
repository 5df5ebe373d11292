"""Scripts of a folder beside the project, imported by their names: studies/ and benchmarks/ both have a common.py."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Within it, the modules of `folder` are found under their names, and no module of another folder is.

    Afterwards they are forgotten: the next `import common` looks anew.
    """
    names = [path.stem for path in folder.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)
