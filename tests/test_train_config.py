"""The training script's flags: names known without an import, and what is made of them."""

import dataclasses

import pytest

from ppl.errors import InputError
from ppl.train_config import check_flags, grpo_fields


def test_the_field_names_read_from_the_source_are_those_of_the_class():
    from trl import GRPOConfig

    assert grpo_fields() == {field.name for field in dataclasses.fields(GRPOConfig)}


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--warmup_step", "--warmup_steps?"),
        ("--lr_sheduler_type", "--lr_scheduler_type?"),
        ("--bta=0.1", "--beta?"),
        ("--ppl_weight", "--ppl_weights?"),
        ("--xyzzy", "see --help"),
    ],
)
def test_a_flag_nobody_has_is_refused_with_the_nearest_one(flag, near):
    with pytest.raises(InputError, match="unknown flag") as refusal:
        check_flags([flag, "1"], ["ppl_weights"])
    assert near in str(refusal.value)


def test_flags_of_grpo_config_are_known():
    check_flags(["--beta", "0.04", "--no_gradient_checkpointing", "--warmup_steps=3", "--use_vllm"], [])
