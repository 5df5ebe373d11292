"""The calculator: texts and a model -> the perplexity of each text at each level."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from ..config import DEFAULT_AGGREGATION, DEFAULT_LANGUAGE, DEFAULT_PHRASE_WORDS, LEVELS, RewardConfig
from ..data import Text, check_text, message_text
from ..errors import InputError
from ..prompts import Turn, Turns, completion_turns, of_text, render_prompt
from .levels import Scopes, Scores, level_perplexities, nested_perplexities, score_scopes, unit_sums
from .surprisal import Scorer, SurprisalScorer, is_scorer
from .tokens import Decoding, Encoded, Sampled, TextEncoder, restore_spaces
from .units import Units, segment

# --- explained -------------------------------------------------------------------------------------------------------

# What `MultiLevelPPLCalculator.explain` gives: a dict of units that a notebook shows as a coloured text.


class Explained(dict):
    """`{level: [unit, ...]}` of one text. `perplexities`: `{level: float}`, as `compute_all_levels` gives them.

    A notebook shows it as the page that `multi_level_ppl_trl.py --html` writes. text, context, language: as explained.
    """

    def __init__(self, perplexities: dict[str, float], text: str, context: str, language: str) -> None:
        super().__init__()
        self.perplexities = perplexities
        self.text = text
        self.context = context
        self.language = language

    def _repr_html_(self) -> str:
        from . import heatmap  # here, since numbers need no page

        fragment = heatmap.heatmap(self, self.text, self.perplexities, context=self.context, language=self.language)
        return heatmap.Framed(heatmap.page("Multi-level perplexity", [fragment]))._repr_html_()


# --- calculator ------------------------------------------------------------------------------------------------------

MOST_NATS = 709.0  # a token; exp of more is beyond float64


class MultiLevelPPLCalculator:
    """Perplexity of a text at the level of its words, phrases and sentences, from one forward pass.

    Where a method takes a `model`, it takes a `ppl.scoring.surprisal.Scorer` as well, such as one behind an address.

    A unit's perplexity is exp(S_u / n_u), its surprisal in nats over its number of tokens. A level's is the geometric
    mean of its units' perplexities, exp(mean_u S_u / n_u). With `aggregation="nested"` each level is given something
    else (`ppl.scoring.levels`): their product is the text's ordinary perplexity; phrase and sentence are ratios, mostly
    below 1.

    tokenizer: any fast tokenizer. max_phrase_words: most words of a phrase. language: the ISO 639 code that sentencex
    splits sentences by. batch_size, max_batch_tokens: limits of one forward pass (None: chosen for the device).
    chat_template_kwargs, tools: what the chat template is given beside the messages, as the policy's prompts are.

    >>> from ppl.models import load_model
    >>> model, tokenizer, _ = load_model("tiny-stories")
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
        config = RewardConfig(aggregation=aggregation, max_phrase_words=max_phrase_words, language=language)
        for name, value in {"batch_size": batch_size, "max_batch_tokens": max_batch_tokens}.items():
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        self.tokenizer = tokenizer = of_text(tokenizer)
        self.definitions = config.definitions
        self.max_phrase_words, self.language = config.max_phrase_words, config.language
        self.aggregation = config.aggregation
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens
        self.chat = {"chat_template_kwargs": chat_template_kwargs, "tools": tools}
        nested = aggregation == "nested"
        self._encoder = TextEncoder(tokenizer, eos_for_bos=nested)
        if nested and not self.encoder.start:
            raise InputError(
                "aggregation='nested' scores units alone, behind a BOS or EOS token, and the tokenizer has neither: "
                "expected another tokenizer, or aggregation='geometric'"
            )
        self._scorer: SurprisalScorer | None = None  # of a model in this process

    def render(self, prompt: Text | None) -> str:
        """A prompt as the scorer reads it."""
        return render_prompt(prompt, self.tokenizer, **self.chat)

    def turns(self, prompt: Text | None, completion: Text) -> Turn | Turns:
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
        for index, (context, text) in enumerate(zip(contexts, texts, strict=True)):
            check_text(text, f"text {index}")
            check_text("" if context is None else context, f"context {index}")
        pairs = [self.turns(context, text) for context, text in zip(contexts, texts, strict=True)]
        values = self.score_pairs(model, pairs)
        return {
            level: float(values[0, index]) if single else torch.from_numpy(values[:, index].copy())
            for index, level in enumerate(LEVELS)
        }

    def score_pairs(self, model, pairs: Sequence[Turn | Turns | Sampled]) -> np.ndarray:
        """float64 [B, 3]: the perplexities of `score`."""
        return self.score(model, pairs).perplexities

    def score(self, model, pairs: Sequence[Turn | Turns | Sampled]) -> Scores:
        """Of (context, target) strings, or of what was sampled; equal ones once. Several turns are one text whose units
        end with each turn."""
        unique = list(dict.fromkeys(pairs))
        texts = [pair if isinstance(pair, Turns) else (pair,) for pair in unique]
        turns = [turn for text in texts for turn in text]
        encoded, targets = self._encoder.encode_pairs(turns)
        # Also without any: a model that is spread over processes has to be asked in each of them.
        units, views = self._score(model, encoded, targets)
        if not pairs:
            return Scores(np.empty((0, len(LEVELS))), np.zeros(0, np.int64), np.zeros(0, np.int64), 0)
        firsts = np.cumsum([0, *map(len, texts)])  # the turn that each text begins with

        def of_texts(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
            return [np.concatenate(arrays[first:last]) for first, last in pairwise(firsts.tolist())]

        # A text's characters are those of its turns, end to end.
        before = units.offsets[:-1] - np.repeat(units.offsets[firsts[:-1]], np.diff(firsts))
        chars = of_texts([start + turn.chars for start, turn in zip(before, encoded, strict=True)])
        views = list(map(of_texts, views))
        values = self._perplexities(Units(units.offsets[firsts], units.starts), chars, views)
        tokens = np.array(list(map(len, chars)))
        read = np.add.reduceat([len(turn.ids) for turn in encoded], firsts[:-1])
        index = {pair: row for row, pair in enumerate(unique)}
        rows = [index[pair] for pair in pairs]
        return Scores(values[rows], tokens[rows], read[rows], max(len(turn.ids) for turn in encoded))

    def explain(self, model, text: Text, context: Text | None = "") -> Explained:
        """Per level the units of one text in order, each a dict: text, start, end (characters), n_tokens, surprisal
        (nats), perplexity. Units in which no token starts are left out. Its `perplexities` are the levels'. In a
        notebook it is shown as a page.

        With nested levels also a, b and c, the unit's sums in nats (`ppl.scoring.levels`); c is its surprisal, and its
        perplexity is that of what its level measures: exp of the mean of a, of b - a, of c - b.
        """
        check_text(text, "text")
        check_text("" if context is None else context, "context")
        return self.explain_pair(model, (self.render(context), message_text(text)))

    def explain_pair(self, model, pair: Turn | Sampled) -> Explained:
        """As `explain`, of a (context, target) or of what was sampled."""
        encoded, [target] = self._encoder.encode_pairs([pair])
        units, views = self._score(model, encoded, [target])
        c = views[-1][0]
        scopes, measured = {}, dict.fromkeys(LEVELS, c)
        if self.aggregation == "nested":
            [a], [b], [c] = views
            scopes, measured = {"a": a, "b": b, "c": c}, dict(zip(LEVELS, (a, b - a, c - b), strict=True))
        [values] = self._perplexities(units, [encoded[0].chars], views)
        perplexities = dict(zip(LEVELS, values.tolist(), strict=True))
        context = "" if isinstance(pair, Sampled) else pair[0]
        explained = Explained(perplexities, target, context, self.language)
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

    @property
    def encoder(self) -> TextEncoder:
        return self._encoder

    def restore_spaces(self, model, pairs: Sequence[Turn], decoding: Decoding) -> list[str]:
        """The targets, each with the space that it may have lost when it was decoded alone: see `ppl.scoring.tokens`.

        decoding: of the tokenizer that decoded them.
        """
        return restore_spaces(self._encoder, lambda encoded: self._scorer_of(model).score(encoded), pairs, decoding)

    def _units(self, targets: Sequence[str]) -> Units:
        return segment(targets, self.language, self.max_phrase_words)

    def _score(self, model, encoded: Sequence[Encoded], targets: Sequence[str]) -> tuple[Units, Sequence[list]]:
        """The targets' units; and of each text's scored tokens, float64 [n] in nats: with nested levels the three
        `Scopes`, else one view."""
        scorer = self._scorer_of(model)
        if self.aggregation == "nested":
            units = self._units(targets)
            return units, score_scopes(scorer, encoded, units, self.encoder.start)
        # A GPU computes while the units are found.
        read = scorer.start(encoded) if isinstance(scorer, SurprisalScorer) else partial(scorer.score, encoded)
        units = self._units(targets)
        return units, (read(),)

    def _perplexities(self, units: Units, chars, views: Sequence[list[np.ndarray]]) -> np.ndarray:
        """float64 [B, 3] from the views of `_score` and the characters that the tokens stand for."""
        if self.aggregation == "nested":
            return nested_perplexities(Scopes(*views))
        return level_perplexities(units, chars, *views)

    def _scorer_of(self, model) -> Scorer:
        if is_scorer(model):
            return model
        if self._scorer is None or self._scorer.model is not model:
            self._scorer = SurprisalScorer(model, self.batch_size, self.max_batch_tokens)
        return self._scorer
