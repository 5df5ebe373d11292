"""The LM head in pieces of the vocabulary, against the log-softmax of all its logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from mlppl.scoring.surprisal import Head


class Base(torch.nn.Module):
    """What `Head` asks of a model: a configuration and an LM head."""

    def __init__(self, vocabulary, bias=False, config=None, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(8, vocabulary, bias=bias, dtype=dtype)
        self.config = config or LlamaConfig(vocab_size=vocabulary)

    def get_output_embeddings(self):
        return self.head


def states(rows, dtype=torch.float32):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1)).to(dtype) * 3


def expected(base, hidden, labels, scaled=lambda logits: logits):
    logits = scaled(base.head(hidden)).double()
    return -logits.log_softmax(-1)[torch.arange(len(labels)), labels]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@given(st.integers(1, 1200), st.integers(1, 9), st.booleans(), st.integers(1, 1 << 13), st.data())
def test_pieces_of_any_size_equal_the_whole(vocabulary, rows, bias, slice_bytes, data):
    base = Base(vocabulary, bias)
    labels = torch.tensor(data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=rows, max_size=rows)))
    found = Head(base, slice_bytes).surprisal(states(rows), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected(base, states(rows), labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hooked", [False, True])
def test_states_that_predict_several_labels(hooked):
    base = Base(600)
    if hooked:
        base.head.register_forward_hook(lambda *args: None)
    labels, read = torch.arange(0, 600, 100), torch.tensor([0, 0, 2, 0, 1, 1])
    found = Head(base, 1).surprisal(states(3), labels, read).double()
    torch.testing.assert_close(found, expected(base, states(3)[read], labels), rtol=1e-5, atol=1e-5)


def test_the_first_and_last_token_of_every_piece():
    base = Base(1000)
    labels = torch.tensor([0, 255, 256, 511, 512, 767, 768, 999])  # pieces are at least 256 tokens wide
    found = Head(base, 1).surprisal(states(8), labels)
    torch.testing.assert_close(found.double(), expected(base, states(8), labels), rtol=1e-5, atol=1e-5)


SCALED = {
    "Cohere": (CohereConfig(vocab_size=600, logit_scale=0.3), lambda logits: logits * 0.3),
    "Granite": (GraniteConfig(vocab_size=600, logits_scaling=4.0), lambda logits: logits / 4),
    "Gemma": (Gemma2Config(vocab_size=600, final_logit_softcapping=2.0), lambda logits: torch.tanh(logits / 2) * 2),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("hooked", [False, True])
def test_scaled_logits(name, hooked):
    config, scaled = SCALED[name]
    base = Base(600, config=config)
    labels = torch.arange(0, 600, 100)
    wanted = expected(base, states(6), labels, scaled)
    if hooked:
        base.head.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(Head(base, 1).surprisal(states(6), labels).double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_log_sum_of_bfloat16_logits_is_taken_in_float32():
    base = Base(600, dtype=torch.bfloat16)
    hidden, labels = states(6, torch.bfloat16), torch.arange(0, 600, 100)
    found = Head(base, 1 << 20).surprisal(hidden, labels).double()
    torch.testing.assert_close(found, expected(base, hidden, labels), rtol=1e-5, atol=1e-5)


def test_a_token_that_is_ruled_out_takes_no_probability_and_nan_stays_nan():
    base = Base(600, bias=True)
    base.head.bias[256:] = -torch.inf  # a whole piece of them, and more
    labels = torch.tensor([3, 300])
    found = Head(base, 1).surprisal(states(2), labels)
    torch.testing.assert_close(found[0].double(), expected(base, states(2), labels)[0], rtol=1e-5, atol=1e-5)
    assert found[1] == torch.inf
    base.head.weight[500] = torch.nan
    assert Head(base, 1).surprisal(states(2), labels).isnan().all()
