"""The baselines file: what is written is read back, and what is no baselines file is refused, whatever it is."""

import io
import json
import math
import pickle
import pickletools
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from baseline_files import write
from hypothesis import given, settings
from hypothesis import strategies as st

import compute_baselines_trl
from mlppl.baselines import safe_pickle
from mlppl.baselines.file import SUFFIXES, Baselines, check_meta, meta_path
from mlppl.config import LEVELS
from mlppl.data import PromptForm, stable_id
from mlppl.errors import BaselineError

RECORD = {"word": 45.25, "phrase": 47.5, "sentence": 51.125, "n_tokens": 12, "prompt_id": stable_id("Once")}
META = {
    "target": "completion",
    "definitions": {"max_phrase_words": 4, "language": "en", "aggregation": "geometric"},
    "prompt": {
        **PromptForm().identity,
        **{"chat_template": "4567", "chat_template_kwargs": {"enable_thinking": True}, "tools": None},
    },
    "tokenizer": "0123",
    "model": {"dtype": "float32", "quantization": "none", "weights": "abcd", "name": "gpt2"},
    "window": 512,
    "longest": 300,
    "dataset": {
        "name": "my data",
        "config": None,
        "split": "train",
        "columns": {"prompt": "prompt", "reference": "completion", "id": None},
        "num_samples": None,
    },
}
IDENTITY = {key: META[key] for key in ("target", "definitions", "prompt", "tokenizer", "model", "window")}

# --- written and read ------------------------------------------------------------------------------------------------

characters = st.characters(exclude_categories=["Cs"])
positive = st.floats(min_value=1e-300, max_value=1e300)
keys = st.one_of(
    st.lists(st.text(characters, max_size=8), unique=True, min_size=1, max_size=12),
    st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, min_size=1, max_size=12),
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(keys=keys, data=st.data())
def test_reads_what_it_writes(tmp_path, suffix, keys, data):
    path = tmp_path / f"baselines{suffix}"
    levels = data.draw(st.lists(st.tuples(positive, positive, positive), min_size=len(keys), max_size=len(keys)))
    records = {key: {**RECORD, **dict(zip(LEVELS, row, strict=True))} for key, row in zip(keys, levels, strict=True)}
    write(path, records, META)
    found = Baselines.load(path)
    assert found.meta == META
    assert list(found) == ([str(key) for key in keys] if suffix == ".json" else keys)
    for key, row in zip(keys, levels, strict=True):
        assert tuple(found.find(key, None)) == row
    if suffix == ".pkl":
        assert pickle.loads(path.read_bytes()) == records
    if suffix == ".json":
        assert json.loads(path.read_text(encoding="utf-8")) == {str(key): record for key, record in records.items()}


def test_many_rows_in_pieces(tmp_path):
    records = {f"row {index}": {**RECORD, "word": index + 1.0} for index in range(20_001)}
    for suffix in SUFFIXES:
        path = tmp_path / f"baselines{suffix}"
        write(path, records, {})
        found = Baselines.load(path)
        assert list(found) == list(records)
        assert found["row 20000"].tolist() == [20001.0, 47.5, 51.125]
    assert pickle.loads((tmp_path / "baselines.pkl").read_bytes()) == records


def test_a_file_is_read_without_torch(tmp_path):
    write(tmp_path / "b.pkl", {"a": RECORD}, META)
    code = "import sys; import mlppl.baselines.file as f; f.Baselines.load('b.pkl'); sys.exit('torch' in sys.modules)"
    folder = str(compute_baselines_trl.__file__).rpartition("/")[0]
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": folder}).returncode == 0


def test_find():
    twin = {**RECORD, "prompt_id": stable_id("Twin")}
    baselines = Baselines({"7": RECORD, "Some prompt": {"word": 2, "phrase": 3, "sentence": 4}, "a": twin, "b": twin})
    assert baselines.find("7", None)[0] == 45.25
    assert baselines.find(7, None)[0] == baselines.find(np.int64(7), None)[0] == 45.25  # JSON knows no number as key
    assert baselines.find("unknown", "Some prompt")[0] == 2
    assert baselines.find("unknown", "Once")[0] == 45.25  # by the hash of the prompt
    assert baselines.find("unknown", "Twin") is None  # two rows have it
    assert baselines.find(None, [{"role": "user", "content": "?"}]) is None


def test_a_baseline_is_of_one_prompt_and_no_other():
    baselines = Baselines({"0": {**RECORD, "prompt_start": "Once"}}, META, "b.pkl")
    assert baselines.find("0", "Once")[0] == baselines.find(0, "Once")[0] == baselines.find("0", None)[0] == 45.25
    with pytest.raises(BaselineError) as caught:
        baselines.find(0, "Quantum fox\nzz", index=4)
    for part in ("row 4 with the id 0", "'Quantum fox zz'", "b.pkl", "'Once'", "compute_baselines_trl.py"):
        assert part in str(caught.value)
    with pytest.raises(BaselineError, match=r"another prompt under this id"):  # a file from before beginnings were kept
        Baselines({"0": RECORD}).find("0", [{"role": "user", "content": "Once"}])
    with pytest.raises(BaselineError, match=r"row 1 with the id 0"):  # ids that start anew in each split
        Baselines({0: RECORD, 1: RECORD}).check_coverage([0, 0], ["Once", "Twice"])
    with pytest.raises(BaselineError, match=r"row 0 with the id 0"):  # also where rows may lack one
        Baselines({0: RECORD}).check_coverage([0], ["Twice"], needed=False)
    Baselines({0: RECORD}).check_coverage([7], ["Twice"], needed=False)


def test_a_reference_that_is_measured_has_no_other_ones_baseline():
    record = {**RECORD, "reference_id": stable_id(" upon a time")}
    baselines = Baselines({"a": record, "Once": RECORD}, META, "b.pkl")
    assert baselines.find("a", "Once", " upon a time")[0] == 45.25
    assert baselines.find("b", "Once", " upon a hill") is None  # neither by the prompt nor by its hash
    with pytest.raises(BaselineError, match=r"has a reference that begins 'upon a hill'.*another reference under this"):
        baselines.find("a", "Once", " upon a hill")
    assert baselines.find("a", "Once")[0] == 45.25  # a completion's baseline is its prompt's


def test_coverage_names_the_rows_that_lack_a_baseline():
    baselines = Baselines({"a": {**RECORD, "prompt_id": stable_id("A")}}, META, "b.pkl")
    baselines.check_coverage(["a"], ["A"])
    with pytest.raises(BaselineError, match=r"b\.pkl has no baseline for 4 of 5 rows, first \['c', 'd', 'e'\]"):
        baselines.check_coverage(list("acdef"), list("ACDEF"))


# --- refused values --------------------------------------------------------------------------------------------------

WRONG = [math.nan, math.inf, -math.inf, -1.0, 0.0, 0, -3, True, None, "45.2", [1.0], {"a": 1}, 10**400]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: repr(wrong)[:12])
@pytest.mark.parametrize("level", LEVELS)
def test_refuses_a_level_that_is_no_positive_number(tmp_path, level, wrong):
    records = {"first": RECORD, "the culprit": {**RECORD, level: wrong}, "last": RECORD}
    for suffix, dump in {".pkl": pickle.dumps, ".json": lambda r: json.dumps(r).encode()}.items():
        path = tmp_path / f"baselines{suffix}"
        path.write_bytes(dump(records))
        with pytest.raises(BaselineError) as caught:
            Baselines.load(path)
        message = str(caught.value)
        assert str(path) in message and "'the culprit'" in message and level in message
        assert repr(wrong)[:10] in message and len(message) < 500


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": 45.2}, "id 'a': expected a dict of levels, found 45.2"),
        ({"a": [1.0, 2.0, 3.0]}, "expected a dict of levels"),
        ({"a": {"word": 1.0, "phrase": 1.0}}, "sentence is None"),
        ([RECORD], "expected a dict of id -> levels, found list"),
        (None, "found NoneType"),
        ("baselines", "found str"),
    ],
)
def test_refuses_other_content(tmp_path, content, reason):
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(content))
    (tmp_path / "b.json").write_text(json.dumps(content))
    for name in ("b.pkl", "b.json"):
        with pytest.raises(BaselineError, match=re.escape(reason)):
            Baselines.load(tmp_path / name)


def test_refuses_damaged_json(tmp_path):
    path = tmp_path / "b.json"
    entry = json.dumps(RECORD)
    for content, reason in {
        f'{{"a": {entry}, "a": {entry}}}': "'a' is there twice",
        '{"a": {"word": 1, "word": 2, "phrase": 1, "sentence": 1}}': "'word' is there twice",
        f'{{"a": {entry}': "not JSON",
        "[" * 100_000: "not JSON",
        "\xff\x00": "not JSON",
        "": "not JSON",
    }.items():
        path.write_bytes(content.encode("latin1"))
        with pytest.raises(BaselineError, match=reason):
            Baselines.load(path)


def test_refuses_what_is_no_file(tmp_path):
    with pytest.raises(BaselineError, match=r"nowhere\.pkl: No such file.*make it with compute_baselines_trl\.py"):
        Baselines.load(tmp_path / "nowhere.pkl")
    (tmp_path / "folder.pkl").mkdir()
    with pytest.raises(BaselineError, match="Is a directory"):
        Baselines.load(tmp_path / "folder.pkl")
    with pytest.raises(BaselineError, match=r"expected a file ending in \.pkl, \.json"):
        Baselines.load(tmp_path / "baselines.csv")


# --- pickles ---------------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**1200), 2**1200),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.sampled_from([np.float64(1.5), np.float32(2.5), np.float16(3), np.int64(-4), np.uint8(5), np.bool_(True)]),
    st.sampled_from([np.str_("id é"), np.dtype(">f8").type(6)]),
)
plain = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=6), st.integers()), inner, max_size=4),
    ),
    max_leaves=12,
)
dumps = st.sampled_from(
    [pickle.dumps, pickle._dumps, lambda value, protocol: pickletools.optimize(pickle.dumps(value, protocol))]
)


@settings(max_examples=150)
@given(value=plain, protocol=st.integers(0, 5), dumps=dumps)
def test_plain_data_is_read_as_pickle_reads_it(value, protocol, dumps):
    data = dumps(value, protocol)
    found = safe_pickle.loads(data)
    assert found == pickle.loads(data)
    assert_plain(found)


def assert_plain(value):
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        assert type(item) in (dict, list, tuple, str, int, float, bool, type(None))
        if isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item if isinstance(item, list | tuple) else [*item, *item.values()])


@settings(max_examples=250)
@given(
    value=plain,
    protocol=st.integers(0, 5),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 2), st.binary(max_size=3)), min_size=1, max_size=4),
)
def test_a_damaged_pickle_is_plain_data_or_refused(value, protocol, edits):
    data = bytearray(pickle.dumps({"a": RECORD, "b": value}, protocol))
    for index, removed, put in edits:
        index %= len(data)
        data[index : index + removed] = put
    _read_or_refuse(bytes(data))


DTYPE, SCALAR = b"cnumpy\ndtype\n", b"cnumpy._core.multiarray\nscalar\n"
OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
pieces = st.one_of(
    st.sampled_from(OPCODES),
    st.binary(max_size=4),
    st.sampled_from([b"cos\nsystem\n", DTYPE, SCALAR, b"c_codecs\nencode\n", b"K\x01", b"]", b"}"]),
    st.sampled_from([b"U\x02f8", b"X\x02\x00\x00\x00f8", b"\x8c\x01<", b"C\x08\x00\x00\x00\x00\x00\x00\xf0?"]),
)


@settings(max_examples=250)
@given(st.lists(pieces, max_size=30).map(b"".join))
def test_any_sequence_of_opcodes_is_plain_data_or_refused(data):
    _read_or_refuse(b"\x80\x04" + data + b".")


def _read_or_refuse(data):
    try:
        found = safe_pickle.loads(data)
    except safe_pickle.PickleRefused as error:
        assert 0 < len(str(error)) < 300
        return
    assert_plain(found)
    try:
        Baselines(found)
    except BaselineError as error:
        assert len(str(error)) < 500


def test_a_pickle_cut_anywhere_is_refused():
    for protocol in range(6):
        data = pickle.dumps({"a": RECORD, "b": {**RECORD, "word": np.float64(3)}}, protocol)
        for size in range(len(data)):
            with pytest.raises(safe_pickle.PickleRefused):
                safe_pickle.loads(data[:size])
        with pytest.raises(safe_pickle.PickleRefused):
            safe_pickle.loads(data + data)


class Evil:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def _system(marker):
    import os

    return Evil(os.system, (f"touch {marker}",))


def _nested_key(depth):
    return b"\x80\x04})" + b"\x85" * depth + b"K\x01s."


def _doubling(levels):
    """A tuple of 2 ** levels leaves in a few bytes: t = (t, t), again and again."""
    return b"\x80\x04)" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(levels))


def _text_again_and_again(times):
    """A text of 10,000 characters, of which every 5 bytes make a new one: they call what memo 0 holds with memo 12."""
    once = pickle.dumps(np.str_("a" * 10_000), 2)[2:-1]
    return b"\x80\x02](" + once + b"h\x00h\x0cR" * times + b"e."


HOSTILE = {
    "os.system": lambda marker: pickle.dumps({"a": _system(marker)}),
    "os.system, protocol 0": lambda marker: pickle.dumps({"a": _system(marker)}, 0),
    "eval": lambda marker: pickle.dumps(Evil(eval, (f"open({str(marker)!r}, 'w')",))),
    "getattr": lambda marker: pickle.dumps(Evil(getattr, (np.float64(1), "tofile"))),
    "numpy.load": lambda marker: b"\x80\x04cnumpy\nload\nX\x01\x00\x00\x00x\x85R.",
    "numpy.dtype.fromstring": lambda marker: b"\x80\x04\x8c\x05numpy\x8c\x10dtype.fromstring\x93.",
    "object array": lambda marker: pickle.dumps(np.array([_system(marker)], dtype=object)),
    "array": lambda marker: pickle.dumps({"a": np.ones(3)}),
    "datetime64": lambda marker: pickle.dumps({"a": np.datetime64("2024-01-01")}),
    "structured scalar": lambda marker: pickle.dumps(np.zeros(1, dtype=[("a", "f8")])[0]),
    "object dtype": lambda marker: b"\x80\x04" + SCALAR + DTYPE + b"X\x01\x00\x00\x00O\x85R)\x86R.",
    "character that there is not": lambda marker: (
        b"\x80\x04" + SCALAR + DTYPE + b"X\x02\x00\x00\x00U1\x85RC\x04\xff\xff\xff\xff\x86R."
    ),
    "class as a value": lambda marker: b"\x80\x04}X\x01\x00\x00\x00a" + DTYPE + b"s.",
    "set state of a function": lambda marker: b"\x80\x04" + SCALAR + b"}X\x01\x00\x00\x00aK\x01sb.",
    "set": lambda marker: pickle.dumps({"a": {1, 2}}),
    "frozenset": lambda marker: pickle.dumps(frozenset([1])),
    "bytes": lambda marker: pickle.dumps({"a": b"bytes"}),
    "bytearray": lambda marker: pickle.dumps(bytearray(b"bytes"), 5),
    "complex": lambda marker: pickle.dumps({"a": 1j}),
    "function": lambda marker: pickle.dumps(json.dumps),
    "persistent id": lambda marker: b"\x80\x04X\x01\x00\x00\x00aQ.",
    "text persistent id": lambda marker: b"Pelsewhere\n.",
    "instance": lambda marker: b"(ios\nsystem\n.",
    "object": lambda marker: b"(cos\nsystem\no.",
    "extension": lambda marker: b"\x80\x04\x82\x01.",
    "buffer": lambda marker: b"\x80\x05\x97.",
    "float key": lambda marker: pickle.dumps({1.5: RECORD}),
    "tuple key": lambda marker: pickle.dumps({("a", "b"): RECORD}),
    "none key": lambda marker: pickle.dumps({None: RECORD}),
    "nested key that overflows the stack": lambda marker: _nested_key(300_000),
    "key that takes forever to hash": lambda marker: b"\x80\x04}" + _doubling(60)[2:] + b"K\x01s.",
    "memo of 64 GB": lambda marker: b"\x80\x04}r\xff\xff\xff\xff" + b"e.",
    "memo number of 20 digits": lambda marker: b"}p99999999999999999999\ne.",
    "string of 16 exabytes": lambda marker: b"\x80\x04\x8d" + struct.pack("<Q", 2**64 - 1) + b"a.",
    "number of a million digits": lambda marker: b"I" + b"9" * 1_000_000 + b"\n.",
    "text of 10 GB": lambda marker: _text_again_and_again(1_000_000),
    "protocol 200": lambda marker: b"\x80\xc8N.",
    "own tuple": lambda marker: b"\x80\x04" + DTYPE + b"\x85.",
    "text": lambda marker: b"word,phrase,sentence\n1,2,3\n",
    "zip": lambda marker: b"PK\x03\x04" + bytes(100),
    "nothing": lambda marker: b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_foreign_pickles_are_refused(tmp_path, name):
    path, marker = tmp_path / "baselines.pkl", tmp_path / "marker"
    path.write_bytes(HOSTILE[name](marker))
    with pytest.raises(BaselineError, match=r"baselines\.pkl: not a baselines pickle \(.+\): recompute it") as caught:
        Baselines.load(path)
    assert len(str(caught.value)) < 400
    assert not marker.exists()


def test_large_and_deep_values_are_refused_by_name(tmp_path):
    """What is plain data and no baseline may be built of references that no repr comes to the end of."""
    deep = b"]" * 100_000 + b"a" * 99_999
    endless = b"]\x94h\x00a"
    for value in (deep, endless, _doubling(60)[2:], b"\x8b\xff\xff\x00\x00" + b"\x01" * 65535):
        (tmp_path / "b.pkl").write_bytes(b"\x80\x04}X\x01\x00\x00\x00x" + value + b"s.")
        with pytest.raises(BaselineError, match=r"id 'x': expected a dict of levels") as caught:
            Baselines.load(tmp_path / "b.pkl")
        assert len(str(caught.value)) < 400


def test_a_pickle_of_pandas_numbers_is_read(tmp_path):
    levels = {"word": np.float64(2), "phrase": np.float32(3), "sentence": np.int64(4)}
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({np.str_("a"): levels}))
    assert Baselines.load(tmp_path / "b.pkl")["a"].tolist() == [2, 3, 4]
    assert Baselines({"a": levels})["a"].tolist() == [2, 3, 4]


# --- what a file was made with ---------------------------------------------------------------------------------------


def _changed(path, value):
    changed = json.loads(json.dumps(IDENTITY))
    part = changed
    *parents, last = path.split(".")
    for parent in parents:
        part = part[parent]
    part[last] = value
    return changed


def test_the_same_is_accepted():
    check_meta(Baselines({}, META, "b.pkl"), IDENTITY)
    check_meta(Baselines({}, {}, "a dict"), IDENTITY)  # without a meta file it is taken at its word
    check_meta(Baselines({}, META, "b.pkl"), _changed("model.name", "a copy of gpt2"))


@pytest.mark.parametrize(
    ("path", "value", "flags"),
    [
        ("target", "reference", {"target": "reference"}),
        ("definitions.max_phrase_words", 6, {"max_phrase_words": 6}),
        ("definitions.language", "de", {"language": "de"}),
        ("definitions.aggregation", "nested", {"aggregation": "nested"}),
        ("tokenizer", "4567", {}),
        ("model.weights", "beef", {}),
        ("model.dtype", "bfloat16", {"dtype": "bfloat16"}),
        ("model.quantization", "4bit", {"load_in_4bit": True}),
        ("window", 256, {"max_seq_length": 256}),
        ("prompt.prompt_template", "Go on: {prompt}", {"prompt_template": "Go on: {prompt}"}),
        ("prompt.chat", True, {"chat": True}),
        ("prompt.prompt_sentences", 2, {"prompt_sentences": 2}),
        ("prompt.user_prompt", "A story?", {"user_prompt": "A story?"}),
        (
            "prompt.chat_template_kwargs",
            {"enable_thinking": False},
            {"chat_template_kwargs": {"enable_thinking": False}},
        ),
        ("prompt.chat_template", "89ab", {}),
    ],
)
def test_what_differs_is_refused_with_both_values_and_a_command(path, value, flags):
    baselines = Baselines({}, META, "b.pkl")
    identity = _changed(path, value)
    identity["model"]["name"] = "llama"
    with pytest.raises(BaselineError) as caught:
        check_meta(baselines, identity)
    message = str(caught.value)
    mine = META[path] if "." not in path else META[path.split(".")[0]][path.split(".")[1]]
    for part in ("b.pkl", "'gpt2'", "'llama'", str(mine), str(value), "--allow_baseline_mismatch"):
        assert part in message
    command = shlex.split(message.partition("`")[2].partition("`")[0])
    assert command[0] == sys.executable and Path(command[1]).resolve() == Path(compute_baselines_trl.__file__)
    args = compute_baselines_trl.parse_args(command[2:])
    wanted = {
        "model_name": "llama",
        "dataset_name": "my data",
        "dataset_split": "train",
        "output_path": "b.pkl",
    } | flags
    assert {name: getattr(args, name) for name in wanted} == wanted and args.overwrite


@pytest.mark.parametrize("target", ["completion", "reference"])
def test_baselines_of_the_models_own_writing_are_made_again_as_such(target):
    """The references' would be others; and for references nothing is generated."""
    generated = {"generate": 4, "max_new_tokens": 64, "temperature": 0.9, "seed": 7, "top_p": 0.5, "min_p": None}
    generated["generation_kwargs"] = {"no_repeat_ngram_size": 2}
    baselines = Baselines({}, {**META, "generated": generated}, "b.pkl")
    with pytest.raises(BaselineError) as caught:
        check_meta(baselines, {**_changed("definitions.aggregation", "nested"), "target": target})
    command = shlex.split(str(caught.value).partition("`")[2].partition("`")[0])
    args = compute_baselines_trl.parse_args(command[2:])
    assert args.aggregation == "nested" and args.target == target
    assert args.generate == (4 if target == "completion" else None)
    if target == "completion":
        assert {name: getattr(args, name) for name in generated} == generated


def test_another_window_matters_only_if_a_text_was_longer():
    for window, longest, refused in [(400, 300, False), (400, 450, True), (None, 450, False), (None, 600, True)]:
        baselines = Baselines({}, {**META, "longest": longest}, "b.pkl")
        if refused:
            with pytest.raises(BaselineError, match="window 512 tokens; the scorer"):
                check_meta(baselines, _changed("window", window))
        else:
            check_meta(baselines, _changed("window", window))


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", '"text"', '{"model": "gpt2"}', '{"definitions": [4]}', '{"dataset": 1}', '{"window": ""}'],
)
def test_a_meta_file_edited_by_hand_is_refused_by_name(tmp_path, content):
    path = tmp_path / "b.pkl"
    write(path, {"a": RECORD}, META)
    meta_path(path).write_text(content)
    with pytest.raises(BaselineError, match=r"b\.pkl\.meta\.json"):
        Baselines.load(path)


def test_the_reader_of_python_would_have_run_it(tmp_path):
    """The guard above is needed: the same bytes, read with `pickle.load`, run a command."""
    marker = tmp_path / "marker"
    pickle.load(io.BytesIO(HOSTILE["os.system"](marker)))
    assert marker.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": 3},
        {"definitions": ["a"]},
        {"longest": "300"},
        {"generated": 4},
        {"dataset": {"columns": "ab"}},
        {"model": {"config": "ab"}},
        {"model": {"probe": 3}},
        {"model": {"probe": ["a"]}},
    ],
)
def test_a_meta_file_of_another_shape_is_refused_when_it_is_read(tmp_path, wrong):
    write(tmp_path / "b.json", {"row 0": RECORD}, META)
    meta_path(tmp_path / "b.json").write_text(json.dumps({**META, **wrong}))
    with pytest.raises(BaselineError, match=r"b\.json\.meta\.json: \w+ is .*: delete it or recompute the baselines"):
        Baselines.load(tmp_path / "b.json")


def test_an_id_that_reads_like_another_rows_prompt_is_not_that_prompts():
    record = {"word": 2.0, "phrase": 2.0, "sentence": 2.0}
    baselines = Baselines({"7": {**record, "prompt_id": stable_id("Once upon")}, "The fox": record})
    assert baselines.find(None, "7") is None and baselines.find("other", "7") is None
    assert baselines.find(None, "Once upon").tolist() == [2, 2, 2]
    assert baselines.find(None, "The fox").tolist() == [2, 2, 2]  # a mapping by prompts, which names no hash
