"""Several processes of one run: who is first, what all of them hold, and models whose weights are spread over them."""

import os
from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from .errors import InputError


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
    """Which of so many rows are this process's: one at least. padded: all get equally many, some of them twice."""
    if not several():
        return list(range(rows))
    padded |= rows < PartialState().num_processes
    with PartialState().split_between_processes(list(range(rows)), apply_padding=padded) as mine:
        return mine


# --- weights spread over processes: a forward pass of one is a forward pass of all ------------------------------------


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP 2 or DeepSpeed ZeRO-3 holds a part of the weights here. Raises `InputError` for FSDP 1."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise InputError("the scorer is wrapped by FSDP 1, which hides its weights: use fsdp_version: 2")
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """One that FSDP 2 or ZeRO-3 spreads over processes, gathered; every process must call. Any other one as it is."""
    from torch.distributed.tensor import DTensor

    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def in_step(items: Sequence) -> Iterator:
    """The items, and then None until every process has had as many turns as the one with the most items."""
    turns = torch.tensor(len(items))
    if torch.distributed.get_backend() == "nccl":
        turns = turns.cuda()
    torch.distributed.all_reduce(turns, op=torch.distributed.ReduceOp.MAX)
    yield from items
    for _ in range(int(turns) - len(items)):
        yield None
