"""Rewards that temperature, talk and manner cannot earn: examples, the prompt's level, contrast, on four tasks.

    python beyond.py --tasks stories summaries --output_dir study_beyond

stories: go on with a story, asked through a chat. texts: the same as a plain text. plans: plan what happens next.
summaries: say in one sentence what happens. An arm is a reward; each is run with every seed, a process a run. A run
that is finished is not run again, and one that was stopped goes on from its last checkpoint: a stopped study goes on
with the same command. `beyond_measures.py` says what came of it. A run takes an hour on one CPU core.
"""

import argparse
import json
import sys
from pathlib import Path

from common import run_folder
from stories import story_rows
from training import SAVED, run_all

from mlppl import cli
from mlppl.files import write_text

GO_ON = "Here is the beginning of a story.\n\n{prompt}\n\nGo on with the story."
PLAN = "Here is the beginning of a story.\n\n{prompt}\n\nSay in one sentence what happens next."
SUM_UP = "Here is a story.\n\n{prompt}\n\nSay in one sentence what happens in it."
ASKED = {"stories": GO_ON, "texts": "{prompt}", "plans": PLAN, "summaries": SUM_UP}
# What the scorer reads before a reference: the plan between beginning and what comes next; the summary alone.
PLANNED = "{prompt}{completion}<|im_end|>\n<|im_start|>user\nGo on with the story.<|im_end|>\n<|im_start|>assistant\n"
TOLD = "<|im_start|>user\nTell me this story: {completion}<|im_end|>\n<|im_start|>assistant\n"

RUNS = (  # noqa: SIM905
    "--model_name smollm2 --no_unsloth --no-load_in_4bit --gradient_checkpointing false --form nats --learning_rate "
    "5e-4 --per_device_train_batch_size 16 --num_generations 8 --heldout_samples 16 --logging_steps 1"
).split()
OUTER = "--aggregation nested --levels prompt examples"
PERMUTED = "permuted references"
COMPLETIONS = {
    "today": "",
    "prompt, examples": OUTER,
    "half prompt, examples": f"{OUTER} --weights 1 2",
    "a little of the inner": "--aggregation nested --levels word phrase sentence prompt examples --weights 1 1 1 10 10",
}
TASKS = {  # flags, longest completion, arms
    "stories": (["--chat", "--prompt_template", GO_ON], 40, {**COMPLETIONS, "without chat": "--score_without_chat"}),
    "texts": ([], 40, COMPLETIONS),
    "plans": (
        ["--chat", "--prompt_template", PLAN, "--target", "reference", "--template", PLANNED + "{reference}"], 40,
        {"today": "", "examples": "--examples 3", "contrast": "--contrast 2", "both": "--examples 3 --contrast 2",
         PERMUTED: "--examples 3 --contrast 2"},
    ),
    "summaries": (
        ["--chat", "--prompt_template", SUM_UP, "--target", "reference", "--template", TOLD + "{reference}"], 32,
        {"nats": "", "contrast": "--contrast 2", "quotations allowed": "--allow_copies", PERMUTED: ""},
    ),
}  # fmt: skip
STEPS = 40


def main(argv=None) -> int:
    parser = cli.parser(__doc__.splitlines()[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("--output_dir", default="study_beyond", help="a folder for each task, in it one for each run")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what is written")
    parser.add_argument("--arms", nargs="+", help="only these rewards (default: all of a task)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run of each arm for each")
    parser.add_argument("--jobs", type=cli.positive_int, default=1, help="runs at a time")
    parser.add_argument("--max_steps", type=cli.positive_int, default=STEPS, help="optimizer steps of a run")
    return cli.run(parser.parse_args(argv), study)


def study(args: argparse.Namespace) -> int:
    output = Path(args.output_dir).resolve()
    output.mkdir(parents=True, exist_ok=True)
    runs = {}
    for seed in args.seeds:  # the first seed of everything first
        for task in args.tasks:
            flags, longest, arms = TASKS[task]
            for arm, words in arms.items():
                if args.arms and arm not in args.arms:
                    continue
                data = rows_file(output, task, arm == PERMUTED)
                runs[f"{task}: {arm}", seed] = (
                    run_folder(output / task, arm, seed),
                    [*RUNS, *flags, *words.split(), *SAVED, "--dataset_name", str(data), "--seed", str(seed),
                     "--max_steps", str(args.max_steps), "--max_new_tokens", str(longest)],
                )  # fmt: skip
    run_all(runs, args.jobs)
    return 0


def rows_file(output: Path, task: str, permuted: bool = False) -> Path:
    """The rows of a task as JSON lines. permuted: each with the reference of the row before it."""
    path = output / f"{task}{'_permuted' if permuted else ''}.jsonl"
    rows = [row for split in ("train", "test") for row in story_rows("tiny-stories", split, follow=3)]
    beginnings = [(row["id"], row["prompt"], row["reference"]) for row in rows]
    # What is summed up is a story's first five sentences: a CPU trains on them in an hour.
    documents = [(row_id, f"{prompt} {reference}", f"{prompt} {reference}") for row_id, prompt, reference in beginnings]
    columns = documents if task == "summaries" else beginnings
    references = [reference for _, _, reference in columns]
    if permuted:
        references = [*references[-1:], *references[:-1]]
    lines = [
        json.dumps({"id": row_id, "prompt": prompt, "reference": reference}, ensure_ascii=False)
        for (row_id, prompt, _), reference in zip(columns, references, strict=True)
    ]
    write_text(path, "".join(f"{line}\n" for line in lines))
    return path


if __name__ == "__main__":
    sys.exit(main())
