"""compute_baselines_trl.py: its numbers, and that no crash, rerun or second process changes them."""

import functools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import brute_force
import numpy as np
import pytest
import stub_baselines
import torch
import toys
import warm
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer
from waiting import wait_for

import compute_baselines_trl
from mlppl.baselines import job as baseline_run
from mlppl.baselines import parts
from mlppl.baselines.file import SUFFIXES, Baselines, check_meta, read_meta
from mlppl.baselines.job import plot_levels
from mlppl.config import LEVELS
from mlppl.data import Columns, PromptForm, load_split, prepare_rows, stable_id
from mlppl.errors import BaselineError, InputError

SCRIPT = Path(compute_baselines_trl.__file__)
STUB = Path(stub_baselines.__file__)

ROWS = [
    {"prompt": "Once upon a time", "completion": " there was a small fox, and it lived near the old mill."},
    {"prompt": "The fox said: ", "completion": '"I am hungry; I want to eat!" But the crow only laughed.\nThe end.'},
    {"prompt": "blank", "completion": " \n"},
    {"prompt": "", "completion": "They walked home together, slowly, under the stars."},
    {"prompt": "empty", "completion": None},
    {"prompt": "Mr. Brown paid 1,000 dollars.", "completion": " 中文。😀 It was far too much, wasn't it?"},
    {"prompt": "long", "completion": " They walked home together." * 60},
    {"prompt": "Once upon a time", "completion": " there was a small fox, and it lived near the old mill."},
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with a random Llama of a window of 200 tokens, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    toys.llama(max_position_embeddings=200).save_pretrained(folder)
    toys.byte_level(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With the other core at work, a tiny model's threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_rows(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(*flags):
    return compute_baselines_trl.main([str(flag) for flag in flags])


def stub(*flags, pause=0.0):
    return stub_baselines.main([str(pause), *map(str, flags)])


def many_rows(count=300):
    """Of some hundred characters each: `count` / 50 windows where windows have 5,000."""
    draw = random.Random(0)

    def text(length):
        return " ".join(draw.choices(["fox", "bird", "tree", "an", "old", "river", "saw", "by"], k=length))

    return [{"id": f"row {n}", "prompt": text(5), "reference": text(20)} for n in range(count)]


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_numbers_are_those_of_the_brute_force(toy, suffix):
    write_rows("rows.jsonl", ROWS)
    assert run("--model_name", toy, "--dataset_name", "rows.jsonl", "--output_path", f"b{suffix}") == 0
    found = Baselines.load(f"b{suffix}")
    kept = [row for row in ROWS[:-1] if (row["completion"] or "").strip()]
    assert list(found) == [stable_id(row["prompt"], row["completion"]) for row in kept]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy).eval(), AutoTokenizer.from_pretrained(toy)
    for row in kept:
        expected = brute_force.all_levels(model, tokenizer, row["completion"], row["prompt"], window=200)
        assert found[stable_id(row["prompt"], row["completion"])] == pytest.approx(list(expected.values()), rel=1e-4)
    assert found.meta["counts"] == {
        **{"baselines": 5, "rows": 8, "blank": 2, "unscored": 0, "duplicates": 1},
        "tokens": found.meta["counts"]["tokens"],
    }
    assert found.meta["dataset"]["columns"] == {"prompt": "prompt", "reference": "completion", "id": None}
    assert not Path(f"b{suffix}.parts").exists()


def test_the_pickle_is_a_plain_dict(toy):
    write_rows("rows.jsonl", ROWS)
    assert run("--model_name", toy, "--dataset_name", "rows.jsonl", "--batch_size", 1) == 0
    with open("baselines.pkl", "rb") as file:
        records = pickle.load(file)
    record = records[stable_id(ROWS[0]["prompt"], ROWS[0]["completion"])]
    assert {name: type(value) for name, value in record.items()} == {
        **dict.fromkeys(LEVELS, float), "n_tokens": int, "prompt_id": str, "prompt_start": str, "reference_id": str
    }  # fmt: skip
    assert record["prompt_id"] == stable_id("Once upon a time")
    assert record["prompt_start"] == "Once upon a time"
    assert record["reference_id"] == stable_id(ROWS[0]["completion"])


def test_the_reward_takes_the_file_of_its_own_model_and_no_other(toy):
    from mlppl.reward.function import MultiLevelPPLRewardFunction

    write_rows("rows.jsonl", ROWS)
    assert run("--model_name", toy, "--dataset_name", "rows.jsonl", "--output_path", "b.json") == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy), AutoTokenizer.from_pretrained(toy)
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, "b.json")
    ids = [stable_id(row["prompt"], row["completion"]) for row in ROWS[:2]]
    _, details = reward_fn.compute_rewards(
        [row["completion"] for row in ROWS[:2]], [row["prompt"] for row in ROWS[:2]], ids=ids, return_details=True
    )
    assert details["improvements"]["avg"].tolist() == pytest.approx([0, 0], abs=1e-3)
    with pytest.raises(BaselineError, match="target completion"):
        MultiLevelPPLRewardFunction(model, tokenizer, "b.json", target="reference")
    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(BaselineError, match="weights"):
        MultiLevelPPLRewardFunction(model, tokenizer, "b.json")


def test_chat_messages_and_a_text_without_reference(toy):
    chat = [{"role": "user", "content": "Tell me of the fox."}]
    answer = [{"role": "assistant", "content": "The fox was small."}]
    write_rows("chat.jsonl", [{"prompt": chat, "completion": answer, "id": 7}])
    assert run("--model_name", toy, "--dataset_name", "chat.jsonl", "--output_path", "chat.pkl") == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy).eval(), AutoTokenizer.from_pretrained(toy)
    context = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = brute_force.all_levels(model, tokenizer, "The fox was small.", context, window=200)
    assert Baselines.load("chat.pkl")[7] == pytest.approx(list(expected.values()), rel=1e-4)

    write_rows("text.jsonl", [{"text": "The fox was small."}])
    assert run("--model_name", toy, "--dataset_name", "text.jsonl", "--output_path", "text.pkl") == 0
    expected = brute_force.all_levels(model, tokenizer, "The fox was small.", window=200)
    found = Baselines.load("text.pkl").find(None, "The fox was small.")
    assert found == pytest.approx(list(expected.values()), rel=1e-4)


def test_prompts_are_made_as_in_training(toy):
    """Sentences, a template and the chat template: text, ids and what the meta file says of them."""
    texts = ["The fox was small. It ran home. The end.", "Once upon a time. There was a fox.", "One sentence only."]
    write_rows("rows.jsonl", [{"text": text} for text in texts])
    flags = ["--prompt_sentences", 1, "--prompt_template", "Go on: {prompt}", "--chat", "--system_prompt", "You write."]
    assert run("--model_name", toy, "--dataset_name", "rows.jsonl", *flags, "--output_path", "b.pkl") == 0
    form = PromptForm("Go on: {prompt}", True, "You write.", 1)
    rows = prepare_rows(load_split("rows.jsonl"), Columns("text", None, None), form)
    found = Baselines.load("b.pkl")
    assert list(found) == list(rows["id"]) and len(rows) == 2
    found.check_coverage(rows["id"], rows["prompt"], rows["reference"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy).eval(), AutoTokenizer.from_pretrained(toy)
    messages = [{"role": "system", "content": "You write."}, {"role": "user", "content": "Go on: The fox was small."}]
    context = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = brute_force.all_levels(model, tokenizer, " It ran home. The end.", context, window=200)
    assert found[rows["id"][0]] == pytest.approx(list(expected.values()), rel=1e-4)
    assert {**form.identity, "chat_template_kwargs": {}}.items() <= found.meta["prompt"].items()

    # Or the prompt has begun the answer.
    flags = ["--prompt_sentences", 1, "--chat", "--user_prompt", "A story?"]
    assert run("--model_name", toy, "--dataset_name", "rows.jsonl", *flags, "--output_path", "begun.pkl") == 0
    messages = [{"role": "user", "content": "A story?"}, {"role": "assistant", "content": "The fox was small."}]
    context = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    expected = brute_force.all_levels(model, tokenizer, " It ran home. The end.", context, window=200)
    form = PromptForm(chat=True, prompt_sentences=1, user_prompt="A story?")
    rows = prepare_rows(load_split("rows.jsonl"), Columns("text", None, None), form)
    assert Baselines.load("begun.pkl")[rows["id"][0]] == pytest.approx(list(expected.values()), rel=1e-4)

    # The prompts of strings go through no template.
    assert run("--model_name", toy, "--dataset_name", "rows.jsonl", "--output_path", "text.pkl") == 0
    assert Baselines.load("text.pkl").meta["prompt"] == PromptForm().identity


def test_several_messages_as_reference(toy):
    chat = [{"role": "user", "content": "Tell me of the fox."}]
    asked = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
    said = [asked, {"role": "tool", "content": "It is red."}, {"role": "assistant", "content": "The fox was red."}]
    Path("template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content or 'CALLS' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ mark }}{% endif %}"
    )
    write_rows("chat.jsonl", [{"prompt": chat, "completion": said, "id": 7}])
    flags = ["--chat_template_path", "template.jinja", "--chat_template_kwargs", '{"mark": "!"}']
    assert run("--model_name", toy, "--dataset_name", "chat.jsonl", "--output_path", "chat.pkl", *flags) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy).eval(), AutoTokenizer.from_pretrained(toy)
    context = "<|user|>Tell me of the fox.<|assistant|>CALLS<|tool|>It is red.<|assistant|>!"
    expected = brute_force.all_levels(model, tokenizer, "The fox was red.", context, window=200)
    assert Baselines.load("chat.pkl")[7] == pytest.approx(list(expected.values()), rel=1e-4)


def test_the_commands_of_the_guide(toy, capsys):
    """As written there, with a toy in folders of the names of the models and data sets."""
    for name in ("gpt2", "unsloth/llama-3-8b-bnb-4bit"):
        shutil.copytree(toy, name)
    stories = load_split("tiny-stories")
    lines = ["", " = Title = \n", "", *(f" {row['prompt']}{row['completion']} \n" for row in stories.select(range(9)))]
    write_rows("Salesforce/wikitext/wikitext-2-raw-v1/test.jsonl", [{"text": line} for line in lines])
    write_rows("Salesforce/wikitext/wikitext-103-raw-v1/test.jsonl", [{"text": "another one"}])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test.jsonl\n"
        for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    )
    Path("Salesforce/wikitext/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    Path("dataset").mkdir()
    stories.select(range(3)).to_json("dataset/train.json")
    shutil.copytree("dataset", "your/dataset")

    guide = """
    python compute_baselines_trl.py --model_name gpt2 --dataset_name wikitext --dataset_split test
        --output_path baselines_wiki.pkl --num_samples 1000 --batch_size 4
    python compute_baselines_trl.py --model_name gpt2 --dataset_name ./dataset --dataset_split train
        --output_path baselines_custom.pkl --num_samples 5000
    python compute_baselines_trl.py --model_name unsloth/llama-3-8b-bnb-4bit --dataset_name your/dataset
        --output_path baselines_llama3.pkl --num_samples 10000 --batch_size 8
    """
    for command in guide.split("python compute_baselines_trl.py")[1:]:
        assert run(*command.split()) == 0
    assert len(Baselines.load("baselines_wiki.pkl")) == 10
    assert Baselines.load("baselines_wiki.pkl").meta["counts"]["blank"] == 2
    assert len(Baselines.load("baselines_custom.pkl")) == len(Baselines.load("baselines_llama3.pkl")) == 3
    output = capsys.readouterr().out
    assert "10 baselines of 12 rows" in output and "left out: 2 blank" in output
    for word in (*LEVELS, "mean", "median", "min", "max", "tokens/s", "baselines_wiki.pkl.meta.json"):
        assert word in output

    # A data set of several configurations lists them.
    assert run("--dataset_name", "Salesforce/wikitext", "--output_path", "other.pkl") == 2
    assert "['wikitext-103-raw-v1', 'wikitext-2-raw-v1']" in capsys.readouterr().err


# --- files -----------------------------------------------------------------------------------------------------------


def test_num_samples_counts_rows_with_text():
    rows = many_rows(20)
    rows[1]["reference"] = ""
    write_rows("rows.jsonl", rows)
    for extra in ([], ["--streaming"]):
        assert stub("--dataset_name", "rows.jsonl", "--num_samples", 3, "--overwrite", *extra) == 0
        assert list(Baselines.load("baselines.pkl")) == ["row 0", "row 2", "row 3"]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_output_dataset_is_one_that_the_reward_uses_as_it_is(streaming, capsys):
    from mlppl.reward.function import row_baselines

    stale = {"baseline_word": 0.5}  # of an earlier time
    rows = [{"prompt": f"{n}", "completion": "Text.", **stale, "kept": n} for n in range(1500)]
    write_rows("data/train.jsonl", rows)
    write_rows("data/test.jsonl", [{**row, **stale, "kept": 0} for row in ROWS])
    for split in ("train", "test"):
        flags = ["--dataset_name", "data", "--dataset_split", split, "--output_dataset", "with_baselines", *streaming]
        assert stub(*flags, "--output_path", f"{split}.pkl") == 0
    train, test = (load_split("with_baselines", None, split) for split in ("train", "test"))
    assert test.column_names == ["prompt", "completion", "kept", *(f"baseline_{level}" for level in LEVELS)]
    assert list(test["prompt"]) == [row["prompt"] for row in ROWS if (row["completion"] or "").strip()]
    baselines = Baselines.load("test.pkl")
    for row, levels in zip(test, row_baselines(test.to_dict(), LEVELS), strict=True):
        assert list(levels.values()) == baselines[stable_id(row["prompt"], row["completion"])].tolist()
    assert list(train["kept"]) == list(range(1500)) and len(Baselines.load("train.pkl")) == 1500
    meta = read_meta("with_baselines/.baselines")
    assert meta["target"] == "completion" and meta["model"]["weights"] == "stub"

    # Another model's baselines in the other split would look like the same data set.
    Path("with_baselines/data/test-00000-of-00001.parquet").unlink()
    assert stub(*flags, "--output_path", "other.pkl", "--max_phrase_words", 7) == 2
    assert (
        "--output_dataset with_baselines was made with other settings (max_phrase_words 4, now 7)"
        in capsys.readouterr().err
    )
    assert not Path("other.pkl.parts").exists()


def test_plot(toy, tmp_path):
    write_rows("rows.jsonl", many_rows(30))
    assert stub("--dataset_name", "rows.jsonl", "--plot", "levels.png") == 0
    assert Path("levels.png").read_bytes().startswith(b"\x89PNG") and Path("levels.png").stat().st_size > 10_000
    for name, values in {"equal.svg": [3.0, 3.0], "one.pdf": [3.0], "wide.png": [1.0, 10.0, 1e9]}.items():
        plot_levels(dict.fromkeys(LEVELS, values), name, "a title")
        assert Path(name).stat().st_size > 1000


def test_nested_levels_are_told_and_drawn_in_nats_on_an_axis_each(toy, capsys, monkeypatch):
    write_rows("rows.jsonl", ROWS)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: drawn.append(self) or file.write(b"a picture"))
    flags = ["--model_name", toy, "--dataset_name", "rows.jsonl", "--aggregation", "nested", "--plot", "b.png"]
    assert run(*flags, "--output_path", "b.json") == 0
    names = ["words in their phrase", "helped by phrases", "helped by sentences and prompt"]
    printed, found = capsys.readouterr().out, np.log(list(Baselines.load("b.json").values()))
    assert "Perplexity" not in printed and "Nats a token" in printed
    for name, values, axis in zip(names, found.T, drawn[0].axes, strict=True):
        cells = re.search(rf"{name} +(\S+) +(\S+) +(\S+) +(\S+)", printed).groups()
        assert list(map(float, cells)) == pytest.approx(
            [f(values) for f in (np.mean, np.median, np.min, np.max)], abs=1e-4
        )
        assert axis.get_xscale() == "linear" and axis.texts[0].get_text().startswith(f"{name}\nmedian ")
        low, high = axis.get_xlim()
        assert low <= values.min() and values.max() <= high and high - low < 1.2 * np.ptp(values)
    assert drawn[0].axes[-1].get_xlabel() == "nats a token"
    write_rows("alone.jsonl", [{"text": row["prompt"] + (row["completion"] or "")} for row in ROWS])
    assert run("--model_name", toy, "--dataset_name", "alone.jsonl", "--aggregation", "nested") == 0
    printed = capsys.readouterr().out
    assert "helped by sentences " in printed and "and prompt" not in printed


def test_what_exists_is_kept_without_overwrite(capsys):
    write_rows("rows.jsonl", many_rows(5))
    for name in ("baselines.pkl", "plot.png", "folder/data/train-00000-of-00001.parquet"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("mine")
        flags = ["--dataset_name", "rows.jsonl", "--plot", "plot.png", "--output_dataset", "folder"]
        assert stub(*flags) == 2
        assert f"{name} exists: replace it with --overwrite" in capsys.readouterr().err
        assert Path(name).read_text() == "mine" and not Path("baselines.pkl.parts").exists()
        assert stub(*flags, "--overwrite") == 0
        assert Path(name).read_bytes() != b"mine"
        shutil.rmtree("folder")
        Path("baselines.pkl").unlink()
        Path("plot.png").unlink()


def test_help_is_instant():
    code = "import sys, compute_baselines_trl as c; c.parse_args([]); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent).returncode == 0


# --- stopped and gone on with ----------------------------------------------------------------------------------------


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setitem(baseline_run.WINDOW_CHARACTERS, "cpu", 5_000)


def same_records(one, other):
    one, other = Baselines.load(one), Baselines.load(other)
    assert list(one) == list(other)
    assert np.array(list(one.values())) == pytest.approx(np.array(list(other.values())), rel=1e-4)


class Crash(BaseException):
    """Stands for the end of the process: nothing catches it but `finally`."""


def test_goes_on_after_a_crash_at_any_change_of_a_file(small_windows, monkeypatch):
    """Between any two renames, removals and lines: the end of one run is not the end of the file."""
    write_rows("rows.jsonl", many_rows())
    flags = ["--dataset_name", "rows.jsonl", "--output_dataset", "folder", "--overwrite"]
    assert stub(*flags, "--output_path", "whole.pkl") == 0
    Path("b.pkl").write_bytes(Path("whole.pkl").read_bytes())  # an older file
    crashes = 0

    def dying(function, at):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise Crash
            return function(*args, **kwargs)

        return call

    while True:
        left = crashes + 1
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", dying(os.replace, left))
            patched.setattr(os, "fsync", dying(os.fsync, left))
            patched.setattr(Path, "unlink", dying(Path.unlink, left))
            patched.setattr(Path, "rmdir", dying(Path.rmdir, left))
            try:
                assert stub(*flags, "--output_path", "b.pkl") == 0
                break
            except Crash:
                crashes += 1
        if Path("b.pkl").exists():  # what is there under the name is complete, and the meta file is its own
            same_records("b.pkl", "whole.pkl")
            assert read_meta("b.pkl") == {} or read_meta("b.pkl")["counts"]["baselines"] == 300
        assert stub(*flags, "--output_path", "b.pkl") == 0
        same_records("b.pkl", "whole.pkl")
        assert read_meta("b.pkl")["counts"]["baselines"] == 300
        assert not list(Path().glob("*.parts")) and not list(Path().glob(".b.pkl*"))
        assert len(load_split("folder")) == 300
    assert crashes > 15


def test_a_rerun_scores_only_what_is_missing(small_windows, monkeypatch, capsys):
    write_rows("rows.jsonl", many_rows())
    scored = []

    def load(*rest):
        scorer = stub_baselines.load(*rest)

        def score(rows):
            if len(scored) == 4:
                scored.append(None)
                raise KeyboardInterrupt
            scored.append(rows)
            return scorer.score(rows)

        return scorer._replace(score=score)

    args = compute_baselines_trl.parse_args(["--dataset_name", "rows.jsonl"])
    assert baseline_run.compute(args, load) == 130
    assert "stopped: 4 parts are kept, the same command goes on from them" in capsys.readouterr().err
    assert not Path("baselines.pkl").exists()
    assert baseline_run.compute(args, load) == 0
    rows = [row.id for window in scored if window is not None for row in window]
    assert rows == [f"row {n}" for n in range(300)]
    assert "Going on from baselines.pkl.parts" in capsys.readouterr().err


def test_other_settings_refuse_the_parts(small_windows, monkeypatch, capsys):
    write_rows("rows.jsonl", many_rows())
    flags = ["--dataset_name", "rows.jsonl"]
    interrupt(monkeypatch, flags, after=3)
    kept = sorted(Path("baselines.pkl.parts").iterdir())
    for extra, named in [
        (["--model_name", "gpt2"], 'model_name "tiny-stories", now it is "gpt2"'),
        (["--target", "reference"], 'target "completion", now it is "reference"'),
        (["--num_samples", "50"], "num_samples null, now it is 50"),
        (["--aggregation", "nested"], "aggregation"),
        (["--dtype", "float16", "--overwrite"], "dtype"),
        (["--id_column", "prompt"], "columns"),
    ]:
        assert stub(*flags, *extra) == 2
        error = capsys.readouterr().err
        assert named in error and "delete the folder to start anew" in error
        assert sorted(Path("baselines.pkl.parts").iterdir()) == kept and not Path("baselines.pkl").exists()

    write_rows("rows.jsonl", [{**row, "reference": row["reference"] + "!"} for row in many_rows()])
    assert stub(*flags) == 2
    assert "the data set is not the one that baselines.pkl.parts was made from" in capsys.readouterr().err
    write_rows("rows.jsonl", many_rows(10))
    assert stub(*flags) == 2
    write_rows("rows.jsonl", many_rows())
    assert stub(*flags, "--batch_size", 3, "--streaming") == 0  # what changes no number may differ


def interrupt(monkeypatch, flags, after):
    left = after

    def load(*rest):
        scorer = stub_baselines.load(*rest)

        def score(rows):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return scorer.score(rows)

        return scorer._replace(score=score)

    assert baseline_run.compute(compute_baselines_trl.parse_args(flags), load) == 130


def test_damaged_and_foreign_parts_are_refused(small_windows, monkeypatch, capsys):
    write_rows("rows.jsonl", many_rows())
    flags = ["--dataset_name", "rows.jsonl"]
    interrupt(monkeypatch, flags, after=3)
    file, settings = Path("baselines.pkl.parts/windows-0.jsonl"), Path("baselines.pkl.parts/settings.json")
    whole = file.read_bytes()
    for damaged in (whole.replace(b"]]\n", b"\n", 1), b"[]\n" + whole, b"3\n" + whole):
        file.write_bytes(damaged)
        assert stub(*flags) == 2
        assert "windows-0.jsonl is damaged: delete it" in capsys.readouterr().err
    file.unlink()
    content = settings.read_text()
    settings.write_text(content[:-9])
    assert stub(*flags) == 2
    assert "settings.json cannot be read" in capsys.readouterr().err
    settings.write_text(content)
    assert stub(*flags) == 0

    Path("other.pkl.parts").mkdir()
    Path("other.pkl.parts/diary.txt").write_text("mine")
    assert stub(*flags, "--output_path", "other.pkl") == 2
    assert "holds diary.txt, which this script did not write" in capsys.readouterr().err
    assert os.listdir("other.pkl.parts") == ["diary.txt"]


def test_a_line_torn_anywhere_is_scored_again_and_no_other(small_windows, monkeypatch, capsys):
    write_rows("rows.jsonl", many_rows(20))  # a window would hold 50
    monkeypatch.setitem(baseline_run.WINDOW_CHARACTERS, "cpu", 600)
    flags = ["--dataset_name", "rows.jsonl"]
    assert stub(*flags, "--output_path", "whole.pkl") == 0
    interrupt(monkeypatch, flags, after=3)
    folder = Path("baselines.pkl.parts")
    shutil.copytree(folder, "kept")
    first, second, third = (folder / "windows-0.jsonl").read_bytes().splitlines(keepends=True)
    cuts = [0, 1, len(third) // 2, len(third) - 1]
    for torn in [third[:cut] for cut in cuts] + [bytes(5_000)]:  # zeros: room that a file system made, and no more
        shutil.copytree("kept", folder, dirs_exist_ok=True)
        (folder / "windows-0.jsonl").write_bytes(first + second + torn)
        interrupt(monkeypatch, flags, after=1)
        lines = (folder / "windows-0.jsonl").read_bytes().splitlines(keepends=True)
        assert lines == [first, second, third]
        assert stub(*flags) == 0
        same_records("baselines.pkl", "whole.pkl")
        Path("baselines.pkl").unlink()
    capsys.readouterr()


def test_parts_of_an_earlier_version_are_refused_by_name(capsys):
    write_rows("rows.jsonl", many_rows(5))
    Path("baselines.pkl.parts").mkdir()
    Path("baselines.pkl.parts/settings.json").write_text("{}")
    Path("baselines.pkl.parts/00000003.jsonl").write_text('{"rows": 1}\n')
    assert stub("--dataset_name", "rows.jsonl") == 2
    assert "00000003.jsonl is of an earlier version: finish with that one, or delete" in capsys.readouterr().err
    assert Path("baselines.pkl.parts/00000003.jsonl").exists()


def popen(*flags, pause=0.2, **options):
    command = [sys.executable, str(STUB), str(pause), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def windows_of(output):
    """How many are finished."""
    return sum(path.read_bytes().count(b"\n") for path in Path(f"{output}.parts").glob("*.jsonl"))


def test_killed_interrupted_and_gone_on_with():
    """kill -9 twice and Ctrl-C once, each when there is more to find than before; then to the end."""
    write_rows("rows.jsonl", many_rows(3000))  # 12 windows
    flags = ["--dataset_name", "rows.jsonl", "--output_path", "b.json"]
    assert stub(*flags[:2], "--output_path", "whole.json") == 0
    for sent in [signal.SIGKILL, signal.SIGKILL, signal.SIGINT]:
        before = windows_of("b.json")
        process = popen(*flags)
        wait_for(lambda before=before: windows_of("b.json") > before, process)
        process.send_signal(sent)
        _, error = process.communicate()
        assert process.returncode == (130 if sent == signal.SIGINT else -9), error
        assert not Path("b.json").exists()
    assert error.splitlines()[-1].endswith("parts are kept, the same command goes on from them")
    assert stub(*flags) == 0
    same_records("b.json", "whole.json")


def test_two_runs_at_once_and_a_full_disk():
    write_rows("rows.jsonl", many_rows(3000))
    flags = ["--dataset_name", "rows.jsonl"]
    first = popen(*flags, pause=0.4)
    wait_for(lambda: windows_of("baselines.pkl"), first)
    assert stub(*flags) == 2  # in this process, while the other is at work
    first.send_signal(signal.SIGKILL)
    first.communicate()

    # A file that may not grow: as a full disk, an error in the middle of writing.
    for limit in (50, 60_000):
        limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        full = popen(*flags, pause=0, preexec_fn=limited)
        _, error = full.communicate()
        assert full.returncode == 2 and "the same command goes on" in error, error
        assert not Path("baselines.pkl").exists()
    assert stub(*flags) == 0
    assert len(Baselines.load("baselines.pkl")) == 3000


# --- several processes -----------------------------------------------------------------------------------------------


def torchrun(count, script, *flags, python=sys.executable):
    command = [python, "-m", "torch.distributed.run", "--nproc_per_node", *map(str, (count, script, *flags))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(toy):
    flags = ["--model_name", toy, "--num_samples", 100]  # 2 windows
    assert run(*flags, "--output_path", "one.json") == 0
    process = torchrun(2, SCRIPT, *flags, "--output_path", "two.json", python=warm.python())
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert output.count("100 baselines of 100 rows") == 1
    same_records("one.json", "two.json")
    assert not Path("two.json.parts").exists()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_by_name_and_another_number_goes_on():
    write_rows("rows.jsonl", many_rows(3000))
    flags = ["--dataset_name", "rows.jsonl", "--output_path", "b.pkl"]
    process = torchrun(2, STUB, 0.5, *flags)
    wait_for(lambda: windows_of("b.pkl") > 3)
    os.kill(int(Path("b.pkl.parts/process-1").read_text().split()[-1]), signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode != 0
    assert "error: process 1 of 2 has ended (killed, perhaps for want of memory): the same command goes on" in error
    assert not Path("b.pkl").exists()
    assert stub(*flags) == 0  # alone
    assert stub("--dataset_name", "rows.jsonl", "--output_path", "whole.pkl") == 0
    same_records("b.pkl", "whole.pkl")


def test_processes_see_who_died(tmp_path):
    folder = parts.Parts(tmp_path / "b.pkl")
    folder.make()
    processes = []
    for index in range(4):
        process = parts.Processes()
        process.index, process.count = index, 4
        process.claim(folder)
        processes.append(process)
    main, finished, failed, killed = processes
    assert main.died() == ""
    finished.finish()
    failed.failed(RuntimeError("out of memory"))
    for process in (finished, failed, killed):
        process.close()
    assert main.died() == (
        "process 2 of 4 has ended (RuntimeError: out of memory); "
        "process 3 of 4 has ended (killed, perhaps for want of memory)"
    )
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(InputError, match="another run"):
        parts.Processes().claim(folder)


def test_a_machine_that_does_not_see_the_folder_is_told_to_share_one(tmp_path):
    with pytest.raises(InputError, match="in a folder that all machines share"):
        parts.Processes().claim(parts.Parts(tmp_path / "b.pkl"))


def test_meta_of_the_dataset_matches_what_the_reward_expects(toy):
    """The meta file has every key that the reward compares, under the same name."""
    from mlppl.reward.function import MultiLevelPPLRewardFunction

    write_rows("rows.jsonl", ROWS)
    assert run("--model_name", toy, "--dataset_name", "rows.jsonl", "--output_dataset", "folder") == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy), AutoTokenizer.from_pretrained(toy)
    identity = MultiLevelPPLRewardFunction(model, tokenizer).identity
    meta = read_meta("folder/.baselines")
    assert set(identity) <= set(meta) and set(identity["model"]) <= set(meta["model"])
    check_meta(Baselines({}, meta, "folder"), identity)
