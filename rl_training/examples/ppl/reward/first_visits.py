"""Without baselines: the first completions of a prompt make its own, and later ones are measured against them."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..data import stable_id
from ..definitions import LEVELS
from ..processes import from_all


class FirstVisits:
    """The mean perplexities of each prompt's first completions, float64 [3] by the prompt's hash."""

    def __init__(self) -> None:
        self._baselines: dict[str, np.ndarray] = {}

    def measure(self, contexts: Sequence[str], perplexities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(baselines float64 [B, 3], nan where no completion of a prompt could be scored yet; first visits bool [B]).

        contexts: the prompts as the scorer reads them. perplexities: float64 [B, 3], of the completions. Several
        processes must all call: a group may be split over them, and its mean is the same in each.
        """
        groups: dict[str, list[int]] = {}
        for index, context in enumerate(contexts):
            groups.setdefault(stable_id(context), []).append(index)
        mine = {key: perplexities[rows] for key, rows in groups.items() if key not in self._baselines}
        new: dict[str, list[np.ndarray]] = {}
        for key, rows in from_all(mine.items()):
            new.setdefault(key, []).append(rows[~np.isnan(rows).any(axis=1)])
        for key, parts in new.items():
            if len(scored := np.concatenate(parts)):
                self._baselines[key] = scored.mean(axis=0)
        baselines = np.full((len(contexts), len(LEVELS)), np.nan)
        first_visit = np.zeros(len(contexts), dtype=bool)
        for key, rows in groups.items():
            first_visit[rows] = key in mine
            baselines[rows] = self._baselines.get(key, np.nan)
        return baselines, first_visit

    def state_dict(self) -> dict[str, list[float]]:
        return {key: levels.tolist() for key, levels in self._baselines.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self._baselines = {key: np.array(levels) for key, levels in state.items()}
