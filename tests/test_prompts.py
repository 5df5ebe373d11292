"""Prompts: what is made of a data set's rows, the same in both scripts, and how chat messages become text."""

import json
import math

import brute_force
import numpy as np
import pytest
import torch
import toys
from datasets import Dataset
from heard import Heard

from mlppl import cli
from mlppl.baselines.file import Baselines
from mlppl.baselines.job import read_rows
from mlppl.config import LEVELS
from mlppl.data import (
    Columns,
    PromptForm,
    check_references,
    checked_text,
    find_columns,
    make_row,
    message_text,
    prepare_rows,
    refuse_unscored,
    stable_id,
)
from mlppl.errors import InputError
from mlppl.prompts import chat_identity, completion_turns, read_template, read_tools, render_prompt, say_once
from mlppl.reward.function import MultiLevelPPLRewardFunction
from mlppl.scoring.calculator import MultiLevelPPLCalculator
from mlppl.scoring.sampling import prompt_ids, sample
from mlppl.scoring.tokens import Sampled
from mlppl.scoring.units import segment
from mlppl.training.heldout import evaluate
from mlppl.training.rewards import other_beginning

USER = {"role": "user", "content": "Tell me about the fox."}
CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": "It is red."}
BEGUN = [USER, {"role": "assistant", "content": "It is"}]
TEMPLATE = (
    "{% if tools %}<tools {{ tools | length }}>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ 'CALLS' if m.tool_calls is defined else m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '' if enable_thinking | default(true) else '<think></think>' }}"
    "{% endif %}"
)


@pytest.fixture(scope="module")
def chat():
    tokenizer = toys.byte_level()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# --- rows ------------------------------------------------------------------------------------------------------------

TEXT = "A fox ran. It fell!\nIt slept. The end."


@pytest.mark.parametrize(
    ("form", "prompt", "reference"),
    [
        (PromptForm(), "The fox", " ran."),
        (PromptForm("Go on:\n{prompt}"), "Go on:\nThe fox", " ran."),
        (PromptForm("{{{prompt}}}"), "{The fox}", " ran."),
        (PromptForm(chat=True), [{"role": "user", "content": "The fox"}], " ran."),
        (
            PromptForm("Go on: {prompt}", chat=True, system_prompt="You tell stories."),
            [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": "Go on: The fox"}],
            " ran.",
        ),
        (
            PromptForm("Sure: {prompt}", chat=True, system_prompt="You tell stories.", user_prompt="Tell one."),
            [
                {"role": "system", "content": "You tell stories."},
                {"role": "user", "content": "Tell one."},
                {"role": "assistant", "content": "Sure: The fox"},
            ],
            " ran.",
        ),
    ],
)
def test_what_is_made_of_a_prompt(form, prompt, reference):
    form.check()
    assert form.prompt_and_reference("The fox", " ran.") == (prompt, reference)
    assert form.prompt_and_reference("", " ran.") == ("", " ran.")  # nothing is asked of nothing


@pytest.mark.parametrize(
    ("count", "prompt"),
    [(1, "A fox ran."), (2, "A fox ran. It fell!"), (3, "A fox ran. It fell!\nIt slept."), (4, TEXT), (9, TEXT)],
)
def test_the_first_sentences_are_the_prompt_and_the_rest_the_reference(count, prompt):
    """A line break ends a sentence, as everywhere here; not a character of the text is lost."""
    found = PromptForm(prompt_sentences=count).prompt_and_reference(TEXT, "")
    assert found == (prompt, TEXT.removeprefix(prompt))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (PromptForm("Go on."), "expected {prompt} in it, once"),
        (PromptForm("{prompt} {prompt}"), "once"),
        (PromptForm("{text}"), "expected {prompt}"),
        (PromptForm("{prompt"), "a brace that is text is written twice"),
        (PromptForm(system_prompt="Tell."), "--system_prompt is a message of a chat: it needs --chat"),
        (PromptForm(user_prompt="Tell."), "--user_prompt is a message of a chat: it needs --chat"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused(form, words):
    with pytest.raises(InputError) as caught:
        form.check()
    assert words in str(caught.value)


@pytest.mark.parametrize("form", [PromptForm("Go on: {prompt}"), PromptForm(chat=True), PromptForm(prompt_sentences=1)])
def test_messages_are_not_made_into_what_strings_are(form):
    with pytest.raises(InputError, match=r"row 3: the prompt is chat messages, and --\w+ is for prompts that are str"):
        make_row({"prompt": [USER]}, 3, Columns("prompt", None, None), form)


def test_one_column_is_prompt_and_reference():
    assert find_columns(["id", "prompt", "text"], one_text=True) == Columns("text", None, "id")
    assert find_columns(["story"], prompt="story", one_text=True) == Columns("story", None, None)
    with pytest.raises(InputError, match="--prompt_sentences makes the reference"):
        find_columns(["text", "completion"], reference="completion", one_text=True)


def test_rows_for_the_trainer():
    form, columns = PromptForm("Go on: {prompt}", prompt_sentences=1), Columns("text", None, None)
    data = Dataset.from_list(
        [{"text": TEXT, "baseline_word": 1.0}, {"text": "One."}, {"text": None}, {"text": "Tom sat. Ann ran."}]
    )
    rows = prepare_rows(data, columns, form)
    assert set(rows.column_names) == {"id", "prompt", "reference", "baseline_word"}
    assert list(rows["prompt"]) == ["Go on: A fox ran.", "Go on: Tom sat."]
    assert list(rows["reference"]) == [" It fell!\nIt slept. The end.", " Ann ran."]
    assert list(rows["id"]) == list(map(stable_id, rows["prompt"], rows["reference"]))
    check_references(rows, columns, form, blank_is_wrong=True)


def test_the_other_columns_stay_for_the_rewards():
    row = {"story": "A fox ran.", "rest": " It fell.", "number": 3, "prompt": "unused", "genre": "fable"}
    data = Dataset.from_list([{**row, "completion": "", "images": [], "log_metric": 1}])
    [prepared] = prepare_rows(data, Columns("story", "rest", "number"), PromptForm())
    assert prepared == {"id": 3, "prompt": "A fox ran.", "reference": " It fell.", "genre": "fable"}


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (5, "holds 5"),
        ([{"role": "user", "content": None}], "null only in an assistant's"),
        ([{"content": "a"}], "role"),
    ],
)
def test_a_cell_that_is_no_text_is_named_with_its_row(cell, words):
    with pytest.raises(InputError) as caught:
        make_row({"prompt": cell}, 7, Columns("prompt", None, None), PromptForm())
    assert "row 7: column prompt holds" in str(caught.value) and words in str(caught.value)


def test_an_assistant_that_calls_a_tool_says_nothing():
    messages = [USER, ASKED, TOLD, {"role": "user", "content": "Go on."}]
    assert checked_text(messages, "prompt", 0) == messages
    assert message_text(messages) == "Tell me about the fox.\nIt is red.\nGo on."


def test_a_row_has_one_id_whatever_a_table_adds():
    messages = [USER, ASKED, TOLD]
    [row] = Dataset.from_list([{"prompt": messages}])
    assert stable_id(row["prompt"]) == stable_id(messages)


# --- through the template --------------------------------------------------------------------------------------------


def test_a_template_gets_the_messages_its_variables_and_the_tools(chat):
    messages = [USER, ASKED, TOLD]
    [row] = Dataset.from_list([{"prompt": messages}])
    for prompt in (messages, row["prompt"]):
        assert render_prompt(prompt, chat) == (
            "<|user|>Tell me about the fox.\n<|assistant|>CALLS\n<|tool|>It is red.\n<|assistant|>"
        )
    assert render_prompt([USER], chat, {"enable_thinking": False}, [CALL]) == (
        "<tools 1><|user|>Tell me about the fox.\n<|assistant|><think></think>"
    )


def test_a_role_that_the_template_refuses_is_one_line(chat):
    strict = toys.byte_level()
    strict.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    with pytest.raises(InputError, match=r"refuses messages of system, user: no system here: .*--chat_template_path"):
        render_prompt([{"role": "system", "content": "Tell."}, USER], strict)
    with pytest.raises(InputError, match=r"no chat template.*--chat_template_path"):
        render_prompt([USER], toys.byte_level())


PARTS = [{"type": "text", "text": "Tell me about "}, {"type": "text", "text": "the fox."}]
# As models have them: Llama 3, Gemma 2, ChatML; one that shows any list; Qwen2-VL; SmolVLM, which reads parts alone.
OF_TEXT = {
    "llama": "{% for m in messages %}{% set t = '<' + m['role'] + '>' + m['content'] | trim %}{{ t }}{% endfor %}",
    "gemma": "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] | trim + '\n' }}{% endfor %}",
    "chatml": "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] }}{% endfor %}",
    "plain": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "json": "{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{% endfor %}",
}
EACH_PART = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}|{% endif %}{% endfor %}"
OF_PARTS = {
    "both": "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    f"{EACH_PART}{{% endif %}}{{% endfor %}}",
    "parts": f"{{% for m in messages %}}<{{{{ m.role }}}}>{EACH_PART}{{% endfor %}}",
}


@pytest.fixture
def through():
    """Messages through a template."""
    tokenizer = toys.byte_level()

    def render(template, messages):
        tokenizer.chat_template = template
        return render_prompt(messages, tokenizer)

    return render


@pytest.mark.parametrize("name", OF_TEXT)
def test_parts_are_joined_for_a_template_that_takes_strings(through, name):
    begun = {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}
    for behind in ([], [begun]):
        parts = [{"role": "user", "content": PARTS}, *behind]
        strings = [{**message, "content": message_text([message])} for message in parts]
        assert through(OF_TEXT[name], parts) == through(OF_TEXT[name], strings)
    assert "Tell me about the fox." in through(OF_TEXT[name], parts)


def test_parts_are_given_as_they_are_to_a_template_that_takes_them(through):
    parts = [{"role": "user", "content": PARTS}]
    assert through(OF_PARTS["both"], parts) == through(OF_PARTS["parts"], parts) == "<user>Tell me about |the fox.|"
    assert through(OF_PARTS["both"], [USER]) == "<user>Tell me about the fox."
    assert through(OF_PARTS["parts"], [USER]) == "<user>Tell me about the fox.|"  # which a loop over letters loses
    [row] = Dataset.from_list([{"prompt": [{"role": "user", "content": [{**part, "image": None} for part in PARTS]}]}])
    assert through(OF_TEXT["llama"], row["prompt"]) == "<user>Tell me about the fox."


def test_parts_of_a_completion_are_scored_as_its_text(model, chat):
    prompt, said = [{"role": "user", "content": PARTS}], [{"role": "assistant", "content": PARTS}]
    calculator = MultiLevelPPLCalculator(chat)
    text = calculator.compute_all_levels(model, ["Tell me about the fox."], [[USER]])
    assert calculator.compute_all_levels(model, [said], [prompt]) == text


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "input_audio", "text": None}, {"text": "no type"}])
def test_a_part_that_is_no_text_is_refused_by_its_type(chat, part):
    messages = [{"role": "user", "content": [*PARTS, part]}]
    with pytest.raises(InputError, match=rf"row 7, column prompt: .*type {part.get('type')!r}, and only text"):
        make_row({"prompt": messages}, 7, Columns("prompt", None, None), PromptForm())
    with pytest.raises(InputError, match="only text is read here"):
        render_prompt(messages, chat)


def test_what_stands_in_the_template_or_in_another_message_is_not_taken_for_a_text_that_was_read(through):
    """A template of parts loops over a string's letters and writes none of them: `user` is in its markup anyway."""
    short = {"role": "user", "content": "user"}
    assert through(OF_PARTS["parts"], [short]) == "<user>user|"
    beside = [
        {"role": "user", "content": [{"type": "text", "text": "yes or no?"}]},
        {"role": "assistant", "content": "yes"},
    ]
    assert through(OF_PARTS["parts"], [*beside, short]) == "<user>yes or no?|<assistant>yes|<user>user|"
    only_users = OF_PARTS["parts"].replace("messages %}", "messages if m.role == 'user' %}")
    assert through(only_users, [{"role": "system", "content": "Tell."}, USER]) == "<user>Tell me about the fox.|"
    with pytest.raises(InputError, match=r"leaves out what .* say, 'Tell me about the fox.': .*--chat_template_path"):
        through("{% for m in messages %}<{{ m.role }}>{{ m.text }}{% endfor %}", [USER])


@pytest.mark.parametrize("name", [*OF_TEXT, *OF_PARTS])
def test_a_list_without_parts_says_nothing(through, name):
    empty, blank = ([{"role": "user", "content": content}, USER] for content in ([], ""))
    assert through(({**OF_TEXT, **OF_PARTS})[name], empty) == through(({**OF_TEXT, **OF_PARTS})[name], blank)


@pytest.mark.parametrize("opening", ["", "<assistant>", "{% if add_generation_prompt %}<assistant>{% endif %}"])
def test_an_end_behind_all_messages_is_left_out_of_a_prompt(through, opening):
    template = f"{OF_TEXT['plain']}{opening}{{{{ eos_token }}}}"
    shown = "<assistant>" if opening else ""
    assert through(template, [USER]) == f"<user>Tell me about the fox.{shown}"
    each = OF_TEXT["plain"].replace("{% endfor %}", "{{ eos_token }}{% endfor %}")  # DialoGPT's: an answer follows it
    assert through(each, [USER]) == "<user>Tell me about the fox.</s>"


THINKS = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "weight", "images", "tool_calls"])
def test_a_key_of_a_message_that_the_template_does_not_read_is_refused_by_name(through, key):
    messages = [USER, {"role": "assistant", "content": "Red.", key: ["hm"]}, USER]
    with pytest.raises(InputError, match=f"message 1 of a prompt, of the assistant, has the key '{key}', which"):
        through(OF_TEXT["plain"], messages)
    assert through(OF_TEXT["plain"], [{**message, key: None} for message in messages]).count("fox") == 2


def test_a_key_that_the_template_reads_in_other_places_is_not_refused(through):
    """Templates leave out what was thought in earlier turns."""
    thought = {"role": "assistant", "content": "Red.", "reasoning_content": "hm"}
    assert through(THINKS, [USER, thought]).endswith("<assistant>(hm)Red.")
    assert "hm" not in through(THINKS, [USER, thought, USER])
    named = [{**USER, "name": "Ann"}]
    assert through("{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}", named).startswith("Ann: Tell")


def test_a_speakers_name_that_the_template_does_not_read_is_said_once(through, caplog):
    say_once.cache_clear()
    for _ in range(2):
        assert through(OF_TEXT["plain"], [{**USER, "name": "Ann"}]) == "<user>Tell me about the fox."
    assert [one.message for one in caplog.records] == [
        "messages have the key 'name', which the chat template does not read"
    ]


def test_a_tools_answer_may_say_again_which_call_it_is_of(chat):
    assert "It is red." in render_prompt([USER, ASKED, {**TOLD, "name": "look", "tool_call_id": "1"}], chat)


def test_what_a_reference_says_beside_its_content_is_refused_where_it_would_be_scored():
    reference = [{"role": "assistant", "content": "Red.", "thinking": "hm", "name": None}]
    with pytest.raises(InputError, match="row 3: a message of the reference has the key 'thinking'"):
        refuse_unscored(reference, 3)
    refuse_unscored([ASKED, TOLD, {**reference[0], "thinking": ""}], 3)
    with pytest.raises(InputError, match="'thinking'"):
        data = Dataset.from_list([{"prompt": "a", "completion": reference}])
        list(read_rows(data, Columns("prompt", "completion", None), PromptForm(), None, "reference"))


def test_what_two_prompts_must_share(chat):
    def look(where: str) -> str:
        """Look.

        Args:
            where: at what
        """

    from transformers.utils import get_json_schema

    plain = chat_identity(chat)
    assert chat_identity(toys.byte_level()) == {} and plain["tools"] is None
    assert chat_identity(chat, {"enable_thinking": False})["chat_template_kwargs"] == {"enable_thinking": False}
    assert chat_identity(chat, None, [look]) == chat_identity(chat, None, [get_json_schema(look)]) != plain


def test_files_of_templates_and_tools(tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    (tmp_path / "tools.json").write_text(json.dumps([CALL]))
    (tmp_path / "none.json").write_text("{}")
    assert read_template(str(tmp_path / "t.jinja")) == TEMPLATE
    assert read_tools(str(tmp_path / "tools.json")) == [CALL] and read_tools(None) is None
    with pytest.raises(InputError, match=r"--chat_template_path nowhere\.jinja: No such file"):
        read_template("nowhere.jinja")
    with pytest.raises(InputError, match=r"none\.json holds {}: expected a JSON list"):
        read_tools(str(tmp_path / "none.json"))


@pytest.mark.parametrize("text", ["{", "[1]", "false"])
def test_variables_of_the_template_are_a_json_object(text, capsys):
    parser = cli.parser("")
    cli.add_prompt_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--chat_template_kwargs", text])
    assert "expected a JSON object" in capsys.readouterr().err


# --- completions of several messages ---------------------------------------------------------------------------------

SAID = [
    {"role": "assistant", "content": "Let me look, wait."},
    TOLD,
    {"role": "assistant", "content": "The fox ran home."},
]
TURNS = (
    ("<|user|>Tell me about the fox.\n<|assistant|>", "Let me look, wait."),
    (
        "<|user|>Tell me about the fox.\n<|assistant|>Let me look, wait.\n<|tool|>It is red.\n<|assistant|>",
        "The fox ran home.",
    ),
)


@pytest.mark.parametrize(
    ("prompt", "completion", "turns"),
    [
        ([USER], "Once.", [("<|user|>Tell me about the fox.\n<|assistant|>", "Once.")]),
        (
            [USER],
            [{"role": "assistant", "content": "Once."}],
            [("<|user|>Tell me about the fox.\n<|assistant|>", "Once.")],
        ),
        ([USER], SAID, TURNS),
        ([USER], [ASKED], [("<|user|>Tell me about the fox.\n<|assistant|>", "")]),
        (
            [USER],
            [ASKED, TOLD, {"role": "assistant", "content": "Red."}],
            [("<|user|>Tell me about the fox.\n<|assistant|>CALLS\n<|tool|>It is red.\n<|assistant|>", "Red.")],
        ),
        ("Say: ", [SAID[0], SAID[2]], [("Say: ", "Let me look, wait.\nThe fox ran home.")]),
    ],
)  # fmt: skip
def test_only_what_the_assistant_said_is_scored_behind_all_that_stood_before(chat, prompt, completion, turns):
    assert completion_turns(prompt, completion, chat) == tuple(turns)


def test_a_prompt_that_begins_the_answer_is_gone_on_with(chat):
    said = [{"role": "assistant", "content": " so:"}, TOLD, {"role": "assistant", "content": "Red."}]
    first, second = completion_turns(BEGUN, said, chat)
    assert first == ("<|user|>Tell me about the fox.\n<|assistant|>It is", " so:")
    assert second[0].startswith("<|user|>Tell me about the fox.\n<|assistant|>It is so:\n<|tool|>")


@pytest.mark.parametrize("aggregation", ["geometric", "nested"])
def test_several_turns_are_one_text_whose_units_end_with_each(model, chat, aggregation):
    calculator = MultiLevelPPLCalculator(chat, aggregation=aggregation)
    batch = calculator.compute_all_levels(model, [SAID, "Once."], [[USER], [USER]])
    found = {level: float(values[0]) for level, values in batch.items()}
    each = [calculator.explain(model, text, context) for context, text in TURNS]
    if aggregation == "nested":
        surprisal = sum(unit["surprisal"] for one in each for unit in one["word"])
        tokens = sum(unit["n_tokens"] for one in each for unit in one["word"])
        assert math.prod(found.values()) == pytest.approx(math.exp(surprisal / tokens), rel=1e-5)
        return
    for level in LEVELS:
        units = [math.log(unit["perplexity"]) for one in each for unit in one[level]]
        assert found[level] == pytest.approx(math.exp(sum(units) / len(units)), rel=1e-5)
    counts = [len(segment([text]).starts["word"]) for _, text in TURNS]
    twins = [brute_force.all_levels(model, chat, text, context)["word"] for context, text in TURNS]
    by_hand = sum(n * math.log(twin) for n, twin in zip(counts, twins, strict=True)) / sum(counts)
    assert math.log(found["word"]) == pytest.approx(by_hand, rel=1e-4)


def test_the_reward_scores_the_turns_and_says_the_text(model, chat):
    calculator = MultiLevelPPLCalculator(chat)
    expected = calculator.compute_all_levels(model, [SAID], [[USER]])
    reward_fn = Heard(model, chat)
    reward_fn([[USER]], [SAID])
    assert {level: float(values[0]) for level, values in reward_fn.found["ppls"].items()} == pytest.approx(
        {level: float(values[0]) for level, values in expected.items()}, rel=1e-5
    )

    class Lengths(MultiLevelPPLRewardFunction):
        def compute_rewards(self, texts, **kwargs):
            return torch.tensor([float(len(text)) for text in texts])

    assert Lengths(model, chat)([[USER]], [SAID]) == [len("Let me look, wait.\nIt is red.\nThe fox ran home.")]


def grpo(kind, tmp_path, prompts, reward_fn, tokenizer=None, **options):
    from trl import GRPOConfig

    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=2, num_generations=2,
        report_to="none", max_steps=1, max_completion_length=4,
    )  # fmt: skip
    if tokenizer is None:
        tokenizer = toys.byte_level()
        tokenizer.chat_template = TEMPLATE
    rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    return kind(
        model=toys.llama(), args=config, reward_funcs=[reward_fn], train_dataset=rows, processing_class=tokenizer,
        **options,
    )  # fmt: skip


def test_the_policy_reads_what_the_scorer_reads(model, chat, tmp_path):
    """GRPOTrainer opens a new turn behind a prompt that began the answer, and passes on the keys that a table added."""
    from mlppl.training.trainer import ResumableGRPOTrainer

    options = {"chat_template_kwargs": {"enable_thinking": False}, "tools": [CALL]}
    reward_fn = Heard(model, chat, **options)
    trainer = grpo(ResumableGRPOTrainer, tmp_path, [[USER], [USER, ASKED, TOLD], BEGUN], reward_fn, chat=options)
    rows = trainer.train_dataset
    ids, _, _ = trainer._tokenize_prompts(list(rows["prompt"]))
    read = [reward_fn.calculator.render(prompt) for prompt in rows["prompt"]]
    assert [chat.decode(one) for one in ids] == read
    assert read[0].endswith("<think></think>") and read[2].endswith("It is")


def test_a_begun_answer_is_refused_where_the_policy_does_not_go_on_with_it(model, chat, tmp_path):
    from trl import GRPOTrainer

    trainer = grpo(GRPOTrainer, tmp_path, [BEGUN], Heard(model, chat))
    [[ids], _, _] = trainer._tokenize_prompts([BEGUN])
    assert chat.decode(ids).endswith("It is\n<|assistant|>")  # once it no longer does, nothing is to be refused
    with pytest.raises(InputError, match=r"prompt 0 ends with an assistant's message, 'It is'.*ResumableGRPOTr"):
        trainer.train()


def test_a_column_that_is_called_prompt_ids_is_not_what_the_policy_was_given(model, chat, tmp_path):
    from trl import GRPOTrainer

    from mlppl.training.trainer import ResumableGRPOTrainer

    def trained(kind):
        trainer = grpo(kind, tmp_path, [[USER]], Heard(model, chat))
        trainer.train_dataset = trainer.train_dataset.map(lambda row: {"prompt_ids": [3, 4, 5]})
        trainer.train()

    with pytest.raises(InputError, match=r"a column prompt_ids, .*another name"):
        trained(GRPOTrainer)
    trained(ResumableGRPOTrainer)  # which says itself what it gave


def rolled_out(prompts, trainer):
    """Other ids of the prompts than the trainer makes, as a rollout of one's own may give the policy."""
    tokenizer = trainer.processing_class
    given = [tokenizer(f"Number {index}: ")["input_ids"] for index in range(len(prompts))]
    written = [tokenizer(text)["input_ids"] for text in (" so", " red")]
    return {"prompt_ids": given, "completion_ids": written, "logprobs": [[-1.0] * len(ids) for ids in written]}


@pytest.mark.parametrize("rollout", [None, rolled_out])
def test_what_is_scored_stands_behind_the_ids_that_the_policy_was_given(chat, tmp_path, rollout):
    from mlppl.training.trainer import ResumableGRPOTrainer

    class Kept(Heard):
        def __call__(self, prompts, completions, **columns):
            rewards = super().__call__(prompts, completions, **columns)
            # The product of nested levels is the perplexity of the whole text.
            whole = math.prod(self.found["ppls"][level] for level in LEVELS)
            scored.append((columns, whole.tolist()))
            return rewards

    scored, model = [], toys.llama()
    reward_fn = Kept(model, chat, aggregation="nested")
    trainer = grpo(ResumableGRPOTrainer, tmp_path, [BEGUN], reward_fn, rollout_func=rollout)
    trainer.train()
    [(columns, perplexities)] = scored
    given = [chat.decode(ids) for ids in columns["prompt_ids"]]
    opened = "<|user|>Tell me about the fox.\n<|assistant|>"
    assert given == (["Number 0: ", "Number 1: "] if rollout else [f"{opened}It is"] * 2)
    for before, ids, perplexity in zip(columns["prompt_ids"], columns["completion_ids"], perplexities, strict=True):
        ids = [one for one in ids if one != chat.eos_token_id]
        logs = torch.log_softmax(model(torch.tensor([before + ids])).logits[0].double(), -1)
        places = range(len(before) - 1, len(before) + len(ids) - 1)
        by_hand = -sum(logs[place, one].item() for place, one in zip(places, ids, strict=True)) / len(ids)
        assert math.log(perplexity) == pytest.approx(by_hand, rel=1e-4)


def test_sampling_renders_as_the_scorer_does(model, chat, monkeypatch):
    from mlppl.scoring import sampling

    seen = []
    monkeypatch.setattr(
        sampling, "render_prompt", lambda *args, **kwargs: seen.append(render_prompt(*args, **kwargs)) or seen[-1]
    )
    options = {"chat_template_kwargs": {"enable_thinking": False}, "tools": [CALL]}
    sampling.sample_completions(model, chat, [[USER]], max_new_tokens=1, **options)
    assert seen == [MultiLevelPPLCalculator(chat, **options).render([USER])]


# --- what a tokenizer or a template puts behind a prompt, or before it -----------------------------------------------


def adding(before="", behind="", cut=False, bos=True):
    """A byte-level tokenizer that puts special tokens around a text; `cut`: saved with padding and truncation."""
    from tokenizers import processors

    tokenizer = toys.byte_level(bos=bos)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[SEP]", "[gMASK]", "<sop>"]})
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in f"{before} {behind}".split()]
    backend = tokenizer.backend_tokenizer
    if tokens:
        single = f"{before} $A {behind}".strip()
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    if cut:
        backend.enable_truncation(2)
        backend.enable_padding(length=64, pad_id=2, pad_token="<pad>")
        tokenizer.model_max_length = 2
    return tokenizer


APPENDING = {
    "EOS": {"before": "<s>", "behind": "</s>"},
    "SEP": {"before": "<s>", "behind": "[SEP]"},
    "several": {"before": "<s>", "behind": "[SEP] </s> </s>"},
    "nothing before": {"behind": "</s>"},
    "no BOS": {"behind": "</s>", "bos": False},
    "cut": {"before": "<s>", "behind": "</s>", "cut": True},
}
STRINGS = ["Once upon a time", "The fox said: ", "<s>The </s> fox", ""]


@pytest.fixture(params=APPENDING)
def appending(request):
    """(a tokenizer that puts something behind a text, the same without it)"""
    options = APPENDING[request.param]
    return adding(**options), adding(**{**options, "behind": "", "cut": False})


def test_a_policy_is_not_asked_to_write_behind_its_own_end(appending, caplog):
    tokenizer, plain = appending
    say_once.cache_clear()
    given = prompt_ids(STRINGS, tokenizer)
    assert prompt_ids(STRINGS, tokenizer) == given == prompt_ids(STRINGS, plain)
    written = list(map(list, plain(STRINGS)["input_ids"]))  # what the plain tokenizer itself makes of them
    assert given[:3] == written[:3] and given[3] == (written[3] or ([] if plain.bos_token is None else [0]))
    assert len([one for one in caplog.records if "behind a text: left out" in one.message]) == 1
    asked = {"num_generations": 2, "max_new_tokens": 8}
    assert sample(toys.llama(), tokenizer, STRINGS[:3], **asked) == sample(toys.llama(), plain, STRINGS[:3], **asked)


def test_completions_and_baselines_are_scored_behind_the_same_context(appending, model):
    """The numbers are those that the plain tokenizer gives, and by hand."""
    tokenizer, plain = appending
    prompt, text = "Once upon a time", " the fox ran."
    ids = plain(text, add_special_tokens=False)["input_ids"]
    [before] = prompt_ids([prompt], plain)
    logs = model(torch.tensor([before + ids])).logits[0].double().log_softmax(-1)
    by_hand = -sum(logs[len(before) - 1 + at, one].item() for at, one in enumerate(ids)) / len(ids)
    for kind in (tokenizer, plain):
        reward_fn = Heard(model, kind, aggregation="nested")
        of_ids = reward_fn.compute_rewards([text], [prompt], completion_ids=[[*ids, 1]], return_details=True)[1]
        assert sum(math.log(of_ids["ppls"][level]) for level in LEVELS) == pytest.approx(by_hand, rel=1e-4)
        of_text = MultiLevelPPLCalculator(kind, aggregation="nested").score_pairs(model, [(prompt, text)])
        if before[:1] == [0] or plain.bos_token is None:  # else the text stands behind BOS, as it always does
            assert np.log(of_text).sum() == pytest.approx(by_hand, rel=1e-4)


def test_the_trainer_asks_its_policy_with_those_ids(tmp_path):
    from trl import GRPOTrainer

    from mlppl.training.trainer import ResumableGRPOTrainer

    class Kept(MultiLevelPPLRewardFunction):
        def __call__(self, prompts, completions, **columns):
            seen.extend(zip(prompts, columns["prompt_ids"], strict=True))
            return super().__call__(prompts, completions, **columns)

    seen, tokenizer = [], adding(**APPENDING["EOS"])
    reward_fn = Kept(toys.llama(), tokenizer)
    trainer = grpo(ResumableGRPOTrainer, tmp_path, STRINGS[:1], reward_fn, tokenizer)
    asked, generate = [], trainer.model.generate
    trainer.model.generate = lambda **inputs: asked.append(inputs["input_ids"].tolist()) or generate(**inputs)
    trainer.train()
    given = prompt_ids(STRINGS[:1], adding("<s>"))
    assert asked == [given * 2] and seen == [(STRINGS[0], given[0])] * 2

    plain = grpo(GRPOTrainer, tmp_path, STRINGS[:1], Heard(toys.llama(), tokenizer), tokenizer)
    assert plain._tokenize_prompts(STRINGS[:1])[0][0][-1] == tokenizer.eos_token_id  # once no longer, refuse nothing
    with pytest.raises(InputError, match=r"puts </s> behind a text.*ResumableGRPOTrainer, or set .*add_eos_token"):
        plain.train()


@pytest.mark.parametrize("before", ["[gMASK] <sop>", "<s> [gMASK]", "[gMASK]"])
def test_what_a_tokenizer_puts_before_a_text_stands_before_what_is_scored(model, before):
    """ChatGLM's kind: whatever it is, a text and a completion are read behind the same ids."""
    tokenizer = adding(before, bos="<s>" in before)
    prompt, text = "Once upon a time", " the fox ran."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    [given] = prompt_ids([prompt], tokenizer)
    assert given == tokenizer(prompt)["input_ids"]
    calculator = MultiLevelPPLCalculator(tokenizer)
    of_ids = calculator.score_pairs(model, [Sampled(tuple(given), tuple(ids))])
    assert calculator.score_pairs(model, [(prompt, text)]) == pytest.approx(of_ids, rel=1e-5)
    nested = MultiLevelPPLCalculator(tokenizer, aggregation="nested")
    start, text = nested.encoder.start, "The fox ran. It fell."
    explained = nested.explain(model, text)
    for unit in explained["phrase"]:  # alone behind the same ids
        own = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = [one for one, (_, end) in zip(own["input_ids"], own["offset_mapping"], strict=True)
                  if unit["start"] < end <= unit["end"]]  # fmt: skip
        with torch.no_grad():
            logs = model(torch.tensor([[*start, *inside]])).logits[0].log_softmax(-1)
        expected = -sum(logs[len(start) - 1 + at, one].item() for at, one in enumerate(inside))
        assert unit["a"] == pytest.approx(expected, rel=1e-4)
    assert other_beginning(Baselines({}, {"target": "completion"}, "b.pkl"), prompt, calculator) is None


@pytest.mark.parametrize("tail", ["</s>", "</s>\n", "</s></s>"])
def test_a_template_that_ends_the_turn_that_it_opens_is_read_without_that_end(tail, caplog):
    say_once.cache_clear()
    ending, plain = toys.byte_level(), toys.byte_level()
    plain.chat_template = TEMPLATE
    ending.chat_template = TEMPLATE + tail.replace("\n", "{{ '\\n' }}")
    for prompt in ([USER], [USER, ASKED, TOLD], BEGUN):
        assert render_prompt(prompt, ending) == render_prompt(prompt, plain)
    assert prompt_ids([[USER], BEGUN], ending) == prompt_ids([[USER], BEGUN], plain)
    assert completion_turns([USER], SAID, ending) == completion_turns([USER], SAID, plain)
    assert len([one for one in caplog.records if "the chat template writes </s>" in one.message]) == 1


def test_an_end_that_a_template_without_an_opening_puts_behind_the_users_turn_stays():
    """DialoGPT's: the policy has learned to write behind it."""
    tokenizer = toys.byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert render_prompt([USER], tokenizer) == "Tell me about the fox.</s>"


@pytest.mark.parametrize("prompt", [BEGUN, "Once upon a time"])
def test_held_out_rewards_per_level_know_what_the_policy_was_given(prompt):
    """As in training: otherwise a begun answer, or a tokenizer that appends, would be taken for TRL's own reading."""
    tokenizer = adding(**APPENDING["EOS"])
    tokenizer.chat_template = TEMPLATE
    model = toys.llama()
    reward_fn = Heard(model, tokenizer)
    rewards = [(function, 1.0) for function in reward_fn.per_level()]
    rows = Dataset.from_list([{"prompt": prompt, "id": "a"}])
    held_out = evaluate(
        model, tokenizer, rewards, rows, scorers=None, state=object(), num_generations=2, max_new_tokens=4
    )
    assert len(held_out.completions[0]) == 2
