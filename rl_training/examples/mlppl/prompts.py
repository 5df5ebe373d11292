"""Chat messages as a model reads them: one function renders prompts, for policy, scorer, baselines and sampling."""

import functools
import hashlib
import inspect
import itertools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models

from .data import Text, message_text, without_none
from .errors import InputError

logger = logging.getLogger(__name__)

Turn = tuple[str, str]  # what stands before an assistant's text as the model reads it, and that text


class Turns(tuple):
    """Several (context, target), scored as one text."""


def of_text(tokenizer):
    """A tokenizer as it is; of a processor, which reads images too (Gemma 3, Qwen-VL), the one for its text."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def added_ids(tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer's post-processor puts before a text, such as BOS, and behind it, such as EOS."""
    # With a vocabulary of one token, so that the tokenizer's own padding and truncation are neither used nor changed.
    alone = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if (added := of_text(tokenizer).backend_tokenizer.post_processor) is not None:
        alone.post_processor = added
    encoded = alone.encode("a")
    own = encoded.sequence_ids.index(0)
    return encoded.ids[:own], encoded.ids[own + 1 :]


@functools.cache
def say_once(message: str) -> None:
    logger.warning(message)


def render_prompt(
    prompt: Text | None, tokenizer, chat_template_kwargs: Mapping | None = None, tools: Sequence | None = None
) -> str:
    """A prompt as the model reads it: a string as it is, chat messages through the tokenizer's template.

    As TRL's `apply_chat_template`: a prompt that ends with an assistant's message is continued, any other one opens
    the assistant's turn. An EOS token that the template writes behind that, where no answer would follow it, is left
    out, which a warning says once: nobody writes behind its own end.

    chat_template_kwargs: more variables of the template, such as `{"enable_thinking": False}`. tools: JSON schemas or
    functions that the template shows the model. Both must be the same wherever the prompt is read.
    Raises `InputError` for messages if the tokenizer has no chat template, one that refuses them, or one that does not
    read all that they hold.
    """
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    render = functools.partial(_rendered, tokenizer, chat_template_kwargs, tools)
    rendered = _opened(prompt, tokenizer, render, continued=prompt[-1]["role"] == "assistant")
    _refuse_unread(prompt, render)
    return rendered


def refuse_begun(prompts: Sequence[Text | None], trainer: str, remedy: str = "") -> None:
    """Raises `InputError` for a prompt that ends with an assistant's message, for a trainer that begins another one
    behind it: here the model continues it (`render_prompt`), so a completion would be scored behind another text than
    the one it was written behind. remedy: before the one that there always is."""
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
    render = functools.partial(_rendered, tokenizer, chat_template_kwargs, tools)
    before, turns = list(prompt), []
    for index, message in enumerate(completion):
        if message["role"] == "assistant":
            if text := message_text([message]):
                turns.append((_opened(before, tokenizer, render) if index else opening, text))
            if index == 0 and before[-1]["role"] == "assistant":  # it goes on with what the prompt began
                message = {**message, "content": message_text([before.pop()]) + text}
        before.append(message)
    return Turns(turns or [(opening, "")])


def _opened(messages, tokenizer, render: Callable[..., str], continued: bool = False) -> str:
    rendered = render(messages, continued)
    eos = of_text(tokenizer).eos_token
    end = re.search(rf"(?:{re.escape(eos)}\s*)*\Z", rendered)[0] if eos and not continued else ""
    if not end:
        return rendered
    # A template that opens no turn (DialoGPT's) may end the user's with EOS, and an answer then follows on that.
    try:
        if render([*messages, {"role": "assistant", "content": "a"}]).startswith(rendered):
            return rendered
    except InputError:
        pass
    say_once(f"the chat template writes {end.strip()} behind a prompt: left out")
    return rendered.removesuffix(end)


def _rendered(
    tokenizer, chat_template_kwargs: Mapping | None, tools: Sequence | None, messages, continued: bool | None = None
) -> str:
    """continued: whether the last message is; None: neither it is, nor does another turn begin behind it."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the prompts are chat messages and the tokenizer has no chat template: use an instruction-tuned model's "
            "tokenizer, name a template with --chat_template_path, or give prompts as strings"
        )
    contents = [message.get("content") or "" for message in messages]
    message_text([{"role": "user", "content": one} for one in contents])  # raises for a part that is no text

    def render(form: list[dict]) -> str:
        return tokenizer.apply_chat_template(
            form,
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=continued is False,
            continue_final_message=continued is True,
            **(chat_template_kwargs or {}),
        )

    unread = refusal = None
    for form, first in _forms(list(map(_as_sent, messages))):
        try:
            rendered = render(form)
            if _MARK in rendered:
                continue
            # What a message says may stand in the template, too: a mark around it tells whether it is read.
            marked, number = _marked(form)
            read = render(marked) if number else ""
        # A template raises what it likes for a role or an order it does not know, and Jinja for None where it wants
        # text.
        except (TemplateError, TypeError, ValueError) as error:
            refusal = refusal or error
            continue
        if all(f"{_MARK}{index};" in read for index in range(number)[first:]):
            return rendered
        unread = True
    remedy = "change the messages, or name another template with --chat_template_path"
    if unread:
        said = message_text(messages)
        raise InputError(f"the chat template leaves out what a prompt's messages say, {said!r:.60}: {remedy}")
    roles = ", ".join(str(message.get("role")) for message in messages)
    reason = " ".join(str(refusal).split())
    raise InputError(f"the chat template refuses messages of {roles}: {reason}: {remedy}") from refusal


_MARK = "8172635490"  # no text, and no key of a part; digits are neither escaped nor lowered


def _marked(form: list[dict]) -> tuple[list[dict], int]:
    """Messages with a mark on both sides of each text that is not blank, by its number, and how many there are: a
    template may leave out what was thought before, or what stands behind an end."""
    numbers = itertools.count()

    def marked(content):
        if isinstance(content, list):
            return [{**part, "text": marked(part["text"])} for part in content]
        sign = f"{_MARK}{next(numbers)};" if content and content.strip() else ""
        return content and sign + content + sign

    return _with_contents(form, [marked(message.get("content")) for message in form]), next(numbers)


def _with_contents(messages: list[dict], contents: list) -> list[dict]:
    return [
        {**message, "content": content} if "content" in message else message
        for message, content in zip(messages, contents, strict=True)
    ]


def _forms(messages: list[dict]) -> list[tuple[list[dict], int]]:
    """Messages in the forms that a template may read, each with the first text that it must read.

    Parts as they came: a template that takes none writes down a list as Python shows it, and then the mark is seen.
    Strings, and parts again, since some templates of models that see images take nothing else: of these only the last
    text must be read, since templates leave out what was thought before, or all that a system says.
    """
    contents = ["" if message.get("content") == [] else message.get("content") for message in messages]
    came = [[{**part, _MARK: True} for part in one] if isinstance(one, list) else one for one in contents]
    strings = [message_text([{"role": "user", "content": one}]) if one else one for one in contents]
    parts = [[{"type": "text", "text": one, _MARK: True}] if isinstance(one, str) else one for one in came]
    forms = [*([(came, 0)] if came != contents else []), (strings, -1), (parts, -1)]
    return [(_with_contents(messages, form), first) for form, first in forms]


def _refuse_unread(messages, render: Callable[[list], str]) -> None:
    """Raises `InputError` for a key of a message without which the template renders the same, behind it and behind all
    messages: it does not read what stands there. The answer of a tool may say again which call it is of; of a speaker's
    name a warning says once that it is not read."""

    def rendered(messages: list) -> str:
        try:
            return render(messages)
        except InputError as error:
            return str(error)

    messages = [{**message, "content": message.get("content") or ""} for message in map(_as_sent, messages)]
    for index, message in enumerate(messages):
        known = ("role", "content", *(("name", "tool_call_id") if message["role"] == "tool" else ()))
        before, after = messages[:index], messages[index + 1 :]
        for key in (key for key, value in message.items() if value and key not in known):
            without = {name: value for name, value in message.items() if name != key}
            if any(rendered([*before, message, *end]) != rendered([*before, without, *end]) for end in ([], after)):
                continue
            if key != "name":
                raise InputError(
                    f"message {index} of a prompt, of the {message['role']}, has the key {key!r}, which the chat "
                    "template does not read: drop it, put what it says into the content, or name another template "
                    "with --chat_template_path"
                )
            say_once("messages have the key 'name', which the chat template does not read")


def _as_sent(message: Mapping) -> dict:
    """A message as it was before a table gave every message the keys of all others."""
    kept = without_none(dict(message))
    # Some templates tell a call of a tool by it.
    return {"role": message["role"], "content": None, **kept} if "tool_calls" in kept else kept


def chat_identity(tokenizer, chat_template_kwargs: Mapping | None = None, tools: Sequence | None = None) -> dict:
    """What two prompts of the same messages must share to be the same text: names and values, {} without a template."""
    from transformers.utils import get_json_schema

    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return {}
    schemas = [get_json_schema(tool) if inspect.isroutine(tool) else tool for tool in tools or ()]
    return {
        "chat_template": _hash(template),
        "chat_template_kwargs": dict(chat_template_kwargs or {}),
        "tools": _hash(schemas) if schemas else None,
    }


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
