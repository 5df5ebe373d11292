"""DESIGN in its slowest words: one forward pass a token, one character at a time. The twin the fast path must equal."""

import copy
import functools
import math

import regex
import sentencex
import torch

CLAUSE = set(",;:—–()[]、，；：（）【】")
LINE_BREAKS = {"\n", "\v", "\f", "\r", "\x85", "\u2028", "\u2029"}


def has_word(text: str) -> bool:
    """Letters and digits as the newest Unicode has them: `str.isalnum` knows those of its Python's year."""
    return any(regex.match(r"[\p{L}\p{N}]", char) for char in text)


IGNORED, LINE_ENDS = {"Extend", "Format", "ZWJ"}, {"CR", "LF", "Newline"}
KINDS = [*IGNORED, *LINE_ENDS, "ALetter", "Hebrew_Letter", "Numeric", "Katakana", "ExtendNumLet", "MidLetter"]
KINDS += ["MidNumLet", "MidNum", "Single_Quote", "Double_Quote", "WSegSpace", "Regional_Indicator"]


@functools.cache
def kind_of(char: str) -> str:
    return next((kind for kind in KINDS if regex.match(rf"\p{{WB={kind}}}", char)), "Other")


def word_segments(text: str) -> list[str]:
    """Between two boundaries of Unicode's UAX #29, section 4.1.1, asked for one place at a time."""
    kinds = [kind_of(char) for char in text]
    seen = [i for i, kind in enumerate(kinds) if kind not in IGNORED or i == 0 or kinds[i - 1] in LINE_ENDS]
    segments = [text[:1]] if text else []
    for at in range(1, len(text)):
        if word_boundary(text, kinds, seen, at):
            segments.append("")
        segments[-1] += text[at]
    return segments


def word_boundary(text: str, kinds: list[str], seen: list[int], at: int) -> bool:
    left, right = kinds[at - 1], kinds[at]
    if left == "CR" and right == "LF":  # WB3
        return False
    if left in LINE_ENDS or right in LINE_ENDS:  # WB3a, 3b
        return True
    if left == "ZWJ" and regex.match(r"\p{Extended_Pictographic}", text[at]):  # WB3c
        return False
    if left == right == "WSegSpace" or right in IGNORED:  # WB3d, 4
        return False
    place = seen.index(at)
    left, left2 = kinds[seen[place - 1]], kinds[seen[place - 2]] if place > 1 else ""
    right2 = kinds[seen[place + 1]] if place + 1 < len(seen) else ""
    flags = 0
    while flags < place and kinds[seen[place - 1 - flags]] == "Regional_Indicator":
        flags += 1
    letters = {"ALetter", "Hebrew_Letter"}
    in_word, in_number = {"MidLetter", "MidNumLet", "Single_Quote"}, {"MidNum", "MidNumLet", "Single_Quote"}
    alone = {*letters, "Numeric", "Katakana"}
    return not (
        (left in letters and right in letters)  # WB5
        or (left in letters and right in in_word and right2 in letters)  # WB6
        or (left2 in letters and left in in_word and right in letters)  # WB7
        or (left == "Hebrew_Letter" and right == "Single_Quote")  # WB7a
        or (left == "Hebrew_Letter" and right == "Double_Quote" and right2 == "Hebrew_Letter")  # WB7b
        or (left2 == "Hebrew_Letter" and left == "Double_Quote" and right == "Hebrew_Letter")  # WB7c
        or (left in {*letters, "Numeric"} and right == "Numeric")  # WB8, 9
        or (left == "Numeric" and right in letters)  # WB10
        or (left2 == "Numeric" and left in in_number and right == "Numeric")  # WB11
        or (left == "Numeric" and right in in_number and right2 == "Numeric")  # WB12
        or (left == "Katakana" and right == "Katakana")  # WB13
        or (left in {*alone, "ExtendNumLet"} and right == "ExtendNumLet")  # WB13a
        or (left == "ExtendNumLet" and right in alone)  # WB13b
        or (right == "Regional_Indicator" and flags % 2 == 1)  # WB15, 16
    )


def units(text: str, language: str = "en", max_phrase_words: int = 4) -> dict[str, list[tuple[int, int]]]:
    """Per level (start, end) of every unit, also of those that will hold no token."""
    pieces = []
    without_panic = regex.sub(r"[^\S\x00-\x7f](?=\.)", " ", text)
    starts, previous = [], ""
    for sentence in sentencex.segment(language, without_panic):  # beyond 10,000 characters it leaves out blank lines
        starts.append(without_panic.index(sentence, starts[-1] + len(previous) if starts else 0))
        previous = sentence
    starts = [start - (text[max(0, start - 1) : start + 1] == "\r\n") for start in starts]
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
        for part in word_segments(piece):
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
