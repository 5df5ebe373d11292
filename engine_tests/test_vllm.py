"""A server of vLLM itself as scorer, on the CPU: the numbers of the model here, also when it was killed and came back.

VLLM_PYTHON names the Python of an environment that has vLLM; without it, these tests are skipped. `make vllm` makes it.
"""

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
from waiting import PATIENCE, wait_for

import mlppl.baselines.job
from compute_baselines_trl import parse_args
from mlppl.config import AGGREGATIONS, LEVELS
from mlppl.errors import InputError
from mlppl.models import load_model
from mlppl.scoring.server import connect
from mlppl.scoring.surprisal import SurprisalScorer
from mlppl.scoring.tokens import TextEncoder
from multi_level_ppl_trl import MultiLevelPPLCalculator, MultiLevelPPLRewardFunction

pytestmark = pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON is not set: `make vllm`")
STORIES = Path(__file__).parent.parent / "rl_training" / "examples" / "tiny_stories"
ROWS = json.loads((STORIES / "train.json").read_text())
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}  # fmt: skip


class Server:
    def __init__(self, log):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        self.start()

    def start(self):
        words = [
            "--model",
            STORIES,
            "--host",
            "127.0.0.1",
            "--port",
            self.port,
            "--dtype",
            "float32",
            "--enforce-eager",
            "--no-enable-prefix-caching",
        ]
        command = [os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", *map(str, words)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, env={**environment, **SETTINGS}, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self.answers, self.process)

    def answers(self):
        time.sleep(0.5)
        try:
            return httpx.get(f"{self.url}/v1/models").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)  # its engine is a process of its own
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("vllm") / "log")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def local():
    return load_model("tiny-stories")[:2]


def test_each_token_has_the_surprisal_of_the_model_here(server, local):
    scorer, tokenizer = connect(server.url, "tiny-stories")
    texts = TextEncoder(tokenizer).encode([row["prompt"] for row in ROWS], [row["completion"] for row in ROWS])
    here, there = SurprisalScorer(local[0]).score(texts), scorer.score(texts)
    assert sum(map(len, here)) > 10_000
    assert max(abs(a - b).max() for a, b in zip(here, there, strict=True)) < 1e-3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_each_level_is_that_of_the_model_here(server, local, aggregation):
    scorer, tokenizer = connect(server.url, "tiny-stories")
    calculator = MultiLevelPPLCalculator(tokenizer, aggregation=aggregation)
    texts, prompts = ([row[name] for row in ROWS[:24]] for name in ("completion", "prompt"))
    here = calculator.compute_all_levels(local[0], texts, prompts)
    there = calculator.compute_all_levels(scorer, texts, prompts)
    for level in LEVELS:
        assert there[level].tolist() == pytest.approx(here[level].tolist(), rel=1e-3)


def test_a_reward_is_that_of_the_model_here(server, local):
    scorer, tokenizer = connect(server.url, "tiny-stories")
    columns = {"prompts": [ROWS[0]["prompt"]] * 8, "references": [ROWS[0]["completion"]] * 8}
    texts = [row["completion"] for row in ROWS[1:9]]
    options = {"target": "reference", "form": "nats"}
    here = MultiLevelPPLRewardFunction(*local, **options).compute_rewards(texts, **columns)
    there = MultiLevelPPLRewardFunction(scorer=scorer, tokenizer=tokenizer, **options).compute_rewards(texts, **columns)
    assert here.std() > 1e-3
    assert there.tolist() == pytest.approx(here.tolist(), abs=1e-3)


def test_what_it_refuses_is_one_line(server):
    scorer, tokenizer = connect(server.url, "tiny-stories")
    [encoded] = TextEncoder(tokenizer).encode([""], ["Once there was a fox."])
    encoded.ids[-1] = 10**6
    with pytest.raises(InputError, match="HTTP 400: 'Token id 1000000 is out of vocabulary'"):
        scorer.score([encoded])


def test_two_clients_and_a_server_that_is_killed_under_load_and_started_again(tmp_path, monkeypatch):
    """The same file: the same rows, each with the numbers of the model here."""
    monkeypatch.setattr(mlppl.baselines.job, "WINDOW_ROWS", 64)
    rows = 600
    data = tmp_path / "rows.jsonl"
    # Each row a text of its own, so that no cache answers.
    data.write_text("\n".join(
        json.dumps({"id": str(n), "prompt": f"Chapter {n}. ", "completion": ROWS[n % len(ROWS)]["completion"]})
        for n in range(rows)
    ))  # fmt: skip
    server = Server(tmp_path / "log")
    results = {}

    def compute(name, *more):
        output = tmp_path / f"{name}.json"
        words = ["--dataset_name", data, "--output_path", output, "--no_unsloth", "--device", "cpu", *more]
        results[name] = mlppl.baselines.job.compute(parse_args(list(map(str, words)))), json.loads(output.read_text())

    try:
        clients = [threading.Thread(target=compute, args=(name, "--scorer_url", server.url)) for name in ("one", "two")]
        for client in clients:
            client.start()
        for name in ("one", "two"):
            file = tmp_path / f"{name}.json.parts" / "windows-0.jsonl"
            wait_for(lambda file=file: file.exists() and file.read_bytes().count(b"\n") >= 3)
        server.kill()
        assert not results
        time.sleep(2)
        server.start()
        for client in clients:
            client.join(PATIENCE)
    finally:
        server.kill()
    compute("here")
    _, expected = results["here"]
    assert len(expected) == rows
    for name in ("one", "two"):
        code, found = results[name]
        assert code == 0
        assert list(found) == list(expected)
        for level in LEVELS:
            assert [found[key][level] for key in found] == pytest.approx(
                [one[level] for one in expected.values()], rel=1e-3
            )
