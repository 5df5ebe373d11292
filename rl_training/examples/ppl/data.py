"""Rows of a data set -> prompt, reference, id: the same in every script, whatever the order."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .errors import InputError

TINY_STORIES = Path(__file__).parent.parent / "tiny_stories"
PROMPT_COLUMNS = ("prompt", "query", "text", "input")
REFERENCE_COLUMNS = ("reference", "completion")
DATA_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # suffix -> builder of datasets

Text = str | list[dict]  # a string, or chat messages [{"role": ..., "content": ...}, ...]


def stable_id(prompt: Text, reference: Text = "") -> str:
    """16 hexadecimal digits that name a row by its content, for data sets without an `id` column."""
    content = json.dumps([prompt, reference or ""], ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def message_text(text: Text) -> str:
    """The text of a string or of chat messages, roles and markup left out."""
    if isinstance(text, str):
        return text
    parts = [message["content"] for message in text]
    return "".join(
        part if isinstance(part, str) else "".join(item["text"] for item in part if item.get("type") == "text")
        for part in parts
    )


def checked_text(value, column: str, place: int) -> Text:
    """A cell of a data set as a `Text`, "" if it is empty. Raises `InputError`, naming the row, if it is none."""
    if value is None or isinstance(value, str):
        return value or ""
    try:
        message_text(value)
        return value
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"row {place}: column {column} holds {value!r:.60}, expected a string or chat messages, each with role and "
            "content: name another column with --prompt_column or --reference_column"
        ) from error


def render_prompt(prompt: Text | None, tokenizer) -> str:
    """A prompt as the model reads it: a string as it is, chat messages through the tokenizer's template.

    As in TRL, a prompt that ends with an assistant's message is continued, any other one opens the assistant's turn.
    Raises `InputError` for messages if the tokenizer has no chat template.
    """
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the prompts are chat messages and the tokenizer has no chat template: use an instruction-tuned model's "
            "tokenizer, set tokenizer.chat_template, or give prompts as strings"
        )
    prefilled = prompt[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not prefilled, continue_final_message=prefilled
    )


class Columns(NamedTuple):
    """The names of the columns that hold a row's prompt, reference and id; None where the data set has none."""

    prompt: str
    reference: str | None
    id: str | None

    def row(self, example: dict) -> dict:
        """`{"id", "prompt", "reference"}` of one example, the reference "" where there is none."""
        prompt = example[self.prompt]
        reference = (example[self.reference] if self.reference else None) or ""
        row_id = example[self.id] if self.id else stable_id(prompt, reference)
        return {"id": row_id, "prompt": prompt, "reference": reference}


def find_columns(
    names: Iterable[str], prompt: str | None = None, reference: str | None = None, row_id: str | None = None
) -> Columns:
    """The columns asked for, else the usual ones. Raises `InputError`, listing the columns there are."""
    names = list(names)
    for flag, name in {"prompt_column": prompt, "reference_column": reference, "id_column": row_id}.items():
        if name is not None and name not in names:
            raise InputError(f"--{flag} is {name!r}, the data set has the columns {', '.join(names)}")
    prompt = prompt or next((name for name in PROMPT_COLUMNS if name in names), None)
    if prompt is None:
        raise InputError(
            f"no column {', '.join(PROMPT_COLUMNS)} in the data set, which has {', '.join(names)}: name the one with "
            "the prompts, --prompt_column NAME"
        )
    reference = reference or next((name for name in REFERENCE_COLUMNS if name in names), None)
    return Columns(prompt, reference, row_id or ("id" if "id" in names else None))


def check_references(rows, columns: Columns, blank_is_wrong: bool) -> None:
    """Raises `InputError` if there is no reference to measure, or, where that is wrong, if some are blank."""
    if columns.reference is None:
        raise InputError(
            "--target reference needs a column with the text to measure, reference or completion: name it with "
            "--reference_column NAME"
        )
    blank = sum(not message_text(text).strip() for text in rows["reference"])
    if blank == len(rows) or (blank and blank_is_wrong):
        raise InputError(
            f"{blank} of {len(rows)} rows have a blank text in column {columns.reference}, which --target reference "
            "would measure: drop them, skip them with --missing skip, or name another column with --reference_column"
        )


def load_split(name: str, config: str | None = None, split: str = "train", streaming: bool = False):
    """One split of a data set: tiny-stories, a folder, a file, or a name on the hub.

    Raises `InputError` if it cannot be had, saying what there is instead. Nothing of a data set is executed.
    """
    import datasets

    datasets.disable_progress_bars()
    whole = split.partition("[")[0]  # of test[:64]
    path = TINY_STORIES if name == "tiny-stories" else Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or path.suffix in DATA_FILES):
        raise InputError(f"data set {name!r} does not exist: expected a folder, a file, a hub name, or tiny-stories")
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            found = datasets.load_from_disk(str(path))
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise InputError(f"{name} has no split {split!r}, it has {', '.join(found)}")
                found = found[split]
            return found.to_iterable_dataset() if streaming else found
        if path.is_file():
            builder = DATA_FILES.get(path.suffix)
            if builder is None:
                raise InputError(f"{name}: expected a file ending in .json, .jsonl, .csv or .parquet, or a folder")
            files = {whole: str(path)}
            return datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming)
        if name == "tiny-stories":
            files = {whole: str(path / f"{whole}.json")}
            if not (path / f"{whole}.json").exists():
                raise InputError(f"tiny-stories has no split {split!r}, it has train, test")
            return datasets.load_dataset("json", data_files=files, split=split, streaming=streaming)
        if path.is_dir():
            return datasets.load_dataset(str(path), config, split=split, streaming=streaming)
        if name == "wikitext":  # the seed guide's short name for it
            name, config = "Salesforce/wikitext", config or "wikitext-2-raw-v1"
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except InputError:
        raise
    # What datasets raises for a wrong name, split or configuration, a damaged file, or a hub that is out of reach.
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        damaged = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason, *more = str(error.__cause__ if damaged else error).splitlines() or ["it holds no row"]
        if reason.startswith("Config name is missing") and more:
            reason = f"it has several configurations, name one with --dataset_config: {more[0].partition(': ')[2]}"
        elif not path.exists():
            reason += "; without a network use a folder, a .json, .jsonl, .csv or .parquet file, or tiny-stories"
        raise InputError(f"cannot load split {split!r} of data set {name!r}: {reason}") from error


def split_heldout(dataset, samples: int | None, seed: int):
    """(rows to train on, rows kept out), drawn with the seed. samples: how many; None: a fifth, at most 16."""
    samples = samples or min(16, max(1, len(dataset) // 5))
    if samples >= len(dataset):
        raise InputError(
            f"the data set has {len(dataset)} rows: too few to keep --heldout_samples {samples} out of training"
        )
    parts = dataset.train_test_split(test_size=samples, seed=seed)
    return parts["train"], parts["test"]
