"""A scorer behind an address: a server of vLLM, which gives a prompt's log-probabilities.

    vllm serve MODEL --port 8000 --no-enable-prefix-caching        and then --scorer_url http://127.0.0.1:8000

Ids are sent, BOS first where the tokenizer has one, to /v1/completions with `prompt_logprobs`, at temperature 1. One
token is sampled and thrown away, since vLLM asks for that.
"""

import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from itertools import chain
from typing import Any

import httpx
import numpy as np

from ..errors import InputError
from ..models import load_tokenizer
from ..prompts import read_template
from .batching import Row, windows
from .differences import BEHIND_AN_ADDRESS, PROBE_NATS, differences
from .identity import PROBE, encode_probe, probe_row
from .tokens import Encoded

logger = logging.getLogger(__name__)

_TOKEN_NATS = 10 * PROBE_NATS  # how far a single token may be off, in another order of requests
_REQUESTS = 16  # at a time
_ROWS, _TOKENS = 64, 4096  # of one request at most
_AGAIN = (429, 500, 502, 503, 504)  # answers of a server that is too busy, or is about to start or stop


class ServerScorer:
    """Token surprisals from a server of vLLM. A `mlppl.scoring.surprisal.Scorer`.

    url: the server's, such as http://127.0.0.1:8000. tokenizer: that of the model it serves. generation_config: that
    model's, if it is at hand, for its end tokens. timeout: seconds that one request may take. patience: seconds for
    which a request is repeated while the server does not answer, or says that it cannot just now.

    Raises `InputError`, in one line, where nobody answers, for a server that gives no prompt log-probabilities, for one
    that has another tokenizer, and for one whose numbers depend on the order of requests. When a server is back after
    it was gone, it must be the same model.
    """

    def __init__(self, url: str, tokenizer, *, generation_config=None, timeout: float = 300, patience: float = 600):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"scorer_url is {url!r}, expected the address of a server such as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.generation_config = generation_config
        self.timeout, self.patience = timeout, patience
        self._said = False  # that the server does not answer
        self._probe = encode_probe(tokenizer)
        self._name, self._most = self._model()
        self._check_tokenizer(tokenizer)
        self._check_order()

    @property
    def window(self) -> int | None:
        """One less than the server's: a place is kept for the token that is sampled."""
        return None if self._most is None else self._most - 1

    @cached_property
    def identity(self) -> dict:
        """The name that the server gives its model, and the surprisals of a fixed text under it."""
        return self._identity()

    def score(self, texts: list[Encoded]) -> list[np.ndarray]:
        """float64 [n] per text: -ln p(token | all before it) in nats, for its scored tokens in order."""
        surprisals = [np.zeros(len(text.positions)) for text in texts]
        rows = [row for number, text in enumerate(texts) for row in windows(text, self.window, number)]
        requests = list(_requests(rows))
        stopped = threading.Event()
        with ThreadPoolExecutor(_REQUESTS) as pool:
            try:
                asked = [pool.submit(self._score, request, stopped=stopped) for request in requests]
                for one in as_completed(asked):
                    one.result()  # raises what it raised
                scored = [one.result() for one in asked]
            except BaseException:  # what has not been sent need not be, and what waits for the server need not wait
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for row, values in zip(chain(*requests), chain(*scored), strict=True):
            surprisals[row.text][row.first : row.first + len(values)] = values
        for number, of_text in enumerate(surprisals):
            if np.isnan(of_text).any():
                raise FloatingPointError(f"the server's log-probabilities are NaN for text {number} of this call")
        return surprisals

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_client"}

    def _score(self, rows: Sequence[Row], check: bool = True, stopped=None) -> list[np.ndarray]:
        """float64 [m] of each row's labels."""
        prompts = [[*row.inputs.tolist(), int(row.labels[-1])] for row in rows]
        asked = {"model": self._name, "prompt": prompts, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        answer = self._ask("/v1/completions", asked, check=check, stopped=stopped)
        try:
            choices = {choice["index"]: choice.get("prompt_logprobs") for choice in answer["choices"]}
            entries = [choices[index] for index in range(len(rows))]
        except (KeyError, TypeError) as error:
            raise self._error(f"gave no completions, found {str(answer)!r:.100}") from error
        return [self._surprisals(row, given) for row, given in zip(rows, entries, strict=True)]

    def _surprisals(self, row: Row, entries: Sequence[dict | None] | None) -> np.ndarray:
        """float64 [m], from what the server gives for each id sent, the one that stands there among them."""
        # ids        b   t1  t2  t3
        # entries    .   e1  e2  e3     nothing stands before the first, so it has none
        if entries is None:
            raise self._error("gives no prompt_logprobs: expected vLLM, asked at /v1/completions")
        values = np.empty(len(row.labels))
        for index, (position, label) in enumerate(zip((row.read + 1).tolist(), row.labels.tolist(), strict=True)):
            entry = entries[position] if position < len(entries) else None
            if not entry or str(label) not in entry:
                raise self._error(
                    f"gave no log-probability for token {label} at index {position} of a text, found "
                    f"{str(entry)!r:.60}: expected that of the token itself, whatever the likeliest ones are"
                )
            given = entry[str(label)]["logprob"]
            # JSON knows no infinity: vLLM says -9999.
            values[index] = math.nan if given is None else -given if given > -9999 else math.inf
        return values

    def _error(self, what: str) -> InputError:
        return InputError(f"the scorer at {self.url} {what}")

    def _ask(self, path: str, content: dict | None = None, patient=True, check=False, stopped=None) -> dict:
        """patient: repeat the request for `patience` seconds from its first failure, unless the event `stopped` is set.
        check: that a server which was gone has the same model."""
        failed, pause, stopped = None, 0.5, stopped or threading.Event()
        while True:
            try:
                response = self._client.request("POST" if content else "GET", self.url + path, json=content)
                if response.status_code not in _AGAIN:
                    break
                reason = f"HTTP {response.status_code}"
            except httpx.TransportError as error:  # no connection, one that breaks off, a request that takes too long
                reason = type(error).__name__
            now = time.monotonic()
            failed = failed or now
            left = failed + self.patience - now
            if not patient or left <= 0 or stopped.is_set():
                waited = f" for {now - failed:.0f} s" if patient else ""
                raise self._error(
                    f"does not answer{waited} ({reason}): start it (vllm serve MODEL) or correct the address; what is "
                    "finished is kept, and the same command goes on from it"
                )
            if not self._said:
                self._said = True
                how_long = f"asking again for up to {self.patience:.0f} s"
                logger.warning("the scorer at %s does not answer (%s): %s", self.url, reason, how_long)
            stopped.wait(min(pause, left))
            pause = min(2 * pause, 15)
        if response.status_code != 200:
            raise self._error(f"refused {path} with HTTP {response.status_code}: {_message(response)!r:.200}")
        if failed is not None:
            self._said = False
            if check:
                self._check_same()
        try:
            return response.json()
        except ValueError as error:
            raise self._error(f"answered {response.text!r:.60}, expected JSON") from error

    @cached_property
    def _client(self) -> httpx.Client:
        timeout = httpx.Timeout(self.timeout, connect=min(10.0, self.timeout))
        return httpx.Client(timeout=timeout, limits=httpx.Limits(max_connections=_REQUESTS))

    def _model(self) -> tuple[str, int | None]:
        """(the name of the model that is served, most tokens that it takes)"""
        answer = self._ask("/v1/models", patient=False)
        try:
            first = answer["data"][0]
            return first["id"], first.get("max_model_len")
        except (KeyError, IndexError, TypeError) as error:
            raise self._error(f"serves no model, found {str(answer)!r:.100}") from error

    def _check_tokenizer(self, tokenizer) -> None:
        """Ids mean nothing to a model with another tokenizer. Servers that cannot tell are taken at their word."""
        asked = {"model": self._name, "prompt": PROBE, "add_special_tokens": False}
        try:
            answer = self._ask("/tokenize", asked, patient=False)
        except InputError as error:
            logger.info("%s", error)
            return
        if "tokens" in answer and answer["tokens"] != self._probe.ids[-len(answer["tokens"]) :].tolist():
            raise self._error(
                f"serves {self._name!r}, whose tokenizer makes other ids than "
                f"{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__!r}: name the model that is served"
            )

    def _check_order(self) -> None:
        """Raises `InputError` if a text's numbers depend on what else the server scores, or has scored before.

        With prefix caching, its default, vLLM can give stale numbers for a beginning that it has seen before
        (https://github.com/vllm-project/vllm/issues/42019). So a text is scored alone, then between and after others,
        of which one begins alike. Its first tokens are shuffled, since an earlier run may have filled the cache with
        the probe; the probe itself is compared, too.
        """
        row = probe_row(self._probe, self.window)
        probe = np.append(row.inputs, row.labels[-1])
        text, half = probe.copy(), len(probe) // 2
        np.random.default_rng().shuffle(text[1:9])  # the first may be BOS
        other, alike = np.append(text[:1], text[:0:-1]), np.append(text[:half], text[:half:-1])
        [alone] = self._whole(text)
        _, between, begins_alike, probe_again, after = self._whole(other, text, alike, probe, text)
        for found, expected in (
            (between, alone),
            (after, alone),
            (begins_alike[: half - 1], alone[: half - 1]),  # what follows cannot change them
            (probe_again, np.array(self.identity["probe"])),
        ):
            # Two infinities are equal.
            off = abs(np.subtract(found, expected, out=np.zeros(len(found)), where=found != expected))
            if not (off.mean() <= PROBE_NATS and off.max(initial=0) <= _TOKEN_NATS):
                raise self._error(
                    f"gives a fixed text other numbers between others than alone (up to "
                    f"{off.max():.2f} nats a token, {off.mean():.2f} in the mean): prefix caching can cause that, so "
                    "start it with --no-enable-prefix-caching"
                )

    def _whole(self, *texts: np.ndarray) -> list[np.ndarray]:
        """float64 [n - 1] of each text's ids [n], all but the first, in one request."""
        rows = [Row(ids[:-1], np.arange(len(ids) - 1), ids[1:], 0, 0) for ids in texts]
        return self._score(rows, check=False)

    def _identity(self) -> dict:
        [values] = self._score([probe_row(self._probe, self.window)], check=False)
        return {"name": self._name, "weights": BEHIND_AN_ADDRESS, "probe": [round(one, 4) for one in values.tolist()]}

    def _check_same(self) -> None:
        """Raises `InputError` if the server that came back has another model."""
        now = {"model": self._identity()}
        if differing := differences({"model": self.identity}, now):
            before, after = differing["probe"]
            raise self._error(
                f"came back with another model: a fixed text has {after}, it had {before}: serve {self._name!r} as "
                "before"
            )


def _requests(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows in requests of at most `_ROWS` and, unless one row has more, `_TOKENS`."""
    request: list[Row] = []
    tokens = 0
    for row in rows:
        size = len(row.inputs) + 1
        if request and (len(request) == _ROWS or tokens + size > _TOKENS):
            yield request
            request, tokens = [], 0
        request.append(row)
        tokens += size
    if request:
        yield request


def _message(response: httpx.Response) -> str:
    try:
        answer = response.json()
        return str(answer.get("error", answer).get("message", answer))
    except (ValueError, AttributeError):
        return response.text


def connect(url: str, model_name: str, chat_template_path: str | None = None) -> tuple[ServerScorer, Any]:
    """(the scorer at an address, the tokenizer of the model it serves).

    model_name: that model's folder or name on the hub, of which tokenizer and generation settings are read, no weights.
    chat_template_path: a file whose chat template replaces the tokenizer's. Raises `InputError`.
    """
    tokenizer, generation_config = load_tokenizer(model_name, f"of the model that {url} serves")
    if chat_template_path is not None:
        tokenizer.chat_template = read_template(chat_template_path)
    return ServerScorer(url, tokenizer, generation_config=generation_config), tokenizer
