"""Rows end to end in one sequence, each blind to its neighbours: no padding, and a shared prefix runs once.

    pack        p1 p2 p3 | a1 a2 | b1 b2 b3 | c1 c2       a and b go on from the prefix p, c stands for itself
    a2 sees     p1 p2 p3   a1 a2
    b3 sees     p1 p2 p3           b1 b2 b3

All that is not attention (the matrix products) sees one long sequence; the attention runs span by span, by the model's
own function.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .batching import Pack

IMPLEMENTATION = "multi_level_ppl_packed"
_OWN = "sdpa"  # transformers' default, and the one that is called for a span
_pack: ContextVar[Pack] = ContextVar("pack")


class CannotPackError(Exception):
    """The model's attention is given something that a span alone does not tell."""


def can_pack(decoder) -> bool:
    """Whether the decoder may be asked; whether it then computes the same is for a probe to tell.

    Not where a layer slides, holds a recurrent state or is patched by Unsloth for its own kernels.
    """
    config = decoder.config
    return (
        getattr(config, "_attn_implementation", None) == _OWN
        and not config.sub_configs
        and not decoder.forward.__module__.startswith("unsloth")
        and "position_ids" in inspect.signature(decoder.forward).parameters
        and plain_cache(config)
    )


def plain_cache(config) -> bool:
    """Every layer keeps the keys and values of all tokens: none slides, none holds a recurrent state."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def run_packed(decoder, pack: Pack) -> torch.Tensor:
    """Hidden states [T, H] of a pack's tokens. Raises `CannotPackError`."""
    device = decoder.device
    ids, positions = (torch.from_numpy(values[None]).to(device) for values in (pack.ids, pack.positions))
    with _attending(decoder.config, pack):
        return decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]


@contextmanager
def _attending(config, pack: Pack) -> Iterator[None]:
    token = _pack.set(pack)
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = _OWN
        _pack.reset(token)


def _attention(module, query, key, value, attention_mask, **options):
    """[1, T, heads, width] from query, key and value [1, heads, T, width], as attention functions of transformers."""
    if any(options.get(name) is not None for name in ("sliding_window", "softcap", "s_aux", "position_bias")):
        raise CannotPackError(f"{type(module).__name__} is no plain causal attention")
    found = []
    masks: dict[tuple[int, int], torch.Tensor] = {}
    for start, end, prefix_start, prefix in _pack.get().spans:
        keys, values, mask = key[:, :, start:end], value[:, :, start:end], None
        if prefix:
            before = slice(prefix_start, prefix_start + prefix)
            keys, values = (torch.cat([x[:, :, before], own], dim=2) for x, own in ((key, keys), (value, values)))
            shape = (end - start, prefix + end - start)
            if shape not in masks:
                masks[shape] = torch.ones(shape, dtype=torch.bool, device=query.device).tril(prefix)[None, None]
            mask = masks[shape]
        found.append(sdpa_attention_forward(module, query[:, :, start:end], keys, values, mask, **options)[0])
    return torch.cat(found, dim=1), None


AttentionInterface.register(IMPLEMENTATION, _attention)
