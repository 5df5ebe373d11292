"""Computes the baselines that the reward compares with: the perplexity of each row of a data set at each level.

    python compute_baselines_trl.py --model_name gpt2 --dataset_name wikitext --dataset_split test \\
        --output_path baselines_wiki.pkl --num_samples 1000 --batch_size 4

Stopped at any moment, the same command goes on. On several GPUs: accelerate launch --num_processes N
compute_baselines_trl.py ...; in several processes on a CPU: torchrun --nproc_per_node N compute_baselines_trl.py ...
"""

import argparse
import sys

from mlppl import cli
from mlppl.cli import script
from mlppl.training.settings import parse


def parse_args(argv) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = cli.parser(summary, epilog=rest.rpartition("\n\n")[2])
    cli.add_baseline_flags(parser)
    return parse(parser, argv, trains=False)[0]


@script
def main(argv) -> int:
    return cli.run(parse_args(argv), _compute)


def _compute(args: argparse.Namespace) -> int:
    from mlppl.baselines.job import compute

    return compute(args)


if __name__ == "__main__":
    sys.exit(main())
