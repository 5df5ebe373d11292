"""An adapter and the weights under it -> one model in 16 bit that needs neither PEFT nor bitsandbytes."""

import copy
import os
import shutil
from pathlib import Path

import torch

from ..errors import InputError
from ..frozen import frozen

MOST_NATS = 0.1  # that a probe's log-probabilities may be off by, on average


def save_merged(model, tokenizer, adapter: str | Path, folder: str | Path) -> None:
    """Save the model with its adapter merged into its weights, and the tokenizer.

    model: the PeftModel as it was trained. adapter: folder that its adapter was saved to.

    4-bit weights are turned into the 16-bit numbers they stand for, since those are what the adapter was trained on; to
    merge it into the weights from before quantization, as Unsloth's `save_pretrained_merged` does on a GPU, gives
    another model than the one that was measured. Works on the CPU and takes 2 bytes a parameter there.
    """
    from accelerate import init_empty_weights
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = model.get_base_model()
    dtype = torch.float16 if base.dtype == torch.float16 else torch.bfloat16
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights():
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(_plain_weights(base, plain, dtype), strict=False, assign=True)
    plain.tie_weights()
    plain.generation_config = base.generation_config
    if unfilled := [name for name, parameter in plain.named_parameters() if parameter.is_meta]:
        raise InputError(
            f"--save_merged: no weights for {unfilled[0]} and {len(unfilled) - 1} more in {type(base).__name__} with "
            f"this adapter: it is saved unmerged in {adapter}"
        )
    try:
        merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    except Exception as error:  # PEFT has kinds of adapters that it cannot merge, and says so in many ways
        raise InputError(
            f"--save_merged: PEFT cannot merge this adapter ({type(error).__name__}: {error}): it is saved unmerged in "
            f"{adapter}"
        ) from error
    _check_same(model, merged, adapter)

    partial = Path(f"{folder}.part")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _check_same(model, merged, adapter) -> None:
    """Raises `InputError` unless both give the same log-probabilities, up to what 16 bit loses.

    They do not where an adapter is on an embedding that the LM head shares: merged, it would change the head, too.
    """
    ids = torch.linspace(0, merged.get_input_embeddings().weight.shape[0] - 1, 12).long()[None]
    with frozen(model, adapters=True):
        trained = model(input_ids=ids.to(model.device)).logits.float().cpu().log_softmax(-1)
    with frozen(merged):
        of_merged = merged(input_ids=ids).logits.float().log_softmax(-1)
    apart = (of_merged - trained).abs().masked_fill(of_merged == trained, 0.0)  # two infinities are equal
    if not (difference := float(apart.mean())) <= MOST_NATS:
        raise InputError(
            f"--save_merged: the merged model's log-probabilities are {difference:.2f} nats off the trained one's, "
            f"more than 16 bit loses (an adapter on tied embeddings?): the adapter is saved unmerged in {adapter}"
        )


def _without_wrappers(name: str) -> str:
    for wrapper in (".base_layer.", ".original_module.", ".token_adapter."):
        name = name.replace(wrapper, ".")
    return name


def _plain_weights(base, plain, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The base model's parameters and buffers under the names they have without PEFT, on the CPU, 4 bit made 16 bit.

    `model.dequantize()` gives a Llama the same weights, but a GPT-2 transposed ones, and leaves them on the GPU.
    """
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.pytorch_utils import Conv1D

    base.state_dict()  # bitsandbytes repacks 4-bit weights for the CPU; this puts them back
    weights = {}
    for name, value in [*base.named_parameters(), *base.named_buffers()]:
        if any(part in name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_")):
            continue
        owner, _, last = _without_wrappers(name).rpartition(".")
        if isinstance(value, torch.nn.Parameter):
            quantized = not value.is_floating_point()
            value = dequantize_bnb_weight(value)
            # bitsandbytes has them as linear layers, whose weight is the transpose.
            if quantized and isinstance(plain.get_submodule(owner), Conv1D):
                value = value.T
        weights[f"{owner}.{last}"] = value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
    return weights
