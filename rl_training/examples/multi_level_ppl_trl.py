"""Multi-level perplexity: the calculator and the reward for TRL's GRPOTrainer. As a script, scores a text.

    python multi_level_ppl_trl.py --text "The quick brown fox jumps over the lazy dog."

    from multi_level_ppl_trl import MultiLevelPPLCalculator, MultiLevelPPLRewardFunction
"""

import sys

_EXPORTS = {
    "MultiLevelPPLCalculator": "calculator",
    "MultiLevelPPLRewardFunction": "reward",
    "DEFAULT_THRESHOLDS": "thresholds",
    "LEVELS": "units",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    # On first use: torch takes seconds to import, and --help is to be instant.
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"ppl.{_EXPORTS[name]}"), name)


def main(argv=None) -> int:
    from ppl.score_text import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
