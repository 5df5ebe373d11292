"""The model card that a run leaves, and what --push_to_hub carries, with a stand-in for the hub."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import warm
from huggingface_hub import ModelCard, ModelCardData
from training_runs import EXAMPLES, SHORT, refusal, run_code, train

from mlppl.baselines.file import Baselines
from mlppl.config import LEVELS
from mlppl.models import load_model
from mlppl.training import card

QUICK = [*SHORT, "--no_unsloth", "--no-load_in_4bit", "--max_steps", "2", "--save_steps", "1"]
# The hub cannot run here: what would be uploaded is printed, with the files as they are at that moment.
PUSH = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi

def create(self, repo_id, **_):
    from types import SimpleNamespace
    return SimpleNamespace(repo_id=repo_id)

def upload(self, *, folder_path, commit_message, **_):
    read = lambda name: (Path(folder_path) / name).read_text() if (Path(folder_path) / name).exists() else ""
    files = {name: read(name) for name in ("README.md", "report.html")}
    print("PUSHED " + json.dumps([commit_message, sorted(path.name for path in Path(folder_path).iterdir()), files]))

HfApi.create_repo, HfApi.upload_folder = create, upload
import train_grpo_multilevel_unsloth
sys.exit(train_grpo_multilevel_unsloth.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "stories"
    data = folder.with_name("data.json")
    stories = json.loads((EXAMPLES / "tiny_stories" / "train.json").read_text())[:20]
    data.write_text(json.dumps(stories))
    baselines = folder.with_name("own.json")
    baselines.write_text(json.dumps({one["id"]: {"word": 30, "phrase": 30, "sentence": 30} for one in stories}))
    train(*QUICK, "--dataset_name", data, "--baselines_path", baselines, "--output_dir", folder)
    return folder


def test_it_says_what_was_trained_on_what_with_which_reward(output):
    text = (output / "README.md").read_text(encoding="utf-8")
    ours, trl = text.split(card.MARK)
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", ours, flags=re.MULTILINE))
    assert rows["Base model"] == "`tiny_stories`" and rows["Data"] == "`data.json`, train: 18 prompts"
    assert rows["Levels"] == "geometric; weights: word 0.2, phrase 0.3, sentence 0.5"
    assert rows["Reward of an improvement"].startswith("0.2 from 0.05 %, 0.5 from 0.5 %, ")
    assert rows["Baselines"] == "`own.json`: the data set's own texts"
    assert rows["Scorer"] == "the model itself before training, frozen"
    assert "for 2 of 2 optimizer steps" in ours
    assert "trained using [TRL]" in trl and "DeepSeekMath" in trl  # its own text, below
    assert str(output.parent) not in text and str(EXAMPLES) not in text  # no folder of this machine


def test_its_held_out_table_is_that_of_the_run_and_its_files_are_there(output):
    text = (output / "README.md").read_text(encoding="utf-8")
    scores = {side: of["scores"] for side, of in json.loads((output / "heldout.json").read_text()).items()
              if side in ("before", "after")}  # fmt: skip
    table = re.findall(r"^\| (.+?) \| (\S+) \| (\S+) \| ([^|]+) \|$", text, flags=re.MULTILINE)
    shown = {name: numbers for name, *numbers in table if name in scores["before"]}
    assert set(shown) == set(scores["before"])
    for name, (before, after, change) in shown.items():
        assert change == ("–" if name == "p of it" else "too few prompts")
        assert float(before) == pytest.approx(scores["before"][name], abs=6e-4)
        assert float(after) == pytest.approx(scores["after"][name], abs=6e-4)
    assert "8 completions of 2 prompts" in text and "2 prompts are too few to say whether anything changed" in text
    assert "NOT MOVED: the policy is 0.0" in text
    for target in re.findall(r"\]\(([^)]+)\)", text.split(card.MARK)[0]):
        assert (output / target).exists(), target


def test_its_metadata_are_the_hubs_and_its_licence_the_bases(output):
    data = ModelCard.load(output / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "peft", "text-generation")
    assert {"grpo", "trl"} <= set(data.tags)
    assert data.base_model is None and data.datasets is None  # neither is on the hub
    assert "licence" not in data.to_dict()
    assert "The base model's is `apache-2.0`." in (output / "README.md").read_text(encoding="utf-8")


def test_it_loads_as_the_card_says(output):
    text = (output / "README.md").read_text(encoding="utf-8")
    prompt = json.loads((output / "heldout.json").read_text())["before"]["prompts"][0]
    written = run_code(text, output.parent)
    assert written.startswith(prompt)
    merged, trained = (load_model(str(folder))[0] for folder in (output / "merged", output))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        difference = merged(ids).logits.log_softmax(-1) - trained(ids).logits.log_softmax(-1)
    assert difference.abs().mean() < 0.1
    assert (
        f"convert_hf_to_gguf.py '{output.name}/merged'" in text and f"hf upload {output.name} {output.name} ." in text
    )
    assert "fine-tuned version of" not in text and 'model="None"' not in text and "## Training procedure" in text


@pytest.mark.parametrize("way", ["in 4 bits", "all weights", "a chat", "merged"])
def test_the_last_lines_of_a_run_load_what_was_trained_and_write_with_it(way, tmp_path):
    flags = {
        "in 4 bits": ["--load_in_4bit", "--top_k", "5", "--generation_kwargs", '{"no_repeat_ngram_size": 3}'],
        "all weights": ["--full_finetuning"],
        "a chat": ["--chat", "--user_prompt", "A 'story'?", "--chat_template_path", tmp_path / "template"],
        "merged": ["--save_merged"],
    }[way]
    (tmp_path / "template").write_text(
        "{% for one in messages %}{{ one.content }}{{ '' if loop.last else '\\n' }}{% endfor %}"
    )
    (tmp_path / "here").mkdir()
    out = tmp_path / "here" / "out"
    printed = train(*SHORT, "--no_unsloth", "--max_steps", "1", *flags, "--output_dir", out).stdout
    prompt = json.loads((out / "heldout.json").read_text())["before"]["prompts"][0]
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    last = printed[printed.index("To use it") : printed.index("Means over")]
    for program in ("python", "hf"):
        assert f"\n{Path(warm.python()).with_name(program)} " in last  # as pasted, without .venv in PATH
    written = run_code(last, tmp_path)
    assert written.startswith(text)  # and behind it what is sampled, which can be its end
    assert ("Merged model, in 16 bits: " + str(out / "merged") in printed) == (way == "merged")
    assert (out / "merged" / "config.json").exists() == (way != "all weights")
    assert f" '{out if way == 'all weights' else out / 'merged'}' --outfile" in last
    if way == "a chat":
        assert "continue_final_message=True" in last
    if way == "in 4 bits":
        assert "top_k=5" in last and "no_repeat_ngram_size=3" in last


@pytest.mark.slow
def test_what_is_pushed_last_has_the_card_and_the_finished_report(tmp_path):
    flags = [*QUICK, "--push_to_hub", "--hub_model_id", "me/stories", "--hub_strategy", "end"]
    done = subprocess.run(
        [warm.python(), "-c", PUSH, *map(str, flags), "--output_dir", tmp_path / "out"],
        cwd=EXAMPLES, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    pushed = [json.loads(line.removeprefix("PUSHED ")) for line in done.stdout.splitlines() if "PUSHED" in line]
    [(_, names, files)] = pushed
    assert {"adapter_model.safetensors", "README.md", "report.html", "reward.png"} <= set(names)
    assert "Finished after 2 steps" in files["report.html"]
    assert (
        "AutoPeftModelForCausalLM.from_pretrained('me/stories')" in files["README.md"]
        and card.MARK in files["README.md"]
    )
    assert "| before | after | change ± standard error |" in files["README.md"]


@pytest.mark.slow
def test_a_push_that_fails_costs_nothing_else(tmp_path):
    """Neither while training, where transformers pushes each checkpoint by the way, nor at the end."""
    failing = PUSH.replace(
        "HfApi.create_repo,",
        """
def fails(self, *, run_as_future=False, **_):
    from concurrent.futures import Future
    if not run_as_future:
        raise ConnectionError("no route\\nto the hub")
    future = Future()
    future.set_exception(ConnectionError("no route"))
    return future

upload = fails
HfApi.create_repo,""",
    )
    out = tmp_path / "out"
    flags = [*QUICK, "--push_to_hub", "--hub_model_id", "me/stories", "--save_merged", "--output_dir", out]
    done = subprocess.run(
        [warm.python(), "-c", failing, *map(str, flags)], cwd=EXAMPLES, capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    push = f"hf upload me/stories {out} . --exclude 'checkpoint-*'"
    assert lines == [f"error: not pushed to the hub (ConnectionError: no route to the hub); push it with: {push}"]
    assert "Traceback" not in done.stderr
    for name in ("adapter_model.safetensors", "README.md", "report.html", "reward.png", "merged/model.safetensors"):
        assert (out / name).exists(), name
    assert json.loads((out / "heldout.json").read_text())["after"] is not None
    assert "Finished after 2 steps" in (out / "report.html").read_text()


def test_a_hub_that_is_out_of_reach_is_told_before_anything_is_loaded(tmp_path):
    for flags, name in ([], "'out'"), (["--hub_model_id", "a/b/c"], "'a/b/c'"):
        line = refusal(*QUICK, "--push_to_hub", *flags, "--output_dir", tmp_path / "out")
        assert line.startswith(f"error: --push_to_hub: the hub does not take {name}") and "hf upload" in line
        assert not (tmp_path / "out").exists()


def test_before_the_end_the_card_says_so(tmp_path):
    """As after a stop: heldout.json has no second half."""
    heldout = {"sampling": {}, "before": {"prompts": ["a"], "completions": [["b", "c"]], "scores": {"KL": None}}}
    (tmp_path / "heldout.json").write_text(json.dumps(heldout | {"after": None}))
    told = card.heldout(tmp_path / "heldout.json")
    text = ModelCard.from_template(ModelCardData(), template_path=card.TEMPLATE, heldout=told).text
    assert "2 completions of 1 prompts" in text and "Training has not ended yet." in text and "| KL | – |" in text


def test_a_licence_that_cannot_be_found_is_not_guessed(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("# A model\n")
    assert card.licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert card.licence_of(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert card.licence_of(str(tmp_path)) is None
    assert card.licence_of("somebody/out-of-reach") is None  # the tests are offline


def test_baselines_are_named_by_how_they_were_made():
    assert card.baselines_of(Baselines({}, {}, "data"), "completion") == "each prompt's first completions"
    made = Baselines({"a": dict.fromkeys(LEVELS, 1.0)}, {"generated": {"generate": 4}}, "/home/me/b.pkl")
    own = card.baselines_of(made, "completion")
    assert own == "`b.pkl`: the mean of 4 completions a prompt before training"
