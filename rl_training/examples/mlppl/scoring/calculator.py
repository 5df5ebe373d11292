"""The calculator: texts and a model -> the perplexity of each text at each level."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
import torch

from ..config import (
    DEFAULT_AGGREGATION,
    DEFAULT_LANGUAGE,
    DEFAULT_PHRASE_WORDS,
    DEFAULT_PROMPT_TEMPLATE,
    LEVELS,
    OUTER,
    RewardConfig,
)
from ..data import Shown, Text, check_text, message_text
from ..errors import InputError
from ..prompts import Turn, Turns, completion_turns, of_text, render_prompt
from .contexts import Contexts, Views
from .levels import Scores, level_perplexities, nested_perplexities, score_views, unit_sums
from .surprisal import Scorer, SurprisalScorer, is_scorer
from .tokens import Decoding, Encoded, Sampled, TextEncoder, restore_spaces
from .units import Units, segment


class Explained(dict):
    """`{level: [unit, ...]}` of one text. `perplexities`: `{level: float}`, as `compute_all_levels` gives them.
    `names`: of nested levels, what their numbers are called where they are shown.

    A notebook shows it as the page that `multi_level_ppl_trl.py --html` writes. text, context, language: as explained.
    """

    def __init__(
        self, perplexities: dict[str, float], names: dict[str, str], text: str, context: str, language: str
    ) -> None:
        super().__init__()
        self.perplexities = perplexities
        self.names = names
        self.text = text
        self.context = context
        self.language = language

    def _repr_html_(self) -> str:
        from . import heatmap  # here, since numbers need no page

        shown = {"context": self.context, "language": self.language, "names": self.names}
        fragment = heatmap.heatmap(self, self.text, self.perplexities, **shown)
        return heatmap.Framed(heatmap.page("Multi-level perplexity", [fragment]))._repr_html_()


class _Pair(NamedTuple):
    """What scoring a text behind one context gives, its turns end to end."""

    chars: np.ndarray  # int64 [n], the character that each scored token stands for
    surprisals: np.ndarray  # float64 [n] nats
    alone: tuple[np.ndarray, ...]  # the same in its phrase and in its sentence alone; () if not asked for
    tokens: int  # read
    longest: int  # of a turn


MOST_NATS = 709.0  # a token; exp of more is beyond float64


class MultiLevelPPLCalculator:
    """Perplexity of a text at the level of its words, phrases and sentences, from one forward pass.

    Where a method takes a `model`, it takes a `mlppl.scoring.surprisal.Scorer` as well, such as one behind an address.
    A model's adapters are off; `mlppl.scoring.surprisal.SurprisalScorer(model, adapters=True)` has them on.

    A unit's perplexity is exp(S_u / n_u), its surprisal in nats over its number of tokens. A level's is the geometric
    mean of its units' perplexities, exp(mean_u S_u / n_u). With `aggregation="nested"` each level is given something
    else (`mlppl.scoring.levels`): the product of all is the text's ordinary perplexity; all but the word's are ratios,
    mostly below 1.

    tokenizer: any fast tokenizer. max_phrase_words: most words of a phrase. language: the ISO 639 code that sentencex
    splits sentences by. batch_size, max_batch_tokens: limits of one forward pass (None: chosen for the device).
    chat_template_kwargs, tools: what the chat template is given beside the messages, as the policy's prompts are.
    levels, contrast, score_without_chat: of `mlppl.config.RewardConfig`. examples: (prompt, reference) of rows that
    stand before every prompt, in the form of the prompts. others: the same of the rows that `contrast` draws from.
    prompt_template: what chat prompts were made of, taken off where they are read as text.

    >>> from mlppl.models import load_model
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
        levels: Sequence[str] = LEVELS,
        examples: Sequence[Shown] = (),
        others: Sequence[Shown] = (),
        contrast: int = 0,
        score_without_chat: bool = False,
        prompt_template: str = DEFAULT_PROMPT_TEMPLATE,
    ) -> None:
        # Without levels of their own, other rows are the reward's to compare with.
        own = {"contrast": contrast} if "prompt" in levels else {}
        config = RewardConfig(
            aggregation=aggregation, max_phrase_words=max_phrase_words, language=language, levels=levels,
            score_without_chat=score_without_chat, **own,
        )  # fmt: skip
        for name, value in {"batch_size": batch_size, "max_batch_tokens": max_batch_tokens}.items():
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        self.tokenizer = tokenizer = of_text(tokenizer)
        self._config, self.definitions = config, config.definitions
        self.max_phrase_words, self.language = config.max_phrase_words, config.language
        self.aggregation, self.levels = config.aggregation, config.levels
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens
        self.chat = {"chat_template_kwargs": chat_template_kwargs, "tools": tools}
        nested = aggregation == "nested"
        self.encoder = TextEncoder(tokenizer, eos_for_bos=nested)
        self.contexts = Contexts(
            tokenizer, self.levels, examples, others, config.contrast or contrast, score_without_chat, prompt_template,
            self.chat, self.encoder.start,
        )  # fmt: skip
        if nested and not self.encoder.start:
            raise InputError(
                "aggregation='nested' scores units alone, behind a BOS or EOS token, and the tokenizer has neither: "
                "expected another tokenizer, or aggregation='geometric'"
            )
        self._scorer: SurprisalScorer | None = None  # of a model in this process
        # The nested levels in which the chosen ones are found, each the difference of a view to the one before it.
        self._chain = [*LEVELS, *(level for level in OUTER if level in self.levels)]

    def nested_names(self, *before: str) -> dict[str, str]:
        """`mlppl.config.RewardConfig.nested_names` of texts that stand behind that, and behind the examples."""
        return self._config.nested_names(before, bool(self.contexts.examples))

    def render(self, prompt: Text | None) -> str:
        """A prompt as the policy reads it, and the scorer if nothing else stands before the text."""
        return render_prompt(prompt, self.tokenizer, **self.chat)

    def turns(self, prompt: Text | None, completion: Text) -> Turn | Turns:
        """A completion behind its prompt as that is."""
        turns = completion_turns(prompt, completion, self.tokenizer, **self.chat)
        return turns[0] if len(turns) == 1 else turns

    def text(
        self, prompt: Text | None, completion: Text, sampled: Sampled | None = None
    ) -> Turn | Turns | Sampled | Views:
        """A completion as `score` takes it: behind what its levels want it behind. sampled: its ids."""
        return self.contexts.of(prompt, completion, sampled or self.turns(prompt, completion))

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
        values = self.score_pairs(model, list(map(self.text, contexts, texts)))
        return {
            level: float(values[0, index]) if single else torch.from_numpy(values[:, index].copy())
            for index, level in enumerate(self.levels)
        }

    def score_pairs(self, model, texts: Sequence[Turn | Turns | Sampled | Views]) -> np.ndarray:
        """float64 [B, L]: the perplexities of `score`."""
        return self.score(model, texts).perplexities

    def score(self, model, texts: Sequence[Turn | Turns | Sampled | Views]) -> Scores:
        """Of (context, target) strings, of what was sampled, or of such in several contexts; equal ones once. Several
        turns are one text whose units end with each turn."""
        unique = list(dict.fromkeys(texts))
        # Also without any: a model that is spread over processes has to be asked in each of them.
        units, found = self._score(model, unique, inner=bool({*LEVELS} & {*self.levels}))
        if not unique:
            return Scores(np.empty((0, len(self.levels))), np.zeros(0, np.int64), np.zeros(0, np.int64), 0)
        index = {one: row for row, one in enumerate(unique)}
        rows = [index[one] for one in texts]
        tokens = np.array([len(views[-1][0].chars) for views in found])
        read = np.array([sum(pair.tokens for view in views for pair in view) for views in found])
        longest = max(pair.longest for views in found for view in views for pair in view)
        return Scores(self._perplexities(units, found)[rows], tokens[rows], read[rows], longest)

    def explain(self, model, text: Text, context: Text | None = "") -> Explained:
        """Per level the units of one text in order, each a dict: text, start, end (characters), n_tokens, surprisal
        (nats), perplexity. Units in which no token starts are left out. Its `perplexities` are the levels'. In a
        notebook it is shown as a page.

        With nested levels also a, b, c, ..., the unit's sums in nats under each view of `mlppl.scoring.levels`,
        outward; its perplexity is that of what its level measures: exp of the mean of a, of b - a, of c - b, ... The
        units of levels prompt and examples are the words.
        """
        check_text(text, "text")
        check_text("" if context is None else context, "context")
        return self.explain_pair(model, self.text(context, message_text(text)))

    def explain_pair(self, model, text: Turn | Sampled | Views) -> Explained:
        """As `explain`, of what `score` takes, but for several turns."""
        units, [views] = self._score(model, [text], inner=True)
        [values] = self._perplexities(units, [views])
        own, [as_it_stands] = text[-1][0] if isinstance(text, Views) else text, views[-1]
        context, target = ("", self.encoder.encode_pairs([own])[1][0]) if isinstance(own, Sampled) else own
        names = self.nested_names(*(["context"] if context else []))
        levels = dict(zip(self.levels, values.tolist(), strict=True))
        explained = Explained(levels, names, target, context, self.language)
        # The views of `mlppl.scoring.levels`, outward, each of one pair or more.
        inward = [[(as_it_stands.chars, one)] for one in as_it_stands.alone]
        inward += [[(pair.chars, pair.surprisals) for pair in view] for view in views]
        for level in self.levels:
            starts = units.starts["word" if level in OUTER else level]
            counts, totals = unit_sums(starts, as_it_stands.chars, as_it_stands.surprisals)
            sums = [np.mean([unit_sums(starts, *one)[1] for one in view], axis=0) for view in inward]
            rated = totals
            if self.aggregation == "nested":
                rated = np.diff(sums, axis=0, prepend=0.0)[self._chain.index(level)]
            nested = sums if self.aggregation == "nested" else []
            ends = np.append(starts, len(target))[1:]
            explained[level] = [
                {
                    "text": target[start:end],
                    "start": int(start),
                    "end": int(end),
                    "n_tokens": int(counts[unit]),
                    "surprisal": float(totals[unit]),
                    "perplexity": float(np.exp(min(rated[unit] / counts[unit], MOST_NATS))),
                    **{name: float(of_view[unit]) for name, of_view in zip("abcde", nested, strict=False)},
                }
                for unit, (start, end) in enumerate(zip(starts, ends, strict=True))
                if counts[unit]
            ]
        return explained

    def last(self, prompt: Text | None, completion: Text) -> Turn | Turns | Sampled:
        """A completion behind all that stands before it."""
        text = self.text(prompt, completion)
        return text[-1][0] if isinstance(text, Views) else text

    def mean_surprisals(self, model, pairs: Sequence[Turn | Turns | Sampled]) -> np.ndarray:
        """float64 [B], nats a token: the logarithm of the ordinary perplexity; nan without a scored token."""
        _, found = self._score(model, pairs, inner=False)
        with np.errstate(invalid="ignore"):
            return np.array([one.surprisals.sum() / np.float64(len(one.chars)) for [[one]] in found])

    def restore_spaces(self, model, pairs: Sequence[Turn], decoding: Decoding) -> list[str]:
        """The targets, each with the space that it may have lost when it was decoded alone: see `mlppl.scoring.tokens`.

        decoding: of the tokenizer that decoded them.
        """
        return restore_spaces(self.encoder, lambda encoded: self._scorer_of(model).score(encoded), pairs, decoding)

    def _score(self, model, texts: Sequence, inner: bool) -> tuple[Units, list[list[list[_Pair]]]]:
        """(the units of the texts as they stand; per text, view and context what scoring gave). inner: with nested
        levels, score also units alone."""
        all_views = [one if isinstance(one, Views) else Views([(one,)]) for one in texts]
        pairs = [pair for views in all_views for view in views for pair in view]
        # A text as it stands is its last view, of one pair.
        lasts = [end - 1 for end in accumulate(sum(map(len, views)) for views in all_views)]
        turns = [pair if isinstance(pair, Turns) else (pair,) for pair in pairs]
        spans = list(pairwise(accumulate(map(len, turns), initial=0)))  # the turns of each pair
        encoded, targets = self.encoder.encode_pairs(list(chain(*turns)))
        scorer = self._scorer_of(model)
        self.refuse_cut(scorer.window, encoded)
        as_they_stand = [turn for last in lasts for turn in range(*spans[last])]
        its_targets = [targets[turn] for turn in as_they_stand]
        if self.aggregation == "nested":
            units = self._units(its_targets)
            scored = score_views(scorer, encoded, as_they_stand if inner else (), units, self.encoder.start)
        else:
            # A GPU computes while the units are found.
            read = scorer.start(encoded) if isinstance(scorer, SurprisalScorer) else partial(scorer.score, encoded)
            units = self._units(its_targets)
            scored = [[one] for one in read()]

        def pair_of(first: int, last: int) -> _Pair:
            before = accumulate((len(target) for target in targets[first:last]), initial=0)
            chars = [offset + one.chars for offset, one in zip(before, encoded[first:last], strict=False)]
            *alone, surprisals = (np.concatenate(views) for views in zip(*scored[first:last], strict=True))
            sizes = [len(one.ids) for one in encoded[first:last]]
            return _Pair(np.concatenate(chars), surprisals, tuple(alone), sum(sizes), max(sizes))

        found = iter([pair_of(*span) for span in spans])
        of_texts = [[[next(found) for _ in view] for view in views] for views in all_views]
        firsts = np.cumsum([0, *(spans[last][1] - spans[last][0] for last in lasts)])
        return Units(units.offsets[firsts], units.starts), of_texts

    def refuse_cut(self, window: int | None, encoded: Sequence[Encoded], more: int = 0) -> None:
        """Raises `InputError` if examples would fall out of the model's window: a long text is read in several.

        more: tokens that a text may still get."""
        longest = max((len(one.ids) for one in encoded), default=0) + more
        if self.contexts.examples and window is not None and longest > window:
            raise InputError(
                f"{len(self.contexts.examples)} examples, a prompt and a text are {'up to ' if more else ''}{longest} "
                f"tokens, more than the {window} that the scorer reads at once: expected at most "
                f"{self.contexts.most_that_fit(longest - window)} of these examples, or shorter ones"
            )

    def _units(self, targets: Sequence[str]) -> Units:
        return segment(targets, self.language, self.max_phrase_words)

    def _perplexities(self, units: Units, found: list[list[list[_Pair]]]) -> np.ndarray:
        """float64 [B, L], of what `_score` gives."""
        if self.aggregation != "nested":
            own = [views[-1][0] for views in found]
            values = level_perplexities(units, [one.chars for one in own], [one.surprisals for one in own])
            return values[:, [LEVELS.index(level) for level in self.levels]]
        outer = len(self._chain) - len(LEVELS) + 1
        means = np.full((len(found), len(self._chain)), np.nan)
        for row, views in enumerate(found):
            if len(views) != outer:
                raise ValueError(f"levels {', '.join(self.levels)} need {outer} views of a text, found {len(views)}")
            if len(views[-1][0].chars):
                alone = [one.mean() for one in views[-1][0].alone]
                whole = [np.mean([pair.surprisals.mean() for pair in view]) for view in views]
                means[row, -len(whole) - len(alone) :] = alone + whole
        return nested_perplexities(means)[:, [self._chain.index(level) for level in self.levels]]

    def _scorer_of(self, model) -> Scorer:
        if is_scorer(model):
            return model
        if self._scorer is None or self._scorer.model is not model:
            self._scorer = SurprisalScorer(model, self.batch_size, self.max_batch_tokens)
        return self._scorer
