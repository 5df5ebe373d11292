"""Phi-3-mini-128k and its like: transformers chooses a pass's factors by its longest row, so rows must not mix."""

import copy

import numpy as np
import pytest
import torch
import toys
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mlppl.scoring.surprisal import SurprisalScorer
from mlppl.scoring.tokens import Encoded

ORIGINAL, LONGEST = 16, 64
ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + index for index in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}


@pytest.fixture(scope="module")
def phi3():
    config = transformers.Phi3Config(
        **toys.SIZES, num_key_value_heads=2, max_position_embeddings=LONGEST, rope_parameters=ROPE, pad_token_id=0,
        original_max_position_embeddings=ORIGINAL, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return toys.build(transformers.Phi3ForCausalLM, config)


def text(ids, context=1):
    scored = np.arange(context, len(ids))
    return Encoded(np.array(ids), scored, scored)


def alone(model, one):
    """nats, of each scored token: one pass over the whole text, its last token too."""
    with torch.no_grad():
        logits = model(torch.tensor(one.ids[None])).logits[0].log_softmax(-1)
    return -logits[one.positions - 1, one.ids[one.positions]].double().numpy()


@pytest.fixture(scope="module", params=["packed", "padded"])
def scorer(request, phi3):
    model = copy.deepcopy(phi3)
    model.set_attn_implementation("sdpa" if request.param == "packed" else "eager")
    made = SurprisalScorer(model)
    made.score([text([1, 2, 3])])
    assert made.way == request.param
    return made


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(2, LONGEST) | st.sampled_from([15, 16, 17, 18]), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_a_texts_numbers_are_those_of_the_text_alone_on_both_sides(phi3, scorer, sizes, seed):
    rng = np.random.default_rng(seed)
    prefix = rng.integers(3, toys.VOCABULARY, 13)
    texts = [text(rng.integers(3, toys.VOCABULARY, size)) for size in sizes]
    # Completions of one prompt, to share it, on both sides.
    texts += [text([*prefix, *rng.integers(3, toys.VOCABULARY, more)], context=13) for more in (2, 3, 3, 4, 4, 9, 30)]
    for found, one in zip(scorer.score(texts), texts, strict=True):
        np.testing.assert_allclose(found, alone(phi3, one), atol=1e-4)


def test_a_prefix_is_shared_only_where_it_is_on_its_rows_side(phi3):
    model, shapes = copy.deepcopy(phi3), []
    model.set_attn_implementation("eager")

    def see(module, args, kwargs):
        if kwargs["use_cache"]:
            shapes.append(tuple(kwargs["input_ids"].shape))

    model.model.register_forward_pre_hook(see, with_kwargs=True)
    prefix = list(range(5, 17))
    texts = [text([*prefix, *range(30, 30 + more)], context=12) for more in 3 * (2, 3, 4, 5, 6, 7)]
    for found, one in zip(SurprisalScorer(model).score(texts), texts, strict=True):
        np.testing.assert_allclose(found, alone(phi3, one), atol=1e-4)
    # Behind the probe: the prefix, and behind it the nine of 14, 15 and 16 tokens.
    assert shapes[2:] == [(1, 11), (9, 5)]


def test_the_factors_matter_in_these_tests(phi3):
    """One more token of the text, and every other one has another number."""
    ids = list(range(20, 20 + ORIGINAL + 1))
    shorter, longer = (alone(phi3, text(one)) for one in (ids[:-1], ids))
    assert np.abs(shorter - longer[:-1]).max() > 0.05
