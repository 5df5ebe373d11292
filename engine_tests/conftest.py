"""The tests' toys, and settings that the engines' processes read."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))
