"""Model and tokenizer from Unsloth, transformers, a GGUF file or the embedded folder; and what names them."""

import contextlib
import difflib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from .data import TINY_STORIES
from .errors import InputError
from .gguf import check_package, is_gguf, plain_folder, smollm2_file
from .prompts import of_text, read_template

EMBEDDED = ("tiny-stories", "smollm2")
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model_path(name: str) -> str:
    """What to load for a name: the embedded folder for tiny-stories, a package's file for smollm2, else the name.

    Raises `InputError` for a folder or a file that holds no model, for a name like one of those two, and without the
    packages that a file needs.
    """
    if name == "smollm2":
        return str(smollm2_file())
    path = TINY_STORIES if name == "tiny-stories" else Path(name)
    if not path.exists():
        if path.suffix == ".gguf":
            raise InputError(f"the GGUF file {name!r} does not exist")
        if path.is_absolute() or name.startswith("."):
            raise InputError(f"model folder {name!r} does not exist")
        if near := difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.7):
            raise InputError(f"no model folder is named {name!r}: did you mean {near[0]}?")
        return name
    if is_gguf(path):
        check_package()
        return str(path)
    if path.suffix == ".gguf":
        raise InputError(f"{name!r} is no GGUF file, or a damaged one: it does not begin with the letters GGUF")
    if path.is_file() or not ((path / "config.json").exists() or (path / "adapter_config.json").exists()):
        raise InputError(
            f"{name!r} is no model: expected a folder with config.json, weights and tokenizer, or a GGUF file"
        )
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise InputError(f"model folder {name!r} holds no weights: expected a .safetensors or .bin file in it")
    check_settings(path)
    return str(path)


def check_settings(folder: str | Path) -> None:
    """Raises `InputError` for a folder's file of settings that holds no JSON object.

    transformers passes over a generation_config.json that it cannot read, and with it over what ends a text.
    """
    for name in ("config", "generation_config", "tokenizer_config", "adapter_config"):
        path = Path(folder, f"{name}.json")
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}): copy it again from where the model is from") from error
        if not isinstance(made, dict):
            raise InputError(f"{path} holds {made!r:.40}, expected a JSON object: copy it again")


def check_reachable(name: str) -> None:
    """Raises `InputError` for a name that is no path, and neither in the hub's cache nor on the hub.

    transformers asks for each file anew, and for each of them several times: without a network that takes minutes.
    """
    if Path(name).exists():
        return
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if any(isinstance(try_to_load_from_cache(name, one), str) for one in ("config.json", "adapter_config.json")):
            return
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # of the network, the hub's answer, a name that it does not take
        models = [path.parent.name for kind in ("config", "adapter_config") for path in Path().glob(f"*/{kind}.json")]
        near = difflib.get_close_matches(name, {*EMBEDDED, *models}, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(
            f"cannot load model {name!r}: no such folder here, nor in the cache, and the hub says: {_first_line(error)}"
            f"{hint}; expected a folder with config.json, weights and tokenizer, a GGUF file, a name on the hub (with "
            f"a network), or {' or '.join(EMBEDDED)}"
        ) from error


def tokenizer_path(name: str) -> str:
    """As `model_path`, for what need not hold weights. Of a GGUF file it is a folder that is made of it."""
    if name == "tiny-stories":
        return str(TINY_STORIES)
    if name == "smollm2" or is_gguf(Path(name)):
        return plain_folder(Path(model_path(name)))
    return name


def load_tokenizer(name: str, whose: str):
    """(tokenizer, generation settings or None) of a model that is not loaded. whose: its part in the error's remedy.

    Raises `InputError` if there is none, or one that `check_words` refuses.
    """
    from transformers import AutoTokenizer, GenerationConfig

    path = tokenizer_path(name)
    check_reachable(path)
    check_settings(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"cannot load the tokenizer of {name!r}: {_first_line(error)}; expected the folder or the name on the hub "
            f"{whose}"
        ) from error
    check_words(tokenizer, name)
    try:
        return tokenizer, GenerationConfig.from_pretrained(path)
    except (OSError, ValueError):  # many models have none
        return tokenizer, None


def load_model(
    name: str,
    *,
    load_in_4bit: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    max_seq_length: int | None = None,
    unsloth: bool = False,
    full_finetuning: bool = False,
    chat_template_path: str | None = None,
):
    """(model in eval mode, tokenizer, None or the reason why Unsloth was asked for and not used).

    The folder of an adapter gives its base model as a PeftModel, the adapter on and trainable. dtype "auto": float32 on
    a CPU; on a GPU what Unsloth chooses, without it the checkpoint's own. full_finetuning: for Unsloth to know.
    chat_template_path: a file whose chat template replaces the tokenizer's.
    max_seq_length: the window; at most as long as the model's own, which is the default (with Unsloth at most 2,048).
    Raises `InputError` if it cannot be loaded, and for a tokenizer with more tokens than the model has.
    """
    path = model_path(name)
    if is_gguf(Path(path)):
        path = plain_folder(Path(path))
    base = base_of_adapter(path)
    if base is not None and Path(base).is_absolute() and not Path(base).exists():
        made = " (it was made of a GGUF file: load that one once, and it is there again)"
        remedy = made if Path(base).parent.name == "gguf" else ""
        raise InputError(f"{path} is an adapter of {base}, which does not exist{remedy}")
    check_reachable(base or path)
    if base is not None:
        check_settings(base)
    template = None if chat_template_path is None else read_template(chat_template_path)
    reason, loaded = import_unsloth() if unsloth else None, None
    target = _device(device)
    if dtype == "auto" and target.type == "cpu":
        dtype = "float32"
    if unsloth and reason is None:
        try:
            with _quiet():
                loaded = _from_unsloth(path, load_in_4bit, dtype, max_seq_length, full_finetuning)
        # Unsloth raises many things for an architecture or a machine it does not know; the other way is open for all.
        except Exception as error:
            reason = f"{type(error).__name__}: {_first_line(error)}"
    with _quiet():
        model, tokenizer = loaded or _from_transformers(path, name, load_in_4bit, dtype, target)
    if loaded is None and max_seq_length is not None:
        model.max_seq_length = max_seq_length  # the name Unsloth gives it: the same window on both ways
    if template is not None:
        tokenizer.chat_template = of_text(tokenizer).chat_template = template
    check_words(tokenizer, name)
    check_vocabulary(model, tokenizer, name)
    return model.eval(), tokenizer, reason


def check_causal(path: str, name: str) -> None:
    """Raises `InputError` for a model of a kind that transformers has no causal language model for."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    try:
        config = AutoConfig.from_pretrained(base_of_adapter(path) or path)
    except (OSError, ValueError, KeyError):  # what is wrong with it is said when it is loaded
        return
    if config.model_type not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        sees = config.model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        kind = "a vision-language model" if sees else "no causal language model"
        raise InputError(
            f"{name!r} is {(config.architectures or [type(config).__name__])[0]}, {kind}: expected a model that "
            "transformers loads as a causal language model (AutoModelForCausalLM)"
            + (", such as the text model that this one was made of" if sees else "")
        )


def check_vocabulary(model, tokenizer, name: str) -> None:
    """Raises `InputError` if the tokenizer makes an id that the model has no row for.

    Rows without a token are padding. A placeholder for an image or a sound needs no row: Gemma 3's text models have
    none for theirs.
    """
    layers = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
    rows = min((weight_shape(layer.weight)[0] for layer in layers), default=None)
    tokenizer = of_text(tokenizer)
    ids = dict(tokenizer.get_vocab())
    for kind in ("image", "audio", "video"):
        ids.pop(getattr(tokenizer, f"{kind}_token", None), None)
    highest = max(ids, key=ids.__getitem__)
    if rows is not None and ids[highest] >= rows:
        raise InputError(
            f"the tokenizer of {name!r} has more tokens than the model: {highest!r} is number {ids[highest]}, and the "
            f"embedding has rows for 0 to {rows - 1}: take the model's own tokenizer, or resize the model "
            "(model.resize_token_embeddings(len(tokenizer))) and train the new rows first"
        )


def check_words(tokenizer, name: str) -> None:
    """Raises `InputError` for a tokenizer that divides the words in its own vocabulary into letters."""
    backend = of_text(tokenizer).backend_tokenizer
    size = backend.get_vocab_size()
    pieces = backend.decode_batch([[index] for index in range(0, size, size // 4000 + 1)])
    words = [word for piece in pieces if len(word := piece.strip()) > 3 and word.isalpha()]
    letters, tokens = sum(map(len, words)), sum(map(len, backend.encode_batch(words, add_special_tokens=False)))
    if letters < 1.5 * tokens:
        raise InputError(
            f"the tokenizer of {name!r} makes {tokens} tokens of {letters} letters, of words that its own vocabulary "
            f"has ({words[0]!r}, ...): its merges or scores were lost; take another conversion of the model"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it, no library prints a banner, or draws a bar of the weights that it loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Within it, DeepSpeed ZeRO-3 leaves the weights whole that are loaded. It spreads them over the processes when
    training begins, as FSDP does: a policy is scored before that, and a scorer of its own is never spread."""
    from transformers.integrations import deepspeed

    settings = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = settings


def where(name: str, model) -> str:
    """On what, and in which precision, a model runs."""
    dtype, in_4bit = str(model.dtype).removeprefix("torch."), getattr(model, "is_loaded_in_4bit", False)
    return f"{name} on {model.device}: dtype = {dtype}, 4-bit = {in_4bit}"


def import_unsloth() -> str | None:
    """Import Unsloth, which must come before trl, transformers and peft. None, or the reason why it cannot be used."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its banner
            import unsloth  # noqa: F401
    # Without a supported accelerator, or beside versions it does not know, its import raises many things.
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    return None


def add_lora(model, r: int, alpha: int, seed: int, unsloth: bool):
    """The model with a new LoRA adapter on its seven projections, or on all linear layers where it has other names.

    Of a model that sees or hears as well, they are those of its text model. A model that was loaded with an adapter
    keeps that one.
    """
    if hasattr(model, "peft_config"):
        return model
    settings = {"r": r, "target_modules": _lora_targets(model), "lora_alpha": alpha, "lora_dropout": 0}
    if unsloth:
        from unsloth import FastLanguageModel

        return FastLanguageModel.get_peft_model(
            model, **settings, bias="none", use_gradient_checkpointing="unsloth", random_state=seed
        )
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))


def train_text_only(model) -> None:
    """Freeze what a model has beside its text model: a text does not pass through what sees or hears, so that it would
    get no gradient, which ends DDP."""
    if model.config.get_text_config(decoder=True) is not model.config:
        model.requires_grad_(False)
        for part in filter(None, (model.get_decoder(), model.get_output_embeddings())):
            part.requires_grad_(True)


def _lora_targets(model) -> list[str] | str:
    """As LoRA takes them: the last parts of names, a word for all linear layers, or a pattern for whole names."""
    import torch
    from transformers.pytorch_utils import Conv1D

    text = model.get_decoder()
    names = {name.rpartition(".")[2] for name, _ in text.named_modules()}
    targets = LORA_TARGETS if names.issuperset(LORA_TARGETS) else "all-linear"
    if model.config.get_text_config(decoder=True) is model.config:
        return targets
    if targets == "all-linear":
        linear = (name for name, one in text.named_modules() if isinstance(one, torch.nn.Linear | Conv1D))
        targets = sorted({name.rpartition(".")[2] for name in linear})
    place = next(name for name, module in model.named_modules() if module is text)
    return rf"{re.escape(place)}\..*\b({'|'.join(targets)})"


def _from_unsloth(path: str, load_in_4bit: bool, dtype: str, max_seq_length: int | None, full_finetuning: bool):
    from unsloth import FastLanguageModel

    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_of_adapter(path) or path).get_text_config(decoder=True)
    # For a longer window than the model's own it would stretch the positions (RoPE scaling): another model, whose
    # perplexities are not those of the one that was asked for.
    window = min(filter(None, (max_seq_length or 2048, getattr(config, "max_position_embeddings", None))))
    return FastLanguageModel.from_pretrained(
        path,
        max_seq_length=window,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        load_in_4bit=load_in_4bit,
        full_finetuning=full_finetuning,
    )


def base_of_adapter(path: str) -> str | None:
    """The name of the model that the adapter in a folder belongs to; None if there is no adapter."""
    adapter = Path(path, "adapter_config.json")
    if not adapter.exists():
        return None
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise InputError(f"{adapter} says base_model_name_or_path is {base!r}, expected the name of its model")
    return base


def _from_transformers(path: str, name: str, load_in_4bit: bool, dtype: str, device):
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    options: dict = {"dtype": dtype, "device_map": {"": device}}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        )
    check_causal(path, name)
    loader, tokenizer_path = AutoModelForCausalLM, path
    if Path(path, "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        loader, options["is_trainable"] = AutoPeftModelForCausalLM, True
        if not Path(path, "tokenizer_config.json").exists():
            tokenizer_path = base_of_adapter(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        with whole_weights():
            model = loader.from_pretrained(path, **options)
    except ImportError as error:  # of a package that only some weights need, such as those in 4 bits
        raise InputError(f"cannot load model {name!r}: {_first_line(error)}") from error
    # transformers raises these for a name, a folder or a file it can make nothing of, and for a hub out of reach.
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(
            f"cannot load model {name!r}: {_first_line(error)}; expected a folder with config.json, weights and "
            "tokenizer, a GGUF file, a name on the hub (with a network), or tiny-stories"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"{name!r} has a slow tokenizer, {type(tokenizer).__name__}: expected a tokenizer.json")
    return model, tokenizer


def _device(device: str | None):
    import torch

    if device is None:
        # Each process of a launcher has a GPU of its own.
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return torch.device(gpu if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device is {device!r}, expected cpu, cuda or cuda:N") from error
    try:
        torch.zeros(1, device=target).item()
    # PyTorch raises these for a device that is not here, or that its build knows nothing of; meta holds no numbers.
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device is {device!r}, which PyTorch has not here: leave it out or use cpu") from error
    return target


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def weight_shape(tensor) -> tuple:
    """Of the weights themselves, also where they are kept as packed 4-bit codes."""
    return tuple(getattr(getattr(tensor, "quant_state", None), "shape", tensor.shape))
