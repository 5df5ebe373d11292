"""Encoded texts -> the surprisal of every scored token: the only forward pass of the project.

No logits tensor is kept: the decoder runs once, the hidden states of the scored tokens alone go through the LM head,
a slice at a time. Rows are packed end to end and share their prefixes; where a model cannot be packed, rows of like
length share a padded batch, and rows with a common prefix its keys and values.
"""

import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.nn.functional import cross_entropy, linear
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache

from ..errors import InputError
from ..processes import in_step, is_sharded
from .batching import Group, Pack, Pass, Row, batches, cut, in_common, lay_out, packs, pasts, share_prefixes, windows
from .frozen import base_of, check_weights_only, frozen, weights_version
from .identity import describe_model, encode_probe, probe_row
from .packing import can_continue, can_pack, first_of, hidden_states, run_packed, run_prefix, to_device
from .tokens import Encoded

logger = logging.getLogger(__name__)

# --- onednn ----------------------------------------------------------------------------------------------------------

# Multiplications and additions of a product below which oneDNN's own costs, about 40 microseconds, are not earned back.
LEAST_PRODUCT = 1 << 24


def fast_products(model) -> AbstractContextManager:
    """Within it a float32 model's linear layers take their products to oneDNN, if its weights are on an AMD CPU with
    AVX-512.

    torch takes them to MKL, which there runs at half of what oneDNN, a part of torch as well, reaches. Where there is
    only AVX2, MKL is the faster one (a Zen 3: 74 against 60 GFLOP/s a core). The numbers differ as those of two MKL
    products of other sizes do, in the last digits.
    """
    # Some torch that requirements.txt allows has no get_capabilities.
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    pays = "AMD" in capabilities.get("cpu_name", "") and torch.backends.cpu.get_cpu_capability() == "AVX512"
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return _OneDNN() if model.device.type == "cpu" and there and pays else nullcontext()


class _OneDNN(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is linear:
            return _linear(*args, **kwargs)
        if function is torch.addmm and not kwargs and args[0].dim() == 1:  # transformers' Conv1D
            bias, x, weight = args
            return _linear(x, weight.t(), bias)
        return function(*args, **kwargs)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if input.dtype == weight.dtype == torch.float32 and input.numel() * weight.shape[0] >= LEAST_PRODUCT:
        return linear(input.to_mkldnn(), weight, bias).to_dense()
    return linear(input, weight, bias)


# --- head ------------------------------------------------------------------------------------------------------------

# Bytes of a piece of the logits that stays in a core's caches; a GPU's pieces are as large as they may be.
_CACHED = {"cpu": 4 << 20}
# A token so far below the likeliest one is never written, be its logit minus infinity, a dtype's lowest number or -500.
# Such logits would make every other difference small.
_RULED_OUT = -100.0


class Head:
    """The LM head of a transformers model, with the scalings of its logits that are known here.

    slice_bytes: most bytes of float32 logits at once. A plain linear head is cut along the vocabulary, so that every
    matrix product keeps all rows: half the time of cutting the rows, on a CPU. Any other head (quantised, adapted,
    hooked) is called as it is, on some of the rows at a time.
    """

    def __init__(self, base: torch.nn.Module, slice_bytes: int) -> None:
        config = base.config.get_text_config(decoder=True)

        def first(*names: str) -> float | None:
            return next((value for name in names if (value := getattr(config, name, None))), None)

        self.layer = base.get_output_embeddings()
        self.vocabulary = config.vocab_size
        self.rows = max(1, slice_bytes // (4 * self.vocabulary))  # logits of so many tokens fill a slice
        self._slice_bytes = slice_bytes
        # Cohere, Granite, Gemma, Falcon-H1 and others say in their configurations how they scale and cap logits.
        self._multiplier = first("logit_scale", "lm_head_multiplier", "output_multiplier")
        self._divisor = first("logits_scaling")
        self._cap = first("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [N, V] from hidden states [N, H]."""
        weight = self.layer.weight
        return self._scaled(self.layer(hidden.to(weight.dtype) if weight.is_floating_point() else hidden))

    def surprisal(self, hidden: torch.Tensor, labels: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [N], nats, of labels [N] from hidden states [N, H], or [M, H] of which `states` [N] says which one
        predicts a label: where several are predicted by the same, its logits are computed once."""
        layer = self.layer
        hooked = layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook")
        if type(layer) is not torch.nn.Linear or hooked:  # calling it does more than a product with its weight
            hidden = hidden if states is None else hidden[states]
            count = -(-len(labels) // self.rows)  # equal slices: a short last one would run at half the speed
            slices = zip(hidden.tensor_split(count), labels.tensor_split(count), strict=True)
            return torch.cat([cross_entropy(self.logits(some), wanted, reduction="none") for some, wanted in slices])
        hidden = hidden.to(layer.weight.dtype)
        values = min(self._slice_bytes, _CACHED.get(hidden.device.type, self._slice_bytes)) // 4
        # A multiple of 256: a GPU takes twice the time or more for a product whose rows end at odd addresses.
        width = max(1, values // len(hidden) // 256) * 256
        totals, wanted = [], torch.zeros(len(labels), device=hidden.device)
        for start in range(0, len(layer.weight), width):
            piece = slice(start, start + width)
            logits = self._scaled(
                linear(hidden, layer.weight[piece], None if layer.bias is None else layer.bias[piece])
            )
            inside = (labels >= start) & (labels < start + logits.shape[1])
            indices = (labels - start).clamp(0, logits.shape[1] - 1)
            own = logits.gather(1, indices[:, None])[:, 0] if states is None else logits[states, indices]
            wanted = torch.where(inside, own, wanted)
            # As logsumexp does it, but in place. A piece that is -inf throughout has no largest logit to subtract.
            most = logits.amax(1).clamp_(min=torch.finfo(torch.float32).min)
            totals.append(logits.sub_(most[:, None]).exp_().sum(1).log_().add_(most))
        total = torch.stack(totals).logsumexp(0)
        return (total if states is None else total[states]) - wanted

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        if self._multiplier:
            logits = logits * self._multiplier
        if self._divisor:
            logits = logits / self._divisor
        if self._cap:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits.float()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far logits [..., V] are from others, as a share of how much those vary over the vocabulary.

    A token that both rule out says nothing. One that only one of them rules out, and NaN, is infinitely far.
    """
    a, b = (x.float() - x.float().amax(-1, keepdim=True) for x in (a, b))
    ruled_out = (a <= _RULED_OUT) & (b <= _RULED_OUT)
    count = (~ruled_out).sum(-1, keepdim=True)
    a, b = (x.masked_fill(ruled_out, 0.0) for x in (a, b))
    a, b = ((x - x.sum(-1, keepdim=True) / count).masked_fill(ruled_out, 0.0) for x in (a, b))
    difference, size = float((a - b).norm()), float(b.norm())
    found = difference / size if size else difference
    return math.inf if math.isnan(found) else found


# --- surprisal -------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    most: int  # tokens of one forward pass, padding included
    enough: int  # tokens of one pass; more of them make it no faster per token, unless they share a prefix
    slice_bytes: int  # of logits
    overhead: int  # tokens that one more forward pass costs


# CPU, measured on GPT-2 124M: beyond 1,024 tokens the activations leave the caches, a forward pass costs its tokens and
# some 15 to 30 more, and above 32 MiB glibc takes every slice anew from the system.
SIZES = {"cpu": Sizes(2048, 1024, 24 << 20, 32), "cuda": Sizes(16384, 16384, 256 << 20, 512)}
# Tokens: what the attention of one more span of a pack costs; of rows that share all that they begin with; the fewest
# that run before a pack.
_SPAN_TOKENS, _SHORT, _LEAST_PAST = 8, 64, 64
# A model reads later tokens if they change earlier logits by more. In any precision: a causal model computes the same
# for the same length, and BERT's kind, with random weights, differs by 0.003 to 0.3.
_LEAST_LOOK = 1e-3


class Past(NamedTuple):
    """ids: int64 [P], with which rows begin. cache: their keys and values; None where they have not run alone."""

    ids: np.ndarray
    cache: Cache | None


_NO_PAST = Past(np.array([], dtype=np.int64), None)
# The ways of rows through a model, from the fastest on.
PACKED, PADDED, OWN_LOGITS, ROW_BY_ROW = "packed", "padded", "by its own logits", "row by row"


class SurprisalScorer:
    """Token surprisals under one causal language model, which is used frozen.

    `model`: plain, PEFT-wrapped, bitsandbytes or Unsloth. `batch_size`: most texts in one forward pass (None: as many
    as fit). `max_batch_tokens`: most tokens in one, padding included; halved for good when memory runs out.
    `adapters`: leave them on; raises `InputError` for those that are no part of the weights. `tokenizer`: the model's,
    for the fixed text of its identity.
    """

    def __init__(
        self,
        model,
        batch_size: int | None = None,
        max_batch_tokens: int | None = None,
        adapters: bool = False,
        tokenizer=None,
    ) -> None:
        check_model(model)
        if adapters:
            check_weights_only(model)
        self._base = base_of(model)  # once: accelerate visits every module for it, 10 ms of an 8B model with adapters
        # Of BART's kind the encoder would read the whole text, and the decoder would guess it one token late.
        if self._base.config.is_encoder_decoder:
            raise InputError(
                f"{type(self._base).__name__} is an encoder-decoder, which reads the whole text before it writes: "
                "expected a causal language model"
            )
        self.model = model
        self._dtype = model.dtype
        self.adapters = adapters
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._sizes = SIZES.get(model.device.type, SIZES["cuda"])
        self.max_batch_tokens = max_batch_tokens or self._sizes.most
        self.way: str | None = None  # of the rows of the last call
        self._noise: float | None = None
        self._agree: dict[str, bool] = {}  # what was compared, by name
        # The longest beginning of rows of the last call: examples come again with every call.
        self._kept = _NO_PAST
        self._kept_under: tuple | None = None

    def score(self, texts: list[Encoded]) -> list[np.ndarray]:
        """float64 [n] per text: -ln p(token | all before it) in nats, for its scored tokens in order.

        A text longer than the model's window is scored in windows. Raises `FloatingPointError` if a logit is NaN.
        Of a model whose weights are spread over processes, all of them must ask at the same time, be it for no text.
        """
        return self.start(texts)()

    def start(self, texts: list[Encoded]) -> Callable[[], list[np.ndarray]]:
        """Gives a GPU the work of `score` and does not wait for it. What is returned does, and gives what `score` gives
        or raises what it raises."""
        highest, vocabulary = max((int(text.ids.max(initial=0)) for text in texts), default=0), self._head.vocabulary
        if highest >= vocabulary:  # as a label it would have no logit
            raise InputError(
                f"a text has token number {highest}, and the model knows 0 to {vocabulary - 1}: take the model's own "
                "tokenizer, or resize the model (model.resize_token_embeddings(len(tokenizer))) and train the new rows"
            )
        scored: list[tuple[list[Row], torch.Tensor]] = []
        if is_sharded(self.model):
            with frozen(self.model, self.adapters):
                self.way = self._way_in_step  # also where it was packed before its weights were spread
                self._score_in_step(self._rows(texts), scored)
        elif any(len(text.positions) for text in texts):
            with frozen(self.model, self.adapters), fast_products(self.model):
                self.way = self._compare()
                self._forget_if_changed()
                for rows in filter(None, self._rows(texts)):
                    self._score_rows(rows, scored)
        return functools.partial(_by_text, texts, scored)

    def _forget_if_changed(self) -> None:
        """Keep nothing from before the weights changed."""
        if self._kept.cache and (self.adapters or weights_version(self.model) != self._kept_under):
            self._kept = _NO_PAST

    def __getstate__(self) -> dict:
        # A copy's parameters count their changes anew.
        return {**self.__dict__, "_kept": _NO_PAST, "_kept_under": None}

    @property
    def identity(self) -> dict:
        """What tells the model from another: see `mlppl.scoring.identity`; and, where its tokenizer is known, the
        surprisals of a fixed text, by one forward pass of the model's own.

        Raises `InputError` if they are NaN.
        """
        described = describe_model(self.model)
        if self.tokenizer is None:
            return described
        row = probe_row(encode_probe(self.tokenizer), self.window)
        with frozen(self.model, self.adapters):
            model = self.model if is_sharded(self.model) else self._base
            [batch] = batches(Group(0, [row]), len(row.inputs), 0)
            values = self._by_own_logits(model, batch).tolist()
        if any(map(math.isnan, values)):
            raise InputError(
                f"the logits of {type(self._base).__name__} in {described['dtype']} are NaN for a plain text: load it "
                "with --dtype float32 or bfloat16, or check its weights"
            )
        return {**described, "probe": [round(one, 4) for one in values]}

    @property
    def window(self) -> int | None:
        """Most tokens the model takes at once, BOS included; None if its architecture sets no limit."""
        config = self._base.config.get_text_config(decoder=True)
        names = ("max_position_embeddings", "max_seq_len", "max_target_positions")
        sizes = [getattr(config, name, None) for name in names]
        sizes.append(getattr(self._base, "max_seq_length", None))  # Unsloth cuts there without a word
        # RoBERTa counts positions from behind the one that padding has, so that it has 512 of 514; ProphetNet also asks
        # for the one after a token's own.
        ahead = 1 if getattr(self._base.config, "ngram", None) else 0
        for name, module in self._base.named_modules():
            if "position" in name and isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                sizes.append(module.num_embeddings - module.padding_idx - 1 - ahead)
        return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)

    def groups(self, rows: list[Row]) -> list[Group]:
        """The rows of a call, those together whose common prefix runs once."""
        if self.way == PACKED:
            return share_prefixes(rows, _SPAN_TOKENS, _SHORT)
        # A prefix that runs before its rows may be on the other side of `_switch` than they are.
        if self.way == PADDED and not any(map(self._is_beyond, rows)):
            groups = share_prefixes(rows, 2 * self._sizes.overhead)
            if not any(group.prefix for group in groups) or self._agrees(self._compare_cache):
                return groups
        return [Group(0, rows)]

    def _rows(self, texts: list[Encoded]) -> list[list[Row]]:
        """Rows that never share a pass: of texts up to `_switch` tokens, and of longer ones."""
        window, whole = self.window, self._switch is not None or self.way == ROW_BY_ROW
        rows = [row for number, text in enumerate(texts) for row in windows(text, window, number, whole)]
        return [[row for row in rows if self._is_beyond(row) == beyond] for beyond in (False, True)]

    def _is_beyond(self, row: Row) -> bool:
        return self._switch is not None and len(row.inputs) > self._switch

    @functools.cached_property
    def _switch(self) -> int | None:
        """Of a model with longrope (Phi-3-mini-128k): a pass with more positions takes other factors, for every row."""
        rope = getattr(self._base.config.get_text_config(decoder=True), "rope_parameters", None) or {}
        layers = rope.values() if all(isinstance(one, dict) for one in rope.values()) else [rope]
        sizes = [one["original_max_position_embeddings"] for one in layers if one.get("rope_type") == "longrope"]
        return min(sizes, default=None)

    @property
    def _decoder(self):
        return getattr(self._base, self._base.base_model_prefix, None)

    @property
    def _head(self) -> Head:
        return Head(self._base, self._sizes.slice_bytes)

    # --- one-time comparisons ----------------------------------------------------------------------------------------

    def _compare(self) -> str:
        """The fastest way that gives the model's own numbers."""
        if self._noise is None:
            self._noise = self._compare_lengths(self._base)
        if self._noise > self._most_noise:
            return ROW_BY_ROW
        if self._agrees(self._compare_head):
            return PACKED if self._agrees(self._compare_packs) else PADDED
        if self.way != OWN_LOGITS:
            logger.warning(
                "%s does not compute its logits as decoder + LM head: its own logits are used, which takes more memory",
                type(self._base).__name__,
            )
        return OWN_LOGITS

    @functools.cached_property
    def _way_in_step(self) -> str:
        """Of weights that are spread over processes, which the whole model's own forward pass gathers. A comparison of
        its own: all processes make it at the same call, whatever each has scored before the weights were spread.

        Raises `InputError` for mixed precision, which would change what the frozen model computes.
        """
        found = self.model(input_ids=self._probe_ids()[:, :1], use_cache=False).logits.dtype
        if not self.adapters and found not in (self._dtype, torch.float32):
            own, mixed = (str(one).removeprefix("torch.") for one in (self._dtype, found))
            raise InputError(
                f"mixed precision of FSDP or DeepSpeed reads the scorer's {own} weights in {mixed}, and its baselines "
                f"are of {own}: load it with --dtype {mixed}, or train without mixed precision (accelerate launch "
                "--mixed_precision no ..., and --bf16 false --fp16 false)"
            )
        return ROW_BY_ROW if self._compare_lengths(self.model) > self._most_noise else OWN_LOGITS

    def _agrees(self, compare: Callable[[], bool]) -> bool:
        """What `compare` gives, asked once. What raises does not agree; what runs out of memory is asked again another
        time."""
        name = compare.__name__
        if name not in self._agree:
            try:
                self._agree[name] = compare()
            except Exception as error:  # an architecture may raise anything when it is asked in a way of our own
                if should_reduce_batch_size(error):
                    clear_device_cache(garbage_collection=True)
                    return False
                logger.info("%s: %s: %s", type(self._base).__name__, name, error)
                self._agree[name] = False
        return self._agree[name]

    def _probe_ids(self) -> torch.Tensor:
        return torch.linspace(0, self._head.vocabulary - 1, 12, device=self.model.device).long()[None]

    @property
    def _rounding(self) -> float:
        """Relative error of one operation in the model's precision."""
        if getattr(self._base.config, "quantization_config", None) is not None:
            return torch.finfo(torch.bfloat16).eps
        return max(1e-5, torch.finfo(self.model.dtype).eps)

    @property
    def _most_noise(self) -> float:
        """How much logits may differ with the length of the sequence by rounding alone."""
        return max(1e-3, 12 * self._rounding)

    def _compare_lengths(self, model) -> float:
        """How much the same logits differ if they are computed in a sequence of another length: by rounding, or because
        the architecture asks for the length (ProphetNet). Raises `InputError` if they depend on what follows."""
        ids = self._probe_ids()
        others = torch.cat([ids[:, :6], ids[:, 6:].flip(1)], dim=1)
        whole, half, other = (self._own_logits(model, one)[0, :6] for one in (ids, ids[:, :6], others))
        found = difference(other, whole)
        if found > _LEAST_LOOK:
            # Beside other rows nothing but rounding can differ (experts that get more tokens), and what is random.
            here, there = (self._own_logits(model, torch.cat([ids, one]))[0, :6] for one in (ids, others))
            if found > 8 * difference(there, here):
                raise InputError(
                    f"{type(self._base).__name__} is not causal: its logits depend on later tokens, so a text has no "
                    "perplexity under it: expected a causal language model (of BERT's kind, one with is_decoder: true)"
                )
        return difference(half, whole)

    def _same(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether hidden states, or logits, are the same but for rounding."""
        return difference(a, b) <= 4 * max(self._noise, self._rounding)

    def _compare_head(self) -> bool:
        """Whether decoder, LM head and the scalings known here give the model's own logits."""
        decoder, ids, inside = self._decoder, self._probe_ids(), []
        if decoder is None or self._base.get_output_embeddings() is None:
            return False
        handle = decoder.register_forward_hook(lambda module, args, output: inside.append(output[0]))
        try:
            own = self._own_logits(self._base, ids)[0]
        finally:
            handle.remove()
        hidden = hidden_states(decoder, ids)[0]
        # Of the same hidden states, so that the two differ by no more than one operation rounds.
        ours = self._head.logits(inside[-1][0] if inside else hidden)
        if ours.shape != own.shape or difference(ours, own) > self._rounding:
            return False
        return self._same(self._head.logits(hidden), own)

    def _compare_packs(self) -> bool:
        """Whether rows of a pack are blind to their neighbours, and go on from their prefix as from their own start."""
        decoder = self._decoder
        if not can_pack(decoder, type(self._base).__name__):
            return False
        ids = self._probe_ids()[0].cpu().numpy()
        rows = [ids[:7], np.concatenate([ids[:3], ids[7:9]]), ids[6:]]
        one, two, three = (Row(row, np.array([len(row) - 1]), row[-1:], 0, 0) for row in rows)
        pack = lay_out([Group(3, [one, two]), Group(0, [three])])
        packed = run_packed(decoder, pack)[to_device(pack.read, self.model.device)]
        alone = [hidden_states(decoder, to_device(row[None], self.model.device))[0, -1] for row in rows]
        return self._same(self._head.logits(packed), self._head.logits(torch.stack(alone)))

    def _compare_past(self) -> bool:
        """Whether the rows of a pack go on from the keys and values of what ran before it."""
        decoder = self._decoder
        if not can_continue(decoder):
            return False
        ids = self._probe_ids()[0].cpu().numpy()
        rows = [ids[:8], np.concatenate([ids[:5], ids[9:]])]
        one, two = (Row(row, np.array([len(row) - 1]), row[-1:], 0, 0) for row in rows)
        pack = lay_out([Group(5, [one, two])], past=3)
        past = run_prefix(decoder, to_device(ids[None, :3], self.model.device))
        packed = run_packed(decoder, pack, past)[to_device(pack.read, self.model.device)]
        alone = [hidden_states(decoder, to_device(row[None], self.model.device))[0, -1] for row in rows]
        return self._same(self._head.logits(packed), self._head.logits(torch.stack(alone)))

    def _compare_cache(self) -> bool:
        """Whether the model continues from the keys and values of a prefix as from the prefix itself."""
        decoder, ids = self._decoder, self._probe_ids()
        if not can_continue(decoder):
            return False
        hidden = hidden_states(decoder, ids[:, 4:].expand(2, -1), run_prefix(decoder, ids[:, :4]))
        return self._same(self._head.logits(hidden[1]), self._head.logits(hidden_states(decoder, ids)[0, 4:]))

    # --- pass by pass ------------------------------------------------------------------------------------------------

    def _score_rows(self, rows: list[Row], scored: list) -> None:
        groups = self.groups(rows)
        past, used = self._kept, []
        for ids, some in self.behind(groups):
            past = self._continued(max(self._kept, past, key=lambda one: in_common(one.ids, ids)), ids)
            used.append(past)
            self._score_groups(some, past, scored)
        # Where nothing ran before, a next call that begins alike has reason to let it.
        used += [Past(group.rows[0].inputs[: group.prefix or group.rows[0].read[0]], None) for group in groups]
        self._kept = max(used, key=lambda one: (one.cache is not None, len(one.ids)))
        if self._kept.cache and not self.adapters:
            self._kept_under = weights_version(self.model)

    def behind(self, groups: list[Group]) -> list[tuple[np.ndarray, list[Group]]]:
        """(ids that run before, groups that begin with them)."""
        if self.way != PACKED:
            return [(group.rows[0].inputs[: group.prefix], [group]) for group in groups]
        if not any(self._is_beyond(row) for group in groups for row in group.rows):
            parts = cut(groups, self.max_batch_tokens, self.batch_size)
            found = pasts(parts, self._kept.ids, max(_LEAST_PAST, self._sizes.overhead))
            if not any(len(ids) for ids, _ in found) or self._agrees(self._compare_past):
                return found
        return [(_NO_PAST.ids, groups)]

    def _continued(self, past: Past, ids: np.ndarray) -> Past:
        """The past of some ids, from what another one has of it."""
        if not len(ids):
            return _NO_PAST
        common = in_common(past.ids, ids) if past.cache else 0
        begun = first_of(past.cache, common) if common else None
        if common < len(ids):
            begun = run_prefix(self._decoder, to_device(ids[None], self.model.device), begun)
        return Past(ids, begun)

    def _score_groups(self, groups: list[Group], past: Past, scored: list) -> None:
        """If memory runs out, what is left is laid out again, in passes of half the tokens."""
        left = deque(self._lay_out(groups, past))
        while left:
            try:
                scored.append((left[0].rows, self._score_pass(left[0], past.cache)))
                left.popleft()
                continue
            except RuntimeError as error:
                if len(left[0].rows) == 1 or not should_reduce_batch_size(error):
                    raise
            # Here the exception is gone, and with it what it held of the pass.
            clear_device_cache(garbage_collection=True)
            self.max_batch_tokens = max(1, left[0].ids.size // 2)
            logger.warning("out of memory: batches now hold at most %d tokens", self.max_batch_tokens)
            left = deque(self._lay_out([group for one in left for group in one.groups], past))

    def _lay_out(self, groups: list[Group], past: Past = _NO_PAST) -> Sequence[Pass]:
        if self.way == PACKED:
            return packs(groups, self.max_batch_tokens, self._sizes.enough, self.batch_size, len(past.ids))
        most = 1 if self.way == ROW_BY_ROW else self.batch_size
        # The model's own logits must fit into a slice.
        tokens = self.max_batch_tokens if self.way == PADDED else min(self.max_batch_tokens, self._head.rows)
        return [one for group in groups for one in batches(group, tokens, self._sizes.overhead, most)]

    def _score_pass(self, one: Pass, prefix: Cache | None) -> torch.Tensor:
        """float32 [m], nats, of the labels of its rows."""
        if self.way in (OWN_LOGITS, ROW_BY_ROW):
            return self._by_own_logits(self._base, one)
        if isinstance(one, Pack):
            hidden = run_packed(self._decoder, one, prefix)
        else:
            hidden = hidden_states(self._decoder, to_device(one.ids, self.model.device), prefix).flatten(0, 1)
        read, states = np.unique(one.read, return_inverse=True)
        if len(read) < len(hidden):
            hidden = hidden[to_device(read, hidden.device)]
        return self._head.surprisal(hidden, *(to_device(of, hidden.device) for of in (one.labels, states)))

    def _by_own_logits(self, model, one: Pass) -> torch.Tensor:
        logits = self._own_logits(model, to_device(one.ids, self.model.device)).flatten(0, 1)
        read, labels = (to_device(of, logits.device) for of in (one.read, one.labels))
        return cross_entropy(logits[read], labels, reduction="none")

    def _own_logits(self, model, ids: torch.Tensor) -> torch.Tensor:
        """float32 [B, T, V], from the model's own forward pass."""
        logits = model(input_ids=ids, use_cache=False).logits
        if logits.shape[-1] != self._head.vocabulary:
            raise RuntimeError(
                f"the model returned {logits.shape[-1]} values a token instead of {self._head.vocabulary} logits"
            )
        return logits.float()

    def _score_in_step(self, rows: list[list[Row]], scored: list) -> None:
        """By the model's own forward pass, which gathers its weights, and as often as the process with most to do."""
        for batch in in_step(self._lay_out([Group(0, some) for some in rows])):
            if batch is None:
                self.model(input_ids=self._probe_ids()[:, :1], use_cache=False)
            else:
                scored.append((batch.rows, self._by_own_logits(self.model, batch)))


def _by_text(texts: list[Encoded], scored: list[tuple[list[Row], torch.Tensor]]) -> list[np.ndarray]:
    """What the rows of some texts gave, put together: once, at the end, since a GPU works on rows while others are laid
    out. scored: (rows, float32 [m], nats, of their labels)."""
    surprisals = [np.zeros(len(text.positions)) for text in texts]
    for rows, values in scored:
        ends = np.cumsum([len(row.labels) for row in rows])
        for row, piece in zip(rows, np.split(values.double().cpu().numpy(), ends[:-1]), strict=True):
            surprisals[row.text][row.first : row.first + len(piece)] = piece
    for number, of_text in enumerate(surprisals):
        if np.isnan(of_text).any():
            raise FloatingPointError(f"the model's logits are NaN for text {number} of this call")
    return surprisals


# --- scorer ----------------------------------------------------------------------------------------------------------


class Scorer(Protocol):
    """Token ids -> the surprisal of each scored token: what calculator and reward know of a scorer.

    `SurprisalScorer` is the one for a model in this process, `mlppl.scoring.server.ServerScorer` for a server of vLLM.
    """

    @property
    def window(self) -> int | None:
        """Most tokens of one text that are read at once, BOS included; None without a limit."""

    @property
    def identity(self) -> dict:
        """What tells it from another scorer, the surprisals of a fixed text among it (`mlppl.scoring.identity`): see
        `mlppl.scoring.identity.differences`."""

    def score(self, texts: list[Encoded]) -> list[np.ndarray]:
        """float64 [n] per text: -ln p(token | all before it) in nats, for its scored tokens in order."""


def as_scorer(model, tokenizer=None) -> Scorer:
    """The scorer that a model in this process is, with its tokenizer; a scorer as it is."""
    return model if is_scorer(model) else SurprisalScorer(model, tokenizer=tokenizer)


def check_model(model) -> None:
    """Raises `InputError` for what is no model, such as a name or a tokenizer."""
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"the model is {str(model)!r:.60}, expected a loaded one: model, tokenizer, _ = "
            "mlppl.models.load_model(name), and the model comes before its tokenizer"
        )


def is_scorer(model) -> bool:
    """Whether it is a `Scorer` rather than a model."""
    return not isinstance(model, torch.nn.Module) and hasattr(type(model), "score")
