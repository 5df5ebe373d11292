"""OpenRLHF 0.11.2's own flags and executor, also in a Ray actor, with our files as they are.

Not run: its vLLM engine, which needs a GPU. `Writes` stands in for it and writes what it is told.
"""

import argparse
import ast
import asyncio
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import openrlhf
import pytest
import ray
import toys
import yaml
from openrlhf.utils.agent import SingleTurnAgentExecutor
from transformers import AutoTokenizer

from mlppl.models import load_model
from multi_level_ppl_trl import MultiLevelPPLRewardFunction

EXAMPLES = Path(__file__).parent.parent / "rl_training" / "examples"
REWARD = str(EXAMPLES / "engines" / "reward.py")
SETTINGS = {"target": "reference", "form": "nats"}
PROMPT, WRITTEN, LABEL = "<s>[INST] Write of a café. [/INST]", " So the small fox went home.", "The end of the story."


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "reward.yaml"
    path.write_text(yaml.safe_dump({"model_name": "tiny-stories", "device": "cpu", **SETTINGS}))
    return str(path)


@pytest.fixture
def executor(config, monkeypatch):
    monkeypatch.setenv("PPL_REWARD_CONFIG", config)
    return SingleTurnAgentExecutor([REWARD])


@pytest.fixture(scope="module")
def direct():
    reward = MultiLevelPPLRewardFunction(*load_model("tiny-stories")[:2], **SETTINGS)
    return lambda text, prompt: reward.compute_rewards([text], [prompt], [LABEL]).item()


class Writes:
    """In place of vLLM: gives the ids of a text, whatever it is asked."""

    def __init__(self, tokenizer, text):
        self.ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.ids, finish_reason="stop", logprobs=None)])


def execute(executor, tokenizer, prompt=PROMPT, label=LABEL, max_length=512):
    sampling = SimpleNamespace(logprobs=None, max_tokens=32)
    engine = Writes(tokenizer, WRITTEN)
    return asyncio.run(executor.execute(prompt, label, sampling, max_length, tokenizer, engine))


TOKENIZERS = {
    "embedded": lambda: AutoTokenizer.from_pretrained(EXAMPLES / "tiny_stories"),
    "llama2_like": toys.llama2_like,
    "normalizing": toys.normalizing,
    "prefix_space": toys.prefix_space,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_executor_gives_the_direct_rewards_number(executor, direct, name):
    tokenizer = TOKENIZERS[name]()
    if tokenizer.eos_token is None:
        tokenizer.eos_token = "<s>"
    prompt = PROMPT.replace("é", "e\u0301") if name == "normalizing" else PROMPT
    output = execute(executor, tokenizer, prompt)
    query = tokenizer.decode(output["observation_tokens"])
    text = query[query.index("[/INST]") + len("[/INST]") :].removesuffix(tokenizer.eos_token)
    if name in ("llama2_like", "normalizing"):
        assert not query.startswith(prompt)
    # An end token that the scorer's tokenizer does not know is text to it.
    if name != "embedded":
        text += tokenizer.eos_token
    assert output["reward"].tolist() == [pytest.approx(direct(text, prompt), rel=1e-4)]
    assert set(output["extra_logs"]) >= {"reward_word", "reward_phrase", "reward_sentence"}


def test_a_prompt_that_it_cuts_gets_its_reward(executor, direct):
    tokenizer = TOKENIZERS["embedded"]()
    prompt = "Once upon a time there was a small fox who lived near the old mill with her mother."
    kept = len(tokenizer(prompt)["input_ids"]) - 5
    output = execute(executor, tokenizer, prompt, max_length=kept + 32)
    assert not tokenizer.decode(output["observation_tokens"]).startswith(prompt)
    assert output["reward"].tolist() == [pytest.approx(direct(WRITTEN, prompt), rel=1e-4)]


def test_what_openrlhf_swallows_was_printed(executor, capfd):
    tokenizer = TOKENIZERS["embedded"]()
    output = execute(executor, tokenizer, label=" ")
    assert output["reward"] is None
    assert "error: row 0 of this call has a blank reference" in capfd.readouterr().err


def test_the_executor_in_an_actor_of_ray(config, direct, cluster):
    """As its engines hold it: with the variable in the environment that Ray's workers get."""
    variables = {"env_vars": {"PPL_REWARD_CONFIG": config}}
    ray.init(address=cluster, log_to_driver=False, runtime_env=variables)
    try:

        @ray.remote
        class Actor:
            def __init__(self, path):
                self.executor = SingleTurnAgentExecutor([path])

            async def reward_of(self, query, prompt, label):
                [result] = await self.executor._fetch_rewards_via_func([query], [prompt], [label])
                return result["rewards"].tolist()

        actor = Actor.remote(REWARD)
        texts = [f"{WRITTEN}{' So.' * count}" for count in range(6)]
        rewards = ray.get([actor.reward_of.remote(PROMPT + text, PROMPT, LABEL) for text in texts])
    finally:
        ray.shutdown()
    assert [reward for [reward] in rewards] == pytest.approx([direct(text, PROMPT) for text in texts], rel=1e-4)


def test_its_own_parser_takes_the_examples_flags(tmp_path):
    """What its script has under `if __name__ == "__main__"`; its imports want a GPU's libraries and are left out."""
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DATASET": "rows.jsonl", "MODEL": "policy"}
    done = subprocess.run(
        [EXAMPLES / "engines" / "openrlhf.sh"], env=environment, capture_output=True, text=True, check=True
    )
    module, *flags = done.stdout.splitlines()[1:]
    assert module == "openrlhf.cli.train_ppo_ray"
    path = Path(openrlhf.__file__).parent / "cli" / "train_ppo_ray.py"
    [main] = [
        one
        for one in ast.parse(path.read_text()).body
        if isinstance(one, ast.If) and "__main__" in ast.unparse(one.test)
    ]
    trained = []
    names = {"argparse": argparse, "os": os, "datetime": datetime, "train": trained.append}
    before, sys.argv = sys.argv, ["train_ppo_ray", *flags]
    try:
        exec(compile(ast.Module(main.body, []), str(path), "exec"), names)
    finally:
        sys.argv = before
    [args] = trained
    assert [Path(one) for one in args.reward.remote_url] == [Path(REWARD)]
    assert (args.data.input_key, args.data.label_key) == ("prompt", "reference")
    assert args.algo.advantage.estimator == "group_norm"
