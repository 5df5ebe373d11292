"""Policy and scorer are two models: what is scored is what the policy's own tokenizer says that it wrote."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import story_model
import torch
import toys
from datasets import Dataset
from heard import Heard
from test_sampled import CHATS, PROMPTS, generate
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mlppl.baselines.file import Baselines
from mlppl.config import RewardConfig, Sampling
from mlppl.models import load_model
from mlppl.scoring.sampling import GivenIds, end_tokens, prompt_ids
from mlppl.scoring.tokens import Sampled
from mlppl.training.heldout import evaluate
from mlppl.training.policy import Loaded
from mlppl.training.rewards import weighted
from multi_level_ppl_trl import LEVELS, MultiLevelPPLCalculator, MultiLevelPPLRewardFunction
from train_grpo_multilevel_unsloth import make_rewards

# Those that decode a prompt to itself, so that what is written behind it can be told by hand.
FAITHFUL = ["byte_level", "llama2_like", "gemma_like", "metaspace", "metaspace_first", "unigram", "prefix_space"]
SCORERS = {"byte_level": toys.byte_level, "llama2_like": toys.llama2_like}


def ppls(reward_fn):
    """[B, 3] of the last call."""
    return np.stack([reward_fn.found["ppls"][level].numpy() for level in LEVELS], axis=1)


def levels(model, tokenizer, prompts, texts):
    """[B, 3] of texts, by the calculator, which brute force holds in test_levels.py."""
    found = MultiLevelPPLCalculator(tokenizer).compute_all_levels(model, texts, prompts)
    return np.stack([found[level].numpy() for level in LEVELS], axis=1)


def written(tokenizer, given, ids, ends=()):
    """By hand: decoded behind the prompt, without its end."""
    ids = [*given, *(ids[:-1] if ids[-1] in ends else ids)]
    before, whole = (tokenizer.decode(one, skip_special_tokens=True) for one in (given, ids))
    assert whole.startswith(before)
    return whole[len(before) :]


def text_of(tokenizer, ids):
    """As TRL decodes a completion."""
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-stories")[:2]


# --- texts -----------------------------------------------------------------------------------------------------------


def test_the_space_that_the_policys_decoder_strips_is_scored(story, tiny):
    """Glued to their prompts, completions had two to seven times the perplexity, and the reward turned around."""
    prompts = story_model.prompts()
    words = [row["prompt"].split()[7:13] for row in story_model.rows()[:24]]
    texts = [" " + " ".join(one) for one in words]
    ids = [story[1].encode(text.strip(), add_special_tokens=False) for text in texts]
    given = prompt_ids(prompts, story[1])
    assert texts == [written(story[1], before, one) for before, one in zip(given, ids, strict=True)]
    alone = [text_of(story[1], one) for one in ids]
    assert alone == [text.strip() for text in texts]
    expected = levels(*tiny, prompts, texts)
    asked = {"reward": RewardConfig(), "chat": {}, "loop_penalty": 0, "per_level": False}
    job = SimpleNamespace(baselines=None, contexts={}, **asked, guarded_prompts=lambda tokenizer: {})
    [(reward_fn, _)] = make_rewards(job, Loaded(*story), Loaded(*tiny))
    _, details = reward_fn.compute_rewards(alone, prompts, completion_ids=ids, return_details=True)
    assert np.stack(list(details["ppls"].values()), axis=1) == pytest.approx(expected, rel=1e-5)
    glued = levels(*tiny, prompts, alone)[:, 0]
    assert np.median(glued / expected[:, 0]) > 2
    # Of the text alone the policy's tokenizer says that a space may be lost, and the scorer guesses.
    _, details = reward_fn.compute_rewards(alone, prompts, return_details=True)
    guessed = np.stack(list(details["ppls"].values()), axis=1)
    assert (np.abs(guessed / expected - 1) < 1e-5).all(axis=1).sum() >= 22


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("policy", FAITHFUL)
def test_training_and_held_out_table_say_the_same_of_a_completion(policy, scorer, model):
    """Whatever the two tokenizers; ids of the one are often ids of the other, too, and mean something else there."""
    writes, reads = toys.WRITERS[policy](), SCORERS[scorer]()
    reward_fn = Heard(model, reads, policy=(model, writes))
    made = generate(model, writes, PROMPTS, seed=3)
    ids = [one for _, one, _ in made]
    reward_fn(PROMPTS, [text_of(writes, one) for one in ids], completion_ids=ids)
    found = ppls(reward_fn)
    if writes.get_vocab() != reads.get_vocab():
        ends = end_tokens(model, writes)
        texts = [written(writes, given, one, ends) for given, one, _ in made]
        assert found == pytest.approx(levels(model, reads, PROMPTS, texts), rel=1e-4, nan_ok=True)

    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    options = {"num_generations": 1, "max_new_tokens": 24, "seed": 3}
    held_out = evaluate(model, writes, [(reward_fn, 1.0)], rows, scorers=None, state=None, **options)
    there = [one for [one] in held_out.completion_ids]
    reward_fn(PROMPTS, [text_of(writes, one) for one in there], completion_ids=there)
    for level, values in zip(LEVELS, ppls(reward_fn).T, strict=True):
        mean = np.exp(np.nanmean(np.log(values)))
        assert held_out.scores[f"{level} PPL"] == pytest.approx(mean, rel=1e-5, nan_ok=True)


def test_white_space_that_a_policy_cannot_see_is_not_doubled(model):
    """Bert's kind loses the space that a prompt ends in, and its decoder writes one between words."""
    policy, scorer = toys.word_pieces(), toys.byte_level()
    ids = policy("i am", add_special_tokens=False)["input_ids"]
    reward_fn = Heard(model, scorer, policy=(model, policy))
    for prompt, text in (("The fox said: ", "i am"), ("The fox said:", " i am")):
        reward_fn([prompt], ["i am"], completion_ids=[ids])
        assert ppls(reward_fn) == pytest.approx(levels(model, scorer, [prompt], [text]), rel=1e-5)


def test_an_edited_text_is_scored_as_it_came(story, tiny, caplog):
    """Its ids are another text's."""
    prompts, texts = ["Once upon a time there was"] * 2, [" a small fox.", " a big dog."]
    ids = [story[1](text, add_special_tokens=False)["input_ids"] for text in texts]
    reward_fn = Heard(*tiny, policy=story)
    reward_fn(prompts, texts, completion_ids=ids[::-1])
    assert ppls(reward_fn) == pytest.approx(levels(*tiny, prompts, texts), rel=1e-5)
    reward_fn(prompts, texts, completion_ids=ids)
    assert len([one for one in caplog.records if "their text is scored" in one.getMessage()]) == 1


def test_several_turns_get_their_spaces_back(story, tiny):
    """What the policy said between calls of tools was decoded alone as well. The template writes the space."""
    model, tokenizer = tiny[0], load_model("tiny-stories")[1]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ' ' if m['role'] == 'assistant' and m['content'][0] != ' ' }}{{ m['content'] }}"
        "{% endfor %}"
    )
    prompt = [{"role": "user", "content": "Once upon a time there was a little girl named"}]
    turns = {"assistant": "Lily.", "tool": " She liked"}
    completion = [*({"role": role, "content": text} for role, text in turns.items())]
    completion.append({"role": "assistant", "content": "to play"})
    spaced = [{**one, "content": " " + one["content"].strip()} for one in completion]
    reward_fn = Heard(model, tokenizer, policy=story)
    reward_fn([prompt], [completion])
    assert ppls(reward_fn) == pytest.approx(levels(model, tokenizer, [prompt], [spaced]), rel=1e-5)


def test_a_message_begins_where_the_scorers_template_lets_it(model):
    """Llama 2's answers begin with the space that its own template leaves out, behind the line break of another's."""
    policy, scorer = toys.llama2_like(), toys.byte_level()
    policy.chat_template = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    scorer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    reward_fn = Heard(model, scorer, policy=(None, policy))
    ids = policy("the fox ran", add_special_tokens=False)["input_ids"]
    reward_fn(CHATS[:1], [[{"role": "assistant", "content": "the fox ran"}]], completion_ids=[ids])
    assert ppls(reward_fn) == pytest.approx(levels(model, scorer, CHATS[:1], ["the fox ran"]), rel=1e-5)


@pytest.mark.parametrize("more", [{}, {"reasoning_content": "It fell."}])
@pytest.mark.parametrize("schema", [None, {"type": "object"}])
def test_an_edited_message_is_scored_as_it_came(model, schema, more):
    """Cut to a part of what its ids say. Where the trainer parses messages, the rest is what was thought."""
    tokenizer = toys.byte_level(chat=True)
    tokenizer.response_schema = schema
    ids = tokenizer(" a small fox ran. It fell.")["input_ids"]
    reward_fn = Heard(model, tokenizer)
    said = [[{"role": "assistant", "content": " a small fox ran.", **more}]]
    reward_fn(CHATS[:1], said, completion_ids=[ids])
    if schema or more:
        pair = Sampled(tuple(prompt_ids(CHATS[:1], tokenizer)[0]), tuple(ids))
        expected = reward_fn.calculator.score_pairs(model, [pair])
    else:
        expected = levels(model, tokenizer, CHATS[:1], [" a small fox ran."])
    assert ppls(reward_fn) == pytest.approx(expected, rel=1e-5)


# --- ids -------------------------------------------------------------------------------------------------------------


def test_ids_of_another_loaded_copy_of_the_tokenizer_are_scored_as_they_are(model):
    """A policy whose tokenizer was loaded apart, as with --full_finetuning."""
    one, other = toys.byte_level(), toys.byte_level()
    letters = one.convert_tokens_to_ids(["Ġ", "s", "a", "i", "d"])
    reward_fn = Heard(model, one, policy=(model, other))
    given = one("The fox")["input_ids"]
    for kind in (list, np.array, torch.tensor):
        for before in (None, kind([given])):
            pairs, _ = reward_fn.written(["The fox"], [" said"], kind([letters]), before)
            assert pairs == [Sampled(tuple(given), tuple(letters))]


def with_chat_tokens(chat_template=True):
    tokenizer = toys.byte_level(chat=chat_template)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<|end|>"], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("rows", ["as many as tokens", "padded"])
@pytest.mark.parametrize("told", [True, False])
def test_a_scorer_without_the_policys_chat_tokens_reads_the_text(rows, told):
    """It ended in an IndexError, or, with rows to spare, the scorer read another prompt."""
    policy, scorer = with_chat_tokens(), toys.byte_level(chat=True)
    size = len(scorer) if rows == "as many as tokens" else toys.VOCABULARY
    model, text = toys.llama(vocab_size=size), " a small fox ran."
    ids = policy(text, add_special_tokens=False)["input_ids"]
    [given] = prompt_ids(CHATS[:1], policy)
    assert max(given) >= len(scorer)
    reward_fn = Heard(model, scorer, policy=(toys.llama(), policy) if told else None)
    said = [[{"role": "assistant", "content": text}]]
    reward_fn(CHATS[:1], said, completion_ids=[[*ids, policy.eos_token_id]], prompt_ids=[given])
    assert ppls(reward_fn) == pytest.approx(levels(model, scorer, CHATS[:1], [text]), rel=1e-5)


@pytest.mark.parametrize("told", ["policy", "trainer", None])
def test_ids_that_are_other_chat_tokens_of_the_scorer_are_not_read(model, told):
    """As many of them at the same ids: the scorer read <|reserved 0|> for <|user|>."""
    policy, scorer = with_chat_tokens(), toys.byte_level(chat=True)
    scorer.add_tokens([f"<|reserved {index}|>" for index in range(3)], special_tokens=True)
    [given], text = prompt_ids(CHATS[:1], policy), " a small fox ran."
    given = GivenIds(given, policy) if told == "trainer" else given
    ids = policy(text, add_special_tokens=False)["input_ids"]
    assert scorer.decode(ids) == text
    reward_fn = Heard(model, scorer, policy=(None, policy) if told == "policy" else None)
    said = [[{"role": "assistant", "content": text}]]
    reward_fn(CHATS[:1], said, completion_ids=[ids], prompt_ids=[given])
    assert ppls(reward_fn) == pytest.approx(levels(model, scorer, CHATS[:1], [text]), rel=1e-5)


@pytest.mark.parametrize("part", ["merges", "normalizer"])
def test_ids_of_a_tokenizer_that_divides_words_otherwise_are_not_the_scorers(model, part):
    """The same vocabulary, and the same ids of the prompt; other ones of the completion."""
    policy = toys.byte_level()
    whole = json.loads(policy.backend_tokenizer.to_str())
    if part == "merges":
        del whole["model"]["merges"][60:]
    else:
        whole["normalizer"] = {"type": "Lowercase"}
    scorer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(whole)), bos_token="<s>", eos_token="</s>"
    )
    prompt, text = "a", " They walked together, slowly."
    ids = policy(text, add_special_tokens=False)["input_ids"]
    assert scorer.get_vocab() == policy.get_vocab()
    assert prompt_ids([prompt], scorer) == prompt_ids([prompt], policy)
    assert scorer(text, add_special_tokens=False)["input_ids"] != ids
    reward_fn = Heard(model, scorer, policy=(None, policy))
    reward_fn([prompt], [text], completion_ids=[ids])
    assert ppls(reward_fn) == pytest.approx(levels(model, scorer, [prompt], [text]), rel=1e-5)


def test_an_id_that_the_scorer_has_no_row_for_is_not_looked_up():
    """The policy's end of turn, of which the reward was not told."""
    policy, scorer = with_chat_tokens(), toys.byte_level()
    model, text = toys.llama(vocab_size=len(scorer)), " a small fox ran."
    ids = [*policy(text, add_special_tokens=False)["input_ids"], policy.convert_tokens_to_ids("<|end|>")]
    reward_fn = Heard(model, scorer)
    reward_fn(["The fox"], [text], completion_ids=[ids])
    assert ppls(reward_fn) == pytest.approx(levels(model, scorer, ["The fox"], [text]), rel=1e-5)


def test_behind_another_chat_template_the_text_is_scored(model):
    """The same vocabulary; the prompt's ids are not those that the scorer's template makes."""
    policy, scorer = toys.byte_level(chat=True), toys.byte_level(chat=True)
    scorer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    ids = policy(" ran home.", add_special_tokens=False)["input_ids"]
    reward_fn = Heard(model, scorer, policy=(model, policy))
    for given in (None, prompt_ids(CHATS[:1], policy)):
        reward_fn.compute_rewards([" ran home."], CHATS[:1], completion_ids=[ids], prompt_ids=given)
        assert ppls(reward_fn) == pytest.approx(levels(model, scorer, CHATS[:1], [" ran home."]), rel=1e-5)


@pytest.mark.parametrize("scorer", [toys.byte_level, toys.normalizing])
def test_baselines_of_texts_are_said_to_begin_elsewhere_only_where_ids_are_scored(scorer, model, capsys):
    """A text that is scored stands behind BOS, as those of the baselines did."""
    policy = toys.byte_level()
    made = Baselines({"a": dict.fromkeys(LEVELS, 1.0)}, {"target": "completion", "generated": None}, "b.json")
    config = SimpleNamespace(multi_objective_aggregation="sum_then_normalize", reward_weights=None)
    rows, reward = {"prompt": ["The fox"]}, RewardConfig(allow_baseline_mismatch=True)
    job = SimpleNamespace(
        baselines=made, config=config, reward=reward, train_rows=rows, column_meta=None, sampling=Sampling()
    )
    weighted(job, [(Heard(model, scorer(), policy=(model, policy)), 1.0)])
    assert ("behind <s>" in capsys.readouterr().err) == (scorer is toys.byte_level)


# --- ends ------------------------------------------------------------------------------------------------------------


def total(reward_fn, prompt, ids, text):
    [pair], _ = reward_fn.written([prompt], [text], [ids])
    return sum(unit["surprisal"] for unit in reward_fn.calculator.explain_pair(reward_fn.model, pair)["word"])


def by_hand(model, given, ids):
    with torch.no_grad():
        logits = model(torch.tensor([given + ids])).logits[0].log_softmax(-1)
    return -sum(logits[len(given) - 1 + index, token].item() for index, token in enumerate(ids))


@pytest.mark.parametrize("told", [True, False])
def test_what_ends_a_text_of_the_scorer_does_not_end_the_policys(tokenizer, told):
    """The scorer's generation settings name the comma; the policy goes on behind one."""
    scorer, policy = toys.llama(), toys.llama()
    comma = tokenizer.convert_tokens_to_ids(",")
    scorer.generation_config.eos_token_id = [tokenizer.eos_token_id, comma]
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    text = " ran, and slept"
    given, ids = tokenizer("The fox")["input_ids"], tokenizer(text)["input_ids"]
    assert comma in ids
    reward_fn = Heard(scorer, tokenizer, policy=(policy, tokenizer) if told else None)
    assert total(reward_fn, "The fox", ids, text) == pytest.approx(by_hand(scorer, given, ids), rel=1e-5)


def test_the_policys_generation_settings_end_a_completion(tokenizer):
    """Not special, such as Gemma's <end_of_turn>: it ends the completion and is not paid for."""
    scorer, policy = toys.llama(), toys.llama()
    dot = tokenizer.convert_tokens_to_ids(".")
    policy.generation_config.eos_token_id = [tokenizer.eos_token_id, dot]
    given, ids = tokenizer("The fox")["input_ids"], tokenizer(" ran")["input_ids"]
    reward_fn = Heard(scorer, tokenizer, policy=(policy, tokenizer))
    assert total(reward_fn, "The fox", [*ids, dot], " ran.") == pytest.approx(by_hand(scorer, given, ids), rel=1e-5)
    # Also under DDP and its kind; and where the policy is the scorer, its own settings say so.
    wrapped = Heard(scorer, tokenizer, policy=(torch.nn.DataParallel(policy), tokenizer))
    assert total(wrapped, "The fox", [*ids, dot], " ran.") == pytest.approx(by_hand(scorer, given, ids), rel=1e-5)
    reward_fn = Heard(policy, tokenizer)
    assert total(reward_fn, "The fox", [*ids, dot], " ran.") == pytest.approx(by_hand(policy, given, ids), rel=1e-5)


# --- in training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_level", [False, True])
def test_a_real_step_of_training_scores_what_the_policy_wrote(story, tiny, tmp_path, caplog, per_level):
    """TRL's ids and TRL's texts; by hand, the policy's decoding behind its prompt."""
    import copy

    from trl import GRPOConfig

    from mlppl.training.trainer import ResumableGRPOTrainer

    calls = []

    policy = copy.deepcopy(story[0]), story[1]
    prompts = story_model.prompts()[:4]
    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=8, num_generations=2,
        report_to="none", max_steps=2, max_completion_length=12, save_strategy="no",
    )  # fmt: skip
    reward_fn = MultiLevelPPLRewardFunction(*tiny, policy=policy)
    reward_fn.listen(calls.append)
    trainer = ResumableGRPOTrainer(
        model=policy[0], args=config, reward_funcs=reward_fn.per_level() if per_level else [reward_fn],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]), processing_class=policy[1],
    )  # fmt: skip
    trainer.train()
    assert len(calls) == 2  # of several levels one tells for all
    assert sum("their text is scored" in one.getMessage() for one in caplog.records) == 1
    glued = 0
    for call in calls:
        prompts, ids, found = call.prompts, call.columns["completion_ids"], call.measured.perplexities
        given = prompt_ids(prompts, policy[1])
        ends = [policy[1].eos_token_id]
        texts = [written(policy[1], before, row, ends) for before, row in zip(given, ids, strict=True)]
        assert found == pytest.approx(levels(*tiny, prompts, texts), rel=1e-5, nan_ok=True)
        glued += sum(text != one for text, one in zip(texts, call.texts, strict=True))
    assert glued >= 8
