"""Products by oneDNN give MKL's numbers, and only float32 products that are large enough go there."""

import brute_force
import numpy as np
import pytest
import torch
import toys
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from mlppl.scoring import surprisal
from mlppl.scoring.surprisal import SurprisalScorer, fast_products
from mlppl.scoring.tokens import TextEncoder


def on(monkeypatch, cpu, instructions):
    for library in ("mkl", "mkldnn"):
        monkeypatch.setattr(getattr(torch.backends, library), "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": cpu})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)


@pytest.fixture
def pays(monkeypatch):
    """On any CPU."""
    on(monkeypatch, "AMD EPYC", "AVX512")


@pytest.fixture
def by_onednn(monkeypatch):
    """Shapes of the inputs that were taken to oneDNN."""
    shapes = []
    original = torch.Tensor.to_mkldnn
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda x: shapes.append(tuple(x.shape)) or original(x))
    return shapes


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_gives_the_same_numbers(model, pays, by_onednn, bias):
    layer, x = torch.nn.Linear(256, 1024, bias), torch.randn(2, 64, 256)
    with torch.inference_mode():
        expected = layer(x)
        with fast_products(model):
            found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert by_onednn == [(2, 64, 256)] and found.layout is torch.strided


def test_gpt2s_own_linear_layer_does_too(model, pays, by_onednn):
    layer, x = Conv1D(1024, 256), torch.randn(2, 64, 256)
    with torch.inference_mode():
        expected = layer(x)
        with fast_products(model):
            found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert by_onednn == [(128, 256)]


@pytest.mark.parametrize(
    "x, weight",
    [
        (torch.randn(4, 256), torch.randn(1024, 256)),
        (torch.randn(128, 256).bfloat16(), torch.randn(1024, 256).bfloat16()),
        (torch.randn(128, 256).double(), torch.randn(1024, 256).double()),
    ],
    ids=["small", "bfloat16", "float64"],
)
def test_other_products_stay_where_they_are(model, pays, by_onednn, x, weight):
    with torch.inference_mode(), fast_products(model):
        found = linear(x, weight)
    assert not by_onednn and torch.equal(found, linear(x, weight))


def test_an_added_matrix_is_no_bias(model, pays, by_onednn):
    a, x, weight = torch.randn(128, 1024), torch.randn(128, 256), torch.randn(256, 1024)
    with torch.inference_mode(), fast_products(model):
        assert torch.equal(torch.addmm(a, x, weight), a.addmm(x, weight))
        assert torch.equal(torch.addmm(a[0], x, weight, beta=2), a[0].addmm(x, weight, beta=2))
    assert not by_onednn


@pytest.mark.parametrize(
    "cpu, instructions, there",
    [
        ("AMD EPYC", "AVX512", True),
        ("AMD EPYC", "AVX2", False),
        ("Intel(R) Xeon(R) Platinum 8480+", "AVX512", False),
    ],
)
def test_mkl_keeps_what_it_is_made_for(model, monkeypatch, by_onednn, cpu, instructions, there):
    on(monkeypatch, cpu, instructions)
    with torch.inference_mode(), fast_products(model):
        linear(torch.randn(128, 256), torch.randn(1024, 256))
    assert bool(by_onednn) is there


def test_without_mkl_nothing_changes(model, monkeypatch, pays, by_onednn):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    with torch.inference_mode(), fast_products(model):
        linear(torch.randn(128, 256), torch.randn(1024, 256))
    assert not by_onednn


@pytest.mark.parametrize("which", ["model", "gpt2_model"])
def test_scores_equal_the_slow_twin(which, request, tokenizer, pays, by_onednn, monkeypatch):
    model = request.getfixturevalue(which)
    monkeypatch.setattr(surprisal, "LEAST_PRODUCT", 0)
    found = SurprisalScorer(model).score(TextEncoder(tokenizer).encode(["Once upon"] * 4, toys.SENTENCES))
    assert by_onednn
    for text, ours in zip(toys.SENTENCES, found, strict=True):
        expected = [value for _, value in brute_force.token_surprisals(model, tokenizer, text, "Once upon")]
        np.testing.assert_allclose(ours, expected, rtol=1e-4)
