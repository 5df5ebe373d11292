"""Perplexities already computed, for as long as the scorer's weights stay as they are."""

import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from ..definitions import LEVELS
from ..frozen import base_parameters
from ..scoring.tokens import Pair, Sampled


class PerplexityCache:
    """The newest `ENTRIES` perplexities by what was scored. The same prompt comes again in every epoch."""

    ENTRIES = 100_000  # about 20 MB

    def __init__(self) -> None:
        self._perplexities: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._weights_version: tuple | None = None
        self._warned_of_training = False

    def perplexities(self, pairs: Sequence[Pair], score: Callable[[list[Pair]], np.ndarray]) -> np.ndarray:
        """float64 [B, 3]. score: computes those that are not here; it is asked also for none, since a model that is
        spread over processes has to be asked in each of them."""
        keys = list(map(_key, pairs))
        known = {key: self._perplexities[key] for key in keys if key in self._perplexities}
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
        known.update(zip(new, score(list(new.values())), strict=True))
        self._perplexities.update((key, known[key]) for key in new)
        while len(self._perplexities) > self.ENTRIES:
            self._perplexities.popitem(last=False)
        return np.array([known[key] for key in keys]).reshape(len(pairs), len(LEVELS))

    def forget_if_trained(self, model) -> None:
        """Drop what was computed before the scorer's own weights changed, and say so once if they are being trained."""
        parameters = list(base_parameters(model))
        # Optimizers of 8 bits write behind autograd's back, which counts no version then: of what may be trained, some
        # values are looked at as well.
        version = sum(parameter._version for parameter in parameters), tuple(map(_some, parameters))
        if self._weights_version is not None and version != self._weights_version:
            # When DDP starts it writes every parameter, with the same values: only one that is trained is worth a word.
            trained = any(parameter.requires_grad for parameter in parameters)
            if trained and not self._warned_of_training:
                warnings.warn(
                    "the scorer's own weights change during training, so its baselines lose their meaning: train "
                    "adapters (LoRA), or pass a frozen copy of the model as baseline_model",
                    stacklevel=3,
                )
                self._warned_of_training = True
            self.clear()
        self._weights_version = version

    def clear(self) -> None:
        self._perplexities.clear()

    def __len__(self) -> int:
        return len(self._perplexities)

    def __getstate__(self) -> dict:
        # A copy's parameters count their changes anew.
        return {**self.__dict__, "_weights_version": None}


def _some(parameter) -> tuple:
    """A few values of a parameter that may be trained, of a frozen one none."""
    if not parameter.requires_grad:
        return ()
    values = parameter.detach().flatten()
    return tuple(values[:: max(1, len(values) // 8)].tolist())


def _key(pair: Pair) -> bytes:
    """16 bytes that name what is scored: of a sampled completion its ids, since others can have the same text."""
    content = json.dumps([isinstance(pair, Sampled), *pair]).encode()
    return hashlib.blake2b(content, digest_size=16).digest()
