"""What has shown on a GPU only, held where there is none: stand-ins take the place of its kernels and of Unsloth's."""

import sys
import types

import numpy as np
import pytest
import torch
import toys
from transformers.models.llama import modeling_llama

from mlppl.models import load_model
from mlppl.scoring import packing
from mlppl.scoring.sampling import sample_completions
from mlppl.scoring.surprisal import SurprisalScorer
from mlppl.scoring.tokens import TextEncoder
from mlppl.training.trainer import OneLineProgress

PROMPT = " ".join(toys.SENTENCES)
PAIRS = [*((PROMPT, f" {text}") for text in toys.SENTENCES), *(("", text) for text in toys.SENTENCES)]


def score(model, tokenizer):
    encoded = TextEncoder(tokenizer).encode(*zip(*PAIRS, strict=True))
    scorer = SurprisalScorer(model)
    return np.concatenate(scorer.score(encoded)), scorer


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """As torch.nn.attention.varlen's, whose kernel runs on a GPU only: causal from the last key backwards."""
    assert query.shape[1:] == key.shape[1:] == value.shape[1:]  # it groups no heads in PyTorch 2.11
    assert window_size == (-1, 0)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    outputs = []
    for q_start, q_end, k_start, k_end in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        q, k, v = (x.transpose(0, 1) for x in (query[q_start:q_end], key[k_start:k_end], value[k_start:k_end]))
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def one_kernel(monkeypatch):
    """The way that takes all spans of a layer at once, as on a GPU; returns the lengths of the keys it was given."""
    calls = []
    monkeypatch.setattr(packing, "one_kernel", lambda device, dtype: True)

    def spy(*args, **options):
        calls.append(len(args[1]))
        return varlen_attn(*args, **options)

    monkeypatch.setattr(packing, "varlen_attn", spy)
    return calls


def test_one_kernel_for_all_spans_of_a_layer_gives_the_same(tokenizer, one_kernel, monkeypatch):
    model = toys.llama()
    found, scorer = score(model, tokenizer)
    assert scorer.way == "packed"
    prompt, *texts = (len(tokenizer(text)["input_ids"]) for text in [PROMPT, *toys.SENTENCES])
    # Both layers, one call each: the prompt once as it is read, and once more before each of what follows on it; BOS
    # is shared like a prompt, and no row has its last token.
    layers = one_kernel[-2:]
    assert layers[0] == layers[1] >= prompt + sum(texts) + len(texts) * prompt
    monkeypatch.setattr(packing, "one_kernel", lambda device, dtype: False)
    expected, _ = score(model, tokenizer)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_kernel_that_groups_heads_is_given_each_key_once(tokenizer, one_kernel, monkeypatch):
    model = toys.llama()
    heads, key_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    expected, _ = score(model, tokenizer)
    given = []

    def grouping(query, key, value, *args, enable_gqa=False, **options):
        assert enable_gqa
        given.append((query.shape[1], key.shape[1], value.shape[1]))
        return varlen_attn(
            query, *(x.repeat_interleave(heads // key_heads, dim=1) for x in (key, value)), *args, **options
        )

    monkeypatch.setattr(packing, "varlen_attn", grouping)
    found, scorer = score(model, tokenizer)
    assert scorer.way == "packed" and set(given) == {(heads, key_heads, key_heads)} and heads > key_heads
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def unsloths(monkeypatch, model, flash=None):
    """Put on `model` what Unsloth's patches look like on a GPU: its attention looks up `run_attention`."""
    own = model.model.forward
    seen = []

    def fast_forward(input_ids=None, position_ids=None, packed_seq_lengths=None, **kwargs):
        # As Unsloth: what is longer than the window is cut, unless it is said to be packed.
        if packed_seq_lengths is None:
            input_ids = input_ids[:, : model.max_seq_length]
        seen.append(packed_seq_lengths)
        return own(input_ids=input_ids, position_ids=position_ids, **kwargs)

    fast_forward.__module__ = "unsloth.models.llama"
    names = {"modeling_llama": modeling_llama, "types": types, "flash": flash or {"dropout_p": 0.0, "causal": True}}
    exec(
        """
def run_attention(*, config, context, Q, K, V):
    K, V = (x.repeat_interleave(Q.shape[1] // x.shape[1], dim=1) for x in (K, V))
    return modeling_llama.torch.nn.functional.scaled_dot_product_attention(Q, K, V, is_causal=True).transpose(1, 2)

def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    Q, K, V = (layer(hidden_states).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
    Q, K = modeling_llama.apply_rotary_pos_emb(Q, K, *position_embeddings)
    config = types.SimpleNamespace(flash_varlen_kwargs=dict(flash), sdpa_kwargs=None)
    A = run_attention(config=config, context=types.SimpleNamespace(attention_mask=None), Q=Q, K=K, V=V)
    return self.o_proj(A.reshape(*hidden_states.shape[:-1], -1)), None
""",
        names,
    )
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", names["forward"])
    monkeypatch.setattr(model.model, "forward", fast_forward)
    model.max_seq_length = 128
    return seen, names


def test_unsloths_decoder_is_packed_with_one_kernel(tokenizer, one_kernel, monkeypatch):
    model = toys.llama()
    expected, _ = score(model, tokenizer)
    seen, names = unsloths(monkeypatch, model)
    own = names["run_attention"]
    found, scorer = score(model, tokenizer)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert scorer.way == "packed"
    # Said to be packed: longer than the window, it would be cut.
    assert int(seen[-1].sum()) > model.max_seq_length
    assert seen[-1].dtype == torch.int32
    assert names["run_attention"] is own


@pytest.mark.parametrize("more", [{"softcap": 50.0}, {"window_size": (127, 0)}, {"causal": False}])
def test_unsloths_attention_that_is_asked_for_more_is_not_packed(tokenizer, one_kernel, monkeypatch, more):
    model = toys.llama()
    expected, _ = score(model, tokenizer)
    unsloths(monkeypatch, model, {"dropout_p": 0.0, "causal": True, **more})
    found, scorer = score(model, tokenizer)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert scorer.way == "padded"


def test_unsloths_decoder_without_that_kernel_is_not_packed(tokenizer, monkeypatch):
    model = toys.llama()
    expected, _ = score(model, tokenizer)
    unsloths(monkeypatch, model)
    found, scorer = score(model, tokenizer)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert scorer.way == "padded"


@pytest.mark.parametrize(("asked", "window"), [(None, 512), (2048, 512), (256, 256)])
def test_unsloth_is_not_asked_to_stretch_a_models_positions(monkeypatch, asked, window):
    """On a GPU it scales RoPE for a longer window than the model's: 16 % more surprisal on the embedded model."""
    given = []

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(path, **options):
            given.append(options)
            return toys.llama(), toys.byte_level()

    monkeypatch.setitem(sys.modules, "unsloth", types.SimpleNamespace(FastLanguageModel=FastLanguageModel))
    *_, reason = load_model("tiny-stories", unsloth=True, max_seq_length=asked)
    assert reason is None
    assert given[0]["max_seq_length"] == window


def test_sampling_leaves_gradient_checkpointing_as_it_was(tokenizer, monkeypatch):
    """Unsloth's `generate` turns it off and, for a model in eval mode, leaves it off."""
    model = toys.llama()
    model.gradient_checkpointing_enable()
    before = {name: getattr(module, "gradient_checkpointing", None) for name, module in model.named_modules()}
    assert any(value is True for value in before.values())
    own = model.generate

    def generate(**options):
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        return own(**options)

    monkeypatch.setattr(model, "generate", generate)
    sample_completions(model, tokenizer, ["The fox"], max_new_tokens=2)
    after = {name: getattr(module, "gradient_checkpointing", None) for name, module in model.named_modules()}
    assert after == before


def test_a_log_without_entropy(capsys):
    """Unsloth's trainer computes none on a GPU."""
    lines = []
    progress = OneLineProgress()
    progress.training_bar = types.SimpleNamespace(write=lines.append)
    logs = {"reward": 0.5, "reward_std": 0.25, "completions/mean_length": 55.0}
    logs |= {f"reward_{level}": -1.0 for level in ("word", "phrase", "sentence")}
    state = types.SimpleNamespace(global_step=10)
    progress.on_log(None, state, None, logs=logs)
    progress.on_log(None, state, None, logs={**logs, "entropy": 3.375})
    levels = "word -1.0 %, phrase -1.0 %, sentence -1.0 %, 55 tokens"
    assert lines == [
        f"step 10: reward 0.500 (spread 0.250), {levels}",
        f"step 10: reward 0.500 (spread 0.250), {levels}, entropy 3.38",
    ]
