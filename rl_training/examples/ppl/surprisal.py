"""Encoded texts -> the surprisal of every scored token: the only forward pass of the project.

No logits tensor is kept: the decoder runs once, the hidden states of the scored tokens alone go through the LM head,
a slice at a time. Rows of like length share a batch, rows with a common prefix share its keys and values.
"""

import inspect
import logging

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .batching import Group, Row, batches, share_prefixes, windows
from .frozen import frozen
from .tokens import Encoded

logger = logging.getLogger(__name__)

# Device type -> (padded tokens of one batch, bytes of one slice of logits, tokens that one more forward pass costs).
# CPU, measured on GPT-2 124M: fewer than 100 rows of logits slow the matrix product, and above 32 MiB glibc takes every
# slice anew from the system; a forward pass costs its tokens and some 15 to 30 more.
_SIZES = {"cpu": (1024, 24 << 20, 32), "cuda": (16384, 256 << 20, 512)}


class SurprisalScorer:
    """Token surprisals under one causal language model, which is used frozen.

    `model`: plain, PEFT-wrapped, bitsandbytes or Unsloth. `batch_size`: most texts in one forward pass (None: as many
    as fit). `max_batch_tokens`: most tokens in one, padding included; halved for good when memory runs out.
    """

    def __init__(self, model, batch_size: int | None = None, max_batch_tokens: int | None = None) -> None:
        self.model = model
        self.batch_size = batch_size
        default_tokens, self._slice_bytes, self._overhead = _SIZES.get(model.device.type, _SIZES["cuda"])
        self.max_batch_tokens = max_batch_tokens or default_tokens
        self._head_agrees: bool | None = None  # None: not compared yet
        self._cache_agrees: bool | None = None

    def score(self, texts: list[Encoded]) -> list[np.ndarray]:
        """float64 [n] per text: -ln p(token | all before it) in nats, for its scored tokens in order.

        A text longer than the model's window is scored in windows. Raises `FloatingPointError` if a logit is NaN.
        """
        surprisals = [np.zeros(len(text.positions)) for text in texts]
        rows = [row for number, text in enumerate(texts) for row in windows(text, self.window, number)]
        if not rows:
            return surprisals
        with frozen(self.model):
            if self._head_agrees is None:
                self._head_agrees = self._compare_head()
            for group in self._groups(rows):
                prefix = self._run_prefix(group) if group.prefix else None
                for batch in batches(group, self._budget, self._overhead, self.batch_size):
                    self._score_batch(batch, group.prefix, prefix, surprisals)
        for number, surprisal in enumerate(surprisals):
            if np.isnan(surprisal).any():
                raise FloatingPointError(f"the model's logits are NaN for text {number} of this call")
        return surprisals

    @property
    def window(self) -> int | None:
        """Most tokens the model takes at once, BOS included; None if its architecture sets no limit."""
        base = self._base
        sizes = [
            getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", None),
            getattr(base, "max_seq_length", None),  # Unsloth cuts there without a word
        ]
        return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)

    # --- the model's parts -------------------------------------------------------------------------------------------

    @property
    def _base(self):
        """The transformers model under wrappers of accelerate, torch.compile and PEFT."""
        model = extract_model_from_parallel(self.model, keep_torch_compile=False)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def _decoder(self):
        return getattr(self._base, self._base.base_model_prefix, None)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [N, V] from hidden states [N, H], scaled and capped as the architecture does it."""
        base = self._base
        head = base.get_output_embeddings()
        config = base.config.get_text_config(decoder=True)
        logits = head(hidden.to(head.weight.dtype) if head.weight.is_floating_point() else hidden)
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scale
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits.float()

    @property
    def _slice_rows(self) -> int:
        return max(1, self._slice_bytes // (4 * self._base.config.get_text_config(decoder=True).vocab_size))

    @property
    def _budget(self) -> int:
        return self.max_batch_tokens if self._head_agrees else min(self.max_batch_tokens, self._slice_rows)

    # --- one-time comparisons ----------------------------------------------------------------------------------------

    def _probe_ids(self) -> torch.Tensor:
        vocabulary = self._base.get_input_embeddings().weight.shape[0]
        return torch.linspace(0, vocabulary - 1, 12, device=self.model.device).long()[None]

    def _own_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 [B, T, V], from the model's own forward pass."""
        logits = self._base(input_ids=ids, use_cache=False).logits
        vocabulary = self._base.config.get_text_config(decoder=True).vocab_size
        if logits.shape[-1] != vocabulary:
            raise RuntimeError(f"the model returned {logits.shape[-1]} values a token instead of {vocabulary} logits")
        return logits.float()

    def _compare_head(self) -> bool:
        """Whether decoder, LM head and the scalings known here give the model's own log-probabilities."""
        if self._decoder is None or self._base.get_output_embeddings() is None:
            return False
        ids = self._probe_ids()
        ours = self._logits(self._hidden(ids)[0])
        own = self._own_logits(ids)[0]
        agrees = ours.shape == own.shape and _agree(ours, own, self.model.dtype)
        if not agrees:
            logger.warning(
                "%s does not compute its logits as decoder + LM head: its own logits are used, which takes more memory",
                type(self._base).__name__,
            )
        return agrees

    def _compare_cache(self) -> bool:
        """Whether the model continues from the keys and values of a prefix as from the prefix itself."""
        decoder = self._decoder
        if not self._head_agrees or "past_key_values" not in inspect.signature(decoder.forward).parameters:
            return False
        if decoder.forward.__module__.startswith("unsloth") or not _plain_cache(self._base.config):
            return False
        ids = self._probe_ids()
        hidden = self._hidden(ids[:, 4:].expand(2, -1), self._prefix(ids[:, :4]))
        return _agree(self._logits(hidden[1]), self._logits(self._hidden(ids)[0, 4:]), self.model.dtype)

    # --- forward -----------------------------------------------------------------------------------------------------

    def _groups(self, rows: list[Row]) -> list[Group]:
        groups = share_prefixes(rows, 2 * self._overhead)
        if any(group.prefix for group in groups):
            if self._cache_agrees is None:
                self._cache_agrees = self._compare_cache()
            if not self._cache_agrees:
                return [Group(0, rows)]
        return groups

    def _hidden(self, ids: torch.Tensor, prefix: Cache | None = None) -> torch.Tensor:
        """[B, T, H], from ids [B, T] padded on the right: that cannot change earlier tokens of a causal model."""
        return self._decoder(input_ids=ids, past_key_values=prefix, use_cache=prefix is not None).last_hidden_state

    def _prefix(self, ids: torch.Tensor) -> Cache:
        """Keys and values of ids [1, P], to be continued by batches of any size."""
        cache = DynamicCache(config=self._base.config)
        self._decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        return Cache(layers=[_PrefixLayer(layer) for layer in cache.layers])

    def _run_prefix(self, group: Group) -> Cache:
        return self._prefix(torch.from_numpy(group.rows[0].inputs[None, : group.prefix]).to(self.model.device))

    def _score_batch(self, batch: list[Row], skip: int, prefix: Cache | None, surprisals: list[np.ndarray]) -> None:
        """Score rows from token `skip` on; in halves if they exceed the token budget or memory."""
        longest = max(len(row.inputs) for row in batch) - skip
        fits = len(batch) == 1 or len(batch) * longest <= self._budget
        if fits:
            try:
                self._forward(batch, longest, skip, prefix, surprisals)
                return
            except RuntimeError as error:
                if len(batch) == 1 or not should_reduce_batch_size(error):
                    raise
            clear_device_cache(garbage_collection=True)
            self.max_batch_tokens = max(1, len(batch) * longest // 2)
            logger.warning("out of memory: batches now hold at most %d tokens", self.max_batch_tokens)
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            self._score_batch(half, skip, prefix, surprisals)

    def _forward(self, batch, longest, skip, prefix, surprisals) -> None:
        ids = np.zeros((len(batch), longest), dtype=np.int64)
        for place, row in enumerate(batch):
            ids[place, : len(row.inputs) - skip] = row.inputs[skip:]
        place = np.repeat(np.arange(len(batch)), [len(row.read) for row in batch])
        read = np.concatenate([row.read for row in batch]) - skip
        inputs = torch.from_numpy(ids).to(self.model.device)
        states = self._hidden(inputs, prefix) if self._head_agrees else self._own_logits(inputs)
        chosen = states[torch.from_numpy(place).to(states.device), torch.from_numpy(read).to(states.device)]
        labels = torch.from_numpy(np.concatenate([row.labels for row in batch])).to(states.device)
        del states
        count = -(-len(labels) // self._slice_rows)  # equal slices: a short last one would run at half the speed
        slices = zip(chosen.tensor_split(count), labels.tensor_split(count), strict=True)
        found = torch.cat([_surprisal(self._logits(c) if self._head_agrees else c, y) for c, y in slices])
        values = found.double().cpu().numpy()
        end = np.cumsum([len(row.read) for row in batch])
        for row, piece in zip(batch, np.split(values, end[:-1]), strict=True):
            surprisals[row.text][row.first : row.first + len(piece)] = piece


class _PrefixLayer(DynamicLayer):
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


def _surprisal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """float32 [N], nats, from float32 logits [N, V] and labels [N]."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def _plain_cache(config) -> bool:
    """Every layer keeps the keys and values of all tokens: none slides, none holds a recurrent state."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _agree(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Equal log-probabilities, up to what the model's own dtype loses."""
    difference = (a.log_softmax(-1) - b.log_softmax(-1)).abs()
    return bool(difference.mean() < (1e-4 if dtype == torch.float32 else 0.1))
