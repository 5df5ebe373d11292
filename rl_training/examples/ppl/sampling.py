"""Completions sampled from a model as it stands, adapters and all: for held-out texts and for baselines."""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from .data import Text, render_prompt
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
) -> list[list[str]]:
    """Per prompt `num_generations` completions, as GRPOTrainer would sample them: no top-k, top-p 1.

    Seeded on its own: the caller's random state, and the model's train/eval flags, are left as they were.
    progress: label of a progress bar; None: no bar.
    """
    jobs = [prompt for prompt in prompts for _ in range(num_generations)]
    texts: list[str] = []
    training = [module for module in model.modules() if module.training]
    # Unsloth's generate switches it off and, for a model in eval mode, leaves it so.
    checkpointing = [
        (module, module.gradient_checkpointing)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        try:
            starts = range(0, len(jobs), batch_size)
            for start in tqdm(starts, desc=progress, unit="batch", disable=progress is None or not is_first()):
                texts.extend(_sample(model, tokenizer, jobs[start : start + batch_size], max_new_tokens, temperature))
        finally:
            for module in training:
                module.training = True
            for module, kind in checkpointing:
                module.gradient_checkpointing = kind
    return [texts[place : place + num_generations] for place in range(0, len(texts), num_generations)]


def _sample(model, tokenizer, prompts: Sequence[Text], max_new_tokens: int, temperature: float) -> list[str]:
    rendered = [render_prompt(prompt, tokenizer) for prompt in prompts]
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
