"""Reads a pickle of plain data with Python's own unpickler, restricted: nothing in the file is looked up or called.

To restrict `find_class` alone is not enough. The unpickler in C hashes whatever a file makes a key, so nested tuples
overflow the stack, and it allocates as many memos as a file claims. The one in Python keeps its memo in a dict, and
what it does at an opcode can be replaced: keys are checked before they are hashed. Of numpy a file may name what a
scalar is written with; it gets stand-ins.
"""

import io
import pickle
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

_Unpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]
_PLAIN = frozenset({dict, list, tuple, str, int, float, bool, type(None)})
# Sets hash what is put into them, a bytearray is allocated before it is read, and objects are not plain data.
_REFUSED = pickle.EMPTY_SET + pickle.ADDITEMS + pickle.FROZENSET + pickle.BYTEARRAY8 + pickle.OBJ + pickle.INST


class PickleRefused(ValueError):
    """Says what is in the file that plain data does not have."""


def loads(data: bytes) -> Any:
    """The plain value of a pickle, numpy scalars as Python's. Raises `PickleRefused` for anything else."""
    reader = _Reader(data)
    try:
        value = reader.load()
    except PickleRefused:
        raise
    except Exception as error:  # which one depends on where the damage is
        raise PickleRefused(f"it is damaged ({type(error).__name__}: {error!s:.80})") from error
    if reader.stack or reader.metastack or reader.file.read(1):
        raise PickleRefused("it is damaged: it holds more than one value")
    waiting: list[Any] = [[value]]  # values of containers
    seen = set()
    while waiting:
        inner = waiting.pop()
        if others := set(map(type, inner)) - _PLAIN:
            raise PickleRefused(f"a value of type {others.pop().__name__}")
        for item in inner:
            if isinstance(item, dict | list | tuple) and id(item) not in seen:
                seen.add(id(item))
                waiting.append(item.values() if isinstance(item, dict) else item)
    return value


class _NumpyType:
    """Stands for numpy.dtype: its code and its byte order."""

    def __init__(self, code: str, *_copied: object) -> None:
        if not re.fullmatch(r"f[248]|[iu][1248]|b1|U[0-9]{1,6}", code):
            raise PickleRefused(f"a numpy value of type {code:.20}")
        self.code, self.order = code, "<"


def _scalar(kind: _NumpyType, content: bytes) -> Any:
    dtype = np.dtype(kind.order + kind.code)
    if dtype.itemsize != len(content):
        raise PickleRefused("a numpy value of another size")
    if dtype.kind == "U":  # numpy makes a str of code points that do not exist, at which Python fails later
        return content.decode(f"utf-32-{'be' if kind.order == '>' else 'le'}", "surrogatepass").rstrip("\0")
    return np.frombuffer(content, dtype)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """How protocols 0 to 2 write bytes."""
    return text.encode({"latin1": "latin1"}[encoding])


class _Reader(_Unpickler):
    stand_ins: ClassVar[dict[tuple[str, str], Callable]] = {
        ("numpy", "dtype"): _NumpyType,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "scalar"): _scalar,
        ("_codecs", "encode"): _encode,
    }

    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)
        super().__init__(self.file)
        self.most_text = 2 * len(data)  # of numpy's scalars: a memo can be made into a new one again and again

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in self.stand_ins:
            raise PickleRefused(f"it wants to load {module:.80}.{name:.80}")
        return self.stand_ins[module, name]

    def load_reduce(self) -> None:
        super().load_reduce()
        if isinstance(self.stack[-1], str | bytes):
            self.most_text -= len(self.stack[-1])
            if self.most_text < 0:
                raise PickleRefused("it holds more text than it is long")

    def load_build(self) -> None:
        state, kind = self.stack.pop(), self.stack[-1]
        if type(kind) is not _NumpyType:
            raise PickleRefused("a value with a state")
        kind.order = {"<": "<", ">": ">", "|": "<"}[state[1]]

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update(key, value)

    def load_setitems(self) -> None:
        self.update(*self.pop_mark())  # which puts the dict back on the stack

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.update(*items)

    def update(self, *items: Any) -> None:
        """Keys and values in turn into the dict on the stack. To hash another key than these can take any time."""
        if not {str, int}.issuperset(map(type, items[::2])):
            raise PickleRefused("a dict with a key that is neither a str nor an int")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    dispatch: ClassVar[dict] = {
        **{code: load for code, load in _Unpickler.dispatch.items() if code not in _REFUSED},
        **{pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build, pickle.DICT[0]: load_dict},
        **{pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems},
    }
