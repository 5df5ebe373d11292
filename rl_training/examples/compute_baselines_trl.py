"""Computes the baselines that the reward compares with: the perplexity of each row of a data set at each level.

    python compute_baselines_trl.py --model_name gpt2 --dataset_name wikitext --dataset_split test \\
        --output_path baselines_wiki.pkl --num_samples 1000 --batch_size 4

Stopped at any moment, the same command goes on. On several GPUs: accelerate launch --num_processes N
compute_baselines_trl.py ...; in several processes on a CPU: torchrun --nproc_per_node N compute_baselines_trl.py ...
"""

import argparse
import sys

from ppl import cli
from ppl.cli import script
from ppl.config import DEFAULT_SEED
from ppl.training.settings import parse_baselines


def make_parser() -> argparse.ArgumentParser:
    summary, _, rest = __doc__.partition("\n")
    parser = cli.parser(summary, epilog=rest.rpartition("\n\n")[2])
    parser.add_argument("--config", help="YAML file of flags, the training's too; those on the command line win")
    parser.add_argument("--output_path", default="baselines.pkl", help="file to make: .pkl or .json")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there under that name")
    parser.add_argument("--output_dataset", metavar="DIR", help="also write the data set with the baselines as columns")
    parser.add_argument("--plot", metavar="OUT.png", help="also draw the distribution of the three levels")
    cli.add_reward_flags(parser, "target", "template")
    parser.add_argument("--num_samples", type=cli.positive_int, help="only the first rows with text (default: all)")
    parser.add_argument(
        "--batch_size", type=cli.positive_int, help="most texts in one forward pass (default: as many as fit)"
    )
    own = parser.add_argument_group("baselines of the model's own writing (sampled as in training: the same flags)")
    own.add_argument(
        "--generate", type=cli.positive_int, metavar="N", help="sample N completions a prompt and take their mean"
    )
    cli.add_sampling_flags(own)
    own.add_argument("--seed", type=cli.seed, default=DEFAULT_SEED, help="of the sampling")
    cli.add_server_flag(parser)
    parser.add_argument("--streaming", action="store_true", help="read the data set as it is scored, and keep no copy")
    cli.add_model_flags(parser)
    cli.add_unsloth_flags(parser)
    cli.add_data_flags(parser)
    cli.add_prompt_flags(parser)
    cli.add_definition_flags(parser)
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    from train_grpo_multilevel_unsloth import make_parser as training_parser

    return parse_baselines(make_parser(), argv, training_parser())


@script
def main(argv) -> int:
    return cli.run(parse_args(argv), _compute)


def _compute(args: argparse.Namespace) -> int:
    from ppl.baselines.job import compute

    return compute(args)


if __name__ == "__main__":
    sys.exit(main())
