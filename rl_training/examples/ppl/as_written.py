"""`datasets` reads CSV and JSON files with their text as it is written.

By itself it takes "NA" and "null" in a CSV for nothing and 007 for the number 7, and "2024-03-01" in JSON for a date,
from which the text cannot be told any more.
"""

import types
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.json
from datasets.packaged_modules.json import json as json_reader


def options(builder, text_columns: Iterable[str]) -> dict:
    """The keywords of `datasets.load_dataset` for the files that a builder reads. text_columns: of a CSV, the columns
    that are text whatever stands in them; in the others only an empty cell is missing."""
    if builder.name == "csv":
        converters = dict.fromkeys(sorted(text_columns), str)
        return {"keep_default_na": False, "na_values": [""], "converters": converters}
    if builder.name == "json":
        json_reader.paj = types.SimpleNamespace(ReadOptions=pyarrow.json.ReadOptions, read_json=_read_json)
        # What it is anyway; but with it, nothing comes from a cache that another program has filled with dates.
        return {"encoding_errors": "strict"}
    return {}


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
