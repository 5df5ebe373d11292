"""Tiny random models and tokenizers, made from nothing in milliseconds, and texts that are hard to cut."""

import functools
import json

import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

VOCABULARY = 512  # of every toy model; no toy tokenizer has more

SENTENCES = [
    "Once upon a time there was a small fox, and it lived near the old mill.",
    'The fox said: "I am hungry; I want to eat the cheese!" But the crow (who was clever) only laughed.',
    "Mr. Brown paid 1,000 dollars for a house. It was far too much, wasn't it?",
    "They walked home together, slowly, under the stars. The end.",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# --- tokenizers ------------------------------------------------------------------------------------------------------


def byte_level(bos=True, pad=True, trim_offsets=None, chat=False):
    """Byte-level BPE. `trim_offsets`: with GPT-2's post-processor, which cuts the space off a token's offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trim_offsets is not None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    special = ["<s>", "</s>", "<pad>"]
    _train(tokenizer, special, pre_tokenizers.ByteLevel.alphabet())
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>" if pad else None,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def with_tokens(count, special=False):
    """`byte_level`, whose highest id is 395, with so many added tokens: more than 116 are more than a toy model has."""
    tokenizer = byte_level()
    tokenizer.add_tokens([f"<more {number}>" for number in range(count)], special_tokens=special)
    return tokenizer


def llama2_like(strip=True, chat=False, sentences=None, vocab_size=400):
    """SentencePiece's BPE as Llama 2 has it: spaces become ▁, one more in front, unknown characters become bytes, and
    the decoder strips the first space of whatever it is given. `strip=False`: as Gemma has it, without both."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    _train(trained, [], [], sentences or SENTENCES, vocab_size)
    bpe = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(bpe["vocab"], key=bpe["vocab"].get)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in bpe["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prepend, stripped = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if strip else ([], [])
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    _write_bos(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def metaspace(prepend_scheme="always"):
    """BPE over characters with a Metaspace pre-tokenizer; unknown characters are <unk>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    _train(tokenizer, ["<s>", "</s>", "<unk>"], [])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram():
    """SentencePiece's unigram model, as T5 and ALBERT have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        SENTENCES * 20,
        trainers.UnigramTrainer(
            vocab_size=150, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_pieces():
    """BERT's: lower case, ## goes on with a word, and the decoder takes spaces away from before punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", pad_token="[UNK]"
    )


def word_ends():
    """GPT-1's BPE: a word's last token ends in </w>, which is the space after it unless nothing follows."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<e>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<e>", pad_token="<e>")


def whole_words():
    """A token a word; the letter a is none of them. Without a decoder, which joins tokens with a space."""
    words = sorted({word for sentence in SENTENCES for word in sentence.split()} - {"a"})
    special = ["<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def prefix_space():
    """RoBERTa's: byte-level, and a space in front of the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, ["<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet())
    _write_bos(tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def normalizing():
    """A tokenizer whose normalizer changes lengths: "ﬁ" becomes "fi", "½" three characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, ["<s>"], pre_tokenizers.ByteLevel.alphabet())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def _write_bos(tokenizer):
    """As Llama 2 has it: the tokenizer itself writes BOS in front."""
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])


def _train(tokenizer, special, alphabet, sentences=SENTENCES, vocab_size=400):
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)


TOKENIZERS = {
    "byte_level": byte_level,
    "without_bos_and_pad": functools.partial(byte_level, bos=False, pad=False),
    "gpt2_like": functools.partial(byte_level, trim_offsets=True),
    "llama2_like": llama2_like,
    "metaspace": metaspace,
    "normalizing": normalizing,
}

# More of them for what a model writes: ids that decode to a text that need not tell them.
WRITERS = {
    **TOKENIZERS,
    "gemma_like": functools.partial(llama2_like, strip=False),
    "metaspace_first": functools.partial(metaspace, prepend_scheme="first"),
    "metaspace_never": functools.partial(metaspace, prepend_scheme="never"),
    "unigram": unigram,
    "word_pieces": word_pieces,
    "word_ends": word_ends,
    "whole_words": whole_words,
    "prefix_space": prefix_space,
}

# --- models ----------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def build(model_class, config):
    """A seeded float32 model whose logits differ by more than a fresh initialization's."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def llama(**changes):
    return build(
        LlamaForCausalLM, LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 512, **changes})
    )


def gpt2(**changes):
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 0, "eos_token_id": 0}
    return build(GPT2LMHeadModel, GPT2Config(vocab_size=VOCABULARY, **{**sizes, **changes}))


SEES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}


def gemma3():
    """A model that sees, too: transformers loads it as a causal language model, vision tower and all."""
    vision = {**SEES, "num_attention_heads": 2}
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=511)
    return build(Gemma3ForConditionalGeneration, config)


def qwen2_5_vl():
    """One that transformers does not load so."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen2_5_VLConfig(text_config={**SIZES, "rope_parameters": rope}, vision_config=vision)
    return build(Qwen2_5_VLForConditionalGeneration, config)


def uniform():
    """Every token has the probability 1 / VOCABULARY, whatever stands before it."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


# --- texts -----------------------------------------------------------------------------------------------------------

PIECES = [
    *"aeoxzAEZ059_ .,;:!?-–—()[]\"'’‘“”«»…/&%$^`ʹ·",
    *["the ", "fox ", "Mr. ", "e.g. ", "U.S. ", "z.B. ", "1,000", "3.14", "don't", "l'homme", "'apple", "’Apple"],
    *["x_y", "é", "e\u0301", "ﬁ", "½", "Ⅷ", "\U0001d400", "Z\xa0.", "A\u2009."],
    *["中文", "。", "、", "，", "（", "】", "ひら", "カタ", "ー", "ﾊﾟ", "한국", "𒀀"],
    *["ไทย", "สวัสดี", "שלום", 'ש"ח', "מ׳", "مرحبا", "؟", "٣٤"],
    *["\u0301", "\u00ad", "\u200d", "\u200b", "\u2060", "\ufeff"],
    *["😀", "👩\u200d👩\u200d👧", "🇩🇪", "🇩🇪🇫🇷", "👍🏽", "1\ufe0f\u20e3"],
    *["\n", "\r", "\r\n", "\v", "\f", "\x85", "\u2028", "\u2029", "\n\n", "\t", "  ", "\xa0", "\u3000"],
]

texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
