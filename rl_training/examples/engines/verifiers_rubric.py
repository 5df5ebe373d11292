"""The reward in a Rubric of verifiers (up to 0.3, before 0.4 took rubrics away): `vf-eval verifiers-rubric`.

A row is {"prompt": ..., "reference": ...}. The scorer reads the prompt as text, as it stands in the row.
"""

import asyncio

import verifiers as vf
from datasets import load_dataset

from engines.reward import compute_score


async def multi_level_ppl(completion, answer, info) -> float:
    try:
        return (await asyncio.to_thread(compute_score, "", completion[-1]["content"], answer, info))["score"]
    except Exception as error:  # which a Rubric would log, and count as 0
        raise SystemExit(f"error: {error}") from error


def load_environment(rows: str) -> vf.Environment:
    dataset = load_dataset("json", data_files=rows, split="train")
    return vf.SingleTurnEnv(
        dataset=dataset.map(
            lambda row: {"question": row["prompt"], "answer": row["reference"], "info": {"prompt": row["prompt"]}},
            remove_columns=dataset.column_names,
        ),
        rubric=vf.Rubric(funcs=[multi_level_ppl]),
    )
