"""The only place that writes a file: what stands under a name is whole. And whether a file can be written somewhere."""

import math
import os
import secrets
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from .errors import InputError


def write_atomically(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Let `fill` write a file beside `path`, bring it to the disk, then rename it to `path`.

    Until then `path` stays as it was, also if `fill` raises.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write UTF-8. errors: what to do with a lone surrogate, as `str.encode` names it."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", errors)))


def without_nan(value):
    """What JSON can say: dicts and lists with null in place of each nan.

    >>> without_nan({"reward": [0.5, float("nan")]})
    {'reward': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def writable_file(name: str, flag: str, suffixes: Sequence[str] = ()) -> Path:
    """Where to write the file that `flag` names, a symbolic link resolved, so that the link stays one.

    Raises `InputError` if no file can be made there, or if its name ends in none of `suffixes`, where there are some.
    """
    path = Path(os.path.realpath(name)) if os.path.islink(name) else Path(name)
    if suffixes and path.suffix not in suffixes:
        raise InputError(f"{flag} is {name!r}, expected a file ending in {', '.join(suffixes)}")
    if name and path.is_dir():
        raise InputError(f"{flag} {name} is a folder: give the name of a file in it")
    if not name or (path.exists() and not path.is_file()):
        raise InputError(f"{flag} {name or repr(name)} is not a file: give the name of one")
    check_folder(path.parent, flag, name)
    return path


def check_folder(folder: Path, flag: str, name: str) -> None:
    """Raises `InputError` unless a file can be made in `folder`. flag, name: what asks for it."""
    if not folder.is_dir():
        raise InputError(f"{flag} {name}: the folder {folder} does not exist: make it first")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{flag} {name}: cannot write in {folder} ({error.strerror}): choose another one") from error
