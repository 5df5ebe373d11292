"""A data set -> rows of prompt, reference and id: the same in every script, whatever the order."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import regex

from . import INSTALLED
from .config import DEFAULT_LANGUAGE, DEFAULT_PROMPT_TEMPLATE, format_fields
from .errors import InputError
from .files import write_text

TINY_STORIES = Path(__file__).parents[0 if INSTALLED else 1] / "tiny_stories"
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
    return text if isinstance(text, str) else "\n".join(filter(None, map(_content, text)))


def _content(message: dict) -> str:
    content = message.get("content")
    if content is None and message["role"] == "assistant":  # it called a tool instead
        return ""
    if isinstance(content, str):
        return content
    for part in content:
        if part.get("type") != "text":
            raise InputError(f"a message has a part of the type {part.get('type')!r}, and only text is read here")
    return "".join(part["text"] for part in content)


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
    except InputError as error:
        raise InputError(f"row {index}, column {column}: {error}") from error
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
    """What is made of the texts of a data set: see the flags of `mlppl.cli.add_prompt_flags`.

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
        if format_fields("--prompt_template", self.prompt_template) != ["prompt"]:
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

    @property
    def around(self) -> tuple[str, str]:
        """What the template puts before a prompt and behind it, its braces as they are read."""
        before, behind = self.prompt_template.format(prompt="\0").split("\0")
        return before, behind

    def shaped(self, prompt: Text) -> Text:
        """A prompt as the rows have it: a text is brought into their form, unless it has it.

        >>> form = PromptForm("Go on: {prompt}", chat=True)
        >>> form.shaped("A fox."), form.shaped(form.shaped("A fox.")) == form.shaped("A fox.")
        ([{'role': 'user', 'content': 'Go on: A fox.'}], True)
        """
        before, behind = self.around
        has_it = not self.chat and prompt[: len(before)] == before and prompt[len(prompt) - len(behind) :] == behind
        return prompt if not isinstance(prompt, str) or has_it else self.prompt_and_reference(prompt, "")[0]


def refuse_unscored(reference: Text, index: int) -> None:
    """Raises `InputError` for a reference that says something beside the content of its messages: it is not scored."""
    known = ("role", "content", "name", "tool_calls", "tool_call_id")
    for message in () if isinstance(reference, str) else reference:
        if unscored := [key for key, value in message.items() if value and key not in known]:
            raise InputError(
                f"row {index}: a message of the reference has the key {unscored[0]!r}, and only its content is scored: "
                "drop it, or put what it says into the content"
            )


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
    *("trainer_state", "log_extra", "log_metric", "prompt_ids"),  # the last of `mlppl.training.trainer`
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
    return rows.filter(lambda row: has_texts(row["prompt"], row["reference"], form))


def has_texts(prompt: Text, reference: Text, form: PromptForm) -> bool:
    """Whether a row is one to train on."""
    needed = (prompt, reference) if form.prompt_sentences else (prompt,)
    return all(message_text(one).strip() for one in needed)


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
    for index, reference in enumerate(rows["reference"]):
        refuse_unscored(reference, index)
    blank = sum(not message_text(text).strip() for text in rows["reference"])
    if blank == len(rows) or (blank and blank_is_wrong):
        raise InputError(
            f"{blank} of {len(rows)} rows have a blank text in column {columns.reference or columns.prompt}, which "
            "--target reference would measure: drop them, skip them with --missing skip, or name another column with "
            "--reference_column"
        )


def load_split(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    text_columns: Iterable[str | None] = (),
):
    """One split of a data set, or a slice as `datasets` writes it: tiny-stories, a folder, a file, a name on the hub.

    A file, and a saved `Dataset`, has one split, train. text_columns: of a CSV, those that are text whatever stands in
    them, beside the usual ones. Raises `InputError` if the split cannot be had, saying what there is instead, and for
    images, sound and video beside the text. Nothing of a data set is executed.
    """
    import datasets

    from . import splits

    datasets.disable_progress_bars()
    path = TINY_STORIES if name == "tiny-stories" else Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or path.suffix in DATA_FILES):
        raise InputError(f"data set {name!r} does not exist: expected a folder, a file, a hub name, or tiny-stories")
    source, files, saved = str(path) if path.exists() else name, None, None
    if path.is_file():
        if path.suffix not in DATA_FILES:
            raise InputError(f"{name}: expected a file ending in .json, .jsonl, .csv or .parquet, or a folder")
        source, files = DATA_FILES[path.suffix], {"train": str(path)}
    elif name == "tiny-stories":
        source, files = "json", {one: str(path / f"{one}.json") for one in ("train", "test")}
    elif name == "wikitext" and not path.exists():  # the seed guide's short name for it
        source, config = "Salesforce/wikitext", config or "wikitext-2-raw-v1"
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(str(path))
            saved = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        there = saved or files
        asked = [part.partition("[")[0].strip() for part in split.split("+")]
        if there and (absent := [one for one in asked if one not in there]):
            raise InputError(f"{name} has no split {absent[0]!r}, it has {', '.join(there)}")
        with splits.more_cells_refused(name):
            if saved:
                data = splits.sliced(saved, split)
                data = data.to_iterable_dataset() if streaming else data
            else:
                builder = datasets.load_dataset_builder(source, config, data_files=files)
                texts = {*PROMPT_COLUMNS, *REFERENCE_COLUMNS, "id", *filter(None, text_columns)}
                options = {**splits.options(builder, texts), "split": split, "streaming": streaming}
                data = datasets.load_dataset(source, config, data_files=files, **options)
            splits.refuse_media(data)  # of a stream, reads its first rows
        return data
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


def prompt_key(prompt: Text) -> str:
    """What is equal of prompts that a policy reads as the same: templates strip what a message says."""
    if isinstance(prompt, str):
        return prompt
    said = [{**without_none(message), "content": message_text([message]).strip()} for message in prompt]
    return json.dumps(said, sort_keys=True)


def split_heldout(dataset, samples: int | None, seed: int):
    """(rows to train on, rows kept out), drawn with the seed.

    samples: how many prompts are kept out, one row of each; None: a fifth, at most 16. Further rows of a prompt that is
    kept out are in neither.
    """
    import datasets

    rows_of: dict[str, list[int]] = {}
    for index, prompt in enumerate(dataset["prompt"]):
        rows_of.setdefault(prompt_key(prompt), []).append(index)
    samples = samples or min(16, max(1, len(rows_of) // 5))
    if samples >= len(rows_of):
        distinct = "" if len(rows_of) == len(dataset) else f", and {len(rows_of)} different prompts"
        raise InputError(
            f"the data set has {len(dataset)} rows{distinct}: too few to keep --heldout_samples {samples} out of "
            "training"
        )
    groups = datasets.Dataset.from_dict({"rows": list(rows_of.values())})
    parts = groups.train_test_split(test_size=samples, seed=seed)
    kept_out = [rows[0] for rows in parts["test"]["rows"]]
    return dataset.select([row for rows in parts["train"]["rows"] for row in rows]), dataset.select(kept_out)


# --- rows that the scorer reads beside a text's own -------------------------------------------------------------------

Shown = tuple[Text, Text]  # prompt and reference
FIRST, POOL = 2000, 256  # rows of a data set that are drawn from; others, to contrast with
_BEGINNING = regex.compile(r"\w+|[^\w\s]")


def draw(
    rows: Iterable[Shown], examples: int | Sequence[Shown], contrast: int, of_prompts: bool = False
) -> tuple[list[Shown], list[Shown]]:
    """(examples, others) from the first `FIRST` rows of a data set, by a hash of each: the same for baselines and for
    training, whatever part of the rows either reads. Rows have different prompts, and texts in both columns.

    Examples are the first of them whose references begin with different words or signs, as far as there are such: what
    all examples share is what training learns, and of three that began with direct speech it learned to begin so.

    examples: how many, or those that are given, which are none of the others. of_prompts: whether the others' prompts
    are compared with, so that they need no reference. Raises `InputError` if there are too few.
    """
    by_prompt = {
        prompt_key(prompt): (prompt, reference or "")
        for prompt, reference in itertools.islice(rows, FIRST)
        if message_text(prompt).strip()
    }
    order = sorted(by_prompt.values(), key=lambda row: stable_id(*row))
    whole = [row for row in order if message_text(row[1]).strip()]
    begun: set[str] = set()
    alike = []  # whether an earlier one begins so
    for _, reference in whole:
        begins = _BEGINNING.search(message_text(reference))[0].casefold()
        alike.append(begins in begun)
        begun.add(begins)
    apart = [row for _, row in sorted(zip(alike, whole, strict=True), key=lambda one: one[0])]
    shown = apart[:examples] if isinstance(examples, int) else list(examples)
    asked = examples if isinstance(examples, int) else len(shown)
    seen = {shown_key(prompt) for prompt, _ in shown}
    others = [row for row in (order if of_prompts else whole) if shown_key(row[0]) not in seen][:POOL]
    if contrast >= POOL:
        raise InputError(f"--contrast is {contrast}, expected at most {POOL - 1}: a few other rows are enough")
    if len(shown) < asked or (contrast and len(others) <= contrast):
        raise InputError(
            f"--examples {asked} and --contrast {contrast} need rows with different prompts and a reference each: the "
            f"data set has {len(order)} and {len(whole)} of them (name its column with --reference_column)"
        )
    return shown, others if contrast else []


def shown_key(prompt: Text) -> str:
    """What is equal of prompts that say the same, as text or as messages."""
    return message_text(prompt if isinstance(prompt, str) else [m for m in prompt if m["role"] != "system"]).strip()


def read_shown(path: str | Path) -> list[Shown]:
    """The rows of a JSON lines file of `{"prompt", "reference"}`, as `write_shown` writes it. Raises `InputError`."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # a text may hold other line breaks
        rows = checked_shown(str(path), [json.loads(line) for line in lines if line.strip()])
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: {error}: expected JSON lines of prompt and reference") from error
    if not rows:
        raise InputError(f"{path} holds no row: expected JSON lines of prompt and reference")
    return rows


def write_shown(path: str | Path, rows: Sequence[Shown]) -> None:
    lines = [json.dumps(dict(zip(("prompt", "reference"), row, strict=True)), ensure_ascii=False) for row in rows]
    write_text(Path(path), "".join(f"{line}\n" for line in lines), "surrogatepass")


def checked_shown(name: str, rows: Sequence) -> list[Shown]:
    """(prompt, reference) pairs, or mappings with these keys, of a list. Raises `InputError`."""
    if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence):
        raise InputError(f"{name} is {rows!r:.60}, expected a list of (prompt, reference)")
    made = []
    for index, row in enumerate(rows):
        values = [row.get("prompt"), row.get("reference")] if isinstance(row, Mapping) else list(row)
        if len(values) != 2:
            raise InputError(f"{name} {index} is {row!r:.60}, expected (prompt, reference)")
        for value in values:
            check_text(value, f"{name} {index}")
        if not message_text(values[0]).strip():
            raise InputError(f"{name} {index} has a blank prompt, {values[0]!r:.40}: expected a text")
        made.append(tuple(values))
    return made


# Text -> where its sentences start, as sentencex divides it. Line breaks, which end one too, are `LINE_BREAKS`.

LINE_BREAKS = "\n\v\f\r\x85\u2028\u2029"
# sentencex 1.0.32 panics on "Z\xa0.": a capital, a space outside ASCII, a full stop.
_SPACE_BEFORE_STOP = regex.compile(r"[^\S\x00-\x7f](?=\.)")


def sentence_starts(text: str, language: str) -> list[int]:
    """Offsets of the text's sentences, in order. language: ISO 639 code."""
    import sentencex  # here, since --help imports this file

    readable = _SPACE_BEFORE_STOP.sub(" ", text)
    starts, end = [], 0
    for sentence in sentencex.segment(language, readable):
        # Looked for, not counted: sentencex 1.0.32 leaves out blank lines of texts beyond 10,000 characters.
        start = readable.index(sentence, end)
        end = start + len(sentence)
        # It takes the two characters of a Windows line break apart before a blank line.
        starts.append(start - (text[max(0, start - 1) : start + 1] == "\r\n"))
    return starts


def split_sentences(text: str, count: int, language: str) -> tuple[str, str]:
    """The first `count` sentences with something visible in them, and the rest with the space before it.

    >>> split_sentences("A fox ran. It fell.\\nIt slept.", 2, "en")
    ('A fox ran. It fell.', '\\nIt slept.')
    """
    starts = {*sentence_starts(text, language), *(i + 1 for i, char in enumerate(text) if char in LINE_BREAKS)}
    starts = sorted({0, *starts, len(text)})
    visible = [end for start, end in itertools.pairwise(starts) if text[start:end].strip()]
    end = visible[count - 1] if count <= len(visible) else len(text)
    prompt = text[:end].rstrip()
    return prompt, text[len(prompt) :]
