"""The benchmarks run, and compare what computes the same; their times are nobody's business here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from folders import importable

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


def test_two_that_do_different_work_are_not_compared(scoring):
    assert scoring.check_equal("a peer", [1.0, 2.0001], [1.0, 2.0], tolerance=1e-3) == pytest.approx(5e-5)
    with pytest.raises(RuntimeError, match=r"a peer differs by 1\.0e-01"):
        scoring.check_equal("a peer", [1.0, 2.2], [1.0, 2.0], tolerance=1e-3)


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_at_toy_size_without_one():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "--toy", "--rounds", "1"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "its numbers mean nothing" in done.stdout
    table = {}
    for line in done.stdout.splitlines():
        if line.startswith("| "):
            name, measured, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            table[name] = measured
    for model in ("GPT-2 toy", "Llama toy"):
        assert float(table[f"{model}, bf16: mean deviation"].removesuffix("%")) < 0.5
        assert float(table[f"{model}, 4-bit: mean deviation"].removesuffix("%")) < 5
    # Both ways load the same weights, and the scorer turns what either trained off.
    assert float(table["Unsloth's perplexities against transformers': deviation"].removesuffix("%")) < 0.1
    for way in ("Unsloth", "transformers + PEFT", "Unsloth, 1 prompt, batch 1"):
        parts = [float(table[f"{way}: {part}"].removesuffix("s")) for part in ("generation", "reward", "rest")]
        assert sum(parts) == pytest.approx(float(table[f"{way}: step"].removesuffix("s")), abs=0.02)
