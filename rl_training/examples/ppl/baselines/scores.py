"""Rows -> their perplexities: what a baseline is."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import cli
from ..data import Columns, message_text, render_prompt, stable_id
from ..errors import InputError
from ..identity import identity
from ..models import load_model, model_path
from ..reference_context import ReferenceContext
from .file import versions
from .rows import Row, Window


class Scores(NamedTuple):
    perplexities: np.ndarray  # float64 [B, 3], nan where no token is scored
    tokens: np.ndarray  # int64 [B], scored ones
    read: np.ndarray  # int64 [B], with those of the context and BOS
    longest: int  # text, in tokens


class Scorer(NamedTuple):
    score: Callable[[Sequence[Row]], Scores]
    identity: dict  # what the meta file says of model, tokenizer and definitions
    device: str


def load_scorer(args: argparse.Namespace, columns: Columns, device: str | None) -> Scorer:
    """A model that gives a row the perplexity of its reference given its prompt, or of its prompt alone."""
    import torch

    in_4bit = is_4bit(args.model_name) if args.load_in_4bit is None else args.load_in_4bit
    # On a CPU and not quantised, Unsloth's model is that of transformers.
    on_gpu = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    unsloth = not args.no_unsloth and (in_4bit or on_gpu)
    model, tokenizer, reason = load_model(
        args.model_name,
        load_in_4bit=in_4bit,
        dtype=args.dtype,
        device=device,
        max_seq_length=args.max_seq_length,
        unsloth=unsloth,
    )
    if reason is not None:
        print(f"Without Unsloth: {reason}", file=sys.stderr)

    from ..sampling import sample
    from ..scoring.calculator import MultiLevelPPLCalculator
    from ..scoring.surprisal import SurprisalScorer
    from ..scoring.tokens import Sampled, TextEncoder

    calculator = MultiLevelPPLCalculator(tokenizer, batch_size=args.batch_size, **cli.definitions(args))
    encoder = TextEncoder(tokenizer)
    reference_context = ReferenceContext(template=args.template)

    def score_own_writing(rows: Sequence[Row]) -> Scores:
        """Per row the mean over completions that the model samples now: what a policy that starts from it can do."""
        completions = sample(
            model,
            tokenizer,
            [row.prompt for row in rows],
            num_generations=args.generate,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed + rows[0].place,  # the same wherever an earlier run stopped
        )
        pairs = [Sampled(tuple(one.prompt_ids), tuple(one.ids)) for group in completions for one in group]
        encoded = [one for one, _ in encoder.encode_sampled(pairs)]
        shape = (len(rows), args.generate)
        sizes = np.array([len(text.ids) for text in encoded])
        perplexities = calculator.score_pairs(model, pairs).reshape(*shape, -1)
        scored = ~np.isnan(perplexities[..., 0])
        total = np.where(scored[..., None], perplexities, 0.0).sum(axis=1)
        with np.errstate(invalid="ignore"):  # nan where the model wrote nothing that can be scored
            means = total / scored.sum(axis=1)[:, None]
        return Scores(
            means,
            np.array([len(text.positions) for text in encoded]).reshape(shape).sum(axis=1),
            sizes.reshape(shape).sum(axis=1),
            int(sizes.max()),
        )

    def score(rows: Sequence[Row]) -> Scores:
        if columns.reference is None:
            pairs = [("", message_text(row.prompt)) for row in rows]
        else:
            contexts = [render_prompt(row.prompt, tokenizer) for row in rows]
            if args.target == "reference":
                contexts = list(map(reference_context.context, contexts))
            pairs = [(context, message_text(row.reference)) for context, row in zip(contexts, rows, strict=True)]
        encoded = encoder.encode(*zip(*pairs, strict=True))
        return Scores(
            calculator.score_pairs(model, pairs),
            np.array([len(text.positions) for text in encoded]),
            sizes := np.array([len(text.ids) for text in encoded]),
            int(sizes.max()),
        )

    made_with = {
        **identity(
            model,
            tokenizer,
            name=args.model_name,
            window=SurprisalScorer(model).window,
            target=args.target,
            definitions=calculator.definitions,
            template=args.template,
        ),
        "generated": generation(args),
        "unsloth": unsloth and reason is None,
        "versions": versions(),
    }
    return Scorer(score_own_writing if args.generate else score, made_with, model.device.type)


def generation(args: argparse.Namespace) -> dict | None:
    """How completions are sampled for baselines of the model's own writing; None for those of the data set's texts."""
    names = ("generate", "max_new_tokens", "temperature", "seed")
    return {name: getattr(args, name) for name in names} if args.generate else None


def is_4bit(name: str) -> bool:
    """Whether a checkpoint was saved with 4-bit weights, as those of Unsloth named ...-bnb-4bit are."""
    config = Path(model_path(name), "config.json")
    if not config.exists():
        return name.endswith("bnb-4bit")
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("quantization_config", {}).get("load_in_4bit"))
    except (ValueError, AttributeError) as error:
        raise InputError(f"{config} is no JSON object ({error}): expected a model of transformers") from error


def score_window(window: Window, score: Callable[[Sequence[Row]], Scores]) -> tuple[dict, list[list]]:
    """A shard: what is counted, and per row [place, id, word, phrase, sentence, scored tokens, hash of the prompt]."""
    records = []
    header = {"digest": window.digest, "rows": len(window.rows), "blank": window.blank}
    if window.rows:
        try:
            perplexities, tokens, read, longest = score(window.rows)
        except FloatingPointError as error:
            raise InputError(
                f"in rows {window.rows[0].place} to {window.rows[-1].place}: {error}: try --dtype float32 or bfloat16"
            ) from error
        for row, values, count in zip(window.rows, perplexities.tolist(), tokens.tolist(), strict=True):
            if count and not np.isfinite(values).all():
                raise InputError(f"row {row.place}, id {row.id!r}: perplexities {values}: leave the row out")
            if count:
                records.append([row.place, row.id, *values, count, stable_id(row.prompt)])
        header |= {"tokens": int(tokens.sum()), "read": int(read.sum()), "longest": longest}
    return {"tokens": 0, "read": 0, "longest": 0, **header, "unscored": len(window.rows) - len(records)}, records
