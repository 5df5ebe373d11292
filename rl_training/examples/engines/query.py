"""OpenRLHF's query, a prompt's ids and a completion's ids decoded together -> the completion."""

import unicodedata
from collections.abc import Iterator

import numpy as np

LEAST = 8  # visible characters by which a prompt that was cut is known again


def completion_of(query: str, prompt: str, tokenizer=None) -> str | None:
    """What stands behind the prompt in the query, with the space before it; None if the query does not begin with it.

    A prompt that went through a tokenizer need not be what it was: white space comes and goes at special tokens and in
    front, Unicode is normalised, an unknown character is `<unk>`, and a prompt that was too long has lost its
    beginning. So the two are compared by their visible characters, each decomposed. Of a prompt that was cut, it is
    the longest end that the query begins with, of `LEAST` of them or more.

    tokenizer: the policy's, as far as it is known: it says what becomes of a prompt.

    >>> completion_of("<s> [INST] hi [/INST] So.", "<s>[INST] hi [/INST]")
    ' So.'
    >>> completion_of("the small fox ran. So", "Once upon a time the small fox ran.")
    ' So'
    """
    views = list(_views(prompt, tokenizer))
    for view in views:
        if query.startswith(view):
            return query[len(view) :]
    query = query.lstrip("\ufffd")  # a cut inside a character leaves some of its bytes
    visible, ends = _visible(query)
    for find in (_whole, _end):
        for view in views:
            size = find(_visible(view)[0], visible)
            if size and size in ends:
                return query[_border(query, ends, size, view) :]
    return None


def _views(prompt: str, tokenizer) -> Iterator[str]:
    """The prompt, and what it is once it was made ids and text again."""
    yield prompt
    yield unicodedata.normalize("NFKD", prompt)  # which brings several marks of one letter into order
    for special in (False, True) if tokenizer is not None else ():
        yield tokenizer.decode(tokenizer(prompt, add_special_tokens=special)["input_ids"])


def _visible(text: str) -> tuple[str, np.ndarray]:
    """(the visible characters, decomposed; int64 per character of the text, how many of those end with it)"""
    pieces = ["".join(unicodedata.normalize("NFKD", character).split()) for character in text]
    return "".join(pieces), np.cumsum([len(piece) for piece in pieces], dtype=np.int64)


def _whole(prompt: str, query: str) -> int:
    """How many characters of the query are the prompt: all or none."""
    return len(prompt) if query.startswith(prompt) else 0


def _end(prompt: str, query: str) -> int:
    """How many characters of the query are the end of a prompt that was cut."""
    start = prompt.find(query[:LEAST]) if len(query) >= LEAST else -1
    while start >= 0:
        if query.startswith(prompt[start:]):
            return len(prompt) - start
        start = prompt.find(query[:LEAST], start + 1)
    return 0


def _border(query: str, ends: np.ndarray, size: int, prompt: str) -> int:
    """Where the first `size` visible characters of the query end, with the white space that the prompt ends in."""
    border = int(np.searchsorted(ends, size)) + 1
    for space in prompt[len(prompt.rstrip()) :]:
        if query[border : border + 1] != space:
            break
        border += 1
    return border
