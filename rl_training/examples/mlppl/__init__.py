"""What the four scripts share: one concern a file, none of them imports a script.

scoring/     text and model -> perplexities
baselines/   a data set -> the file that the reward compares with
reward/      perplexities and baselines -> the reward
training/    what the training script wires
pages/       what a person looks at

Each wing's __init__.py is its map. A wing imports those above it; training and pages import all three above them, and
pages shows what training has measured. What several wings share stands in this folder:

config.py     tables of choices and defaults; how completions are sampled
errors.py     the exception that says what the user can fix; what is retired
files.py      the only place that writes a file
cli.py        the flags that scripts share, and how a script ends, in a notebook too
data.py       a data set -> rows of prompt, reference and id; text -> where its sentences start
splits.py     what datasets gives: text as it is written, slices, no images
prompts.py    chat messages -> text; what stands before a reference that is scored
models.py     model and tokenizer from Unsloth, transformers or the embedded folder
gguf.py       a GGUF file -> a folder that they load
processes.py  several processes of one run, weights spread over them
"""

import logging
import re
import sys
import warnings
from pathlib import Path

# What `pip install` copied has the embedded model inside. In a clone that stands beside this folder.
INSTALLED = (Path(__file__).parent / "tiny_stories").exists()

# What libraries say when they are imported, and nobody can act on: of a kernel that bitsandbytes does without, and of
# widgets that a notebook does not have.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "IProgress not found")


def _in_one_line(kind, error, traceback) -> None:
    """What a script says that was started with a Python without its packages, in place of a traceback."""
    if not isinstance(error, ModuleNotFoundError) or "--debug" in sys.argv:
        return sys.__excepthook__(kind, error, traceback)
    if INSTALLED:
        from importlib import metadata

        needs = "\n".join(metadata.requires("multilevel-ppl-rewards"))
        extra = re.search(rf"^{error.name}\b.* extra == .(\w+)", needs, flags=re.MULTILINE)
        remedy = f"pip install 'multilevel-ppl-rewards[{extra[1]}]'" if extra else f"pip install {error.name}"
    else:
        venv = Path(__file__).parents[3] / ".venv"
        remedy = (
            f"start the script with the Python of .venv, after `source {venv}/bin/activate` (`make setup` makes it), "
            "or install the package there"
        )
    print(f"error: {sys.executable} has no package {error.name}: {remedy}", file=sys.stderr)
    raise SystemExit(2)


# Here, since this runs before any of the packages is imported; not where somebody's own program imports this.
_started = Path(getattr(sys.modules["__main__"], "__file__", None) or ".").resolve()
_is_script = _started.parent == Path(__file__).parent.parent and not INSTALLED
if _is_script or Path(sys.argv[0]).name.startswith("mlppl-") or "mlppl.pages.compare" in sys.orig_argv:
    sys.excepthook = _in_one_line
