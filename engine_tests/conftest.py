"""The tests' toys, settings that the engines' processes read, and a cluster of Ray."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """The address of a Ray cluster that runs already, started elsewhere, which knows nothing of our paths."""
    import ray

    folder = tmp_path_factory.mktemp("ray")
    environment = {name: value for name, value in os.environ.items() if name not in ("PPL_REWARD_CONFIG", "PYTHONPATH")}
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--port=0", "--num-cpus=4"]
    command += ["--include-dashboard=false", f"--temp-dir={folder}"]
    for _ in range(5):  # it gives itself 30 s, which a busy machine may need more than once
        started = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if started.returncode == 0:
            break
        subprocess.run([command[0], "stop", "--force"], env=environment, capture_output=True)
    assert started.returncode == 0, started.stdout + started.stderr
    yield re.search(r"--address='([^']+)'", started.stdout)[1]
    ray.shutdown()
    subprocess.run([command[0], "stop", "--force"], env=environment, capture_output=True)
