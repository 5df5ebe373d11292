"""What TRL's newer settings do with the reward: GRPO through the training script, one setting changed at a time.

    python settings.py --output_dir study_settings

An arm is the configuration of `make demo` with one of TRL's settings changed; each is run with every seed, a process a
run. A run that is finished is not run again: a stopped study goes on with the same command.
"""

import sys

from training import parse_args, study

from mlppl import cli

ARMS = {
    "default": "",
    "scale_rewards batch": "--scale_rewards batch",
    "scale_rewards none": "--scale_rewards none",
    "loss_type dr_grpo": "--loss_type dr_grpo",
    "loss_type grpo": "--loss_type grpo",
    "mask_truncated_completions": "--mask_truncated_completions",
    "beta 0.04": "--beta 0.04",
    # A batch that is used once has importance ratios of 1, and then the level of sampling changes nothing.
    "num_iterations 2": "--num_iterations 2",
    "num_iterations 2, sequence": "--num_iterations 2 --importance_sampling_level sequence",
}


def main(argv=None) -> int:
    return cli.run(parse_args(argv, __doc__, ARMS, "settings"), study)


if __name__ == "__main__":
    sys.exit(main())
