"""Chat messages as a model reads them: one function renders prompts, for policy, scorer, baselines and sampling."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .data import Text, message_text, without_none
from .errors import InputError

Turn = tuple[str, str]  # what stands before an assistant's text as the model reads it, and that text


class Turns(tuple):
    """Several (context, target), scored as one text."""


def of_text(tokenizer):
    """A tokenizer as it is; of a processor, which reads images too (Gemma 3, Qwen-VL), the one for its text."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def render_prompt(
    prompt: Text | None, tokenizer, chat_template_kwargs: Mapping | None = None, tools: Sequence | None = None
) -> str:
    """A prompt as the model reads it: a string as it is, chat messages through the tokenizer's template.

    As TRL's `apply_chat_template`: a prompt that ends with an assistant's message is continued, any other one opens
    the assistant's turn.

    chat_template_kwargs: more variables of the template, such as `{"enable_thinking": False}`. tools: JSON schemas or
    functions that the template shows the model. Both must be the same wherever the prompt is read.
    Raises `InputError` for messages if the tokenizer has no chat template, or one that refuses them.
    """
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    continued = prompt[-1]["role"] == "assistant"
    return _through_template(prompt, tokenizer, continued, chat_template_kwargs, tools)


def refuse_begun(prompts: Sequence[Text | None], trainer: str, remedy: str = "") -> None:
    """Raises `InputError` for a prompt that ends with an assistant's message, for a trainer that begins another one
    behind it: here it is gone on with (`render_prompt`), and a completion would be scored behind another text than it
    was written behind. remedy: before the one that there always is."""
    for index, prompt in enumerate(prompts):
        if prompt is not None and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            raise InputError(
                f"prompt {index} ends with an assistant's message, {message_text(prompt[-1:])!r:.40}, and {trainer} "
                f"has the policy begin another one behind it: {remedy}end prompts with a user's message"
            )


def completion_turns(
    prompt: Text | None,
    completion: Text,
    tokenizer,
    chat_template_kwargs: Mapping | None = None,
    tools: Sequence | None = None,
) -> Turns:
    """The assistant's texts in a completion in order, each behind all that stood before it.

    What a tool or a user says between them is context: it was not written by the policy. Behind a prompt that is a
    string, messages have no template and are one text. At least one turn, whose text is "" if nothing was said.
    """
    opening = render_prompt(prompt, tokenizer, chat_template_kwargs, tools)
    if isinstance(completion, str) or prompt is None or isinstance(prompt, str):
        return Turns([(opening, message_text(completion))])
    before, turns = list(prompt), []
    for index, message in enumerate(completion):
        if message["role"] == "assistant":
            if text := message_text([message]):
                context = _through_template(before, tokenizer, False, chat_template_kwargs, tools) if index else opening
                turns.append((context, text))
            if index == 0 and before[-1]["role"] == "assistant":  # it goes on with what the prompt began
                message = {**message, "content": message_text([before.pop()]) + text}
        before.append(message)
    return Turns(turns or [(opening, "")])


def _through_template(messages, tokenizer, continued: bool, chat_template_kwargs, tools) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the prompts are chat messages and the tokenizer has no chat template: use an instruction-tuned model's "
            "tokenizer, name a template with --chat_template_path, or give prompts as strings"
        )
    try:
        return tokenizer.apply_chat_template(
            [_as_sent(message) for message in messages],
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            **(chat_template_kwargs or {}),
        )
    # A template raises what it likes for a role or an order it does not know, and Jinja for None where it wants text.
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise InputError(
            f"the chat template refuses messages of {roles}: {' '.join(str(error).split())}: change the messages, or "
            "name another template with --chat_template_path"
        ) from error


def _as_sent(message: Mapping) -> dict:
    """A message as it was before a table gave every message the keys of all others."""
    kept = without_none(dict(message))
    # Some templates tell a call of a tool by it.
    return {"role": message["role"], "content": None, **kept} if "tool_calls" in kept else kept


def chat_identity(tokenizer, chat_template_kwargs: Mapping | None = None, tools: Sequence | None = None) -> dict:
    """What two prompts of the same messages must share to be the same text: names and values, {} without a template."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return {}
    return {
        "chat_template": _hash(template),
        "chat_template_kwargs": dict(chat_template_kwargs or {}),
        "tools": _hash(list(map(_schema, tools))) if tools else None,
    }


def _schema(tool):
    from transformers.utils import get_json_schema

    return get_json_schema(tool) if inspect.isroutine(tool) else tool


def _hash(value) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def read_template(path: str) -> str:
    """The chat template in a file, Jinja as transformers reads it. Raises `InputError` if there is none."""
    return _read(path, "--chat_template_path", "a file that holds a chat template in Jinja")


def read_tools(path: str | None) -> list[dict] | None:
    """The JSON schemas of tools in a file. Raises `InputError` if it holds none."""
    if path is None:
        return None
    expected = "a JSON list of tools' schemas, as transformers.utils.get_json_schema gives them"
    text = _read(path, "--tools", expected)
    try:
        tools = json.loads(text)
    except ValueError as error:
        raise InputError(f"--tools {path}: not JSON ({error}): expected {expected}") from error
    if not (isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"--tools {path} holds {tools!r:.60}: expected {expected}")
    return tools


def _read(path: str, flag: str, expected: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"{flag} {path}: {reason}: expected {expected}") from error
