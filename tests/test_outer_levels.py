"""What stands before a text: examples, its own prompt, other rows' prompts; against one forward pass a token."""

import math
from dataclasses import replace
from types import SimpleNamespace

import brute_force
import numpy as np
import pytest
import torch
import toys

from mlppl.config import LEVELS, RewardConfig
from mlppl.errors import InputError
from mlppl.reward.function import MultiLevelPPLRewardFunction
from mlppl.reward.terms import Measured, earned
from mlppl.scoring.calculator import MultiLevelPPLCalculator
from mlppl.scoring.contexts import Contexts
from mlppl.scoring.levels import nested_perplexities
from mlppl.scoring.sampling import prompt_ids

ALL = ("word", "phrase", "sentence", "prompt", "examples")
EXAMPLES = [("A crow sat down.", " It sang."), ("The mill is old.", "Nobody came. It rained.")]
OTHERS = [
    ("Once there was a fox.", " It ran."),
    ("Two mice met.", " They ate."),
    ("The sea is far.", " Go."),
    EXAMPLES[1],
]
SHOWN = "A crow sat down. It sang.\n\nThe mill is old. Nobody came. It rained.\n\n"
PROMPT, TEXTS = "The fox was hungry.", [" It said: I am hungry. The crow laughed.", " Go, go."]
NESTED = {"aggregation": "nested", "levels": ALL, "examples": EXAMPLES, "others": OTHERS, "contrast": 2}


def mean_nats(model, tokenizer, context, text):
    tokens = [value for _, value in brute_force.token_surprisals(model, tokenizer, text, context)]
    return math.fsum(tokens) / len(tokens)


def drawn(calculator, prompt=PROMPT):
    others = [other for other, _ in calculator.contexts.others_of(prompt)]
    assert len(others) == 2 and prompt not in others
    return others


def test_each_level_is_what_more_before_the_text_changes(model, tokenizer):
    calculator = MultiLevelPPLCalculator(tokenizer, **NESTED)
    found = calculator.compute_all_levels(model, TEXTS, [PROMPT] * 2)
    for row, text in enumerate(TEXTS):
        a, b, _ = np.cumsum(np.log(brute_force.nested_levels(model, tokenizer, text, PROMPT)))
        c = np.mean([mean_nats(model, tokenizer, other, text) for other in drawn(calculator)])
        d, e = (mean_nats(model, tokenizer, before + PROMPT, text) for before in ("", SHOWN))
        expected = np.exp([a, b - a, c - b, d - c, e - d])
        assert [found[level][row].item() for level in ALL] == pytest.approx(expected.tolist(), rel=1e-4)
        assert math.prod(found[level][row].item() for level in ALL) == pytest.approx(math.exp(e), rel=1e-4)


@pytest.mark.parametrize("levels", [("prompt", "examples"), ("word", "examples"), ("prompt",), ("sentence", "prompt")])
def test_a_choice_of_levels_changes_none_of_them(levels, model, tokenizer):
    whole = MultiLevelPPLCalculator(tokenizer, **NESTED).compute_all_levels(model, TEXTS, [PROMPT] * 2)
    examples = {"examples": EXAMPLES if "examples" in levels else ()}
    some = MultiLevelPPLCalculator(tokenizer, **{**NESTED, "levels": levels, **examples})
    found = some.compute_all_levels(model, TEXTS, [PROMPT] * 2)
    # Without a level before it that is asked for, the difference is to the view before it.
    if levels == ("word", "examples"):
        plain = MultiLevelPPLCalculator(tokenizer, aggregation="nested").compute_all_levels(model, TEXTS, [PROMPT] * 2)
        assert torch.equal(found["word"], plain["word"])
    for level in levels:
        torch.testing.assert_close(found[level], whole[level], rtol=1e-5, atol=0)


@pytest.mark.parametrize("aggregation", ["geometric", "nested"])
def test_examples_without_a_level_of_their_own_stand_before_every_prompt(aggregation, model, tokenizer):
    shown = MultiLevelPPLCalculator(tokenizer, aggregation=aggregation, examples=EXAMPLES)
    plain = MultiLevelPPLCalculator(tokenizer, aggregation=aggregation)
    found = shown.compute_all_levels(model, TEXTS, [PROMPT] * 2)
    expected = plain.compute_all_levels(model, TEXTS, [SHOWN + PROMPT] * 2)
    for level in LEVELS:
        torch.testing.assert_close(found[level], expected[level], rtol=1e-5, atol=0)


def test_sampled_ids_are_scored_behind_each_context_as_they_are(model, tokenizer):
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, **{**NESTED, "levels": ("prompt", "examples")})
    ids = [[5, 9, 100, 33], [60, 61]]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    _, details = reward_fn.compute_rewards(texts, [PROMPT] * 2, completion_ids=ids, return_details=True)

    def nats(prompt, completion):
        given = prompt_ids([prompt], tokenizer)[0]
        with torch.no_grad():
            logs = model(torch.tensor([given + completion])).logits.log_softmax(-1)[0]
        return -np.mean([logs[len(given) - 1 + at, one].item() for at, one in enumerate(completion)])

    for row, completion in enumerate(ids):
        c = np.mean([nats(other, completion) for other in drawn(reward_fn.calculator)])
        d, e = nats(PROMPT, completion), nats(SHOWN + PROMPT, completion)
        assert details["ppls"]["prompt"][row].item() == pytest.approx(math.exp(d - c), rel=1e-4)
        assert details["ppls"]["examples"][row].item() == pytest.approx(math.exp(e - d), rel=1e-4)


def test_behind_a_chat_the_examples_are_turns_behind_the_systems_own():
    tokenizer = toys.byte_level(chat=True)
    contexts = Contexts(tokenizer, ("examples",), EXAMPLES)
    system, user = {"role": "system", "content": "Be short."}, {"role": "user", "content": PROMPT}
    shown = contexts.behind_examples([system, user])
    assert [message["role"] for message in shown] == ["system", *["user", "assistant"] * 2, "user"]
    assert shown[2]["content"] == " It sang." and shown[-1] == user
    begun = [{"role": "user", "content": "A story?"}, {"role": "assistant", "content": "The fox"}]
    shown = Contexts(tokenizer, ("examples",), [(begun, "ran.")]).behind_examples(begun)
    assert [message["content"] for message in shown] == ["A story?", "The fox ran.", "A story?", "The fox"]


def test_a_chat_scored_as_text_reads_what_was_put_into_the_template(model):
    tokenizer = toys.byte_level(chat=True)
    form = "Go on with this: {prompt} Please."
    ask = lambda text: [{"role": "user", "content": form.format(prompt=text)}]  # noqa: E731
    options = {"score_without_chat": True, "prompt_template": form, "examples": [(ask(p), r) for p, r in EXAMPLES]}
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, **options)
    ids = tokenizer("It ran.", add_special_tokens=False)["input_ids"]
    said = [[{"role": "assistant", "content": "It ran."}]]
    _, details = reward_fn.compute_rewards(["It ran."], [ask(PROMPT)], completion_ids=[ids], return_details=True)
    expected = MultiLevelPPLCalculator(tokenizer).compute_all_levels(model, " It ran.", SHOWN + PROMPT)
    assert details["ppls"]["word"].item() == pytest.approx(expected["word"], rel=1e-5)
    assert reward_fn([ask(PROMPT)], said, completion_ids=[ids]) is not None
    told = [{"role": "assistant", "content": "It ran."}, {"role": "tool", "content": "42"}]
    _, several = reward_fn.compute_rewards(["It ran."], [ask(PROMPT)], completions=[told], return_details=True)
    assert several["ppls"]["word"].item() == details["ppls"]["word"].item()  # what a tool says was not written
    levels = MultiLevelPPLRewardFunction(
        model, tokenizer, score_without_chat=True, prompt_template=form, aggregation="nested", levels=("prompt",),
        others=[(ask(p), r) for p, r in OTHERS], contrast=2,
    )  # fmt: skip
    plain = MultiLevelPPLCalculator(tokenizer, aggregation="nested", levels=("prompt",), others=OTHERS, contrast=2)
    _, details = levels.compute_rewards(["It ran."], [ask(PROMPT)], return_details=True)
    expected = plain.compute_all_levels(model, " It ran.", PROMPT)
    assert details["ppls"]["prompt"].item() == pytest.approx(expected["prompt"], rel=1e-5)


def test_what_a_tool_said_stands_before_the_answer_in_each_view():
    calculator = MultiLevelPPLCalculator(
        toys.byte_level(chat=True), aggregation="nested", levels=("prompt", "examples"), contrast=1,
        examples=[([{"role": "user", "content": prompt}], reference) for prompt, reference in EXAMPLES],
        others=[([{"role": "user", "content": prompt}], reference) for prompt, reference in OTHERS],
    )  # fmt: skip
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
    said = [called, {"role": "tool", "content": "It is 20."}, {"role": "assistant", "content": "Warm."}]
    views = calculator.text([{"role": "user", "content": PROMPT}], said)
    contexts = [pair[0] for view in views for pair in view]
    assert len(contexts) == 3 and all("It is 20." in context for context in contexts)
    tails = {context[context.rindex("<", 0, context.index("It is 20.")) :] for context in contexts}
    assert len(tails) == 1  # all that stands between prompt and answer


def test_a_template_is_taken_off_as_it_was_put_on_escaped_braces_and_a_begun_answer_too(model):
    tokenizer, form = toys.byte_level(chat=True), "Answer with {{}} signs: {prompt}"
    options = {"score_without_chat": True, "prompt_template": form}
    calculator, plain = MultiLevelPPLCalculator(tokenizer, **options), MultiLevelPPLCalculator(tokenizer)
    asked = [{"role": "user", "content": form.format(prompt=PROMPT)}]
    begun = [{"role": "user", "content": "A story?"}, {"role": "assistant", "content": asked[0]["content"]}]
    expected = plain.compute_all_levels(model, " It ran.", PROMPT)
    for prompt, text in ((asked, "It ran."), (begun, " It ran.")):
        found = calculator.compute_all_levels(model, [text], [prompt])
        assert found["word"].item() == pytest.approx(expected["word"], rel=1e-5)


@pytest.mark.parametrize("text", [", and it ran.", "ly.", " it ran."])
def test_behind_an_answer_that_the_prompt_began_the_scorer_reads_on_without_a_space_of_its_own(text, model):
    tokenizer = toys.byte_level(chat=True)
    begun = [{"role": "user", "content": "A story?"}, {"role": "assistant", "content": "The fox said"}]
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, score_without_chat=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    _, details = reward_fn.compute_rewards([text], [begun], completion_ids=[ids], return_details=True)
    expected = brute_force.all_levels(model, tokenizer, text, "The fox said")
    assert details["ppls"]["word"].item() == pytest.approx(expected["word"], rel=1e-4)


def test_read_as_text_a_completion_ends_where_its_policy_ended_it(model):
    tokenizer = toys.byte_level(chat=True)
    [end] = tokenizer("!", add_special_tokens=False)["input_ids"]
    policy = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=end))
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, policy=(policy, tokenizer), score_without_chat=True)
    ids = tokenizer("It ran", add_special_tokens=False)["input_ids"]
    asked = [{"role": "user", "content": PROMPT}]
    _, details = reward_fn.compute_rewards(["It ran!"], [asked], completion_ids=[[*ids, end]], return_details=True)
    expected = brute_force.all_levels(model, tokenizer, " It ran", PROMPT)
    assert details["ppls"]["word"].item() == pytest.approx(expected["word"], rel=1e-4)


def test_prompts_that_differ_in_outer_white_space_have_ids_of_their_own(model):
    tokenizer = toys.byte_level(chat=True)
    examples = [([{"role": "user", "content": "A crow sat down."}], "It sang.")]
    ids = tokenizer("It ran.", add_special_tokens=False)["input_ids"]
    one, other = ([{"role": "user", "content": PROMPT + end}] for end in ("", "\n\n"))

    def level(prompts):
        reward_fn = MultiLevelPPLRewardFunction(
            model, tokenizer, aggregation="nested", levels=("examples",), examples=examples, use_cache=False
        )
        size = len(prompts)
        _, details = reward_fn.compute_rewards(
            ["It ran."] * size, prompts, completion_ids=[ids] * size, return_details=True
        )
        return details["ppls"]["examples"].tolist()

    assert level([one, other]) == pytest.approx([*level([one]), *level([other])], rel=1e-5)


def test_a_row_with_the_same_reference_is_no_other_row(tokenizer):
    rows = [(f"Is it {word}?", answer) for word, answer in (("red", "No."), ("wet", " No."), ("old", "Yes."))]
    contexts = Contexts(tokenizer, (), others=[*rows, ("Is it far?", "No.")], contrast=1)
    assert contexts.others_of("Is it hot?", "No.", 1) == [rows[2]]
    with pytest.raises(InputError, match=r"contrast is 1: of 2 other rows 0 have another text than 'No.'"):
        Contexts(tokenizer, (), others=rows[:2], contrast=1).others_of("Is it hot?", "No.", 1)


def test_rows_in_another_form_than_the_prompts_are_refused(model):
    tokenizer, chat = toys.byte_level(chat=True), [{"role": "user", "content": PROMPT}]
    of_text = MultiLevelPPLRewardFunction(
        model, tokenizer, aggregation="nested", levels=("prompt",), others=OTHERS, contrast=2
    )
    with pytest.raises(InputError, match=r"another row's prompt is .*expected the form of prompts"):
        of_text.compute_rewards(["It ran."], [chat])
    with pytest.raises(InputError, match=r"an example's prompt is .*expected a text, as the prompts are"):
        Contexts(tokenizer, (), [(chat, "It ran.")]).read(PROMPT)


def test_a_reference_behind_nothing_at_all_is_refused_where_no_bos_stands_before_it(model):
    tokenizer, template = toys.byte_level(bos=False), "{completion}{reference}"
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, target="reference", template=template)
    with pytest.raises(InputError, match=r"begin the template, .* with a word"):
        reward_fn.compute_rewards(["It ran."], ["P."], ["Once it fell down."])
    told = MultiLevelPPLRewardFunction(model, tokenizer, target="reference", template="So: " + template)
    _, details = told.compute_rewards(["It ran."], ["P."], ["Once it fell down."], return_details=True)
    for name, before in (("ppls", "So: It ran."), ("baselines", "So: ")):
        expected = brute_force.all_levels(model, tokenizer, "Once it fell down.", before)
        assert details[name]["sentence"].item() == pytest.approx(expected["sentence"], rel=1e-4)


def test_other_rows_are_the_same_for_a_group_whatever_the_order_and_never_ones_own(tokenizer):
    one = Contexts(tokenizer, ("prompt",), others=OTHERS, contrast=2)
    other = Contexts(tokenizer, ("prompt",), others=OTHERS[::-1], contrast=2)
    for prompt, _ in OTHERS:
        rows = one.others_of(prompt)
        assert rows == other.others_of(prompt) and len(set(rows)) == 2 and prompt not in [p for p, _ in rows]


def test_a_row_whose_chat_is_read_as_text_is_no_other_row_of_itself(tokenizer):
    ask = [{"role": "user", "content": "Go on: " + OTHERS[0][0]}]
    contexts = Contexts(tokenizer, (), others=OTHERS, contrast=3, without_chat=True, form="Go on: {prompt}")
    assert contexts.others_of(ask, " It ran.", 1) == contexts.others_of(OTHERS[0][0], " It ran.", 1)
    assert OTHERS[0] not in contexts.others_of(ask, " It ran.", 1)


def test_references_of_other_rows_are_taken_off_with_a_floor(model, tokenizer):
    """R = D(z; i) - mean_j max(D(z; j), -0.2), D in nats a token, each by brute force."""
    references = [" It found a crow.", " Nobody laughed at it."]
    options = {"target": "reference", "form": "nats", "weights": (1, 0, 0), "others": OTHERS, "contrast": 2}
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, examples=EXAMPLES, **options)
    rewards, details = reward_fn.compute_rewards(TEXTS, [PROMPT] * 2, references, return_details=True)

    def word(context, text):
        return math.log(brute_force.all_levels(model, tokenizer, text, context)["word"])

    for row, (text, reference) in enumerate(zip(TEXTS, references, strict=True)):
        others = reward_fn.calculator.contexts.others_of(PROMPT, reference, 1)
        gains = [
            word(SHOWN + prompt, one) - word(SHOWN + prompt + text, one)
            for prompt, one in [(PROMPT, reference), *others]
        ]
        expected = gains[0] - np.mean(np.maximum(gains[1:], -0.2))
        assert abs(expected) < 0.5 and rewards[row].item() == pytest.approx(expected, abs=1e-4)
        assert details["ppls"]["word"][row].item() == pytest.approx(
            math.exp(word(SHOWN + PROMPT + text, reference)), rel=1e-4
        )


def test_a_document_that_the_scorer_reads_without_its_prompt(model, tokenizer):
    template = "In short: {completion}\nThe story: {reference}"
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, target="reference", template=template, form="nats")
    prompts, document = ["Sum up: the fox ran. It fell."], "The fox ran. It fell."
    _, details = reward_fn.compute_rewards(["A fox fell."], prompts, [document], return_details=True)
    for name, before in (("ppls", "A fox fell."), ("baselines", "")):
        expected = brute_force.all_levels(model, tokenizer, document, f"In short: {before}\nThe story: ")
        assert details[name]["sentence"].item() == pytest.approx(expected["sentence"], rel=1e-4)


def test_a_new_nested_level_is_the_difference_to_the_view_before_it():
    assert nested_perplexities(np.log([[2.0, 3.0, 6.0, 3.0]]))[0] == pytest.approx([2.0, 1.5, 2.0, 0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": ("prompt",), "others": OTHERS}, "needs aggregation 'nested'"),
        ({"aggregation": "nested", "levels": ("examples",)}, "expected some, as examples"),
        ({"aggregation": "nested", "levels": ("prompt",), "others": OTHERS[:2]}, "more other rows than that"),
        ({"aggregation": "nested", "levels": ("word", "word")}, "expected each once"),
        ({"aggregation": "nested", "levels": ("prose",)}, "prose"),
        ({"aggregation": "nested", "levels": ()}, "expected a list of"),
        ({"contrast": 2, "others": OTHERS}, "contrast compares completions by their level prompt"),
        ({"target": "reference", "aggregation": "nested", "levels": ("prompt",)}, "is of completions"),
        ({"weights": (1, 1), "aggregation": "nested", "levels": ("word",)}, "expected (word)"),
        ({"examples": ["A fox."]}, "expected (prompt, reference)"),
        ({"examples": "rows.jsonl"}, "expected a list of (prompt, reference)"),
        ({"examples": [([], "A fox.")]}, "examples 0 has a blank prompt"),
        ({"examples": [("A fox.", " ")]}, "has a blank reference"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(options, message, model, tokenizer):
    with pytest.raises(InputError) as refused:
        MultiLevelPPLRewardFunction(model, tokenizer, **options)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_examples_that_do_not_fit_the_window_are_refused_with_the_number_that_does(tokenizer):
    model = toys.llama(max_position_embeddings=64)
    rows = [(f"The fox ran {number} times.", " It fell down.") for number in range(6)]
    sizes = [
        len(prompt_ids([Contexts(tokenizer, (), rows[:n]).behind_examples(PROMPT)], tokenizer)[0]) for n in range(7)
    ]
    text = " It ran."
    own = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    fit = max(n for n, size in enumerate(sizes) if size + own <= 64)
    assert 0 < fit < 6
    with pytest.raises(InputError, match=f"6 examples.*at most {fit} of these"):
        MultiLevelPPLCalculator(tokenizer, examples=rows).compute_all_levels(model, text, PROMPT)
    MultiLevelPPLCalculator(tokenizer, examples=rows[:fit]).compute_all_levels(model, text, PROMPT)


def test_of_references_without_their_prompt_the_number_that_fits_is_counted_as_they_are_shown(tokenizer):
    model = toys.llama(max_position_embeddings=64)
    rows = [("A long prompt that is never shown. " * 5, f" It fell {number} times.") for number in range(9)]
    template = "In short: {completion}\n{reference}"

    def score(count):
        reward_fn = MultiLevelPPLRewardFunction(
            model, tokenizer, target="reference", template=template, examples=rows[:count]
        )
        reward_fn.compute_rewards(["It ran."], ["P."], [" Once."])

    with pytest.raises(InputError, match=r"9 examples.*at most \d of these") as refused:
        score(9)
    fit = int(str(refused.value).partition("at most ")[2][0])
    assert 0 < fit < 9
    score(fit)
    with pytest.raises(InputError, match=f"{fit + 1} examples"):
        score(fit + 1)


def test_baselines_made_with_other_examples_are_refused(model, tokenizer):
    plain = MultiLevelPPLRewardFunction(model, tokenizer).identity
    shown = MultiLevelPPLRewardFunction(model, tokenizer, examples=EXAMPLES).identity
    nested = MultiLevelPPLRewardFunction(model, tokenizer, **NESTED).identity
    fewer = MultiLevelPPLRewardFunction(model, tokenizer, **{**NESTED, "others": OTHERS[:3]}).identity
    from mlppl.scoring.differences import differences

    assert set(differences(plain, shown)) == {"examples"} == set(differences(shown, plain))
    assert {"levels", "contrast", "others", "examples"} <= set(differences(plain, nested))
    assert set(differences(nested, fewer)) == {"others"}
    assert not differences(nested, nested)
    # What is taken off has to be what was put on.
    as_text, other = (
        MultiLevelPPLRewardFunction(model, tokenizer, score_without_chat=True, prompt_template=form).identity
        for form in ("{prompt}", "Go on: {prompt}")
    )
    assert set(differences(as_text, other)) == {"prompt_template"}


def test_a_word_is_coloured_by_what_its_prompt_and_the_examples_help_it(model, tokenizer):
    calculator = MultiLevelPPLCalculator(tokenizer, **NESTED)
    explained = calculator.explain(model, TEXTS[0], PROMPT)
    assert list(explained) == list(ALL)
    words = explained["prompt"]
    assert [unit["text"] for unit in words] == [unit["text"] for unit in explained["word"]]
    for level, outer, inner in (("prompt", "d", "c"), ("examples", "e", "d")):
        total = sum(unit[outer] - unit[inner] for unit in explained[level])
        tokens = sum(unit["n_tokens"] for unit in explained[level])
        assert explained.perplexities[level] == pytest.approx(math.exp(total / tokens), rel=1e-5)
        one = explained[level][0]
        assert one["perplexity"] == pytest.approx(math.exp((one[outer] - one[inner]) / one["n_tokens"]), rel=1e-5)
    assert "The fox" in explained._repr_html_() or "fox" in explained._repr_html_()


def measured(perplexities, baselines, others=None):
    count = len(perplexities)
    none = np.zeros(count, dtype=bool)
    return Measured(np.array(perplexities), np.array(baselines), others, none, none, None, None)


def test_what_belongs_to_its_prompt_is_paid_for_up_to_half_a_nat():
    """By hand: of the prompt's level 0.3 and 0.5 nats count whole, 2 as 0.5; the examples' without end."""
    config = RewardConfig(aggregation="nested", levels=("prompt", "examples"), form="nats")
    found = earned(measured(np.exp([[-0.3, 0.0], [-0.5, 0.0], [-2.0, 0.0], [0.0, -0.8]]), np.ones((4, 2))), config)
    assert found.rewards == pytest.approx([0.15, 0.25, 0.25, 0.4])
    assert found.improvement[2, 0] == pytest.approx(100 * (1 - math.exp(-2)))  # what is logged is whole


@pytest.mark.parametrize("form", ["nats", "thresholds"])
def test_harming_other_rows_pays_up_to_a_fifth_of_a_nat(form):
    """By hand, of one level: other rows' references become e^0.1, e^0.2 and e^3 times as surprising, and e^-0.3."""
    config = RewardConfig(target="reference", form=form, weights=(1, 0, 0), contrast=1)
    if form == "thresholds":
        config = replace(config, reward_thresholds=[(percent, percent) for percent in range(1, 40)])
    size = 4
    others = np.ones((2, size, 1, 3))
    others[0, :, 0] = np.exp([[0.1], [0.2], [3.0], [-0.3]])
    found = earned(measured(np.ones((size, 3)), np.ones((size, 3)), others), config)
    if form == "nats":
        assert found.rewards == pytest.approx([0.1, 0.2, 0.2, -0.3])
    else:
        assert found.rewards.tolist() == [10, 22, 22, 0]  # 100 (e^0.1 - 1) = 10.5, 100 (e^0.2 - 1) = 22.1
