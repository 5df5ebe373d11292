"""The calculator: texts and a model -> the perplexity of each text at each level."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..chat import Turn, completion_turns, render_prompt
from ..data import Text, message_text
from ..definitions import AGGREGATIONS, DEFAULT_AGGREGATION, DEFAULT_LANGUAGE, DEFAULT_PHRASE_WORDS, LEVELS
from ..errors import InputError, one_of
from .levels import Scores, level_perplexities, unit_sums
from .surprisal import SurprisalScorer
from .tokens import TextEncoder
from .units import segment

MOST_NATS = 709.0  # a token; exp of more is beyond float64


class Explained(dict):
    """`{level: [unit, ...]}` of one text. `perplexities`: `{level: float}`, as `compute_all_levels` gives them."""

    perplexities: dict[str, float]


class MultiLevelPPLCalculator:
    """Perplexity of a text at the level of its words, phrases and sentences, from one forward pass.

    A unit's perplexity is exp(S_u / n_u), its surprisal in nats over its number of tokens. A level's is the geometric
    mean of its units' perplexities, exp(mean_u S_u / n_u), or with `aggregation="arithmetic"` their mean. With
    `aggregation="selective"` each level takes the geometric mean of what its own faults show in: the most surprising
    fifth of the words, the median phrase, the first words of sentences.

    tokenizer: any fast tokenizer. max_phrase_words: most words of a phrase. language: the ISO 639 code that sentencex
    splits sentences by. batch_size, max_batch_tokens: limits of one forward pass (None: chosen for the device).
    chat_template_kwargs, tools: what the chat template is given beside the messages, as the policy's prompts are.

    >>> calculator = MultiLevelPPLCalculator(tokenizer)
    >>> sorted(calculator.compute_all_levels(model=model, texts="Once there was a small fox."))
    ['phrase', 'sentence', 'word']
    """

    def __init__(
        self,
        tokenizer,
        max_phrase_words: int = DEFAULT_PHRASE_WORDS,
        language: str = DEFAULT_LANGUAGE,
        aggregation: str = DEFAULT_AGGREGATION,
        batch_size: int | None = None,
        max_batch_tokens: int | None = None,
        chat_template_kwargs: Mapping | None = None,
        tools: Sequence | None = None,
    ) -> None:
        one_of("aggregation", aggregation, AGGREGATIONS)
        for name, value in {
            "max_phrase_words": max_phrase_words,
            "batch_size": batch_size,
            "max_batch_tokens": max_batch_tokens,
        }.items():
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        self.tokenizer = tokenizer
        self.max_phrase_words = max_phrase_words
        self.language = language
        self.aggregation = aggregation
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens
        self.chat = {"chat_template_kwargs": chat_template_kwargs, "tools": tools}
        self._encoder = TextEncoder(tokenizer)
        self._scorer: SurprisalScorer | None = None

    @property
    def definitions(self) -> dict:
        """What two numbers must share to be compared."""
        return {
            "max_phrase_words": self.max_phrase_words,
            "language": self.language,
            "aggregation": self.aggregation,
        }

    def render(self, prompt: Text | None) -> str:
        """A prompt as the scorer reads it."""
        return render_prompt(prompt, self.tokenizer, **self.chat)

    def turns(self, prompt: Text | None, completion: Text) -> Turn | tuple[Turn, ...]:
        """A completion behind its prompt as `score` takes it."""
        turns = completion_turns(prompt, completion, self.tokenizer, **self.chat)
        return turns[0] if len(turns) == 1 else turns

    def compute_all_levels(self, model, texts: str | Sequence[Text], contexts=None) -> dict[str, float | torch.Tensor]:
        """`{"word": ..., "phrase": ..., "sentence": ...}`: floats for one text, float64 [B] tensors for a list.

        contexts: what stands before each text and is not scored (a string, or chat messages that end before the
        answer); one for each text, or None. A text with no scored token (empty, blank) has the perplexity nan. Of a
        text of several messages behind such a context only the assistant's are scored.
        """
        single = isinstance(texts, str)
        if single:
            texts, contexts = [texts], [contexts]
        if contexts is None:
            contexts = [None] * len(texts)
        if isinstance(contexts, str) or len(contexts) != len(texts):
            raise InputError(f"{len(texts)} texts need a list of {len(texts)} contexts, found {contexts!r:.80}")
        pairs = [self.turns(context, text) for context, text in zip(contexts, texts, strict=True)]
        values = self.score_pairs(model, pairs)
        return {
            level: float(values[0, place]) if single else torch.from_numpy(values[:, place].copy())
            for place, level in enumerate(LEVELS)
        }

    def score_pairs(self, model, pairs: Sequence[Turn | tuple[Turn, ...]]) -> np.ndarray:
        """float64 [B, 3]: the perplexities of `score`."""
        return self.score(model, pairs).perplexities

    def score(self, model, pairs: Sequence[Turn | tuple[Turn, ...]]) -> Scores:
        """Of (context, target) strings, equal ones once. Several such pairs are one text, a line break between targets:
        a unit never goes from one turn to the next."""
        unique = list(dict.fromkeys(pairs))
        turns = [[pair] if isinstance(pair[0], str) else pair for pair in unique]
        # Also without any: a model that is spread over processes has to be asked in each of them.
        encoded, surprisals = self._surprisals(model, [turn for text in turns for turn in text])
        if not pairs:
            return Scores(np.empty((0, len(LEVELS))), np.zeros(0, np.int64), np.zeros(0, np.int64), 0)
        # Each turn's characters are counted from the start of its text.
        starts = [start for text in turns for start in np.cumsum([0, *(len(target) + 1 for _, target in text[:-1])])]
        chars = [start + turn.chars for start, turn in zip(starts, encoded, strict=True)]
        firsts = np.cumsum([0, *map(len, turns)])[:-1]
        units = segment(
            ["\n".join(target for _, target in text) for text in turns], self.language, self.max_phrase_words
        )
        values = level_perplexities(units, _joined(chars, turns), _joined(surprisals, turns), self.aggregation)
        tokens = np.add.reduceat([len(turn.positions) for turn in encoded], firsts)
        read = np.add.reduceat([len(turn.ids) for turn in encoded], firsts)
        index = {pair: row for row, pair in enumerate(unique)}
        rows = [index[pair] for pair in pairs]
        return Scores(values[rows], tokens[rows], read[rows], max(len(turn.ids) for turn in encoded))

    def explain(self, model, text: Text, context: Text | None = "") -> Explained:
        """Per level the units of one text in order, each a dict: text, start, end (characters), n_tokens, surprisal
        (nats), perplexity. Units in which no token starts are left out. Its `perplexities` are the levels'."""
        target = message_text(text)
        [encoded], [surprisal] = self._surprisals(model, [(self.render(context), target)])
        units = segment([target], self.language, self.max_phrase_words)
        [values] = level_perplexities(units, [encoded.chars], [surprisal], self.aggregation)
        explained = Explained()
        explained.perplexities = dict(zip(LEVELS, values.tolist(), strict=True))
        for level, starts in units.starts.items():
            counts, sums = unit_sums(starts, encoded.chars, surprisal)
            ends = np.append(starts, len(target))[1:]
            explained[level] = [
                {
                    "text": target[start:end],
                    "start": int(start),
                    "end": int(end),
                    "n_tokens": int(count),
                    "surprisal": float(total),
                    "perplexity": float(np.exp(min(total / count, MOST_NATS))),
                }
                for start, end, count, total in zip(starts, ends, counts, sums, strict=True)
                if count
            ]
        return explained

    def _surprisals(self, model, pairs):
        if self._scorer is None or self._scorer.model is not model:
            self._scorer = SurprisalScorer(model, self.batch_size, self.max_batch_tokens)
        encoded = self._encoder.encode([context for context, _ in pairs], [target for _, target in pairs])
        return encoded, self._scorer.score(encoded)


def _joined(arrays: Sequence[np.ndarray], turns: Sequence[Sequence]) -> list[np.ndarray]:
    """One array a text of one array a turn."""
    arrays = iter(arrays)
    return [np.concatenate([next(arrays) for _ in text]) for text in turns]
