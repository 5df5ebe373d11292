"""Checks the calculator and the reward with one model, and prints a report.

    python test_multilevel_ppl_trl.py --model_name gpt2

Exit code 1 if a check fails. (A script for users, not for pytest: the project's own tests are in tests/.)
"""

import argparse
import sys

from ppl import cli
from ppl.notebooks import script

TEXT = "The quick brown fox jumps over the lazy dog..."
LINE = "=" * 60


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.parser("Checks the calculator and the reward with one model: exit code 1 if a check fails.")
    cli.add_model_flags(parser)
    return parser.parse_args(argv)


@script
def main(argv) -> int:
    return cli.run(parse_args(argv), report)


def report(args: argparse.Namespace) -> int:
    import torch

    device = args.device.partition(":")[0] if args.device else "cuda" if torch.cuda.is_available() else "cpu"
    print(f"Multi-Level PPL Reward Function Test (TRL)\n{LINE}\nModel: {args.model_name}\nDevice: {device}\n")
    print("Loading model...", flush=True)

    from ppl.checks import CHECKS
    from ppl.models import load_model
    from ppl.scoring.calculator import MultiLevelPPLCalculator

    model, tokenizer, _ = load_model(
        args.model_name, load_in_4bit=bool(args.load_in_4bit), dtype=args.dtype, device=args.device
    )
    print("Model loaded!")

    print(f"\nTesting Multi-Level PPL Calculator\n{LINE}\n\nTest text: {TEXT}", flush=True)
    calculator = MultiLevelPPLCalculator(tokenizer)
    scored, levels = outcome(lambda: calculator.compute_all_levels(model=model, texts=TEXT), args.debug)
    if scored:
        print("\nResults:")
        for level, perplexity in levels.items():
            print(f"  {f'{level.capitalize()}-level PPL:':<20}{perplexity:.4f}")
    else:
        print(f"  ✗ it cannot be scored: {levels}")

    print("\nChecks:", flush=True)
    failures = int(not scored)
    for name, check in CHECKS.items():
        passed, found = outcome(lambda check=check: check(model, tokenizer), args.debug)
        print(f"  ✓ {name} ({found})" if passed else f"  ✗ {name}: {found}", flush=True)
        failures += not passed

    if failures:
        print(f"\n✗ {failures} failed")
        return 1
    print("\n✓ All tests passed!")
    return 0


def outcome(check, debug: bool) -> tuple[bool, object]:
    """(whether `check()` passed, what it returned, or what it raised in one line)."""
    from ppl.checks import CheckFailed

    try:
        return True, check()
    # A check that breaks has failed like one that finds a wrong number, and the others still run.
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, CheckFailed) else f"{type(error).__name__}: "
        return False, kind + " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
