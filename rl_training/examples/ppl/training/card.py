"""The model card: what a model was trained on, with which reward, what came of it, how to load it; TRL's text below."""

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download, metadata_load
from yaml import YAMLError

from ..baselines.file import Baselines
from ..definitions import LEVELS
from ..files import write_text
from ..models import base_of_adapter, model_path
from .flags import CONFIG_FILE
from .job import Job

NF4 = 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
MARK = "<!-- Below: the card that TRL writes. -->"


def complete_card(job: Job, state) -> None:
    """Put what this run was before what TRL has written in the output folder's README.md.

    Held-out scores are those of heldout.json, after the last step if it has them. state: the trainer's. What is a file
    or folder of this machine is named by its last part: a card is made to be read elsewhere.
    """
    path = job.output / "README.md"
    card = ModelCard.load(path, ignore_metadata_errors=True)
    adapter, base = not job.args.full_finetuning, model_path(base_name(job.args.model_name))
    name = (job.config.hub_model_id or str(job.output.resolve())).rpartition("/")[2]
    licence = licence_of(base)
    card.data.license = licence
    card.data.library_name = "peft" if adapter else "transformers"
    card.data.pipeline_tag = "text-generation"
    card.data.base_model = None if is_here(base) else base
    card.data.datasets = None if is_here(job.args.dataset_name) else [job.args.dataset_name]
    if hasattr(card.data, "licence"):  # TRL's, misspelt and without a value
        del card.data.licence
    kind = "A LoRA adapter for" if adapter else "All weights of"
    done = f"{state.global_step:,} of {state.max_steps:,} optimizer steps"
    blocks = [
        f"# {name}",
        f"{kind} `{shown(base)}`, trained with GRPO and the multi-level perplexity reward for {done}: a frozen model's "
        "surprise at words, phrases and sentences, compared with baselines.",
        _table(("", ""), settings(job)),
        "## Held-out prompts",
        _heldout(job.output / "heldout.json"),
        *(["![The reward while training](reward.png)"] if (job.output / "reward.png").exists() else []),
        f"[report.html](report.html) has all curves, and completions before and after; [{CONFIG_FILE}]({CONFIG_FILE}) "
        "every setting.",
        "## How to load it",
        _loading(job, name, base, adapter),
        "## Licence",
        f"The base model's is `{licence}`." if licence else "The base model's card names none: look it up before you "
        "pass this model on.",
        MARK,
    ]  # fmt: skip
    card.text = "\n\n".join(blocks) + "\n" + card.text
    write_text(path, str(card), "replace")


def settings(job: Job) -> list[tuple[str, str]]:
    """(what, value) of the card's table."""
    args, load = job.args, job.scorer_load
    thresholds = ", ".join(f"{reward:g} from {percent:g} %" for percent, reward in job.settings["reward_thresholds"])
    form = "log-likelihood ratio in nats" if args.reward_form == "nats" else thresholds
    precision = "4-bit" if load["load_in_4bit"] else "" if load["dtype"] == "auto" else load["dtype"]
    scorer = "the model itself before training" if args.scorer_model is None else f"`{shown(args.scorer_model)}`"
    weights = ", ".join(f"{level} {weight:g}" for level, weight in zip(LEVELS, args.ppl_weights, strict=True))
    return [
        ("Base model", f"`{shown(model_path(base_name(args.model_name)))}`"),
        ("Data", f"`{shown(args.dataset_name)}`, {args.dataset_split}: {len(job.train_rows):,} prompts"),
        ("What is scored", f"the {args.target}"),
        ("Levels", f"{args.aggregation}; weights: {weights}"),
        ("Reward of an improvement", form),
        ("Loop penalty", f"{args.loop_penalty:g} ranges of the reward"),
        ("Baselines", _baselines(job)),
        ("Scorer", ", ".join(filter(None, (scorer, "frozen", precision)))),
    ]


def licence_of(base: str) -> str | None:
    """The `license` of a model's own card, in its folder or on the hub; None if there is no card, or none in it."""
    folder = Path(base)
    try:
        data = metadata_load(folder / "README.md" if folder.exists() else hf_hub_download(base, "README.md"))
    # No card, no network, no name on the hub, metadata that is none: a trained model is not lost for that.
    except (OSError, ValueError, YAMLError):
        return None
    return data.get("license") if data else None


def base_name(name: str) -> str:
    """Of a folder with an adapter in it, the model that it was made for."""
    return base_of_adapter(model_path(name)) or name


def is_here(name: str) -> bool:
    """Whether it names a file or folder of this machine, or what is embedded, and not something on the hub."""
    return name == "tiny-stories" or Path(name).is_absolute() or Path(name).exists()


def shown(name: str) -> str:
    return Path(name).name if is_here(name) else name


def _baselines(job: Job) -> str:
    made: Baselines | None = job.baselines or (job.column_meta if job.column_meta.meta else None)
    if made is None:
        return "each prompt's first completions" if job.args.target == "completion" else "the prompt alone"
    own = made.meta.get("generated")
    of = f"the mean of {own['generate']} completions a prompt before training" if own else "the data set's own texts"
    return f"`{shown(made.source)}`: {of}"


def _heldout(path: Path) -> str:
    if not path.exists():
        return "Not measured yet."
    kept = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
    before, after = kept["before"], kept["after"]
    count = sum(map(len, before["completions"]))
    text = f"Means over {count:,} completions of {len(before['prompts'])} prompts that were not trained on; one run."
    if after is None:
        rows = [(name, _number(score)) for name, score in before["scores"].items()]
        return f"{text} Training has not ended yet.\n\n{_table(('', 'before'), rows)}"
    changes = []
    for name, score in before["scores"].items():
        new = after["scores"][name]
        change = None if None in (score, new) else new - score
        changes.append((name, _number(score), _number(new), _number(change, "+")))
    return f"{text}\n\n{_table(('', 'before', 'after', 'change'), changes)}"


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.3f}"


def _loading(job: Job, name: str, base: str, adapter: bool) -> str:
    source = job.config.hub_model_id or name
    in_4bit = adapter and job.policy_load["load_in_4bit"]
    lines = [f'tokenizer = AutoTokenizer.from_pretrained("{source}")']
    if adapter:
        quantized = ", quantization_config=in_4bit" if in_4bit else ""
        classes = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if in_4bit else "")
        lines = [
            "from peft import PeftModel",
            f"from transformers import {classes}",
            "",
            *lines,
            *([f"in_4bit = {NF4}"] if in_4bit else []),
            f'base = AutoModelForCausalLM.from_pretrained("{shown(base)}"{quantized})',
            f'model = PeftModel.from_pretrained(base, "{source}")',
        ]
        note = "It was trained on the base's weights in 4 bits, as they are loaded here.\n\n" if in_4bit else ""
    else:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            *lines,
            f'model = AutoModelForCausalLM.from_pretrained("{source}")',
        ]
        note = ""
    return note + "\n".join(["```python", *lines, "```"])


def _table(head: tuple[str, ...], rows: Sequence[Sequence[str]]) -> str:
    def line(cells):
        return "| " + " | ".join(str(one).replace("|", "\\|").replace("\n", " ") for one in cells) + " |"

    return "\n".join([line(head), line(["---"] + ["---:" if len(head) > 2 else "---"] * (len(head) - 1)),
                      *map(line, rows)])  # fmt: skip
