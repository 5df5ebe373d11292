"""Run by test_sharded.py under torchrun: a model whose weights are spread over the processes scores a different number
of texts in each, and writes as JSON what it found."""

import json
import os
import sys

import torch
import toys
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mlppl.errors import InputError
from mlppl.scoring.surprisal import SurprisalScorer
from mlppl.scoring.tokens import TextEncoder


def spread(model, dtype: torch.dtype | None = None):
    """The model, its weights over the processes; dtype: of mixed precision."""
    options = {
        "mesh": torch.distributed.device_mesh.init_device_mesh("cpu", (torch.distributed.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, output_dtype=dtype),
    }
    for layer in model.get_decoder().layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def main() -> None:
    texts, before, dtype = json.loads(sys.argv[1])  # of each process; those it scores while the weights are whole
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = toys.llama()
    # Of at most so many tokens a pass, so that the processes need different numbers of them.
    scorer, encoder = SurprisalScorer(model, max_batch_tokens=24), TextEncoder(toys.byte_level())
    scorer.score(encoder.encode([""] * len(before[rank]), before[rank]))
    spread(model, dtype and getattr(torch, dtype))
    passes = []
    model.register_forward_pre_hook(lambda *args: passes.append(1))
    try:
        found = scorer.score(encoder.encode([""] * len(texts[rank]), texts[rank]))
        result = {"surprisals": [one.tolist() for one in found], "passes": len(passes), "training": model.training}
    except InputError as error:
        result = {"refused": str(error)}
    with open(os.path.join(sys.argv[2], f"{rank}.json"), "w", encoding="utf-8") as file:
        json.dump(result, file)
    # An interpreter that ends while a thread of gloo still holds a tensor is aborted (pytorch/pytorch#179291).
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
