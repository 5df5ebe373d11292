"""Completions sampled from a model as it stands, adapters and all: for held-out texts and for baselines."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from .chat import of_text, render_prompt
from .data import Text
from .errors import InputError
from .frozen import frozen
from .processes import is_first


class Completion(NamedTuple):
    """ids: what the model wrote, up to and with its end token, as GRPOTrainer has them; written: without it; text: that
    of those behind their prompt, so that no space between them is lost; prompt_ids: what the model was given."""

    text: str
    ids: list[int]
    written: list[int]
    prompt_ids: list[int]


def prompt_ids(prompts: Sequence[Text], tokenizer, **chat) -> list[list[int]]:
    """The ids that a policy is given for each prompt, by GRPOTrainer and here: without padding.

    chat: keywords of `ppl.chat.render_prompt`.
    """
    if not prompts:
        return []
    tokenizer = of_text(tokenizer)
    rendered = [render_prompt(prompt, tokenizer, **chat) for prompt in prompts]
    # A chat template writes the special tokens itself.
    plain = [isinstance(prompt, str) for prompt in prompts]
    prompt_ids = tokenizer(rendered, add_special_tokens=True)["input_ids"] if any(plain) else rendered
    if not all(plain):
        of_chats = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        prompt_ids = [one if text else other for one, other, text in zip(prompt_ids, of_chats, plain, strict=True)]
    # Nothing cannot be continued.
    nothing = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [list(ids) or nothing for ids in prompt_ids]


class GivenIds(list):
    """What a trainer says that its policy was given, and no column of a data set that has this name."""


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
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list | tuple) else [of_model])]
    return list(dict.fromkeys(token for token in ends if token is not None))


def up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Ids before the first one that ends a completion."""
    return ids[: next((index for index, token in enumerate(ids) if token in ends), len(ids))]


def sample_completions(model, tokenizer, prompts: Sequence[Text], **options) -> list[list[str]]:
    """Per prompt the texts of what `sample` gives."""
    return [[completion.text for completion in group] for group in sample(model, tokenizer, prompts, **options)]


def sample(
    model,
    tokenizer,
    prompts: Sequence[Text],
    *,
    num_generations: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: str | None = None,
    **chat,
) -> list[list[Completion]]:
    """Per prompt `num_generations` completions, as GRPOTrainer would sample them: no top-k, top-p 1.

    Seeded on its own: the caller's random state, and the model's train/eval flags, are left as they were.
    progress: label of a progress bar; None: no bar. chat: keywords of `ppl.chat.render_prompt`.
    """
    tokenizer = of_text(tokenizer)
    jobs = [prompt for prompt in prompts for _ in range(num_generations)]
    completions: list[Completion] = []
    # Unsloth's generate switches it off and, for a model in eval mode, leaves it so.
    checkpointing = [
        (module, module.gradient_checkpointing)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), frozen(model, adapters=True):
        torch.manual_seed(seed)
        try:
            starts = range(0, len(jobs), batch_size)
            for start in tqdm(starts, desc=progress, unit="batch", disable=progress is None or not is_first()):
                given = prompt_ids(jobs[start : start + batch_size], tokenizer, **chat)
                completions.extend(_sample(model, tokenizer, given, max_new_tokens, temperature))
        finally:
            for module, kind in checkpointing:
                module.gradient_checkpointing = kind
    return [completions[index : index + num_generations] for index in range(0, len(completions), num_generations)]


def _sample(model, tokenizer, given: list[list[int]], max_new_tokens: int, temperature: float) -> list[Completion]:
    ends = end_tokens(model, tokenizer)
    padding = next(token for token in (tokenizer.pad_token_id, *ends, 0) if token is not None)
    longest = max(map(len, given))
    ids = torch.tensor([[padding] * (longest - len(one)) + one for one in given])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in given])
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,  # not that of the model's generation settings
        max_new_tokens=max_new_tokens,
        use_cache=True,  # gradient checkpointing switches it off in the model's configuration
        pad_token_id=padding,
        eos_token_id=ends or None,
    )
    rows = output[:, longest:].tolist()
    written = [up_to_end(row, ends) for row in rows]
    whole = tokenizer.batch_decode(list(map(list.__add__, given, written)), skip_special_tokens=True)
    before = tokenizer.batch_decode(given, skip_special_tokens=True)
    alone = tokenizer.batch_decode(written, skip_special_tokens=True)
    texts = [
        text.removeprefix(prompt) if text.startswith(prompt) else by_itself
        for text, prompt, by_itself in zip(whole, before, alone, strict=True)
    ]
    with_end = [row[: len(ids) + 1] for row, ids in zip(rows, written, strict=True)]
    return list(map(Completion, texts, with_end, written, given))
