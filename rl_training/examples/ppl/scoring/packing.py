"""Rows end to end in one sequence, each blind to its neighbours: no padding, and a shared prefix runs once.

    pack        p1 p2 p3 | a1 a2 | b1 b2 b3 | c1 c2       a and b go on from the prefix p, c stands for itself
    a2 sees     p1 p2 p3   a1 a2
    b3 sees     p1 p2 p3           b1 b2 b3

All that is not attention (the matrix products) sees one long sequence. The attention runs span by span, by the model's
own function, spans of like shape together; on a GPU, in 16 bit, one kernel takes all spans of a layer at once.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .batching import Pack, Row, padded

# --- devices ---------------------------------------------------------------------------------------------------------

# Arrays to the device of a model.


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """From pinned memory to a GPU, which copies it in its turn; from other memory one would wait for its turn."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# --- packed ----------------------------------------------------------------------------------------------------------

IMPLEMENTATION = "multi_level_ppl_packed"
_OWN = "sdpa"  # transformers' default, and the one that is called for a span
_SHORT, _STEP = 64, 8  # spans of at most so many tokens are padded to a multiple of so many
_pack: ContextVar["_Spans"] = ContextVar("pack")


class CannotPackError(Exception):
    """The model's attention is given something that a span alone does not tell."""


def can_pack(decoder) -> bool:
    """Whether the decoder may be asked; whether it then computes the same is for a probe to tell.

    Not where a layer slides or holds a recurrent state, and where Unsloth has put its own kernels only if one kernel
    takes all spans: there is no function of the model's own to call for one.
    """
    config = decoder.config
    if config.sub_configs or "position_ids" not in inspect.signature(decoder.forward).parameters:
        return False
    if of_unsloth(decoder):
        usable = _unsloth_attention(decoder) is not None and _one_kernel(decoder.device, decoder.dtype)
    else:
        usable = getattr(config, "_attn_implementation", None) == _OWN
    return usable and plain_cache(config)


def would_pack(decoder) -> str | None:
    """The attention implementation that stands in the way of packs, and only it; None if there is none."""
    config = decoder.config
    attention = getattr(config, "_attn_implementation", None)
    known = "position_ids" in inspect.signature(decoder.forward).parameters and getattr(
        decoder, "_supports_sdpa", False
    )
    of_its_own = config.sub_configs or of_unsloth(decoder) or attention in (None, _OWN)
    return attention if known and not of_its_own and plain_cache(config) else None


def plain_cache(config) -> bool:
    """Every layer keeps the keys and values of all tokens: none slides, none holds a recurrent state."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def run_packed(decoder, pack: Pack) -> torch.Tensor:
    """Hidden states [T, H] of a pack's tokens. Raises `CannotPackError`."""
    device = decoder.device
    ids, positions = (to_device(values[None], device) for values in (pack.ids, pack.positions))
    options = {}
    if of_unsloth(decoder):
        # Without them it would cut a pack to `max_seq_length` tokens.
        lengths = [end - start for start, end, _, _ in pack.spans]
        options["packed_seq_lengths"] = torch.tensor(lengths, dtype=torch.int32)
    with _attending(decoder, _Spans(pack, device)):
        return decoder(input_ids=ids, position_ids=positions, use_cache=False, **options).last_hidden_state[0]


class _Spans:
    """What the attention of a pack needs, the same in every layer. Each way of computing it makes its own part."""

    def __init__(self, pack: Pack, device: torch.device) -> None:
        self._spans = np.array(pack.spans)
        self._tokens = len(pack.ids)
        self._device = device

    @functools.cached_property
    def by_shape(self) -> list["_Alike"]:
        shapes: dict[tuple[int, int], list[list[int]]] = {}
        for span in self._spans.tolist():
            start, end, _, prefix = span
            shapes.setdefault((_padded(end - start), prefix), []).append(span)
        return [_Alike.of(*shape, np.array(spans), self._tokens, self._device) for shape, spans in shapes.items()]

    @functools.cached_property
    def together(self) -> "_Together":
        return _Together.of(self._spans, self._device)


def _padded(length: int) -> int:
    """Short spans are many and of many lengths: what some are padded costs less than a call for each length."""
    return -(-length // _STEP) * _STEP if length <= _SHORT else length


@dataclass(frozen=True)
class _Alike:
    """Spans that are padded to one length, behind prefixes of one length: they are the rows of one call.

    queries, keys: where their tokens, and those that they see, are in the pack: of one span a slice, which copies
    nothing; of n int64 [n * L]. written: where what their tokens see is written; padding, which stands at the end,
    where no token sees it, one past the pack's. mask: bool [1, 1, queries, keys]; None: plainly causal.
    """

    count: int
    queries: slice | torch.Tensor
    keys: slice | torch.Tensor
    written: slice | torch.Tensor
    mask: torch.Tensor | None

    @classmethod
    def of(cls, length: int, prefix: int, spans: np.ndarray, tokens: int, device: torch.device) -> "_Alike":
        """spans: int64 [n, 4], as in a `Pack`, of at most `length` tokens; `tokens`: of the pack."""
        starts, ends, prefix_starts, _ = spans.T[:, :, None]
        own = np.minimum(starts + np.arange(length), ends - 1)
        seen = np.concatenate([prefix_starts + np.arange(prefix), own], axis=1)
        written = np.where(starts + np.arange(length) < ends, own, tokens)
        mask = None
        if prefix:
            shape = (length, prefix + length)
            mask = torch.ones(shape, dtype=torch.bool, device=device).tril(prefix)[None, None]
        if len(spans) == 1 and written[0, -1] < tokens and seen[0, -1] - seen[0, 0] == seen.shape[1] - 1:
            queries, keys = (slice(int(indices[0, 0]), int(indices[0, -1]) + 1) for indices in (own, seen))
            return cls(1, queries, keys, queries, mask)
        queries, keys, written = (to_device(indices.ravel(), device) for indices in (own, seen, written))
        return cls(len(spans), queries, keys, written, mask)


@dataclass(frozen=True)
class _Together:
    """All spans, for one kernel.

    query_ends, key_ends: int32 [S + 1], where the queries and the keys of each span end. longest_query, longest_key: of
    a span. keys: int64, where the keys are in the pack; None if they are the pack as it stands.
    """

    query_ends: torch.Tensor
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int
    keys: torch.Tensor | None

    @classmethod
    def of(cls, spans: np.ndarray, device: torch.device) -> "_Together":
        starts, ends, _, prefixes = spans.T
        queries, seen = ends - starts, prefixes + ends - starts
        keys = None
        if prefixes.any():
            pieces = [
                piece
                for start, end, prefix_start, prefix in spans.tolist()
                for piece in (np.arange(prefix_start, prefix_start + prefix), np.arange(start, end))
            ]
            keys = to_device(np.concatenate(pieces), device)
        query_ends, key_ends = (
            to_device(np.cumsum([0, *counts]).astype(np.int32), device) for counts in (queries, seen)
        )
        return cls(query_ends, key_ends, int(queries.max()), int(seen.max()), keys)


@contextmanager
def _attending(decoder, spans: _Spans) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(_pack.reset, _pack.set(spans))
        if of_unsloth(decoder):
            names = _unsloth_attention(decoder)
            stack.callback(names.__setitem__, "run_attention", names["run_attention"])
            names["run_attention"] = _unsloth_packed
        else:
            stack.callback(setattr, decoder.config, "_attn_implementation", _OWN)
            decoder.config._attn_implementation = IMPLEMENTATION
        yield


# --- one kernel for all spans ----------------------------------------------------------------------------------------


@functools.cache  # asked in every layer
def _varlen() -> Callable | None:
    """PyTorch's attention over sequences of different lengths, from the version on that has causal ones (2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if _takes(varlen_attn, "window_size") else None


@functools.cache  # asked in every layer
def _takes(function: Callable, name: str) -> bool:
    return name in inspect.signature(function).parameters


def _one_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `_all_spans` runs there: an Ampere GPU or a later one, in 16 bit."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and _varlen() is not None
    )


def _fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Flash attention's limits: one width of at most 256, a multiple of 8."""
    width = query.shape[-1]
    return (
        _one_kernel(query.device, query.dtype)
        and query.dtype == key.dtype == value.dtype
        and width == key.shape[-1] == value.shape[-1]
        and width <= 256
        and width % 8 == 0
    )


def _all_spans(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """[T, heads, width] from query [T, heads, width], key and value [T, key heads, width] of a pack."""
    spans = _pack.get().together
    if spans.keys is not None:
        key, value = key[spans.keys], value[spans.keys]
    kernel, grouped = _varlen(), {}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and _takes(kernel, "enable_gqa"):  # from PyTorch 2.12 on
        grouped["enable_gqa"] = True
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    # A window that ends at the query is the causal one, counted from the last key: a row sees all of its prefix.
    return kernel(
        query,
        key,
        value,
        spans.query_ends,
        spans.key_ends,
        spans.longest_query,
        spans.longest_key,
        scale=scale,
        window_size=(-1, 0),
        **grouped,
    )


# --- transformers ----------------------------------------------------------------------------------------------------


def _attention(module, query, key, value, attention_mask, **options):
    """[1, T, heads, width] from query, key and value [1, heads, T, width], as attention functions of transformers."""
    if any(options.get(name) is not None for name in ("sliding_window", "softcap", "s_aux", "position_bias")):
        raise CannotPackError(f"{type(module).__name__} is no plain causal attention")
    if _fits(query, key, value):
        output = _all_spans(*(x[0].transpose(0, 1) for x in (query, key, value)), options.get("scaling"))
        return output[None], None
    result = None
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
    if not (plain and context.attention_mask is None and _fits(Q, K, V)):
        raise CannotPackError("Unsloth's attention is given more than queries, keys and values")
    return _all_spans(*(x[0].transpose(0, 1) for x in (Q, K, V)), scale)[None]


AttentionInterface.register(IMPLEMENTATION, _attention)


# --- padded ----------------------------------------------------------------------------------------------------------

# For models that cannot be packed: rows in a batch, padded on the right, behind the keys and values of their prefix.
#
# prefix      p1 p2 p3      runs once, is never copied whole
# batch       a1 a2 .       a and b go on from it; padding on the right cannot change the tokens before it
#             b1 b2 b3


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
