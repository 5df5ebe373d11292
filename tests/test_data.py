"""Data sets as they are loaded: splits and slices, text as a file has it, images beside it, prompts kept out."""

import csv
import json

import datasets
import pytest
from datasets import Dataset, DatasetDict

from mlppl.data import load_split, prompt_key, split_heldout
from mlppl.errors import InputError

LETTERS = list("abcdefghij")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def write(name, rows):
    with open(name, "w", newline="", encoding="utf-8") as file:
        if name.endswith(".csv"):
            csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
        else:
            file.write(json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows))


def one_split(name):
    data = Dataset.from_list([{"prompt": letter} for letter in LETTERS])
    if name == "saved":
        data.save_to_disk(name)
    elif name == "saved_dict":
        DatasetDict({"train": data, "test": data.select([2, 1, 0])}).save_to_disk(name)
    elif name.endswith(".parquet"):
        data.to_parquet(name)
    else:
        write(name, data.to_list())


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.csv", "f.parquet", "saved", "saved_dict"])
def test_slices_are_those_of_datasets(folder, name):
    one_split(name)
    for split, expected in {
        "train": LETTERS,
        "train[:3]": list("abc"),
        "train[-2:]": list("ij"),
        "train[10%:30%]": list("bc"),
        "train[8:]+train[:2]": list("ijab"),
        "train[5:3]": [],
    }.items():
        assert list(load_split(name, split=split)["prompt"]) == expected


def test_a_slice_behind_the_last_row_of_a_saved_data_set_is_empty(folder):
    one_split("saved")
    assert len(load_split("saved", split="train[100:]")) == 0
    assert len(load_split("saved", split="train[:1]+train[100:]")) == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", ["test", "test[:2]", "train[:2]+test"])
@pytest.mark.parametrize("name", ["f.json", "f.csv", "f.parquet", "saved"])
def test_a_file_has_one_split(folder, name, split, streaming):
    one_split(name)
    with pytest.raises(InputError, match=f"{name} has no split 'test', it has train$"):
        load_split(name, split=split, streaming=streaming)


def test_a_saved_dict_has_its_splits(folder):
    one_split("saved_dict")
    assert list(load_split("saved_dict", split="test[:1]+train[:1]")["prompt"]) == ["c", "a"]
    assert [row["prompt"] for row in load_split("saved_dict", split="test[1:]", streaming=True)] == ["b", "a"]
    with pytest.raises(InputError, match="saved_dict has no split 'dev', it has train, test"):
        load_split("saved_dict", split="dev[:1]")


def test_both_splits_of_the_embedded_stories_can_be_sliced():
    assert len(load_split("tiny-stories", split="test[:2]+train[:3]")) == 5


# --- text as it is written -------------------------------------------------------------------------------------------

AS_WRITTEN = [
    "NA",
    "null",
    "None",
    "nan",
    "N/A",
    "",
    "007",
    "1.50",
    "True",
    "2024-03-01",
    "2024-03-01T10:00:00Z",
    " a\r\nb",
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.csv", "folder/train.csv", "folder/train.jsonl"])
def test_text_is_what_the_file_says(folder, name, streaming):
    """Each kind alone, since a whole column of it makes the readers take it for something else."""
    (folder / "folder").mkdir()
    for text in AS_WRITTEN:
        write(name, [{"id": f"{text}.", "prompt": text, "story": text}] * 2)
        data = load_split(name.partition("/")[0], streaming=streaming, text_columns=["story", None])
        for row in data:
            assert [value or "" for value in row.values()] == [f"{text}.", text, text]


@pytest.mark.parametrize("name", ["f.jsonl", "f.json"])
def test_text_in_messages_is_what_the_file_says(folder, name):
    rows = [{"id": "2024-01-01", "prompt": [{"role": "user", "content": "2024-03-01"}], "tags": ["2024-03-01"]}] * 2
    write(name, rows)
    assert load_split(name).to_list() == rows


def test_dates_in_one_file_of_several_stay_text(folder):
    (folder / "data").mkdir()
    write("data/train.jsonl", [{"prompt": "May"}])
    write("data/test.jsonl", [{"prompt": "2024-03-01"}])
    assert load_split("data", split="train+test").to_list() == [{"prompt": "May"}, {"prompt": "2024-03-01"}]


def test_what_another_program_has_read_as_dates_is_read_anew(folder):
    write("f.jsonl", [{"prompt": "2024-03-01"}])
    datasets.load_dataset("json", data_files={"train": "f.jsonl"}, split="train")
    assert load_split("f.jsonl").to_list() == [{"prompt": "2024-03-01"}]


def test_the_other_columns_of_a_csv_stay_numbers(folder):
    (folder / "f.csv").write_text("prompt,baseline_word,n,tag\n1,2.5,1,NA\n2,,2,x\n")
    assert load_split("f.csv").to_list() == [
        {"prompt": "1", "baseline_word": 2.5, "n": 1, "tag": "NA"},
        {"prompt": "2", "baseline_word": None, "n": 2, "tag": "x"},
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_csv_with_more_cells_than_names_is_refused(folder, streaming):
    """Its first cells would become an index, and each name the next column's; one of numbers leaves no trace."""
    cells = {"prompt,completion": ["The cat sat, on the mat, and slept."], "id,prompt,completion": ["1,a,b,c", "2,a,b"]}
    for header, rows in cells.items():
        (folder / "f.csv").write_text("\n".join([header, *rows, ""]))
        with pytest.raises(InputError, match=r"f\.csv: its rows have more cells than its header has names"):
            load_split("f.csv", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_commas_at_the_ends_of_a_csvs_rows_move_no_column(folder, streaming):
    (folder / "f.csv").write_text("id,prompt,completion\n1,a,b,\n2,c,d,\n")
    rows = [{"id": "1", "prompt": "a", "completion": "b"}, {"id": "2", "prompt": "c", "completion": "d"}]
    assert list(load_split("f.csv", streaming=streaming)) == rows


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["image", "images", "audio", "video"])
@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv"])
def test_images_beside_the_text_are_refused_by_name(folder, name, column, streaming):
    write(name, [{"prompt": "What is this?", column: None}, {"prompt": "And this?", column: "photo.png"}])
    with pytest.raises(InputError, match=f"a column '{column}', and only text is read here"):
        load_split(name, streaming=streaming)


def test_a_column_of_images_is_refused_whatever_its_name(folder):
    data = Dataset.from_dict({"prompt": ["What?"], "photo": [None]})
    data.cast_column("photo", datasets.Image()).to_parquet("f.parquet")
    with pytest.raises(InputError, match="a column 'photo'"):
        load_split("f.parquet")


def test_a_column_without_an_image_is_none(folder):
    write("f.jsonl", [{"prompt": "a", "image": None, "images": []}])
    assert len(load_split("f.jsonl")) == 1


# --- prompts kept out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [None, 1, 2, 3])
def test_no_prompt_is_trained_on_and_kept_out(samples):
    data = Dataset.from_list(
        [{"prompt": f"The {name} sat.", "n": n} for n in range(6) for name in ("cat", "dog", "fox", "owl")]
    )
    train, heldout = split_heldout(data, samples, seed=1)
    assert len(heldout) == len(set(heldout["prompt"])) == (samples or 1)
    assert not set(train["prompt"]) & set(heldout["prompt"])
    assert len(train) == 24 - 6 * len(heldout)  # every row of a prompt, or none
    again = split_heldout(data, samples, seed=1)
    assert [train.to_list(), heldout.to_list()] == [one.to_list() for one in again]


def test_without_duplicates_the_rows_are_drawn_as_ever():
    data = Dataset.from_list([{"prompt": f"Row {index}"} for index in range(30)])
    parts = data.train_test_split(test_size=6, seed=7)
    assert [list(one["prompt"]) for one in split_heldout(data, None, 7)] == [parts[name]["prompt"] for name in parts]


def test_too_few_different_prompts_are_refused():
    with pytest.raises(InputError, match="24 rows, and 4 different prompts: too few to keep --heldout_samples 4 out"):
        split_heldout(Dataset.from_dict({"prompt": list("abcd") * 6}), 4, 0)


def test_prompts_are_the_same_if_the_policy_reads_the_same():
    said = prompt_key([{"role": "user", "content": "Tell."}])
    assert said == prompt_key([{"role": "user", "content": [{"type": "text", "text": "Tell. "}], "tool_calls": None}])
    assert said != prompt_key([{"role": "system", "content": "Tell."}]) != prompt_key("Tell.") != prompt_key("Tell. ")
