"""verl 0.9.1's own config, data set, loader, reward managers, Ray workers and GDPO, with our files as they are.

Not run: a policy, its rollout and its update, which need a GPU. Completions are written here in their place.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import toys
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict
from transformers import AutoTokenizer
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopManager
from verl.trainer.ppo.core_algos import compute_gdpo_outcome_advantage
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils.dataset.rl_dataset import RLHFDataset

from mlppl.config import LEVELS
from mlppl.models import load_model
from multi_level_ppl_trl import MultiLevelPPLRewardFunction

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "rl_training" / "examples"
COMPLETIONS = [" So the fox went home.", " xq zt", " They were very happy, and laughed.", "", " No!", " She was sad."]
# As engines/reward.yaml, with a reward in which these completions differ.
SETTINGS = {"target": "reference", "form": "nats"}
GDPO = ["algorithm.adv_estimator=gdpo", "reward.reward_manager.name=gdpo", "trainer.use_v1=False"]


@pytest.fixture(scope="module")
def words_of_the_script(tmp_path_factory):
    """What engines/verl.sh gives to verl, for a reward of our own."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "python").chmod(0o755)
    (folder / "reward.yaml").write_text(yaml.safe_dump({"model_name": "tiny-stories", "device": "cpu", **SETTINGS}))
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PPL_REWARD_CONFIG": "reward.yaml"}
    done = subprocess.run(
        [EXAMPLES / "engines" / "verl.sh"], env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def configured(words_of_the_script, files):
    """verl's whole configuration, for more words behind those of the script."""
    assert words_of_the_script[:2] == ["-m", "verl.trainer.main_ppo"]
    _, _, _, folder, _, name, *overrides = words_of_the_script

    def make(*more):
        with initialize_config_dir(folder, version_base=None):
            return compose(name, [*overrides, f"actor_rollout_ref.model.path={files / 'policy'}", *more])

    return make


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A policy's tokenizer with a chat template, and the rows of engines/README.md, made by its own snippet."""
    folder = tmp_path_factory.mktemp("verl")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny_stories")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "policy")
    stories = json.loads((EXAMPLES / "tiny_stories" / "train.json").read_text())[:6]
    (folder / "your" / "dataset").mkdir(parents=True)
    rows = [{name: story[name] for name in ("prompt", "completion")} for story in stories]
    (folder / "your" / "dataset" / "train.json").write_text("\n".join(map(json.dumps, rows)))
    text = (EXAMPLES / "engines" / "README.md").read_text(encoding="utf-8")
    [snippet] = [text for text in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if "extra_info" in text]
    subprocess.run([sys.executable, "-c", snippet], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def data(configured, files):
    """The rows as verl's own data set reads them, with a completion each as its rollout would leave it."""
    config = configured()
    tokenizer = AutoTokenizer.from_pretrained(files / "policy")
    dataset = RLHFDataset(str(files / "verl_train.parquet"), tokenizer, config.data)
    rows = [dataset[index] for index in range(len(dataset))]
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in COMPLETIONS]
    longest = max(map(len, ids))
    responses = torch.tensor([one + [tokenizer.pad_token_id] * (longest - len(one)) for one in ids])
    prompts = torch.zeros(len(rows), 3, dtype=torch.long)
    mask = torch.tensor([[1] * 3 + [1] * len(one) + [0] * (longest - len(one)) for one in ids])
    names = ("data_source", "reward_model", "extra_info", "raw_prompt")
    batch = DataProto.from_dict(
        tensors={"responses": responses, "prompts": prompts, "attention_mask": mask},
        non_tensors={name: np.array([row[name] for row in rows], dtype=object) for name in names},
    )
    return batch, tokenizer


@pytest.fixture(scope="module")
def direct():
    """The reward's own numbers, in one call: (rewards, improvements)."""
    reward = MultiLevelPPLRewardFunction(*load_model("tiny-stories")[:2], **SETTINGS)
    stories = json.loads((EXAMPLES / "tiny_stories" / "train.json").read_text())[:6]
    rewards, details = reward.compute_rewards(
        COMPLETIONS, [row["prompt"] for row in stories], [row["completion"] for row in stories], return_details=True
    )
    assert rewards.std() > 0.01
    return rewards.tolist(), details["improvements"]


def check(results, direct):
    rewards, improvements = direct
    assert [result["reward_score"] for result in results] == pytest.approx(rewards, rel=1e-4)
    for level in LEVELS:
        logged = [result["reward_extra_info"][f"reward_{level}"] for result in results]
        assert logged == pytest.approx(improvements[level].tolist(), rel=1e-3, abs=1e-3)


def test_verls_command_reads_the_example(files, tmp_path):
    """`--cfg job` is Hydra's: the configuration that would be run, by verl's own entry point."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [EXAMPLES / "engines" / "verl.sh", *GDPO, "+algorithm.gdpo_reward_keys=[score_word]", "--cfg", "job"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    config = yaml.safe_load(done.stdout)
    assert Path(config["reward"]["custom_reward_function"]["path"]).samefile(EXAMPLES / "engines" / "reward.py")
    variables = config["ray_kwargs"]["ray_init"]["runtime_env"]["env_vars"]
    assert Path(variables["PPL_REWARD_CONFIG"]).samefile(EXAMPLES / "engines" / "reward.yaml")
    assert config["algorithm"]["gdpo_reward_keys"] == ["score_word"]


@pytest.mark.parametrize("name", ["naive", "dapo", "gdpo", "rate_limited"])
def test_a_reward_manager_gives_the_direct_rewards_numbers(configured, data, direct, name, monkeypatch):
    config = configured(f"reward.reward_manager.name={name}")
    variables = config.ray_kwargs.ray_init.runtime_env.env_vars
    monkeypatch.setenv("PPL_REWARD_CONFIG", variables.PPL_REWARD_CONFIG)
    batch, tokenizer = data
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    manager = load_reward_manager(config, tokenizer)

    async def run():
        return await asyncio.gather(*(manager.run_single(batch[row : row + 1]) for row in range(len(batch))))

    check(manager.loop.run_until_complete(run()), direct)


@pytest.mark.parametrize("name", ["naive", "remote"])
def test_verls_workers_on_a_cluster_that_runs_already(configured, data, direct, cluster, name):
    config = configured(f"reward.reward_manager.name={name}")
    options = OmegaConf.to_container(config.ray_kwargs.ray_init.runtime_env)
    options = {name: value for name, value in options.items() if value is not None}
    if name == "remote":  # it pickles the function, and its workers import `mlppl`, as after `pip install -e .`
        options["env_vars"]["PYTHONPATH"] = str(EXAMPLES)
    ray.init(address=cluster, runtime_env=options, log_to_driver=False)
    try:
        batch, _ = data
        rows = RewardLoopManager(config).compute_rm_score(batch)
    finally:
        ray.shutdown()
    scores = rows.batch["rm_scores"].sum(dim=1).tolist()
    names = set(rows.meta_info["reward_extra_keys"])
    assert names >= {f"{kind}_{level}" for kind in ("reward", "score") for level in LEVELS}
    infos = [{name: rows.non_tensor_batch[name][row] for name in names} for row in range(len(scores))]
    check([{"reward_score": score, "reward_extra_info": one} for score, one in zip(scores, infos, strict=True)], direct)


def test_gdpo_takes_each_levels_score_and_gives_a_blank_text_no_advantage(configured, data, tmp_path, monkeypatch):
    config = configured(*GDPO, "+algorithm.gdpo_reward_keys=[score_word,score_phrase,score_sentence]")
    batch, tokenizer = data
    prompts = [info["prompt"] for info in batch.non_tensor_batch["extra_info"]]
    (tmp_path / "baselines.json").write_text(json.dumps({one: dict.fromkeys(LEVELS, 30.0) for one in prompts}))
    (tmp_path / "reward.yaml").write_text(
        "model_name: tiny-stories\ndevice: cpu\nform: nats\nbaselines: baselines.json\n"
    )
    monkeypatch.setenv("PPL_REWARD_CONFIG", str(tmp_path / "reward.yaml"))
    asyncio.set_event_loop(asyncio.new_event_loop())
    manager = load_reward_manager(config, tokenizer)

    async def run():
        return await asyncio.gather(*(manager.run_single(batch[row : row + 1]) for row in range(len(batch))))

    results = manager.loop.run_until_complete(run())
    keys = config.algorithm.gdpo_reward_keys
    extra = {key: np.array([result["reward_extra_info"][key] for result in results]) for key in keys}
    assert min(extra["score_word"]) == -1.0  # the least that a level earns
    mask = batch.batch["attention_mask"][:, 3:]
    advantages, _ = compute_gdpo_outcome_advantage(
        torch.zeros_like(mask, dtype=torch.float32), mask, np.array(["one group"] * len(batch)),
        config=config.algorithm, non_tensor_batch=extra, batch=batch.batch,
    )  # fmt: skip
    per_text = advantages[:, 0].tolist()
    blank = COMPLETIONS.index("")
    assert per_text[blank] == min(per_text) < 0
    assert max(per_text) > 0


def test_what_is_gone_from_verl_is_refused_by_verl(configured, data, monkeypatch):
    config = configured()
    monkeypatch.setenv("PPL_REWARD_CONFIG", config.ray_kwargs.ray_init.runtime_env.env_vars.PPL_REWARD_CONFIG)
    with open_dict(config):
        config.reward.reward_manager.name = "batch"
    with pytest.raises(ValueError, match="batch"):
        load_reward_manager(config, data[1])


def test_toys_have_a_chat_template_for_messages_in_extra_info(configured, data, tmp_path, monkeypatch):
    """A scorer with a template reads the messages themselves."""
    model, _, _ = load_model("tiny-stories")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny_stories")
    tokenizer.chat_template = toys.CHAT_TEMPLATE
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "scorer")
    (tmp_path / "reward.yaml").write_text("model_name: ./scorer\ndevice: cpu\ntarget: reference\n")
    monkeypatch.setenv("PPL_REWARD_CONFIG", str(tmp_path / "reward.yaml"))
    batch, policy_tokenizer = data
    row = batch[:1]
    messages = list(row.non_tensor_batch["raw_prompt"][0])
    given = {**row.non_tensor_batch["extra_info"][0], "prompt": np.array(messages, dtype=object)}
    row.non_tensor_batch["extra_info"] = np.array([given], dtype=object)
    asyncio.set_event_loop(asyncio.new_event_loop())
    manager = load_reward_manager(configured(), policy_tokenizer)
    result = manager.loop.run_until_complete(manager.run_single(row))
    reward = MultiLevelPPLRewardFunction(model, tokenizer, target="reference")
    reference = row.non_tensor_batch["reward_model"][0]["ground_truth"]
    [expected] = reward.compute_rewards(COMPLETIONS[:1], [messages], [reference]).tolist()
    assert result["reward_score"] == pytest.approx(expected)
