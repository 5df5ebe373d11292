"""Rows -> their perplexities: what a baseline is."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import cli
from ..chat import chat_identity
from ..data import Columns, has_reference, message_text, stable_id
from ..errors import InputError
from ..identity import identity
from ..models import load_model, model_path
from ..reference_context import ReferenceContext
from ..scoring.levels import Scores
from .file import beginning
from .meta import versions
from .rows import Row, Window


class Scorer(NamedTuple):
    score: Callable[[Sequence[Row]], Scores]
    identity: dict  # what the meta file says of model, tokenizer and definitions
    device: str


def load_scorer(args: argparse.Namespace, columns: Columns, device: str | None) -> Scorer:
    """A model that gives a row the perplexity of its reference given its prompt, or of its prompt alone.

    With --scorer_url it is a server's, and a model is only loaded here for --generate, to write the texts.
    """
    server, model, unsloth = None, None, False
    if args.scorer_url:
        from ..scoring.server import connect

        server, tokenizer = connect(args.scorer_url, args.model_name, args.chat_template_path)
    if server is None or args.generate:
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
            chat_template_path=args.chat_template_path,
        )
        if reason is not None:
            print(f"Without Unsloth: {reason}", file=sys.stderr)
        unsloth &= reason is None
    return _scorer_of(args, columns, server, model, tokenizer, unsloth)


def _scorer_of(args: argparse.Namespace, columns: Columns, server, model, tokenizer, unsloth: bool) -> Scorer:
    """server: what scores, None: the model. model: what writes for --generate, and where there is no server, scores."""
    from ..sampling import sample
    from ..scoring.calculator import MultiLevelPPLCalculator
    from ..scoring.scorer import as_scorer
    from ..scoring.tokens import Sampled

    form, chat = cli.prompt_form(args), cli.chat_options(args)
    calculator = MultiLevelPPLCalculator(tokenizer, batch_size=args.batch_size, **cli.definitions(args), **chat)
    reference_context = ReferenceContext(template=args.template)
    scoring = model if server is None else server

    def score_own_writing(rows: Sequence[Row]) -> Scores:
        """Per row the mean over completions that the model samples now: what a policy that starts from it can do."""
        completions = sample(
            model,
            tokenizer,
            [row.prompt for row in rows],
            num_generations=args.generate,
            **asdict(cli.sampling(args)),
            seed=args.seed + rows[0].number,  # the same wherever an earlier run stopped
            **chat,
        )
        pairs = [Sampled(tuple(one.prompt_ids), tuple(one.written)) for group in completions for one in group]
        perplexities, tokens, read, longest = calculator.score(scoring, pairs)
        perplexities = perplexities.reshape(len(rows), args.generate, -1)
        scored = ~np.isnan(perplexities[..., 0])
        total = np.where(scored[..., None], perplexities, 0.0).sum(axis=1)
        with np.errstate(invalid="ignore"):  # nan where the model wrote nothing that can be scored
            means = total / scored.sum(axis=1)[:, None]
        tokens, read = (counts.reshape(len(rows), args.generate).sum(axis=1) for counts in (tokens, read))
        return Scores(means, tokens, read, longest)

    def score(rows: Sequence[Row]) -> Scores:
        if not has_reference(columns, form):
            pairs = [("", message_text(row.prompt)) for row in rows]
        elif args.target == "reference":
            contexts = [reference_context.context(calculator.render(row.prompt)) for row in rows]
            pairs = [(context, message_text(row.reference)) for context, row in zip(contexts, rows, strict=True)]
        else:
            pairs = [calculator.turns(row.prompt, row.reference) for row in rows]
        return calculator.score(scoring, pairs)

    made_with = {
        **identity(
            as_scorer(scoring, tokenizer),
            tokenizer,
            name=args.model_name,
            target=args.target,
            definitions=calculator.definitions,
            template=args.template,
            prompt=chat_identity(tokenizer, **chat),
        ),
        "generated": generation(args),
        "unsloth": unsloth,
        "versions": versions(),
    }
    device = "cpu" if model is None else model.device.type
    return Scorer(score_own_writing if args.generate else score, made_with, device)


def generation(args: argparse.Namespace) -> dict | None:
    """How completions are sampled for baselines of the model's own writing; None for those of the data set's texts."""
    return {"generate": args.generate, "seed": args.seed, **asdict(cli.sampling(args))} if args.generate else None


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
    """What is counted, and per row [number, id, word, phrase, sentence, scored tokens, and of its texts the
    prompt's hash, the prompt's beginning, the reference's hash]."""
    records = []
    header = {"digest": window.digest, "rows": len(window.rows), "blank": window.blank}
    if window.rows:
        try:
            perplexities, tokens, read, longest = score(window.rows)
        except FloatingPointError as error:
            raise InputError(
                f"in rows {window.rows[0].number} to {window.rows[-1].number}: {error}: try --dtype float32 or bfloat16"
            ) from error
        for row, values, count in zip(window.rows, perplexities.tolist(), tokens.tolist(), strict=True):
            if count and not np.isfinite(values).all():
                raise InputError(f"row {row.number}, id {row.id!r}: perplexities {values}: leave the row out")
            if count:
                of_texts = (stable_id(row.prompt), beginning(row.prompt), stable_id(row.reference))
                records.append([row.number, row.id, *values, count, *of_texts])
        header |= {"tokens": int(tokens.sum()), "read": int(read.sum()), "longest": longest}
    return {"tokens": 0, "read": 0, "longest": 0, **header, "unscored": len(window.rows) - len(records)}, records
