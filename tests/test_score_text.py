"""`multi_level_ppl_trl.py` as a script: the tables, the JSON, the page it writes, and what it refuses."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import brute_force
import peft
import pytest
import torch
import toys
from transformers.utils import logging as transformers_logging
from waiting import PATIENCE

import multi_level_ppl_trl
from mlppl.config import LEVELS
from mlppl.models import load_model
from mlppl.scoring.calculator import MultiLevelPPLCalculator
from multi_level_ppl_trl import main

EXAMPLES = Path(__file__).parent.parent / "rl_training" / "examples"
TEXT = 'Mr. Brown said: "Come in!" The fox, who was [very] hungry, ran home.\nThe end — 中文 😀'


def run(*flags: str) -> subprocess.CompletedProcess:
    """The script as a user runs it, in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "multi_level_ppl_trl.py", *flags],
        cwd=EXAMPLES, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small random Llama with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    toys.llama().save_pretrained(path)
    toys.byte_level().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def no_progress_bars():
    """As in a process of its own, where the script turns them off before transformers is imported."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture
def scored(folder, capsys):
    """Runs the script on that model and returns the object it prints."""

    def score(*flags: str) -> dict:
        assert main(["--model_name", str(folder), "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    return score


def refused(capsys, *flags: str) -> str:
    """The one line on stderr with which the script refuses."""
    assert main(list(flags)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


# --- as a user runs it -----------------------------------------------------------------------------------------------


def test_with_nothing_but_a_text_the_embedded_model_scores_it(tmp_path):
    done = run("--text", TEXT, "--json", "--html", str(tmp_path / "page.html"))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    found = json.loads(done.stdout)
    model, tokenizer, _ = load_model("tiny-stories")
    expected = brute_force.all_levels(model, tokenizer, TEXT)
    assert {level: found[level]["perplexity"] for level in expected} == pytest.approx(expected, rel=1e-4)
    assert found["text"] == TEXT and found["model"] == "tiny-stories"
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, options",
    [
        ([], {}),
        (["--aggregation", "nested"], {"aggregation": "nested"}),
        (["--max_phrase_words", "2", "--language", "de"], {"max_phrase_words": 2, "language": "de"}),
        (["--context", "Tell me a story. "], {"context": "Tell me a story. "}),
    ],
)
def test_json_holds_the_levels_of_brute_force(scored, folder, flags, options):
    found = scored("--text", TEXT, *flags)
    model, tokenizer, _ = load_model(str(folder))
    expected = brute_force.all_levels(model, tokenizer, TEXT, **options)
    for level in ("word", "phrase", "sentence"):
        assert found[level]["perplexity"] == pytest.approx(expected[level], rel=1e-4), level
    context = options.pop("context", "")
    calculator = MultiLevelPPLCalculator(tokenizer, **options)
    computed = calculator.compute_all_levels(model=model, texts=TEXT, contexts=context)
    assert {level: found[level]["perplexity"] for level in computed} == pytest.approx(computed, rel=1e-12)
    assert found["context"] == context and found["definitions"] == calculator.definitions


@pytest.mark.parametrize("levels", [["sentence"], ["phrase", "sentence"]])
def test_any_choice_of_levels_counts_all_tokens(levels, scored, folder, capsys):
    whole, found = scored("--text", TEXT), scored("--text", TEXT, "--levels", *levels)
    assert [level for level in ("word", "phrase", "sentence") if level in found] == levels
    assert all(found[name] == whole[name] for name in ("n_tokens", "surprisal", *levels))
    assert main(["--model_name", str(folder), "--text", TEXT, "--levels", *levels]) == 0
    assert "word" not in capsys.readouterr().out.split()


def test_json_units_are_the_texts_own_and_add_up(scored):
    found = scored("--text", TEXT)
    for level in ("word", "phrase", "sentence"):
        units = found[level]["units"]
        assert "".join(unit["text"] for unit in units) == TEXT
        assert all(TEXT[unit["start"] : unit["end"]] == unit["text"] for unit in units)
        assert sum(unit["n_tokens"] for unit in units) == found["n_tokens"]
        assert sum(unit["surprisal"] for unit in units) == pytest.approx(found["surprisal"], rel=1e-12)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tmp_path, capsys):
    toys.uniform().save_pretrained(tmp_path)
    toys.byte_level().save_pretrained(tmp_path)
    assert main(["--model_name", str(tmp_path), "--text", TEXT]) == 0
    assert capsys.readouterr().out.count(f"{toys.VOCABULARY}.0000") == 3


# --- many texts, and adapters ----------------------------------------------------------------------------------------


def test_a_file_of_many_texts_has_a_line_for_each_with_the_numbers_of_the_text_alone(folder, scored, tmp_path, capsys):
    rows = [{"text": TEXT}, {"prompt": "The fox", "completion": " ran [home]."}, {"text": ""}, {"reference": "A\nB."}]
    (tmp_path / "x.jsonl").write_text("\ufeff" + "\r\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    many = ["--model_name", str(folder), "--file", str(tmp_path / "x.jsonl"), "--context", "Once "]
    expected = [
        scored("--text", TEXT, "--context", "Once "), scored("--text", " ran [home].", "--context", "The fox"),
        None, scored("--text", "A\nB.", "--context", "Once "),
    ]  # fmt: skip
    assert main(many) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2] == "word –, phrase –, sentence –: "
    for line, one, shown in zip(lines, expected, [TEXT.replace("\n", " "), "ran [home].", "", "A B."], strict=True):
        assert shown in line
        if one:
            told = dict(part.split() for part in line.partition(": ")[0].split(", "))
            assert {level: float(value.replace(",", "")) for level, value in told.items()} == pytest.approx(
                {level: one[level]["perplexity"] for level in told}, rel=1e-4
            )
    assert main([*many, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["text"] for one in found] == [TEXT, " ran [home].", "", "A\nB."]
    assert found[2]["word"] == {"perplexity": None, "units": []}
    assert [one for one in found if one["text"]] == [one for one in expected if one]


def test_what_is_wrong_with_a_file_of_many_texts_is_told_with_its_line(capsys, tmp_path):
    path = tmp_path / "x.jsonl"
    for content, words in (
        ('{"text": "A fox."}\n{', "line 2: "), ('{"text": 3}', "line 1: "), ('["A fox."]', "expected an object"),
        ('{"story": "A fox."}', "a string text (or completion, or reference)"), ("\n", "holds no line"),
        ('{"text": "\\ud83d"}', "not UTF-8"),
    ):  # fmt: skip
        path.write_text(content)
        assert words in refused(capsys, "--file", str(path))
    path.write_text('{"text": "A fox."}')
    assert "--html shows one text" in refused(capsys, "--file", str(path), "--html", str(tmp_path / "page.html"))


def test_an_adapter_scores_when_it_is_on_and_its_base_when_it_is_off(folder, tmp_path, scored, capsys):
    model, tokenizer, _ = load_model(str(folder))
    options = {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
    trained = peft.get_peft_model(model, peft.LoraConfig(**options))
    trained.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    merged = trained.merge_and_unload()
    flags = ["--model_name", str(tmp_path), "--text", TEXT, "--json"]
    levels = ("word", "phrase", "sentence")
    base = scored("--text", TEXT)
    for adapter, expected in (
        ("on", brute_force.all_levels(merged, tokenizer, TEXT)),
        ("off", {level: base[level]["perplexity"] for level in levels}),
        (None, {level: base[level]["perplexity"] for level in levels}),
    ):
        assert main([*flags, *(["--adapter", adapter] if adapter else [])]) == 0
        captured = capsys.readouterr()
        found = json.loads(captured.out)
        assert {level: found[level]["perplexity"] for level in levels} == pytest.approx(expected, rel=1e-4)
        assert ("it is off" in captured.err and "--adapter on" in captured.err) == (adapter is None)
        assert found.get("adapter") == adapter
    assert brute_force.all_levels(merged, tokenizer, TEXT)["word"] != pytest.approx(
        base["word"]["perplexity"], rel=1e-2
    )
    assert "is no adapter" in refused(capsys, "--text", TEXT, "--model_name", str(folder), "--adapter", "on")


# --- tables ----------------------------------------------------------------------------------------------------------


def test_the_table_gives_perplexity_units_and_tokens_of_each_level(folder, scored, capsys):
    expected = scored("--text", TEXT)
    assert main(["--model_name", str(folder), "--text", TEXT]) == 0
    lines = capsys.readouterr().out.split("Most surprising units")[0].replace(",", "").splitlines()
    rows = {cells[0]: cells[1:] for cells in map(str.split, lines) if len(cells) == 4}
    for level, units in {"word": 17, "phrase": 9, "sentence": 3}.items():
        assert rows[level] == [f"{expected[level]['perplexity']:.4f}", str(units), str(expected["n_tokens"])]


def test_the_table_lists_the_five_most_surprising_units_of_each_level(folder, scored, capsys):
    text = "One two three four five six seven. Eight nine ten. Eleven! Twelve, thirteen. Fourteen. Fifteen."
    units = scored("--text", text)
    assert main(["--model_name", str(folder), "--text", text]) == 0
    rows = [line.split() for line in capsys.readouterr().out.split("Most surprising units")[1].splitlines()]
    found = [row[:-2] for row in rows if len(row) >= 3]
    expected = []
    for level in ("word", "phrase", "sentence"):
        best = sorted(units[level]["units"], key=lambda unit: -unit["perplexity"])[:5]
        expected += [unit["text"].split() for unit in best]
        expected[-len(best)].insert(0, level)
    assert found == expected and len(found) == 15


def test_nested_levels_are_in_nats_and_never_a_perplexity(folder, scored, tmp_path, capsys):
    nested = ["--aggregation", "nested", "--context", "The fox. "]
    expected = {level: math.log(scored("--text", TEXT, *nested)[level]["perplexity"]) for level in LEVELS}
    names = ["words in their phrase", "helped by phrases", "helped by sentences and context"]
    page = tmp_path / "page.html"
    assert main(["--model_name", str(folder), "--text", TEXT, *nested, "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    for name, value in zip(names, expected.values(), strict=True):
        assert re.search(rf"{name} +{value:,.4f} ", printed), name
        assert f"nats a token, {name}" in page.read_text()
    assert "Perplexity" not in printed and printed.count("Nats a token") == 2
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": TEXT}))
    assert main(["--model_name", str(folder), "--file", str(tmp_path / "x.jsonl"), *nested]) == 0
    told = ", ".join(f"{name} {value:,.4f}" for name, value in zip(names, expected.values(), strict=True))
    assert capsys.readouterr().out.startswith(f"{told}: ")


def test_brackets_and_control_characters_are_shown_and_do_nothing(folder, capsys):
    assert main(["--model_name", str(folder), "--text", "[bold]red[/bold] \x1b[31mfox\x07"]) == 0
    shown = capsys.readouterr().out
    assert "[bold]" in shown and "�[31mfox�" in shown
    assert "\x1b" not in shown and "\x07" not in shown


# --- input -----------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_stands_but_for_a_byte_order_mark(scored, tmp_path):
    """The same characters in a data set have the same number."""
    path, text = tmp_path / "story.txt", "One — two.\r\nThree.\rFour.\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert scored("--file", str(path)) == scored("--text", text)
    assert scored("--file", str(path))["text"] == text


def test_what_is_wrong_with_the_input_is_said_in_one_line(capsys, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "blank.txt").write_text(" \n\t")
    at = str(tmp_path)
    assert "--text TEXT or with --file FILE" in refused(capsys)
    assert "one of the two" in refused(capsys, "--text", "a", "--file", f"{at}/blank.txt")
    assert "--text is blank" in refused(capsys, "--text", " \n")
    assert "--text is blank" in refused(capsys, "--text", "")
    assert "blank.txt is blank" in refused(capsys, "--file", f"{at}/blank.txt")
    assert "No such file" in refused(capsys, "--file", f"{at}/none.txt")
    assert "Is a directory" in refused(capsys, "--file", at)
    assert "latin1.txt is not UTF-8 at byte 3" in refused(capsys, "--file", f"{at}/latin1.txt")
    assert "--text is not UTF-8 at character 1" in refused(capsys, "--text", "a\udcff")
    assert "--context is not UTF-8 at character 0" in refused(capsys, "--text", "a", "--context", "\udcff")


def test_where_no_page_can_be_written_it_says_so_before_a_model_is_loaded(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("mlppl.models.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    at = str(tmp_path)
    assert "does not exist" in refused(capsys, "--text", "a", "--html", f"{at}/none/page.html")
    assert f"{at} is a folder" in refused(capsys, "--text", "a", "--html", at)
    assert "is not a file" in refused(capsys, "--text", "a", "--html", os.devnull)
    assert "'' is not a file" in refused(capsys, "--text", "a", "--html", "")
    assert "cannot write in /proc" in refused(capsys, "--text", "a", "--html", "/proc/page.html")


def test_an_unknown_model_is_refused(capsys, tmp_path):
    assert "does not exist" in refused(capsys, "--text", "a", "--model_name", str(tmp_path / "none"))
    assert "is no model" in refused(capsys, "--text", "a", "--model_name", str(tmp_path))
    assert "cannot load model 'no/such'" in refused(capsys, "--text", "a", "--model_name", "no/such")


def test_a_text_without_a_token_that_can_be_scored_is_refused(capsys, tmp_path, scored):
    toys.llama().save_pretrained(tmp_path)
    toys.byte_level(bos=False).save_pretrained(tmp_path)
    assert "no token of 'F' can be scored" in refused(capsys, "--text", "F", "--model_name", str(tmp_path))
    assert main(["--model_name", str(tmp_path), "--text", "F", "--context", "A"]) == 0
    capsys.readouterr()
    assert scored("--text", "F")["n_tokens"] == 1


def test_a_model_whose_logits_are_nan_is_refused(capsys, tmp_path):
    model = toys.llama()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    model.save_pretrained(tmp_path)
    toys.byte_level().save_pretrained(tmp_path)
    assert "--dtype float32" in refused(capsys, "--text", "fox", "--model_name", str(tmp_path))


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_replaces_the_old_one_only_when_it_is_whole(folder, capsys, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("old")
    link = tmp_path / "link.html"
    link.symlink_to(page)
    flags = ["--model_name", str(folder), "--text", "A fox.", "--html", str(link)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert "No space left" in refused(capsys, *flags)
        assert page.read_text() == "old"
    assert main(flags) == 0
    assert f"Wrote {link}" in capsys.readouterr().out
    assert link.is_symlink() and ">A fox.</span>" in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "page.html"]


# --- as a module -----------------------------------------------------------------------------------------------------


def test_the_module_offers_calculator_and_reward():
    assert multi_level_ppl_trl.MultiLevelPPLCalculator is MultiLevelPPLCalculator
    assert multi_level_ppl_trl.MultiLevelPPLRewardFunction.__name__ == "MultiLevelPPLRewardFunction"
    assert multi_level_ppl_trl.LEVELS == ("word", "phrase", "sentence")
    with pytest.raises(AttributeError, match="no attribute 'Calculator'"):
        _ = multi_level_ppl_trl.Calculator
