"""What the policy wrote, as it is scored: the ids that it sampled, or their text where the scorer has other ids."""

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from itertools import chain

import numpy as np

from ..data import Text, check_text, message_text
from ..prompts import Turn, Turns, of_text
from ..scoring.calculator import MultiLevelPPLCalculator
from ..scoring.sampling import GivenIds, end_tokens, prompt_ids, up_to_end
from ..scoring.tokens import Sampled, TextEncoder

logger = logging.getLogger(__name__)


class Policy:
    """Who wrote the completions: its tokenizer says what their ids are as text, its end tokens where they end.

    calculator, scorer: of the reward. policy: (model, tokenizer); None: it is the scorer, or has its tokenizer.
    """

    def __init__(self, calculator: MultiLevelPPLCalculator, scorer, policy: tuple | None) -> None:
        model, tokenizer = policy or (scorer, calculator.tokenizer)
        self._calculator = calculator
        self._warned = False
        self._told = policy is not None
        self.tokenizer = of_text(tokenizer)
        is_scorers = self.tokenizer is calculator.tokenizer
        self.encoder = calculator.encoder if is_scorers else TextEncoder(self.tokenizer)
        vocabulary = calculator.tokenizer.get_vocab()
        self._tokens = set(vocabulary.values())
        # A model can have rows beyond the tokens of its tokenizer, and sample them.
        of_model = self.tokenizer.get_vocab() == vocabulary and hasattr(scorer, "config")
        self._rows = scorer.config.get_text_config().vocab_size if of_model else 0
        # Another model may have written with the scorer's tokenizer, and gone on behind what ends a text of the scorer.
        self._ends = end_tokens(None if policy is None else model, self.tokenizer)
        self._trailing = {*self.encoder.special_ids, *end_tokens(model, self.tokenizer)}

    def shares_ids(
        self, prompts: Sequence[Text | None], given_ids: Sequence[Sequence[int]] | None = None
    ) -> list[bool]:
        """Per prompt, whether policy and scorer make the same ids of it, and mean the same tokens by them.

        given_ids: of `read`. If nothing is known of the policy they have to be the scorer's, or the end of those.
        """
        of_scorer, of_policy = self._calculator.tokenizer, self.tokenizer
        unknown = [] if self._told or given_ids is None else list(given_ids)
        for ids in unknown:
            if isinstance(ids, GivenIds):  # a trainer's are all of one tokenizer
                unknown, of_policy = [], ids.tokenizer
                break
        if not unknown and of_policy is of_scorer:
            return [True] * len(prompts)
        if _division(of_policy, len(of_policy)) != _division(of_scorer, len(of_scorer)):
            return [False] * len(prompts)
        mine = prompt_ids(prompts, of_scorer, **self._calculator.chat)
        if not unknown:
            theirs = prompt_ids(prompts, of_policy, **self._calculator.chat)
            return [one == other for one, other in zip(mine, theirs, strict=True)]
        start = self.encoder.start
        given = [list(map(int, ids)) for ids in unknown]
        ends = [ids[len(start) :] if ids[: len(start)] == start else ids for ids in given]
        return [one[len(one) - len(end) :] == end for one, end in zip(mine, ends, strict=True)]

    def read(
        self,
        prompts: Sequence[Text | None],
        texts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        given_ids: Sequence[Sequence[int]] | None,
        parsed: Sequence[bool],
    ) -> list[tuple[Sampled | None, str] | None]:
        """Per completion (its ids, None if they are not the scorer's; what it adds to its prompt's text); None if the
        ids are not those of its text, which was then changed on its way here.

        given_ids: what the policy was given as prompts; None: what GRPOTrainer makes of them. parsed: whether a text is
        what a trainer calls the content, a part of what was written.
        """
        completion_ids = [list(map(int, ids)) for ids in completion_ids]
        if not completion_ids:  # of which transformers would decode one text
            return []
        shared = self.shares_ids(prompts, given_ids)
        if given_ids is None:
            given_ids = prompt_ids(prompts, self.tokenizer, **self._calculator.chat)
        given_tuples = [tuple(map(int, ids)) for ids in given_ids]
        written = list(map(self._written, completion_ids))
        # As TRL decodes them; or as they stand behind their prompt, where a space or a mark of continuation is another.
        alone = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        behind = self.encoder.decoding.texts(given_tuples, written)
        found: list[tuple[Sampled | None, str] | None] = []
        for index, (prompt, (before, text)) in enumerate(zip(prompts, behind, strict=True)):
            given, ids = given_tuples[index], tuple(written[index])
            part = parsed[index] or (self._parses and isinstance(prompt, list))
            if not any(_is_of(texts[index], one, part) for one in (alone[index], text)):
                found.append(None)
            elif shared[index] and self._tokens.issuperset([*given, *(one for one in ids if one >= self._rows)]):
                found.append((Sampled(given, ids), text))
            else:
                # Words joined by spaces: a decoder writes the one that the prompt's ids have lost, or that the policy's
                # chat template does not end in and the scorer's does.
                space = isinstance(prompt, str) or self.encoder.decoding.loses_a_space
                lost = space and self._calculator.render(prompt)[-1:].isspace() and not before[-1:].isspace()
                found.append((None, text.removeprefix(" ") if lost else text))
        return found

    def warn_once(self) -> None:
        if not self._warned:
            logger.warning(
                "completion_ids are not the scorer's, or not those of the completions, so their text is scored: the "
                "policy has another tokenizer or chat template (of which policy=(model, tokenizer) tells the reward), "
                "or the texts were changed"
            )
        self._warned = True

    @property
    def _parses(self) -> bool:
        """Whether the trainer takes messages apart: what is thought, or said to tools, is then no part of a content."""
        return any(getattr(self.tokenizer, f"response_{name}", None) is not None for name in ("template", "schema"))

    def _written(self, ids: Sequence[int]) -> list[int]:
        """Up to the first end token; special tokens behind the last text are left out like it."""
        ids = up_to_end(ids, self._ends)
        size = next((size for size in range(len(ids), 0, -1) if ids[size - 1] not in self._trailing), 0)
        return ids[:size]


@functools.lru_cache(maxsize=8)
def _division(tokenizer, size: int) -> str:
    """A hash of what makes tokens of a text, their ids included. size: of the vocabulary, which may have grown."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    content = [tokenizer.get_vocab(), *(parts[name] for name in ("model", "normalizer", "pre_tokenizer"))]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode()).hexdigest()


def as_scored(
    calculator: MultiLevelPPLCalculator,
    model,
    policy: Policy,
    prompts: Sequence[Text | None],
    completions: Sequence[Text],
    completion_ids: Sequence[Sequence[int]] | None,
    given_ids: Sequence[Sequence[int]] | None,
) -> tuple[list[Turn | Turns | Sampled], list[str]]:
    """(each completion behind its prompt: ids where they are the scorer's; the completions' texts)

    given_ids: what the policy was given as prompts; None: what GRPOTrainer makes of them.
    """
    for index, completion in enumerate(completions):
        check_text(completion, f"completion {index}")
    texts = [message_text(completion) for completion in completions]
    pairs: list[Turn | Turns | Sampled] = list(map(calculator.turns, prompts, completions))
    read: list[tuple[Sampled | None, str] | None] = [None] * len(texts)
    if completion_ids is not None:
        read = policy.read(prompts, texts, completion_ids, given_ids, list(map(is_parsed, completions)))
    one_turn = [isinstance(completion, str) or len(completion) == 1 for completion in completions]
    for index in np.flatnonzero(one_turn):
        if read[index] is not None:
            ids, texts[index] = read[index]
            pairs[index] = ids or (pairs[index][0], texts[index])
        if not (completion_ids is None or isinstance(pairs[index], Sampled)):
            policy.warn_once()
    # The rest came as text, decoded without what stands before it.
    alone = [index for index, (found, one) in enumerate(zip(read, one_turn, strict=True)) if not (found and one)]
    turns: list = [list(pairs[index]) if isinstance(pairs[index], Turns) else [pairs[index]] for index in alone]
    restored = iter(calculator.restore_spaces(model, list(chain(*turns)), policy.encoder.decoding))
    for index, of_one in zip(alone, turns, strict=True):
        whole = Turns((context, next(restored)) for context, _ in of_one)
        pairs[index] = whole if isinstance(pairs[index], Turns) else whole[0]
        if one_turn[index]:
            texts[index] = whole[0][1]
    return pairs, texts


def is_parsed(completion: Text) -> bool:
    """Whether a trainer took it apart: what was thought, or said to tools, stands beside its content."""
    return not isinstance(completion, str) and any(
        value for one in completion for key, value in one.items() if key not in ("role", "content")
    )


def _is_of(text: str, decoded: str, parsed: bool) -> bool:
    """Decoding may lose or add white space; and of a parsed message the text is a part."""
    text, decoded = "".join(text.split()), "".join(decoded.split())
    return text == decoded or bool(parsed and text and text in decoded)
