"""Run by test_processes.py under accelerate launch: each process rewards its half of the same completions, with the
policy inside DDP as the scorer, or its weights spread by FSDP 2, and writes as JSON what it found."""

import json
import os
import sys
import warnings

import peft
import torch
import toys
from accelerate import PartialState
from score_sharded import spread

from mlppl.reward.function import MultiLevelPPLRewardFunction

TOKENIZER = toys.byte_level()
# Two groups of four and one prompt that comes alone; with two processes the first and the second group are split.
PROMPTS = ["The fox"] * 2 + ["Once upon"] * 3 + ["The fox"] * 2 + ["Once upon", "It", "It"]
CALLS = [
    [" said", " ran home.", " a time", " there was", " a crow", " slept", "", " they", " was", ""],
    [" sat", " ran home.", " a time", " there was", " a", " slept well", " ate", " they met", " is", " will"],
    # Of this one the second process has scored everything already.
    [" went", " lived", " there is", " it", " so", " slept well", " ate", " they met", " is", " will"],
]
REFERENCES = ["They walked home together.", "The end."] * 5
OPTIONS = {
    "zero-shot": {},
    "normalize": {"normalize": True},
    "reference": {"target": "reference"},
    "without cache": {"use_cache": False},
}


def policy():
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(toys.llama(), lora)


def rewards(model, mine: slice, **options) -> dict:
    function = MultiLevelPPLRewardFunction(model, TOKENIZER, form="nats", **options)
    found, logged = [], []
    for completions in CALLS:
        metrics = {}
        arguments = {"reference": REFERENCES[mine], "log_metric": metrics.__setitem__}
        found.append(function(PROMPTS[mine], completions[mine], **arguments))
        assert metrics.pop("reward_time") > 0
        logged.append(metrics)
    return {"rewards": found, "logged": logged, "state": function.state_dict()}


def main() -> None:
    state = PartialState(cpu=True)
    half = len(PROMPTS) // 2
    mine = slice(half * state.process_index, half * (state.process_index + 1))
    model = policy()
    ddp = sys.argv[2] == "DDP"
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if ddp else spread(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing was trained
        result = {name: rewards(wrapped, mine, **options) for name, options in OPTIONS.items()}
        if ddp:
            result["inner handle"] = rewards(model, mine)
    with open(f"{sys.argv[1]}/{state.process_index}.json", "w", encoding="utf-8") as file:
        json.dump(result, file)
    state.wait_for_everyone()
    # Without the teardown of gloo and DDP, in which a process has been seen to hang after its work was done.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
