"""Calls from many threads, scored together: each gets its own, in as few passes as waiting allows."""

import threading

import pytest
from waiting import PATIENCE

from engines.coalescing import Coalescing


class Passes:
    """Scores a number as its square, and may be held up in its first pass."""

    def __init__(self):
        self.items, self.begun, self.go_on = [], threading.Event(), threading.Event()
        self.together = Coalescing(self.score)

    def score(self, items):
        self.items.append(list(items))
        self.begun.set()
        assert self.go_on.wait(PATIENCE)
        if "bug" in items:
            raise ValueError(f"{len(items)} items")
        if "end" in items:
            raise KeyboardInterrupt
        return [item * item for item in items]

    def call_all(self, first, others):
        """What each call gives, or the error that it raises, where the others come while the first one is scored."""
        results = {}

        def call(item):
            try:
                results[item] = self.together(item)
            except BaseException as error:
                results[item] = error

        threads = [threading.Thread(target=call, args=(item,)) for item in (first, *others)]
        threads[0].start()
        assert self.begun.wait(PATIENCE)
        for thread in threads[1:]:
            thread.start()
        while self.together.waiting < len(others):
            threads[0].join(0.001)
        self.go_on.set()
        for thread in threads:
            thread.join(PATIENCE)
        return results


def test_what_waits_is_scored_in_one_pass():
    passes = Passes()
    results = passes.call_all(0, range(1, 20))
    assert results == {number: number**2 for number in range(20)}
    assert passes.items[0] == [0]
    assert [len(items) for items in passes.items] == [1, 19]


def test_a_lone_call_waits_for_nobody():
    passes = Passes()
    passes.go_on.set()
    assert [passes.together(number) for number in (2, 3)] == [4, 9]
    assert passes.items == [[2], [3]]


def test_an_error_is_of_the_call_that_it_comes_from():
    passes = Passes()
    results = passes.call_all(0, [1, "bug", 3])
    assert [results[number] for number in (0, 1, 3)] == [0, 1, 9]
    assert isinstance(results["bug"], ValueError)
    assert str(results["bug"]) == "1 items"
    with pytest.raises(ValueError):
        passes.together("bug")
    assert passes.together(5) == 25


def test_nobody_waits_for_ever_when_the_one_who_scores_is_stopped():
    results = Passes().call_all(0, [1, "end"])
    assert results[0] == 0
    assert all(isinstance(results[item], KeyboardInterrupt) for item in (1, "end"))


def test_many_threads_at_once_lose_nothing():
    together = Coalescing(lambda items: [-item for item in items])
    results = {}
    threads = [
        threading.Thread(target=lambda start=start: results.update({n: together(n) for n in range(start, start + 50)}))
        for start in range(0, 1000, 50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == {number: -number for number in range(1000)}
