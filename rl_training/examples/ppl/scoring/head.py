"""Hidden states -> surprisals: the LM head and the log-sum-exp, a piece of the vocabulary at a time."""

import math

import torch

# Bytes of a piece of the logits that stays in a core's caches; a GPU's pieces are as large as they may be.
_CACHED = {"cpu": 4 << 20}
_LEAST = torch.finfo(torch.float32).min
# Logits from here on down are of tokens that a model never writes: minus infinity, a dtype's lowest number, -10,000.
_RULED_OUT = -9_999.0


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
    a, b = a.float(), b.float()
    ruled_out = (a <= _RULED_OUT) & (b <= _RULED_OUT)
    count = (~ruled_out).sum(-1, keepdim=True)
    a, b = (x.masked_fill(ruled_out, 0.0) for x in (a, b))
    a, b = ((x - x.sum(-1, keepdim=True) / count).masked_fill(ruled_out, 0.0) for x in (a, b))
    difference, size = float((a - b).norm()), float(b.norm())
    found = difference / size if size else difference
    return math.inf if math.isnan(found) else found
