"""Several processes of one training run: who is first, and what all of them hold."""

import os
from collections.abc import Iterable

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


def several() -> bool:
    """Whether this process trains together with others."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and PartialState().num_processes > 1


def is_first() -> bool:
    """Whether this is the process that prints and writes files, also before the processes have found each other."""
    return int(os.environ.get("RANK", "0")) == 0


def from_all(items: Iterable) -> list:
    """The items of all processes, in the order of the processes; every process must call. Alone: its own."""
    return gather_object(list(items)) if several() else list(items)


def of_this(items: Iterable) -> tuple[list, slice]:
    """The items of all processes, and where this process's own are among them."""
    items = list(items)
    if not several():
        return items, slice(None)
    each = gather_object([items])
    start = sum(len(one) for one in each[: PartialState().process_index])
    return [item for one in each for item in one], slice(start, start + len(items))


def share(rows: int, padded: bool) -> list[int]:
    """Which of so many rows are this process's. padded: all get equally many, some of them twice."""
    if not several():
        return list(range(rows))
    with PartialState().split_between_processes(list(range(rows)), apply_padding=padded) as mine:
        return mine
