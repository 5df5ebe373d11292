"""Text -> where its sentences start, as sentencex divides it. Line breaks, which end one too, are `LINE_BREAKS`."""

import difflib
import itertools

import regex

from .errors import InputError

LINE_BREAKS = "\n\v\f\r\x85\u2028\u2029"
# sentencex 1.0.32 panics on "Z\xa0.": a capital, a space outside ASCII, a full stop.
_SPACE_BEFORE_STOP = regex.compile(r"[^\S\x00-\x7f](?=\.)")


def sentence_starts(text: str, language: str) -> list[int]:
    """Offsets of the text's sentences, in order. language: ISO 639 code."""
    import sentencex  # here, since --help imports this file

    readable = _SPACE_BEFORE_STOP.sub(" ", text)
    starts, end = [], 0
    for sentence in sentencex.segment(language, readable):
        # Looked for, not counted: sentencex 1.0.32 leaves out blank lines of texts beyond 10,000 characters.
        start = readable.index(sentence, end)
        starts.append(start)
        end = start + len(sentence)
    return starts


def split_sentences(text: str, count: int, language: str) -> tuple[str, str]:
    """The first `count` sentences with something visible in them, and the rest with the space before it.

    >>> split_sentences("A fox ran. It fell.\\nIt slept.", 2, "en")
    ('A fox ran. It fell.', '\\nIt slept.')
    """
    starts = {*sentence_starts(text, language), *(i + 1 for i, char in enumerate(text) if char in LINE_BREAKS)}
    starts = sorted({0, *starts, len(text)})
    visible = [end for start, end in itertools.pairwise(starts) if text[start:end].strip()]
    end = visible[count - 1] if count <= len(visible) else len(text)
    prompt = text[:end].rstrip()
    return prompt, text[len(prompt) :]


def checked_language(code: str) -> str:
    """The ISO 639 code of a language, its region cut off: `de` of `de-DE` and `DE`. Raises `InputError` for what is
    none. Of a language that sentencex has no rules for it takes those of another one.
    """
    from langcodes import Language, LanguageTagError  # here, since --help imports this file
    from langcodes.registry_parser import parse_registry

    short = code.strip().lower().replace("_", "-").partition("-")[0]
    try:
        if Language.get(short, normalize=False).is_valid():
            return short
        short = Language.get(short).language  # de of deu
    except LanguageTagError:
        pass
    registered = [one for one in parse_registry() if one["Type"] == "language" and len(one["Subtag"]) == 2]
    names = {one["Subtag"]: one["Description"][0] for one in registered if "Deprecated" not in one}
    by_name = {name.lower(): subtag for subtag, name in names.items()}
    [near] = difflib.get_close_matches(short, [*by_name, *names], n=1, cutoff=0.5) or ["english"]
    near = by_name.get(near, near)
    raise InputError(
        f"language is {code!r}, expected an ISO 639 code such as de or pt-BR: did you mean {near!r} ({names[near]})?"
    )
