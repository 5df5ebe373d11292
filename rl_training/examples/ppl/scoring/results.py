"""What the rows of some texts gave, a text's values put together."""

import numpy as np
import torch

from .batching import Row
from .tokens import Encoded


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
