"""Rewards as TRL's AsyncGRPO computes them: in a process that it spawns, in threads, by its own code."""

import asyncio
import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


def score(rewards, groups, results) -> None:
    """Runs in the spawned process, as TRL's `_child_main` does. groups: of the keywords of TRL's RolloutGroup that a
    reward sees. results: a queue that gets, of each group, {name of a reward: its values} or the exception."""
    from accelerate import PartialState
    from trl.experimental.async_grpo import async_rollout_worker as trl

    trl._scrub_child_env()
    PartialState()
    loop = object.__new__(trl._AsyncRolloutLoop)  # its constructor asks for a server that generates
    loop.reward_funcs, loop.reward_func_names = rewards, [trl.get_callable_name(reward) for reward in rewards]
    loop._env_reward_types = []
    for group in groups:
        try:
            results.put(_score(trl, loop, group))
        except Exception as error:
            results.put(error)


def _score(trl, loop, group) -> dict[str, list[float]]:
    count = len(group["prompts"])
    nothing = {"tool_call_counts": [0] * count, "tool_failure_counts": [0] * count, "model_version": 0, "group_id": 0,
               "env_rewards": [None] * count, "rollout_rewards": [None] * count}  # fmt: skip
    rows = [[trl.TrainingSequence([1], [1], [0.0], "")]] * count
    samples = asyncio.run(loop._score_group(trl.RolloutGroup(**group, completions_sequences=rows, **nothing)))
    return {name: [sample.metrics[f"rewards/{name}"] for sample in samples] for name in loop.reward_func_names}
