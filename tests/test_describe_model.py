"""The hash that tells one scorer from another: of every weight, however it is kept, and of nothing else."""

import copy
import subprocess
import sys

import pytest
import torch
import toys
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from training_runs import EXAMPLES

from ppl.models import describe_model, load_model


def weights(model) -> str:
    return describe_model(model)["weights"]


@pytest.fixture(scope="module")
def in_4bit():
    return load_model("tiny-stories", load_in_4bit=True)[0]


def test_the_last_value_of_the_last_tensor_counts_as_the_first_does():
    model = toys.llama()
    seen = {weights(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            for index in ((0,) * parameter.dim(), (-1,) * parameter.dim()):
                parameter[index] += 1e-3
                seen.add(weights(model))
    assert len(seen) == 1 + 2 * len(list(model.parameters()))


def test_a_change_of_4bit_weights_alone_is_seen(in_4bit):
    changed = copy.deepcopy(in_4bit)
    data = changed.model.layers[-1].mlp.down_proj.weight.data
    data.view(-1)[-1] ^= 1  # one code, by one step
    assert weights(changed) != weights(in_4bit)


def test_another_models_4bit_weights_are_another_models(tmp_path, in_4bit):
    """As a merged adapter leaves them: linear layers moved a little, everything else as it was."""
    model, tokenizer, _ = load_model("tiny-stories")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert weights(load_model(str(tmp_path), load_in_4bit=True)[0]) != weights(in_4bit)


def test_4bit_weights_repacked_for_a_cpu_are_the_same_weights(in_4bit):
    before, repacked = weights(in_4bit), load_model("tiny-stories", load_in_4bit=True)[0]
    packed = 0
    for parameter in repacked.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and not getattr(state, "packing_format_for_cpu", False):
            parameter.data, parameter.quant_state = _convert_weight_packed_for_cpu(parameter.data, state)
            packed += 1
    assert packed and weights(repacked) == before
    with torch.no_grad():  # where the CPU has the instructions, the first pass packs them
        in_4bit(input_ids=torch.tensor([[1, 2, 3]]))
    assert weights(in_4bit) == before


@pytest.mark.slow
def test_unsloth_and_transformers_make_the_same_4bit_weights(in_4bit):
    asked = (
        "from ppl.models import *; model = load_model('tiny-stories', load_in_4bit=True, unsloth=True)[0]; "
        "print(describe_model(model)['weights'])"
    )
    done = subprocess.run([sys.executable, "-c", asked], cwd=EXAMPLES, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == [weights(in_4bit)], done.stderr


def test_norms_cast_for_training_are_the_same_norms():
    model = toys.llama().to(torch.bfloat16)
    before = weights(model)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    assert model.model.norm.weight.dtype == torch.float32 and weights(model) == before
