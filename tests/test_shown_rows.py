"""Examples and other rows through the scripts: both draw the same, and what they leave can be read elsewhere."""

import json
import math

import brute_force
import pytest
import yaml
from training_runs import SHORT, log_history, refusal, train

from compute_baselines_trl import main as baselines
from compute_baselines_trl import parse_args as baselines_args
from mlppl.baselines.job import prepare
from mlppl.data import FIRST, TINY_STORIES, draw, message_text, prompt_key, read_shown, write_shown
from mlppl.errors import InputError
from mlppl.models import load_model
from mlppl.reward.configured import reward_from_config
from mlppl.training.job import Job
from train_grpo_multilevel_unsloth import parse_args, prepare_dataset

STORIES = TINY_STORIES / "train.json"
LEVELS = ["--aggregation", "nested", "--levels", "word", "prompt", "examples", "--examples", "1", "--contrast", "2"]
QUICK = [*SHORT, "--no_unsloth", "--no-load_in_4bit", "--max_steps", "2", "--save_steps", "2", "--form", "nats"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Baselines of 30 rows, and a run that reads them."""
    folder = tmp_path_factory.mktemp("shown")
    path = folder / "baselines.json"
    assert baselines([*LEVELS, "--num_samples", "30", "--output_path", str(path)]) == 0
    out = folder / "out"
    printed = train(*QUICK, *LEVELS, "--baselines_path", path, "--output_dir", out).stdout
    return path, out, printed


def test_a_baseline_is_that_of_the_row_behind_what_it_is_shown(made):
    path, _, _ = made
    model, tokenizer, _ = load_model("tiny-stories", load_in_4bit=False)
    examples, others = (read_shown(f"{path}.{name}.jsonl") for name in ("examples", "others"))
    assert len(examples) == 1 and 100 < len(others) <= 256
    shown = "".join(f"{prompt} {reference.strip()}\n\n" for prompt, reference in examples)
    records = json.loads(path.read_text())
    stories = json.loads(STORIES.read_text(encoding="utf-8"))
    row = next(row for row in stories if row["id"] in records)
    prompt, text = row["prompt"], row["completion"]
    d, e = (
        math.fsum(nats for _, nats in tokens) / len(tokens)
        for tokens in (brute_force.token_surprisals(model, tokenizer, text, before + prompt) for before in ("", shown))
    )
    assert records[row["id"]]["examples"] == pytest.approx(math.exp(e - d), rel=1e-3)
    assert set(records[row["id"]]) >= {"word", "prompt", "examples"} and "sentence" not in records[row["id"]]


def test_the_run_takes_these_baselines_and_trains_on_no_example(made):
    path, out, printed = made
    heldout = json.loads((out / "heldout.json").read_text())
    scores = heldout["before"]["scores"]
    assert {"prompt PPL", "examples PPL", "word PPL", "found among 2"} <= set(scores) and "sentence PPL" not in scores
    assert "found among 2" in printed
    entry = next(entry for entry in log_history(out, 2) if "reward" in entry)
    assert {"ppl/prompt", "reward_examples"} <= set(entry)
    shown = {prompt_key(prompt) for prompt, _ in read_shown(f"{path}.examples.jsonl")}
    assert not shown & {prompt_key(prompt) for prompt in heldout["before"]["prompts"]}
    page = (out / "report.html").read_text()
    assert "Examples" in page and 'data-level="prompt"' in page


def test_other_examples_are_refused_with_both_named(made):
    path, out, _ = made
    flags = [*LEVELS[:-3], "2", *LEVELS[-2:]]
    assert "examples" in refusal(*QUICK, *flags, "--baselines_path", path, "--output_dir", out.parent / "other")
    assert "levels" in refusal(*QUICK, "--baselines_path", path, "--output_dir", out.parent / "other")


def test_an_engine_reads_the_files_that_lie_beside_the_baselines(made, tmp_path):
    path, _, _ = made
    config = tmp_path / "reward.yaml"
    settings = {
        "model_name": "tiny-stories", "load_in_4bit": False, "baselines": str(path), "aggregation": "nested",
        "levels": ["word", "prompt", "examples"], "contrast": 2, "examples": f"{path}.examples.jsonl",
        "others": f"{path}.others.jsonl", "form": "nats",
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    row = json.loads(STORIES.read_text(encoding="utf-8"))[0]
    rewards = reward_from_config(config)([row["prompt"]] * 2, [row["completion"], " The end."], id=[row["id"]] * 2)
    assert rewards[0] == pytest.approx(0, abs=1e-5) != rewards[1]  # the row's own text is its baseline
    config.write_text(yaml.safe_dump({**settings, "examples": 3}))
    (tmp_path / "other.yaml").write_text(config.read_text())
    with pytest.raises(InputError, match=r"examples is 3, expected the name of the file of rows"):
        reward_from_config(tmp_path / "other.yaml")


def test_rows_are_drawn_by_what_they_say_and_not_by_where_they_stand():
    rows = [(f"Prompt {number}.", f"Text {number}.") for number in range(40)]
    examples, others = draw(rows, 3, 2)
    assert draw(rows[::-1], 3, 2) == (examples, others) and len(others) == 37
    assert draw([*rows, *rows, ("", "x"), ("x", " ")], 3, 2) == (examples, others)
    assert not {prompt for prompt, _ in examples} & {prompt for prompt, _ in others}
    late = [(f"Late {number}.", "Text.") for number in range(5)]
    many = [(f"Row {number}.", "Text.") for number in range(FIRST)]
    assert draw([*many, *late], 3, 0) == draw(many, 3, 0)
    with pytest.raises(InputError, match="--examples 3 and --contrast 2 need rows"):
        draw(rows[:5], 3, 2)
    with pytest.raises(InputError, match="--contrast is 256, expected at most 255"):
        draw(many, 0, 256)


def test_examples_begin_apart_as_far_as_there_are_such():
    rows = [
        (f"Prompt {n}.", text)
        for n, text in enumerate(['"Oh!" he said.'] * 12 + ["The fox ran.", "the end.", "It fell."])
    ]
    order = draw(rows, 0, 2)[1]  # by their hash
    examples, others = draw(rows, 3, 2)
    firsts = [next(row for row in order if row[1][:1] in begins) for begins in ('"', "Tt", "I")]
    assert sorted(examples) == sorted(firsts) and [row for row in order if row in examples] == examples
    assert others == [row for row in order if row not in examples]
    assert draw(rows, 4, 0)[0] == [*examples, next(row for row in order if row not in examples)]


def test_rows_that_are_given_are_none_of_the_others_and_prompts_alone_can_be_compared():
    rows = [(f"Prompt {number}.", f"Text {number}.") for number in range(9)]
    given = [([{"role": "user", "content": rows[4][0]}], rows[4][1])]
    examples, others = draw(rows, given, 2)
    assert examples == given and sorted(others) == rows[:4] + rows[5:]
    prompts = [(prompt, None) for prompt, _ in rows]
    assert sorted(draw(prompts, 0, 2, of_prompts=True)[1]) == [(prompt, "") for prompt, _ in rows]
    with pytest.raises(InputError, match="the data set has 9 and 0 of them"):
        draw(prompts, 0, 2)


def job(tmp_path, rows, *flags):
    """What the training script makes of these rows and flags."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset_name", str(path), "--no_unsloth", "--no-load_in_4bit", "--output_dir", str(tmp_path / "out")]
    args, rest = parse_args([*words, *map(str, flags)])
    return Job(args, rest, [], prepare_dataset)


@pytest.mark.parametrize(
    "form",
    [
        [], ["--prompt_template", "Go on: {prompt}"], ["--chat"], ["--chat", "--system_prompt", "Be short."],
        ["--chat", "--user_prompt", "A story?"],
        ["--chat", "--score_without_chat", "--prompt_template", "Go on: {prompt}"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_rows_of_a_file_get_the_form_of_the_rows_and_are_in_no_split(form, tmp_path):
    rows = [{"prompt": f"P number {number}.", "reference": f" T number {number}."} for number in range(30)]
    (tmp_path / "shown.jsonl").write_text("".join(json.dumps(rows[number]) + "\n" for number in (3, 7)))
    flags = ["--examples", tmp_path / "shown.jsonl", "--target", "reference", "--contrast", 2, *form]
    made = job(tmp_path, rows, *flags)
    every = [*made.train_rows["prompt"], *made.heldout_rows["prompt"]]
    [shown, _] = [prompt for prompt, _ in made.contexts["examples"]]
    assert len(every) == 28 and type(shown) is type(every[0])
    said = [message_text(prompt if isinstance(prompt, str) else prompt[-1:]) for prompt in every]
    before, behind = said[0].split("P number ")[0], message_text(shown if isinstance(shown, str) else shown[-1:])
    assert behind == f"{before}P number 3." and not {f"{before}P number {n}." for n in (3, 7)} & {*said}
    assert not {prompt_key(prompt) for prompt, _ in made.contexts["others"]} & {prompt_key(shown)}
    # What a run leaves beside its baselines has the form already.
    write_shown(tmp_path / "again.jsonl", made.contexts["examples"])
    again = job(tmp_path, rows, "--examples", tmp_path / "again.jsonl", *flags[2:])
    assert again.contexts["examples"] == made.contexts["examples"]


def test_both_scripts_draw_from_the_same_first_rows_whether_or_not_these_have_texts(tmp_path, monkeypatch):
    for module in ("mlppl.data", "mlppl.training.job", "mlppl.baselines.job"):
        monkeypatch.setattr(f"{module}.FIRST", 20)
    rows = [{"prompt": f"P {n}.", "reference": "" if n % 3 == 0 else f" T {n}."} for n in range(60)]
    shown = ["--aggregation", "nested", "--levels", "prompt", "examples", "--examples", "2"]
    made = job(tmp_path, rows, *shown)
    args = baselines_args(
        ["--dataset_name", str(tmp_path / "data.jsonl"), *shown, "--output_path", str(tmp_path / "b.pkl")]
    )
    of_baselines = prepare(args, survey=False).contexts
    assert of_baselines["examples"] == made.contexts["examples"] and len(made.contexts["others"]) == 18
    assert of_baselines["others"] == made.contexts["others"]


def test_both_scripts_draw_alike_from_one_column_of_texts(tmp_path):
    rows = [{"text": f"A fox {n} ran." + f" It slept {n}." * (n % 4 > 0)} for n in range(24)]
    shown = ["--prompt_sentences", "1", "--aggregation", "nested", "--levels", "prompt", "examples", "--examples", "1"]
    made = job(tmp_path, rows, *shown)
    args = ["--dataset_name", str(tmp_path / "data.jsonl"), *shown, "--output_path", str(tmp_path / "b.pkl")]
    of_baselines = prepare(baselines_args(args), survey=False).contexts
    assert len(made.contexts["others"]) == 17
    assert all(of_baselines[name] == made.contexts[name] for name in ("examples", "others"))


def test_other_rows_are_those_of_the_baselines_which_may_be_of_more_splits(tmp_path):
    path = tmp_path / "b.json"
    flags = ["--aggregation", "nested", "--levels", "word", "prompt"]
    assert baselines([*flags, "--dataset_split", "train[:30]+test[:10]", "--output_path", str(path)]) == 0
    splits = ["--dataset_split", "train[:30]", "--eval_split", "test[:10]", "--baselines_path", path]
    printed = train(*QUICK, *flags, *splits, "--output_dir", tmp_path / "out").stdout
    assert "prompt PPL" in printed or "helped by its own prompt" in printed
    # None of these is in the run's own split.
    drawn = {prompt for prompt, _ in read_shown(f"{path}.others.jsonl")}
    tests = {row["prompt"] for row in json.loads((TINY_STORIES / "test.json").read_text(encoding="utf-8"))[:10]}
    assert len(drawn) == 40 and tests <= drawn


@pytest.mark.parametrize("line_break", ["\u2028", "\x85"])
def test_a_text_may_hold_any_line_break(line_break, tmp_path):
    rows = [("A fox.", f" It ran.{line_break}It fell.")]
    write_shown(tmp_path / "rows.jsonl", rows)
    assert read_shown(tmp_path / "rows.jsonl") == rows
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "rows.jsonl").read_bytes())
    assert read_shown(tmp_path / "rows.jsonl") == rows


def test_texts_without_a_prompt_stand_behind_the_examples_too(tmp_path):
    text = "A fox ran to the sea. It was cold."
    (tmp_path / "data.jsonl").write_text(json.dumps({"id": "a", "text": text}) + "\n")
    (tmp_path / "shown.jsonl").write_text(json.dumps({"prompt": "A crow sat.", "reference": "It sang."}) + "\n")
    flags = ["--dataset_name", str(tmp_path / "data.jsonl"), "--examples", str(tmp_path / "shown.jsonl")]
    assert baselines([*flags, "--output_path", str(tmp_path / "b.json")]) == 0
    model, tokenizer, _ = load_model("tiny-stories")
    expected = brute_force.all_levels(model, tokenizer, text, "A crow sat. It sang.\n\n")
    assert json.loads((tmp_path / "b.json").read_text())["a"]["word"] == pytest.approx(expected["word"], rel=1e-4)


def test_a_row_that_does_not_fit_behind_the_examples_is_refused_before_training(tmp_path):
    rows = [
        {"prompt": f"P {number}." + " A fox ran." * 20 * (number == 9), "reference": " It fell."}
        for number in range(12)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "shown.jsonl").write_text(json.dumps({"prompt": "A crow.", "reference": " It sang." * 60}) + "\n")
    flags = ["--dataset_name", tmp_path / "data.jsonl", "--examples", tmp_path / "shown.jsonl", "--max_seq_length", 256]
    line = refusal(*QUICK, *flags, "--output_dir", tmp_path / "out")
    assert "more than the 256 that the scorer reads at once" in line and not (tmp_path / "out").exists()


def test_a_file_of_examples_that_is_none_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl 0 is None, expected a string"):
        read_shown(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("{")
    with pytest.raises(InputError, match="expected JSON lines of prompt and reference"):
        read_shown(tmp_path / "rows.jsonl")
    assert "rows.jsonl" in refusal(*QUICK, "--examples", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out")
