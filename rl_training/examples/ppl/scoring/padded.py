"""For models that cannot be packed: rows in a batch, padded on the right, behind the keys and values of their prefix.

prefix      p1 p2 p3      runs once, is never copied whole
batch       a1 a2 .       a and b go on from it; padding on the right cannot change the tokens before it
            b1 b2 b3
"""

import inspect
from collections.abc import Callable, Sequence

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .batching import Row, padded
from .devices import to_device
from .packed import of_unsloth, plain_cache


def can_continue(decoder) -> bool:
    """Whether the decoder may be given the keys and values of a prefix; whether it then computes the same is for a
    probe to tell. Not where it is patched by Unsloth for its own kernels, or keeps another kind of state."""
    return cache_name(decoder) is not None and not of_unsloth(decoder) and plain_cache(decoder.config)


def cache_name(decoder) -> str | None:
    """The argument that takes keys and values: transformers 5.24 renamed it. None: the decoder takes none."""
    parameters = inspect.signature(decoder.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def run_padded(forward: Callable, batch: Sequence[Row], skip: int, device: torch.device) -> torch.Tensor:
    """[m, H], what `forward` gives at the indices that are read of the rows from token `skip` on, in the rows' order.

    forward: ids [B, T] -> hidden states or logits [B, T, H].
    """
    ids, rows, read = padded(batch, skip)
    states = forward(to_device(ids, device))
    return states[to_device(rows, states.device), to_device(read, states.device)]


def run_prefix(decoder, ids: torch.Tensor) -> Cache:
    """Keys and values of ids [1, P], to be continued by batches of any size."""
    cache = DynamicCache(config=decoder.config)
    decoder(input_ids=ids, use_cache=True, **{cache_name(decoder): cache})
    return Cache(layers=[PrefixLayer(layer) for layer in cache.layers])


class PrefixLayer(DynamicLayer):
    """One layer's keys and values of a prefix: read by every row of a batch, never grown, so never copied whole."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values

    def update(self, key_states, value_states, *args, **kwargs):
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2),
        )
