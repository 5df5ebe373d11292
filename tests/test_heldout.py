"""What is said of held-out completions: numbers by hand, and the KL and what another row's do by brute force."""

import math
from types import SimpleNamespace

import brute_force
import numpy as np
import peft
import pytest
import story_model
import toys
from datasets import Dataset

from mlppl.errors import InputError
from mlppl.training.diagnostics import distinct
from mlppl.training.found import found, found_among
from mlppl.training.heldout import SWAPPED, HeldOutPrompts, evaluate, kl_a_token, kl_by_text, kl_scorers, read_before
from mlppl.training.policy import Loaded
from mlppl.training.results import HeldOut, gained_by_any, write_heldout
from multi_level_ppl_trl import LEVELS, MultiLevelPPLCalculator, MultiLevelPPLRewardFunction

PROMPTS = ["Once upon a time", "The fox said: ", "The fox said: "]
COMPLETIONS = [" there was a small fox.", "I am hungry; I want to eat.", "they walked home"]


@pytest.fixture(scope="module")
def adapted():
    options = {"r": 4, "lora_dropout": 0.5, "init_lora_weights": False, "target_modules": "all-linear"}
    return peft.get_peft_model(toys.llama(), peft.LoraConfig(**options, task_type="CAUSAL_LM"))


TEMPLATE = "{prompt} [{completion}]{reference}"


def kl(model, tokenizer, prompts, completions):
    """As the held-out table has it."""
    return kl_a_token(*zip(*kl_by_text(kl_scorers(model, model), tokenizer, prompts, completions), strict=True))


def test_kl_is_the_mean_difference_of_the_surprisals_with_and_without_adapters(adapted, tokenizer):
    def slow():
        pairs = zip(PROMPTS, COMPLETIONS, strict=True)
        return [s for p, c in pairs for _, s in brute_force.token_surprisals(adapted, tokenizer, c, context=p)]

    adapted.eval()
    own = slow()
    with adapted.disable_adapter():
        frozen = slow()
    expected = (sum(frozen) - sum(own)) / len(own)
    assert abs(expected) > 0.02
    adapted.train()  # dropout would show
    assert kl(adapted, tokenizer, PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-4)
    assert adapted.training


def test_kl_is_0_without_adapters_and_nan_without_tokens(model, adapted, tokenizer):
    assert kl(model, tokenizer, PROMPTS, COMPLETIONS) == 0
    assert math.isnan(kl(adapted, tokenizer, ["Once"], [" "]))


def test_the_distance_that_the_diagnostics_ask_for_is_that_of_what_was_just_sampled(adapted, tokenizer):
    """By ids, up to their end token, or by texts where there are no ids; None where there is no start."""
    policy, scorers = Loaded(adapted, tokenizer), kl_scorers(adapted, adapted)
    run = SimpleNamespace(scorers=scorers, policy=policy, job=SimpleNamespace(chat={}))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in COMPLETIONS]
    ended = [[*one, tokenizer.eos_token_id, 7] for one in ids]
    by_ids = HeldOutPrompts.kl(run, PROMPTS, ended)
    expected = kl(adapted, tokenizer, PROMPTS, ids)
    assert by_ids == pytest.approx(expected, abs=1e-6) and abs(expected) > 0.02
    assert HeldOutPrompts.kl(run, PROMPTS, COMPLETIONS) == pytest.approx(kl(adapted, tokenizer, PROMPTS, COMPLETIONS))
    run.scorers = kl_scorers(adapted, None)
    assert HeldOutPrompts.kl(run, PROMPTS, ended) is None


def test_distinct_is_the_share_of_runs_that_are_not_said_twice():
    assert distinct(["a b a b a"], 2) == 2 / 4  # ab ba ab ba
    assert distinct(["a b a b a"], 3) == 2 / 3  # aba bab aba
    assert distinct(["A b. a B.", "x y z"], 2) == pytest.approx((2 / 3 + 1) / 2)  # ab. b.a ab. | xy yz
    assert distinct(["one two", "a b c"], 3) == 1  # the first has no run of three
    assert math.isnan(distinct(["one", ""], 2))


def test_what_is_written_is_read_and_ids_stand_on_one_line(tmp_path):
    texts = ["[\n 1,\n 2\n]", "\ud83d [ 1, 2 ]", ""]
    before = HeldOut(["a"], [texts], [[0.5, math.nan, 1.0]], {"KL": math.nan, "words": 3.0}, [[[1, 22, 3], [4], []]])
    path = tmp_path / "heldout.json"
    write_heldout(path, {"seed": 1}, {"weights": [["brevity", 1.0]]}, before)
    lines = [line.strip().rstrip(",") for line in path.read_text(errors="surrogatepass").splitlines()]
    assert {"[1, 22, 3]", "[4]", "[]"} < set(lines)
    kept = read_before(path, {"prompt": ["a"]}, {"seed": 1}, {"weights": [["brevity", 1.0]]})
    assert repr(kept) == repr(before)
    assert read_before(path, {"prompt": ["b"]}, {"seed": 1}, {"weights": [["brevity", 1.0]]}) is None
    assert read_before(path, {"prompt": ["a"]}, {"seed": 1}, {"weights": []}) is None  # measured anew
    # A run of before had a setting more, and goes on.
    write_heldout(path, {"seed": 1}, {"weights": [["brevity", 1.0]], "reference_tokens": "all"}, before)
    assert repr(read_before(path, {"prompt": ["a"]}, {"seed": 1}, {"weights": [["brevity", 1.0]]})) == repr(before)
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(InputError, match=r"heldout.json: .*delete it to measure anew"):
        read_before(path, {"prompt": ["a"]}, {"seed": 1}, {})


def test_what_completions_of_the_next_row_do_for_a_rows_reference(story):
    """Brute force: each reference behind its prompt and the next row's completion, against its prompt alone."""
    model, tokenizer = story
    prompts = story_model.prompts()
    references = [f" They saw {number} foxes and went home." for number in range(len(prompts))]
    columns = zip(prompts, references, strict=True)
    rows = Dataset.from_list([{"prompt": prompt, "reference": one, "id": one} for prompt, one in columns])
    options = {"num_generations": 2, "max_new_tokens": 8, "seed": 3}
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, target="reference", form="nats")
    held_out = evaluate(model, tokenizer, [(reward_fn, 1.0)], rows, scorers=None, state=None, **options)
    calculator = MultiLevelPPLCalculator(tokenizer)
    gained: dict = {0: [], 1: []}
    for index, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        alone = calculator.score_pairs(model, [(prompt, reference)])[0]
        for shift, values in gained.items():
            for text in held_out.completions[(index + shift) % len(prompts)]:
                levels = calculator.score_pairs(model, [(prompt + text, reference)])[0]
                values.append(100 * (1 - levels / alone).mean())
    own = np.mean([held_out.scores[f"{level} improvement %"] for level in LEVELS])
    assert own == pytest.approx(np.mean(gained[0]), abs=1e-3)
    assert held_out.scores[SWAPPED] == pytest.approx(np.mean(gained[1]), abs=1e-3)
    assert abs(own - held_out.scores[SWAPPED]) > 0.01
    of_one = evaluate(model, tokenizer, [(reward_fn, 1.0)], rows.select([0]), scorers=None, state=None, **options)
    assert SWAPPED not in of_one.scores  # there is no other row


def test_a_gain_that_any_row_gives_is_named():
    levels = [f"{level} improvement %" for level in LEVELS]
    before = dict.fromkeys(levels, -3.0) | {"found among 8": 0.25}
    for own, share, named in ((16, 0.25, True), (16, 0.2, True), (16, 0.3, False), (-2, 0.2, False)):
        warning = gained_by_any(before, dict.fromkeys(levels, float(own)) | {"found among 8": share})
        assert (warning is not None) == named, (own, share)
        if warning:
            assert f"earn {own + 3:.1f} points more" in warning and f"(25% -> {share:.0%})" in warning
    assert gained_by_any(dict.fromkeys(levels, 0.0), dict.fromkeys(levels, 9.0)) is None  # a run of one row
    for rise, named in ((0.1, True), (0.0, False)):  # what contrast or a cap takes off is not earned
        sides = [dict.fromkeys(levels, gain) | {"found among 8": 0.2, "reward": of} for gain, of in ((0, 0), (9, rise))]
        assert (gained_by_any(*sides) is not None) == named


@pytest.mark.parametrize("target", ["completion", "reference"])
def test_what_is_found_among_rows_is_by_the_scorers_own_log_probabilities(target, story):
    """Each text, or reference, behind each row's prompt, a forward pass for each; rows and columns centred."""
    model, tokenizer = story
    prompts = story_model.prompts()[:9]
    references = [f" They saw {number} foxes and went home." for number in range(len(prompts))]
    groups = [[f" {prompt.split()[-1]} was here.", " And then?"] for prompt in prompts]
    options = {"aggregation": "nested", "levels": ("examples",)} if target == "completion" else {"template": TEMPLATE}
    reward_fn = MultiLevelPPLRewardFunction(
        model, tokenizer, target=target, examples=[("A crow sat.", " It sang.")], **options
    )
    k, seen = found_among(reward_fn, prompts, groups, references)
    assert k == min(8, len(prompts))
    scores = np.full((k * 2, k), np.nan)
    for row in range(k):
        for index, text in enumerate(groups[row]):
            for other in range(k):
                before = "A crow sat. It sang.\n\n" + prompts[other]
                pair = (before, text) if target == "completion" else (f"{before} [{text}]", references[other])
                tokens = [value for _, value in brute_force.token_surprisals(model, tokenizer, pair[1], pair[0])]
                scores[row * 2 + index, other] = -np.mean(tokens)
    expected = found(scores, k)
    assert seen[:3] == expected[:3] and seen.by_row[:k] == expected.by_row and math.isnan(seen.by_row[k])
    assert found_among(reward_fn, prompts[:1], groups[:1], references[:1]) is None
    if target == "reference":  # rows that nothing tells apart, and those without a reference, are left out
        said = [*references[:3], references[0], " ", *references[5:]]
        k, other = found_among(reward_fn, prompts, groups, said)
        kept = [0, 1, 2, 5, 6, 7, 8]
        assert k == 7 and [row for row, share in enumerate(other.by_row) if not math.isnan(share)] == kept
        alone = found_among(reward_fn, *([of[row] for row in kept] for of in (prompts, groups, references)))[1]
        assert [other.by_row[row] for row in kept] == alone.by_row
    if target == "completion":  # what says nothing goes with no row
        assert found_among(reward_fn, prompts[:4], [[""]] * 4)[1][:2] == (0, 1 / 4)
