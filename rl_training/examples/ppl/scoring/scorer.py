"""What calculator and reward know of a scorer, be it a model in this process or one behind an address."""

from typing import Protocol

import numpy as np
import torch

from .surprisal import SurprisalScorer
from .tokens import Encoded


class Scorer(Protocol):
    """Token ids -> the surprisal of each scored token.

    `SurprisalScorer` is the one for a model in this process, `ppl.scoring.server.ServerScorer` for a server of vLLM.
    """

    @property
    def window(self) -> int | None:
        """Most tokens of one text that are read at once, BOS included; None without a limit."""

    @property
    def identity(self) -> dict:
        """What tells it from another scorer, the surprisals of a fixed text among it (`ppl.scoring.probe`): see
        `ppl.identity.differences`."""

    def score(self, texts: list[Encoded]) -> list[np.ndarray]:
        """float64 [n] per text: -ln p(token | all before it) in nats, for its scored tokens in order."""


def as_scorer(model, tokenizer=None) -> Scorer:
    """The scorer that a model in this process is, with its tokenizer; a scorer as it is."""
    return model if is_scorer(model) else SurprisalScorer(model, tokenizer=tokenizer)


def is_scorer(model) -> bool:
    """Whether it is a `Scorer` rather than a model."""
    return not isinstance(model, torch.nn.Module) and hasattr(type(model), "score")
