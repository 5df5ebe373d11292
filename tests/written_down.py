"""A reward whose scorer's perplexities are written down in the test."""

import numpy as np
import toys
from heard import Heard

from multi_level_ppl_trl import LEVELS

MODEL, TOKENIZER = toys.llama(), toys.byte_level(chat=True)
COLUMNS = {f"baseline_{level}": [10.0] for level in LEVELS}


def levels(value):
    """A baseline that is the same at every level."""
    return dict.fromkeys(LEVELS, value)


def reward(perplexities, **options):
    """A reward whose scorer gives the perplexities written down, by (context, text) or by text: a number or three."""
    function = Heard(MODEL, TOKENIZER, **options)
    function.asked = []

    def score_pairs(model, pairs):
        assert model is MODEL
        function.asked.append(list(pairs))
        found = [perplexities[pair] if pair in perplexities else perplexities[pair[1]] for pair in pairs]
        return np.array([np.broadcast_to(one, 3) for one in found], dtype=float).reshape(-1, 3)

    function.calculator.score_pairs = score_pairs
    return function


def of_improvement(percent, **options):
    """The reward of a completion so much below its baseline."""
    return reward({"text": 100 - percent}, baselines={"id": levels(100)}, **options)(["p"], ["text"], id=["id"])[0]


def baseline_of(function, prompts=("p",), completions=("text",), **columns):
    """The baseline that the row was measured against."""
    function(list(prompts), list(completions), **columns)
    return function.found["baselines"]["word"][0].item()
