"""What a reward keeps from call to call: perplexities already computed, and the first ones of each prompt."""

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..data import stable_id
from ..processes import from_all
from ..scoring.frozen import base_parameters, weights_version


class PerplexityCache:
    """The newest `ENTRIES` perplexities by what was scored. The same prompt comes again in every epoch."""

    ENTRIES = 100_000  # about 20 MB

    def __init__(self) -> None:
        self._perplexities: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._weights_version: tuple | None = None
        self._warned_of_training = False

    def perplexities(self, texts: Sequence, score: Callable[[list], np.ndarray]) -> np.ndarray:
        """float64 [B, L]. score: computes those that are not here; it is asked also for none, since a model that is
        spread over processes has to be asked in each of them."""
        keys = list(map(_key, texts))
        known = {key: self._perplexities[key] for key in keys if key in self._perplexities}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        values = score(list(new.values()))
        known.update(zip(new, values, strict=True))
        self._perplexities.update((key, known[key]) for key in new)
        while len(self._perplexities) > self.ENTRIES:
            self._perplexities.popitem(last=False)
        return np.array([known[key] for key in keys]).reshape(len(texts), values.shape[1])

    def forget_if_trained(self, model) -> None:
        """Drop what was computed before the scorer's own weights changed, and say so once if they are being trained."""
        version = weights_version(model)
        if self._weights_version is not None and version != self._weights_version:
            # When DDP starts it writes every parameter, with the same values: only one that is trained is worth a word.
            trained = any(parameter.requires_grad for parameter in base_parameters(model))
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


def _key(text) -> bytes:
    """16 bytes that name what is scored: of a sampled completion its ids, since others can have the same text."""
    return hashlib.blake2b(repr(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


class FirstVisits:
    """The mean perplexities of each prompt's first completions, float64 [L] by the prompt's hash."""

    def __init__(self) -> None:
        self._baselines: dict[str, np.ndarray] = {}

    def measure(self, contexts: Sequence[str], perplexities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(baselines float64 [B, L]; bool [B], whether a completion has none to be compared with, and earns nothing).

        At its first visit a completion is compared with the mean of the others of its prompt (leave-one-out, as RLOO
        has it), later with the mean of all that were there at the first one. nan where nothing of a prompt could be
        scored yet.

        contexts: the prompts as the scorer reads them. perplexities: float64 [B, L], of the completions. Several
        processes must all call: a group may be split over them.
        """
        groups: dict[str, list[int]] = {}
        for index, context in enumerate(contexts):
            groups.setdefault(stable_id(context), []).append(index)
        mine = {key: perplexities[rows] for key, rows in groups.items() if key not in self._baselines}
        new: dict[str, list[np.ndarray]] = {}
        for key, rows in from_all(mine.items()):
            new.setdefault(key, []).append(rows[~np.isnan(rows).any(axis=1)])
        first = {key: np.concatenate(parts) for key, parts in new.items()}
        self._baselines |= {key: scored.mean(axis=0) for key, scored in first.items() if len(scored)}
        baselines = np.full(perplexities.shape, np.nan)
        alone = np.zeros(len(contexts), dtype=bool)
        for key, rows in groups.items():
            baselines[rows] = self._baselines.get(key, np.nan)
            for row in rows if key in mine else ():
                others = len(first[key]) - (not np.isnan(perplexities[row]).any())
                alone[row] = others == 0
                if 0 < others < len(first[key]):
                    baselines[row] = (first[key].sum(axis=0) - perplexities[row]) / others
        return baselines, alone

    def state_dict(self) -> dict[str, list[float]]:
        return {key: levels.tolist() for key, levels in self._baselines.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self._baselines = {key: np.array(levels) for key, levels in state.items()}
