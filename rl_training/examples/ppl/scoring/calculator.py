"""The calculator: texts and a model -> the perplexity of each text at each level."""

from collections.abc import Sequence

import numpy as np
import torch

from ..data import Text, message_text, render_prompt
from ..definitions import AGGREGATIONS, DEFAULT_AGGREGATION, DEFAULT_LANGUAGE, DEFAULT_PHRASE_WORDS, LEVELS
from ..errors import InputError, one_of
from .levels import level_perplexities, unit_sums
from .seams import restore_spaces
from .surprisal import SurprisalScorer
from .tokens import Pair, Sampled, TextEncoder
from .units import segment

MOST_NATS = 709.0  # a token; exp of more is beyond float64


class MultiLevelPPLCalculator:
    """Perplexity of a text at the level of its words, phrases and sentences, from one forward pass.

    A unit's perplexity is exp(S_u / n_u), its surprisal in nats over its number of tokens. A level's is the geometric
    mean of its units' perplexities, exp(mean_u S_u / n_u), or with `aggregation="arithmetic"` their mean. With
    `aggregation="selective"` each level takes the geometric mean of what its own faults show in: the most surprising
    fifth of the words, the median phrase, the first words of sentences.

    tokenizer: any fast tokenizer. max_phrase_words: most words of a phrase. language: the ISO 639 code that sentencex
    splits sentences by. batch_size, max_batch_tokens: limits of one forward pass (None: chosen for the device).

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

    def compute_all_levels(self, model, texts: str | Sequence[Text], contexts=None) -> dict[str, float | torch.Tensor]:
        """`{"word": ..., "phrase": ..., "sentence": ...}`: floats for one text, float64 [B] tensors for a list.

        contexts: what stands before each text and is not scored (a string, or chat messages that end before the
        answer); one for each text, or None. A text with no scored token (empty, blank) has the perplexity nan.
        """
        single = isinstance(texts, str)
        if single:
            texts, contexts = [texts], [contexts]
        if contexts is None:
            contexts = [None] * len(texts)
        if isinstance(contexts, str) or len(contexts) != len(texts):
            raise InputError(f"{len(texts)} texts need a list of {len(texts)} contexts, found {contexts!r:.80}")
        pairs = [
            (render_prompt(context, self.tokenizer), message_text(text))
            for context, text in zip(contexts, texts, strict=True)
        ]
        values = self.score_pairs(model, pairs)
        return {
            level: float(values[0, place]) if single else torch.from_numpy(values[:, place].copy())
            for place, level in enumerate(LEVELS)
        }

    def score_pairs(self, model, pairs: Sequence[Pair]) -> np.ndarray:
        """float64 [B, 3], perplexities in the order of `LEVELS`, of (context, target) strings or `Sampled` ids; equal
        ones once."""
        unique = list(dict.fromkeys(pairs))
        # Also without any: a model that is spread over processes has to be asked in each of them.
        encoded, targets, surprisals = self._surprisals(model, unique)
        if not pairs:
            return np.empty((0, len(LEVELS)))
        units = segment(targets, self.language, self.max_phrase_words)
        values = level_perplexities(units, [text.chars for text in encoded], surprisals, self.aggregation)
        places = {pair: place for place, pair in enumerate(unique)}
        return values[[places[pair] for pair in pairs]]

    def written(self, sampled: Sequence[Sampled]) -> list[str]:
        """The text of each completion behind its prompt."""
        return [text for _, text in self._encoder.encode_sampled(sampled)]

    def restore_spaces(self, model, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """The targets, each with the space that it may have lost when it was decoded alone: see `ppl.scoring.seams`."""
        return restore_spaces(self._encoder, lambda encoded: self._scorer_of(model).score(encoded), pairs)

    def explain(self, model, text: Text, context: Text | None = "") -> dict[str, list[dict]]:
        """Per level the units of one text in order, each a dict: text, start, end (characters), n_tokens, surprisal
        (nats), perplexity. Units in which no token starts are left out."""
        return self.explain_pair(model, (render_prompt(context, self.tokenizer), message_text(text)))

    def explain_pair(self, model, pair: Pair) -> dict[str, list[dict]]:
        """As `explain`, of a (context, target) or of what was sampled."""
        [encoded], [target], [surprisal] = self._surprisals(model, [pair])
        explained = {}
        for level, starts in segment([target], self.language, self.max_phrase_words).starts.items():
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

    def _surprisals(self, model, pairs: Sequence[Pair]):
        encoded, targets = self._encoder.encode_pairs(pairs)
        return encoded, targets, self._scorer_of(model).score(encoded)

    def _scorer_of(self, model) -> SurprisalScorer:
        if self._scorer is None or self._scorer.model is not model:
            self._scorer = SurprisalScorer(model, self.batch_size, self.max_batch_tokens)
        return self._scorer
