"""The forward pass against the slow twin: architectures, windows, shared prefixes, adapters, dtypes, memory."""

import copy
import functools
import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import brute_force
import numpy as np
import peft
import pytest
import torch
import toys
import transformers
import zoo
from peft.tuners.lora import LoraLayer
from training_runs import EXAMPLES
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlppl.errors import InputError
from mlppl.scoring import packing, surprisal
from mlppl.scoring.batching import Group
from mlppl.scoring.calculator import MultiLevelPPLCalculator
from mlppl.scoring.differences import differences
from mlppl.scoring.frozen import base_of
from mlppl.scoring.surprisal import Head, SurprisalScorer, difference
from mlppl.scoring.tokens import TextEncoder

PROMPT = (
    "Once upon a time there was a small fox, and it lived near the old mill. Mr. Brown paid 1,000 dollars for a house. "
    "They walked home together, slowly, under the stars."
)
COMPLETIONS = [" The end.", " The fox said nothing at all.", " Then they walked home.", " It was far too much!"]
GROUP = [(PROMPT, completion) for completion in COMPLETIONS]  # long enough a prompt to be worth sharing
MIXED = [("", "The fox."), ("Once upon", " a time there was a fox, and it lived near the mill."), ("", "a"), ("x", "")]


def score(model, tokenizer, pairs, scorer=None):
    encoded = TextEncoder(tokenizer).encode([context for context, _ in pairs], [target for _, target in pairs])
    return (scorer or SurprisalScorer(model)).score(encoded)


def twin(model, tokenizer, pairs, window=None):
    """The same from one forward pass a token."""
    return [
        np.array([value for _, value in brute_force.token_surprisals(model, tokenizer, target, context, window)])
        for context, target in pairs
    ]


def assert_close(found, expected, rtol=1e-4):
    assert [len(one) for one in found] == [len(one) for one in expected]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=rtol)


class Spy:
    """Counts the tokens that go through a model's decoder, padding included, and the passes with keys and values."""

    def __init__(self, decoder):
        self.shapes, self.cached = [], 0
        decoder.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, kwargs):
        self.shapes.append(tuple([*args, kwargs.get("input_ids")][0].shape))
        self.cached += bool(kwargs.get("use_cache"))

    @property
    def tokens(self):
        return sum(rows * length for rows, length in self.shapes)


# --- architectures ---------------------------------------------------------------------------------------------------

KV = {**toys.SIZES, "num_key_value_heads": 2}
OPT = {**toys.SIZES, "ffn_dim": 96, "word_embed_proj_dim": 32}
FALCON_H1 = {**KV, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}

# name -> (configuration, whether its keys and values can be shared)
ARCHITECTURES = {
    "Llama": (KV, True),
    "Qwen2": (KV, True),
    "GPTNeoX": (toys.SIZES, True),
    "Phi": (toys.SIZES, True),
    "OPT": (OPT, True),  # projects its last hidden state
    "Bloom": ({"vocab_size": toys.VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}, True),  # no window
    "Cohere": ({**KV, "logit_scale": 0.3, "eos_token_id": 1}, True),
    "Granite": ({**KV, "logits_scaling": 4.0, "attention_multiplier": 0.2}, True),
    "Gemma2": ({**KV, "head_dim": 16, "final_logit_softcapping": 0.5, "sliding_window": 8}, False),
    "Mistral": ({**KV, "sliding_window": 8}, False),
    "Mamba": ({"vocab_size": toys.VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, False),
    "FalconH1": ({**FALCON_H1, "mamba_chunk_size": 8, "lm_head_multiplier": 0.25}, False),
}


def architecture(name):
    config, _ = ARCHITECTURES[name]
    return toys.build(getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")(**config))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_the_slow_twin(name, tokenizer, caplog):
    model = architecture(name)
    spy = Spy(getattr(model, model.base_model_prefix))
    scorer = SurprisalScorer(model)
    together = score(model, tokenizer, GROUP, scorer)
    tokens = spy.tokens
    assert_close(together, twin(model, tokenizer, GROUP))
    assert_close(score(model, tokenizer, GROUP[1:2], scorer), together[1:2])
    assert_close(score(model, tokenizer, MIXED, scorer), twin(model, tokenizer, MIXED))
    for pairs in [[(SHOWN[:150] + prompt, " ran.") for prompt in ("Tom", "Anna", one)] for one in ("Sam", "Lily")]:
        assert_close(score(model, tokenizer, pairs, scorer), twin(model, tokenizer, pairs))

    prompt = len(tokenizer(PROMPT)["input_ids"])
    shares = ARCHITECTURES[name][1]
    assert (tokens < 2 * prompt + 150) == shares  # once instead of four times, and two probes
    warnings = [record.getMessage() for record in caplog.records if "decoder + LM head" in record.getMessage()]
    assert not warnings  # the scaling of the logits is known of each


def test_gpt2_equals_the_slow_twin(gpt2_model, tokenizer):
    for pairs in (GROUP, MIXED):
        assert_close(score(gpt2_model, tokenizer, pairs), twin(gpt2_model, tokenizer, pairs))


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("Cohere", "logit_scale"),
        ("Granite", "logits_scaling"),
        ("Gemma2", "final_logit_softcapping"),
        ("FalconH1", "lm_head_multiplier"),
    ],
)
def test_the_scaling_of_logits_matters_in_these_tests(name, attribute, tokenizer):
    model = architecture(name)
    scaled = np.concatenate(score(model, tokenizer, MIXED))
    setattr(model.config, attribute, 1e9 if name == "Gemma2" else 1.0)
    if name == "Cohere":
        model.logit_scale = 1.0
    if name == "FalconH1":
        model.model.lm_head_multiplier = 1.0
    assert np.abs(np.concatenate(score(model, tokenizer, MIXED)) - scaled).mean() > 0.01


def test_a_scaling_of_logits_that_is_unknown_here_falls_back_to_the_models_own(model, tokenizer, monkeypatch, caplog):
    expected = twin(model, tokenizer, MIXED)
    monkeypatch.setattr(Head, "logits", lambda self, hidden: self.layer(hidden).float() * 1.5)
    assert_close(score(model, tokenizer, MIXED), expected)
    assert "LlamaForCausalLM does not compute its logits as decoder + LM head" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.9, 0.98])
def test_a_head_that_is_a_little_wrong_does_not_pass(dtype, factor, tokenizer, monkeypatch, caplog):
    """Ten percent, or two, are far beyond what one product rounds in any precision; the right one passes in each."""
    model = architecture("FalconH1").to(dtype)
    model.model.lm_head_multiplier *= factor
    right = SurprisalScorer(architecture("FalconH1").to(dtype))
    score(right.model, tokenizer, MIXED, right)
    scorer = SurprisalScorer(model)
    found = score(model, tokenizer, MIXED, scorer)
    assert (right.way, scorer.way) == ("padded", "by its own logits")
    assert "does not compute its logits as decoder + LM head" in caplog.text
    # As its own logits have it, not 10 % off throughout.
    expected = np.concatenate(twin(model, tokenizer, MIXED))
    assert np.abs(np.concatenate(found) - expected).mean() < (1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bidirectional_model_is_no_language_model(dtype, tokenizer):
    config = transformers.BertConfig(**toys.SIZES)
    with pytest.raises(InputError, match="BertLMHeadModel is not causal"):
        score(toys.build(transformers.BertLMHeadModel, config).to(dtype), tokenizer, MIXED)
    config.is_decoder = True
    causal = toys.build(transformers.BertLMHeadModel, config)
    assert_close(score(causal, tokenizer, MIXED), twin(causal, tokenizer, MIXED))


def test_an_encoder_decoder_is_refused_by_name():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = transformers.BartConfig(vocab_size=toys.VOCABULARY, **sizes)
    with pytest.raises(InputError, match="BartForConditionalGeneration is an encoder-decoder"):
        SurprisalScorer(toys.build(transformers.BartForConditionalGeneration, config))
    SurprisalScorer(toys.build(transformers.BartForCausalLM, config))


def test_a_token_that_the_model_has_no_logit_for_is_refused(model):
    """At the end of a text no embedding misses it."""
    tokenizer = toys.byte_level()
    tokenizer.add_tokens([f"<{number}>" for number in range(toys.VOCABULARY - len(tokenizer) + 1)])
    text = f"a fox {tokenizer.convert_ids_to_tokens(toys.VOCABULARY)}"
    with pytest.raises(InputError, match="token number 512, and the model knows 0 to 511"):
        MultiLevelPPLCalculator(tokenizer).compute_all_levels(model, [text])


def ruling_out(model, lowest, tokens=1):
    """The model, with tokens that it never writes."""
    bias = torch.zeros(toys.VOCABULARY)
    bias[3 : 3 + tokens] = lowest
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(bias if head.bias is None else head.bias.detach() + bias)
    return model


LOWEST = [-np.inf, *(torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16, torch.float16)), -1e4, -500.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 1000])
@pytest.mark.parametrize("lowest", LOWEST)
def test_a_token_that_is_ruled_out_hides_no_look_at_later_tokens(lowest, tokens, dtype, tokenizer):
    """Minus infinity minus itself is NaN, and the lowest numbers make every other difference small."""
    bert = toys.build(transformers.BertLMHeadModel, transformers.BertConfig(**toys.SIZES))
    with pytest.raises(InputError, match="BertLMHeadModel is not causal"):
        score(ruling_out(bert, lowest, tokens).to(dtype), tokenizer, MIXED)


@pytest.mark.parametrize("lowest", LOWEST)
def test_a_causal_model_that_rules_out_a_token_is_scored_the_fast_way(lowest, tokenizer, caplog):
    model = ruling_out(toys.llama(), lowest)
    scorer = SurprisalScorer(model)
    assert_close(score(model, tokenizer, GROUP, scorer), twin(model, tokenizer, GROUP))
    assert scorer.way == "packed" and not caplog.records


def test_how_far_logits_are_from_others():
    b = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    assert difference(b + 7, b) == pytest.approx(0, abs=1e-6)
    assert difference(b * 1.1, b) == pytest.approx(0.1, rel=1e-5)
    ruled_out = torch.tensor([[1.0, -np.inf, 3.0, 6.0]])
    assert difference(ruled_out * 1.1, ruled_out) == pytest.approx(0.1, rel=1e-5)
    for wrong in (torch.nan, -np.inf, np.inf):
        assert difference(torch.tensor([[1.0, 2.0, wrong, 6.0]]), b) == np.inf
        assert difference(b, torch.tensor([[1.0, 2.0, wrong, 6.0]])) == np.inf
    for both in (torch.nan, np.inf):
        assert difference(torch.full((1, 4), both), torch.full((1, 4), both)) == np.inf


def test_a_probe_that_raises_is_a_probe_that_does_not_pass(tokenizer, monkeypatch):
    """Falcon looks its attention up by name, so no other function can stand in for it."""
    config = transformers.FalconConfig(
        vocab_size=toys.VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True
    )
    falcon = toys.build(transformers.FalconForCausalLM, config)
    for pairs in (MIXED, GROUP):
        assert_close(score(falcon, tokenizer, pairs), twin(falcon, tokenizer, pairs))


def test_a_probe_that_runs_out_of_memory_is_asked_again(model, tokenizer):
    scorer, forward = SurprisalScorer(model), model.model.forward
    pairs = [("", "The fox."), ("", "a")]
    asked = with_memory_for(model, 14)  # the pack of the probe has a token more, every other one fewer
    first = score(model, tokenizer, pairs, scorer)
    assert scorer.way == "padded" and (1, 15) in asked
    model.model.forward = forward
    assert_close(score(model, tokenizer, pairs, scorer), first)
    assert scorer.way == "packed"


def test_what_stands_in_the_way_of_packs_is_said_once(tokenizer, caplog):
    model = toys.llama()
    score(model, tokenizer, MIXED)
    assert not caplog.records
    model.set_attn_implementation("eager")
    scorer = SurprisalScorer(model)
    for _ in range(2):
        score(model, tokenizer, MIXED, scorer)
    [record] = caplog.records
    assert "LlamaForCausalLM runs with attention 'eager'" in record.getMessage()


def test_a_head_that_is_narrower_than_its_decoder(tokenizer):
    model = toys.build(
        transformers.ElectraForCausalLM,
        transformers.ElectraConfig(**toys.SIZES, embedding_size=32, is_decoder=True),
    )
    assert_close(score(model, tokenizer, MIXED), twin(model, tokenizer, MIXED))
    # RemBERT's is, too; before transformers 5.24 it attends to both sides whatever its configuration says.
    sizes = {**toys.SIZES, "input_embedding_size": 32, "output_embedding_size": 48, "is_decoder": True}
    rembert = toys.build(transformers.RemBertForCausalLM, transformers.RemBertConfig(**sizes))
    try:
        found = score(rembert, tokenizer, MIXED)
    except InputError as error:
        assert "RemBertForCausalLM is not causal" in str(error)
    else:
        assert_close(found, twin(rembert, tokenizer, MIXED))


WINDOWS = {
    "Roberta": ({**toys.SIZES, "is_decoder": True, "max_position_embeddings": 18, "pad_token_id": 1}, 16),
    "Mpt": ({"vocab_size": toys.VOCABULARY, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 16}, 16),
    "ProphetNet": (
        {"vocab_size": toys.VOCABULARY, "hidden_size": 64, "num_decoder_layers": 2, "num_decoder_attention_heads": 4,
         "decoder_ffn_dim": 64, "max_position_embeddings": 17, "is_encoder_decoder": False, "pad_token_id": 0}, 15,
    ),
    "Whisper": (
        {"vocab_size": toys.VOCABULARY, "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4,
         "decoder_ffn_dim": 64, "max_target_positions": 16, "pad_token_id": 0}, 16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_texts_beyond_the_window_that_an_architecture_calls_by_a_name_of_its_own(name, tokenizer):
    sizes, window = WINDOWS[name]
    model = toys.build(getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")(**sizes))
    scorer = SurprisalScorer(model)
    assert scorer.window == window
    pairs = [*MIXED, ("", PROMPT)]
    found = score(model, tokenizer, pairs, scorer)
    if name != "ProphetNet":  # whose numbers depend on the length of the whole text
        assert_close(found, twin(model, tokenizer, pairs, window))
        return
    short = [pairs[0], ("The fox said:", " I am."), ("", "They walked")]
    assert_close(score(model, tokenizer, short, scorer), [alone(model, tokenizer, *pair) for pair in short])


def alone(model, tokenizer, context, text):
    """Of a text that fits into the window: one pass over all of it."""
    [one] = TextEncoder(tokenizer).encode([context], [text])
    with torch.no_grad():
        logits = model(torch.from_numpy(one.ids[None])).logits[0].log_softmax(-1)
    return -logits[one.positions - 1, one.ids[one.positions]].double().numpy()


def test_a_compiled_model_gives_the_numbers_of_the_model_in_it(model, tokenizer):
    compiled = torch.compile(model, backend="eager")
    assert base_of(compiled) is model
    assert_close(score(compiled, tokenizer, MIXED), score(model, tokenizer, MIXED), rtol=1e-6)


# --- windows ---------------------------------------------------------------------------------------------------------

LONG = "Once upon a time there was a small fox, and it lived near the old mill. The fox said: I am hungry."


@pytest.mark.parametrize("window", [8, 13, 16, 31])
@pytest.mark.parametrize("context", ["", "Mr. Brown paid 1,000 dollars for a house. It was far too much, wasn't it? "])
def test_a_text_longer_than_the_window_equals_the_slow_twin(tokenizer, window, context):
    model = toys.llama(max_position_embeddings=window)
    pairs = [(context, LONG), ("", "The fox."), (context, "The end. " + LONG)]
    found = score(model, tokenizer, pairs)
    assert len(found[0]) == len(tokenizer(context + LONG)["input_ids"]) - len(tokenizer(context)["input_ids"])
    assert_close(found, twin(model, tokenizer, pairs, window))


def test_learned_positions_are_never_exceeded(tokenizer):
    model = toys.gpt2(n_positions=16)
    expected = twin(model, tokenizer, [("", LONG)], 16)
    positions = []
    model.transformer.wpe.register_forward_pre_hook(lambda module, args: positions.append(int(args[0].max())))
    assert_close(score(model, tokenizer, [("", LONG)]), expected)
    assert max(positions) == 14  # the 16th token of a window predicts nothing in it


def test_unsloths_shorter_window_counts(tokenizer):
    model = toys.llama()
    model.max_seq_length = 16
    assert SurprisalScorer(model).window == 16
    assert_close(score(model, tokenizer, [("", LONG)]), twin(model, tokenizer, [("", LONG)], 16))


def test_a_model_without_a_window_has_none():
    assert SurprisalScorer(architecture("Mamba")).window is None


def test_an_empty_text_for_a_model_without_window_and_a_tokenizer_without_bos():
    found = score(architecture("Mamba"), toys.byte_level(bos=False), [("", ""), ("", "a")])
    assert [len(one) for one in found] == [0, 0]


# --- shared prefixes -------------------------------------------------------------------------------------------------


class WithoutSharing(SurprisalScorer):
    def groups(self, rows):
        return [Group(0, rows)]

    def behind(self, groups):
        return [(np.array([], dtype=np.int64), groups)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # packed end to end; padded, with a cache of keys and values
@pytest.mark.parametrize("limits", [{}, {"batch_size": 1}, {"max_batch_tokens": 24}, {"max_batch_tokens": 300}])
def test_sharing_a_prefix_changes_no_number(tokenizer, limits, attention):
    model = toys.llama()
    pairs = [*GROUP, *MIXED, (PROMPT[:150], " The fox."), *GROUP[:1]]
    expected = score(model, tokenizer, pairs, WithoutSharing(model))
    model.set_attn_implementation(attention)
    shared, spy = SurprisalScorer(model, **limits), Spy(model.model)
    assert_close(score(model, tokenizer, pairs, shared), expected)
    cached = spy.cached
    assert_close(score(model, tokenizer, pairs, WithoutSharing(model, **limits)), expected)
    assert spy.cached == cached and (cached > 2) == (attention == "eager")  # the probe of the cache is two passes
    assert shared.way == ("packed" if attention == "sdpa" else "padded")
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_shared_prompt_runs_once(tokenizer, attention):
    model = toys.llama()
    model.set_attn_implementation(attention)
    scorer = SurprisalScorer(model)
    score(
        model, tokenizer, [(f"Lily! {PROMPT}", completion) for completion in COMPLETIONS], scorer
    )  # the probes have run
    spy = Spy(model.model)
    score(model, tokenizer, GROUP, scorer)
    lengths = [len(tokenizer(completion)["input_ids"]) for completion in COMPLETIONS]
    prompt = len(tokenizer(PROMPT)["input_ids"])
    # BOS and the prompt; then each completion without its last token behind what is shared; padded to the longest
    # where there is a cache, which goes on from the prompt's last token, and has BOS from the call before
    packed, cached = [(1, 1 + prompt + sum(lengths) - 4)], [(1, prompt - 1), (4, max(lengths))]
    assert spy.shapes == (packed if attention == "sdpa" else cached)


SHOWN = "Lily had a red hat. It was too big. She gave it to the dog. " * 12
PROMPTS = [f"{SHOWN}{name} had a {thing}, and" for name in ("Tom", "Anna", "Sam") for thing in ("blue ball", "cat")]


def behind_examples(*numbers):
    return [(PROMPTS[number], completion) for number in numbers for completion in COMPLETIONS]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("limits", [{}, {"batch_size": 2}, {"max_batch_tokens": 40}, {"max_batch_tokens": 400}])
def test_what_all_prompts_begin_with_runs_once_for_all_calls(tokenizer, limits, attention):
    model = toys.llama(max_position_embeddings=2048)
    calls = [behind_examples(0, 1), [*GROUP, *behind_examples(2)], behind_examples(3, 4, 5), behind_examples(5)[:1]]
    expected = [score(model, tokenizer, pairs, WithoutSharing(model)) for pairs in calls]
    model.set_attn_implementation(attention)
    scorer, spy = SurprisalScorer(model, **limits), Spy(model.model)
    examples = len(tokenizer(SHOWN)["input_ids"])
    for number, (pairs, numbers) in enumerate(zip(calls, expected, strict=True)):
        spy.shapes.clear()
        assert_close(score(model, tokenizer, pairs, scorer), numbers)
        if number == 2 or (number == 3 and attention == "sdpa"):  # a single row runs whole where it is padded
            assert spy.tokens < examples


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("adapters", [False, True])
def test_what_ran_before_is_forgotten_when_the_weights_change(tokenizer, attention, adapters):
    model = toys.llama(max_position_embeddings=2048)
    if adapters:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False))
    model.set_attn_implementation(attention)
    scorer = SurprisalScorer(model, adapters=adapters)
    before = score(model, tokenizer, behind_examples(0, 1), scorer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    after = score(model, tokenizer, behind_examples(0, 1), scorer)
    assert_close(after, score(model, tokenizer, behind_examples(0, 1), WithoutSharing(model, adapters=adapters)))
    assert np.abs(np.concatenate(after) - np.concatenate(before)).max() > 0.01


def test_a_copy_of_a_scorer_has_nothing_of_what_ran_before(tokenizer):
    model = toys.llama(max_position_embeddings=2048)
    scorer = SurprisalScorer(model)
    expected = score(model, tokenizer, behind_examples(0, 1), scorer)
    copied = copy.deepcopy(scorer)
    spy = Spy(copied.model.model)
    assert_close(score(model, tokenizer, behind_examples(0, 1), copied), expected)
    assert spy.tokens > len(tokenizer(SHOWN)["input_ids"])


def test_a_pack_has_no_padding(tokenizer):
    model = toys.llama()
    scorer = SurprisalScorer(model)
    score(model, tokenizer, MIXED, scorer)
    spy = Spy(model.model)
    found = score(model, tokenizer, MIXED[:3], scorer)
    context = len(tokenizer(MIXED[1][0])["input_ids"])
    assert spy.shapes == [(1, sum(map(len, found)) + context)]


def test_a_model_whose_packed_rows_see_their_neighbours_is_not_packed(tokenizer, monkeypatch):
    model = toys.llama()
    expected = twin(model, tokenizer, GROUP)
    # Attention over the whole sequence, whatever the spans say.
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, packing.IMPLEMENTATION, ALL_ATTENTION_FUNCTIONS["sdpa"])
    scorer = SurprisalScorer(model)
    assert_close(score(model, tokenizer, GROUP, scorer), expected)
    assert scorer.way == "padded"


def test_the_attention_is_put_back_after_an_exception(tokenizer, monkeypatch):
    model = toys.llama()
    scorer = SurprisalScorer(model)
    score(model, tokenizer, MIXED, scorer)
    monkeypatch.setattr(model.model.norm, "forward", lambda hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(model, tokenizer, MIXED, scorer)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["paged|sdpa", "paged|eager"])
@pytest.mark.parametrize("compared", [True, False], ids=["already compared", "for the first time"])
def test_what_continuous_batching_leaves_in_the_attention_setting_changes_no_number(tokenizer, attention, compared):
    """`generate_batch` generates with paged attention, and some versions of transformers leave it on. Without a paged
    cache it sees later tokens, or raises."""
    model = toys.llama()
    scorer = SurprisalScorer(model)
    if compared:
        score(model, tokenizer, GROUP, scorer)
    expected = twin(model, tokenizer, GROUP)
    model.config._attn_implementation = attention
    assert_close(score(model, tokenizer, GROUP, scorer), expected)
    assert model.config._attn_implementation == attention


def test_scoring_between_two_calls_of_continuous_batching_changes_neither(tokenizer):
    model, settings = toys.llama(), GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=4, block_size=32, max_batch_tokens=32)  # else 90 % of the memory

    def generated():
        found = model.generate_batch([[5, 6, 7], [8, 9]], settings, small)
        return [found[key].generated_tokens for key in sorted(found)]

    expected, scored = generated(), score(toys.llama(), tokenizer, GROUP)
    assert_close(score(model, tokenizer, GROUP), scored)
    assert generated() == expected
    assert_close(score(model, tokenizer, GROUP), scored)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_threads_that_score_with_one_model_at_once_change_no_number(tokenizer, attention):
    """As AsyncGRPO calls rewards. While it scores, a model has its adapters off and another attention."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(toys.llama(), peft.LoraConfig(**LORA)).train()
    adapted.base_model.model.set_attn_implementation(attention)
    expected = score(adapted, tokenizer, GROUP)
    scorer = SurprisalScorer(adapted)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: score(adapted, tokenizer, GROUP, scorer), range(24)):
            assert_close(found, expected, rtol=1e-6)
    assert adapted.training and not any(one.disable_adapters for one in adapted.modules() if isinstance(one, LoraLayer))


def test_references_behind_a_prompt_and_different_plans_equal_the_slow_twin(model, tokenizer):
    pairs = [(PROMPT + plan, " The fox was hungry.") for plan in ("", *COMPLETIONS[:2])]
    assert_close(score(model, tokenizer, pairs), twin(model, tokenizer, pairs))


def test_a_cache_that_does_not_continue_as_the_model_does_is_not_used(tokenizer, monkeypatch):
    model = toys.llama()
    model.set_attn_implementation("eager")
    expected = twin(model, tokenizer, GROUP)
    update = packing.PrefixLayer.update
    monkeypatch.setattr(packing.PrefixLayer, "update", lambda self, k, v, *rest: update(self, 1.1 * k, v, *rest))
    scorer, spy = SurprisalScorer(model), Spy(model.model)
    assert_close(score(model, tokenizer, GROUP, scorer), expected)
    assert spy.cached == 2  # its probe


# --- adapters --------------------------------------------------------------------------------------------------------

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "lm_head"], "lora_dropout": 0.5, "init_lora_weights": False}


def by_get_peft_model(**changes):
    return peft.get_peft_model(toys.llama(), peft.LoraConfig(**{**LORA, **changes}))


def in_place(**changes):
    return peft.inject_adapter_in_model(peft.LoraConfig(**{**LORA, **changes}), toys.llama())


@pytest.mark.parametrize("wrap", [by_get_peft_model, in_place])
@pytest.mark.parametrize("train", [False, True])
def test_an_adapter_is_off_while_its_base_model_scores(wrap, train, model, tokenizer):
    torch.manual_seed(0)
    adapted = wrap().train(train)
    with torch.no_grad():
        assert (adapted(torch.tensor([[5, 6, 7]])).logits - model(torch.tensor([[5, 6, 7]])).logits).abs().max() > 0.1
    for pairs in (GROUP, MIXED):
        assert_close(score(adapted, tokenizer, pairs), score(model, tokenizer, pairs), rtol=1e-6)


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_modules_to_save_are_off_too(saved, model, tokenizer):
    adapted = by_get_peft_model(target_modules=["q_proj"], modules_to_save=[saved])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    assert_close(score(adapted, tokenizer, GROUP), score(model, tokenizer, GROUP), rtol=1e-6)


def test_an_adapter_that_was_off_stays_off(model, tokenizer):
    adapted = by_get_peft_model()
    with adapted.disable_adapter():
        assert_close(score(adapted, tokenizer, MIXED), score(model, tokenizer, MIXED), rtol=1e-6)


def test_dropout_is_off_in_train_mode(tokenizer):
    model = toys.gpt2(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = score(model, tokenizer, MIXED)
    assert_close(score(model.train(), tokenizer, MIXED), expected, rtol=1e-6)


def test_gradient_checkpointing_and_a_callers_autocast_change_nothing(tokenizer):
    model = toys.llama()
    expected = score(model, tokenizer, GROUP)
    model.train().gradient_checkpointing_enable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(score(model, tokenizer, GROUP), expected, rtol=1e-6)


# --- dtypes ----------------------------------------------------------------------------------------------------------


def test_bfloat16_is_close_to_float32_alone_and_in_a_group(model, tokenizer):
    half = toys.llama().to(torch.bfloat16)
    expected = np.concatenate(score(model, tokenizer, GROUP))
    for found in (score(half, tokenizer, GROUP), [score(half, tokenizer, [pair])[0] for pair in GROUP]):
        difference = np.abs(np.concatenate(found) - expected)
        assert 0 < difference.mean() < 0.02  # of about 6 nats


def test_the_log_softmax_of_bfloat16_logits_is_taken_in_float32(tokenizer):
    half = toys.llama().to(torch.bfloat16)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("The fox said nothing at all.")["input_ids"]]])
    with torch.no_grad():
        logits = half(ids[:, :-1]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:], reduction="none")
    # in bfloat16, with 8 bits, 6 nats are exact to 1.6e-2
    assert_close(score(half, tokenizer, [("", "The fox said nothing at all.")]), [expected.numpy()], rtol=1e-5)


def test_bitsandbytes_4bit_equals_the_slow_twin(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    )
    assert type(quantized.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    found = score(quantized, tokenizer, GROUP)
    assert_close(found, twin(quantized, tokenizer, GROUP))
    difference = np.abs(np.concatenate(found) - np.concatenate(score(model, tokenizer, GROUP))).mean()
    assert 1e-3 < difference < 0.5  # another model, though not a very different one


def test_a_nan_from_the_model_is_an_error_that_names_the_text(tokenizer):
    model = toys.llama()
    scorer = SurprisalScorer(model)
    score(model, tokenizer, MIXED, scorer)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("Ġfox")] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN for text 1 "):
        score(model, tokenizer, [("", "The end."), ("", "The fox said.")], scorer)


@pytest.mark.slow
def test_a_model_beside_unsloth_has_the_numbers_that_it_has_alone(tmp_path):
    """Unsloth patches transformers when it is imported, when it loads a model and when it adds adapters."""
    names = ("llama", "qwen3", "gemma2", "mistral")
    for name in names:
        zoo.toy(name).save_pretrained(tmp_path / name)
        toys.byte_level().save_pretrained(tmp_path / name)
    folders = ["tiny-stories", *(str(tmp_path / name) for name in names)]
    found = []
    for where in ("alone", "beside"):
        script = Path(__file__).with_name("score_beside_unsloth.py")
        environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
        command = [sys.executable, script, where, *folders]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert [list(one) for one in found] == [folders, folders]
    for folder in folders:
        alone, beside = (one[folder] for one in found)
        assert_close(alone["surprisals"], beside["surprisals"])
        assert alone["way"] == beside["way"]
        assert differences({"model": alone["identity"]}, {"model": beside["identity"]}) == {}


# --- memory ----------------------------------------------------------------------------------------------------------


def with_memory_for(model, tokens):
    """Let the decoder run out of memory above so many tokens. Returns the shapes it was asked for."""
    asked = []
    forward = model.model.forward

    @functools.wraps(forward)  # whose parameters tell whether it can be packed
    def limited(*args, **options):
        asked.append(tuple(options["input_ids"].shape))
        if options["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of")
        return forward(*args, **options)

    model.model.forward = limited
    return asked


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pairs", [MIXED[:2] * 2 + [("", f"The fox said {n}.") for n in range(9)], GROUP])
def test_out_of_memory_halves_the_batches_and_changes_no_number(tokenizer, pairs, attention):
    model = toys.llama()
    expected = score(model, tokenizer, pairs)
    model.set_attn_implementation(attention)
    memory, asked_for = (100, 45) if pairs is GROUP else (30, 30)
    asked = with_memory_for(model, memory)
    assert_close(score(model, tokenizer, pairs), expected, rtol=1e-5)
    assert max(rows * length for rows, length in asked) > asked_for


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_budget_stays_halved(tokenizer, caplog, attention):
    model = toys.llama()
    model.set_attn_implementation(attention)
    pairs = [("", f"{n} said the fox.") for n in range(8)]  # with no more in common than BOS
    [length] = {len(tokenizer(text)["input_ids"]) for _, text in pairs}  # BOS, and all but the last token
    asked = with_memory_for(model, 4 * length)
    scorer = SurprisalScorer(model)
    with caplog.at_level(logging.WARNING):
        score(model, tokenizer, pairs, scorer)
    whole, half = ((1, 8 * length), (1, 4 * length)) if attention == "sdpa" else ((8, length), (4, length))
    assert asked[-3:] == [whole, half, half]
    assert scorer.max_batch_tokens == 8 * length // 2
    assert caplog.text.count("out of memory") == 1
    del asked[:]
    score(model, tokenizer, pairs, scorer)
    assert asked == [half, half]


def test_one_row_that_does_not_fit_raises(tokenizer):
    model = toys.llama()
    scorer = SurprisalScorer(model)
    score(model, tokenizer, MIXED, scorer)
    with_memory_for(model, 3)
    with pytest.raises(torch.OutOfMemoryError):
        score(model, tokenizer, [("", "The fox said nothing.")], scorer)


def test_another_error_is_not_taken_for_memory(tokenizer, monkeypatch):
    model = toys.llama()
    scorer = SurprisalScorer(model)
    score(model, tokenizer, MIXED, scorer)
    calls = []

    def broken(**options):
        calls.append(options)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(model.model, "forward", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        score(model, tokenizer, MIXED, scorer)
    assert len(calls) == 1


def test_a_head_that_is_hooked_is_called_on_slices_of_the_rows(model, tokenizer, monkeypatch):
    expected = score(model, tokenizer, GROUP)
    three_rows = surprisal.SIZES["cpu"]._replace(slice_bytes=3 * 4 * toys.VOCABULARY)
    monkeypatch.setitem(surprisal.SIZES, "cpu", three_rows)
    sliced = SurprisalScorer(model)
    score(model, tokenizer, GROUP, sliced)  # the probes have run
    rows = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    assert_close(score(model, tokenizer, GROUP, sliced), expected, rtol=1e-6)
    hook.remove()
    assert sum(rows) == sum(map(len, expected))
    assert max(rows) == 3
