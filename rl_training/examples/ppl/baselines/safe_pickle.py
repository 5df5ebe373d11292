"""Reads a pickle of plain data without `pickle`: nothing is looked up and nothing is called, whatever the file says.

Python's own unpickler, even with `find_class` overridden, hashes what a file makes it hash (nested tuples overflow the
C stack), sets attributes of what it may load, and makes room for as many memos as a file claims to have. This one knows
the opcodes that dict, list, tuple, str, int, float, bool, None and numpy scalars are written with, in protocols 0 to 5,
and no others. Source: the format as `pickletools` documents it.
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
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_LONGEST_LINE = 4000  # characters of a number as text: int() of more takes quadratic time


class PickleRefused(ValueError):
    """Says what is in the file that plain data does not have."""


class _Global(str):
    """The name of one of `_GLOBALS`."""


class _Bytes(bytes):
    """What a numpy scalar is made from; plain data has no bytes."""


class _Arguments(tuple):
    """A tuple that holds one of these."""


class _Type:
    """Stands for numpy.dtype."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "<"


def loads(data: bytes):
    """The plain value of a pickle, numpy scalars as Python's. Raises `PickleRefused` for anything else."""
    try:
        return _loads(data)
    except (IndexError, struct.error) as error:
        raise PickleRefused("it is cut short") from error
    except PickleRefused:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, MemoryError) as error:
        raise PickleRefused(f"it is damaged ({type(error).__name__}: {error!s:.80})") from error


def _loads(data: bytes):
    uint16, int32, uint32, uint64, float64 = (struct.Struct(f).unpack_from for f in ("<H", "<i", "<I", "<Q", ">d"))
    stack: list = []
    below: list[list] = []  # the stacks under each open mark
    memo: dict[int, object] = {}
    pos = 0

    def text(start: int, size: int) -> str:
        if start + size > len(data):
            raise PickleRefused("it is cut short")
        return data[start : start + size].decode("utf-8", "surrogatepass")

    def line(start: int, longest: int = len(data)) -> bytes:
        end = data.index(b"\n", start)
        if end - start > longest:
            raise PickleRefused(f"a number of {end - start} digits")
        return data[start:end]

    while True:
        op = data[pos]
        pos += 1
        # The most frequent first.
        if op == 0x68:  # BINGET
            stack.append(memo[data[pos]])
            pos += 1
        elif op == 0x47:  # BINFLOAT
            stack.append(float64(data, pos)[0])
            pos += 8
        elif op == 0x71:  # BINPUT
            memo[data[pos]] = stack[-1]
            pos += 1
        elif op == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif op == 0x72:  # LONG_BINPUT
            memo[uint32(data, pos)[0]] = stack[-1]
            pos += 4
        elif op == 0x6A:  # LONG_BINGET
            stack.append(memo[uint32(data, pos)[0]])
            pos += 4
        elif op == 0x58:  # BINUNICODE
            size = uint32(data, pos)[0]
            stack.append(text(pos + 4, size))
            pos += 4 + size
        elif op == 0x8C:  # SHORT_BINUNICODE
            size = data[pos]
            stack.append(text(pos + 1, size))
            pos += 1 + size
        elif op == 0x4B:  # BININT1
            stack.append(data[pos])
            pos += 1
        elif op == 0x4D:  # BININT2
            stack.append(uint16(data, pos)[0])
            pos += 2
        elif op == 0x4A:  # BININT
            stack.append(int32(data, pos)[0])
            pos += 4
        elif op == 0x28:  # MARK
            below.append(stack)
            stack = []
        elif op == 0x7D:  # EMPTY_DICT
            stack.append({})
        elif op == 0x75:  # SETITEMS
            items, stack = stack, below.pop()
            _set(stack[-1], items)
        elif op == 0x73:  # SETITEM
            items = stack[-2:]
            del stack[-2:]
            _set(stack[-1], items)
        elif op == 0x64:  # DICT
            items, stack = stack, below.pop()
            stack.append({})
            _set(stack[-1], items)
        elif op == 0x5D:  # EMPTY_LIST
            stack.append([])
        elif op == 0x65:  # APPENDS
            items, stack = stack, below.pop()
            _extend(stack[-1], items)
        elif op == 0x61:  # APPEND
            item = stack.pop()
            _extend(stack[-1], [item])
        elif op == 0x6C:  # LIST
            items, stack = stack, below.pop()
            stack.append([])
            _extend(stack[-1], items)
        elif op == 0x29:  # EMPTY_TUPLE
            stack.append(())
        elif op == 0x74:  # TUPLE
            items, stack = stack, below.pop()
            stack.append(_tuple(items))
        elif 0x85 <= op <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
            size = op - 0x84
            if len(stack) < size:
                raise PickleRefused("it is damaged")
            items = stack[-size:]
            del stack[-size:]
            stack.append(_tuple(items))
        elif op == 0x4E:  # NONE
            stack.append(None)
        elif op == 0x88 or op == 0x89:  # NEWTRUE, NEWFALSE
            stack.append(op == 0x88)
        elif op == 0x49:  # INT
            digits = line(pos, _LONGEST_LINE)
            pos += len(digits) + 1
            stack.append({b"00": False, b"01": True}[digits] if digits in (b"00", b"01") else int(digits))
        elif op == 0x4C:  # LONG
            digits = line(pos, _LONGEST_LINE)
            pos += len(digits) + 1
            stack.append(int(digits.removesuffix(b"L")))
        elif op == 0x46:  # FLOAT
            digits = line(pos, _LONGEST_LINE)
            pos += len(digits) + 1
            stack.append(float(digits))
        elif op == 0x8A or op == 0x8B:  # LONG1, LONG4
            width = 1 if op == 0x8A else 4
            size = data[pos] if width == 1 else uint32(data, pos)[0]
            pos += width + size
            if pos > len(data):
                raise PickleRefused("it is cut short")
            stack.append(int.from_bytes(data[pos - size : pos], "little", signed=True))
        elif op == 0x56:  # UNICODE
            raw = line(pos)
            pos += len(raw) + 1
            stack.append(raw.decode("raw-unicode-escape"))
        elif op == 0x8D:  # BINUNICODE8
            size = uint64(data, pos)[0]
            stack.append(text(pos + 8, size))
            pos += 8 + size
        elif op == 0x42 or op == 0x43:  # BINBYTES, SHORT_BINBYTES
            width = 1 if op == 0x43 else 4
            size = data[pos] if width == 1 else uint32(data, pos)[0]
            pos += width + size
            stack.append(_Bytes(data[pos - size : pos]))
        elif op == 0x70:  # PUT
            digits = line(pos, _LONGEST_LINE)
            pos += len(digits) + 1
            memo[int(digits)] = stack[-1]
        elif op == 0x67:  # GET
            digits = line(pos, _LONGEST_LINE)
            pos += len(digits) + 1
            stack.append(memo[int(digits)])
        elif op == 0x63:  # GLOBAL
            module = line(pos)
            name = line(pos + len(module) + 1)
            pos += len(module) + len(name) + 2
            stack.append(_global(module.decode("utf-8"), name.decode("utf-8")))
        elif op == 0x93:  # STACK_GLOBAL
            name, module = stack.pop(), stack.pop()
            stack.append(_global(module, name))
        elif op == 0x52:  # REDUCE
            arguments = stack.pop()
            stack.append(_reduce(stack.pop(), arguments))
        elif op == 0x62:  # BUILD
            state = stack.pop()
            _build(stack[-1], state)
        elif op == 0x80:  # PROTO
            if data[pos] > 5:
                raise PickleRefused(f"pickle protocol {data[pos]}")
            pos += 1
        elif op == 0x95:  # FRAME
            pos += 8
        elif op == 0x2E:  # STOP
            if pos != len(data) or below or len(stack) != 1 or type(stack[0]) not in _PLAIN:
                raise PickleRefused("it is damaged")
            return stack[0]
        else:
            raise PickleRefused(f"opcode {_NAMES.get(op, f'{op:#04x}')}")


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
            return _Bytes(first.encode("latin1"))
        if called == "scalar" and type(first) is _Type and len(arguments) == 2 and type(arguments[1]) is _Bytes:
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
