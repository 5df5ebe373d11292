"""The reward as OpenRLHF and verl call it: loaded by path, from threads, one completion at a time.

Neither engine is installed here; `make engines` runs them. How they load and call is copied from their sources:
OpenRLHF's `SingleTurnAgentExecutor` (openrlhf/utils/agent.py), verl's `load_module` and its reward manager `naive`.
"""

import asyncio
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from waiting import PATIENCE

import mlppl.reward.configured
from mlppl.config import LEVELS
from mlppl.errors import InputError
from mlppl.models import load_model
from mlppl.reward.terms import bent
from multi_level_ppl_trl import MultiLevelPPLCalculator, MultiLevelPPLRewardFunction

EXAMPLES = Path(__file__).parent.parent / "rl_training" / "examples"
ENGINE_REWARD = EXAMPLES / "engines" / "reward.py"
ROWS = json.loads((EXAMPLES / "tiny_stories" / "train.json").read_text())[:6]
PROMPTS = [row["prompt"] for row in ROWS]
REFERENCES = [row["completion"] for row in ROWS]
COMPLETIONS = [" So the fox went home.", " xq zt", " They were very happy, and laughed.", "", " No!", " She was sad."]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return load_model("tiny-stories")[:2]


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Writes the settings to the file that PPL_REWARD_CONFIG names, and counts how often a model is loaded for it."""

    def write(**settings):
        path = tmp_path / "reward.yaml"
        settings = {
            "model_name": "tiny-stories",
            "device": "cpu",
            "form": "nats",
            **settings,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        path.write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
        monkeypatch.setenv("PPL_REWARD_CONFIG", str(path))
        loads = []

        @functools.wraps(load_model)
        def counted(*args, **kwargs):
            loads.append(args)
            return load_model(*args, **kwargs)

        monkeypatch.setattr(mlppl.reward.configured, "load_model", counted)
        return loads

    return write


def by_path(name: str, register: bool):
    spec = importlib.util.spec_from_file_location(name, str(ENGINE_REWARD))
    module = importlib.util.module_from_spec(spec)
    if register:
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def direct(model_and_tokenizer, **options):
    reward = MultiLevelPPLRewardFunction(*model_and_tokenizer, form="nats", **options)
    columns = {"prompts": PROMPTS, "references": REFERENCES, "ids": [row["id"] for row in ROWS]}
    return reward.compute_rewards(COMPLETIONS, **columns, return_details=True)


def openrlhf(reward_func, queries, prompts, labels) -> list[dict]:
    async def fetch():
        tasks = [
            asyncio.to_thread(reward_func, queries[i : i + 1], prompts[i : i + 1], labels[i : i + 1])
            for i in range(len(queries))
        ]
        return await asyncio.gather(*tasks)

    return asyncio.run(fetch())


def naive(compute_score, rows) -> list[dict]:
    async def run_single(row):
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, lambda: compute_score(**row))

    async def run():
        return await asyncio.gather(*map(run_single, rows))

    return asyncio.run(run())


def verl_rows(prompts, **info) -> list[dict]:
    given = {"num_turns": None, "rollout_reward_scores": {}}
    return [
        {"data_source": "stories", "solution_str": text, "ground_truth": reference,
         "extra_info": {"prompt": prompt, **{name: values[index] for name, values in info.items()}, **given}}
        for index, (prompt, text, reference) in enumerate(zip(prompts, COMPLETIONS, REFERENCES, strict=True))
    ]  # fmt: skip


@pytest.mark.parametrize("target", ["reference", "completion"])
def test_openrlhf_gets_the_numbers_of_the_direct_reward(configure, tmp_path, model_and_tokenizer, target):
    options = {"target": target}
    if target == "completion":
        path = tmp_path / "baselines.json"
        path.write_text(json.dumps({prompt: dict.fromkeys(LEVELS, 30.0 + n) for n, prompt in enumerate(PROMPTS)}))
        options["baselines"] = str(path)
    loads = configure(**options)
    queries = [f"{prompt}{text}<|eos|>" for prompt, text in zip(PROMPTS, COMPLETIONS, strict=True)]
    # Each of its engine processes loads the file once; two engines in one process, as its tests have them, do it twice.
    found = [openrlhf(by_path("reward_func", False).reward_func, queries, PROMPTS, REFERENCES) for _ in range(2)]
    assert len(loads) == 1
    rewards, details = direct(model_and_tokenizer, **options)
    assert rewards.std() > 0.01
    for results in found:
        for name in ("rewards", "scores"):
            assert torch.cat([result[name] for result in results]).tolist() == pytest.approx(rewards.tolist(), rel=1e-4)
        for level in LEVELS:
            logged = torch.cat([result["extra_logs"][f"reward_{level}"] for result in results])
            assert logged.tolist() == pytest.approx(details["improvements"][level].tolist(), rel=1e-3, abs=1e-3)


def test_verl_gets_the_numbers_of_the_direct_reward(configure, model_and_tokenizer):
    loads = configure(target="reference")
    module = by_path("custom_module", True)
    rewards, details = direct(model_and_tokenizer, target="reference")
    results = naive(module.compute_score, verl_rows(PROMPTS))
    assert [result["score"] for result in results] == pytest.approx(rewards.tolist(), rel=1e-4)
    words = details["improvements"]["word"].tolist()
    assert [result["reward_word"] for result in results] == pytest.approx(words, rel=1e-3, abs=1e-3)
    names = ("score", *(f"{kind}_{level}" for kind in ("reward", "score") for level in LEVELS))
    assert {tuple(result) for result in results} == {names}
    assert all(type(value) is float for result in results for value in result.values())
    assert len(loads) == 1


@pytest.mark.parametrize("form", ["thresholds", "nats"])
def test_a_level_alone_earns_by_the_rewards_own_form_and_a_blank_text_the_least(configure, tmp_path, form):
    """For GDPO, where an improvement of 0 % for a blank text would beat the -55 % of an honest one."""
    path = tmp_path / "baselines.json"
    path.write_text(json.dumps({prompt: dict.fromkeys(LEVELS, 40.0) for prompt in PROMPTS}))
    # The points of a threshold reward may lie below 0, and 0 is what a text below the lowest one gets.
    points = (
        {"reward_thresholds": [(-200.0, -1.0), (60.0, 1.0)]} if form == "thresholds" else {"reward_thresholds": None}
    )
    configure(baselines=str(path), form=form, **points)
    results = naive(by_path("custom_module", True).compute_score, verl_rows(PROMPTS))
    blank = results[COMPLETIONS.index("")]
    scored = [result for result, text in zip(results, COMPLETIONS, strict=True) if text]
    assert blank["reward_word"] == 0.0
    assert min(result["reward_word"] for result in scored) < 0.0 < max(result["reward_word"] for result in scored)
    for level in LEVELS:
        for result in scored:
            improvement = result[f"reward_{level}"]
            if form == "nats":  # baseline - current = improvement of it
                expected = bent(-np.log(1 - improvement / 100))
            else:
                expected = 1.0 if improvement >= 60 else -1.0 if improvement >= -200 else 0.0
            assert result[f"score_{level}"] == pytest.approx(expected, abs=1e-6)
        assert blank[f"score_{level}"] == {"nats": -1.0, "thresholds": -1.0}[form]
        assert blank[f"score_{level}"] <= min(result[f"score_{level}"] for result in scored)


def test_calls_that_come_meanwhile_take_one_pass_of_the_scorer_and_get_the_same_numbers(configure, monkeypatch):
    configure(target="reference", use_cache=False)
    module = by_path("custom_module", True)
    rows = verl_rows(PROMPTS)
    alone = [module.compute_score(**row) for row in rows]
    reward = mlppl.reward.configured.reward_from_config()
    sizes, begun, go_on, compute = [], threading.Event(), threading.Event(), reward.compute_rewards

    def counted(texts, *args, **kwargs):
        sizes.append(len(texts))
        begun.set()
        assert go_on.wait(PATIENCE)
        return compute(texts, *args, **kwargs)

    monkeypatch.setattr(reward, "compute_rewards", counted)
    with ThreadPoolExecutor(len(rows)) as pool:
        calls = [pool.submit(module.compute_score, **rows[0])]
        assert begun.wait(PATIENCE)
        calls += [pool.submit(module.compute_score, **row) for row in rows[1:]]
        while module.scored_together.waiting < len(rows) - 1:
            time.sleep(0.001)
        go_on.set()
        together = [call.result() for call in calls]
    assert sizes == [1, len(rows) - 1]
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_verl_finds_baselines_by_the_rows_id(configure, tmp_path):
    path = tmp_path / "baselines.json"
    path.write_text(json.dumps({f"row{n}": dict.fromkeys(LEVELS, 1e9) for n in range(len(ROWS))}))
    configure(baselines=str(path))
    module = by_path("custom_module", True)
    rows = verl_rows(PROMPTS, id=[f"row{n}" for n in range(len(ROWS))])
    scores = [result["score"] for result in naive(module.compute_score, rows)]
    assert all(score == -1 if not text else 0.9 < score < 1 for score, text in zip(scores, COMPLETIONS, strict=True))


def test_verl_does_not_go_on_with_a_begun_answer(configure):
    """Its chat template opens another one behind it: https://github.com/verl-project/verl/issues/656."""
    configure(target="reference")
    begun = [{"role": "user", "content": "The fox?"}, {"role": "assistant", "content": "It"}]
    with pytest.raises(InputError, match=r"ends with an assistant's message, 'It', and verl .*: end prompts with a u"):
        by_path("custom_module", True).compute_score("verl", " is.", "It is.", {"prompt": begun})


def test_verl_may_give_the_prompt_as_chat_messages_in_an_array(configure, tmp_path):
    configure(target="reference")
    module = by_path("custom_module", True)
    reward = mlppl.reward.configured.reward_from_config()
    reward.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chats = [np.array([{"role": "user", "content": prompt}], dtype=object) for prompt in PROMPTS]
    plain = [result["score"] for result in naive(module.compute_score, verl_rows(PROMPTS))]
    assert [result["score"] for result in naive(module.compute_score, verl_rows(chats))] == pytest.approx(plain)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "set baselines, or target: reference"),
        ({"target": "reference", "normalize": True}, "normalize"),
        ({"target": "reference", "missing": "skip"}, "missing: skip"),
        ({"target": "reference", "device": None}, "device is not set"),
        ({"target": "reference", "wieghts": [1, 1, 1]}, "did you mean weights"),
    ],
)
def test_what_a_completion_alone_cannot_have_is_refused_when_the_file_is_loaded(configure, settings, words):
    configure(**settings)
    with pytest.raises(InputError, match=words):
        by_path("reward_func", False)


def test_what_is_no_score_is_printed_since_openrlhf_swallows_it(configure, capsys):
    configure(target="reference")
    module = by_path("custom_module", True)
    with pytest.raises(InputError, match="extra_info has no 'prompt'"):
        module.compute_score("stories", " So.", "The end.", {"index": 3})
    with pytest.raises(InputError, match="does not begin with its prompt"):
        module.reward_func(["upon it. So"], ["Once upon a time."], ["The end."])
    assert "error: the query 'upon it. So' does not begin with its prompt" in capsys.readouterr().err
    with pytest.raises(InputError, match="blank reference"):
        module.reward_func(["Once. So"], ["Once."], [None])


@pytest.mark.parametrize(
    ("query", "prompt"),
    [
        ("<s> [INST] hi [/INST] So.", "<s>[INST] hi [/INST]"),  # the policy's tokenizer is not the scorer's
        ("Caf\u00e9 [/INST] So.", "Cafe\u0301 [/INST]"),
        ("a time there was a fox. So.", "Once upon a time there was a fox."),
    ],
)
def test_a_prompt_that_its_tokenizer_or_a_limit_changed_gets_the_reward_of_its_completion(configure, query, prompt):
    configure(target="reference")
    module = by_path("reward_func", False)
    whole = module.reward_func([f"{prompt} So."], [prompt], ["The end."])
    assert whole["rewards"].item() != 0
    assert module.reward_func([query], [prompt], ["The end."])["rewards"].tolist() == whole["rewards"].tolist()


def test_the_example_files_point_to_what_is_there():
    engines = EXAMPLES / "engines"
    assert mlppl.reward.configured.read_settings(engines / "reward.yaml")["target"] == "reference"
    function = yaml.safe_load((engines / "verl.yaml").read_text())["reward"]["custom_reward_function"]
    assert f"def {function['name']}(" in ENGINE_REWARD.read_text()
    for script in ("openrlhf.sh", "verl.sh"):
        names = re.findall(r"\$EXAMPLES/([\w/.]+)", (engines / script).read_text())
        assert len(names) >= 2
        for name in names:
            assert (EXAMPLES / name).exists(), name


@pytest.mark.parametrize("script", ["openrlhf.sh", "verl.sh"])
def test_an_example_gives_absolute_paths_wherever_it_is_started(tmp_path, script):
    """Ray's workers run in another folder than the shell that starts them."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nenv | grep PPL_REWARD_CONFIG\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "mine.yaml").write_text("model_name: tiny-stories")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DATASET": "d", "MODEL": "m"}
    command = [os.path.relpath(EXAMPLES / "engines" / script, tmp_path), "extra=1"]
    for config, path in ((None, EXAMPLES / "engines" / "reward.yaml"), ("mine.yaml", tmp_path / "mine.yaml")):
        environment |= {"PPL_REWARD_CONFIG": config} if config else {}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        words = done.stdout.splitlines()
        paths = [Path(word.partition("=")[2] or word) for word in words if word.endswith(("reward.py", ".yaml"))]
        assert {one.resolve() for one in paths} == {ENGINE_REWARD.resolve(), path.resolve()}
        assert all(one.is_absolute() for one in paths)
        assert words[-1] == "extra=1"


def test_a_prompt_is_known_again_though_its_tokenizer_decodes_it_otherwise(configure, tmp_path, story):
    """SentencePiece's writes BOS and a space in front, and strips the first space of a completion by itself."""
    model, tokenizer = story
    for part in story:
        part.save_pretrained(tmp_path / "model")
    prompt, text = "Once upon a", " time there was a fox."
    baselines = tmp_path / "baselines.json"
    baselines.write_text(json.dumps({prompt: dict.fromkeys(LEVELS, 100.0)}))
    configure(model_name=str(tmp_path / "model"), baselines=str(baselines))
    module = by_path("reward_func", False)
    ids = tokenizer(prompt + text)["input_ids"]
    query = tokenizer.decode([*ids, tokenizer.eos_token_id])
    assert not query.startswith(prompt)
    [direct] = MultiLevelPPLCalculator(tokenizer).score_pairs(model, [(prompt, text)])
    expected = [100 - ppl for ppl in direct]  # improvement over 100, in percent
    row = {"prompt": prompt}
    alone = tokenizer.decode(tokenizer(text.strip(), add_special_tokens=False)["input_ids"])
    of_verl = module.compute_score("stories", alone, "", row)
    of_openrlhf = module.reward_func([query], [prompt], [""])["extra_logs"]
    assert [of_verl[f"reward_{level}"] for level in LEVELS] == pytest.approx(expected, rel=1e-4)
    assert [of_openrlhf[f"reward_{level}"].item() for level in LEVELS] == pytest.approx(expected, rel=1e-4)


def test_a_policy_that_is_another_model_is_named_in_the_file(configure, tmp_path, story, model_and_tokenizer):
    """Its special tokens are no text, and the first space that its decoder strips is scored."""
    for part in story:
        part.save_pretrained(tmp_path / "policy")
    prompt, text = "Once upon a time there was a little girl named", " Lily. She liked to play."
    baselines = tmp_path / "baselines.json"
    baselines.write_text(json.dumps({prompt: dict.fromkeys(LEVELS, 100.0)}))
    configure(policy="./policy", baselines=str(baselines))
    module = by_path("reward_func", False)
    ids = story[1](prompt + text)["input_ids"]
    query = story[1].decode([*ids, story[1].eos_token_id])
    assert query.startswith("<s>") and query.endswith("</s>")
    [direct] = MultiLevelPPLCalculator(model_and_tokenizer[1]).score_pairs(model_and_tokenizer[0], [(prompt, text)])
    expected = [100 - ppl for ppl in direct]
    of_verl = module.compute_score("stories", text.strip(), "", {"prompt": prompt})
    of_openrlhf = module.reward_func([query], [prompt], [""])["extra_logs"]
    assert [of_verl[f"reward_{level}"] for level in LEVELS] == pytest.approx(expected, rel=1e-4)
    assert [of_openrlhf[f"reward_{level}"].item() for level in LEVELS] == pytest.approx(expected, rel=1e-4)
    (tmp_path / "other.yaml").write_text("model_name: tiny-stories\npolicy: ./nowhere\n")
    with pytest.raises(InputError, match=r"other.yaml: cannot load model '.*nowhere': no such folder here"):
        mlppl.reward.configured.reward_from_config(tmp_path / "other.yaml")
