"""A scorer is put back exactly as it was, whatever happens in between."""

import contextlib
import os

import peft
import pytest
import torch
import toys
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from mlppl.errors import InputError
from mlppl.scoring.frozen import base_parameters, frozen
from mlppl.scoring.surprisal import SurprisalScorer
from mlppl.scoring.tokens import TextEncoder
from multi_level_ppl_trl import MultiLevelPPLCalculator

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
IDS = torch.tensor([[5, 6, 7, 8]])


def plain():
    return toys.llama()


def lora():
    return peft.get_peft_model(plain(), peft.LoraConfig(**LORA))


def lora_in_place():
    return peft.inject_adapter_in_model(peft.LoraConfig(**LORA), plain())


def modules_to_save():
    return peft.get_peft_model(plain(), peft.LoraConfig(**LORA, modules_to_save=["lm_head"]))


def trainable_tokens():
    return peft.get_peft_model(plain(), peft.LoraConfig(**LORA, trainable_token_indices=[1, 2]))


def two_adapters():
    model = lora()
    model.add_adapter("second", peft.LoraConfig(**LORA))
    model.set_adapter("second")
    return model


def frozen_adapter():
    """An adapter that is on and no longer trained."""
    return lora().requires_grad_(False)


def disabled():
    model = lora()
    model.base_model.disable_adapter_layers()
    return model


MODELS = [plain, lora, lora_in_place, modules_to_save, trainable_tokens, two_adapters, frozen_adapter, disabled]


def mixed_modes(model):
    """Some modules in train mode, some in eval mode, and one layer of the base frozen."""
    model.train()
    for index, module in enumerate(model.modules()):
        if index % 3 == 1:
            module.training = False
    next(base_parameters(model)).requires_grad_(False)
    return model


def state(model, tokenizer):
    """All that a caller could find changed."""
    training = [module.training for module in model.modules()]
    logits = model.eval()(IDS).logits.sum().item()
    for module, flag in zip(model.modules(), training, strict=True):
        module.training = flag
    return {
        "training": training,
        "logits": logits,
        "parameters": {
            name: (id(parameter), parameter._version, parameter.requires_grad, parameter.grad)
            for name, parameter in model.named_parameters()
        },
        "adapters": {
            name: (module.disable_adapters, list(module.active_adapters), list(module.merged_adapters))
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        },
        "active adapter": model.active_adapter if isinstance(model, peft.PeftModel) else None,
        "config": model.config.to_dict(),
        "generation config": model.generation_config.to_dict(),
        "tokenizer": (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.backend_tokenizer.to_str()),
        "environment": dict(os.environ),
        "modes of torch": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        ),
    }


@pytest.mark.parametrize("make", MODELS)
def test_all_is_as_before_when_texts_were_scored(make, monkeypatch):
    monkeypatch.setenv("UNSLOTH_RETURN_HIDDEN_STATES", "1")
    monkeypatch.delenv("UNSLOTH_RETURN_LOGITS", raising=False)
    model, tokenizer = mixed_modes(make()), toys.byte_level()
    tokenizer.padding_side = "left"
    before = state(model, tokenizer)
    MultiLevelPPLCalculator(tokenizer).compute_all_levels(model, ["The fox.", "The end."], ["Once " * 40] * 2)
    assert state(model, tokenizer) == before


@pytest.mark.parametrize("make", MODELS)
def test_all_is_as_before_after_an_exception(make, monkeypatch):
    monkeypatch.setenv("UNSLOTH_RETURN_LOGITS", "0")
    monkeypatch.delenv("UNSLOTH_RETURN_HIDDEN_STATES", raising=False)
    model, tokenizer = mixed_modes(make()), toys.byte_level()
    before = state(model, tokenizer)
    with pytest.raises(ZeroDivisionError), frozen(model):
        assert 1 / 0
    assert state(model, tokenizer) == before


@pytest.mark.parametrize("make", MODELS)
def test_inside_it_is_the_base_model_in_eval_mode_without_gradients(make):
    with torch.no_grad():
        expected = plain()(IDS).logits
    model = mixed_modes(make())
    with frozen(model):
        logits = model(IDS).logits
        assert not any(module.training for module in model.modules())
        assert (os.environ["UNSLOTH_RETURN_LOGITS"], os.environ["UNSLOTH_RETURN_HIDDEN_STATES"]) == ("1", "0")
    assert not logits.requires_grad
    torch.testing.assert_close(logits, expected)


def test_once_within_another_changes_nothing():
    model, tokenizer = mixed_modes(lora()), toys.byte_level()
    before = state(model, tokenizer)
    with frozen(model):
        with frozen(model):
            pass
        assert not any(module.training for module in model.modules())
    assert state(model, tokenizer) == before


def test_a_gradient_can_still_flow_afterwards():
    model = lora().train()
    with frozen(model):
        model(IDS)
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    assert all(p.grad is None for p in base_parameters(model))


def test_a_merged_adapter_is_refused_and_the_model_left_alone():
    model, tokenizer = mixed_modes(lora()), toys.byte_level()
    model.merge_adapter()
    before = state(model, tokenizer)
    with pytest.raises(ValueError, match=r"merged into its weights: call model\.unmerge_adapter\(\)"), frozen(model):
        raise AssertionError("not reached")
    assert state(model, tokenizer) == before
    model.unmerge_adapter()
    with frozen(model):
        torch.testing.assert_close(model(IDS).logits, plain()(IDS).logits)


@pytest.mark.parametrize("make", [lora, lora_in_place, modules_to_save, trainable_tokens, two_adapters])
def test_base_parameters_are_those_of_the_model_without_adapters(make):
    found = [parameter.double().sum().item() for parameter in base_parameters(make())]
    assert found == [parameter.double().sum().item() for parameter in plain().parameters()]


# --- adapters that are more, or less, than layers --------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_adapter_that_trains_the_models_own_biases_is_refused(bias, in_place):
    """Off, it would leave them trained: the frozen reference would move with the policy."""
    config = peft.LoraConfig(target_modules=["q_proj"], bias=bias)
    base = toys.llama(attention_bias=True)
    model = peft.inject_adapter_in_model(config, base) if in_place else peft.get_peft_model(base, config)
    with pytest.raises(InputError, match=f"bias='{bias}'"), frozen(model):
        pass
    with frozen(model, adapters=True):  # as it stands there is nothing to turn off
        pass


@pytest.mark.parametrize(
    "config", [peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
               peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")],
)  # fmt: skip
def test_prompt_tuning_is_off_for_the_reference_and_refused_where_it_is_to_count(config, tokenizer):
    model = peft.get_peft_model(toys.llama(), config)
    encoded = TextEncoder(tokenizer).encode(["The fox"], [" said nothing."])
    [off], [base] = SurprisalScorer(model).score(encoded), SurprisalScorer(toys.llama()).score(encoded)
    assert off.tolist() == pytest.approx(base.tolist(), rel=1e-5)
    with pytest.raises(InputError, match=f"the adapter is {type(config).__name__.removesuffix('Config')}"):
        SurprisalScorer(model, adapters=True)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_took_a_part_out_of_the_weights_is_refused(start):
    model = toys.llama()
    before = model(IDS).logits
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=start, task_type="CAUSAL_LM")
    )
    with adapted.disable_adapter():  # PEFT's own way has not the model as it was, either
        assert not torch.allclose(adapted(IDS).logits, before, atol=1e-3)
    with pytest.raises(InputError, match=f"init_lora_weights='{start}'.*another model as scorer"), frozen(adapted):
        pass
    with frozen(adapted, adapters=True):  # the model as it stands is asked for
        assert torch.allclose(adapted(IDS).logits, before, atol=1e-3)


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_an_adapter_that_begins_at_nothing_is_turned_off(start):
    model = toys.llama()
    before = model(IDS).logits
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=start, task_type="CAUSAL_LM")
    )
    with frozen(adapted):
        assert torch.allclose(adapted(IDS).logits, before, atol=1e-6)


def test_an_adapter_of_no_layer_is_refused():
    settings = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(toys.llama(), settings)
    with pytest.raises(InputError, match="the adapter is AdaptionPrompt, which cannot be turned off"), frozen(model):
        pass


@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
def test_a_model_whose_adapter_is_gone_is_a_model(way):
    adapted = lora()
    with adapted.disable_adapter() if way == "unload" else contextlib.nullcontext():
        expected = adapted(IDS).logits
    bare = getattr(adapted, way)()
    with frozen(bare):
        assert torch.allclose(bare(IDS).logits, expected, atol=1e-4)
