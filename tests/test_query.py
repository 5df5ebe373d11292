"""Where the completion begins in a query of OpenRLHF's: decode(prompt ids, perhaps cut, + completion ids)."""

import unicodedata

import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.query import LEAST, completion_of

# Whose tokens have every character, so that the policy's tokenizer need not be the scorer's.
FAITHFUL = ["byte_level", "gpt2_like", "llama2_like", "gemma_like", "prefix_space", "normalizing"]
PROMPT = 'Once upon a time, there was a small fox: "I am hungry"; it walked home.'


@pytest.fixture(scope="module", params=toys.WRITERS)
def writer(request):
    return toys.WRITERS[request.param]()


def query_of(tokenizer, prompt, completion, cut=None, special=False):
    """(the query, its part that is the completion, as far as decoding tells), as OpenRLHF makes it."""
    ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    ids = ids if cut is None else ids[-cut:]
    written = tokenizer(completion, add_special_tokens=False)["input_ids"]
    before, query = tokenizer.decode(ids), tokenizer.decode([*ids, *written])
    return query, query[len(before) :] if query.startswith(before) else None


def visible(text):
    return "".join(unicodedata.normalize("NFKD", text).split())


def test_the_prompts_of_llama_2_and_mistral_lose_or_gain_a_space():
    assert completion_of("<s> [INST] hi [/INST] So.", "<s>[INST] hi [/INST]") == " So."
    assert completion_of("<s>[INST] hi [/INST]So.", "<s> [INST] hi [/INST] ") == "So."
    tokenizer = toys.llama2_like()
    prompt = "<s>[INST] hi [/INST]"
    query, _ = query_of(tokenizer, prompt, "So.")
    assert not query.startswith(prompt)
    assert completion_of(query, prompt, tokenizer) == completion_of(query, prompt) == " So."


def test_a_normalised_prompt_is_known_again():
    prompts = ["Cafe\u0301, ﬁn ½.", "Café, ﬁn ½.", "한국 \u1112\u1161\u11ab", "a\u0301\u0323b", "a\u0323\u0301b"]
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        for prompt in prompts:
            assert completion_of(unicodedata.normalize(form, prompt) + " So.", prompt) == " So."


def test_what_the_completion_begins_with_is_its_own():
    assert completion_of("the cafe\u0301s", "the cafe") == "\u0301s"
    assert completion_of("<s> the cafe\u0301s", "<s>the cafe") == "\u0301s"
    assert completion_of("<s> Then:\n\n\nSo", "<s>Then:\n") == "\n\nSo"
    assert completion_of("<s> Then", "<s>Then") == ""
    assert completion_of("So", "") == "So"


@settings(max_examples=15)
@given(prompt=toys.texts.filter(lambda text: text.strip()), completion=toys.texts, special=st.booleans())
def test_every_tokenizer_gives_what_stands_behind_the_decoded_prompt(writer, prompt, completion, special):
    query, expected = query_of(writer, prompt, completion, special=special)
    if expected is not None:
        assert completion_of(query, prompt, writer) == expected


@pytest.mark.parametrize("name", FAITHFUL)
def test_the_scorers_tokenizer_may_be_another(name):
    tokenizer = toys.WRITERS[name]()
    for prompt in [PROMPT, "<s>" + PROMPT, "Cafe\u0301 ﬁn, 中文。 한국 😀:"]:
        query, _ = query_of(tokenizer, prompt, "They were happy.")
        assert visible(completion_of(query, prompt, toys.word_ends())) == "Theywerehappy."


@settings(max_examples=15)
@given(cut=st.integers(1, 60), completion=toys.texts)
def test_a_prompt_that_was_cut_is_known_by_its_end(writer, cut, completion):
    query, expected = query_of(writer, PROMPT, completion, cut=cut)
    left = query if expected is None else query[: len(query) - len(expected)]
    if expected is None or len(visible(left.strip("\ufffd"))) < LEAST:
        return
    assert completion_of(query, PROMPT, writer) == expected


def test_a_cut_inside_a_character_leaves_bytes_that_are_none():
    tokenizer = toys.byte_level()
    prompt = "中文 the small fox ran home."
    ids = tokenizer(prompt)["input_ids"]
    query = tokenizer.decode([*ids[2:], *tokenizer(" So.")["input_ids"]])
    assert query.startswith("\ufffd")
    assert completion_of(query, prompt, tokenizer) == " So."


def test_the_longest_end_counts():
    assert completion_of("to be, to be, to be, or", "Or not to be, to be, to be,") == " or"


@pytest.mark.parametrize("query", ["", "home.", "A fox. So", "it walked away. So"])
def test_another_text_is_no_prompt(query):
    assert completion_of(query, PROMPT) is None
