"""The reward in verifiers 0.4: rows of a .jsonl, {"prompt": ..., "reference": ...}, by `vf-eval verifiers-taskset`."""

import asyncio

import verifiers.v1 as vf
from datasets import load_dataset

from engines.reward import compute_score


class Task(vf.Task[vf.WireTaskData]):  # its data has a row's columns, whatever they are
    @vf.reward
    async def multi_level_ppl(self, trace: vf.Trace) -> float:
        row, text = self.data.model_dump(exclude_none=True), trace.assistant_messages[-1].content
        scored = await asyncio.to_thread(compute_score, "", text, row["reference"], row)
        trace.record_metrics({name: value for name, value in scored.items() if name.startswith("reward_")})
        return scored["score"]


class Config(vf.TasksetConfig):
    rows: str = "rows.jsonl"


class Rows(vf.Taskset[Task, Config]):
    def load(self):
        rows = load_dataset("json", data_files=self.config.rows, split="train")
        return [Task(vf.WireTaskData(**row), self.config.task) for row in rows]


__all__ = ["Rows"]
