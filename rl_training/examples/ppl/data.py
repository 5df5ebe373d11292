"""Rows of a data set -> prompt, reference, id: the same in every script, whatever the order."""

import hashlib
import json
from pathlib import Path

TINY_STORIES = Path(__file__).parent.parent / "tiny_stories"
PROMPT_COLUMNS = ("prompt", "query", "text", "input")
REFERENCE_COLUMNS = ("reference", "completion")

Text = str | list[dict]  # a string, or chat messages [{"role": ..., "content": ...}, ...]


def stable_id(prompt: Text, reference: Text = "") -> str:
    """16 hexadecimal digits that name a row by its content, for data sets without an `id` column."""
    content = json.dumps([prompt, reference or ""], ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def message_text(text: Text) -> str:
    """The text of a string or of chat messages, roles and markup left out."""
    if isinstance(text, str):
        return text
    parts = [message["content"] for message in text]
    return "".join(
        part if isinstance(part, str) else "".join(item["text"] for item in part if item.get("type") == "text")
        for part in parts
    )


def render_prompt(prompt: Text | None, tokenizer) -> str:
    """A prompt as the model reads it: a string as it is, chat messages through the tokenizer's template.

    As in TRL, a prompt that ends with an assistant's message is continued, any other one opens the assistant's turn.
    Raises `ValueError` for messages if the tokenizer has no chat template.
    """
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the prompts are chat messages and the tokenizer has no chat template: use an instruction-tuned model's "
            "tokenizer, set tokenizer.chat_template, or give prompts as strings"
        )
    prefilled = prompt[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not prefilled, continue_final_message=prefilled
    )
