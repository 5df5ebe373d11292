"""Keys and values of a shared prefix, for models that cannot be packed."""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


def run_prefix(decoder, ids: torch.Tensor) -> Cache:
    """Keys and values of ids [1, P], to be continued by batches of any size."""
    cache = DynamicCache(config=decoder.config)
    decoder(input_ids=ids, past_key_values=cache, use_cache=True)
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
