"""A data set -> rows of prompt, reference and id: the same in every script, whatever the order."""

import hashlib
import json
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from .definitions import DEFAULT_LANGUAGE, DEFAULT_PROMPT_TEMPLATE
from .errors import InputError
from .sentences import split_sentences

TINY_STORIES = Path(__file__).parent.parent / "tiny_stories"
PROMPT_COLUMNS = ("prompt", "query", "text", "input")
REFERENCE_COLUMNS = ("reference", "completion")
DATA_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # suffix -> builder of datasets

Text = str | list[dict]  # a string, or chat messages [{"role": ..., "content": ...}, ...]


def stable_id(prompt: Text, reference: Text = "") -> str:
    """16 hexadecimal digits that name a row by its content, for data sets without an `id` column."""
    content = json.dumps([without_none(prompt), without_none(reference or "")], ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def without_none(value):
    """Chat messages without the None that a table holds under a key which only other messages have."""
    if isinstance(value, dict):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


def message_text(text: Text) -> str:
    """The text of a string or of chat messages, roles and markup left out, a line break between messages."""
    if isinstance(text, str):
        return text
    return "\n".join(filter(None, map(_content, text)))


def _content(message: dict) -> str:
    content = message.get("content")
    if content is None and message["role"] == "assistant":  # it called a tool instead
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def check_text(value, name: str) -> None:
    """Raises `InputError` for what is neither a string nor chat messages, or has no UTF-8."""
    try:
        message_text(value).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds half of a pair of surrogates, {error.object[error.start]!r}, which no tokenizer reads: read "
            "the text as UTF-8, or replace it (errors='replace')"
        ) from error
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{name} is {value!r:.40}, expected a string or chat messages") from error


def checked_text(value, column: str, index: int) -> Text:
    """A cell of a data set as a `Text`, "" if it is empty. Raises `InputError`, naming the row, if it is none."""
    if value is None or isinstance(value, str):
        return value or ""
    try:
        message_text([{"role": message["role"], **message} for message in value])
        return value
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"row {index}: column {column} holds {value!r:.60}, expected a string or chat messages, each with role and "
            "content (null only in an assistant's that calls a tool): name another column with --prompt_column or "
            "--reference_column"
        ) from error


class Columns(NamedTuple):
    """The names of the columns that hold a row's prompt, reference and id; None where the data set has none."""

    prompt: str
    reference: str | None
    id: str | None


class PromptForm(NamedTuple):
    """What is made of the texts of a data set: see the flags of `ppl.cli.add_prompt_flags`.

    prompt_template: holds `{prompt}` once. chat: the prompt becomes a user's message, after system_prompt if there is
    one; or, after user_prompt, what the assistant has said so far. prompt_sentences: the prompt is the first so many
    sentences of its column, the reference is the rest.

    >>> PromptForm("Continue: {prompt}", chat=True).prompt_and_reference("The fox", " ran.")
    ([{'role': 'user', 'content': 'Continue: The fox'}], ' ran.')
    >>> PromptForm(chat=True, user_prompt="A story?").prompt_and_reference("The fox", " ran.")
    ([{'role': 'user', 'content': 'A story?'}, {'role': 'assistant', 'content': 'The fox'}], ' ran.')
    >>> PromptForm(prompt_sentences=1).prompt_and_reference("A fox ran. It fell. It slept.", "")
    ('A fox ran.', ' It fell. It slept.')
    """

    prompt_template: str = DEFAULT_PROMPT_TEMPLATE
    chat: bool = False
    system_prompt: str | None = None
    prompt_sentences: int | None = None
    language: str = DEFAULT_LANGUAGE  # that sentences are split by
    user_prompt: str | None = None

    @property
    def identity(self) -> dict:
        """What two runs must share for their prompts to be the same."""
        return {name: value for name, value in self._asdict().items() if name != "language"}

    def check(self) -> None:
        """Raises `InputError` for settings that make no sense."""
        try:
            parts = list(string.Formatter().parse(self.prompt_template))
        except ValueError as error:
            raise InputError(
                f"--prompt_template is {self.prompt_template!r}: {error}; a brace that is text is written twice"
            ) from error
        fields = [name + (conversion or "") + (form or "") for _, name, form, conversion in parts if name is not None]
        if fields != ["prompt"]:
            raise InputError(f"--prompt_template is {self.prompt_template!r}, expected {{prompt}} in it, once")
        for name in ("system_prompt", "user_prompt"):
            if getattr(self, name) is not None and not self.chat:
                raise InputError(f"--{name} is a message of a chat: it needs --chat")

    def prompt_and_reference(self, prompt: Text, reference: Text) -> tuple[Text, Text]:
        """Raises `InputError` for chat messages where a string is needed. A blank prompt stays blank."""
        plain = PromptForm(language=self.language)
        if self == plain or not message_text(prompt).strip():
            return prompt, reference
        if not isinstance(prompt, str):
            names = ", ".join(f"--{name}" for name, value in self.identity.items() if value != getattr(plain, name))
            raise InputError(f"the prompt is chat messages, and {names} is for prompts that are strings: leave it out")
        if self.prompt_sentences is not None:
            prompt, reference = split_sentences(prompt, self.prompt_sentences, self.language)
        prompt = self.prompt_template.format(prompt=prompt)
        if self.chat:
            said = [("system", self.system_prompt), ("user", self.user_prompt)]
            before = [{"role": role, "content": text} for role, text in said if text is not None]
            prompt = [*before, {"role": "user" if self.user_prompt is None else "assistant", "content": prompt}]
        return prompt, reference


def has_reference(columns: Columns, form: PromptForm) -> bool:
    return columns.reference is not None or form.prompt_sentences is not None


def make_row(example: Mapping, index: int, columns: Columns, form: PromptForm) -> dict:
    """`{"id", "prompt", "reference"}` of one example of a data set; the reference is "" where there is none.

    index: the example's, for messages. Raises `InputError` for a cell that is no text or no id.
    """
    try:
        cells = {name: example[name] for name in columns if name is not None}
    except UnicodeDecodeError as error:
        raise InputError(f"row {index} of the data set is not UTF-8 ({error}): convert the file") from error
    prompt = checked_text(cells[columns.prompt], columns.prompt, index)
    reference = "" if columns.reference is None else checked_text(cells[columns.reference], columns.reference, index)
    try:
        prompt, reference = form.prompt_and_reference(prompt, reference)
    except InputError as error:
        raise InputError(f"row {index}: {error}") from error
    row_id = stable_id(prompt, reference) if columns.id is None else cells[columns.id]
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        raise InputError(
            f"row {index}: column {columns.id} holds {row_id!r:.40}, expected a string; name another with --id_column"
        )
    return {"id": row_id, "prompt": prompt, "reference": reference}


# What GRPOTrainer reads from a row, or calls a reward function with under a name of its own.
TRL_COLUMNS = (
    *("prompts", "completion", "completions", "completion_ids", "image", "images", "environment", "environments"),
    *("trainer_state", "log_extra", "log_metric", "prompt_ids"),  # the last of `ppl.training.trainer`
)


def prepare_rows(dataset, columns: Columns, form: PromptForm):
    """A `datasets.Dataset` -> the rows that GRPOTrainer gets: `make_row`'s columns in place of those they are made of,
    and all others but `TRL_COLUMNS`, for reward functions to read.

    TRL drops a column named `completion`, so the reference has another name. Rows without a prompt are left out, and
    those of which `prompt_sentences` leaves nothing after the prompt.
    """
    dropped = [name for name in dataset.column_names if name in {*columns, *TRL_COLUMNS}]
    rows = dataset.map(
        lambda example, index: make_row(example, index, columns, form), with_indices=True, remove_columns=dropped
    )
    needed = ("prompt", "reference") if form.prompt_sentences else ("prompt",)
    return rows.filter(lambda row: all(message_text(row[name]).strip() for name in needed))


def find_columns(
    names: Iterable[str],
    prompt: str | None = None,
    reference: str | None = None,
    row_id: str | None = None,
    one_text: bool = False,
) -> Columns:
    """The columns asked for, else the usual ones. Raises `InputError`, listing the columns there are.

    one_text: prompt and reference are made of one column, `text` if there is one (`PromptForm.prompt_sentences`).
    """
    names = list(names)
    if one_text and reference is not None:
        raise InputError("--prompt_sentences makes the reference, --reference_column names one: drop one of the two")
    for flag, name in {"prompt_column": prompt, "reference_column": reference, "id_column": row_id}.items():
        if name is not None and name not in names:
            raise InputError(f"--{flag} is {name!r}, the data set has the columns {', '.join(names)}")
    usual = ("text", *PROMPT_COLUMNS) if one_text else PROMPT_COLUMNS
    prompt = prompt or next((name for name in usual if name in names), None)
    if prompt is None:
        raise InputError(
            f"no column {', '.join(PROMPT_COLUMNS)} in the data set, which has {', '.join(names)}: name the one with "
            "the prompts, --prompt_column NAME"
        )
    if not one_text:
        reference = reference or next((name for name in REFERENCE_COLUMNS if name in names), None)
    return Columns(prompt, reference, row_id or ("id" if "id" in names else None))


def check_references(rows, columns: Columns, form: PromptForm, blank_is_wrong: bool) -> None:
    """Raises `InputError` if there is no reference to measure, or, where that is wrong, if some are blank."""
    if not has_reference(columns, form):
        raise InputError(
            "--target reference needs a column with the text to measure, reference or completion: name it with "
            "--reference_column NAME"
        )
    blank = sum(not message_text(text).strip() for text in rows["reference"])
    if blank == len(rows) or (blank and blank_is_wrong):
        raise InputError(
            f"{blank} of {len(rows)} rows have a blank text in column {columns.reference or columns.prompt}, which "
            "--target reference would measure: drop them, skip them with --missing skip, or name another column with "
            "--reference_column"
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
            data = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise InputError(f"{name} has no split {split!r}, it has {', '.join(data)}")
                data = data[split]
            return data.to_iterable_dataset() if streaming else data
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
    except (OSError, ValueError, TypeError, StopIteration, datasets.exceptions.DatasetsError) as error:
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
