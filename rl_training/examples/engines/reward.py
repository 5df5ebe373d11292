"""The reward in the calling conventions of OpenRLHF and verl, which load this file by its path.

    --reward.remote_url .../engines/reward.py                     OpenRLHF (up to 0.9: --remote_rm_url)
    reward.custom_reward_function.path=.../engines/reward.py      verl (up to 0.6: custom_reward_function.path)

The environment variable PPL_REWARD_CONFIG names the YAML file that describes the reward (`ppl.reward.config`): it is
read here on import, the model is loaded at the first call, once a process. Calls may come from any number of threads.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

# Loaded by its path, this file belongs to no package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ppl.data import Text, message_text, stable_id
from ppl.definitions import LEVELS
from ppl.errors import InputError
from ppl.reward.config import SCORING, config_path, read_settings, reward_from_config
from ppl.reward.query import completion_of


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


_check(read_settings())


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence, **_) -> dict:
    """OpenRLHF's: `{"rewards", "scores": float32 [B], "extra_logs": {"reward_word": float32 [B] in percent, ...}}`.

    queries: prompt and completion as one string, special tokens and all. labels: the references (`--data.label_key`),
    or whatever, if the target is the completion and the baselines are found by prompt.
    """
    try:
        texts = [_completion(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
        rewards, improvements = _score(texts, prompts, labels)
    except Exception as error:
        # OpenRLHF logs it at the level of details, goes on without a reward, and dies elsewhere of that.
        print(f"error: {'' if isinstance(error, InputError) else type(error).__name__ + ': '}{error}", file=sys.stderr)
        raise
    return {"rewards": rewards, "scores": rewards, "extra_logs": improvements}


def _completion(query: str, prompt: str) -> str:
    text = completion_of(query, prompt, reward_from_config().tokenizer)
    if text is None:
        raise InputError(
            f"the query {query!r:.80} does not begin with its prompt {prompt!r:.80}, nor with the end of it: expected "
            "the prompt and the completion, decoded together"
        )
    return text


def compute_score(data_source, solution_str: str, ground_truth, extra_info=None, **_) -> dict[str, float]:
    """verl's, for its reward managers `naive`, `dapo` and the like: `{"score", "reward_word", ...}` of one completion.

    ground_truth: the reference. extra_info: must have the row's `prompt`, a string or chat messages; may have its `id`.
    """
    return compute_scores([data_source], [solution_str], [ground_truth], [extra_info])[0]


def compute_scores(data_sources, solution_strs, ground_truths, extra_infos, **_) -> list[dict[str, float]]:
    """verl's, for its reward manager `batch`: as `compute_score`, of many completions in one call."""
    infos = [info or {} for info in extra_infos]
    if not all("prompt" in info for info in infos):
        raise InputError(
            "extra_info has no 'prompt', which a perplexity needs: put the row's prompt there in the data set"
        )
    prompts = [prompt if isinstance(prompt := info["prompt"], str) else list(prompt) for info in infos]
    rewards, improvements = _score(solution_strs, prompts, ground_truths, [info.get("id") for info in infos])
    columns = {"score": rewards, **improvements}
    return [{name: float(values[row]) for name, values in columns.items()} for row in range(len(infos))]


def _score(texts, prompts: Sequence[Text], references, ids=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """float32 [B] rewards, and of each level the improvement in percent."""
    reward = reward_from_config()
    references = [reference if isinstance(reference, str) else "" for reference in references]
    ids = [
        stable_id(prompt, reference) if row_id is None else row_id
        for row_id, prompt, reference in zip(ids or [None] * len(texts), prompts, references, strict=True)
    ]
    special = [token.content for token in reward.tokenizer.added_tokens_decoder.values() if token.special]
    if special:  # the end of the turn, padding: no part of what was written
        texts = [re.sub("|".join(map(re.escape, special)), "", message_text(text)) for text in texts]
    with SCORING:
        rewards, details = reward.compute_rewards(
            texts, prompts=prompts, references=references, ids=ids, return_details=True
        )
    improvements = {f"reward_{level}": details["improvements"][level].float() for level in LEVELS}
    return rewards.cpu(), improvements
