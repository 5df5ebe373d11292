"""A model as its own frozen reference: adapters off, eval mode, no gradient, and put back exactly as it was."""

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.utils import extract_model_from_parallel, patch_environment

from ..errors import InputError

# Unsloth reads these at every forward pass. GRPO sets the second for its own passes, and logits are then hidden states.
_UNSLOTH = {"UNSLOTH_RETURN_LOGITS": "1", "UNSLOTH_RETURN_HIDDEN_STATES": "0"}

# A second thread would find the model changed, and turn its adapters on while the first still computes.
_ONE_THREAD = threading.RLock()

# Ways in which PEFT lets LoRA begin (`init_lora_weights`) that subtract it from the weights it is added to.
_CHANGE_THE_MODEL = ("pissa", "corda", "olora", "loftq", "lora_ga")


@contextmanager
def frozen(model: torch.nn.Module, adapters: bool = False) -> Iterator[None]:
    """Within it, `model` computes what it computed before any adapter was trained, without dropout or gradients.

    adapters: leave them as they are instead: the model as it stands, without dropout or gradients.

    Restores, also after an exception: train/eval of every module, which adapters are on, `requires_grad`, the attention
    implementation, the environment. One thread at a time: the others wait. Raises `InputError` for an adapter that
    cannot be turned off: one that is merged into the weights, or that trains the model's own biases.
    """
    with ExitStack() as stack:
        stack.enter_context(_ONE_THREAD)
        stack.enter_context(patch_environment(**_UNSLOTH))
        for module in model.modules():
            if module.training:
                stack.callback(setattr, module, "training", True)
                module.training = False
            # What continuous batching (`generate_batch`) may leave on: without its cache it would see later tokens.
            if hasattr(type(module), "set_attn_implementation"):
                attention = str(module.config._attn_implementation)
                if attention.startswith("paged|"):
                    stack.callback(setattr, module.config, "_attn_implementation", attention)
                    module.config._attn_implementation = attention.removeprefix("paged|")
        for layer in [] if adapters else _layers_to_turn_off(model):
            for parameter in layer.parameters():
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
            stack.callback(layer.enable_adapters, True)  # which turns gradients on, and so is called back first
            layer.enable_adapters(False)
        stack.enter_context(torch.no_grad())
        # A trainer's autocast would score in another precision than the baselines were computed in.
        for device_type in {parameter.device.type for parameter in model.parameters()}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _layers_to_turn_off(model: torch.nn.Module) -> list[torch.nn.Module]:
    # A PeftModel has the settings of its adapters; so has a model into which they were injected.
    wrapped = [model, *(getattr(one, "model", None) for one in (model, getattr(model, "base_model", None)))]
    settings = [one for module in wrapped for one in (getattr(module, "peft_config", None) or {}).values()]
    layers = [layer for layer, _ in _tuner_layers(model)]
    for one in settings:
        if getattr(one, "bias", "none") != "none":
            raise InputError(
                f"the adapter has bias={one.bias!r}: it trains biases of the model itself, which cannot be turned off "
                "to score with the model as it was: use bias='none', or another model as scorer"
            )
        start, kasa = getattr(one, "init_lora_weights", None), getattr(one, "kasa_config", None)
        if kasa is not None or str(start).lower().startswith(_CHANGE_THE_MODEL):
            changes = "a KasaConfig" if kasa is not None else f"init_lora_weights={start!r}"
            raise InputError(
                f"the adapter begins with {changes}, which takes a part out of the model's own weights, so that "
                "with the adapter off it is not the model as it was: use another beginning, or another model as scorer"
            )
        # Without prompt or prefix tuning the model beneath computes as ever.
        if not layers and not getattr(one, "is_prompt_learning", False):
            raise InputError(
                f"the adapter is {type(one).__name__.removesuffix('Config')}, which cannot be turned off layer by "
                "layer to score with the model as it was: use LoRA or another adapter of layers, or another model as "
                "scorer"
            )
    if any(getattr(layer, "merged", False) for layer in layers):
        raise InputError("the model's adapter is merged into its weights: call model.unmerge_adapter() before scoring")
    return [layer for layer in layers if not layer.disable_adapters]


def check_weights_only(model: torch.nn.Module) -> None:
    """Raises `InputError` for prompt and prefix tuning, which change a model's input and none of its weights."""
    for one in (getattr(model, "peft_config", None) or {}).values():
        if getattr(one, "is_prompt_learning", False):
            raise InputError(
                f"the adapter is {type(one).__name__.removesuffix('Config')}, which stands before the text and is no "
                "part of the weights: how far it moves the model is not measured; use LoRA or another adapter of layers"
            )


def base_of(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model under wrappers of accelerate, torch.compile and PEFT."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules that the frozen model computes with, all but those of adapters; one that is in two places, twice."""
    own = {id(layer): getattr(layer, name) for layer, name in _tuner_layers(model)}
    left = [base_of(model)]
    while left:
        module = left.pop()
        yield module
        left += [own[id(module)]] if id(module) in own else reversed(list(module.children()))


def base_parameters(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The parameters that the frozen model computes with: all but those of adapters."""
    every = (one for module in base_modules(model) for one in module._parameters.values() if one is not None)
    return iter({id(one): one for one in every}.values())


def weights_version(model: torch.nn.Module) -> tuple:
    """Another one after the model's own weights were changed."""
    parameters = list(base_parameters(model))
    # Optimizers of 8 bits write behind autograd's back, which counts no version then: of what may be trained, some
    # values are looked at as well.
    return sum(parameter._version for parameter in parameters), tuple(map(_some, parameters))


def _some(parameter: torch.nn.Parameter) -> tuple:
    """A few values of a parameter that may be trained, of a frozen one none."""
    if not parameter.requires_grad:
        return ()
    values = parameter.detach().flatten()
    return tuple(values[:: max(1, len(values) // 8)].tolist())


def _tuner_layers(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """(a layer with adapters, where it keeps the model's own one). By layer, since adapters that were injected in place
    come without a PeftModel around them."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    names = {BaseTunerLayer: "base_layer", AuxiliaryTrainingWrapper: "original_module"}
    return [(module, name) for module in model.modules() for kind, name in names.items() if isinstance(module, kind)]
