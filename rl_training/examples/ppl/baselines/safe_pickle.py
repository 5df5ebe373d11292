"""Reads a pickle of plain data without `pickle`: nothing is looked up and nothing is called, whatever the file says.

Python's own unpickler, even with `find_class` overridden, hashes what a file makes it hash (nested tuples overflow the
C stack), sets attributes of what it may load, and makes room for as many memos as a file claims to have. This one knows
the opcodes that dict, list, tuple, str, int, float, bool, None and numpy scalars are written with, in protocols 0 to 5,
and no others. `pickletools` of the standard library decodes them; it builds nothing.
"""

import pickletools
import re
import struct

import numpy as np

_PLAIN = frozenset({dict, list, tuple, str, int, float, bool, type(None)})
_KEYS = frozenset({str, int})
_GLOBALS = {
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),  # how protocols 0 to 2 write bytes
}
_TYPE = re.compile(r"f[248]|[iu][1248]|b1|U[0-9]{1,6}")
# Opcodes that put what is written behind them on the stack, take it from the memo, or put it there.
_VALUES = frozenset(
    {"BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BININT1", "BININT2", "BININT", "INT", "LONG", "LONG1", "LONG4"}
    | {"FLOAT", "UNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"}
)
_GETS = frozenset({"BINGET", "LONG_BINGET", "GET"})
_PUTS = frozenset({"BINPUT", "LONG_BINPUT", "PUT"})
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class PickleRefused(ValueError):
    """Says what is in the file that plain data does not have."""


class _Global(str):
    """The name of one of `_GLOBALS`."""


class _Arguments(tuple):
    """A tuple that holds one of these, or bytes, which plain data has not."""


class _Type:
    """Stands for numpy.dtype."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "<"


def loads(data: bytes):
    """The plain value of a pickle, numpy scalars as Python's. Raises `PickleRefused` for anything else."""
    try:
        return _loads(data)
    except IndexError as error:
        raise PickleRefused("it is cut short") from error
    except PickleRefused:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, MemoryError, struct.error) as error:
        raise PickleRefused(f"it is damaged ({type(error).__name__}: {error!s:.80})") from error


def _loads(data: bytes):
    stack: list = []
    below: list[list] = []  # the stacks under each open mark
    memo: dict[int, object] = {}
    for opcode, value, position in pickletools.genops(data):
        name = opcode.name
        # The most frequent first.
        if name in _VALUES:
            stack.append(value)
        elif name in _GETS:
            stack.append(memo[value])
        elif name in _PUTS:
            memo[value] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "SETITEMS":
            items, stack = stack, below.pop()
            _set(stack[-1], items)
        elif name == "SETITEM":
            items = stack[-2:]
            del stack[-2:]
            _set(stack[-1], items)
        elif name == "DICT":
            items, stack = stack, below.pop()
            stack.append({})
            _set(stack[-1], items)
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "APPENDS":
            items, stack = stack, below.pop()
            _extend(stack[-1], items)
        elif name == "APPEND":
            item = stack.pop()
            _extend(stack[-1], [item])
        elif name == "LIST":
            items, stack = stack, below.pop()
            stack.append([])
            _extend(stack[-1], items)
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "TUPLE":
            items, stack = stack, below.pop()
            stack.append(_tuple(items))
        elif name in _TUPLES:
            size = _TUPLES[name]
            if len(stack) < size:
                raise PickleRefused("it is damaged")
            items = stack[-size:]
            del stack[-size:]
            stack.append(_tuple(items))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "GLOBAL":
            stack.append(_global(*value.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_global(module, attribute))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_reduce(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        elif name == "PROTO":
            if value > 5:
                raise PickleRefused(f"pickle protocol {value}")
        elif name == "STOP":
            if position + 1 != len(data) or below or len(stack) != 1 or type(stack[0]) not in _PLAIN:
                raise PickleRefused("it is damaged")
        elif name != "FRAME":
            raise PickleRefused(f"opcode {name}")
    return stack[0]


def _set(target, items: list) -> None:
    """Keys and values in turn into a dict. Other keys than these can cost any time to hash."""
    if type(target) is not dict or len(items) % 2:
        raise PickleRefused("it is damaged")
    keys, values = items[::2], items[1::2]
    if not _KEYS.issuperset(map(type, keys)):
        raise PickleRefused("a dict with a key that is neither a str nor an int")
    _check_plain(values)
    target.update(zip(keys, values, strict=True))


def _extend(target, items: list) -> None:
    if type(target) is not list:
        raise PickleRefused("it is damaged")
    _check_plain(items)
    target.extend(items)


def _check_plain(items: list) -> None:
    if not _PLAIN.issuperset(map(type, items)):
        raise PickleRefused("a value of another type")


def _tuple(items: list) -> tuple:
    return tuple(items) if _PLAIN.issuperset(map(type, items)) else _Arguments(items)


def _global(module, name) -> _Global:
    if type(module) is not str or type(name) is not str:
        raise PickleRefused("it is damaged")
    if (module, name) not in _GLOBALS:
        raise PickleRefused(f"it wants to load {module:.80}.{name:.80}")
    return _Global(name)


def _reduce(called, arguments):
    """What the three calls that a numpy scalar consists of give: its type, its bytes, its value."""
    if type(called) is _Global and isinstance(arguments, tuple):
        first = arguments[0] if arguments else None
        if called == "dtype" and type(first) is str and _TYPE.fullmatch(first):
            return _Type(first)
        if called == "encode" and type(first) is str and arguments[1:] == ("latin1",):
            return first.encode("latin1")
        if called == "scalar" and type(first) is _Type and len(arguments) == 2 and type(arguments[1]) is bytes:
            kind = np.dtype(first.order + first.code)
            if len(arguments[1]) == kind.itemsize > 0:
                if kind.kind == "U":  # numpy builds a str of code points that there are not, and Python stumbles on it
                    encoding = "utf-32-be" if first.order == ">" else "utf-32-le"
                    return arguments[1].decode(encoding, "surrogatepass").rstrip("\0")
                return np.frombuffer(arguments[1], dtype=kind)[0].item()
    raise PickleRefused("a numpy value of an unknown form")


def _build(target, state) -> None:
    if type(target) is not _Type or type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
        raise PickleRefused("a numpy type of an unknown form")
    target.order = state[1]
