"""Waiting for a process. No test fails because a machine is slow: what has not ended after an hour hangs."""

import time
from collections.abc import Callable

PATIENCE = 3600  # seconds


def wait_for(condition: Callable[[], object], process=None) -> None:
    """Wait until the condition holds. process: a `Popen` that must not end before."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.01)
