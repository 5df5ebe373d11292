"""The reward in the calling conventions of OpenRLHF and verl, which load this file by its path.

    --reward.remote_url .../engines/reward.py                     OpenRLHF (up to 0.9: --remote_rm_url)
    reward.custom_reward_function.path=.../engines/reward.py      verl (up to 0.6: custom_reward_function.path)

The environment variable PPL_REWARD_CONFIG names the YAML file that describes the reward (`mlppl.reward.configured`): it
is read here on import, the model is loaded at the first call, once a process. Calls may come from any number of
threads: those that come while others are scored are scored together.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

# Loaded by its path, this file belongs to no package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engines.coalescing import Coalescing
from engines.query import completion_of
from mlppl.data import Text, message_text, stable_id
from mlppl.errors import InputError
from mlppl.prompts import refuse_begun
from mlppl.reward.configured import config_path, read_settings, reward_from_config


def _check(settings: dict) -> None:
    """Raises `InputError` for what cannot be done a completion at a time, as these engines ask."""
    where = config_path()
    if settings.get("target", "completion") == "completion" and settings.get("baselines") is None:
        raise InputError(
            f"{where}: without baselines a prompt's completions must come together, and here they come one by "
            "one: set baselines, or target: reference"
        )
    if settings.get("normalize"):
        raise InputError(f"{where}: normalize: true needs many completions at a time, and here they come one by one")
    if settings.get("missing") == "skip":
        raise InputError(f"{where}: missing: skip gives rows without a reward, which this engine cannot take")
    if settings.get("device") is None and settings.get("scorer_url") is None:
        raise InputError(
            f"{where}: device is not set, and a Ray actor that asks for no GPU sees all of them or none, as its "
            "version has it: expected device: cpu, or cuda:0 and the like"
        )


_check(read_settings())


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence, **_) -> dict:
    """OpenRLHF's: `{"rewards", "scores": float32 [B], "extra_logs": {"reward_word": float32 [B] in percent, ...}}`.

    queries: prompt and completion as one string, special tokens and all; of a prompt that was cut on the left, its end.
    prompts: as they were before that, which is what a completion is scored behind. labels: the references
    (`--data.label_key`), or whatever, if the target is the completion and the baselines are found by prompt.
    """
    try:
        given = zip(queries, prompts, labels, strict=True)
        scored = scored_together([_Row(_completion(query, prompt), prompt, label) for query, prompt, label in given])
    except Exception as error:
        # OpenRLHF logs it at the level of details, goes on without a reward, and dies elsewhere of that.
        print(f"error: {'' if isinstance(error, InputError) else type(error).__name__ + ': '}{error}", file=sys.stderr)
        raise
    columns = {name: torch.tensor([row[name] for row in scored]) for name in scored[0]} if scored else {}
    rewards = columns.pop("score", torch.empty(0))
    return {"rewards": rewards, "scores": rewards, "extra_logs": columns}


def compute_score(data_source, solution_str: str, ground_truth, extra_info=None, **_) -> dict[str, float]:
    """verl's, for its reward managers `naive`, `dapo`, `gdpo` and the like, of one completion.

    `{"score", "reward_word", ..., "score_word", ...}`: reward_... is a level's improvement in percent, to look at;
    score_... what the level alone would earn, for `algorithm.gdpo_reward_keys`.

    ground_truth: the reference. extra_info: must have the row's `prompt` as the scorer reads it, a string or, for a
    scorer with a chat template, messages; may have its `id`.
    """
    info = extra_info or {}
    if "prompt" not in info:
        raise InputError(
            "extra_info has no 'prompt', which a perplexity needs: put the row's prompt there in the data set"
        )
    prompt = info["prompt"] if isinstance(info["prompt"], str) else list(info["prompt"])
    refuse_begun([prompt], "verl")
    return scored_together([_Row(solution_str, prompt, ground_truth, info.get("id"))])[0]


class _Row(NamedTuple):
    text: str
    prompt: Text
    reference: object
    id: object = None


def _completion(query: str, prompt: str) -> str:
    text = completion_of(query, prompt, reward_from_config().policy.tokenizer)
    if text is None:
        raise InputError(
            f"the query {query!r:.80} does not begin with its prompt {prompt!r:.80}, nor with the end of it: expected "
            "the prompt and the completion, decoded together"
        )
    return text


def _score_calls(calls: list[list[_Row]]) -> list[list[dict[str, float]]]:
    """Of each call's rows: `score`, of each level `reward_...`, the improvement in percent, and `score_...`."""
    reward = reward_from_config()
    special = [token.content for token in reward.policy.tokenizer.added_tokens_decoder.values() if token.special]
    # The end of the turn, padding: no part of what was written.
    unwritten = re.compile("|".join(map(re.escape, special))) if special else None
    texts, prompts, references, ids = [], [], [], []
    for text, prompt, reference, row_id in (row for rows in calls for row in rows):
        texts.append(unwritten.sub("", message_text(text)) if unwritten else text)
        prompts.append(prompt)
        references.append(reference if isinstance(reference, str) else "")
        ids.append(stable_id(prompt, references[-1]) if row_id is None else row_id)
    levels = reward.config.levels
    rewards, details = reward.compute_rewards(texts, prompts, references, ids, return_details=True)
    columns = {"score": rewards, **{f"reward_{level}": details["improvements"][level] for level in levels}}
    columns |= {f"score_{level}": details["level_rewards"][level] for level in levels}
    values = iter(zip(*(column.tolist() for column in columns.values()), strict=True))
    return [[dict(zip(columns, next(values), strict=True)) for _ in rows] for rows in calls]


scored_together = Coalescing(_score_calls)
