"""The benchmarks run, and compare what computes the same; their times are nobody's business here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from folders import importable
from warm import python

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def scoring():
    with importable(BENCHMARKS), torch.no_grad():
        import scoring

        yield scoring


@pytest.mark.parametrize("folder", [BENCHMARKS, BENCHMARKS.parent / "studies"] * 2, ids=lambda folder: folder.name)
def test_a_folders_common_is_its_own(folder):
    with importable(folder):
        import common
    assert Path(common.__file__) == folder / "common.py"


def test_this_engine_and_the_usual_loop_find_the_same_and_are_compared(scoring, gpt2_model, tokenizer):
    title, *rows = scoring.mixed_texts(gpt2_model, tokenizer, [text * 9 for text in toys.SENTENCES], rounds=1)
    tokens = sum(len(tokenizer(text * 9)["input_ids"]) for text in toys.SENTENCES)
    assert title == [f"[bold]{len(toys.SENTENCES)} texts of 20 to 700 tokens, {tokens} in all"]
    ratios = {name: float(ratio) for name, _, ratio, *_ in rows if ratio}
    assert set(ratios) >= {"this engine, from text to perplexities", "pad-and-cross-entropy loop"}
    assert min(ratios.values()) > 0
    assert [limit for *_, limit in rows].count("the bare limit") == 1


def test_nested_levels_are_timed_against_geometric_ones(scoring, gpt2_model, tokenizer, monkeypatch):
    for name, value in {"PROMPT": 40, "COMPLETION": 24, "GROUP": 3}.items():
        monkeypatch.setattr(scoring, name, value)
    title, *rows = scoring.nested_levels(gpt2_model, tokenizer, toys.SENTENCES, rounds=1, seed=0)
    assert title == ["[bold]nested levels"] and len(rows) == 6
    judged = {name: (float(times), bound) for name, _, times, bound, of in rows if of == "geometric's time"}
    group = "3 completions of 24 tokens behind a prompt of 40: nested"
    assert set(judged) == {group, "mixed texts without a prompt: nested"}
    assert judged[group][1].startswith("<= 2.00") and min(times for times, _ in judged.values()) > 0


def test_two_that_do_different_work_are_not_compared(scoring):
    assert scoring.check_equal("a peer", [1.0, 2.0001], [1.0, 2.0], tolerance=1e-3) == pytest.approx(5e-5)
    with pytest.raises(RuntimeError, match=r"a peer differs by 1\.0e-01"):
        scoring.check_equal("a peer", [1.0, 2.2], [1.0, 2.0], tolerance=1e-3)


@pytest.fixture(scope="module")
def toy_rows(tmp_path_factory):
    """What `benchmarks/gpu.py --toy` writes: its dry run, all parts."""
    out = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        [python(), BENCHMARKS / "gpu.py", "--toy", "--seconds", "100000", "--out", out],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0]["note"] == "toy models: no number means anything"
    for row in rows:  # each was printed when it was measured, and once more in the table
        assert done.stdout.count(row["what"]) >= 2
    assert (out / "table.md").read_text(encoding="utf-8").strip() in done.stdout
    return {row["what"]: row for row in rows}


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_measures_every_part_at_toy_size(toy_rows):
    for model in ("GPT-2 toy", "Llama toy"):
        for dtype in ("bf16", "4-bit"):
            group = f"{model}, {dtype}: 4 x 16 tokens behind the same 256"
            assert toy_rows[f"{group}: mean difference of a token's surprisal"]["value"] < 0.01
            assert toy_rows[f"{group}, nested"]["ratio"] > 0.5
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype, percent in (("float32", 1e-3), ("bf16", 0.2), ("4-bit", 1)):
        what = f"embedded model, {dtype} on {device}, against float32 on a CPU: mean deviation of a perplexity"
        assert toy_rows[what]["value"] < percent
    for way in ("GRPO with Unsloth", "GRPO with transformers + PEFT", "GRPO with Unsloth, batch 1"):
        parts = [toy_rows[f"{way}: {part}"]["value"] for part in ("generation", "reward", "rest")]
        assert sum(parts) == pytest.approx(toy_rows[f"{way}: step"]["value"])
        assert toy_rows[f"{way}: the reward alone, nested"]["value"] > 0
    # Both ways load the same weights, and the scorer turns what either trained off.
    assert toy_rows["Unsloth's perplexity of a text against transformers': deviation"]["value"] < 0.1
    scripts = [row for row in toy_rows.values() if row["part"] == "scripts"]
    assert len(scripts) == 6
    assert not [row["note"] for row in scripts if "failed" in row["note"]]


@pytest.fixture
def gpu():
    with importable(BENCHMARKS):
        import gpu

        yield gpu


def test_a_part_that_fails_or_has_no_time_is_a_row_and_the_others_go_on(gpu, tmp_path, capsys):
    fails = [sys.executable, "-c", "print('one'); raise ValueError('a bad day')"]
    assert gpu.run_for(100_000, fails) == "failed: ValueError: a bad day"
    forever = [sys.executable, "-c", "import time; time.sleep(100_000)"]
    assert gpu.run_for(2, forever) == "stopped: no time was left after 2 s of it"
    assert gpu.run_for(0.5, forever) == "no time was left"
    assert gpu.run_for(100_000, [sys.executable, "-c", ""]) is None

    assert gpu.main(["--toy", "--only", "train", "--seconds", "0", "--out", str(tmp_path)]) == 0
    _machine, scripts = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert (scripts["part"], scripts["note"]) == ("scripts", "no time was left")


def test_a_row_is_judged_by_its_ratio_else_by_its_value(tmp_path):
    with importable(BENCHMARKS):
        from common import Rows, markdown
    rows = Rows(tmp_path / "rows.jsonl", "a part")
    rows.add("speed", 12345.6, "tokens/s", 0.4, 0.5, of="the matrix rate")
    rows.add("memory", 7.64, "GB", None, 10, least=False)
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["met"] for row in found] == [False, True]
    assert markdown("Title", found).splitlines()[4:] == [
        "| speed | 12,346 tokens/s | 0.4 | >= 0.5 **missed** | the matrix rate |",
        "| memory | 7.64 GB |  | <= 10 |  |",
    ]
