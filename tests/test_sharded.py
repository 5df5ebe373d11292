"""A model whose weights are spread over two real processes (FSDP 2 on the CPU)."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import toys
import warm
from waiting import PATIENCE

from mlppl.processes import is_sharded
from mlppl.scoring.surprisal import SurprisalScorer
from mlppl.scoring.tokens import TextEncoder

HERE = Path(__file__).parent
TEXTS = [["The fox said nothing at all.", "Mr. Brown paid 1,000 dollars for a house.", "The end."], ["It was far."]]


def scored(folder, texts, before, dtype=None) -> list[dict]:
    """What each of two processes found; see score_sharded.py."""
    command = [warm.python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "score_sharded.py"), json.dumps([texts, before, dtype]), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "rl_training" / "examples")])},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


# Held-out prompts are scored before training begins, and by then weights are whole: the fastest way is a pack.
@pytest.mark.parametrize(("texts", "before"), [(TEXTS, [[], []]), ([[], TEXTS[0]], [[], []]), (TEXTS, [TEXTS[0], []])])
def test_each_process_gets_its_numbers_in_as_many_passes_as_the_other(tmp_path, texts, before):
    results = scored(tmp_path, texts, before)
    for found, own in zip(results, texts, strict=True):
        encoded = TextEncoder(toys.byte_level()).encode([""] * len(own), own)
        expected = SurprisalScorer(toys.llama()).score(encoded)
        assert len(found["surprisals"]) == len(expected)
        for a, b in zip(found["surprisals"], expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4)
    assert results[0]["passes"] == results[1]["passes"] > 1


def test_mixed_precision_that_would_change_the_scorer_is_refused_in_each_process(tmp_path):
    for found in scored(tmp_path, TEXTS, [[], []], "bfloat16"):
        assert "scorer's float32 weights in bfloat16" in found["refused"]
        assert "--dtype bfloat16" in found["refused"] and "--bf16 false" in found["refused"]


def test_a_model_in_one_process_is_not_sharded(model):
    assert not is_sharded(model)
