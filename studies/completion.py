"""Does a pretrained model continue stories better by the reward, in the eyes of models that are not the scorer?

    python completion.py --judge_model tiny-stories MODEL --output_dir study_completion

The arms are geometric and nested levels, each with thresholds and in nats, against baselines of the model's own
writing. A run that is finished is not run again, and one that was stopped goes on from its last checkpoint: a stopped
study goes on with the same command. A run takes an hour or so on two CPU cores.
"""

import sys

from training import parse_args, study

from ppl import cli

WEIGHTS = "--ppl_weights 1 1 1"
ARMS = {
    "geometric": WEIGHTS,
    "geometric, nats": f"{WEIGHTS} --reward_form nats",
    "nested": f"--aggregation nested {WEIGHTS}",
    "nested, nats": f"--aggregation nested {WEIGHTS} --reward_form nats",
}
# A CPU trains whole numbers faster than Unsloth's four bits, which are made for a GPU.
PRECISION = "--no-load_in_4bit"
RUNS = f"{PRECISION} --no_unsloth --no_gradient_checkpointing --learning_rate 3e-4 --max_new_tokens 64"
DEFAULTS = {
    "model_name": "smollm2",
    "max_steps": 60,
    "jobs": 1,
    "demo": f"{RUNS} --per_device_train_batch_size 16 --heldout_samples 16 --logging_steps 1",
    "baselines": f"{PRECISION} --generate 4 --max_new_tokens 64",
}


def main(argv=None) -> int:
    return cli.run(parse_args(argv, __doc__, ARMS, "completion", **DEFAULTS), study)


if __name__ == "__main__":
    sys.exit(main())
