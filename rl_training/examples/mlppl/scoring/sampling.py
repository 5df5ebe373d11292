"""Completions sampled from a model as it stands, adapters and all: for held-out texts and for baselines."""

import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import chain, groupby, takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ..config import Sampling
from ..data import Text
from ..errors import InputError
from ..processes import is_first
from ..prompts import added_ids, of_text, render_prompt, say_once
from .frozen import frozen


class Completion(NamedTuple):
    """ids: what the model wrote, up to and with its end token, as GRPOTrainer has them; written: without it; text: that
    of those behind their prompt, so that no space between them is lost; prompt_ids: what the model was given."""

    text: str
    ids: list[int]
    written: list[int]
    prompt_ids: list[int]


def prompt_ids(prompts: Sequence[Text], tokenizer, **chat) -> list[list[int]]:
    """The ids that a policy is given for each prompt, in training and here: without padding.

    Before a text stands what the tokenizer puts there; what it puts behind one (EOS, [SEP]) is left out, which a
    warning says once: nobody writes behind its own end. chat: keywords of `mlppl.prompts.render_prompt`.
    """
    if not prompts:
        return []
    tokenizer = of_text(tokenizer)
    before, behind = added_ids(tokenizer)
    if behind and any(isinstance(prompt, str) for prompt in prompts):
        say_once(f"the tokenizer puts {tokenizer.decode(behind)} behind a text: left out behind every prompt")
    rendered = [render_prompt(prompt, tokenizer, **chat) for prompt in prompts]
    of_rendered = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    # Nothing cannot be continued.
    nothing = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # A chat template writes the special tokens itself.
    return [
        (before if isinstance(prompt, str) else []) + list(ids) or nothing
        for prompt, ids in zip(prompts, of_rendered, strict=True)
    ]


def refuse_appended(prompts: Sequence[Text], tokenizer) -> None:
    """Raises `InputError` for a tokenizer that puts something behind a text, for a trainer of TRL's, which leaves it
    behind the prompt (`prompt_ids` does not)."""
    tokenizer = of_text(tokenizer)
    if any(isinstance(prompt, str) for prompt in prompts) and (behind := added_ids(tokenizer)[1]):
        raise InputError(
            f"the tokenizer puts {tokenizer.decode(behind)} behind a text, so GRPOTrainer has the policy write behind "
            "its end: train with mlppl.training.trainer.ResumableGRPOTrainer, or set tokenizer.add_eos_token = False"
        )


class GivenIds(list):
    """What a trainer says that its policy was given, by which tokenizer, and no column of a data set of that name."""

    def __init__(self, ids: Sequence[int], tokenizer) -> None:
        super().__init__(ids)
        self.tokenizer = of_text(tokenizer)


def given_by_trainer(columns: Mapping) -> bool:
    """Whether a reward function that a trainer calls is told what the policy was given: `prompt_ids`.

    Raises `InputError` for a data set's own column of that name, which TRL hands over as it does all others.
    """
    told = columns.get("prompt_ids")
    if told is not None and not all(isinstance(ids, GivenIds) for ids in told):
        raise InputError(
            "the data set has a column prompt_ids, by which reward functions are told what the policy was given: give "
            "it another name"
        )
    return told is not None


def end_tokens(model, tokenizer) -> list[int]:
    """The ids that end a completion for GRPOTrainer: the tokenizer's, and those in the model's generation settings."""
    model = getattr(model, "module", model)  # under DDP and its kind
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list | tuple) else [of_model])]
    return list(dict.fromkeys(token for token in ends if token is not None))


def up_to_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Ids before the first one that ends a completion."""
    return list(takewhile(lambda token: token not in ends, ids))


def sample_completions(model, tokenizer, prompts: Sequence[Text], **options) -> list[list[str]]:
    """Per prompt the texts of what `sample` gives."""
    return [[completion.text for completion in group] for group in sample(model, tokenizer, prompts, **options)]


def sample(
    model,
    tokenizer,
    prompts: Sequence[Text],
    *,
    num_generations: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    progress: str | None = None,
    chat_template_kwargs: Mapping | None = None,
    tools: Sequence | None = None,
    **sampling,
) -> list[list[Completion]]:
    """Per prompt `num_generations` completions, as GRPOTrainer samples them.

    Seeded on its own: the caller's random state, and the model's train/eval flags, are left as they were.
    progress: label of a progress bar; None: no bar. chat_template_kwargs, tools: see `mlppl.prompts.render_prompt`.
    sampling: fields of `mlppl.config.Sampling`.
    """
    tokenizer, settings = of_text(tokenizer), asdict(Sampling(**sampling))
    settings |= settings.pop("generation_kwargs") or {}
    _check_ids(model, settings)
    ends = end_tokens(model, tokenizer)
    settings |= {"do_sample": True, "eos_token_id": ends or None}
    padding = next(token for token in (tokenizer.pad_token_id, *ends, 0) if token is not None)
    jobs = [prompt for prompt in prompts for _ in range(num_generations)]
    given = prompt_ids(jobs, tokenizer, chat_template_kwargs=chat_template_kwargs, tools=tools)
    # A model that reads the padding gets none: a batch then holds prompts of one length.
    padded = len(set(map(len, given))) < 2 or ignores_padding(model)
    runs = [given] if padded else [list(run) for _, run in groupby(given, key=len)]
    batches = [run[start : start + batch_size] for run in runs for start in range(0, len(run), batch_size)]
    rows: list[list[int]] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _generating(model):
        torch.manual_seed(seed)
        for batch in tqdm(batches, desc=progress, unit="batch", disable=progress is None or not is_first()):
            rows += _generate(model, batch, padding, settings)[:, max(map(len, batch)) :].tolist()
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    completions = []
    for before, row in zip(given, rows, strict=True):
        ids = up_to_end(row, ends)
        text, prompt = decode([*before, *ids]), decode(before)
        text = text[len(prompt) :] if text.startswith(prompt) else decode(ids)
        completions.append(Completion(text, row[: len(ids) + 1], ids, before))
    return [completions[index : index + num_generations] for index in range(0, len(completions), num_generations)]


def _check_ids(model, settings: Mapping) -> None:
    """Raises `InputError` for the id of a token that the model has not: some kwargs would do nothing, others fail."""
    for name, value in settings.items():
        size = model.config.get_text_config(decoder=True).vocab_size
        ids = chain(*(one if isinstance(one, list) else [one] for one in value)) if isinstance(value, list) else []
        if unknown := [token for token in ids if token >= size]:
            raise InputError(
                f"--generation_kwargs holds {name!r} with the id {unknown[0]}: expected ids below {size}, the "
                "model's number of tokens"
            )


@contextmanager
def own_settings(model) -> Iterator[None]:
    """Within it, of the model's generation settings (generation_config.json) its special tokens alone are in force.

    transformers takes from them what a call leaves open: `min_p`, `num_beams`, `no_repeat_ngram_size`, ...
    """
    with ExitStack() as stack:
        for module in model.modules():
            if (settings := vars(module).get("generation_config")) is not None:
                tokens = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
                stack.callback(setattr, module, "generation_config", settings)
                module.generation_config = GenerationConfig(**tokens)
        yield


@contextmanager
def settings_kept(model, folder: str | Path) -> Iterator[None]:
    """Within it the model is saved into `folder`, with its generation settings as their author wrote them: some that
    transformers loads it refuses to save, such as Llama 2's `temperature` without `do_sample`."""
    with own_settings(model):
        yield
    if (path := Path(folder, GENERATION_CONFIG_NAME)).exists():
        model.generation_config.to_json_file(path)


@contextmanager
def _generating(model) -> Iterator[None]:
    """The model as it stands, adapters and all, without dropout, gradients and generation settings of its own."""
    with ExitStack() as stack:
        for module in model.modules():
            # Unsloth's generate switches it off and, for a model in eval mode, leaves it so.
            if kind := getattr(module, "gradient_checkpointing", False):
                stack.callback(setattr, module, "gradient_checkpointing", kind)
        stack.enter_context(frozen(model, adapters=True))
        stack.enter_context(own_settings(model))
        yield


def _generate(model, given: list[list[int]], padding: int, settings: Mapping, **options):
    """What the model generates for prompts that are padded on the left, as GRPOTrainer pads them.

    settings: of `GenerationConfig`. options: other ones of `generate`.
    """
    rows = [torch.tensor(ids, dtype=torch.long, device=model.device) for ids in given]
    ids = pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")
    mask = pad_sequence(list(map(torch.ones_like, rows)), batch_first=True, padding_side="left")
    # Gradient checkpointing switches the cache off in the model's configuration.
    config = GenerationConfig(**settings, pad_token_id=padding, use_cache=True, disable_compile=True)
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)


_IGNORES_PADDING: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def ignores_padding(model) -> bool:
    """Whether a prompt is continued beside a longer one as it is alone; asked once of each model.

    Recurrent models (Rwkv) read the padding on the left as text; others (Bart's kind of decoder) count it as positions.
    """
    if model not in _IGNORES_PADDING:
        ids = torch.linspace(1, model.get_input_embeddings().weight.shape[0] // 2, 24).long().tolist()
        settings = {"do_sample": False, "max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
        with _generating(model):
            outputs = [
                _generate(model, rows, 0, settings, prefix_allowed_tokens_fn=lambda row, _: ids[6:7])
                for rows in ([ids[6:], ids[:6]], [ids[:6]])
            ]
        logits = (torch.stack([step[-1].float() for step in output.logits]) for output in outputs)
        beside, alone = (one - one.mean(-1, keepdim=True) for one in logits)
        # As two lengths of a text are compared before anything is scored (`mlppl.scoring.surprisal`).
        quantized = getattr(model.config, "quantization_config", None) is not None
        rounding = torch.finfo(torch.bfloat16 if quantized else model.dtype).eps
        _IGNORES_PADDING[model] = bool((beside - alone).norm() <= max(1e-3, 12 * rounding) * alone.norm())
    return _IGNORES_PADDING[model]
