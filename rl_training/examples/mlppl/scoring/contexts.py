"""What the scorer reads before a text: the prompt as it is, as text, behind examples, or another row's in its place."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from ..config import OUTER, TABLE, ReferenceContext
from ..data import PromptForm, Shown, Text, checked_shown, message_text, prompt_key, stable_id
from ..errors import InputError
from ..prompts import Turn, Turns, completion_turns, render_prompt
from .sampling import prompt_ids
from .tokens import Sampled

BETWEEN = "\n\n"  # two rows that stand one behind the other as text


class Views(tuple):
    """One text behind several contexts: per view of `mlppl.scoring.levels`, outward, the (context, target) pairs whose
    mean it is. The last view is the text as it stands."""


class Contexts:
    """examples: rows that stand before every prompt, in the prompts' own form. others: rows of which `contrast` take
    the place of a text's own. levels: those that are measured. without_chat: prompts are read as text; `form` is what
    their messages were made of, "{prompt}" and what stands around it. chat: keywords of `render_prompt`. start: the ids
    that stand before a text, of `TextEncoder`.

    Raises `InputError` for a level without the rows that it needs.
    """

    def __init__(
        self,
        tokenizer,
        levels: Sequence[str],
        examples: Sequence[Shown] = (),
        others: Sequence[Shown] = (),
        contrast: int = 0,
        without_chat: bool = False,
        form: str = "{prompt}",
        chat: Mapping | None = None,
        start: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._contrast, self._without_chat = tokenizer, contrast, without_chat
        self._start = start
        self._chat = dict(chat or {})
        PromptForm(form).check()
        self._form = PromptForm(form).around
        self._views = [level for level in OUTER if level in levels]
        self._ids: dict[str, tuple[int, ...]] = {}
        self._put: ReferenceContext | None = None  # where references are scored
        self.examples, rows = (
            [(self._read(prompt), reference) for prompt, reference in checked_shown(name, given)]
            for name, given in (("examples", examples), ("others", others))
        )
        self._others = {prompt_key(prompt): (prompt, reference) for prompt, reference in rows}
        self._texts = {key: list(map(message_text, row)) for key, row in self._others.items()}
        if blank := [one for one in self.examples if not message_text(one[1]).strip()]:
            raise InputError(f"the example {blank[0]!r:.60} has a blank reference: expected a text")
        if "examples" in levels and not self.examples:
            raise InputError("level examples is what examples add: expected some, as examples=[(prompt, reference)]")
        if contrast and len(self._others) <= contrast:
            raise InputError(
                f"contrast is {contrast}: expected more other rows than that, with different prompts, as "
                f"others=[(prompt, reference), ...], found {len(self._others)}"
            )

    @property
    def identity(self) -> dict:
        """What baselines must have been made with; {} without examples and other rows."""
        shown = {"examples": self.examples}
        if "prompt" in self._views:
            shown["others"] = list(self._others.values())
        return {
            name: f"{len(rows)} rows {hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()}"
            for name, rows in shown.items()
            if rows
        }

    def read(self, prompt: Text | None) -> Text | None:
        """A prompt as the scorer is given it: behind the examples, but for where they are a level of their own."""
        return self.behind_examples(self._read(prompt))

    def reads_as_text(self, prompt: Text | None) -> TypeGuard[list[dict]]:
        """Whether a prompt is chat messages that the scorer is shown as text."""
        return self._without_chat and prompt is not None and not isinstance(prompt, str)

    def _read(self, prompt: Text | None) -> Text | None:
        if not self.reads_as_text(prompt):
            return prompt
        before, behind = self._form
        begun = prompt[-1]["role"] == "assistant"
        said = prompt[-1:] if begun else [message for message in prompt if message["role"] != "system"]
        return message_text(said).removeprefix(before).removesuffix(behind)

    def behind_examples(self, prompt: Text | None, most: int | None = None) -> Text | None:
        """The prompt behind the first `most` examples: messages before its own, after its system's; or text."""
        examples = self.examples[:most]
        if not examples:
            return prompt
        if prompt is None or isinstance(prompt, str):
            if chats := [shown for shown, _ in examples if not isinstance(shown, str)]:
                raise InputError(f"an example's prompt is {chats[0]!r:.60}, expected a text, as the prompts are")
            return "".join(joined(*map(message_text, example)) + BETWEEN for example in examples) + (prompt or "")
        first = next((index for index, message in enumerate(prompt) if message["role"] != "system"), 0)
        messages = list(prompt[:first])
        for shown, reference in examples:
            messages += [message for message in _messages(shown, "user") if message["role"] != "system"]
            said = _messages(reference, "assistant")
            if messages[-1]["role"] == "assistant":  # the reference goes on with what the prompt began
                said = [{"role": "assistant", "content": joined(*map(message_text, ([messages.pop()], said)))}]
            messages += said
        return [*messages, *prompt[first:]]

    def others_of(self, prompt: Text | None, text: str = "", column: int = 0) -> list[Shown]:
        """`contrast` other rows, those of the likest length by a hash of the prompt: the same in each process, for each
        text of a group, and for baselines. column: of which of a row the length counts, 0 or 1. text: what it has; a
        row that has the same is no other one. Raises `InputError` where too few are left."""
        prompt = self._read(prompt)  # as other rows' are
        mine, text = prompt_key(prompt or ""), text or message_text(prompt or "")
        length, same = len(text), text.strip()
        others = [key for key, row in self._texts.items() if key != mine and row[column].strip() != same]
        if len(others) < self._contrast:
            raise InputError(
                f"contrast is {self._contrast}: of {len(self._others)} other rows {len(others)} have another text than "
                f"{same!r:.60}: lower it, or bring rows that differ"
            )
        near = sorted(others, key=lambda key: (abs(len(self._texts[key][column]) - length), key))
        drawn = sorted(near[: 4 * self._contrast], key=lambda key: stable_id(mine, key))
        return [self._others[key] for key in drawn[: self._contrast]]

    def of(self, prompt: Text | None, completion: Text, pair: Turn | Turns | Sampled) -> Turn | Turns | Sampled | Views:
        """A text as it is scored: the pair that it is behind its own prompt as that stands, behind what else its levels
        ask for. completion: the messages, or the text, that the pair is made of."""
        own = self._read(prompt)
        if isinstance(own, str) and self.reads_as_text(prompt):
            if not isinstance(completion, str):
                completion = message_text([one for one in completion if one["role"] == "assistant"])
            pair = (own, completion if prompt[-1]["role"] == "assistant" else joined(own, completion)[len(own) :])
        # The sentence level's view, then those of the levels further out.
        prompts = [[other for other, _ in self.others_of(own)] if "prompt" in self._views else [own]]
        if strange := [
            one for one in prompts[0] if one is not own and isinstance(one, str) != isinstance(own or "", str)
        ]:
            raise InputError(f"another row's prompt is {strange[0]!r:.60}, expected the form of prompts: {own!r:.60}")
        prompts += [TABLE[level].behind(self, own) for level in self._views]
        if "examples" not in self._views:
            prompts = [[self.behind_examples(one) for one in view] for view in prompts]
        if prompts == [[own]]:
            return pair
        views = Views(tuple(self._behind(one, completion, pair, own) for one in view) for view in prompts)
        return views if len(views) > 1 else views[0][0]

    def _behind(self, prompt: Text | None, completion: Text, pair, own: Text | None):
        if prompt is own:
            return pair
        if isinstance(pair, Sampled):
            key = json.dumps(prompt)  # the texts of a group share it
            if key not in self._ids:
                self._ids = {key: tuple(prompt_ids([prompt], self._tokenizer, **self._chat)[0])} | (
                    self._ids if len(self._ids) < 64 else {}
                )
            return Sampled(self._ids[key], pair.completion)
        # The texts as they are scored behind their own prompt, what stands between them as it is behind this one.
        turns = completion_turns(prompt, completion, self._tokenizer, **self._chat)
        texts = pair if isinstance(pair, Turns) else (pair,)
        made = Turns((context, text) for (context, _), (_, text) in zip(turns, texts, strict=True))
        return made if isinstance(pair, Turns) else made[0]

    def before_reference(self, put, prompt: Text | None, part: str = "") -> str:
        """What stands before a reference: examples, its prompt and what of a completion counts, put together.

        put: `reference_context` of `mlppl.config.RewardConfig`.
        """
        self._put = put
        if put.reads_prompt:
            return put.context(render_prompt(self.read(prompt), self._tokenizer, **self._chat), part)
        context = self._told_before(put, len(self.examples)) + put.context("", part)
        if not (context or self._start):
            raise InputError(
                "behind an empty completion nothing stands before the reference, not even a BOS token, which this "
                "tokenizer has not, so that its first token would count behind other completions alone: begin the "
                f"template, {put.template!r:.60}, with a word"
            )
        return context

    def _told_before(self, put: ReferenceContext, most: int) -> str:
        """The first `most` examples before a reference that stands without its prompt."""
        shown = (put.context("") + message_text(reference) + BETWEEN for _, reference in self.examples[:most])
        return "".join(shown)

    def most_that_fit(self, excess: int) -> int:
        """How many of the examples are left if the last ones go, so that a text has `excess` tokens less."""
        own = "" if isinstance(self.examples[0][0], str) else [{"role": "user", "content": "a"}]
        put, numbers = self._put, range(len(self.examples) + 1)
        if put is None or put.reads_prompt:
            cut = [self.behind_examples(own, most) for most in numbers]
        else:
            cut = [self._told_before(put, most) for most in numbers]
        sizes = list(map(len, prompt_ids([one or " " for one in cut], self._tokenizer, **self._chat)))
        return max((most for most, size in enumerate(sizes) if sizes[-1] - size >= excess), default=0)


def joined(prompt: str, text: str) -> str:
    """One behind the other, with a space between where neither has one.

    >>> joined("A fox ran.", "It fell."), joined("A fox ran.", " It fell.")
    ('A fox ran. It fell.', 'A fox ran. It fell.')
    """
    apart = prompt and text and not (prompt[-1].isspace() or text[0].isspace())
    return f"{prompt} {text}" if apart else prompt + text


def _messages(text: Text, role: str) -> list:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)
