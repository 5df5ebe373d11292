"""Does training with the reward work, and what do the levels add? GRPO through the training script, arm by arm.

    python training.py --output_dir study_training

An arm is the configuration of `make demo` with some flags changed; each is run with every seed, a process a run. A run
that is finished is not run again, and one that was stopped goes on from its last checkpoint: a stopped study goes on
with the same command. With --judge_model models that are not the scorer say what they think of the completions.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from common import (
    EXAMPLES,
    add_run_flags,
    log_scale,
    new_figure,
    print_table,
    quiet_axes,
    run_folder,
    write_figure,
    write_json,
)
from measures import common_share, commonest_words, copied, judged, plain

from mlppl import cli
from mlppl.config import LEVELS
from mlppl.errors import InputError

DEMO = "--max_new_tokens 64 --learning_rate 2e-3 --per_device_train_batch_size 16"
BASELINES = "--load_in_4bit --generate 4 --max_new_tokens 64"
SAVED = ["--save_steps", "10", "--save_total_limit", "1"]
ARMS = {
    "default": "",
    "no loop guard": "--loop_penalty 0",
    "word only": "--ppl_weights 1 0 0",
    "phrase only": "--ppl_weights 0 1 0",
    "sentence only": "--ppl_weights 0 0 1",
    "reference": "--target reference",
    "nats": "--reward_form nats",
    "nested": "--aggregation nested",
    "nested, 0.2 0.3 0.5": "--aggregation nested --ppl_weights 0.2 0.3 0.5",
    "nested, 0.3 0.3 0.4": "--aggregation nested --ppl_weights 0.3 0.3 0.4",
    "nested, nats": "--aggregation nested --reward_form nats",
    "nested, nats, 0.2 0.3 0.5": "--aggregation nested --reward_form nats --ppl_weights 0.2 0.3 0.5",
    "nested, nats, 0.3 0.3 0.4": "--aggregation nested --reward_form nats --ppl_weights 0.3 0.3 0.4",
    "nested, nats, 1 2 1": "--aggregation nested --reward_form nats --ppl_weights 1 2 1",
    "nested, nats, per level": "--aggregation nested --reward_form nats --per_level",
}
CHAT = "Here is the beginning of a story.\n\n{prompt}\n\nGo on with the story."
USER = "Tell me a story."
QUICK = {"seeds": [0], "max_steps": 2}
QUICK_FLAGS = "--max_samples 20 --heldout_samples 4 --max_new_tokens 12"
QUICK_BASELINES = "--num_samples 20 --generate 2 --max_new_tokens 12"


def parse_args(
    argv=None, doc: str = __doc__, arms: dict[str, str] = ARMS, name: str = "training", **defaults
) -> argparse.Namespace:
    """Also of a study with other arms: `name` is that of its files, `defaults` what its flags are when not given, and
    `demo` and `baselines` what all its runs and its baselines have."""
    parser = cli.parser(doc.splitlines()[0], epilog=doc.rpartition("\n\n")[2])
    add_run_flags(parser, f"study_{name}", "numbers, picture", arms, steps=100)
    parser.add_argument("--jobs", type=cli.positive_int, default=2, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="few arms, one seed, two steps of short texts: a try")
    parser.add_argument("--model_name", default="tiny-stories", help="as for the training script")
    parser.add_argument("--dataset_name", default="tiny-stories", help="as for the training script")
    parser.add_argument("--judge_model", nargs="+", default=[], help="other models, which score what each arm wrote")
    chats = parser.add_mutually_exclusive_group()
    chats.add_argument(
        "--chat", nargs="?", const=CHAT, metavar="FORM", help=f"prompts as a chat message of this form ({CHAT!r})"
    )
    chats.add_argument(
        "--begun",
        nargs="?",
        const=USER,
        metavar="TEXT",
        help=f"prompts as what an assistant has said so far, whom a user asked this ({USER!r})",
    )
    parser.add_argument(
        "--flags", default="", metavar="'FLAGS'", help="for every run, after those of the demo: '--learning_rate 1e-3'"
    )
    parser.set_defaults(name=name, arm_flags=arms, **{"demo": DEMO, "baselines": BASELINES, **defaults})
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK, arms=list(arms)[:5:4], flags=f"{QUICK_FLAGS} {args.flags}")
    return args


def main(argv=None) -> int:
    return cli.run(parse_args(argv), study)


def study(args: argparse.Namespace) -> int:
    trained_and_measured(args)
    return 0


def trained_and_measured(args: argparse.Namespace) -> tuple[dict, Callable[[list, list[str]], dict]]:
    """Run what is to be run, and measure; (the numbers, which also are in a file, and `measuring`'s function)."""
    output = Path(args.output_dir).resolve()
    output.mkdir(parents=True, exist_ok=True)
    common = ["--model_name", resolved(args.model_name), "--dataset_name", resolved(args.dataset_name)]
    if args.chat:
        common += ["--chat", "--prompt_template", args.chat]
    if args.begun:
        common += ["--chat", "--user_prompt", args.begun]
    runs = {}
    for arm in args.arms:
        words = f"{args.demo} {args.arm_flags[arm]} {args.flags}".split()
        flags = [*common, *SAVED, *words, "--max_steps", str(args.max_steps)]
        if "reference" not in flags:  # for which the reward computes them itself
            aggregation = flags[flags.index("--aggregation") + 1] if "--aggregation" in flags else "geometric"
            short = QUICK_BASELINES.split() if args.quick else []
            path = compute_baselines(output, aggregation, [*common, *args.baselines.split(), *short])
            flags += ["--baselines_path", str(path)]
        for seed in args.seeds:
            runs[arm, seed] = (run_folder(output, arm, seed), [*flags, "--seed", str(seed)])
    run_all(runs, args.jobs)
    heldout = {run: json.loads((folder / "heldout.json").read_text("utf-8")) for run, (folder, _) in runs.items()}
    measured = measuring(args)
    scores = common_scores(measured, heldout)
    settings = ("model_name", "dataset_name", "chat", "begun", "judge_model", "seeds", "max_steps", "flags")
    numbers = {
        "settings": {name: getattr(args, name) for name in settings},
        "arms": {
            arm: {"flags": args.arm_flags[arm], "seeds": {str(seed): scores[arm, seed] for seed in args.seeds}}
            for arm in args.arms
        },
    }
    for arm in numbers["arms"].values():
        arm["summary"] = summary(list(arm["seeds"].values()))
    numbers_file, picture = output / f"{args.name}.json", output / f"{args.name}.png"
    write_json(numbers_file, numbers)
    write_figure(picture, figure(numbers))
    show(numbers)
    print(f"Numbers: {numbers_file}\nPicture: {picture}")
    return numbers, measured


def resolved(name: str) -> str:
    """A folder or file by its whole path, since every run works in a folder of its own; names stay names."""
    return str(Path(name).resolve()) if Path(name).exists() and name not in ("tiny-stories", "smollm2") else name


# --- runs ------------------------------------------------------------------------------------------------------------


def compute_baselines(output: Path, aggregation: str, flags: list[str]) -> Path:
    """The baselines of the model's own writing, computed once for all arms that share their aggregation."""
    name = f"baselines-{aggregation}.json"
    path = output / name
    if not path.exists():
        print(f"{name}: sampling and scoring ...", file=sys.stderr)
        words = [*flags, "--aggregation", aggregation, "--output_path", str(path)]
        call("compute_baselines_trl.py", words, output / f"{name}.log")
    return path


def run_all(runs: dict[tuple[str, int], tuple[Path, list[str]]], jobs: int) -> None:
    """Run what is not finished, `jobs` at a time. Raises `InputError`, at the end, for runs that failed."""
    from tqdm import tqdm

    open_runs = {key: run for key, run in runs.items() if not finished(*run)}
    if len(open_runs) < len(runs):
        print(f"{len(runs) - len(open_runs)} of {len(runs)} runs are finished already", file=sys.stderr)
    failed = []
    pool = ThreadPoolExecutor(jobs)
    try:
        waiting = {pool.submit(train, *run): arm for (arm, _), run in open_runs.items()}
        with tqdm(total=len(waiting), unit="run", disable=not waiting) as bar:
            for done in as_completed(waiting):
                try:
                    done.result()
                except InputError as error:
                    failed.append(error)
                    bar.write(str(error), file=sys.stderr)
                bar.set_postfix_str(waiting[done])
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, which the running ones get, too
    if failed:
        raise InputError(f"{len(failed)} of {len(open_runs)} runs failed, the first: {failed[0]}")


def finished(folder: Path, flags: list[str]) -> bool:
    """Whether the folder holds the results of a run with these flags."""
    made_with = folder / "flags.json"
    return (folder / "heldout.json").exists() and made_with.exists() and json.loads(made_with.read_text()) == flags


def train(folder: Path, flags: list[str]) -> None:
    """A run of the training script, from its last checkpoint if it was made with the same flags."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = folder / "asked.json"
    going_on = asked.exists() and json.loads(asked.read_text("utf-8")) == flags and any(folder.glob("checkpoint-*"))
    for name in ("flags.json", *([] if going_on else ["heldout.json"])):
        (folder / name).unlink(missing_ok=True)
    write_json(asked, flags)
    start = time.monotonic()
    further = ["--resume_from_checkpoint" if going_on else "--overwrite"]
    call("train_grpo_multilevel_unsloth.py", [*flags, "--output_dir", str(folder), *further], folder / "log.txt")
    write_json(folder / "seconds.json", {"seconds of the last start": round(time.monotonic() - start)})
    write_json(folder / "flags.json", flags)


def call(script: str, flags: list[str], log: Path) -> None:
    """A script in a process of its own. Raises `InputError` with the last line of its log if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A folder of its own: Unsloth leaves compiled files where it runs, and two runs would write the same ones.
    with tempfile.TemporaryDirectory() as folder, open(log, "wb") as file:
        command = [sys.executable, str(EXAMPLES / script), *flags]
        code = subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        raise InputError(f"{script} ended with code {code}: {lines[-1]} ({log})")


# --- numbers ---------------------------------------------------------------------------------------------------------


def common_scores(measured: Callable[[list, list[str]], dict], heldout: dict) -> dict:
    """Per run {"before", "after"}: what the run says of its held-out completions, and `measuring`'s view of them; nan
    for what a run says nothing of."""
    return {
        run: {side: _with_nan(sides[side]["scores"]) | measured(*in_rows(sides[side])) for side in ("before", "after")}
        for run, sides in heldout.items()
    }


def _with_nan(scores: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if score is None else score for name, score in scores.items()}


def in_rows(side: dict) -> tuple[list, list[str]]:
    """(prompt of each completion, completion), of one side of a heldout.json."""
    pairs = zip(side["prompts"], side["completions"], strict=True)
    prompts, texts = zip(*((prompt, text) for prompt, group in pairs for text in group), strict=True)
    return list(prompts), list(texts)


def measuring(args: argparse.Namespace) -> Callable[[list, list[str]], dict]:
    """A function of prompts and completions that gives, on one scale for all arms, the geometric mean over completions
    of their own geometric perplexities ("word", "phrase", "sentence"), what they copy of their prompts, how common
    their words are, and what each judge says of them, which is given the text of a chat without the chat."""
    import numpy as np

    from mlppl.data import load_split
    from mlppl.models import load_model
    from mlppl.scoring.calculator import MultiLevelPPLCalculator

    model, tokenizer, _ = load_model(args.model_name)
    calculator = MultiLevelPPLCalculator(tokenizer)
    judges = {Path(name).name: load_model(name)[:2] for name in args.judge_model}
    rows = load_split(args.dataset_name, None, "train")
    commonest = commonest_words([value for row in rows for value in row.values() if isinstance(value, str)])

    def measured(prompts: list, texts: list[str]) -> dict:
        levels = calculator.compute_all_levels(model, texts, prompts)
        scores = {level: float(np.exp(np.nanmean(levels[level].log().numpy()))) for level in LEVELS}
        pairs = [plain(*pair, args.chat or "{prompt}") for pair in zip(prompts, texts, strict=True)]
        begun, texts = map(list, zip(*pairs, strict=True))
        scores |= {"copied": copied(begun, texts), "commonest words": common_share(texts, commonest)}
        for name, judge in judges.items():
            scores |= {f"judge {name}: {level}": value for level, value in judged(*judge, begun, texts).items()}
        return scores

    return measured


def summary(runs: list[dict]) -> dict:
    """{name: `mean_and_sd` over the seeds' runs}, of what the table shows."""
    values = {
        "reward before": [run["before"]["reward"] for run in runs],
        "reward after": [run["after"]["reward"] for run in runs],
        "reward change": [run["after"]["reward"] - run["before"]["reward"] for run in runs],
        **{f"{level} PPL kept": [run["after"][level] / run["before"][level] for run in runs] for level in LEVELS},
        "distinct-2 kept": [run["after"]["distinct-2"] / run["before"]["distinct-2"] for run in runs],
        "repetition": [run["after"]["repetition"] for run in runs],
        "KL": [run["after"]["KL"] for run in runs],
        "words": [run["after"]["words"] for run in runs],
        "copied": [run["after"]["copied"] for run in runs],
        "commonest words": [run["after"]["commonest words"] for run in runs],
        "commonest words before": [run["before"]["commonest words"] for run in runs],
    }
    # Levels as the arm's own reward has them, and as the judges do.
    levels = {f"its own {level}": f"{level} PPL" for level in LEVELS}
    levels |= {name: name for name in runs[0]["after"] if name.startswith("judge ")}
    values |= {
        f"{new} kept": [run["after"][name] / run["before"][name] for run in runs] for new, name in levels.items()
    }
    return {name: mean_and_sd(of_runs) for name, of_runs in values.items()}


def mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    """Of those that are not nan: a policy that collapsed to a word or two has no three-word run to repeat.

    >>> mean_and_sd([0.25, 0.75, float("nan")]), mean_and_sd([0.25])
    ({'mean': 0.5, 'sd': 0.3535533905932738}, {'mean': 0.25, 'sd': None})
    """
    known = [value for value in values if not math.isnan(value)]
    return {
        "mean": statistics.mean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
    }


def show(numbers: dict) -> None:
    columns = {
        "reward before": "{:.2f}",
        "reward after": "{:.2f}",
        "reward change": "{:+.2f}",
        "word PPL kept": "{:.2f}",
        "phrase PPL kept": "{:.2f}",
        "sentence PPL kept": "{:.2f}",
        "distinct-2 kept": "{:.3f}",
        "repetition": "{:.3f}",
        "KL": "{:.2f}",
        "words": "{:.0f}",
    }
    rows = [[arm, *cells_of(one["summary"], columns)] for arm, one in numbers["arms"].items()]
    seeds = numbers["settings"]["seeds"]
    print_table(f"Held-out completions after training, mean ± sd over {len(seeds)} seeds", ["arm", *columns], rows)
    columns = {"copied": "{:.3f}", "commonest words before": "{:.3f}", "commonest words": "{:.3f}"}
    names = next(iter(numbers["arms"].values()))["summary"]
    columns |= {name: "{:.3f}" for name in names if name.startswith("its own ")}
    rows = [[arm, *cells_of(one["summary"], columns)] for arm, one in numbers["arms"].items()]
    print_table("Measures that no reward contains; kept: after / before", ["arm", *columns], rows)
    for judge in dict.fromkeys(name.partition(": ")[0] for name in names if name.startswith("judge ")):
        columns = {name: "{:.3f}" for name in names if name.startswith(f"{judge}: ")}
        rows = [[arm, *cells_of(one["summary"], columns)] for arm, one in numbers["arms"].items()]
        print_table(f"{judge}; kept: after / before", ["arm", *(name.partition(": ")[2] for name in columns)], rows)


def cells_of(summary: dict, columns: dict[str, str]) -> list[str]:
    """mean ± sd of each column in its form."""
    cells = []
    for name, form in columns.items():
        mean, sd = summary[name].values()
        cells.append("" if mean is None else form.format(mean) + ("" if sd is None else " ± " + form.format(sd)))
    return cells


def figure(numbers: dict):
    """A panel for each question, a row for each arm, a dot for each seed."""
    from mlppl.config import COLORS

    arms = list(numbers["arms"])
    made = new_figure(11, 1.4 + 0.42 * len(arms))
    reward, ppl, distinct, kl = made.subplots(1, 4, sharey=True, width_ratios=[3, 3, 2, 2])
    for row, of_arm in enumerate(numbers["arms"].values()):
        runs = list(of_arm["seeds"].values())
        for run in runs:
            ends = [run["before"]["reward"], run["after"]["reward"]]
            reward.plot(ends, [row, row], color="0.75", linewidth=1, zorder=1)
            reward.scatter(ends[:1], [row], color="white", edgecolor="0.3", s=26, zorder=2)
            reward.scatter(ends[1:], [row], color="0.15", s=26, zorder=2)
            for shift, level in zip((-0.2, 0, 0.2), LEVELS, strict=True):
                kept = run["after"][level] / run["before"][level]
                ppl.scatter([kept], [row + shift], color=COLORS[level], s=16, linewidth=0)
            distinct.scatter([run["after"]["distinct-2"] / run["before"]["distinct-2"]], [row], color="0.15", s=26)
            kl.scatter([run["after"]["KL"]], [row], color="0.15", s=26)
    reward.set_yticks(range(len(arms)), arms)
    reward.invert_yaxis()
    reward.set_xlim(-0.02, 1.02)
    reward.set_xlabel("its own reward: ○ before, ● after")
    ppl.set_xlabel("perplexity after / before")
    log_scale(ppl)
    ppl.axvline(1, color="0.6", linewidth=0.8)
    for level in LEVELS:
        ppl.scatter([], [], color=COLORS[level], s=16, label=level)
    made.legend(*ppl.get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    distinct.axvline(0.9, color="0.6", linewidth=0.8, linestyle="--")
    distinct.axvline(1, color="0.6", linewidth=0.8)
    distinct.set_xlabel("distinct-2 after / before")
    kl.set_xlabel("KL to the start, nats")
    made.suptitle("Held-out completions before and after training, a dot a seed", x=0.01, ha="left", fontsize=12)
    quiet_axes([reward, ppl, distinct, kl])
    return made


if __name__ == "__main__":
    sys.exit(main())
