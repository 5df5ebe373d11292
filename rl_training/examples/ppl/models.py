"""Model and tokenizer from Unsloth, transformers, or the embedded folder; and what names them."""

import hashlib
import json
from pathlib import Path

from .data import TINY_STORIES
from .frozen import base_parameters

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def describe_model(model) -> dict:
    """What tells one scorer from another: name, dtype, quantization, and a hash over its floating-point weights."""
    digest = hashlib.blake2b(digest_size=8)
    for parameter in base_parameters(model):
        # Quantised weights are left out: bitsandbytes repacks them in place for the CPU.
        if parameter.is_floating_point():
            digest.update(str(tuple(parameter.shape)).encode())
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    quantization = getattr(model.config, "quantization_config", None)
    method = "none"
    if quantization is not None:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = "4bit" if settings.get("load_in_4bit") else str(settings.get("quant_method", "unknown"))
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": method,
        "weights": digest.hexdigest(),
    }


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of what turns a text into ids: vocabulary, merges, normalisation, added tokens."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: settings[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    kept["bos"] = tokenizer.bos_token
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()
