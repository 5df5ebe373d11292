"""Calls that come one at a time from many threads, scored together."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any


class Coalescing:
    """A function of one item, made of one of many: who gets to score takes along all that wait.

    While one call scores, others wait, and the first of them to go on scores for all. So no call waits for more than
    two, nobody waits for a timer, and a lone call is at once. One call at a time runs `score`.

    score: items -> a result for each, in order; what an item gets must not depend on those beside it. If it raises, the
        items are scored one by one, so that each caller has its own result or error.

    >>> Coalescing(lambda numbers: [number + 1 for number in numbers])(2)
    3
    """

    def __init__(self, score: Callable[[list], Sequence]) -> None:
        self._score = score
        self._scoring = threading.Lock()
        self._waiting: deque[_Call] = deque()

    def __reduce__(self):
        return Coalescing, (self._score,)  # verl's reward manager `remote` pickles; nobody waits elsewhere

    @property
    def waiting(self) -> int:
        """Calls that nobody has begun to score."""
        return len(self._waiting)

    def __call__(self, item):
        call = _Call(item)
        self._waiting.append(call)
        with self._scoring:
            if not call.done:
                self._score_together([self._waiting.popleft() for _ in range(len(self._waiting))])
        if call.error is not None:
            raise call.error
        return call.result

    def _score_together(self, calls: list["_Call"]) -> None:
        try:
            results = self._score([call.item for call in calls])
        except BaseException as error:  # also of Ctrl-C the others must hear
            if len(calls) > 1 and isinstance(error, Exception):
                for call in calls:
                    self._score_together([call])
                return
            for call in calls:
                call.error = error
        else:
            for call, result in zip(calls, results, strict=True):
                call.result = result
        for call in calls:
            call.done = True


class _Call:
    def __init__(self, item) -> None:
        self.item = item
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
