"""What two numbers must share to be compared: what the baselines file keeps, and the reward asks of it."""

import copy
import hashlib
import json
import re
from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig

from ..config import RewardConfig
from ..models import weight_shape
from ..prompts import added_ids
from .batching import Row, windows
from .frozen import base_modules, base_of
from .tokens import Encoded, TextEncoder

# A fixed text, whose surprisals tell one scorer from another. Its hundreds of tokens refer to one another from afar, so
# that how a model counts positions shows.
PROBE = (
    'Once upon a time, in the year 1850, there was a small fox. "Why," she asked, "is the sea so far from here?" '
    "Nobody knew, so she packed bread and cheese, and walked north until the river became a road.\n\n"
    "On the third day she met an old miller named Thomas, who had 12 sacks of flour and no horse. The fox offered to "
    'carry one sack to the market if he would tell her the way. "Follow the river," said Thomas, "because every '
    'river ends in the sea." But the fox had lost the river two days ago, and she was too proud to say so.\n\n'
    "At the market a woman sold maps for 3 coins each. The fox had no coins; she had only bread, cheese and one sack "
    "of flour that belonged to Thomas. So she walked back to the mill, gave Thomas his flour, and asked him for work. "
    "In spring she bought a map, followed the river, as Thomas had told her, and in the summer of 1851 she stood "
    "before the sea."
)
_MOST = 512  # tokens, for tokenizers that cut a text into small pieces


def encode_probe(tokenizer) -> Encoded:
    """The text as a model with this tokenizer reads it."""
    return TextEncoder(tokenizer, eos_for_bos=True).encode([""], [PROBE])[0]


def probe_row(probe: Encoded, window: int | None) -> Row:
    """The beginning of it, as one row for a model that takes at most `window` tokens (None: no limit).

    What a small window leaves of the text is the beginning of what a larger one does.
    """
    return next(windows(probe, min(_MOST, window or _MOST), 0))


# --- what tells one model from another -------------------------------------------------------------------------------

# Fields of a configuration that no logit depends on, by parts of their names. The window is compared by itself.
_NOT_OF_LOGITS = re.compile(
    r"drop|init|loss|jitter|noise|classifier|summary|use_cache|token_id|tie_word|output_router|output_attentions"
    r"|pretraining_tp|name_or_path|^max_position"
)
_PART = 2**16  # values at a time: they stay in a core's cache


def describe_model(model) -> dict:
    """Its precision, the fields of its configuration that change logits, and a hash of all its weights but the
    adapters'. What it makes of the fixed text is not among them."""
    digest = hashlib.blake2b(digest_size=8)
    known = {}  # of tied weights, which count wherever they stand, as those of a copy that is not tied do
    for module in base_modules(model):
        kept = {name: one for name, one in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for tensor in filter(lambda one: one is not None, (*module._parameters.values(), *kept.values())):
            if id(tensor) not in known:
                known[id(tensor)] = f"{weight_shape(tensor)} {[_checksum(part) for part in _parts(tensor, module)]} "
            digest.update(known[id(tensor)].encode())
    return {**architecture(model), "weights": digest.hexdigest()}


def architecture(model) -> dict:
    """The same without the weights."""
    return {**precision(model), "config": _config(base_of(model).config)}


def precision(model) -> dict:
    """`dtype`, and `quantization`: none, 4bit, or what transformers calls the method."""
    settings = getattr(model.config, "quantization_config", None) or {"quant_method": "none"}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = "4bit" if settings.get("load_in_4bit") else str(settings.get("quant_method", "unknown"))
    return {"dtype": str(model.dtype).removeprefix("torch."), "quantization": method}


def _config(config) -> dict:
    """The fields that the configuration's class has of its own and that logits depend on, as JSON holds them."""
    config = config.get_text_config(decoder=True)
    common = PreTrainedConfig.__dataclass_fields__.keys()
    fields = config.to_dict()
    rope = json.dumps(fields.get("rope_parameters"), default=str)
    # Scaled RoPE depends on how many positions there are.
    scaled = {"max_position_embeddings"} if re.search(r'"rope_type": "(?!default")', rope) else set()

    def kept(fields):
        return {
            name: kept(value) if isinstance(value, dict) else value
            for name, value in sorted(fields.items())
            if name not in common
            and (name in scaled or not _NOT_OF_LOGITS.search(name))
            and not (name == "type" and "rope_type" in fields)  # the old name of it, which may stand beside it
        }

    own = {*type(config).__dataclass_fields__, "rope_parameters", "per_layer_config"}
    return json.loads(json.dumps(kept({name: fields[name] for name in own & fields.keys()}), default=str))


def _parts(tensor, module) -> list:
    """What a parameter or buffer is kept as: itself; with bitsandbytes its codes, and the scales of its blocks or rows.

    4-bit codes stand in the order of the weights, also where bitsandbytes has repacked them in place for the CPU. Their
    scales are in bfloat16, which is what it makes of them then.
    """
    state = getattr(tensor, "quant_state", None)
    if state is None:
        eight_bit = [getattr(one, "SCB", None) for one in (tensor, getattr(module, "state", None))]
        return [tensor.detach(), *[scales for scales in eight_bit if scales is not None][:1]]
    codes, scales = tensor.detach().view(torch.uint8), state.absmax
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        codes, _ = _convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))
        return [codes.view(torch.uint8), scales.T, state.code]
    scales = scales.flatten()
    if state.nested:
        blocks = torch.arange(len(scales), device=scales.device) // state.state2.blocksize
        scales = state.state2.code[scales.long()] * state.state2.absmax[blocks] + state.offset
    return [codes, scales.bfloat16(), state.code]


def _checksum(values) -> int:
    """A whole number that depends on each value of a tensor and on its place, and on no device: the sum over the bits
    of each, as float32 where it is a fraction, times an odd number of its place's own, modulo 2**64.

    As float32 a norm is the same that was cast to it for training.
    """
    values = values.flatten()
    places = torch.arange(1, min(len(values), _PART) + 1, device=values.device)
    for factor in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9):  # any large odd ones; a product that overflows wraps around
        places = places * factor
        places = places ^ (places >> 29)
    places = places | 1
    parts = values.split(_PART) if len(values) else ()
    bits = (part.float().view(torch.int32) if part.is_floating_point() else part.long() for part in parts)
    sums = [(one * places[: len(one)]).sum() for one in bits]
    total = 0
    for one in torch.stack(sums).tolist() if sums else []:
        total = (total * 0x5851F42D4C957F2D + one) % 2**64
    return total


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of what turns a text into ids: vocabulary, merges, normalisation, added tokens."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: settings[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    kept["bos"] = " ".join(tokenizer.convert_ids_to_tokens(added_ids(tokenizer)[0])) or tokenizer.bos_token
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()


def identity(scorer, tokenizer, config: RewardConfig, *, name: str, prompt: Mapping, shown: Mapping) -> dict:
    """What perplexities were computed with: the same keys in a baselines file's meta and in a reward.

    scorer: a `mlppl.scoring.surprisal.Scorer`. name: its model's, told but not compared; a server names its own.
    prompt: how prompts are made of a data set's texts, and how chat messages become text, as far as it is known.
    shown: of `mlppl.scoring.contexts.Contexts`, the rows that stand before a text.
    """
    of_model = {"model": {"name": name, **scorer.identity}, "window": scorer.window}
    return {**of_texts(tokenizer, config, prompt, shown), **of_model}


def of_texts(tokenizer, config: RewardConfig, prompt: Mapping, shown: Mapping) -> dict:
    """What it says of texts, whatever the scorer."""
    return {
        "target": config.target,
        "definitions": config.definitions,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "prompt": dict(prompt),
        "shown": dict(shown),
    }
