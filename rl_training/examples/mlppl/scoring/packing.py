"""Rows end to end in one sequence, each blind to its neighbours: no padding, and a shared prefix runs once.

    pack        p1 p2 p3 | a1 a2 | b1 b2 b3 | c1 c2       a and b go on from the prefix p, c stands for itself
    a2 sees     p1 p2 p3   a1 a2
    b3 sees     p1 p2 p3           b1 b2 b3

What all rows begin with, such as examples, may have run before the pack: they see its keys and values, too.

All that is not attention (the matrix products) sees one long sequence. The attention runs span by span, by the model's
own function, spans of like shape together; on a GPU, in 16 bit, one kernel takes all spans of a layer at once.

A model that cannot be packed is given padded batches, behind the keys and values of their prefix.
"""

import functools
import inspect
import logging
from contextlib import ExitStack
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .batching import Pack

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None

logger = logging.getLogger(__name__)

IMPLEMENTATION = "multi_level_ppl_packed"
_OWN = "sdpa"  # transformers' default, and the one that is called for a span
_SHORT, _STEP = 64, 8  # spans of at most so many tokens are padded to a multiple of so many
_pack: ContextVar["_Spans"] = ContextVar("pack")


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """From pinned memory to a GPU, which copies it in its turn; from other memory one would wait for its turn."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def can_pack(decoder, name: str) -> bool:
    """Whether the decoder may be asked; whether it then computes the same is for a probe to tell.

    Not where a layer slides or holds a recurrent state, and where Unsloth has put its own kernels only if one kernel
    takes all spans: there is no function of the model's own to call for one. Warns of an attention implementation that
    alone stands in the way; name: the model's.
    """
    config, attention = decoder.config, getattr(decoder.config, "_attn_implementation", None)
    if config.sub_configs or not _takes(decoder.forward, "position_ids") or not _plain_cache(config):
        return False
    if of_unsloth(decoder):
        return _unsloth_attention(decoder) is not None and one_kernel(decoder.device, decoder.dtype)
    if attention not in (None, _OWN) and getattr(decoder, "_supports_sdpa", False):
        logger.warning(
            "%s runs with attention %r, so its rows are padded, which takes longer: load it with "
            "attn_implementation='sdpa'",
            name,
            attention,
        )
    return attention == _OWN


def can_continue(decoder) -> bool:
    """Whether the decoder may be given the keys and values of a prefix; whether it then computes the same is for a
    probe to tell. Not where it is patched by Unsloth for its own kernels, or keeps another kind of state."""
    return _cache_name(decoder) is not None and not of_unsloth(decoder) and _plain_cache(decoder.config)


def _plain_cache(config) -> bool:
    """Every layer keeps the keys and values of all tokens: none slides, none holds a recurrent state."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _takes(function, name: str) -> bool:
    return name in inspect.signature(function).parameters


# --- padded batches --------------------------------------------------------------------------------------------------


def hidden_states(decoder, ids: torch.Tensor, prefix: Cache | None = None) -> torch.Tensor:
    """[B, T, H], from ids [B, T] padded on the right, which cannot change earlier tokens of a causal model.

    prefix: keys and values of what stands before each of the rows.
    """
    behind = {} if prefix is None else {_cache_name(decoder): prefix}
    return decoder(input_ids=ids, use_cache=prefix is not None, **behind).last_hidden_state


def run_prefix(decoder, ids: torch.Tensor, begun: Cache | None = None) -> Cache:
    """Keys and values of ids [1, P], to be continued by batches of any size. begun: those of the first of them, fewer
    than P."""
    cache, done = DynamicCache(config=decoder.config), 0
    if begun is not None:
        done = begun.get_seq_length()
        for layer, of in zip(cache.layers, begun.layers, strict=True):
            layer.update(of.keys, of.values)
    hidden_states(decoder, ids[:, done:], cache)
    return Cache(layers=[PrefixLayer(layer.keys, layer.values) for layer in cache.layers])


def first_of(cache: Cache, tokens: int) -> Cache:
    """Keys and values of the first tokens of a prefix."""
    return Cache(layers=[PrefixLayer(one.keys[:, :, :tokens], one.values[:, :, :tokens]) for one in cache.layers])


class PrefixLayer(DynamicLayer):
    """One layer's keys and values of a prefix: read by every row of a batch, never grown, so never copied whole."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states, value_states, *args, **kwargs):
        given = (self.keys, key_states), (self.values, value_states)
        return tuple(torch.cat([before.expand(len(own), -1, -1, -1), own], dim=-2) for before, own in given)


def _cache_name(decoder) -> str | None:
    """The argument that takes keys and values: transformers 5.24 renamed it. None: the decoder takes none."""
    return next((name for name in ("cache", "past_key_values") if _takes(decoder.forward, name)), None)


# --- packs -----------------------------------------------------------------------------------------------------------


def run_packed(decoder, pack: Pack, past: Cache | None = None) -> torch.Tensor:
    """Hidden states [T, H] of a pack's tokens. past: keys and values of what stands before all its rows. Raises
    `NotImplementedError` where the model's attention is given what a span alone does not tell."""
    ids, positions = (to_device(values[None], decoder.device) for values in (pack.ids, pack.positions))
    options = {}
    with ExitStack() as stack:
        stack.callback(_pack.reset, _pack.set(_Spans(pack, decoder.device, past)))
        if of_unsloth(decoder):
            names = _unsloth_attention(decoder)
            stack.callback(names.__setitem__, "run_attention", names["run_attention"])
            names["run_attention"] = _unsloth_packed
            # Without them it would cut a pack to `max_seq_length` tokens.
            lengths = [end - start for start, end, _, _ in pack.spans]
            options["packed_seq_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        else:
            stack.callback(setattr, decoder.config, "_attn_implementation", _OWN)
            decoder.config._attn_implementation = IMPLEMENTATION
        return decoder(input_ids=ids, position_ids=positions, use_cache=False, **options).last_hidden_state[0]


class _Alike(NamedTuple):
    """Spans that are padded to one length, behind prefixes of one length: they are the rows of one call.

    queries, keys: where their tokens are in the pack, and those that they see in the past and the pack: of one span a
    slice, which copies nothing; of n int64 [n * L]. written: where what their tokens see is written; padding, which
    stands at the end, where no token sees it, one past the pack's. mask: bool [1, 1, queries, keys]; None: plainly
    causal.
    """

    count: int
    queries: slice | torch.Tensor
    keys: slice | torch.Tensor
    written: slice | torch.Tensor
    mask: torch.Tensor | None


class _Spans:
    """What the attention of a pack needs, the same in every layer. Each way of computing it makes its own part."""

    def __init__(self, pack: Pack, device: torch.device, past: Cache | None) -> None:
        self._pack, self._device, self._past = pack, device, past

    def behind_past(self, module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, key heads, P + T, width] each: a layer's keys and values of what all rows begin with, and of the pack."""
        if self._past is None:
            return key, value
        of = self._past.layers[module.layer_idx]
        return torch.cat([of.keys, key], dim=2), torch.cat([of.values, value], dim=2)

    @functools.cached_property
    def by_shape(self) -> list[_Alike]:
        shapes: dict[tuple[int, int], list[tuple]] = {}
        for span in self._pack.spans:
            start, end, _, prefix = span
            length = end - start
            if length <= _SHORT:  # such are many and of many lengths: padding costs less than a call for each length
                length = -(-length // _STEP) * _STEP
            shapes.setdefault((length, prefix), []).append(span)
        return [self._alike(*shape, np.array(spans)) for shape, spans in shapes.items()]

    def _alike(self, length: int, prefix: int, spans: np.ndarray) -> _Alike:
        """spans: int64 [n, 4], as in a `Pack`, of at most `length` tokens."""
        starts, ends, prefix_starts, _ = spans.T[:, :, None]
        tokens = len(self._pack.ids)
        padded = starts + np.arange(length)
        own, written = np.minimum(padded, ends - 1), np.where(padded < ends, padded, tokens)
        past = self._pack.past
        before = np.tile(np.arange(past), (len(spans), 1))
        seen = np.concatenate([before, past + prefix_starts + np.arange(prefix), past + own], axis=1)
        mask, behind = None, past + prefix
        if behind:
            mask = torch.ones(1, 1, length, behind + length, dtype=torch.bool, device=self._device).tril(behind)
        if len(spans) == 1 and written[0, -1] < tokens and seen[0, -1] - seen[0, 0] == seen.shape[1] - 1:
            queries, keys = (slice(int(one[0, 0]), int(one[0, -1]) + 1) for one in (own, seen))
            return _Alike(1, queries, keys, queries, mask)
        return _Alike(len(spans), *(to_device(one.ravel(), self._device) for one in (own, seen, written)), mask)

    @functools.cached_property
    def together(self) -> tuple[torch.Tensor | None, tuple]:
        """For one kernel: int64, where the keys of all spans are in the pack, None if they are the pack as it stands;
        and int32 [S + 1] each, where the queries and the keys of each span end, and the most that a span has of each.
        """
        starts, ends, _, prefixes = np.array(self._pack.spans).T
        keys, past = None, self._pack.past
        if past or prefixes.any():
            pieces = []
            for start, end, prefix_start, prefix in self._pack.spans:
                pieces.append(np.arange(past))
                pieces += [past + np.arange(prefix_start, prefix_start + prefix), past + np.arange(start, end)]
            keys = to_device(np.concatenate(pieces), self._device)
        counts = ends - starts, past + prefixes + ends - starts
        bounds = [to_device(np.cumsum([0, *one]).astype(np.int32), self._device) for one in counts]
        return keys, (*bounds, *(int(one.max()) for one in counts))


def one_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `_all_spans` runs there: an Ampere GPU or a later one, in 16 bit, with a PyTorch (from 2.11 on) whose
    attention over sequences of different lengths has causal ones."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and varlen_attn is not None
        and _kernel_takes(varlen_attn, "window_size")
    )


_kernel_takes = functools.cache(_takes)  # asked in every layer


def _all_spans(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale) -> torch.Tensor | None:
    """[1, T, heads, width] from query [1, heads, T, width], key and value [1, key heads, T, width] of a pack; None
    beyond flash attention's limits: one width of at most 256, a multiple of 8."""
    width = query.shape[-1]
    one_type = query.dtype == key.dtype == value.dtype and width == key.shape[-1] == value.shape[-1]
    if not (one_type and width <= 256 and width % 8 == 0 and one_kernel(query.device, query.dtype)):
        return None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    keys, limits = _pack.get().together
    if keys is not None:
        key, value = key[keys], value[keys]
    groups, grouped = query.shape[1] // key.shape[1], {}
    if groups > 1 and _kernel_takes(varlen_attn, "enable_gqa"):  # from PyTorch 2.12 on
        grouped["enable_gqa"] = True
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    # A window that ends at the query is the causal one, counted from the last key: a row sees all of its prefix.
    return varlen_attn(query, key, value, *limits, scale=scale, window_size=(-1, 0), **grouped)[None]


def _attention(module, query, key, value, attention_mask, **options):
    """[1, T, heads, width] from query, key and value [1, heads, T, width], as attention functions of transformers."""
    if any(options.get(name) is not None for name in ("sliding_window", "softcap", "s_aux", "position_bias")):
        raise NotImplementedError(f"{type(module).__name__} is no plain causal attention")
    key, value = _pack.get().behind_past(module, key, value)
    result = _all_spans(query, key, value, options.get("scaling"))
    if result is not None:
        return result, None
    for alike in _pack.get().by_shape:
        rows = _rows(query, alike.queries, alike.count), *(_rows(x, alike.keys, alike.count) for x in (key, value))
        output = sdpa_attention_forward(module, *rows, alike.mask, **options)[0].flatten(0, 1)
        if result is None:
            result = output.new_empty(query.shape[2] + 1, *output.shape[1:])
        result[alike.written] = output
    return result[None, :-1], None


def _rows(x: torch.Tensor, indices: slice | torch.Tensor, count: int) -> torch.Tensor:
    """[count, heads, L, width] from x [1, heads, T, width]."""
    if isinstance(indices, slice):
        return x[:, :, indices]
    return x[0].index_select(1, indices).unflatten(1, (count, -1)).transpose(0, 1)


AttentionInterface.register(IMPLEMENTATION, _attention)


# --- Unsloth, on a GPU -----------------------------------------------------------------------------------------------


def of_unsloth(decoder) -> bool:
    """Whether Unsloth has put its own kernels in place of the decoder's forward pass, as it does on a GPU."""
    return decoder.forward.__module__.startswith("unsloth")


def _unsloth_attention(decoder) -> dict | None:
    """The namespace in which its attention layers look up `run_attention`; None if they do not."""
    for module in decoder.modules():
        names = getattr(type(module).forward, "__globals__", {})
        if type(module).__name__.endswith("Attention") and "run_attention" in names:
            return names
    return None


def _unsloth_packed(*, config, context, Q, K, V) -> torch.Tensor:
    """[1, T, heads, width] from Q, K and V [1, heads, T, width]: in place of `run_attention`."""
    asked = dict(config.flash_varlen_kwargs)
    scale = asked.pop("softmax_scale", None)
    plain = asked.pop("window_size", None) in (None, (-1, -1)) and asked == {"dropout_p": 0.0, "causal": True}
    result = _all_spans(Q, K, V, scale) if plain and context.attention_mask is None else None
    if result is None:
        raise NotImplementedError("Unsloth's attention is given more than queries, keys and values")
    return result
