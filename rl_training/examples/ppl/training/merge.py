"""An adapter and the weights under it -> one model in 16 bit that needs neither PEFT nor bitsandbytes."""

import copy
import os
import shutil
from pathlib import Path

import torch


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
        raise RuntimeError(f"no weights for {unfilled[0]} and {len(unfilled) - 1} more in {type(base).__name__}")
    merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload()

    partial = Path(f"{folder}.part")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _plain_weights(base, plain, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The base model's parameters and buffers under the names they have without PEFT, on the CPU, 4 bit made 16 bit."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.pytorch_utils import Conv1D

    base.state_dict()  # bitsandbytes repacks 4-bit weights for the CPU; this puts them back
    weights = {}
    for name, value in [*base.named_parameters(), *base.named_buffers()]:
        if any(part in name for part in (".lora_", ".modules_to_save.")):
            continue
        owner, _, last = name.replace(".base_layer.", ".").replace(".original_module.", ".").rpartition(".")
        if isinstance(value, torch.nn.Parameter):
            quantized = not value.is_floating_point()
            value = dequantize_bnb_weight(value)
            # bitsandbytes has them as linear layers, whose weight is the transpose.
            if quantized and isinstance(plain.get_submodule(owner), Conv1D):
                value = value.T
        weights[f"{owner}.{last}"] = value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
    return weights
