"""The model card: what a model was trained on, with which reward, what came of it, how to load it; TRL's text below."""

import re
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download, metadata_load
from jinja2 import Template
from yaml import YAMLError

from ..baselines.file import Baselines
from ..cli import runnable
from ..files import write_text
from ..models import base_of_adapter, model_path
from ..processes import is_first
from .job import Job, push_command
from .results import decimal, read_heldout, remarks, rows
from .settings import CONFIG_FILE

TEMPLATE = str(Path(__file__).with_name("card.md.j2"))
MARK = "<!-- Below: the card that TRL writes. -->"


def complete_card(job: Job, state) -> None:
    """Put what this run was before what TRL has written in the output folder's README.md.

    Held-out scores are those of heldout.json, after the last step if it has them. state: the trainer's. What is a file
    or folder of this machine is named by its last part: a card is made to be read elsewhere.
    """
    path = job.output / "README.md"
    trl = ModelCard.load(path, ignore_metadata_errors=True)
    adapter, base = job.models.lora is not None, base_of(job.models.name)
    name, data = (job.config.hub_model_id or str(job.output.resolve())).rpartition("/")[2], trl.data
    data.pop("licence")  # TRL's, misspelt and without a value
    data.license = licence_of(base)
    data.library_name = "peft" if adapter else "transformers"
    data.pipeline_tag = "text-generation"
    data.base_model = None if is_here(base) else base
    data.datasets = None if is_here(job.dataset_name) else [job.dataset_name]
    card = ModelCard.from_template(
        data,
        template_path=TEMPLATE,
        name=name,
        adapter=adapter,
        base=shown(base),
        done=f"{state.global_step:,} of {state.max_steps:,}",
        settings=settings(job),
        heldout=heldout(job.output / "heldout.json"),
        picture=(job.output / "reward.png").exists(),
        config=CONFIG_FILE,
        use=how_to_use(job, job.config.hub_model_id or name, name),
        licence=data.license,
        mark=MARK,
        trl=re.sub(r"This model is a fine-tuned version of .*\n|## Quick start\n(?s:.*?)(?=\n## )", "", trl.text),
    )
    write_text(path, str(card), "replace")


def how_to_use(job: Job, source: str, folder: str) -> str:
    """Markdown: how to load what was trained, write with it as in training, merge it, make a GGUF file and push it.

    source: what is loaded, a folder or a name on the hub. folder: the output folder, as commands name it.
    """
    prompt, chat = job.heldout_rows["prompt"][0], {name: value for name, value in job.chat.items() if value}
    of_chat = {"return_dict": True, **chat.pop("chat_template_kwargs", {}), **chat}
    if not isinstance(prompt, str):
        begun = prompt[-1]["role"] == "assistant"
        of_chat["continue_final_message" if begun else "add_generation_prompt"] = True
    sampling = {name: value for name, value in asdict(job.sampling).items() if value is not None}
    adapter = job.models.lora is not None
    return Template(Path(__file__).with_name("use.md.j2").read_text(encoding="utf-8")).render(
        adapter=adapter,
        in_4bit=adapter and job.models.policy_load["load_in_4bit"],
        source=source,
        prompt=prompt,
        of_chat=of_chat,
        sampling={"do_sample": True, **sampling.pop("generation_kwargs", {}), **sampling},
        merged=f"{folder}/merged" if adapter else folder,
        is_merged=job.models.save_merged or not adapter,
        push=push_command(job.config, folder),
    )


def print_use(job: Job) -> None:
    """The same, to be pasted into this shell: Python as what `python` reads."""
    if not is_first():
        return
    text = how_to_use(job, str(job.output), str(job.output))
    blocks = re.findall(r"```(\w+)\n(.*?)\n```", text, flags=re.DOTALL)
    python = "\n".join(lines for language, lines in blocks if language == "python")
    commands = "\n".join(lines for language, lines in blocks if language == "bash")
    print(f"\nTo use it ({job.output / 'README.md'} says the same), in this shell:\n")
    commands = re.sub("^(python|hf)(?= )", lambda program: runnable([program[0]]), commands, flags=re.MULTILINE)
    print(f"{runnable(['python', '-'])} <<'END'\n{python}\nEND\n{commands}")


def settings(job: Job) -> list[tuple[str, str]]:
    """(what, value) of the card's table."""
    reward, load, made = job.reward, job.models.scorer_load, job.baselines or job.column_meta
    steps = ", ".join(f"{paid:g} from {percent:g} %" for percent, paid in reward.reward_thresholds or ())
    precision = "4-bit" if load["load_in_4bit"] else "" if load["dtype"] == "auto" else load["dtype"]
    scorer = "the model itself before training" if job.models.scorer is None else f"`{shown(job.models.scorer)}`"
    weights = ", ".join(f"{level} {weight:g}" for level, weight in zip(reward.levels, reward.weights, strict=True))
    return [
        ("Base model", f"`{shown(base_of(job.models.name))}`"),
        ("Data", f"`{shown(job.dataset_name)}`, {job.dataset_split}: {len(job.train_rows):,} prompts"),
        ("What is scored", f"the {reward.target}"),
        ("Levels", f"{reward.aggregation}; weights: {weights}"),
        ("Reward of an improvement", "log-likelihood ratio in nats" if reward.form == "nats" else steps),
        guard_of(job),
        (
            "Baselines",
            "the data set's columns" if job.has_columns and not made.meta else baselines_of(made, reward.target),
        ),
        ("Scorer", ", ".join(filter(None, (scorer, "frozen", precision)))),
    ]


def guard_of(job: Job) -> tuple[str, str]:
    if job.per_level and job.loop_penalty:
        return "Veto", f"of what repeats more than {1 / job.loop_penalty:.3g} of its 8-token runs"
    return "Loop penalty", f"{job.loop_penalty:g} ranges of the reward"


def baselines_of(made: Baselines, target: str) -> str:
    """Which they are. made: those of the run's file, else what the data set says of its columns, if anything."""
    if not made and not made.meta:
        return "each prompt's first completions" if target == "completion" else "the prompt alone"
    own = made.meta.get("generated")
    of = f"the mean of {own['generate']} completions a prompt before training" if own else "the data set's own texts"
    return f"`{shown(made.source)}`: {of}"


def licence_of(base: str) -> str | None:
    """The `license` of a model's own card, in its folder or on the hub; None if there is no card, or none in it."""
    folder = Path(base)
    try:
        data = metadata_load(folder / "README.md" if folder.exists() else hf_hub_download(base, "README.md"))
    # No card, no network, no name on the hub, metadata that is none: a trained model is not lost for that.
    except (OSError, ValueError, YAMLError):
        return None
    return data.get("license") if data else None


def base_of(name: str) -> str:
    """Where a model is loaded from; of a folder with an adapter in it, the model that it was made for."""
    return model_path(base_of_adapter(model_path(name)) or name)


def is_here(name: str) -> bool:
    """Whether it names a file or folder of this machine, or what is embedded, and not something on the hub."""
    return name == "tiny-stories" or Path(name).is_absolute() or Path(name).exists()


def shown(name: str) -> str:
    return Path(name).name if is_here(name) else name


def heldout(path: Path) -> dict | None:
    """What the card says of held-out prompts: how many, and a row of numbers for each score; None if not measured."""
    if not path.exists():
        return None
    _, _, before, after = read_heldout(path)
    return {
        "completions": f"{sum(map(len, before.completions)):,}",
        "prompts": len(before.prompts),
        "ended": after is not None,
        "scale": before.scale,
        "rows": [
            [row.name, decimal(row.before), *([] if after is None else [decimal(row.after), row.shown])]
            for row in rows(before, after)
        ],
        "remarks": [] if after is None else remarks(before, after),
    }
