"""Does a pretrained model continue stories better by the reward, in the eyes of models that are not the scorer?

    python completion.py --judge_model tiny-stories MODEL --output_dir study_completion

The arms are geometric and nested levels, each with thresholds and in nats, against baselines of the model's own
writing. A lower temperature makes a model predictable, too, and costs nothing: so the untrained model's completions at
lower temperatures stand beside the trained ones. A run that is finished is not run again, and one that was stopped goes
on from its last checkpoint: a stopped study goes on with the same command. A run takes an hour or so on two CPU cores.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from common import log_scale, new_figure, print_table, run_folder, write_figure, write_json
from training import cells_of, in_rows, mean_and_sd, parse_args, trained_and_measured

from mlppl import cli
from mlppl.training.diagnostics import described

WEIGHTS = "--ppl_weights 1 1 1"
ARMS = {
    "geometric": WEIGHTS,
    "geometric, nats": f"{WEIGHTS} --reward_form nats",
    "nested": f"--aggregation nested {WEIGHTS}",
    "nested, nats": f"--aggregation nested {WEIGHTS} --reward_form nats",
}
# On a CPU 32 bits train faster than four, which are made for a GPU.
PRECISION = "--no-load_in_4bit"
RUNS = f"{PRECISION} --no_unsloth --no_gradient_checkpointing --learning_rate 3e-4 --max_new_tokens 64"
DEFAULTS = {
    "model_name": "smollm2",
    "max_steps": 60,
    "jobs": 1,
    "demo": f"{RUNS} --per_device_train_batch_size 16 --heldout_samples 16 --logging_steps 1",
    "baselines": f"{PRECISION} --generate 4 --max_new_tokens 64",
}
TEMPERATURES = (0.8, 0.6)  # the policy samples at 1
UNTRAINED = "untrained"


def main(argv=None) -> int:
    return cli.run(parse_args(argv, __doc__, ARMS, "completion", **DEFAULTS), whole_study)


def whole_study(args: argparse.Namespace) -> int:
    numbers, measured = trained_and_measured(args)
    output, arms = Path(args.output_dir).resolve(), numbers["arms"]
    first = args.arms[0]  # the same untrained model in all arms
    kinds: dict[str, list[dict]] = {UNTRAINED: [arms[first]["seeds"][str(seed)]["before"] for seed in args.seeds]}
    for temperature in TEMPERATURES:
        sides = [colder(args, output, seed, run_folder(output, first, seed), temperature) for seed in args.seeds]
        rows = map(in_rows, sides)
        kinds[f"{UNTRAINED}, temperature {temperature}"] = [measured(*pair) | described(pair[1]) for pair in rows]
    kinds |= {arm: [arms[arm]["seeds"][str(seed)]["after"] for seed in args.seeds] for arm in args.arms}
    write_json(output / "temperatures.json", kinds)
    judges = list(dict.fromkeys(name.partition(": ")[0] for name in kinds[UNTRAINED][0] if name.startswith("judge ")))
    show(kinds, judges)
    write_figure(output / "temperatures.png", figure(kinds, ["word", *(f"{judge}: PPL" for judge in judges)]))
    print(f"Picture: {output / 'temperatures.png'}")
    return 0


def show(kinds: dict[str, list[dict]], judges: list[str]) -> None:
    columns = {"word": "{:.3f}", "distinct-2": "{:.3f}", "repetition": "{:.3f}", "words": "{:.0f}"}
    columns |= {f"{judge}: {level}": "{:.3f}" for judge in judges for level in ("PPL", "sentence")}
    rows = [
        [name, *cells_of({key: mean_and_sd([run[key] for run in runs]) for key in columns}, columns)]
        for name, runs in kinds.items()
    ]
    names = ["PPL, words", *list(columns)[1:]]
    print_table("Training, or a lower temperature; mean ± sd over the seeds", ["completions", *names], rows)


def figure(kinds: dict[str, list[dict]], perplexities: list[str]):
    """Variety over perplexity, a panel for the scorer and each judge, a dot a seed: a line joins the temperatures."""
    made = new_figure(3.2 * len(perplexities) + 1, 3.6)
    panels = made.subplots(1, len(perplexities), sharey=True, squeeze=False)[0]
    arms = [name for name in kinds if not name.startswith(UNTRAINED)]
    cold = [name for name in kinds if name.startswith(UNTRAINED)]
    for panel, key in zip(panels, perplexities, strict=True):
        for seed in range(len(kinds[UNTRAINED])):
            line = [(kinds[name][seed][key], kinds[name][seed]["distinct-2"]) for name in cold]
            panel.plot(
                *zip(*line, strict=True), color="0.7", marker="o", markerfacecolor="white", linewidth=1, zorder=1
            )
        middle = {name: statistics.mean(run[key] for run in kinds[name]) for name in cold}
        for name, temperature in zip(cold, (1, *TEMPERATURES), strict=True):
            height = min(run["distinct-2"] for run in kinds[name])
            panel.annotate(
                f"T {temperature}",
                (middle[name], height),
                (0, -14),
                textcoords="offset points",
                ha="center",
                color="0.4",
            )
        for number, name in enumerate(arms):
            spots = [(run[key], run["distinct-2"]) for run in kinds[name]]
            panel.scatter(*zip(*spots, strict=True), color=f"C{number}", s=30, label=name, zorder=2)
        log_scale(panel)
        panel.margins(0.15)
        panel.set_xlabel("perplexity, scorer" if key == "word" else f"perplexity, {key.partition(': ')[0]}")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("distinct-2")
    made.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    made.suptitle(
        "Training (●) or a lower temperature (○): further up and left is better", x=0.01, ha="left", fontsize=11
    )
    return made


def colder(args: argparse.Namespace, output: Path, seed: int, folder: Path, temperature: float) -> dict:
    """{"prompts", "completions"}: what the untrained model writes for the held-out prompts of `folder`'s run."""
    from mlppl.models import load_model
    from mlppl.scoring.sampling import sample_completions

    heldout = json.loads((folder / "heldout.json").read_text("utf-8"))
    path = output / f"untrained_{temperature}_seed_{seed}.json"
    asked = {**heldout["sampling"], "temperature": temperature}
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    prompts = heldout["before"]["prompts"]
    if (kept.get("sampling"), kept.get("prompts")) != (asked, prompts):
        model, tokenizer, _ = load_model(args.model_name)
        completions = sample_completions(model, tokenizer, prompts, progress=f"temperature {temperature}", **asked)
        kept = {"sampling": asked, "prompts": prompts, "completions": completions}
        write_json(path, kept)
    return kept


if __name__ == "__main__":
    sys.exit(main())
