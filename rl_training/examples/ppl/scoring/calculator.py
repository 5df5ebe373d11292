"""The calculator: texts and a model -> the perplexity of each text at each level."""

from collections.abc import Sequence

import numpy as np
import torch

from ..data import Text, message_text, render_prompt
from ..definitions import AGGREGATIONS, DEFAULT_AGGREGATION, DEFAULT_LANGUAGE, DEFAULT_PHRASE_WORDS, LEVELS
from ..errors import InputError, one_of
from .levels import level_perplexities, unit_sums
from .nested import Scopes, nested_perplexities, score_scopes
from .seams import restore_spaces
from .surprisal import SurprisalScorer
from .tokens import Encoded, Pair, Sampled, TextEncoder
from .units import Units, segment

MOST_NATS = 709.0  # a token; exp of more is beyond float64


class MultiLevelPPLCalculator:
    """Perplexity of a text at the level of its words, phrases and sentences, from one forward pass.

    A unit's perplexity is exp(S_u / n_u), its surprisal in nats over its number of tokens. A level's is the geometric
    mean of its units' perplexities, exp(mean_u S_u / n_u), or with `aggregation="arithmetic"` their mean. With
    `aggregation="selective"` each level takes the geometric mean of what its own faults show in: the most surprising
    fifth of the words, the median phrase, the first words of sentences. With `aggregation="nested"` each level is given
    something else (`ppl.scoring.nested`): their product is the text's ordinary perplexity; phrase and sentence are
    ratios, mostly below 1.

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
        nested = aggregation == "nested"
        self._encoder = TextEncoder(tokenizer, eos_for_bos=nested)
        if nested and self._encoder.start is None:
            raise InputError(
                "aggregation='nested' scores units alone, behind a BOS or EOS token, and the tokenizer has neither: "
                f"expected another tokenizer or one of {', '.join(name for name in AGGREGATIONS if name != 'nested')}"
            )
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
        encoded, targets = self._encoder.encode_pairs(unique)
        units = segment(targets, self.language, self.max_phrase_words)
        # Also without any: a model that is spread over processes has to be asked in each of them.
        if self.aggregation == "nested":
            values = nested_perplexities(self._scopes(model, encoded, units))
        else:
            surprisals = self._scorer_of(model).score(encoded)
            if unique:
                values = level_perplexities(units, [text.chars for text in encoded], surprisals, self.aggregation)
        if not pairs:
            return np.empty((0, len(LEVELS)))
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
        (nats), perplexity. Units in which no token starts are left out.

        With nested levels also a, b and c, the unit's sums in nats (`ppl.scoring.nested`); c is its surprisal, and its
        perplexity is that of what its level measures: exp of the mean of a, of b - a, of c - b.
        """
        return self.explain_pair(model, (render_prompt(context, self.tokenizer), message_text(text)))

    def explain_pair(self, model, pair: Pair) -> dict[str, list[dict]]:
        """As `explain`, of a (context, target) or of what was sampled."""
        encoded, [target] = self._encoder.encode_pairs([pair])
        units = segment([target], self.language, self.max_phrase_words)
        if self.aggregation == "nested":
            [a], [b], [c] = self._scopes(model, encoded, units)
            scopes, measured = {"a": a, "b": b, "c": c}, dict(zip(LEVELS, (a, b - a, c - b), strict=True))
        else:
            [c] = self._scorer_of(model).score(encoded)
            scopes, measured = {}, dict.fromkeys(LEVELS, c)
        explained = {}
        for level, starts in units.starts.items():
            counts, totals = unit_sums(starts, encoded[0].chars, c)
            _, rated = unit_sums(starts, encoded[0].chars, measured[level])
            sums = {name: unit_sums(starts, encoded[0].chars, scope)[1] for name, scope in scopes.items()}
            ends = np.append(starts, len(target))[1:]
            explained[level] = [
                {
                    "text": target[start:end],
                    "start": int(start),
                    "end": int(end),
                    "n_tokens": int(counts[unit]),
                    "surprisal": float(totals[unit]),
                    "perplexity": float(np.exp(min(rated[unit] / counts[unit], MOST_NATS))),
                    **{name: float(values[unit]) for name, values in sums.items()},
                }
                for unit, (start, end) in enumerate(zip(starts, ends, strict=True))
                if counts[unit]
            ]
        return explained

    def _scopes(self, model, encoded: Sequence[Encoded], units: Units) -> Scopes:
        return score_scopes(self._scorer_of(model), encoded, units, self._encoder.start)

    def _scorer_of(self, model) -> SurprisalScorer:
        if self._scorer is None or self._scorer.model is not model:
            self._scorer = SurprisalScorer(model, self.batch_size, self.max_batch_tokens)
        return self._scorer
