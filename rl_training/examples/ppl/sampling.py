"""Completions sampled from a model as it stands, adapters and all: for held-out texts and for baselines."""

from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from .chat import render_prompt
from .data import Text
from .frozen import frozen
from .processes import is_first


def sample_completions(
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
    chat_template_kwargs: Mapping | None = None,
    tools: Sequence | None = None,
) -> list[list[str]]:
    """Per prompt `num_generations` completions, as GRPOTrainer would sample them: no top-k, top-p 1.

    Seeded on its own: the caller's random state, and the model's train/eval flags, are left as they were.
    progress: label of a progress bar; None: no bar. chat_template_kwargs, tools: of `ppl.chat.render_prompt`.
    """
    jobs = [prompt for prompt in prompts for _ in range(num_generations)]
    texts: list[str] = []
    # Unsloth's generate switches it off and, for a model in eval mode, leaves it so.
    checkpointing = [
        (module, module.gradient_checkpointing)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    devices = [model.device] if model.device.type == "cuda" else []
    chat = {"chat_template_kwargs": chat_template_kwargs, "tools": tools}
    with torch.random.fork_rng(devices=devices), frozen(model, adapters=True):
        torch.manual_seed(seed)
        try:
            starts = range(0, len(jobs), batch_size)
            for start in tqdm(starts, desc=progress, unit="batch", disable=progress is None or not is_first()):
                batch = jobs[start : start + batch_size]
                texts.extend(_sample(model, tokenizer, batch, max_new_tokens, temperature, chat))
        finally:
            for module, kind in checkpointing:
                module.gradient_checkpointing = kind
    return [texts[place : place + num_generations] for place in range(0, len(texts), num_generations)]


def _sample(
    model, tokenizer, prompts: Sequence[Text], max_new_tokens: int, temperature: float, chat: Mapping
) -> list[str]:
    rendered = [render_prompt(prompt, tokenizer, **chat) for prompt in prompts]
    inputs = tokenizer(
        rendered,
        add_special_tokens=isinstance(prompts[0], str),  # a chat template writes its own
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        use_cache=True,  # gradient checkpointing switches it off in the model's configuration
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
