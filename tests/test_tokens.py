"""Which tokens are scored, and which character each stands for."""

from types import SimpleNamespace

import brute_force
import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models
from transformers import ByT5Tokenizer

from mlppl.scoring.tokens import TextEncoder


def encode(tokenizer, target, context=""):
    return TextEncoder(tokenizer).encode([context], [target])[0]


def scored(tokenizer, target, context=""):
    """[(token, the character it stands for)]"""
    one = encode(tokenizer, target, context)
    tokens = tokenizer.convert_ids_to_tokens(one.ids[one.positions].tolist())
    return list(zip(tokens, one.chars.tolist(), strict=True))


# --- BOS -------------------------------------------------------------------------------------------------------------


def test_bos_stands_first_and_is_not_scored(tokenizer):
    one = encode(tokenizer, "The fox")
    assert tokenizer.convert_ids_to_tokens(one.ids) == ["<s>", "The", "Ġfox"]
    assert one.positions.tolist() == [1, 2]
    assert one.chars.tolist() == [0, 4]  # 4: the f of " fox"


def test_bos_is_not_doubled_when_the_context_begins_with_it(tokenizer):
    with_bos, without = encode(tokenizer, " fox", "<s>The"), encode(tokenizer, " fox", "The")
    assert with_bos.ids.tolist() == without.ids.tolist() == encode(tokenizer, "The fox").ids.tolist()
    assert with_bos.positions.tolist() == [2]


def test_a_chat_template_that_writes_bos_gives_one_bos(chat_tokenizer):
    prompt = chat_tokenizer.apply_chat_template(
        [{"role": "user", "content": "The fox"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.startswith("<s>")
    assert encode(chat_tokenizer, "The end", prompt).ids.tolist().count(chat_tokenizer.bos_token_id) == 1


def test_without_bos_and_context_the_first_token_is_not_scored():
    tokenizer = toys.byte_level(bos=False, pad=False)
    assert scored(tokenizer, "The fox") == [("Ġfox", 4)]


def test_without_bos_a_context_lets_every_token_of_the_target_be_scored():
    tokenizer = toys.byte_level(bos=False, pad=False)
    assert scored(tokenizer, " fox and", "The") == [("Ġfox", 1), ("Ġand", 5)]


def test_gpt2_post_processor_does_not_hide_a_token(tokenizer):
    """Its trimmed offsets leave a token of white space alone empty; it counts all the same."""
    assert scored(toys.byte_level(trim_offsets=True), "  fox") == scored(tokenizer, "  fox") == [("Ġ", 2), ("Ġfox", 2)]


# --- the border ------------------------------------------------------------------------------------------------------


def test_a_token_that_straddles_the_border_belongs_to_the_target(tokenizer):
    assert scored(tokenizer, "ox and", "The f") == [("Ġfox", 0), ("Ġand", 3)]


def test_context_and_target_are_one_string(tokenizer):
    """ "upon" behind "Once " is one token with its space, which ends in the target."""
    assert scored(tokenizer, "upon a", "Once ") == [("Ġupon", 0), ("Ġa", 5)]


def test_the_context_is_not_scored(tokenizer):
    one = encode(tokenizer, " fox", "The fox and the")
    assert len(one.ids) == 6
    assert one.positions.tolist() == [5]
    assert one.chars.tolist() == [1]


# --- characters ------------------------------------------------------------------------------------------------------


def test_a_token_stands_for_its_first_visible_character(tokenizer):
    assert scored(tokenizer, "The fox") == [("The", 0), ("Ġfox", 4)]


def test_white_space_goes_to_the_next_token(tokenizer):
    assert scored(tokenizer, "The  fox") == [("The", 0), ("Ġ", 5), ("Ġfox", 5)]


def test_white_space_at_the_end_goes_to_the_last_visible_token(tokenizer):
    assert scored(tokenizer, "The fox  ") == [("The", 0), ("Ġfox", 4), ("Ġ", 4), ("Ġ", 4)]


def test_the_bytes_of_one_character_all_stand_for_it(tokenizer):
    assert [char for _, char in scored(tokenizer, "你好")] == [0, 0, 0, 1, 1, 1]


def test_the_space_that_sentencepiece_puts_in_front_stands_for_the_first_character():
    assert scored(toys.llama2_like(), "你")[0] == ("▁", 0)
    assert scored(toys.llama2_like(), "The fox") == [("▁The", 0), ("▁fox", 4)]


def test_a_normalizer_that_changes_lengths_keeps_the_places_in_the_text():
    assert [char for _, char in scored(toys.normalizing(), "½ﬁ!")] == [0] * len("1⁄2".encode()) + [1, 1, 2]


@pytest.mark.parametrize("target", ["", " ", "\n \t", "\u3000\xa0"])
def test_a_blank_target_has_no_scored_token(any_tokenizer, target):
    assert scored(any_tokenizer, target, "The fox") == []
    assert scored(any_tokenizer, target) == []


def test_white_space_beside_nothing_that_is_scored_is_not_scored_either():
    assert scored(toys.byte_level(), "<s> ") == []
    assert scored(toys.byte_level(bos=False, pad=False), "The ") == []  # "The" is the first token


# --- special tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", ["<s>", "</s>", "<pad>"])
def test_special_tokens_in_the_text_are_read_and_not_scored(tokenizer, special):
    one = encode(tokenizer, f"The{special} fox{special}")
    assert tokenizer.convert_ids_to_tokens(one.ids) == ["<s>", "The", special, "Ġfox", special]
    assert one.positions.tolist() == [1, 3]


def test_special_tokens_added_later_are_not_scored():
    tokenizer = toys.byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    assert scored(tokenizer, "The<think> fox") == [("The", 0), ("Ġfox", 11)]


def test_ordinary_added_tokens_are_scored():
    tokenizer = toys.byte_level()
    tokenizer.add_tokens(["fennec"])
    assert scored(tokenizer, "The fennec") == [("The", 0), ("Ġ", 4), ("fennec", 4)]


def test_ids_need_not_be_numbered_through():
    tokenizer = toys.whole_words()
    tokenizer.backend_tokenizer.model = models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 9, "fox": 511}, "<unk>")
    assert encode(tokenizer, "fox </s> fox").ids.tolist() == [0, 511, 1, 511]
    assert scored(tokenizer, "fox </s> fox") == [("fox", 0), ("fox", 9)]


def test_the_special_tokens_of_the_tokenizers_own_template_are_left_out():
    """A post-processor that adds BOS and EOS, as Llama 3's does, adds none here."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = toys.byte_level()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "The fox").ids) == ["<s>", "The", "Ġfox"]


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="ByT5Tokenizer is a slow tokenizer"):
        TextEncoder(ByT5Tokenizer())


def test_truncation_and_padding_of_the_tokenizer_are_neither_used_nor_lost():
    tokenizer = toys.byte_level()
    tokenizer("The fox and the crow", truncation=True, max_length=2, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2
    assert len(encode(tokenizer, "The fox and the crow").ids) == 6
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2
    assert tokenizer.backend_tokenizer.padding is not None


def test_no_text_gives_nothing(tokenizer):
    assert TextEncoder(tokenizer).encode([], []) == []


# --- any text --------------------------------------------------------------------------------------------------------


def _place_telling_model(input_ids):
    """A model whose vocabulary grows with its input, so that a token's surprisal tells its place: ln(600 + index)."""
    return SimpleNamespace(logits=torch.zeros(1, 1, 600 + input_ids.shape[1]))


@settings(max_examples=60)
@given(pairs=st.lists(st.tuples(toys.texts, toys.texts), min_size=1, max_size=3))
def test_scored_tokens_equal_the_slow_twin_among_any_neighbours(any_tokenizer, pairs):
    encoded = TextEncoder(any_tokenizer).encode([context for context, _ in pairs], [target for _, target in pairs])
    for (context, target), one in zip(pairs, encoded, strict=True):
        twin = brute_force.token_surprisals(_place_telling_model, any_tokenizer, target, context)
        assert one.chars.tolist() == [char for char, _ in twin]
        assert one.positions.tolist() == [round(np.exp(surprisal)) - 600 for _, surprisal in twin]


@given(context=toys.texts, target=toys.texts)
def test_places_ascend_and_characters_are_visible(any_tokenizer, context, target):
    one = encode(any_tokenizer, target, context)
    assert (np.diff(one.positions) > 0).all()
    assert (np.diff(one.chars) >= 0).all()
    assert (one.positions > 0).all()
    assert not any(target[char].isspace() for char in one.chars)
