"""Encoded texts -> the surprisal of every scored token: the only forward pass of the project.

No logits tensor is kept: the decoder runs once, the hidden states of the scored tokens alone go through the LM head,
a slice at a time. Rows are packed end to end and share their prefixes; where a model cannot be packed, rows of like
length share a padded batch, and rows with a common prefix its keys and values.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.overrides import TorchFunctionMode

from ..errors import InputError
from ..processes import in_step, is_sharded
from .batching import Group, Pack, Row, batches, lay_out, packs, share_prefixes, windows
from .frozen import base_of, check_weights_only, frozen
from .identity import describe_model, encode_probe, probe_row
from .packing import cache_name, can_continue, can_pack, run_packed, run_padded, run_prefix, to_device, would_pack
from .tokens import Encoded

# --- onednn ----------------------------------------------------------------------------------------------------------

# float32 matrix products by oneDNN, on an AMD CPU with AVX-512.
#
# torch takes them to MKL, which there runs at half of what oneDNN, a part of torch as well, reaches. Where there is
# only AVX2, MKL is the faster one (a Zen 3: 74 against 60 GFLOP/s a core). The numbers differ as those of two MKL
# products of other sizes do, in the last digits.

# Multiplications and additions of a product below which oneDNN's own costs, about 40 microseconds, are not earned back.
_LEAST_PRODUCT = 1 << 24


def fast_products(model) -> AbstractContextManager:
    """Within it a float32 model's linear layers take their products to oneDNN, if its weights are on such a CPU."""
    if model.device.type != "cpu" or not _pays():
        return nullcontext()
    return _OneDNN()


def _pays() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    # Some torch that requirements.txt allows has no get_capabilities.
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return "AMD" in capabilities.get("cpu_name", "") and torch.backends.cpu.get_cpu_capability() == "AVX512"


class _OneDNN(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.linear:
            return _linear(*args, **kwargs)
        if function is torch.addmm and not kwargs:  # transformers' Conv1D
            bias, x, weight = args
            if bias.dim() == 1:
                return _linear(x, weight.t(), bias)
        return function(*args, **kwargs)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if input.dtype == weight.dtype == torch.float32 and input.numel() * weight.shape[0] >= _LEAST_PRODUCT:
        return torch.nn.functional.linear(input.to_mkldnn(), weight, bias).to_dense()
    return torch.nn.functional.linear(input, weight, bias)


# --- head ------------------------------------------------------------------------------------------------------------

# Hidden states -> surprisals: the LM head and the log-sum-exp, a piece of the vocabulary at a time.

# Bytes of a piece of the logits that stays in a core's caches; a GPU's pieces are as large as they may be.
_CACHED = {"cpu": 4 << 20}
_LEAST = torch.finfo(torch.float32).min
# A token so far below the likeliest one is never written, be its logit minus infinity, a dtype's lowest number or -500.
# Such logits would make every other difference small.
_RULED_OUT = -100.0
# A model reads later tokens if they change earlier logits by more. In any precision: a causal model computes the same
# for the same length, and BERT's kind, with random weights, differs by 0.003 to 0.3.
_LEAST_LOOK = 1e-3


class Head:
    """The LM head of a transformers model, with the scalings of its logits that are known here.

    slice_bytes: most bytes of float32 logits at once. A plain linear head is cut along the vocabulary, so that every
    matrix product keeps all rows: half the time of cutting the rows, on a CPU. Any other head (quantised, adapted,
    hooked) is called as it is, on some of the rows at a time.
    """

    def __init__(self, base: torch.nn.Module, slice_bytes: int) -> None:
        self.layer = base.get_output_embeddings()
        config = base.config.get_text_config(decoder=True)
        self.vocabulary = config.vocab_size
        self.rows = max(1, slice_bytes // (4 * self.vocabulary))  # logits of so many tokens fill a slice
        self._slice_bytes = slice_bytes
        self._multiplier = _first(config, "logit_scale", "lm_head_multiplier", "output_multiplier")
        self._divisor = _first(config, "logits_scaling")
        self._cap = _first(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [N, V] from hidden states [N, H]."""
        weight = self.layer.weight
        return self._scaled(self.layer(hidden.to(weight.dtype) if weight.is_floating_point() else hidden))

    def surprisal(self, hidden: torch.Tensor, labels: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [N], nats, of labels [N] from hidden states [N, H], or [M, H] of which `states` [N] says which one
        predicts a label: where several are predicted by the same, its logits are computed once."""
        if not self._plain:
            if states is not None:
                hidden = hidden[states]
            count = -(-len(labels) // self.rows)  # equal slices: a short last one would run at half the speed
            slices = zip(hidden.tensor_split(count), labels.tensor_split(count), strict=True)
            return torch.cat([surprisal(self.logits(states), wanted) for states, wanted in slices])
        weight, bias = self.layer.weight, self.layer.bias
        hidden = hidden.to(weight.dtype)
        values = min(self._slice_bytes, _CACHED.get(hidden.device.type, self._slice_bytes)) // 4
        # A multiple of 256: a GPU takes twice the time or more for a product whose rows end at odd addresses.
        width = max(1, values // len(hidden) // 256) * 256
        totals, wanted = [], torch.zeros(len(labels), device=hidden.device)
        for start in range(0, len(weight), width):
            piece = slice(start, start + width)
            logits = self._scaled(
                torch.nn.functional.linear(hidden, weight[piece], None if bias is None else bias[piece])
            )
            inside = (labels >= start) & (labels < start + logits.shape[1])
            indices = (labels - start).clamp(0, logits.shape[1] - 1)
            own = logits.gather(1, indices[:, None])[:, 0] if states is None else logits[states, indices]
            wanted = torch.where(inside, own, wanted)
            # As logsumexp does it, but in place. A piece that is -inf throughout has no largest logit to subtract.
            most = logits.amax(1).clamp_(min=_LEAST)
            totals.append(logits.sub_(most[:, None]).exp_().sum(1).log_().add_(most))
        total = torch.stack(totals).logsumexp(0)
        return (total if states is None else total[states]) - wanted

    @property
    def _plain(self) -> bool:
        """Whether the product with its weight is all that calling it would do."""
        layer = self.layer
        hooks = layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook")
        return type(layer) is torch.nn.Linear and not hooks

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        if self._multiplier:
            logits = logits * self._multiplier
        if self._divisor:
            logits = logits / self._divisor
        if self._cap:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits.float()


def _first(config, *names: str) -> float | None:
    """Cohere, Granite, Gemma, Falcon-H1 and others say in their configurations how they scale and cap logits."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def surprisal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """float32 [N], nats, from float32 logits [N, V] and labels [N]."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


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


# --- window ----------------------------------------------------------------------------------------------------------

# How many tokens a model takes at once.


def window_of(base: torch.nn.Module) -> int | None:
    """Most tokens that the transformers model takes, BOS included; None if its architecture sets no limit."""
    config = base.config.get_text_config(decoder=True)
    sizes = [
        *(getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "max_target_positions")),
        getattr(base, "max_seq_length", None),  # Unsloth cuts there without a word
        *_positions_behind_padding(base),
    ]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def _positions_behind_padding(model) -> Iterator[int]:
    """RoBERTa counts positions from behind the one that padding has, so that it has 512 of 514."""
    ahead = 1 if getattr(model.config, "ngram", None) else 0  # ProphetNet also asks for the one after a token's own
    for name, module in model.named_modules():
        if "position" in name and isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            yield module.num_embeddings - module.padding_idx - 1 - ahead


# --- results ---------------------------------------------------------------------------------------------------------

# What the rows of some texts gave, a text's values put together.


class Results:
    """What the rows of some texts gave. It is read once, at the end: a GPU works on rows while others are laid out."""

    def __init__(self, texts: list[Encoded]) -> None:
        self._sizes = [len(text.positions) for text in texts]
        self._given: list[tuple[list[Row], torch.Tensor]] = []

    def add(self, rows: list[Row], scored: torch.Tensor) -> None:
        """scored: float32 [m], nats, of the rows' labels."""
        self._given.append((rows, scored))

    def read(self) -> list[np.ndarray]:
        surprisals = [np.zeros(size) for size in self._sizes]
        for rows, scored in self._given:
            values = scored.double().cpu().numpy()
            end = np.cumsum([len(row.read) for row in rows])
            for row, piece in zip(rows, np.split(values, end[:-1]), strict=True):
                surprisals[row.text][row.first : row.first + len(piece)] = piece
        for number, of_text in enumerate(surprisals):
            if np.isnan(of_text).any():
                raise FloatingPointError(f"the model's logits are NaN for text {number} of this call")
        return surprisals


# --- surprisal -------------------------------------------------------------------------------------------------------

logger = logging.getLogger(__name__)


class _Sizes(NamedTuple):
    most: int  # tokens of one forward pass, padding included
    enough: int  # tokens of one pass; more of them make it no faster per token, unless they share a prefix
    slice_bytes: int  # of logits
    overhead: int  # tokens that one more forward pass costs


# By device type. CPU, measured on GPT-2 124M: beyond 1,024 tokens the activations leave the caches, a forward pass
# costs its tokens and some 15 to 30 more, and above 32 MiB glibc takes every slice anew from the system.
_SIZES = {"cpu": _Sizes(2048, 1024, 24 << 20, 32), "cuda": _Sizes(16384, 16384, 256 << 20, 512)}
# Tokens: what the attention of one more span of a pack costs; of rows that share all that they begin with.
_SPAN_TOKENS, _SHORT = 8, 64


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
        if adapters:
            check_weights_only(model)
        # Of BART's kind the encoder would read the whole text, and the decoder would guess it one token late.
        if base_of(model).config.is_encoder_decoder:
            raise InputError(
                f"{type(base_of(model)).__name__} is an encoder-decoder, which reads the whole text before it writes: "
                "expected a causal language model"
            )
        self.model = model
        self.adapters = adapters
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._sizes = _SIZES.get(model.device.type, _SIZES["cuda"])
        self.max_batch_tokens = max_batch_tokens or self._sizes.most
        # None: not compared yet
        self._noise: float | None = None
        self._by_length = False
        self._head_agrees: bool | None = None
        self._packs_agree: bool | None = None
        self._cache_agrees: bool | None = None

    def score(self, texts: list[Encoded]) -> list[np.ndarray]:
        """float64 [n] per text: -ln p(token | all before it) in nats, for its scored tokens in order.

        A text longer than the model's window is scored in windows. Raises `FloatingPointError` if a logit is NaN.
        Of a model whose weights are spread over processes, all of them must ask at the same time, be it for no text.
        """
        return self.start(texts)()

    def start(self, texts: list[Encoded]) -> Callable[[], list[np.ndarray]]:
        """Gives a GPU the work of `score` and does not wait for it. What is returned does, and gives what `score` gives
        or raises what it raises."""
        results = Results(texts)
        highest, vocabulary = max((int(text.ids.max(initial=0)) for text in texts), default=0), self._head.vocabulary
        if highest >= vocabulary:  # as a label it would have no logit
            raise InputError(
                f"a text has token number {highest}, and the model knows 0 to {vocabulary - 1}: take the model's own "
                "tokenizer, or resize the model (model.resize_token_embeddings(len(tokenizer))) and train the new rows"
            )
        if is_sharded(self.model):
            with frozen(self.model, self.adapters):
                self._score_in_step(self._sides(texts), results)
        elif any(len(text.positions) for text in texts):
            with frozen(self.model, self.adapters), fast_products(self.model):
                self._compare()
                for beyond, rows in enumerate(self._sides(texts)):
                    # A prefix that runs before its rows may be on the other side than they are.
                    self._score_rows(rows, results, prefixes=not beyond)
        return results.read

    @property
    def identity(self) -> dict:
        """What tells the model from another: see `ppl.scoring.identity`; and, where its tokenizer is known, the
        surprisals of a fixed text, by one forward pass of the model's own.

        Raises `InputError` if they are NaN.
        """
        described = describe_model(self.model)
        if self.tokenizer is None:
            return described
        row = probe_row(encode_probe(self.tokenizer), self.window)
        with frozen(self.model, self.adapters):
            logits = self._read([row], model=self.model if is_sharded(self.model) else self._base)
            values = surprisal(logits, _labels([row], logits.device)).tolist()
        if any(map(math.isnan, values)):
            raise InputError(
                f"the logits of {type(self._base).__name__} in {described['dtype']} are NaN for a plain text: load it "
                "with --dtype float32 or bfloat16, or check its weights"
            )
        return {**described, "probe": [round(one, 4) for one in values]}

    @property
    def window(self) -> int | None:
        """Most tokens the model takes at once, BOS included; None if its architecture sets no limit."""
        return window_of(self._base)

    def _sides(self, texts: list[Encoded]) -> list[list[Row]]:
        """Rows that never share a pass: of texts up to `_switch` tokens, and of longer ones."""
        window, switch = self.window, self._switch
        whole = switch is not None or self._by_length
        rows = [row for number, text in enumerate(texts) for row in windows(text, window, number, whole)]
        if switch is None:
            return [rows]
        return [[row for row in rows if (len(row.inputs) > switch) == beyond] for beyond in (False, True)]

    @property
    def _switch(self) -> int | None:
        """Of a model with longrope (Phi-3-mini-128k): a pass with more positions takes its other factors, for all rows.

        So the rows of texts up to so many tokens never share a pass with those of longer ones.
        """
        rope = getattr(self._base.config.get_text_config(decoder=True), "rope_parameters", None) or {}
        layers = rope.values() if all(isinstance(one, dict) for one in rope.values()) else [rope]
        sizes = [one["original_max_position_embeddings"] for one in layers if one.get("rope_type") == "longrope"]
        return min(sizes, default=None)

    # --- the model's parts -------------------------------------------------------------------------------------------

    @functools.cached_property
    def _base(self):
        # Looked up once: accelerate visits every module for it, 10 ms of an 8B model with adapters.
        return base_of(self.model)

    @property
    def _decoder(self):
        return getattr(self._base, self._base.base_model_prefix, None)

    @property
    def _head(self) -> Head:
        return Head(self._base, self._sizes.slice_bytes)

    def _hidden(self, ids: torch.Tensor, prefix=None) -> torch.Tensor:
        """[B, T, H], from ids [B, T] padded on the right: that cannot change earlier tokens of a causal model."""
        behind = {} if prefix is None else {cache_name(self._decoder): prefix}
        return self._decoder(input_ids=ids, use_cache=prefix is not None, **behind).last_hidden_state

    def _own_logits(self, model, ids: torch.Tensor) -> torch.Tensor:
        """float32 [B, T, V], from the model's own forward pass."""
        logits = model(input_ids=ids, use_cache=False).logits
        vocabulary = self._head.vocabulary
        if logits.shape[-1] != vocabulary:
            raise RuntimeError(f"the model returned {logits.shape[-1]} values a token instead of {vocabulary} logits")
        return logits.float()

    # --- one-time comparisons ----------------------------------------------------------------------------------------

    def _probe_ids(self) -> torch.Tensor:
        vocabulary = self._base.get_input_embeddings().weight.shape[0]
        return torch.linspace(0, vocabulary - 1, 12, device=self.model.device).long()[None]

    def _holds(self, answer: str, compare: Callable[[], bool]) -> bool:
        """The attribute `answer`, or if that is None what `compare` gives: made once. What raises does not hold; what
        runs out of memory is asked again another time."""
        if getattr(self, answer) is None:
            try:
                setattr(self, answer, compare())
            except InputError:
                raise
            except Exception as error:  # an architecture may raise anything when it is asked in a way of our own
                if should_reduce_batch_size(error):
                    clear_device_cache(garbage_collection=True)
                    return False
                logger.info("%s: %s: %s", type(self._base).__name__, answer, error)
                setattr(self, answer, False)
        return getattr(self, answer)

    @property
    def _rounding(self) -> float:
        """Relative error of one operation in the model's precision."""
        if getattr(self._base.config, "quantization_config", None) is not None:
            return torch.finfo(torch.bfloat16).eps
        return max(1e-5, torch.finfo(self.model.dtype).eps)

    def _compare_lengths(self) -> None:
        """How much the same logits differ if they are computed in a sequence of another length: by rounding, or because
        the architecture asks for the length (ProphetNet). Raises `InputError` if they depend on what follows."""
        ids = self._probe_ids()
        others = torch.cat([ids[:, :6], ids[:, 6:].flip(1)], dim=1)
        whole, half, other = (self._own_logits(self._base, one)[0, :6] for one in (ids, ids[:, :6], others))
        allowed = max(1e-3, 12 * self._rounding)
        found = difference(other, whole)
        # Beside other rows nothing but rounding can differ (experts that get more tokens), and what is random.
        if found > _LEAST_LOOK and found > 8 * self._beside(ids, others):
            raise InputError(
                f"{type(self._base).__name__} is not causal: its logits depend on later tokens, so a text has no "
                "perplexity under it: expected a causal language model (of BERT's kind, one with is_decoder: true)"
            )
        self._noise = difference(half, whole)
        self._by_length = self._noise > allowed

    def _beside(self, ids: torch.Tensor, others: torch.Tensor) -> float:
        """How much the logits of ids [1, T] differ beside another row, of the same length, and beside themselves."""
        here, there = (self._own_logits(self._base, torch.cat([ids, one]))[0, :6] for one in (ids, others))
        return difference(there, here)

    def _same(self, a: torch.Tensor, b: torch.Tensor) -> bool:
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
        hidden = self._hidden(ids)[0]
        # Of the same hidden states, so that the two differ by no more than one operation rounds.
        ours = self._head.logits(inside[-1][0] if inside else hidden)
        if ours.shape != own.shape or difference(ours, own) > self._rounding:
            return False
        return self._same(self._head.logits(hidden), own)

    def _compare_packs(self) -> bool:
        """Whether rows of a pack are blind to their neighbours, and go on from their prefix as from their own start."""
        if not can_pack(self._decoder):
            return False
        ids = self._probe_ids()[0].cpu().numpy()
        rows = [np.concatenate([ids[:3], ids[3:7]]), np.concatenate([ids[:3], ids[7:9]]), ids[6:]]
        one, two, three = (Row(row, np.array([len(row) - 1]), row[-1:], 0, 0) for row in rows)
        pack = lay_out([Group(3, [one, two]), Group(0, [three])])
        packed = run_packed(self._decoder, pack)[to_device(pack.read, self.model.device)]
        alone = [self._hidden(to_device(row[None], self.model.device))[0, -1] for row in rows]
        return self._same(self._head.logits(packed), self._head.logits(torch.stack(alone)))

    def _compare_cache(self) -> bool:
        """Whether the model continues from the keys and values of a prefix as from the prefix itself."""
        decoder = self._decoder
        if not (self._head_agrees and can_continue(decoder)):
            return False
        ids = self._probe_ids()
        hidden = self._hidden(ids[:, 4:].expand(2, -1), run_prefix(decoder, ids[:, :4]))
        return self._same(self._head.logits(hidden[1]), self._head.logits(self._hidden(ids)[0, 4:]))

    def _compare(self) -> None:
        """Once, before the first text is scored."""
        if self._noise is None:
            self._compare_lengths()
        if self._by_length:  # a row runs alone and whole
            self._head_agrees = False
        if self._head_agrees is None and not self._holds("_head_agrees", self._compare_head):
            logger.warning(
                "%s does not compute its logits as decoder + LM head: its own logits are used, which takes more memory",
                type(self._base).__name__,
            )
        if self._head_agrees and self._packs_agree is None:
            self._holds("_packs_agree", self._compare_packs)
            if not self._packs_agree and (attention := would_pack(self._decoder)):
                logger.warning(
                    "%s runs with attention %r, so its rows are padded, which takes longer: load it with "
                    "attn_implementation='sdpa'",
                    type(self._base).__name__,
                    attention,
                )

    # --- which way ---------------------------------------------------------------------------------------------------

    def _score_rows(self, rows: list[Row], results: Results, prefixes: bool = True) -> None:
        if self._packs_agree:
            self._score_packs(share_prefixes(rows, _SPAN_TOKENS, _SHORT), results)
            return
        prefixes &= not self._by_length
        groups = share_prefixes(rows, 2 * self._sizes.overhead) if prefixes else [Group(0, rows)]
        if any(group.prefix for group in groups) and not self._holds("_cache_agrees", self._compare_cache):
            groups = [Group(0, rows)]
        for group in groups:
            prefix = self._run_prefix(group) if group.prefix else None
            most = 1 if self._by_length else self.batch_size
            for batch in batches(group, self._budget, self._sizes.overhead, most):
                self._score_batch(batch, group.prefix, prefix, results)

    @property
    def _budget(self) -> int:
        """Most tokens of a padded batch, whose logits must fit into a slice where they are the model's own."""
        return self.max_batch_tokens if self._head_agrees else min(self.max_batch_tokens, self._head.rows)

    def _halve(self, tokens: int) -> None:
        clear_device_cache(garbage_collection=True)
        self.max_batch_tokens = max(1, tokens // 2)
        logger.warning("out of memory: batches now hold at most %d tokens", self.max_batch_tokens)

    # --- packed ------------------------------------------------------------------------------------------------------

    def _score_packs(self, groups: list[Group], results: Results) -> None:
        left = self._packs(groups)
        while left:
            pack = left[0]
            try:
                results.add(pack.rows, self._score_pack(pack))
                del left[0]
                continue
            except RuntimeError as error:
                if len(pack.rows) == 1 or not should_reduce_batch_size(error):
                    raise
            self._halve(len(pack.ids))
            left = self._packs([group for one in left for group in one.groups])

    def _packs(self, groups: list[Group]) -> list[Pack]:
        return packs(groups, self.max_batch_tokens, self._sizes.enough, self.batch_size)

    def _score_pack(self, pack: Pack) -> torch.Tensor:
        """float32 [m], nats, of the labels of its rows."""
        hidden = run_packed(self._decoder, pack)
        read, order = pack.states
        if len(read) < len(hidden):
            hidden = hidden[to_device(read, hidden.device)]
        states = None if order is None else to_device(order, hidden.device)
        return self._head.surprisal(hidden, _labels(pack.rows, hidden.device), states)

    # --- padded ------------------------------------------------------------------------------------------------------

    def _run_prefix(self, group: Group):
        ids = to_device(group.rows[0].inputs[None, : group.prefix], self.model.device)
        return run_prefix(self._decoder, ids)

    def _score_batch(self, batch: list[Row], skip: int, prefix, results: Results) -> None:
        """Score rows from token `skip` on; in halves if they exceed the token budget or memory."""
        longest = max(len(row.inputs) for row in batch) - skip
        if len(batch) == 1 or len(batch) * longest <= self._budget:
            try:
                states = self._read(batch, skip, prefix)
                labels = _labels(batch, states.device)
                values = self._head.surprisal(states, labels) if self._head_agrees else surprisal(states, labels)
                results.add(batch, values)
                return
            except RuntimeError as error:
                if len(batch) == 1 or not should_reduce_batch_size(error):
                    raise
            self._halve(len(batch) * longest)
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            self._score_batch(half, skip, prefix, results)

    def _read(self, batch: list[Row], skip: int = 0, prefix=None, model=None) -> torch.Tensor:
        """Hidden states [m, H] that predict the rows' labels; float32 logits [m, V] of `model`, or of one whose head
        is its own affair."""
        if model is None and self._head_agrees:
            forward = functools.partial(self._hidden, prefix=prefix)
        else:
            forward = functools.partial(self._own_logits, model or self._base)
        return run_padded(forward, batch, skip, self.model.device)

    # --- in step with other processes --------------------------------------------------------------------------------

    def _score_in_step(self, sides: list[list[Row]], results: Results) -> None:
        """By the model's own forward pass, which gathers its weights, and as often as the process with most to do."""
        budget = min(self.max_batch_tokens, self._head.rows)
        every = [
            batch for side in sides for batch in batches(Group(0, side), budget, self._sizes.overhead, self.batch_size)
        ]
        for batch in in_step(every):
            if batch is None:
                self.model(input_ids=self._probe_ids()[:, :1], use_cache=False)
                continue
            logits = self._read(batch, model=self.model)
            results.add(batch, surprisal(logits, _labels(batch, logits.device)))


def _labels(rows: list[Row], device) -> torch.Tensor:
    return to_device(np.concatenate([row.labels for row in rows]), device)


# --- scorer ----------------------------------------------------------------------------------------------------------

# What calculator and reward know of a scorer, be it a model in this process or one behind an address.


class Scorer(Protocol):
    """Token ids -> the surprisal of each scored token.

    `SurprisalScorer` is the one for a model in this process, `ppl.scoring.server.ServerScorer` for a server of vLLM.
    """

    @property
    def window(self) -> int | None:
        """Most tokens of one text that are read at once, BOS included; None without a limit."""

    @property
    def identity(self) -> dict:
        """What tells it from another scorer, the surprisals of a fixed text among it (`ppl.scoring.identity`): see
        `ppl.scoring.identity.differences`."""

    def score(self, texts: list[Encoded]) -> list[np.ndarray]:
        """float64 [n] per text: -ln p(token | all before it) in nats, for its scored tokens in order."""


def as_scorer(model, tokenizer=None) -> Scorer:
    """The scorer that a model in this process is, with its tokenizer; a scorer as it is."""
    return model if is_scorer(model) else SurprisalScorer(model, tokenizer=tokenizer)


def is_scorer(model) -> bool:
    """Whether it is a `Scorer` rather than a model."""
    return not isinstance(model, torch.nn.Module) and hasattr(type(model), "score")
