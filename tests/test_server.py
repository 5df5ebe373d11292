"""A scorer behind an address: the numbers of the model here, and one line for what a server or a network can do.

The server is `vllm_stand_in`, a process of its own that answers as vLLM does. `make vllm` compares with vLLM itself.
"""

import json
import logging
import multiprocessing
import pickle
import signal
import threading
import time
from pathlib import Path

import async_rollout
import numpy as np
import pytest
import toys
import vllm_stand_in
import yaml
from training_runs import SHORT, log_history, refusal, train
from waiting import PATIENCE

import mlppl.baselines.job
from compute_baselines_trl import parse_args
from mlppl.config import AGGREGATIONS, LEVELS
from mlppl.errors import BaselineError, InputError
from mlppl.models import load_model
from mlppl.reward.configured import reward_from_config
from mlppl.reward.loop_guard import loop_guard, loop_veto
from mlppl.scoring.differences import PROBE_NATS, differences
from mlppl.scoring.server import PROBE, ServerScorer, connect
from mlppl.scoring.surprisal import SurprisalScorer, as_scorer, is_scorer
from mlppl.scoring.tokens import TextEncoder
from multi_level_ppl_trl import MultiLevelPPLCalculator, MultiLevelPPLRewardFunction

STORIES = Path(__file__).parent.parent / "rl_training" / "examples" / "tiny_stories"
ROWS = json.loads((STORIES / "train.json").read_text())
PROMPTS = [row["prompt"] for row in ROWS[:8]]
TEXTS = [row["completion"] for row in ROWS[:7]] + [""]


@pytest.fixture(scope="module")
def local():
    return load_model("tiny-stories")[:2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = vllm_stand_in.Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def scorer(server, local):
    yield ServerScorer(server.url, local[1], patience=PATIENCE)
    server.behave()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_each_level_is_that_of_the_model_here(scorer, local, aggregation):
    model, tokenizer = local
    calculator = MultiLevelPPLCalculator(tokenizer, aggregation=aggregation)
    here = calculator.compute_all_levels(model, TEXTS, PROMPTS)
    there = calculator.compute_all_levels(scorer, TEXTS, PROMPTS)
    for level in LEVELS:
        assert there[level].tolist() == pytest.approx(here[level].tolist(), rel=1e-4, nan_ok=True)
    assert np.isnan(there["word"][-1])
    explained = calculator.explain(scorer, TEXTS[0], PROMPTS[0])
    assert explained.perplexities["word"] == pytest.approx(here["word"][0].item(), rel=1e-4)


def test_a_text_longer_than_the_servers_window_is_scored_whole(scorer, local):
    model, tokenizer = local
    assert scorer.window == vllm_stand_in.WINDOW - 1
    [encoded] = TextEncoder(tokenizer).encode([""], [" ".join(TEXTS * 2)])
    assert len(encoded.ids) > 2 * scorer.window

    class AsNarrow(SurprisalScorer):
        window = scorer.window

    [here], [there] = AsNarrow(model).score([encoded]), scorer.score([encoded])
    assert there.tolist() == pytest.approx(here.tolist(), abs=1e-4)


def test_many_requests_are_under_way_at_a_time_and_several_texts_share_one(server, scorer, local):
    encoded = TextEncoder(local[1]).encode([""] * 150, [row["completion"] for row in ROWS[:150]])
    before = server.requests()["answered"]
    server.misbehave("slow", 0.2)
    scorer.score(encoded)
    counts = server.requests()
    assert 150 / 64 <= counts["answered"] - before < 50
    assert counts["most"] >= 3


def test_the_reward_is_that_of_the_model_here(scorer, local):
    model, tokenizer = local
    columns = {"prompts": PROMPTS, "references": [row["completion"] for row in ROWS[:8]]}
    for target in ("reference", "completion"):
        options = {"target": target, "form": "nats", "aggregation": "nested"}
        if target == "completion":
            options["baselines"] = {prompt: dict.fromkeys(LEVELS, 5.0) for prompt in PROMPTS}
        here = MultiLevelPPLRewardFunction(model, tokenizer, **options)
        there = MultiLevelPPLRewardFunction(scorer=scorer, tokenizer=tokenizer, **options)
        expected = here.compute_rewards(TEXTS, **columns)
        assert expected.std() > 0.001
        assert there.compute_rewards(TEXTS, **columns).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        assert there.compute_rewards(TEXTS, **columns).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    again = pickle.loads(pickle.dumps(there))
    assert again.compute_rewards(TEXTS, **columns).tolist() == pytest.approx(expected.tolist(), abs=1e-4)


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.mark.slow
def test_rewards_that_async_grpo_computes_are_those_of_this_process(server, tmp_path):
    """It pickles them into a process that it spawns, and calls all at once, each in a thread, without `trainer_state`,
    `log_metric` and `log_extra`. The first group makes the zero-shot baselines, the second is measured by them."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    scorer, tokenizer = connect(server.url, "tiny-stories", str(tmp_path / "chat.jinja"))
    groups = []
    for texts in (TEXTS[:4], [*TEXTS[4:7], TEXTS[0] * 2]):
        ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
        said = tokenizer.batch_decode(ids, skip_special_tokens=True)
        groups.append({
            "prompts": [[{"role": "user", "content": PROMPTS[0]}]] * 4,
            "completions": [[{"role": "assistant", "content": text}] for text in said],
            "completions_ids": ids,
            "reward_kwargs": {"id": ["a"] * 4, "reference": [ROWS[9]["completion"]] * 4},
        })  # fmt: skip

    def rewards() -> list:
        made = [MultiLevelPPLRewardFunction(scorer, tokenizer, form="nats", **options) for options in (
            {}, {"target": "reference"}, {"use_cache": False, "aggregation": "nested"},
        )]  # fmt: skip
        per_level = MultiLevelPPLRewardFunction(scorer, tokenizer, form="nats").per_level(
            loop_veto(tokenizer=tokenizer)
        )
        for index, reward in enumerate(made):
            reward.__name__ = str(index)
        return [*made, *per_level, loop_guard(tokenizer=tokenizer)[0]]

    results = multiprocessing.get_context("spawn").Queue()
    child = multiprocessing.get_context("spawn").Process(target=async_rollout.score, args=(rewards(), groups, results))
    child.start()
    here = rewards()
    for group in groups:
        columns = {name: group[name] for name in ("prompts", "completions")}
        columns |= {"completion_ids": group["completions_ids"], **group["reward_kwargs"]}
        expected = {reward.__name__: reward(**columns) for reward in here}
        found = results.get(timeout=PATIENCE)
        assert found == {name: pytest.approx(values, abs=1e-6) for name, values in expected.items()}
    assert all(np.std(values) > 0.001 for values in expected.values())
    child.join(PATIENCE)
    assert child.exitcode == 0


def test_a_model_or_a_scorer_and_a_tokenizer_are_needed(local, scorer):
    model, tokenizer = local
    for wrong in ({}, {"baseline_model": model}, {"baseline_model": model, "scorer": scorer, "tokenizer": tokenizer}):
        with pytest.raises(InputError, match="expected a baseline_model or a scorer"):
            MultiLevelPPLRewardFunction(**wrong)
    assert is_scorer(scorer)
    assert as_scorer(scorer) is scorer
    assert isinstance(as_scorer(model), SurprisalScorer)


@pytest.mark.parametrize(
    ("how", "words"),
    [("top_only", "gave no log-probability for token"), ("none", "gives no prompt_logprobs")],
)
def test_a_log_probability_that_is_not_given_is_an_error(server, scorer, local, how, words):
    server.misbehave(how)
    with pytest.raises(InputError, match=words) as error:
        MultiLevelPPLCalculator(local[1]).compute_all_levels(scorer, "Once there was a fox.")
    assert "\n" not in str(error.value)


def test_what_the_server_refuses_is_said_and_not_asked_again(server, scorer, local):
    server.misbehave("renamed")
    before = server.requests()["answered"]
    with pytest.raises(InputError, match=rf"HTTP 404: 'The model `{vllm_stand_in.NAME}` does not exist.'"):
        MultiLevelPPLCalculator(local[1]).compute_all_levels(scorer, "Once there was a fox.")
    assert server.requests()["answered"] == before + 1


def test_a_server_that_is_not_there_is_one_line_at_once(local):
    said = {"http://127.0.0.1:9": "does not answer (ConnectError)", "127.0.0.1:9": "expected the address"}
    for url, words in said.items():
        with pytest.raises(InputError) as error:
            ServerScorer(url, local[1])
        assert words in str(error.value)


@pytest.mark.parametrize(("how", "nats", "words"), [
    ("cached", 1, "up to 1.00 nats"), ("cached", -0.2, "up to 0.20 nats"), ("cached", 0.02, None),
    ("batched", 2, "up to 2.00 nats"), ("batched", 0.2, None),
])  # fmt: skip
def test_a_server_whose_numbers_depend_on_the_order_of_requests_is_refused(server, local, how, nats, words):
    """vLLM's issue 42019, with prefix caching, its default: also where an earlier run has filled the cache. What the
    kernels of a sound server may differ by is no reason."""
    ServerScorer(server.url, local[1])
    try:
        server.misbehave(how, nats)
        for _ in range(2):
            if words is None:
                ServerScorer(server.url, local[1])
                continue
            with pytest.raises(InputError, match="--no-enable-prefix-caching") as error:
                ServerScorer(server.url, local[1])
            assert words in str(error.value) and "\n" not in str(error.value)
    finally:
        server.behave()


def test_a_token_that_the_server_rules_out_is_infinitely_surprising_and_hides_nothing(server, local):
    ids = local[1](PROBE)["input_ids"]
    try:
        server.misbehave("ruled_out", ids[40])
        probe = ServerScorer(server.url, local[1]).identity["probe"]
        assert probe.count(np.inf) == ids.count(ids[40]) and max(set(probe) - {np.inf}) < 100
        server.misbehave("cached", 1)
        with pytest.raises(InputError, match="--no-enable-prefix-caching") as error:
            ServerScorer(server.url, local[1])
        assert "up to 1.00 nats" in str(error.value)
    finally:
        server.behave()


def test_connecting_takes_three_requests_for_numbers(server, local):
    before = server.requests()["answered"]
    ServerScorer(server.url, local[1])
    assert server.requests()["answered"] - before == 3


def test_another_tokenizer_than_the_servers_is_refused(server):
    with pytest.raises(InputError, match="whose tokenizer makes other ids"):
        ServerScorer(server.url, toys.byte_level())


def test_a_busy_server_is_asked_again_and_a_gone_one_with_a_limit(server, local, caplog):
    calculator = MultiLevelPPLCalculator(local[1])
    scorer = ServerScorer(server.url, local[1], patience=PATIENCE)
    expected = calculator.compute_all_levels(scorer, TEXTS[0])
    server.misbehave("busy")
    with caplog.at_level(logging.WARNING):
        timer = threading.Timer(1.5, server.behave)
        timer.start()
        assert calculator.compute_all_levels(scorer, TEXTS[0]) == expected
        timer.join()
    assert "does not answer (HTTP 503): asking again" in caplog.text
    server.misbehave("busy")
    with pytest.raises(InputError, match=r"does not answer for 1 s \(HTTP 503\)"):
        calculator.compute_all_levels(impatient(scorer), TEXTS[0])
    server.behave()
    server.misbehave("slow", 2)
    slow = impatient(scorer)
    slow.timeout = 0.5
    with pytest.raises(InputError, match="ReadTimeout"):
        calculator.compute_all_levels(slow, TEXTS[0])
    server.behave()


def impatient(scorer):
    copy = pickle.loads(pickle.dumps(scorer))
    copy.patience = 1
    return copy


def test_who_stops_a_call_does_not_wait_for_a_server_that_is_gone(server, scorer, local):
    """With Ctrl-C, while two requests wait for the server, which they would do for an hour."""
    server.misbehave("busy")
    encoded = TextEncoder(local[1]).encode([""] * 65, ["Once there was a fox."] * 65)
    stop = threading.Timer(1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    stop.start()
    with pytest.raises(KeyboardInterrupt):
        scorer.score(encoded)
    stop.join()


def test_a_server_that_comes_back_with_another_model_is_refused(server, scorer, local):
    calculator = MultiLevelPPLCalculator(local[1])
    server.misbehave("other")
    server.misbehave("busy")

    def back():
        (server.folder / "busy").unlink()

    timer = threading.Timer(1.0, back)
    timer.start()
    with pytest.raises(InputError, match="came back with another model: a fixed text has"):
        calculator.compute_all_levels(scorer, TEXTS[0])
    timer.join()


def test_the_identity_is_the_servers_name_and_a_text_under_it(scorer, local):
    model, tokenizer = local
    made = scorer.identity
    assert made["name"] == vllm_stand_in.NAME
    [encoded] = TextEncoder(tokenizer).encode([""], [PROBE])
    [expected] = SurprisalScorer(model).score([encoded])
    assert made["probe"] == pytest.approx(expected.tolist(), abs=1e-3)
    noisy = {**made, "probe": [one + 0.9 * PROBE_NATS for one in made["probe"]]}
    other = {**made, "probe": [one + 1.1 * PROBE_NATS for one in made["probe"]]}
    assert differences({"model": made}, {"model": noisy}) == {}
    assert set(differences({"model": made}, {"model": other})) == {"probe"}


def levels_of(record):
    return {level: record[level] for level in LEVELS}


def baselines(tmp_path, url, *more, rows=24):
    """Arguments of compute_baselines_trl.py for a file of `rows` rows."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"id": str(n), **ROWS[n % len(ROWS)]}) for n in range(rows)))
    output = tmp_path / "baselines.json"
    return output, ["--dataset_name", str(data), "--output_path", str(output), "--no_unsloth", "--device", "cpu",
                    *(["--scorer_url", url] if url else []), *more]  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--generate", "2", "--max_new_tokens", "8"]], ids=["of texts", "of its own"])
def test_baselines_through_it_are_those_of_the_model_here(server, tmp_path, more):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here, arguments = baselines(tmp_path / "here", None, *more)
    there, of_server = baselines(tmp_path / "there", server.url, *more)
    for words in (arguments, of_server):
        assert mlppl.baselines.job.compute(parse_args(words)) == 0
    expected, found = (json.loads(path.read_text()) for path in (here, there))
    assert list(found) == list(expected)
    for key, record in found.items():
        assert [record[level] for level in LEVELS] == pytest.approx(
            [expected[key][level] for level in LEVELS], rel=1e-4
        )
    meta = json.loads(Path(f"{there}.meta.json").read_text())
    assert (meta["model"]["name"], meta["model"]["weights"]) == (vllm_stand_in.NAME, "behind an address")
    assert len(meta["model"]["probe"]) > 50
    # Each is refused by the other's reward, and taken by its own.
    scorer, tokenizer = connect(server.url, "tiny-stories")
    MultiLevelPPLRewardFunction(scorer, tokenizer, there)
    with pytest.raises(BaselineError, match="--scorer_url URL"):
        MultiLevelPPLRewardFunction(scorer, tokenizer, here)
    with pytest.raises(BaselineError, match="weights behind an address"):
        MultiLevelPPLRewardFunction(*load_model("tiny-stories")[:2], there)


@pytest.mark.slow
def test_two_clients_and_a_server_that_is_killed_and_started_again_give_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(mlppl.baselines.job, "WINDOW_ROWS", 10)
    (tmp_path / "server").mkdir()
    server = vllm_stand_in.Server(tmp_path / "server")
    results = {}

    def compute(name):
        (tmp_path / name).mkdir()
        output, words = baselines(tmp_path / name, server.url, rows=100)
        results[name] = (mlppl.baselines.job.compute(parse_args(words)), json.loads(output.read_text()))

    try:
        compute("undisturbed")
        server.misbehave("slow", 1)  # so that both are at it
        clients = [threading.Thread(target=compute, args=(name,)) for name in ("one", "two")]
        answered = server.requests()["answered"]
        # The second one starts once the first has read its data set: datasets is not made for two threads that load.
        at_it = [lambda now: now["answered"] > answered, lambda now: now["most"] > 1]
        for client, is_at_it in zip(clients, at_it, strict=True):
            client.start()
            while not is_at_it(server.requests()):
                assert client.is_alive()  # else its error is among the warnings
                time.sleep(0.05)
        server.kill()
        time.sleep(1)
        server.start()
        server.behave()
        for client in clients:
            client.join(PATIENCE)
    finally:
        server.kill()
    assert results["one"] == results["two"] == results["undisturbed"]
    assert results["one"][0] == 0
    assert len(results["one"][1]) == 100


def test_a_server_that_stays_away_is_one_line_and_what_is_finished_is_kept(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mlppl.baselines.job, "WINDOW_ROWS", 8)
    output, words = baselines(tmp_path, server.url)
    write, calls = mlppl.baselines.job.Parts.write, []

    def write_and_go(parts, *rest):
        write(parts, *rest)
        calls.append(rest[0])
        if len(calls) == 2:
            server.misbehave("busy")

    monkeypatch.setattr(mlppl.baselines.job.Parts, "write", write_and_go)
    monkeypatch.setattr(
        ServerScorer.__init__, "__kwdefaults__", {**ServerScorer.__init__.__kwdefaults__, "patience": 1}
    )
    with pytest.raises(InputError, match="does not answer"):
        mlppl.baselines.job.compute(parse_args(words))
    assert not output.exists()
    server.behave()
    assert mlppl.baselines.job.compute(parse_args(words)) == 0
    assert calls == [0, 1, 2]
    assert len(json.loads(output.read_text())) == 24
    server.behave()


def test_the_engines_file_may_name_an_address(server, tmp_path):
    path = tmp_path / "reward.yaml"
    settings = {"model_name": "tiny-stories", "scorer_url": server.url, "target": "reference", "form": "nats"}
    path.write_text(yaml.safe_dump(settings))
    reward = reward_from_config(path)
    assert isinstance(reward.model, ServerScorer)
    [expected] = MultiLevelPPLRewardFunction(*load_model("tiny-stories")[:2], target="reference", form="nats")(
        PROMPTS[:1], TEXTS[:1], reference=[ROWS[0]["completion"]]
    )
    assert reward(PROMPTS[:1], TEXTS[:1], reference=[ROWS[0]["completion"]]) == [pytest.approx(expected, abs=1e-4)]
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**settings, "device": "cpu"}))
    with pytest.raises(InputError, match="leave out device"):
        reward_from_config(other)


@pytest.mark.slow
def test_training_with_it_logs_what_training_with_the_model_here_does(server, tmp_path):
    flags = [*SHORT, "--no_unsloth", "--no-load_in_4bit", "--max_steps", "1", "--save_steps", "1"]
    train(*flags, "--output_dir", tmp_path / "here")
    train(*flags, "--output_dir", tmp_path / "there", "--scorer_url", server.url)
    before = [json.loads((tmp_path / name / "heldout.json").read_text())["before"] for name in ("here", "there")]
    assert before[1]["completions"] == before[0]["completions"]
    assert before[1]["scores"] == pytest.approx(before[0]["scores"], rel=1e-3)
    here, there = (log_history(tmp_path / name, 1)[0] for name in ("here", "there"))
    for level in LEVELS:
        assert there[f"ppl/{level}"] == pytest.approx(here[f"ppl/{level}"], rel=1e-3)


def test_training_without_the_server_is_one_line(tmp_path):
    line = refusal(*SHORT, "--no_unsloth", "--output_dir", tmp_path / "out", "--scorer_url", "http://127.0.0.1:9")
    assert "the scorer at http://127.0.0.1:9 does not answer (ConnectError)" in line
