"""Batch, accumulation and group size: what is left out is chosen to fit, what cannot fit is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlppl.errors import InputError
from mlppl.training.settings import plan_batches


@pytest.mark.parametrize(
    ("batch", "accumulation", "generations", "processes", "expected"),
    [
        (4, None, None, 1, (2, 8)),  # 4 x 2 = 8 completions: one group
        (16, None, None, 1, (1, 8)),
        (1, 16, None, 1, (16, 8)),
        (2, 3, None, 1, (3, 6)),  # 6 completions have no group of 8
        (4, None, 6, 1, (3, 6)),  # 12 is the first multiple of 4 that 6 divides
        (3, None, 8, 2, (4, 8)),  # 3 x 2 processes x 4 = 24
        (5, 1, None, 1, (1, 5)),
        (11, 1, None, 1, (1, 11)),  # a prime: no divisor up to 8 but 1
    ],
)
def test_what_is_left_out_fits(batch, accumulation, generations, processes, expected):
    assert plan_batches(batch, accumulation, generations, processes) == expected


@given(st.integers(1, 64), st.none() | st.integers(1, 32), st.none() | st.integers(2, 16), st.integers(1, 8))
def test_a_plan_is_accepted_by_trl_or_refused(batch, accumulation, generations, processes):
    try:
        plan = plan_batches(batch, accumulation, generations, processes)
    except InputError:
        total = batch * processes * accumulation
        assert total < 2 or (generations is not None and total % generations)
        return
    assert plan.num_generations >= 2
    assert batch * processes * plan.gradient_accumulation_steps % plan.num_generations == 0
    assert accumulation in (None, plan.gradient_accumulation_steps)
    assert generations in (None, plan.num_generations)


def test_numbers_beyond_any_machine_are_answered_at_once():
    assert plan_batches(4, None, 10**30, 3) == (10**30 // 4, 10**30)
    assert plan_batches(10**30, 10**30, None) == (10**30, 8)
    with pytest.raises(InputError, match="--gradient_accumulation_steps 1000000000000000000000000000008 or "):
        plan_batches(1, 10**30, 9)


def test_a_refusal_names_the_nearest_numbers():
    with pytest.raises(InputError, match=r"= 8 completions.*--gradient_accumulation_steps 3 or --num_generations 4"):
        plan_batches(4, 2, 6)
    with pytest.raises(InputError, match="at least 2"):
        plan_batches(4, 2, 1)
    with pytest.raises(InputError, match=r"= 1 completions.*--gradient_accumulation_steps 2"):
        plan_batches(1, 1, None)
