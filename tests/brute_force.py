"""DESIGN in its slowest words: one forward pass a token, one character at a time. The twin the fast path must equal."""

import copy
import math

import regex
import sentencex
import torch

CLAUSE = set(",;:—–()[]、，；：（）【】")
LINE_BREAKS = {"\n", "\v", "\f", "\r", "\x85", "\u2028", "\u2029"}


def has_word(text: str) -> bool:
    """Letters and digits as the newest Unicode has them: `str.isalnum` knows those of its Python's year."""
    return any(regex.match(r"[\p{L}\p{N}]", char) for char in text)


def units(text: str, language: str = "en", max_phrase_words: int = 4) -> dict[str, list[tuple[int, int]]]:
    """Per level (start, end) of every unit, also of those that will hold no token."""
    pieces = []
    without_panic = regex.sub(r"[^\S\x00-\x7f](?=\.)", " ", text)
    starts, previous = [], ""
    for sentence in sentencex.segment(language, without_panic):  # beyond 10,000 characters it leaves out blank lines
        starts.append(without_panic.index(sentence, starts[-1] + len(previous) if starts else 0))
        previous = sentence
    for start, end in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True):
        sentence = text[start:end]
        piece = ""
        for at, char in enumerate(sentence):
            piece += char
            if char in LINE_BREAKS and not (char == "\r" and sentence[at + 1 : at + 2] == "\n"):
                pieces.append(piece)
                piece = ""
        if piece:
            pieces.append(piece)
    found = {"word": [], "phrase": [], "sentence": []}
    start = 0
    for piece in pieces:
        found["sentence"].append((start, start + len(piece)))
        words = []  # (text in front and word, what trails it)
        for part in regex.split(r"(?V1w)\b", piece):
            if has_word(part):
                if len(words) == 1 and not has_word(words[0][0]):
                    words[0] = [words[0][0] + part, ""]
                else:
                    words.append([part, ""])
            elif words and has_word(words[-1][0]):
                words[-1][1] += part
            elif words:
                words[0][0] += part
            else:
                words.append([part, ""])
        offset, phrase, count = start, start, 0
        for word, trailing in words:
            end = offset + len(word) + len(trailing)
            found["word"].append((offset, end))
            offset, count = end, count + 1
            if count == max_phrase_words or (CLAUSE & set(trailing)):
                found["phrase"].append((phrase, offset))
                phrase, count = offset, 0
        if count:
            found["phrase"].append((phrase, offset))
        start += len(piece)
    return found


def scored_tokens(tokenizer, text: str, context: str = "", eos_for_bos: bool = False):
    """(ids of the whole sequence, [[place in them, character of the target]] of the scored tokens, in order)."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = None  # GPT-2's trims white space off the offsets, of "  " all of it
    encoded = tokenizer(context + text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    start = tokenizer.bos_token_id
    if start is None and eos_for_bos and not context:
        start = tokenizer.eos_token_id
    if start is not None and (not ids or ids[0] != start):
        ids, offsets = [start, *ids], [(0, 0), *offsets]
    found = []
    for index in range(1, len(ids)):
        start, end = offsets[index]
        if end <= len(context) or ids[index] in tokenizer.all_special_ids:
            continue
        visible = [at for at in range(max(start, len(context)), end) if not (context + text)[at].isspace()]
        found.append([index, visible[0] - len(context) if visible else None])
    for at in reversed(range(len(found) - 1)):
        if found[at][1] is None:
            found[at][1] = found[at + 1][1]
    for at in range(1, len(found)):
        if found[at][1] is None:
            found[at][1] = found[at - 1][1]
    # White space beside nothing but tokens that are not scored, as in "<s> ", belongs to no unit.
    return ids, [one for one in found if one[1] is not None]


def token_surprisals(model, tokenizer, text: str, context: str = "", window: int | None = None):
    """[(character of the target, surprisal in nats)] of the scored tokens, in order."""
    ids, tokens = scored_tokens(tokenizer, text, context)
    return [[char, _surprisal(model, ids, index, window)] for index, char in tokens]


def _surprisal(model, ids: list[int], index: int, window: int | None) -> float:
    start = 0
    while window and index >= start + window:  # the first window that reaches the token scores it
        start += window // 2
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[start:index]])).logits[0, -1]
    return -torch.log_softmax(logits.float(), dim=-1)[ids[index]].item()


def all_levels(model, tokenizer, text, context="", window=None, aggregation="geometric", **options) -> dict[str, float]:
    if aggregation == "nested":
        values = nested_levels(model, tokenizer, text, context, window, **options)
        return dict(zip(("word", "phrase", "sentence"), values, strict=True))
    scored = token_surprisals(model, tokenizer, text, context, window)
    spans = units(text, **options)
    result = {}
    for level, of_level in spans.items():
        rates = [rate for rate in (_rate(scored, start, end) for start, end in of_level) if rate is not None]
        result[level] = math.exp(math.fsum(rates) / len(rates)) if rates else math.nan
    return result


def _rate(scored, start: int, end: int) -> float | None:
    inside = [surprisal for char, surprisal in scored if start <= char < end]
    return math.fsum(inside) / len(inside) if inside else None


def nested_levels(model, tokenizer, text: str, context="", window: int | None = None, **options) -> list[float]:
    """[word, phrase, sentence]: every phrase and every sentence run alone, behind one token, one token at a time."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids, tokens = scored_tokens(tokenizer, text, context, eos_for_bos=True)
    if not tokens:
        return [math.nan] * 3
    spans = units(text, **options)
    totals = {"phrase": [], "sentence": []}
    for index, char in tokens:
        for level, values in totals.items():
            [(first, last)] = [span for span in spans[level] if span[0] <= char < span[1]]
            begin = min(at for at, other in tokens if first <= other < last)
            alone = [start, *ids[begin : index + 1]]
            values.append(_surprisal(model, alone, len(alone) - 1, window))
    a, b = (math.fsum(values) / len(values) for values in totals.values())
    c = math.fsum(_surprisal(model, ids, index, window) for index, _ in tokens) / len(tokens)
    return [math.exp(a), math.exp(b - a), math.exp(c - b)]
