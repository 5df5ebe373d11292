"""Models whose weights are spread over processes: a forward pass of one is a forward pass of all."""

from collections.abc import Iterator, Sequence

import torch

from .errors import InputError


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP 2 or DeepSpeed ZeRO-3 holds a part of the weights here. Raises `InputError` for FSDP 1."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise InputError("the scorer is wrapped by FSDP 1, which hides its weights: use fsdp_version: 2")
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def in_step(items: Sequence) -> Iterator:
    """The items, and then None until every process has had as many turns as the one with the most items."""
    turns = torch.tensor(len(items))
    if torch.distributed.get_backend() == "nccl":
        turns = turns.cuda()
    torch.distributed.all_reduce(turns, op=torch.distributed.ReduceOp.MAX)
    yield from items
    for _ in range(int(turns) - len(items)):
        yield None
