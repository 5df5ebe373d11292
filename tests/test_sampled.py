"""What is scored is what was sampled: ids, whatever text they decode to."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import story_model
import torch
import toys
from datasets import Dataset
from heard import Heard
from hypothesis import given, settings
from hypothesis import strategies as st

import compute_baselines_trl
from mlppl.baselines.file import Baselines
from mlppl.scoring.sampling import end_tokens, prompt_ids, sample
from mlppl.scoring.tokens import Decoding, Sampled, TextEncoder
from mlppl.training.heldout import evaluate, kl_scorers
from mlppl.training.rewards import other_beginning
from multi_level_ppl_trl import LEVELS, MultiLevelPPLCalculator

PROMPTS = ["Once upon a time", "The fox said: ", "They walked home together,"]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
KINDS = {name: toys.WRITERS[name] for name in toys.WRITERS} | {
    "byte_level_chat": lambda: toys.byte_level(chat=True),
    "llama2_like_chat": lambda: toys.llama2_like(chat=True),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    tokenizer = KINDS[request.param]()
    return tokenizer, CHATS if tokenizer.chat_template else PROMPTS


def generate(model, tokenizer, prompts, seed, length=24):
    """As GRPOTrainer samples: ids given, ids written up to and with the end token, and their log-probability."""
    given = prompt_ids(prompts, tokenizer)
    pad, ends = tokenizer.pad_token_id or 0, end_tokens(model, tokenizer)
    longest = max(map(len, given))
    torch.manual_seed(seed)
    output = model.generate(
        torch.tensor([[pad] * (longest - len(ids)) + ids for ids in given]),
        attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in given]),
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length,
        pad_token_id=pad, eos_token_id=ends, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    found = []
    for row, ids in enumerate(output.sequences[:, longest:].tolist()):
        size = next((index for index, token in enumerate(ids) if token in ends), len(ids))
        logits = torch.stack([step[row] for step in output.logits[:size]] or [torch.zeros(1)])
        logps = logits.log_softmax(-1)[range(size), ids[:size]] if size else torch.zeros(0)
        found.append((given[row], ids[: size + 1], logps.double()))
    return found


def as_trl(tokenizer, prompts, written):
    """What GRPOTrainer calls a reward function with."""
    texts = tokenizer.batch_decode([ids for _, ids, _ in written], skip_special_tokens=True)
    if not isinstance(prompts[0], str):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    return {"prompts": prompts, "completions": texts, "completion_ids": [ids for _, ids, _ in written]}


def total(reward_fn, pair):
    return sum(unit["surprisal"] for unit in reward_fn.calculator.explain_pair(reward_fn.model, pair)["word"])


def test_the_total_surprisal_is_minus_the_log_probability_of_the_sampling(kind, model):
    """For every kind of tokenizer, the end token apart; and the levels are those of these tokens."""
    tokenizer, prompts = kind
    reward_fn = Heard(model, tokenizer)
    compared = 0
    for seed in range(2):
        written = generate(model, tokenizer, prompts, seed)
        call = as_trl(tokenizer, prompts, written)
        pairs, _ = reward_fn.written(prompts, call["completions"], call["completion_ids"])
        reward_fn(**call)
        ppls = reward_fn.found["ppls"]
        for row, ((_, _, logps), pair) in enumerate(zip(written, pairs, strict=True)):
            assert isinstance(pair, Sampled)
            [(encoded, text)] = TextEncoder(tokenizer).encode_sampled([pair])
            if not text.strip():
                assert math.isnan(ppls["word"][row])
                continue
            compared += 1
            assert total(reward_fn, pair) == pytest.approx(-logps.sum().item(), rel=1e-4)
            assert len(encoded.positions) == len(logps)
            one = MultiLevelPPLCalculator(tokenizer, max_phrase_words=10**6)
            sentences = one.explain_pair(model, pair)["sentence"]
            assert sum(unit["n_tokens"] for unit in sentences) == len(logps)
            rates = [unit["surprisal"] / unit["n_tokens"] for unit in sentences]
            assert ppls["sentence"][row].item() == pytest.approx(math.exp(np.mean(rates)), rel=1e-4)
    assert compared >= 4


@settings(max_examples=15)
@given(data=st.data())
def test_where_text_and_ids_agree_the_numbers_are_those_of_the_text(kind, data):
    """Ids that the tokenizer makes of a text, cut anywhere: the same ids, scored tokens and characters."""
    tokenizer, _ = kind
    encoder, backend = TextEncoder(tokenizer), tokenizer.backend_tokenizer
    text = data.draw(st.sampled_from([*toys.SENTENCES, " ".join(toys.SENTENCES)]) | toys.texts)
    ids = backend.encode(text, add_special_tokens=False).ids
    if backend.decode(ids, skip_special_tokens=True) != text or len(ids) < 2:
        return
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    cut = data.draw(st.integers(1, len(ids) - 1))
    context = backend.decode(ids[:cut], skip_special_tokens=True)
    border = backend.encode(context, add_special_tokens=False).ids == ids[:cut]  # no token straddles it
    if not (border and text.startswith(context) and text[len(context) :].strip()):
        return
    [(found, target)] = encoder.encode_sampled([Sampled((*bos, *ids[:cut]), tuple(ids[cut:]))])
    assert target == text[len(context) :]
    [expected] = encoder.encode([context], [target])
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.positions.tolist() == expected.positions.tolist()
    assert found.chars.tolist() == expected.chars.tolist()


@settings(max_examples=15)
@given(data=st.data())
def test_a_token_begins_where_the_text_before_it_ceases_to_be_that_of_the_whole(kind, data):
    """Any ids at all: cut characters, special tokens inside, ids beyond the vocabulary. The rule, in slow."""
    tokenizer, _ = kind
    encoder, backend = TextEncoder(tokenizer), tokenizer.backend_tokenizer
    decode = lambda ids: backend.decode(ids, skip_special_tokens=True)  # noqa: E731
    prompt = backend.encode(data.draw(st.sampled_from(["", *PROMPTS])), add_special_tokens=False).ids
    ids = data.draw(st.lists(st.integers(0, toys.VOCABULARY - 1), max_size=12))
    whole = decode(prompt + ids)
    border = common(decode(prompt), whole)
    slow = [max(0, common(decode(prompt + ids[:size]), whole) - border) for size in range(len(ids))]
    [(text, starts)] = encoder.decoding.behind([prompt], [ids])
    assert text == whole[border:]
    assert starts.tolist() == np.maximum.accumulate([0, *slow])[1:].tolist()


@pytest.mark.parametrize("name", ["gpt2_like", "metaspace", "word_pieces", "whole_words"])
def test_what_decodes_word_by_word_is_not_decoded_again_before_every_token(name):
    """Of a vocabulary of whole words every beginning was decoded anew: 2 of the 3 seconds that a reward took."""
    counted = Counted(toys.WRITERS[name]().backend_tokenizer)
    decoding = Decoding(counted)
    ids = counted.encode(" ".join(toys.SENTENCES[:3]), add_special_tokens=False).ids
    counted.single = 0
    decoding.behind([ids[:5]], [ids[5:]])
    assert counted.single < len(ids) / 4


def common(a: str, b: str) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# --- what a text does not tell ---------------------------------------------------------------------------------------


def surprisals(model, prompt, completion):
    """nats, of each token: one forward pass, by hand."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    return [-logits[len(prompt) - 1 + index, token].item() for index, token in enumerate(completion)]


def scored(model, tokenizer, prompt, completion, **columns):
    """(total in nats, units) of a completion, called as TRL does, with nothing but the text of its own ids."""
    reward_fn = Heard(model, tokenizer)
    text = tokenizer.decode(completion, skip_special_tokens=True)
    pairs, _ = reward_fn.written([prompt], [text], [completion], **columns)
    [values] = reward_fn.calculator.score_pairs(model, pairs)
    reward_fn([prompt], [text], completion_ids=[completion])
    if not columns:
        assert [reward_fn.found["ppls"][level][0].item() for level in LEVELS] == values.tolist()
    explained = reward_fn.calculator.explain_pair(model, pairs[0])
    return sum(unit["surprisal"] for unit in explained["word"]), [unit["text"] for unit in explained["word"]]


def test_the_first_space_of_a_completion_is_not_lost(model):
    tokenizer = toys.llama2_like()
    prompt, completion = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Once upon a", "time there")
    )
    assert tokenizer.decode(completion) == "time there"  # glued to its prompt: atime
    total, words = scored(model, tokenizer, "Once upon a", completion)
    assert total == pytest.approx(sum(surprisals(model, [1, *prompt], completion)), rel=1e-5)
    assert words == [" time ", "there"]


def test_a_completion_may_end_inside_a_character(model, tokenizer):
    given, ids = tokenizer("The fox")["input_ids"], tokenizer(" said 中")["input_ids"][:-1]
    assert tokenizer.decode(ids).endswith("\ufffd")
    total, words = scored(model, tokenizer, "The fox", ids)
    assert total == pytest.approx(sum(surprisals(model, given, ids)), rel=1e-5)
    assert words == [" said \ufffd"]


def test_every_sampled_token_is_paid_for_special_ones_too(model, tokenizer):
    """Up to the end token, which is not; what stands behind that was never sampled."""
    given, said, ran = (tokenizer(text)["input_ids"] for text in ("The fox", " said", " ran"))
    inside = [*said, tokenizer.bos_token_id, *ran]
    total, words = scored(model, tokenizer, "The fox", [*inside, tokenizer.eos_token_id])
    assert total == pytest.approx(sum(surprisals(model, given, inside)), rel=1e-5)
    assert words == [" said ", "ran"]


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("special", ["<s>", "<x>"])
def test_a_special_token_that_is_no_end_cuts_nothing_off(special, ended):
    """Of "said <x> ran <x>" only "said" was paid for, and "<x> ran <x>" was blank. What trails is left out."""
    tokenizer, model = toys.byte_level(), toys.llama()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.add_tokens(["<x>"], special_tokens=True)
    x, end = tokenizer.convert_tokens_to_ids(special), [tokenizer.eos_token_id] * ended
    given, said, ran = (tokenizer(text)["input_ids"] for text in ("The fox", " said", " ran"))
    for written, units in (
        ([*said, x, *ran], [" said ", "ran"]),
        ([x, *ran], [" ran"]),
        ([*said, x, x, x, *ran], [" said ", "ran"]),
        (said, [" said"]),
    ):
        for trailing in ([], [x], [x, x]):
            total, words = scored(model, tokenizer, "The fox", [*written, *trailing, *end])
            assert total == pytest.approx(sum(surprisals(model, given, written)), rel=1e-5)
            assert words == units
    baselines = {"The fox": dict.fromkeys(LEVELS, 1e9)}
    for blank, reward in (([x, x], 0), ([], 0), ([x, *ran, x], 1)):
        text = tokenizer.decode(blank, skip_special_tokens=True)
        found = Heard(model, tokenizer, baselines)(["The fox"], [text], completion_ids=[[*blank, *end]])
        assert found == [pytest.approx(reward)]


def test_any_ids_are_paid_for_up_to_what_trails(model, tokenizer):
    """Ids drawn at random, specials often among them, against one pass a completion and the rule in slow."""
    draw, given = np.random.default_rng(0), tokenizer("The fox")["input_ids"]
    special, ends = tokenizer.all_special_ids, end_tokens(model, tokenizer)
    vocabulary = [*special, *special, *range(60, 80), *range(380, 396)]
    drawn = [draw.choice(vocabulary, size=draw.integers(1, 20)).tolist() for _ in range(60)]
    expected, kept = [], []
    for ids in drawn:
        first = next((index for index, one in enumerate(ids) if one == tokenizer.eos_token_id), len(ids))
        ids = ids[:first]
        while ids and ids[-1] in {*special, *ends}:
            ids.pop()
        kept.append(ids)
        expected.append(np.mean(surprisals(model, given, ids)) if ids else math.nan)
    reward_fn = Heard(model, tokenizer, aggregation="nested")
    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    upto = [tokenizer.decode(ids, skip_special_tokens=True) for ids in kept]
    pairs, _ = reward_fn.written(["The fox"] * 60, upto, kept)
    found = np.log(reward_fn.calculator.score_pairs(model, pairs).prod(axis=1))
    blank = np.array([not text.strip() for text in upto])
    assert found[~blank] == pytest.approx(np.array(expected)[~blank], rel=1e-5) and np.isnan(found[blank]).all()
    reward_fn(["The fox"] * 60, texts, completion_ids=drawn)
    again = np.log(np.prod([reward_fn.found["ppls"][level].numpy() for level in LEVELS], axis=0))
    assert again == pytest.approx(found, rel=1e-5, nan_ok=True)


def test_ids_need_not_be_what_the_tokenizer_makes_of_their_text(model, tokenizer):
    given = tokenizer("The f")["input_ids"]
    letters = tokenizer.convert_tokens_to_ids(list("ox")) + tokenizer.convert_tokens_to_ids(["Ġ", "s", "a", "i", "d"])
    assert len(tokenizer("ox said")["input_ids"]) < len(letters)
    total, words = scored(model, tokenizer, "The f", letters)
    assert total == pytest.approx(sum(surprisals(model, given, letters)), rel=1e-5)
    assert words == ["ox ", "said"]


def test_two_completions_of_one_text_do_not_share_a_number(model, tokenizer):
    """The cache knows ids; and the same ids behind another prompt are another completion."""
    short, long = tokenizer(" said")["input_ids"], tokenizer.convert_tokens_to_ids(["Ġ", "s", "a", "i", "d"])
    assert tokenizer.decode(short) == tokenizer.decode(long)
    reward_fn = Heard(model, tokenizer)
    call = {
        "prompts": ["The fox"] * 2 + ["A fox"],
        "completions": [" said"] * 3,
        "completion_ids": [short, long, short],
    }
    expected = [
        math.exp(np.mean(surprisals(model, tokenizer(prompt)["input_ids"], ids)))
        for prompt, ids in zip(call["prompts"], call["completion_ids"], strict=True)
    ]
    for _ in range(2):
        reward_fn(**call)
        assert reward_fn.found["ppls"]["word"].tolist() == pytest.approx(expected, rel=1e-5)
    assert len(set(np.round(expected, 3))) == len(reward_fn.cache) == 3


def test_prompts_that_were_cut_on_the_left_are_given_as_ids(model, tokenizer):
    given, ids = tokenizer("Once upon a time")["input_ids"][-2:], tokenizer(" there")["input_ids"]
    total, _ = scored(model, tokenizer, "Once upon a time", ids, given_ids=[given])
    assert total == pytest.approx(sum(surprisals(model, given, ids)), rel=1e-5)
    reward_fn = Heard(model, tokenizer)
    reward_fn(["Once upon a time"], [" there"], completion_ids=[ids], prompt_ids=[given])
    assert reward_fn.found["ppls"]["word"].item() == pytest.approx(math.exp(total / len(ids)), rel=1e-5)


def test_a_template_that_writes_bos_gives_the_ids_that_the_policy_got(model):
    tokenizer = toys.llama2_like(chat=True)
    given = tokenizer.apply_chat_template(CHATS[0], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert given.count(tokenizer.bos_token_id) == 1
    ids = tokenizer("The fox", add_special_tokens=False)["input_ids"]
    total, _ = scored(model, tokenizer, CHATS[0], ids)
    assert total == pytest.approx(sum(surprisals(model, given, ids)), rel=1e-5)


@pytest.mark.parametrize("ids", [[], [1], [1, 5, 6]])
def test_nothing_written_earns_nothing(model, tokenizer, ids):
    assert tokenizer.eos_token_id == 1
    reward_fn = Heard(model, tokenizer, {"x": dict.fromkeys(LEVELS, 1e9)})
    text = tokenizer.decode(ids[:1], skip_special_tokens=True)
    assert reward_fn(["The fox"], [text], completion_ids=[ids[:1]], id=["x"]) == [0]
    reward_fn(["The fox"], [tokenizer.decode(ids, skip_special_tokens=True)], completion_ids=[ids], id=["x"])
    assert math.isnan(reward_fn.found["ppls"]["word"][0])  # what follows an end token was not sampled


def test_no_completion_has_no_reward(model, tokenizer):
    reward_fn = Heard(model, tokenizer)
    assert reward_fn([], []) == reward_fn([], [], completion_ids=[]) == []


def test_an_empty_completion_is_none_of_its_neighbours(model, tokenizer):
    reward_fn = Heard(model, tokenizer)
    ids = [tokenizer(text)["input_ids"] for text in (" said", "", " ran home", "")]
    reward_fn(["The fox"] * 4, [" said", "", " ran home", ""], completion_ids=ids)
    given = tokenizer("The fox")["input_ids"]
    expected = [math.exp(np.mean(surprisals(model, given, one))) if one else math.nan for one in ids]
    one_unit = MultiLevelPPLCalculator(tokenizer).explain_pair(model, Sampled(tuple(given), tuple(ids[2])))
    assert len(one_unit["sentence"]) == 1
    assert reward_fn.found["ppls"]["sentence"].tolist() == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_ids_of_another_tokenizer_are_not_scored(model, tokenizer, caplog):
    """A scorer that is another model: the text is all that both read, and the log says so once."""
    reward_fn = Heard(model, tokenizer)
    for _ in range(2):
        reward_fn(["The fox"], [" said"], completion_ids=[[7, 8, 9]])
    alone = Heard(model, tokenizer)
    alone(["The fox"], [" said"])
    assert reward_fn.found["ppls"]["word"].tolist() == alone.found["ppls"]["word"].tolist()
    assert len([one for one in caplog.records if "their text is scored" in one.getMessage()]) == 1


def test_a_reference_follows_on_the_text_behind_its_prompt(model):
    """Not "atime": the completion that leads up to it keeps its space."""
    tokenizer = toys.llama2_like()
    ids = tokenizer("time", add_special_tokens=False)["input_ids"]
    reward_fn = Heard(model, tokenizer, target="reference")
    reward_fn(["Once upon a"], ["time"], completion_ids=[[*ids, tokenizer.eos_token_id]], reference=[" there was"])
    expected = reward_fn.calculator.compute_all_levels(model, " there was", "Once upon a time")
    assert reward_fn.found["ppls"]["word"].item() == pytest.approx(expected["word"])


# --- what is sampled here --------------------------------------------------------------------------------------------


def test_our_own_samples_are_ids_and_their_text_keeps_its_space(kind, model):
    tokenizer, prompts = kind
    ends = end_tokens(model, tokenizer)
    reward_fn = Heard(model, tokenizer)
    groups = sample(model, tokenizer, prompts, num_generations=2, max_new_tokens=12)
    for prompt, before, group in zip(prompts, prompt_ids(prompts, tokenizer), groups, strict=True):
        for one in group:
            assert one.prompt_ids == before and not set(one.written) & set(ends)
            assert one.ids in (one.written, [*one.written, *one.ids[-1:]]) and set(one.ids[len(one.written) :]) <= set(
                ends
            )
            alone = tokenizer.decode(one.written, skip_special_tokens=True)
            whole = tokenizer.decode(before + one.written, skip_special_tokens=True)
            assert one.text in (whole.removeprefix(tokenizer.decode(before, skip_special_tokens=True)), alone)
            pairs, _ = reward_fn.written([prompt], [one.text], [one.ids])
            assert pairs == [Sampled(tuple(before), tuple(one.written))]


def test_a_tokenizer_without_a_pad_token_samples_as_well(model):
    """GPT-2's. Padding is masked, whatever token stands for it."""
    bare, padded = toys.byte_level(pad=False), toys.byte_level()
    assert bare.pad_token_id is None
    assert sample(model, bare, PROMPTS, max_new_tokens=8) == sample(model, padded, PROMPTS, max_new_tokens=8)


# --- a model that has learned to write, with a SentencePiece tokenizer -----------------------------------------------


STORY_PROMPTS = story_model.prompts()


def test_a_trained_models_completions_are_not_glued_to_their_prompts(story):
    """Called as TRL does; or with their text alone, to which the space is given back; or glued, as it must not be."""
    model, tokenizer = story
    assert TextEncoder(tokenizer).decoding.loses_a_space
    written = generate(model, tokenizer, STORY_PROMPTS, seed=1)
    call = as_trl(tokenizer, STORY_PROMPTS, written)
    expected = [-logps.sum().item() for _, _, logps in written]
    reward_fn = Heard(model, tokenizer)
    pairs, texts = reward_fn.written(STORY_PROMPTS, call["completions"], call["completion_ids"])
    assert [total(reward_fn, pair) for pair in pairs] == pytest.approx(expected, rel=1e-4)

    of_text, restored = reward_fn.written(STORY_PROMPTS, call["completions"])
    lost = [row for row, text in enumerate(texts) if text[0] == " "]
    assert len(lost) >= 8 and len(texts) - len(lost) >= 4  # such as a comma, which gets none
    assert sum(a == b for a, b in zip(restored, texts, strict=True)) >= 22  # of a few, the other reading is likelier
    glued = list(zip(STORY_PROMPTS, call["completions"], strict=True))
    of_restored, of_glued = (sum(total(reward_fn, pairs[row]) for row in lost) for pairs in (of_text, glued))
    assert of_glued - of_restored > 0.5 * len(lost)  # nats


def test_held_out_numbers_and_own_baselines_are_those_of_the_sampling(story, tmp_path):
    """The held-out table's perplexities and KL, and compute_baselines --generate, are of the ids that were drawn."""
    model, tokenizer = story
    rows = Dataset.from_list([{"prompt": prompt, "id": str(n)} for n, prompt in enumerate(STORY_PROMPTS)])
    options = {"num_generations": 2, "max_new_tokens": 12, "seed": 3}
    groups = sample(model, tokenizer, STORY_PROMPTS, **options)
    levels = MultiLevelPPLCalculator(tokenizer).score_pairs(
        model, [Sampled(tuple(one.prompt_ids), tuple(one.written)) for group in groups for one in group]
    )
    reward_fn = Heard(model, tokenizer)
    run = {"scorers": kl_scorers(model, copy.deepcopy(model)), "state": None, **options}
    held_out = evaluate(model, tokenizer, [(reward_fn, 1.0)], rows, **run)
    assert held_out.completion_ids == [[one.ids for one in group] for group in groups]
    assert held_out.scores["KL"] == 0
    # Nothing was trained, so nothing is gained, zero-shot baselines or not.
    assert evaluate(model, tokenizer, [(reward_fn, 1.0)], rows, **run) == held_out
    # A prompt's baseline is the mean of its completions: one of two is better by as much as the other is worse.
    assert held_out.scores["reward"] > 0.1 and abs(held_out.scores["word improvement %"]) < 1e-9
    for level, values in zip(LEVELS, levels.T, strict=True):
        assert held_out.scores[f"{level} PPL"] == pytest.approx(np.exp(np.nanmean(np.log(values))))

    folder, baselines = tmp_path / "model", tmp_path / "baselines.json"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "rows.json").write_text(json.dumps(rows.to_list()))
    assert compute_baselines_trl.main([
        "--model_name", str(folder), "--dataset_name", str(tmp_path / "rows.json"), "--generate", "2", "--seed", "3",
        "--max_new_tokens", "12", "--output_path", str(baselines),
    ]) == 0  # fmt: skip
    found = json.loads(baselines.read_text())
    for row, (one, two) in enumerate(levels.reshape(-1, 2, 3)):
        assert [found[str(row)][level] for level in LEVELS] == pytest.approx(((one + two) / 2).tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "meta", "said"),
    [
        (toys.byte_level, "The fox", {"target": "completion", "generated": None}, True),
        (toys.byte_level, "The fox", {"target": "completion", "generated": {"generate": 4}}, False),
        (toys.byte_level, "The fox", {"target": "reference", "generated": None}, False),
        (toys.byte_level, "The fox", {}, False),  # a dict without a meta file
        (functools.partial(toys.byte_level, bos=False), "The fox", {"target": "completion"}, False),
        (functools.partial(toys.byte_level, chat=True), CHATS[0], {"target": "completion"}, False),
        (toys.llama2_like, "The fox", {"target": "completion", "generated": None}, False),
    ],
)
def test_baselines_behind_a_bos_token_that_the_policy_is_not_given_are_named(tokenizer, prompt, meta, said):
    calculator = MultiLevelPPLCalculator(tokenizer())
    notice = other_beginning(Baselines({}, meta, "b.pkl"), prompt, calculator)
    assert (notice is not None) == said
    if said:
        assert notice.startswith("b.pkl: these baselines are of texts behind <s>") and "--generate 4" in notice


@pytest.mark.parametrize("without_chat", [False, True])
def test_a_chat_that_is_read_as_text_stands_behind_bos_as_the_baselines_do(without_chat):
    tokenizer = toys.byte_level(chat=True)
    tokenizer.chat_template = "{% for one in messages %}{{ one.content }}{% endfor %}"  # which writes no BOS
    calculator = MultiLevelPPLCalculator(tokenizer, score_without_chat=without_chat)
    made = Baselines({}, {"target": "completion", "generated": None}, "b.pkl")
    assert (other_beginning(made, CHATS[0], calculator) is None) == without_chat


def test_the_end_token_of_a_policy_that_is_another_model_is_no_text():
    """A chat model that ends with <|eot|>, and its base model as scorer, which ends with another token."""
    tokenizer, model = toys.byte_level(), toys.llama()
    tokenizer.add_tokens(["<|eot|>"], special_tokens=True)
    end, other = tokenizer.convert_tokens_to_ids("<|eot|>"), tokenizer.eos_token_id
    text = " a time the fox ran."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    baseline = dict.fromkeys(("word", "phrase", "sentence"), 600.0)
    reward_fn = Heard(model, tokenizer, {"Once upon": baseline}, form="nats")
    given = tokenizer("Once upon")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([given + ids])).logits[0].log_softmax(-1)
    nats = [-logits[at - 1, token].item() for at, token in enumerate(given + ids) if at >= len(given)]
    for written in (ids, [*ids, end], [*ids, other], [*ids, end, tokenizer.pad_token_id]):
        _, details = reward_fn.compute_rewards([text], ["Once upon"], completion_ids=[written], return_details=True)
        assert details["ppls"]["sentence"].item() == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)


class Counted:
    """A tokenizer of the `tokenizers` library that counts the tokens it decodes, and the calls for one text."""

    def __init__(self, backend):
        self.backend, self.tokens, self.single = backend, 0, 0

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def decode(self, ids, **options):
        self.tokens += len(ids)
        self.single += 1
        return self.backend.decode(ids, **options)

    def decode_batch(self, sequences, **options):
        self.tokens += sum(map(len, sequences))
        return self.backend.decode_batch(sequences, **options)


@pytest.mark.parametrize("name", ["byte_level", "gpt2_like", "llama2_like", "gemma_like"])
@pytest.mark.parametrize("cut", [0, 1])
def test_a_character_in_pieces_is_decoded_once(name, cut):
    """Each piece was decoded alone and again in every beginning; of a text cut inside a character all of them were."""
    backend = toys.WRITERS[name]().backend_tokenizer
    prompt, text = "สวัสดี 中文", "ไทยไทยนั้นสวย中文字符都在这里😀👍🏽" * 8
    given, ids = (backend.encode(one, add_special_tokens=False).ids for one in (prompt, text))
    ids = ids[: len(ids) - cut]
    decoding = Decoding(counted := Counted(backend))
    decoding.behind([given], [ids])  # it has met each token
    counted.tokens = 0
    [(found, starts)] = decoding.behind([given], [ids])
    assert counted.tokens <= 2 * len(given) + len(ids)
    if not cut:
        assert found.strip() == text
        sizes = [len(char.encode()) for char in text]
        assert starts.tolist()[-sum(sizes) :] == [
            index for index, size in enumerate(sizes, len(found) - len(text)) for _ in range(size)
        ]
