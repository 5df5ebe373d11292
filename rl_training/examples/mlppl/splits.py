"""What `datasets` gives: text as it is written, slices of saved data sets, no images.

By itself it takes "NA" and "null" in a CSV for nothing and 007 for the number 7, and "2024-03-01" in JSON for a date,
from which the text cannot be told any more.
"""

import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import datasets
import pyarrow as pa
import pyarrow.json
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.json import json as json_reader
from pandas.errors import ParserWarning

from .errors import InputError

MEDIA_COLUMNS = ("image", "images", "audio", "audios", "video", "videos")
MEDIA_TYPES = ("Image", "Audio", "Video")  # features of `datasets`


def options(builder, text_columns: Iterable[str]) -> dict:
    """The keywords of `datasets.load_dataset` for the files that a builder reads. text_columns: of a CSV, the columns
    that are text whatever stands in them; in the others only an empty cell is missing. Cells that are too many are no
    index, after which each name would be the next column's: see `more_cells_refused`."""
    if builder.name == "csv":
        converters = dict.fromkeys(sorted(text_columns), str)
        return {"keep_default_na": False, "na_values": [""], "converters": converters, "index_col": False}
    if builder.name == "json":
        json_reader.paj = types.SimpleNamespace(ReadOptions=pyarrow.json.ReadOptions, read_json=_read_json)
        # What it is anyway; but with it, nothing comes from a cache that another program has filled with dates.
        return {"encoding_errors": "strict"}
    return {}


@contextmanager
def more_cells_refused(name: str) -> Iterator[None]:
    """Raises `InputError` where pandas would only warn that it drops cells, which are more than a CSV's header has."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)
            yield
    except (ParserWarning, DatasetsError) as error:
        if not isinstance(error, ParserWarning) and not isinstance(error.__cause__, ParserWarning):
            raise
        raise InputError(
            f"{name}: its rows have more cells than its header has names: quote cells with commas"
        ) from error


def _read_json(source, read_options) -> pa.Table:
    table = pyarrow.json.read_json(source, read_options)
    schema = pa.schema([field.with_type(_without_dates(field.type)) for field in table.schema])
    if schema.equals(table.schema):
        return table
    source.seek(0)
    parse_options = pyarrow.json.ParseOptions(explicit_schema=schema)
    return pyarrow.json.read_json(source, read_options, parse_options)


def _without_dates(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_dates(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_dates(field.type)) for field in kind])
    return kind


def sliced(splits: Mapping, spec: str):
    """Of data sets by the names of their splits, what `datasets.load_dataset(split=spec)` would give of files."""
    parts = datasets.ReadInstruction.from_spec(spec).to_absolute({name: len(one) for name, one in splits.items()})
    # `select` takes no empty range behind the last row.
    ranges = [(splits[part.splitname], range(part.from_, part.to) or ()) for part in parts]
    return datasets.concatenate_datasets([data.select(rows) for data, rows in ranges])


def refuse_media(dataset) -> None:
    """Raises `InputError` for a column with images, sound or video: neither policy nor scorer would be given it."""
    for name in column_names(dataset):
        kind = type((dataset.features or {}).get(name)).__name__
        if kind in MEDIA_TYPES or (name in MEDIA_COLUMNS and any(row[name] for row in dataset.select_columns([name]))):
            raise InputError(
                f"the data set has a column {name!r}, and only text is read here: drop the column if the prompts make "
                "sense without it"
            )


def column_names(dataset) -> list[str]:
    """Of a stream, those of its first row, if it does not know them before; [] if it holds no row."""
    with reading():
        return dataset.column_names or list(next(iter(dataset), {}))


@contextmanager
def reading() -> Iterator[None]:
    """Turns what `datasets` raises for damage, which it meets only now in a stream, into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise InputError(f"cannot read the data set: {error}") from error
