"""GGUF files of each kind of tokenizer: the ids are those of the tokenizer that the file was made of."""

import io

import gguf_files
import pytest
import sentencepiece
import toys
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mlppl.errors import InputError
from mlppl.gguf import read_tokenizer
from mlppl.models import load_model
from mlppl.scoring.calculator import MultiLevelPPLCalculator

pytestmark = pytest.mark.smollm2

TEXTS = [
    *toys.SENTENCES,
    " a space in front,  two  spaces, a space behind ",
    "lines\n\nand\ttabs\r\n",
    "1984, 3.14, 1234567 and ٣٤ ½",
    "They'll say IT'S he'd we'Ve CamelCase HTTPServer x_y $5 =>",
    "é e\u0301 ü 中文 한국 ไทย 😀 𒀀",
    "aaaaaaa ======= ((((  a<0x41>b",
    "",
]
SENTENCES = [*toys.SENTENCES, "In 1984 and 2024 we paid 1234 dollars.", "x = f(y)\n\n    return 12345", "été 中文 中文"]
SENTENCES += [
    "1984 1984, 3.14 3.14; 1234567 1234567!",
    "They'll say IT'S so. CamelCase HTTPServer",
    "a.b/c (x): $5 => x_y\n\n",
]


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A function that gives the tokenizer of a file with these fields."""

    def read(*args, config=None, **fields):
        import gguf

        path = tmp_path_factory.mktemp("gguf") / "tokenizer.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        gguf_files.write_tokenizer(writer, *args, **fields)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        ids = {name: fields.get(name) for name in ("bos_token_id", "eos_token_id")}
        return read_tokenizer(path, config or LlamaConfig(**ids))

    return read


def same(read, made_of, texts=TEXTS, special=True):
    for text in texts:
        found = read(text, add_special_tokens=special)["input_ids"]
        assert found == made_of(text), (text, read.convert_ids_to_tokens(found))


# --- SentencePiece ---------------------------------------------------------------------------------------------------


def trained(model_type, **options):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=out,
        model_type=model_type,
        vocab_size=420,
        hard_vocab_limit=False,
        minloglevel=2,
        **{
            "byte_fallback": True,
            "remove_extra_whitespaces": False,
            **({} if "normalization_rule_tsv" in options else {"normalization_rule_name": "identity"}),
            **options,
        },
    )
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def pieces_of(processor):
    """As llama.cpp's converter reads them."""

    def kind(index):
        asked = [(processor.IsUnknown, 2), (processor.IsControl, 3), (processor.IsUnused, 5), (processor.IsByte, 6)]
        return next((number for ask, number in asked if ask(index)), 1)

    return [
        (processor.IdToPiece(index), processor.GetScore(index), kind(index))
        for index in range(processor.GetPieceSize())
    ]


IDS = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_llama_file_reads_as_sentencepiece_does(read, model_type, prefix):
    processor = trained(model_type, add_dummy_prefix=prefix)
    found = read("llama", pieces_of(processor), add_space_prefix=prefix, **IDS)
    # tokenizers' Unigram takes a byte's name for the byte.
    texts = TEXTS if model_type == "bpe" else [text.replace("<0x41>", "") for text in TEXTS]
    same(found, processor.EncodeAsIds, texts, special=False)
    assert found("a fox")["input_ids"] == [1, *processor.EncodeAsIds("a fox")]
    for text in texts:
        assert found.decode(found(text, add_special_tokens=False)["input_ids"]) == text


def test_sentencepieces_own_symbols_are_cut_out_first(read):
    symbols = ["<sep>", "▁▁", "▁▁▁▁", "\n\n", "<s2>", "<se"]
    processor = trained("bpe", user_defined_symbols=symbols)
    pieces = [(token, score, 4 if token in symbols else type_) for token, score, type_ in pieces_of(processor)]
    found = read("llama", pieces, **IDS)
    texts = [*TEXTS, "a<sep>fox <sep> a fox<se> b", "<sep>", "   a     fox", "one\n\n\nfox"]
    same(found, processor.EncodeAsIds, texts, special=False)


def test_added_tokens_begin_a_text_anew(read):
    """As transformers' legacy tokenizers and llama.cpp read Llama 2, Mistral 7B and TinyLlama."""
    tokenizer = toys.llama2_like(sentences=SENTENCES)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("[INST]", normalized=False, special=True)])
    pieces, _, ids = gguf_files.fields_of(tokenizer)
    texts = [*TEXTS, "</s>a fox<s> b", "<unk>", "a<tool>fox <tool> a", "[INST] a  fox [/INST]", "<s><s>"]
    same(read("llama", pieces, **ids), lambda text: tokenizer(text)["input_ids"], texts)


@pytest.mark.parametrize("scores", [0.0, -1000.0, -1e9, "none"])
def test_without_usable_scores_the_ids_are_the_order(read, scores):
    """As Gemma has it: no space in front, tokens for runs of spaces and lines, which a file writes as they are."""
    tokenizer = toys.llama2_like(strip=False, sentences=SENTENCES)
    runs = ["\n\n", "\n\n\n", "  ", "    ", "<b>"]
    tokenizer.add_tokens([AddedToken(run, normalized=False) for run in runs])
    pieces, _, ids = gguf_files.fields_of(tokenizer)
    found = read(
        "llama",
        [(token, 0.0 if scores == "none" else scores, type_) for token, _, type_ in pieces],
        scores=scores != "none",
        add_space_prefix=False,
        **ids,
    )
    same(found, lambda text: tokenizer(text)["input_ids"], [*TEXTS, "a      b\n\n\n\n", "<b>a</s> b"])


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bos_and_eos_are_those_of_the_flags(read, kind, bos, eos):
    tokenizer = toys.llama2_like() if kind == "llama" else toys.byte_level()
    pieces, merges, ids = gguf_files.fields_of(tokenizer)
    found = read(kind, pieces, None if kind == "llama" else merges, add_bos_token=bos, add_eos_token=eos, **ids)
    plain = tokenizer("a fox", add_special_tokens=False)["input_ids"]
    before, after = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
    assert found("a fox")["input_ids"] == before + plain + after
    assert found("a fox", add_special_tokens=False)["input_ids"] == plain


def test_phi3s_tokens_take_the_space_behind_them(read):
    from transformers import Phi3Config

    tokenizer = toys.llama2_like(sentences=SENTENCES)
    for token in ("</s>", "<|user|>", "<|end|>"):
        tokenizer.add_tokens([AddedToken(token, rstrip=True, normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    pieces, _, ids = gguf_files.fields_of(tokenizer)
    config = Phi3Config(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    found = read("llama", pieces, config=config, **ids)
    texts = ["<|user|> a fox<|end|>\nthe</s> a", "<s> a<|endoftext|> fox <unk> a"]
    same(found, lambda text: tokenizer(text)["input_ids"], texts)


def test_a_t5_file_reads_as_sentencepiece_does(read, tmp_path):
    import sentencepiece.sentencepiece_model_pb2 as proto

    # Small rules, where T5 has 240 kB of them: ﬁ -> fi, ½ -> 1/2, a full-width space -> a space.
    (tmp_path / "rules.tsv").write_text("FB01\t66 69\nBD\t31 2F 32\n3000\t20\n")
    processor = trained("unigram", normalization_rule_tsv=str(tmp_path / "rules.tsv"), remove_extra_whitespaces=True)
    charsmap = proto.ModelProto.FromString(processor.serialized_model_proto()).normalizer_spec.precompiled_charsmap
    found = read(
        "t5",
        pieces_of(processor),
        precompiled_charsmap=charsmap,
        remove_extra_whitespaces=True,
        add_space_prefix=True,
        **IDS,
    )
    texts = [*(text.replace("<0x41>", "") for text in TEXTS), "ﬁne ½ a　b　 ", "   ", " a  "]
    same(found, processor.EncodeAsIds, texts, special=False)
    assert found("a fox")["input_ids"] == [*processor.EncodeAsIds("a fox"), 2]


# --- byte-level BPE --------------------------------------------------------------------------------------------------

# As the tokenizer.json of a model of each name has them.
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


LLAMA3 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
TEKKEN = split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ORIGINALS = {
    "gpt-2": [GPT2],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2],
    "starcoder": [pre_tokenizers.Digits(individual_digits=True), GPT2],
    "llama-bpe": [LLAMA3, BYTES],
    "dbrx": [LLAMA3, BYTES],
    "qwen2": [QWEN2, BYTES],
    "qwen35": [QWEN35, BYTES],
    "tekken": [TEKKEN, BYTES],
    "gpt-4o": [GPT4O, BYTES],
    "falcon": [pre_tokenizers.Punctuation("contiguous"), GPT2, split("[0-9][0-9][0-9]")],
    "bloom": [split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), BYTES],
    "deepseek-coder": [
        *(split(one) for one in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")),
        pre_tokenizers.Digits(individual_digits=True),
        BYTES,
    ],
}


def original(pre):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(ORIGINALS[pre])
    if pre.startswith("qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 2, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("    ", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("pre", ORIGINALS)
def test_a_gpt2_file_divides_as_the_model_of_its_name_does(read, pre):
    tokenizer = original(pre)
    pieces, merges, ids = gguf_files.fields_of(tokenizer)
    found = read("gpt2", pieces, merges, pre=pre, scores=False, **ids)

    @given(st.lists(st.sampled_from([*toys.PIECES, *SENTENCES, "<tool>", "</s>"]), max_size=8).map("".join))
    def on_any_text(text):
        assert found(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]

    on_any_text()
    same(found, lambda text: tokenizer(text)["input_ids"], special=False)
    for text in () if pre.startswith("qwen") else TEXTS:
        assert found.decode(found(text, add_special_tokens=False)["input_ids"]) == text


def test_llama3_takes_a_word_that_is_a_token_as_it_is(read):
    pieces, merges, ids = gguf_files.fields_of(original("llama-bpe"))
    pieces += [("Ġzebras", 0.0, 1)]  # which no merges make
    for pre, count in (("llama-bpe", 1), ("dbrx", 5)):
        found = read("gpt2", pieces, merges, pre=pre, scores=False, **ids)
        assert (len(found(" zebras", add_special_tokens=False)["input_ids"]) == 1) == (count == 1)


def test_a_prefix_space_is_that_of_the_flag(read):
    tokenizer = toys.prefix_space()
    pieces, merges, ids = gguf_files.fields_of(tokenizer)
    found = read("gpt2", pieces, merges, scores=False, add_space_prefix=True, add_bos_token=True, **ids)
    same(found, lambda text: tokenizer(text)["input_ids"], [*TEXTS, "a</s>b"])


# --- in a model's file -----------------------------------------------------------------------------------------------


@pytest.fixture
def in_a_file(tmp_path, monkeypatch):
    """A function that loads a toy model from a file with such a tokenizer: (model, tokenizer)."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    def in_a_file(*args, model=None, architecture="llama", **fields):
        path = tmp_path / "toy.gguf"

        def vocabulary(writer):
            gguf_files.write_tokenizer(writer, *args, **fields)

        gguf_files.write(path, model, architecture=architecture, vocabulary=vocabulary)
        return load_model(str(path))[:2]

    return in_a_file


def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {
        **toys.SIZES,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 64,
        "max_position_embeddings": 512,
    }
    return toys.build(Gemma3ForCausalLM, Gemma3TextConfig(**sizes, query_pre_attn_scalar=256))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_file_scores_as_the_model_with_its_tokenizer(in_a_file, architecture):
    llama = architecture == "llama"
    model, tokenizer = toys.llama() if llama else gemma3(), toys.llama2_like(strip=llama)
    pieces, _, ids = gguf_files.fields_of(tokenizer)
    read, found = in_a_file("llama", pieces, model=model, architecture=architecture, add_space_prefix=llama, **ids)
    same(found, lambda text: tokenizer(text)["input_ids"], [*TEXTS, "</s>a fox<s> b"])
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<s>", "</s>", "<unk>")
    expected = MultiLevelPPLCalculator(tokenizer).compute_all_levels(model, toys.SENTENCES)
    levels = MultiLevelPPLCalculator(found).compute_all_levels(read, toys.SENTENCES)
    for level, values in expected.items():
        assert levels[level].tolist() == pytest.approx(values.tolist(), rel=1e-4), level


@pytest.mark.parametrize(
    ("kind", "pre", "said"),
    [
        ("bert", "default", "tokenizer.ggml.model is 'bert', expected llama, gpt2 or t5"),
        ("rwkv", "default", "tokenizer.ggml.model is 'rwkv', expected llama, gpt2 or t5"),
        ("gpt2", "deepseek-llm", "tokenizer.ggml.pre is 'deepseek-llm', expected one of default, gpt-2, "),
    ],
)
def test_other_kinds_are_refused_in_one_line(in_a_file, kind, pre, said):
    pieces, merges, ids = gguf_files.fields_of(toys.byte_level())
    with pytest.raises(InputError) as refusal:
        in_a_file(kind, pieces, merges, pre=pre, **ids)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_tokenizer_that_divides_words_into_letters_is_refused(in_a_file):
    pieces, merges, ids = gguf_files.fields_of(toys.llama2_like())
    with pytest.raises(InputError) as refusal:
        in_a_file("llama", pieces, merges[:1], **ids)
    assert "\n" not in str(refusal.value)
    assert "of words that its own vocabulary has" in str(refusal.value) and "toy.gguf" in str(refusal.value)
    # Single letters are what a model has whose vocabulary holds nothing else.
    letters = [piece for piece in pieces if len(piece[0]) == 1 or piece[2] != 1]
    _, found = in_a_file("llama", letters, **ids)
    assert len(found("a fox", add_special_tokens=False)["input_ids"]) == 6
