"""What changed on held-out prompts: numbers by hand, and two runs compared as a user compares them."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import story_model
from chromium import Chromium
from datasets import Dataset
from training_runs import EXAMPLES

from mlppl.config import TABLE, RewardConfig
from mlppl.errors import InputError
from mlppl.pages.compare import main as compare
from mlppl.pages.compare import print_run
from mlppl.training.heldout import evaluate, read_before
from mlppl.training.results import FEW, HeldOut, mean, read_heldout, remarks, rows, write_heldout
from multi_level_ppl_trl import LEVELS, MultiLevelPPLRewardFunction

NAN = math.nan
PROMPTS = [f"Prompt {index}" for index in range(FEW)]


def held_out(names=None, prompts=PROMPTS, **by_prompt) -> HeldOut:
    by_prompt = {name.replace("_", " "): values[: len(prompts)] for name, values in by_prompt.items()}
    scores = {name: float(mean(name, values)) for name, values in by_prompt.items()}
    texts = [[f"{prompt}, it said.", "Never shown."] for prompt in prompts]
    return HeldOut(list(prompts), texts, [[0.5, 1.0]] * len(prompts), scores, None, by_prompt, names or {})


def row(before: HeldOut, after: HeldOut):
    [found] = rows(before, after)
    return found


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_a_change_is_the_mean_of_paired_differences_with_its_standard_error():
    before, after = held_out(reward=[0.0, 1.0, 2.0, 3.0, 4.0]), held_out(reward=[1.0, 2.0, 3.0, 5.0, 6.0])
    found = row(before, after)
    # Differences 1 1 1 2 2: mean 1.4, variance (3 * 0.16 + 2 * 0.36) / 4 = 0.3, standard error sqrt(0.3 / 5).
    assert (found.before, found.after, found.change) == (2, 3.4, pytest.approx(1.4))
    assert found.error == pytest.approx(math.sqrt(0.06))
    assert (found.said, found.shown) == ("", "+1.400 ± 0.245")


@pytest.mark.parametrize(("step", "seen"), [(1.99, False), (2.01, True)])
def test_below_two_standard_errors_no_difference_is_seen(step, seen):
    spread = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])  # standard error sqrt(2.5 / 5)
    found = row(held_out(words=[5.0] * 5), held_out(words=(5 + spread + step * math.sqrt(0.5)).tolist()))
    assert found.said == ("" if seen else "no difference seen")
    assert found.shown.endswith("± 0.707") and found.shown.startswith("no difference seen") != seen
    assert row(held_out(words=[5.0] * 5), held_out(words=[5.0] * 5)).said == "no difference seen"
    assert row(held_out(words=[5.0] * 5), held_out(words=[6.0] * 5)).said == ""


def test_perplexities_are_averaged_and_compared_by_their_logarithms():
    before, after = held_out(word_PPL=[4.0, 4, 4, 4, 4]), held_out(word_PPL=[2.0, 4, 8, 16, 32])
    found = row(before, after)
    assert (found.before, found.after) == (pytest.approx(4), pytest.approx(8))
    assert found.change == pytest.approx(math.log(2))
    assert found.error == pytest.approx(math.log(2) * math.sqrt(2.5 / 5))


def test_nested_levels_are_shown_in_nats_under_their_own_names():
    names = RewardConfig(aggregation="nested").nested_names(["prompt"])
    before = held_out(names, phrase_PPL=[0.22] * 5)
    found = row(before, held_out(names, phrase_PPL=[1.04] * 5))
    assert (found.name, found.unit) == ("helped by phrases", "nats a token")
    assert (found.before, found.change) == (pytest.approx(math.log(0.22)), pytest.approx(math.log(1.04 / 0.22)))


def test_a_prompt_without_a_number_is_no_pair():
    one, other = held_out(reward=[0.0, 0, 0, 0, 9]), held_out(reward=[1.0, 1, 1, 1, NAN])
    found = row(one, other)
    assert found.change == 1 and found.said == "too few prompts"
    assert row(one, held_out(reward=[NAN] * 5)).shown == "–"


def test_of_few_prompts_nothing_is_said(capsys):
    before, after = (
        held_out(prompts=PROMPTS[:2], word_PPL=[2256.0] * 2),
        held_out(prompts=PROMPTS[:2], word_PPL=[889.0] * 2),
    )
    assert row(before, after).said == "too few prompts"
    print_run(before, after)
    printed = " ".join(capsys.readouterr().out.split())
    assert "too few prompts" in printed and "2 prompts are too few to say whether anything changed" in printed
    assert "--heldout_samples" in printed


@pytest.mark.parametrize(("kl", "moved"), [(0.003, False), (-0.001, False), (0.021, True), (NAN, True)])
def test_one_line_says_that_nothing_moved(kl, moved):
    said = remarks(held_out(KL=[0.0] * 5), held_out(KL=[kl] * 5))
    assert [line.startswith("NOT MOVED: the policy is 0.00") for line in said] == [True] * (not moved)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "before", "examples", "name"),
    [
        ({}, [], False, "helped by sentences"),
        ({}, ["prompt"], False, "helped by sentences and prompt"),
        ({}, ["prompt"], True, "helped by sentences, prompt and examples"),
        ({"levels": ("sentence", "examples")}, ["prompt"], True, "helped by sentences and prompt"),
        ({"levels": ("sentence", "prompt")}, ["prompt"], False, "helped by sentences and other prompts"),
        ({"levels": ("sentence", "prompt")}, ["prompt"], True, "helped by sentences, other prompts and examples"),
        ({"target": "reference"}, ["prompt", "completion"], False, "helped by sentences, prompt and completion"),
        ({"target": "reference", "template": "{completion}{reference}"}, ["completion"], False,
         "helped by sentences and completion"),
    ],
)  # fmt: skip
def test_a_levels_name_says_what_its_view_adds(settings, before, examples, name):
    config = RewardConfig(aggregation="nested", **settings)
    assert config.nested_names(before, examples)["sentence"] == name
    assert config.before == before or config.before == ["prompt"]
    assert RewardConfig(target=config.target, template=config.template).nested_names(before) == {}


def test_levels_have_names_of_their_own():
    names = RewardConfig(aggregation="nested", levels=tuple(TABLE)).nested_names(["prompt"], True)
    assert list(names.values()) == [
        "words in their phrase", "helped by phrases", "helped by sentences and other prompts",
        "helped by its own prompt", "helped by examples",
    ]  # fmt: skip


# --- measured --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(story):
    """A nested evaluation of real completions, and what their reward function says of each."""
    model, tokenizer = story
    prompts = story_model.prompts()[:6]
    data = Dataset.from_list([{"prompt": prompt, "id": prompt} for prompt in prompts])
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, aggregation="nested", form="nats")
    options = {"num_generations": 2, "max_new_tokens": 8, "seed": 3}
    found = evaluate(model, tokenizer, [(reward_fn, 1.0)], data, scorers=None, state=None, **options)
    return found, reward_fn


def test_scores_are_means_over_prompts_of_what_the_completions_of_each_give(measured):
    found, reward_fn = measured
    texts, prompts = ([one for group in found.completions for one in group], [p for p in found.prompts for _ in "ab"])
    ids = [one for group in found.completion_ids for one in group]
    details = reward_fn.compute_rewards(texts, prompts, completion_ids=ids, return_details=True)[1]
    for level in LEVELS:
        nats = details["ppls"][level].log().reshape(6, 2).mean(1)
        assert np.log(found.by_prompt[f"{level} PPL"]) == pytest.approx(nats.numpy(), abs=1e-6)
        assert found.scores[f"{level} PPL"] == pytest.approx(math.exp(nats.mean()))
        ratios = (details["baselines"][level] / details["ppls"][level]).log()
        assert found.scores[f"{level} improvement, nats"] == pytest.approx(ratios.mean().item(), abs=1e-6)
    assert found.names["sentence"] == "helped by sentences and prompt"
    assert not [name for name in found.scores if "%" in name]
    lengths = [np.mean([len(text.split()) for text in group]) for group in found.completions]
    assert found.by_prompt["words"] == pytest.approx(lengths)
    assert found.scores["found among 6"] == pytest.approx(np.mean(found.by_prompt["found among 6"]))
    assert found.scores.keys() - found.by_prompt.keys() == {"p of it"}


def test_what_is_written_is_read_again(measured, tmp_path):
    found, _ = measured
    write_heldout(tmp_path / "heldout.json", {"seed": 1}, {"scorer": "a"}, found, found)
    path, rows = tmp_path / "heldout.json", {"prompt": found.prompts}
    assert repr(read_heldout(path)) == repr(({"seed": 1}, {"scorer": "a"}, found, found))  # nan is not nan
    assert repr(read_before(path, rows, {"seed": 1}, {"scorer": "a"})) == repr(found)
    path.write_text(path.read_text().replace('"by_prompt": {\n   "reward": [', '"by_prompt": {\n   "reward": [1, ', 1))
    with pytest.raises(InputError, match="by_prompt 'reward' has another number of prompts"):
        read_heldout(path)


def test_what_an_earlier_version_wrote_is_measured_anew(measured, tmp_path):
    found, _ = measured
    write_heldout(tmp_path / "heldout.json", {"seed": 1}, {"form": "nats"}, replace(found, by_prompt={}, names={}))
    asked = {"form": "nats", "scorer": "a", "baselines": None}  # which it did not write down
    assert read_before(tmp_path / "heldout.json", {"prompt": found.prompts}, {"seed": 1}, asked) is None


# --- two runs --------------------------------------------------------------------------------------------------------


def write_run(folder: Path, before: HeldOut, after: HeldOut | None, **rewarded) -> Path:
    folder.mkdir()
    write_heldout(folder / "heldout.json", {"seed": 1}, {"form": "nats", **rewarded}, before, after)
    return folder


BEFORE = {"reward": [0.0] * 5, "word_PPL": [4.0] * 5, "words": [9.0] * 5}
AFTER = {"reward": [1.0, 1, 1, 2, 2], "word_PPL": [2.0] * 5, "words": [9.0, 9, 9, 9, 10]}


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """b has a prompt less than a and one of its own, in another order."""
    own = [*PROMPTS[::-1], "Its own <b>"]
    values = {name: [*reversed(of), 1e6] for name, of in AFTER.items()}
    later = held_out(prompts=own, **(values | {"reward": [3.0] * 6}))
    first = held_out(prompts=own, **{name: [*of, 1e6] for name, of in BEFORE.items()})
    a = write_run(tmp_path / "a", held_out(**BEFORE), held_out(**AFTER))
    return [a, write_run(tmp_path / "b", first, later)]


def test_two_runs_are_paired_by_the_prompts_that_they_share(runs, capsys):
    assert compare(list(map(str, runs))) == 0
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert (
        "Means over 10 completions of 5 prompts that were held out" in printed and "left out: 'Its own <b>'" in printed
    )
    # a: 1 1 1 2 2, b: 3 at each; b - a: 2 2 2 1 1 in whichever order they were written.
    assert "reward a 0.000 1.400 +1.400 ± 0.245" in printed
    assert "b 0.000 3.000 +3.000 ± 0.000 +1.600 ± 0.245" in printed
    assert "word PPL a 4.000 2.000 -0.693 ± 0.000" in printed
    assert "words a 9.000 9.200 no difference seen ± 0.200" in printed and "9.200 no difference" in printed
    for line in ("Prompt: Prompt 0", "Before: a, b: Prompt 0, it said.", "After: b: Prompt 0, it said."):
        assert line in printed


def test_one_run_is_shown_before_and_after(runs, capsys):
    assert compare([str(runs[0])]) == 0
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "reward 0.000 1.400 +1.400 ± 0.245" in printed and "against" not in printed
    told = [f"Prompt: Prompt {n} Before: Prompt {n}, it said. After: Prompt {n}, it said." for n in range(3)]
    assert " ".join(told) in printed


def test_what_is_not_the_same_in_two_runs_is_not_compared(tmp_path, capsys):
    def against(**rewarded) -> list[bool]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        other = write_run(folder / "b", held_out(**BEFORE), held_out(**AFTER), **rewarded)
        assert compare([str(a), str(other)]) == 0
        printed = capsys.readouterr().out
        assert ("The runs differ in" in printed) == bool(rewarded)
        of_b = [line for line in printed.splitlines() if re.match(r"\s+b ", line)]
        return [len(re.findall("±", line)) == 2 or line.count("no difference") == 2 for line in of_b]

    a = write_run(tmp_path / "a", held_out(**BEFORE), held_out(**AFTER))
    assert against() == [True, True, True]  # reward, perplexity, words
    assert against(weights=[1, 0, 0]) == [False, True, True]
    assert against(scorer="another") == [False, False, True]


def test_what_cannot_be_compared_is_refused_in_one_line(runs, tmp_path, capsys):
    def refusal(*folders) -> str:
        assert compare(list(map(str, folders))) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    a = runs[0]
    assert "holds no heldout.json: expected the --output_dir of a training" in refusal(a, tmp_path)
    other = write_run(
        tmp_path / "c", held_out(prompts=["Another"] * 1, reward=[1.0]), held_out(prompts=["Another"], reward=[1.0])
    )
    assert "a, c share no held-out prompt" in refusal(a, other)
    assert "expected a run that has ended" in refusal(a, write_run(tmp_path / "d", held_out(**BEFORE), None))
    old = write_run(tmp_path / "e", replace(held_out(**BEFORE), by_prompt={}), held_out(**AFTER))
    assert "e/heldout.json is of an earlier version" in refusal(a, old)
    (old / "heldout.json").write_text("{")
    assert "this script did not write it so" in refusal(a, old)
    assert "--html" in refusal(*runs, "--html", tmp_path / "none" / "page.html")


def test_it_is_a_command_and_without_a_package_one_line_says_so(runs):
    command = [sys.executable, "-m", "mlppl.pages.compare", *map(str, runs)]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True)
    assert done.returncode == 0 and "+1.600 ± 0.245" in " ".join(done.stdout.split()), done.stderr
    done = subprocess.run([sys.executable, "-S", "-E", *command[1:]], cwd=EXAMPLES, capture_output=True, text=True)
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and "has no package" in line


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 400, 1200])
def test_the_page_shows_scores_and_stories_and_nothing_overflows(runs, tmp_path, width, capsys):
    path = tmp_path / "compare.html"
    assert compare([*map(str, runs), "--html", str(path)]) == 0
    assert f"Wrote {path}" in capsys.readouterr().out
    with Chromium() as browser:
        browser.open(path, width)
        assert browser.value("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
        assert browser.console == [] and browser.requests == [path.as_uri()]
        text = " ".join(browser.value("document.querySelector('#scores').innerText").split())
        assert "reward of the perplexities alone a 0.000 → 1.400 change +1.400 ± 0.245" in text
        assert "after, against a +1.600 ± 0.245" in text
        colours = "['.unseen p', ':not(.unseen) > p'].map(one => document.querySelector(`.card ${one}`))"
        grey, ink = browser.value(f"{colours}.map(one => getComputedStyle(one).color)")
        assert grey != ink
        # The line is as long as four standard errors, on the scale of the card.
        first = browser.value("document.querySelector('.interval .line').getAttribute('d')")
        left, right = map(float, re.fullmatch(r"M(\S+) 5H(\S+)", first).groups())
        assert (right - left) / 100 == pytest.approx(4 * 0.2449 / 3.0, abs=1e-3)
        figures = browser.value("[...document.querySelector('.pair').querySelectorAll('figure')].map(f => f.innerText)")
        assert [one.split("\n")[0] for one in figures] == ["Before: a, b", "After: a", "After: b"]
        assert "Its own <b>" in browser.value("document.querySelector('header').innerText")


def test_a_file_keeps_a_prompts_numbers_on_one_line(tmp_path):
    path = write_run(tmp_path / "a", held_out(reward=[0.5, NAN, -1e-9, 2.0, 1.0]), None) / "heldout.json"
    assert "[0.5, null, -1e-09, 2.0, 1.0]" in path.read_text()
    assert json.loads(path.read_text())["before"]["by_prompt"]["reward"][1] is None
