"""The baselines file as the reward asks it: a row's level perplexities, by id or by prompt."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data import Text, message_text, stable_id
from ..errors import BaselineError
from ..retired import retired
from .formats import columns_of, read_records
from .meta import read_meta

SUFFIXES = (".pkl", ".json")
_SHOWN = 40  # characters of a prompt, for messages


class Baselines(Mapping[str, np.ndarray]):
    """Level perplexities by row: `baselines[id]` is float64 [3], in the order of `LEVELS`.

    `records`: `{id or prompt: {"word": float, "phrase": float, "sentence": float, ...}}`. `meta`: what they were made
    with, {} if unknown. Raises `BaselineError` for a value that is no finite positive number.
    """

    def __init__(self, records: Mapping, meta: Mapping | None = None, source: str = "baselines") -> None:
        columns = columns_of(records, source)
        self.meta = dict(meta or {})
        self.source = source
        self._rows = dict(zip(columns.ids, range(len(columns.ids)), strict=True))
        self._levels = columns.levels
        self._levels.flags.writeable = False
        self._texts = columns.texts

    @functools.cached_property
    def _by_prompt(self) -> dict[str, int]:
        """The row of a prompt's hash, where only one row is that prompt's."""
        by_prompt: dict[str, int | None] = {}
        for row, prompt_id in enumerate(self._texts["prompt_id"]):
            if isinstance(prompt_id, str):
                by_prompt[prompt_id] = None if prompt_id in by_prompt else row
        return {prompt_id: row for prompt_id, row in by_prompt.items() if row is not None}

    @classmethod
    def load(cls, path: str | Path) -> "Baselines":
        """Read a .pkl or .json file and the .meta.json beside it. Nothing in them is executed."""
        path = Path(path)
        if gone := retired("baselines", path):
            raise BaselineError(f"{path}: {gone}")
        if path.suffix not in SUFFIXES:
            raise BaselineError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BaselineError(f"{path}: {error.strerror}: make it with compute_baselines_trl.py") from error
        baselines = cls(read_records(path, content), read_meta(path), source=str(path))
        if not baselines:
            raise BaselineError(f"{path} holds no row: make it with compute_baselines_trl.py")
        return baselines

    def find(
        self, row_id, prompt: Text | None, reference: Text | None = None, index: int | None = None
    ) -> np.ndarray | None:
        """float64 [3] by id; without a reference also by the prompt itself or its hash, if that names one row; or None.

        reference: the row's, if it is what is measured: then no other row's baseline will do. index: the row's, for the
        message. Raises `BaselineError` if the id's baseline is known to be another prompt's or reference's.
        """
        row = self._rows.get(row_id) if row_id is not None else None
        if row is None and isinstance(row_id, int | np.integer):
            row = self._rows.get(str(row_id))  # JSON has no other keys
        if row is not None:
            self._check_texts(
                {name: column[row] for name, column in self._texts.items()}, row_id, prompt, reference, index
            )
        elif reference is None:
            row = self._rows.get(prompt) if isinstance(prompt, str) else None
            # A mapping by prompts; or another row's id that reads like this prompt.
            if row is not None and _is_of_another(self._texts["prompt_id"][row], prompt):
                row = None
            if row is None and prompt is not None:
                row = self._by_prompt.get(stable_id(prompt))
        return None if row is None else self._levels[row]

    def _check_texts(self, texts: Mapping[str, object], row_id, prompt, reference, index) -> None:
        where = f"{'a row' if index is None else f'row {index}'} with the id {row_id!r:.40}"
        remedy = (
            "ids that start anew in each split, or texts that were edited, need baselines of their own: make them with "
            "compute_baselines_trl.py from these rows, or give every row an id that no other text has"
        )
        if prompt is not None and _is_of_another(texts["prompt_id"], prompt):
            theirs = f" that begins {texts['prompt_start']!r}" if isinstance(texts["prompt_start"], str) else ""
            raise BaselineError(
                f"{where} has a prompt that begins {beginning(prompt)!r}, and {self.source} has the baseline of "
                f"another prompt{theirs} under this id: {remedy}"
            )
        if reference and _is_of_another(texts["reference_id"], reference):
            raise BaselineError(
                f"{where} has a reference that begins {beginning(reference)!r}, and {self.source} has the baseline of "
                f"another reference under this id: {remedy}"
            )

    def check_coverage(
        self, ids: Sequence, prompts: Sequence[Text], references: Sequence[Text] | None = None, needed: bool = True
    ) -> None:
        """Raises `BaselineError` if a row's baseline is another text's, or, where every row needs one, if some have
        none, with their number, the first few ids, and the remedy. references: as in `find`, None: not measured."""
        references = [None] * len(ids) if references is None else references
        rows = zip(ids, prompts, references, range(len(ids)), strict=True)
        absent = [row[0] for row in rows if self.find(*row) is None]
        if absent and needed:
            made_from = self.meta.get("dataset", {})
            origin = f"; it is of {made_from.get('name')!r}, split {made_from.get('split')!r}" if made_from else ""
            raise BaselineError(
                f"{self.source} has no baseline for {len(absent)} of {len(ids)} rows, first {absent[:3]}{origin}: "
                "compute them with compute_baselines_trl.py on this data set and split, or leave such rows out "
                "(missing='skip')"
            )

    def __getitem__(self, key) -> np.ndarray:
        return self._levels[self._rows[key]]

    def __iter__(self) -> Iterator:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _is_of_another(known: object, text: Text) -> bool:
    """Whether `known`, a hash where a file keeps one, is another text's."""
    return isinstance(known, str) and known != stable_id(text)


def beginning(text: Text) -> str:
    """The first characters of a text, in one line. Of chat messages, those of the last one."""
    shown = message_text(text if isinstance(text, str) else text[-1:])
    return " ".join(shown.split())[:_SHOWN]
