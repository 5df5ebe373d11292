"""Batch size, accumulation and group size such that TRL accepts them."""

import math
from typing import NamedTuple

from ..errors import InputError

GROUP = 8  # completions a prompt, where the batch allows it: TRL's default
MOST = 4096  # a larger group is not proposed


class BatchPlan(NamedTuple):
    gradient_accumulation_steps: int
    num_generations: int


def plan_batches(
    batch: int,
    accumulation: int | None,
    generations: int | None,
    processes: int = 1,
    sampled_apart: bool = False,
) -> BatchPlan:
    """Fill in what is None so that batch x processes x accumulation is a multiple of the group size.

    Without accumulation, the least one that fits; without a group size, the largest divisor up to `GROUP`.
    Raises `InputError` with the nearest numbers that fit if the given ones do not.

    sampled_apart: --steps_per_generation or --generation_batch_size says how many completions are sampled at once, so
    TRL tells whether these are whole groups.
    """
    if generations is not None and generations < 2:
        raise InputError(f"--num_generations is {generations}, expected at least 2: GRPO compares within a group")
    per_step = batch * processes

    def least(group: int) -> int:
        """The accumulation, and with it every multiple, that makes whole groups."""
        return group // math.gcd(per_step, group)

    if accumulation is None:
        generations = generations or GROUP
        return BatchPlan(least(generations), generations)
    total = per_step * accumulation
    if generations is not None and (sampled_apart or total % generations == 0):
        return BatchPlan(accumulation, generations)
    divisors = [n for n in range(2, min(total, MOST) + 1) if total % n == 0]
    if generations is None and (sampled_apart or divisors):
        return BatchPlan(accumulation, max((n for n in divisors if n <= GROUP), default=min(divisors, default=GROUP)))
    wanted = generations or 2
    nearest = min(divisors, key=lambda n: abs(n - wanted), default=None)
    raise InputError(
        f"--per_device_train_batch_size {batch} x {processes} process(es) x --gradient_accumulation_steps "
        f"{accumulation} = {total} completions a step, no multiple of --num_generations {wanted}: use "
        f"--gradient_accumulation_steps {-(-accumulation // least(wanted)) * least(wanted)}"
        + (f" or --num_generations {nearest}" if nearest else "")
    )
