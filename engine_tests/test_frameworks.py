"""axolotl 0.19, ms-swift 4.6 and verifiers 0.4 and 0.3: the commands of engines/README.md, by their own programs.

axolotl and ms-swift train two steps on the CPU. In place of a served model, `served` answers verifiers' requests.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas
import pytest

from mlppl.models import load_model
from multi_level_ppl_trl import MultiLevelPPLRewardFunction

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "rl_training" / "examples"
README = (EXAMPLES / "engines" / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = Path(sys.prefix)
WRITTEN = " So the fox went home."


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The examples, with the toy model, the rows and the settings that the README's snippet makes."""
    folder = tmp_path_factory.mktemp("clone") / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("__pycache__", "output*"))
    [snippet] = [text for text in re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S) if "rows.jsonl" in text]
    subprocess.run([sys.executable, "-c", snippet], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def direct(examples):
    """A row's reward for a completion, by its prompt; as chat: through the scorer's chat template."""
    reward = MultiLevelPPLRewardFunction(*load_model(examples / "toy")[:2], target="reference", form="nats")
    rows = [json.loads(line) for line in (examples / "rows.jsonl").read_text().splitlines()]
    references = {row["prompt"]: row["reference"] for row in rows}

    def of(prompt, completion, chat=False):
        given = [{"role": "user", "content": prompt}] if chat else prompt
        return reward.compute_rewards([completion], [given], [references[prompt]]).item()

    return of


@pytest.fixture(scope="module")
def served():
    """The address of a model that always writes `WRITTEN`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": WRITTEN}}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
            content = json.dumps({**answer, "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def run(framework, examples, settings="", replace=()):
    """The framework's command in the README, with its own packages. settings: a further line of reward.yaml."""
    [command] = [text for text in re.findall(r"^```\n(.*?)^```$", README, re.M | re.S) if COMMANDS[framework] in text]
    for old, new in replace:
        assert old in command
        command = command.replace(old, new)
    config = examples / "reward.yaml"
    right = config.read_text()
    packages = ENVIRONMENT / framework
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(packages / "bin"), str(ENVIRONMENT / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(str, [examples, packages, Path(__file__).parent])),
        "OMP_NUM_THREADS": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    config.write_text(right + settings)
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=examples, env=environment, capture_output=True, text=True
        )
    finally:
        config.write_text(right)
    return done.returncode, done.stdout + done.stderr


COMMANDS = {
    "axolotl": "axolotl train",
    "ms-swift": "swift rlhf",
    "verifiers": "verifiers-taskset",
    "verifiers-rubric": "verifiers-rubric",
}


def test_axolotl_trains_on_the_direct_rewards_numbers(examples, direct):
    code, output = run("axolotl", examples)
    assert code == 0, output[-3000:]
    files = sorted((examples / "output_axolotl" / "completions").glob("*.parquet"))
    assert len(files) == 2
    rows = pandas.concat(map(pandas.read_parquet, files))
    assert rows["multi_level_ppl"].std() > 1e-3
    expected = [direct(row.prompt, row.completion) for row in rows.itertuples()]
    assert rows["multi_level_ppl"].tolist() == pytest.approx(expected, abs=1e-4)
    assert (examples / "output_axolotl" / "adapter_model.safetensors").exists()


def test_ms_swift_trains_on_the_direct_rewards_numbers(examples, direct):
    code, output = run("ms-swift", examples)
    assert code == 0, output[-3000:]
    [file] = examples.glob("output_swift/*/completions.jsonl")
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    found = [
        one for step in steps for one in zip(step["prompt"], step["completion"], step["MultiLevelPPL"], strict=True)
    ]
    assert len(found) == 16
    expected = [direct(prompt.removeprefix("<|bos|>"), text, chat=True) for prompt, text, _ in found]
    assert [reward for _, _, reward in found] == pytest.approx(expected, abs=1e-4)


def test_verifiers_evaluates_a_served_model(examples, served, direct):
    where = [("http://127.0.0.1:8000/v1", served), ("harness.id null", "harness.id one_request")]
    code, output = run("verifiers", examples, replace=where)
    assert code == 0, output[-3000:]
    [file] = examples.glob("output_verifiers/*/traces.jsonl")
    episodes = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(episodes) == 4
    for [trace] in (episode["traces"] for episode in episodes):
        expected = direct(trace["task"]["data"]["prompt"], WRITTEN)
        assert trace["rewards"]["multi_level_ppl"]["score"] == pytest.approx(expected, abs=1e-4)
        assert set(trace["metrics"]) >= {"reward_word", "reward_phrase", "reward_sentence"}


def test_a_rubric_of_verifiers_evaluates_a_served_model(examples, served, direct):
    code, output = run("verifiers-rubric", examples, replace=[("http://127.0.0.1:8000/v1", served)])
    assert code == 0, output[-3000:]
    [file] = examples.glob("output_rubric/evals/*/*/results.jsonl")
    results = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(results) == 4
    for result in results:
        assert result["reward"] == pytest.approx(direct(result["prompt"][0]["content"], WRITTEN), abs=1e-4)


@pytest.mark.parametrize("framework", COMMANDS)
def test_a_misspelt_setting_ends_its_command(examples, framework):
    code, output = run(framework, examples, settings="wieghts: [1, 1, 1]\n")
    assert code != 0
    assert "unknown setting 'wieghts', did you mean weights?" in output


def test_what_a_rubric_would_count_as_zero_ends_its_command(examples, served):
    rows = (examples / "rows.jsonl").read_text()
    first, *rest = map(json.loads, rows.splitlines())
    (examples / "rows.jsonl").write_text("\n".join(map(json.dumps, [{**first, "reference": " "}, *rest])))
    try:
        code, output = run("verifiers-rubric", examples, replace=[("http://127.0.0.1:8000/v1", served)])
    finally:
        (examples / "rows.jsonl").write_text(rows)
    assert code != 0
    assert "error: row 0 of this call has a blank reference" in output
