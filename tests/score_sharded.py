"""Run by test_sharded.py under torchrun: a model whose weights are spread over the processes scores a different number
of texts in each, and prints as JSON what it found."""

import json
import os
import sys

import torch
import toys
from torch.distributed.fsdp import fully_shard

from mlppl.scoring.surprisal import SurprisalScorer
from mlppl.scoring.tokens import TextEncoder


def main() -> None:
    texts = json.loads(sys.argv[1])  # of each process
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = toys.llama()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    passes = []
    model.register_forward_pre_hook(lambda *args: passes.append(1))
    # Of at most so many tokens a pass, so that the processes need different numbers of them.
    scorer = SurprisalScorer(model, max_batch_tokens=24)
    encoded = TextEncoder(toys.byte_level()).encode([""] * len(texts[rank]), texts[rank])
    found = scorer.score(encoded)
    result = {"surprisals": [one.tolist() for one in found], "passes": len(passes), "training": model.training}
    with open(os.path.join(sys.argv[2], f"{rank}.json"), "w", encoding="utf-8") as file:
        json.dump(result, file)
    # An interpreter that ends while a thread of gloo still holds a tensor is aborted (pytorch/pytorch#179291).
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
