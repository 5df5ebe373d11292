"""Multi-level perplexity: the calculator and the reward for TRL's GRPOTrainer. As a script, scores a text.

    python multi_level_ppl_trl.py --text "The quick brown fox jumps over the lazy dog."

prints the perplexity of its words, phrases and sentences and the most surprising of each; --file texts.jsonl prints a
line for each of many texts. In Python:

    from multi_level_ppl_trl import MultiLevelPPLCalculator, MultiLevelPPLRewardFunction
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from mlppl import cli
from mlppl.cli import script
from mlppl.data import read_shown
from mlppl.errors import InputError
from mlppl.files import without_nan, writable_file, write_text
from mlppl.models import check_reachable, model_path, where

_EXPORTS = {
    "MultiLevelPPLCalculator": "scoring.calculator",
    "MultiLevelPPLRewardFunction": "reward.function",
    "DEFAULT_THRESHOLDS": "config",
    "LEVELS": "config",
}
__all__ = list(_EXPORTS)


def _configured_reward():
    """`trl grpo --reward_funcs multi_level_ppl_trl.multi_level_ppl`: the reward that PPL_REWARD_CONFIG describes.

    A name that is wrong in the file is said now, before the trainer loads a model.
    """
    from mlppl.reward.configured import multi_level_ppl, read_settings

    read_settings()
    return multi_level_ppl


def __getattr__(name: str):
    # On first use: torch takes seconds to import, and --help is to be instant.
    if name == "multi_level_ppl":
        return _configured_reward()
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mlppl.{_EXPORTS[name]}"), name)


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.parser("Scores a text: its perplexity at the level of words, phrases and sentences.")
    parser.add_argument("--text", help="the text")
    parser.add_argument("--file", help="a UTF-8 file that holds the text; or one ending in .jsonl, with an object a "
        "line: text (or completion, or reference) and perhaps context (or prompt)")  # fmt: skip
    parser.add_argument("--context", default="", help="what stands before the text, such as a prompt; it is not scored")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a text, with every unit, instead of tables"
    )
    parser.add_argument("--html", metavar="OUT", help="write a page of the text coloured by perplexity to this file")
    parser.add_argument("--adapter", choices=("on", "off"), help="with the folder of an adapter: on, the trained model "
        "scores; off (the default), its base model, as in a reward")  # fmt: skip
    cli.add_model_flags(parser)
    cli.add_definition_flags(parser, "FILE")
    parser.add_argument("--others", metavar="FILE", help="rows that --contrast draws from, as --examples has them")
    return cli.parsed(parser, parser.parse_args(argv))


@script
def main(argv) -> int:
    return cli.run(parse_args(argv), score)


def score(args: argparse.Namespace) -> int:
    # What can be refused is refused before a model is loaded.
    many = args.text is None and str(args.file).endswith(".jsonl")
    texts = read_texts(args.file, args.context) if many else [(read_text(args), args.context)]
    if many and args.html is not None:
        raise InputError("--html shows one text, and --file names many: choose one with --text")
    check_unicode("--context", args.context)
    shown = {name: read_shown(path) for name in ("examples", "others") if (path := getattr(args, name)) is not None}
    page = writable_file(args.html, "--html") if args.html is not None else None

    check_reachable(model_path(args.model_name))

    from rich.console import Console

    with Console(stderr=True, force_jupyter=False).status(f"Loading {args.model_name} ..."):
        from mlppl.models import load_model
        from mlppl.scoring.calculator import MultiLevelPPLCalculator
        from mlppl.scoring.surprisal import SurprisalScorer

        model, tokenizer, _ = load_model(
            args.model_name, load_in_4bit=bool(args.load_in_4bit), dtype=args.dtype, device=args.device
        )
    is_adapter = hasattr(model, "peft_config")
    if args.adapter and not is_adapter:
        raise InputError(f"--adapter {args.adapter}: {args.model_name} is no adapter: leave it out")
    if is_adapter and args.adapter is None:
        print(
            f"{args.model_name} is an adapter: it is off, and its base model scores the text (with --adapter on: the "
            "trained one)",
            file=sys.stderr,
        )
    scorer = SurprisalScorer(model, adapters=args.adapter == "on", tokenizer=tokenizer)
    calculator = MultiLevelPPLCalculator(tokenizer, **cli.reward_config(args).definitions, **shown)
    try:
        if many and not args.json:
            print_lines(calculator, scorer, texts)
            return 0
        for text, context in texts:
            explained = calculator.explain(model=scorer, text=text, context=context)
            if many:
                print_json(args, model, text, context, explained)
    except FloatingPointError as error:
        raise InputError(f"{error}: try --dtype float32 or bfloat16") from error
    if many:
        return 0
    if not any(explained.values()):
        raise InputError(
            f"no token of {text!r:.40} can be scored: special tokens never are, nor is the first of all where the "
            "tokenizer has no BOS token; give a longer text, or a --context"
        )
    perplexities = explained.perplexities

    if page is not None:
        write_page(page, args, model, text, explained, perplexities)
    if args.json:
        print_json(args, model, text, context, explained)
    else:
        print(where(args.model_name, model))
        print_tables(explained, perplexities)
        if page is not None:
            print(f"Wrote {args.html}")
    return 0


def read_text(args: argparse.Namespace) -> str:
    """The text of --text, or of --file as it stands: its line breaks are kept, a byte order mark is no part of it.

    Raises `InputError` unless there is exactly one, with something visible in it.
    """
    if (args.text is None) == (args.file is None):
        raise InputError("give the text to score with --text TEXT or with --file FILE, one of the two")
    if args.text is not None:
        text, source = args.text, "--text"
        check_unicode(source, text)
    else:
        source = f"--file {args.file}"
        try:
            text = Path(args.file).read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise InputError(f"{source}: {error.strerror}: expected a text file") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{source} is not UTF-8 at byte {error.start}: convert it, e.g. with iconv") from error
    if not text.strip():
        raise InputError(f"{source} is blank: there is nothing to score")
    return text


def check_unicode(source: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8 arrive as surrogates
        raise InputError(f"{source} is not UTF-8 at character {error.start}") from error


def read_texts(file: str, context: str) -> list[tuple[str, str]]:
    """(text, context) of each line of a JSON lines file. context: of those that say none. Raises `InputError`."""
    source, texts = f"--file {file}", []
    try:
        lines = Path(file).read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}: expected JSON lines") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 at byte {error.start}: convert it, e.g. with iconv") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{source}, line {number}: {error}: expected a JSON object") from error
        row = row if isinstance(row, dict) else {}
        text = next((row[name] for name in ("text", "completion", "reference") if name in row), None)
        before = next((row[name] for name in ("context", "prompt") if name in row), context)
        if not isinstance(text, str) or not isinstance(before, str):
            raise InputError(
                f"{source}, line {number}: {line!r:.60}, expected an object with a string text (or completion, or "
                "reference), and perhaps context (or prompt)"
            )
        for value in (text, before):
            check_unicode(f"{source}, line {number},", value)
        texts.append((text, before))
    if not texts:
        raise InputError(f"{source} holds no line")
    return texts


def print_lines(calculator, scorer, texts: Sequence[tuple[str, str]], at_once: int = 256) -> None:
    """One line a text: its levels' perplexities, or nested ones in nats a token, and the text; a dash where no token of
    it can be scored."""
    from mlppl.scoring.heatmap import one_line

    names = calculator.nested_names(*(["context"] if any(context for _, context in texts) else []))
    for start in range(0, len(texts), at_once):
        part, contexts = zip(*texts[start : start + at_once], strict=True)
        levels = calculator.compute_all_levels(scorer, list(part), list(contexts))
        for index, text in enumerate(part):
            values = ((level, float(of_level[index])) for level, of_level in levels.items())
            told = ", ".join(f"{names.get(level, level)} {shown(value, level in names)}" for level, value in values)
            print(f"{told}: {one_line(text)}", flush=True)


def shown(perplexity: float, nested: bool) -> str:
    """A perplexity; of a nested level its logarithm, in nats a token."""
    if math.isnan(perplexity):
        return "–"
    return f"{math.log(perplexity) if nested and perplexity else perplexity:,.4f}"


def print_json(args, model, text: str, context: str, explained) -> None:
    """One line: surprisals in nats, `start` and `end` in characters of `text`; null where no token can be scored."""
    perplexities, units_of_one = explained.perplexities, next(iter(explained.values()))  # each has all tokens
    content = {
        "model": args.model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "definitions": cli.reward_config(args).definitions,
        "context": context,
        "text": text,
        "n_tokens": sum(unit["n_tokens"] for unit in units_of_one),
        "surprisal": sum(unit["surprisal"] for unit in units_of_one),
        **{level: {"perplexity": perplexities[level], "units": units} for level, units in explained.items()},
    }
    if args.adapter:
        content["adapter"] = args.adapter
    print(json.dumps(without_nan(content), ensure_ascii=False), flush=True)


def print_tables(explained, perplexities, top: int = 5) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mlppl.scoring.heatmap import most_surprising, one_line, rate

    names = explained.names
    unit = "Nats a token" if names else "Perplexity"
    levels = Table("Level", box=box.SIMPLE_HEAD)
    for name in (unit, "Units", "Tokens"):
        levels.add_column(name, justify="right")
    surprising = Table(box=box.SIMPLE_HEAD)
    # Of these columns only the units' may shrink on a narrow terminal; a unit too long for it ends in an ellipsis.
    surprising.add_column("Level", no_wrap=True)
    surprising.add_column("Most surprising units")
    surprising.add_column(unit, no_wrap=True, justify="right")
    surprising.add_column("Tokens", no_wrap=True, justify="right")
    for level, units in explained.items():
        tokens = sum(unit["n_tokens"] for unit in units)
        value = shown(perplexities[level], level in names)
        levels.add_row(names.get(level, level), value, f"{len(units):,}", f"{tokens:,}")
        for index, unit in enumerate(most_surprising(units, top)):
            # A Text, since brackets in a string would be markup.
            cell = Text(one_line(unit["text"]), no_wrap=True, overflow="ellipsis")
            value = rate(unit["perplexity"], level in names)
            surprising.add_row("" if index else level, cell, value, str(unit["n_tokens"]))
        surprising.add_section()
    console = Console()
    console.print(levels)
    console.print(surprising)


def write_page(path: Path, args, model, text: str, explained, perplexities) -> None:
    from mlppl.scoring import heatmap

    more = {"context": args.context, "language": args.language, "names": explained.names}
    fragment = heatmap.heatmap(explained, text, perplexities, **more)
    facts = {
        "Model": args.model_name,
        "Weights": str(model.dtype).removeprefix("torch."),
        "Phrases": f"up to {args.max_phrase_words} words",
        "Mean": args.aggregation,
    }
    html = heatmap.page("Multi-level perplexity", [fragment], facts)
    try:
        write_text(path, html)
    except OSError as error:
        raise InputError(f"--html {args.html}: {error.strerror}: choose another place") from error


if __name__ == "__main__":
    sys.exit(main())
