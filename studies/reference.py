"""Does a model learn to write plans that make the true continuation likelier, and is it the plan that does it?

    python reference.py --output_dir study_reference

GRPO with `--target reference` through the training script: the prompt is the beginning of a story and asks what happens
next, and the reward is what the plan does to the surprisal of the true next sentences (VR-CLI, arXiv 2503.22828). Then
the held-out continuations are scored behind the trained plans and behind what a plan is compared with. A run goes on
from its last checkpoint, and what is finished is not done again: a stopped study goes on with the same command.
"""

import argparse
import functools
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from common import add_run_flags, new_figure, print_table, quiet_axes, run_folder, write_figure, write_json
from training import finished, resolved, train

from mlppl import cli
from mlppl.config import LEVELS
from mlppl.errors import InputError

PROMPT = "Here is the beginning of a story.\n\n{prompt}\n\nSay in one sentence what happens next."
TEMPLATE = (
    "{prompt}{completion}<|im_end|>\n<|im_start|>user\nGo on with the story.<|im_end|>\n<|im_start|>assistant\n"
    "{reference}"
)
FLAGS = [
    *("--target", "reference", "--chat", "--prompt_template", PROMPT, "--template", TEMPLATE, "--no_unsloth"),
    *("--no-load_in_4bit", "--ppl_weights", "1", "1", "1", "--num_generations", "8", "--logging_steps", "1"),
    *("--heldout_samples", "16", "--no_gradient_checkpointing"),
]
ARMS = {
    "nats": ["--reward_form", "nats"],
    "nats, beta 0.1": ["--reward_form", "nats", "--beta", "0.1"],
    "steps": ["--reward_thresholds", "0.05:0.5", "1:0.9", "2:1"],  # as VR-CLI has them
}
TRAINED, UNTRAINED, SFT = "trained plan", "untrained plan", "SFT on the continuations, no plan"
CUT, SHUFFLED = "untrained plan, cut to the trained one's length", "the prompt's words, shuffled, as many"
OTHERS, OTHERS_BEFORE = "another row's trained plan", "another row's untrained plan"
KINDS = (TRAINED, UNTRAINED, CUT, OTHERS, OTHERS_BEFORE, SHUFFLED)
OWN = {"before": (UNTRAINED, OTHERS_BEFORE), "after": (TRAINED, OTHERS)}  # what is the plan's own lies between them
PLANS_READ = 10


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.parser(__doc__.splitlines()[0], epilog=__doc__.rpartition("\n\n")[2])
    add_run_flags(parser, "study_reference", "numbers, plans", ARMS, steps=60)
    parser.add_argument("--batch", type=cli.positive_int, default=16, help="completions a step")
    parser.add_argument("--max_new_tokens", type=cli.positive_int, default=32, help="longest plan")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of GRPO; of SFT --sft_learning_rate")
    parser.add_argument("--sft_learning_rate", type=float, default=2e-4, help="peak")
    parser.add_argument("--sentences", type=cli.positive_int, default=2, help="of the true continuation are scored")
    parser.add_argument("--model_name", default="smollm2", help="as for the training script; one with chats")
    parser.add_argument("--dataset_name", default="tiny-stories", help="as for the training script")
    parser.add_argument("--save_steps", type=cli.positive_int, default=10, help="steps between checkpoints")
    parser.add_argument("--quick", action="store_true", help="one arm, one seed, two steps of short plans: a try")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(arms=["nats"], seeds=[0], max_steps=2, batch=8, max_new_tokens=8, sentences=1)
    return args


def main(argv=None) -> int:
    return cli.run(parse_args(argv), study)


def study(args: argparse.Namespace) -> int:
    output = Path(args.output_dir).resolve()
    output.mkdir(parents=True, exist_ok=True)
    data = write_rows(args, output)
    scores, tuned = {}, {}
    for seed in args.seeds:
        for arm in args.arms:
            folder, flags = run_folder(output, arm, seed), run_flags(args, arm, data, seed)
            if not finished(folder, flags):
                print(f"{folder}: training ...", file=sys.stderr)
                (folder / "controls.json").unlink(missing_ok=True)
                train(folder, flags)
            scores[arm, seed] = controlled(args, folder, data, seed)
            write_json(output / "reference.json", numbers(args, scores, tuned))  # as far as it has come
        # The same prompts are held out in all arms.
        tuned[seed] = fine_tuning(args, output, run_folder(output, args.arms[0], seed), data, seed)
        write_json(output / "reference.json", numbers(args, scores, tuned))
    show(scores, tuned)
    write_figure(output / "reference.png", figure(scores, tuned))
    print(f"Numbers: {output / 'reference.json'}\nPicture: {output / 'reference.png'}")
    print(f"Plans: {output / '*' / 'seed_*' / 'plans.txt'}")
    return 0


def write_rows(args: argparse.Namespace, output: Path) -> Path:
    """The data set with continuations of the first few sentences, as a file that the scripts read."""
    from mlppl.data import PromptForm, find_columns, load_split, message_text, prepare_rows, split_sentences
    from mlppl.files import write_text

    dataset = load_split(args.dataset_name)
    columns = find_columns(dataset.column_names, None, None, None, False)
    if columns.reference is None:
        raise InputError(f"data set {args.dataset_name!r} has no references: the study scores continuations")
    path = output / "rows.jsonl"
    rows = []
    for row in prepare_rows(dataset, columns, PromptForm()):
        reference = split_sentences(message_text(row["reference"]), args.sentences, "en")[0].strip()
        if reference:
            rows.append({"id": row["id"], "prompt": message_text(row["prompt"]), "reference": reference})
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


# --- runs ------------------------------------------------------------------------------------------------------------


def run_flags(args: argparse.Namespace, arm: str, data: Path, seed: int) -> list[str]:
    changing = ("max_steps", "max_new_tokens", "learning_rate", "save_steps")
    return [
        *("--model_name", resolved(args.model_name), "--dataset_name", str(data), *FLAGS, *ARMS[arm]),
        *(word for name in changing for word in (f"--{name}", str(getattr(args, name)))),
        *("--per_device_train_batch_size", str(args.batch), "--seed", str(seed), "--save_total_limit", "1"),
    ]


# --- what a plan is compared with -------------------------------------------------------------------------------------


class Heldout:
    """The held-out prompts of a run, their true continuations, and the perplexities of these behind other texts."""

    def __init__(self, args: argparse.Namespace, folder: Path, data: Path) -> None:
        from mlppl.config import ReferenceContext
        from mlppl.data import message_text
        from mlppl.models import load_model
        from mlppl.scoring.calculator import MultiLevelPPLCalculator

        self.model, self.tokenizer, _ = load_model(args.model_name)
        self.calculator, self.joined = MultiLevelPPLCalculator(self.tokenizer), ReferenceContext(template=TEMPLATE)
        self.run = json.loads((folder / "heldout.json").read_text("utf-8"))
        self.rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
        self.prompts = self.run["before"]["prompts"]
        references = {PROMPT.format(prompt=row["prompt"]): row["reference"] for row in self.rows}
        self.references = [references[message_text(prompt)] for prompt in self.prompts]

    def perplexities(self, plans: Sequence[str], scorer=None):
        """float64 [plans, 3], `len(plans) // len(prompts)` of them for each prompt in turn; by the untrained model."""
        import numpy as np

        each = len(plans) // len(self.prompts)
        contexts = [
            self.context(prompt, plan)
            for prompt, group in zip(self.prompts, chunks(plans, each), strict=True)
            for plan in group
        ]
        texts = [reference for reference in self.references for _ in range(each)]
        levels = self.calculator.compute_all_levels(scorer or self.model, texts, contexts)
        return np.stack([levels[level].cpu().numpy() for level in LEVELS], axis=1)

    def context(self, prompt, plan: str = "") -> str:
        return self.joined.context(self.calculator.render(prompt), plan)

    @functools.cached_property
    def empty(self):
        """float64 [prompts, 3]: perplexities behind an empty plan."""
        return self.perplexities([""] * len(self.prompts))

    def improvement(self, plans: Sequence[str], scorer=None) -> dict:
        """{level: in %, over an empty plan in the mean over plans, "words": their mean length}"""
        empty = self.empty.repeat(len(plans) // len(self.prompts), axis=0)
        gained = 100 * (1 - self.perplexities(plans, scorer) / empty)  # [plans, 3]
        levels = dict(zip(LEVELS, gained.mean(axis=0).tolist(), strict=True))
        return {**levels, "mean": float(gained.mean()), "words": sum(len(plan.split()) for plan in plans) / len(plans)}


def controlled(args: argparse.Namespace, folder: Path, data: Path, seed: int) -> dict:
    """{name: improvement} of the held-out continuations behind each kind of text that stands where a plan does."""
    from mlppl.data import message_text

    path = folder / "controls.json"
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    missing = [kind for kind in KINDS if kind not in found]
    if not missing:
        return found
    heldout = Heldout(args, folder, data)
    prompts = [message_text(prompt) for prompt in heldout.prompts]
    before, after = (heldout.run[side]["completions"] for side in ("before", "after"))
    kinds = plan_kinds(before, after, prompts, heldout.tokenizer, random.Random(seed))
    found |= {kind: heldout.improvement(kinds[kind]) for kind in missing}
    write_plans(folder / "plans.txt", prompts, heldout.references, before, after)
    write_json(path, found)
    return found


def plan_kinds(
    before: Sequence[Sequence[str]],
    after: Sequence[Sequence[str]],
    prompts: Sequence[str],
    tokenizer,
    rng: random.Random,
) -> dict[str, list[str]]:
    """Texts to put where a plan stands, by name; of each, as many a prompt as there are plans.

    before, after: the untrained and the trained model's plans of each prompt.
    """
    words, untrained = [], []
    for prompt, first, last in zip(prompts, before, after, strict=True):
        bag = prompt.split()
        for plan, trained in zip(first, last, strict=True):
            words.append(" ".join(rng.sample(bag, min(len(bag), len(trained.split())))))
            length = len(tokenizer(trained, add_special_tokens=False)["input_ids"])
            untrained.append(tokenizer.decode(tokenizer(plan, add_special_tokens=False)["input_ids"][:length]))
    return {
        TRAINED: flat(after),
        UNTRAINED: flat(before),
        CUT: untrained,
        OTHERS: flat([*after[1:], after[0]]),
        OTHERS_BEFORE: flat([*before[1:], before[0]]),
        SHUFFLED: words,
    }


def flat(groups: Sequence[Sequence[str]]) -> list[str]:
    return [one for group in groups for one in group]


def chunks(items: Sequence, size: int) -> list[Sequence]:
    return [items[index : index + size] for index in range(0, len(items), size)]


def fine_tuning(args: argparse.Namespace, output: Path, folder: Path, data: Path, seed: int) -> dict:
    """Improvement of the continuations that `folder`'s run held out, without a plan, under a model that was fine-tuned
    on the others: a gradient on as many tokens as GRPO could sample at most. For all arms, and so once a seed."""
    path = output / f"sft_seed_{seed}.json"
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if kept.get("settings") != settings(args):
        heldout = Heldout(args, folder, data)
        lengths = [len(heldout.tokenizer(row["reference"])["input_ids"]) for row in heldout.rows]
        steps = max(1, round(args.max_steps * args.max_new_tokens * len(lengths) / sum(lengths)))
        print(f"Seed {seed}: SFT, {steps} steps of {args.batch} continuations ...", file=sys.stderr)
        tuned = fine_tuned(args, heldout, output / "sft", seed, steps)
        improvement = heldout.improvement([""] * len(heldout.prompts), tuned)
        kept = {"settings": settings(args), "steps": steps, "improvement": improvement}
        write_json(path, kept)
    return kept["improvement"]


def fine_tuned(args: argparse.Namespace, heldout: Heldout, folder: Path, seed: int, steps: int):
    """The model with the same adapter, merged, since a scorer's adapters are off."""
    import torch
    from datasets import Dataset
    from transformers.trainer_utils import set_seed
    from trl import SFTConfig, SFTTrainer

    from mlppl.models import add_lora, load_model

    model, tokenizer, _ = load_model(args.model_name)
    others = [row for row in heldout.rows if row["reference"] not in heldout.references]
    pairs = [
        {
            "prompt": heldout.context([{"role": "user", "content": PROMPT.format(prompt=row["prompt"])}]),
            "completion": row["reference"],
        }
        for row in others
    ]
    set_seed(seed)
    config = SFTConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=args.batch, seed=seed,
        learning_rate=args.sft_learning_rate, report_to="none", save_strategy="no", logging_steps=10, bf16=False,
        use_cpu=not torch.cuda.is_available(), max_length=None, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    model = add_lora(model, 16, 16, seed, unsloth=False)
    SFTTrainer(model, config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer).train()
    return model.merge_and_unload().eval()


def write_plans(path: Path, prompts, references, before, after) -> None:
    """Ten prompts with what was planned before and after training, to be read."""
    from mlppl.files import write_text

    blocks = [
        f"{prompt}\n  TRUE    {reference}\n  BEFORE  {first[0]!r}\n  AFTER   {last[0]!r}\n"
        for prompt, reference, first, last in list(zip(prompts, references, before, after, strict=True))[:PLANS_READ]
    ]
    write_text(path, "\n".join(blocks), errors="replace")


# --- tables ----------------------------------------------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict:
    names = ("model_name", "dataset_name", "max_steps", "batch", "max_new_tokens", "learning_rate", "sft_learning_rate")
    return {name: getattr(args, name) for name in (*names, "sentences")}


def numbers(args: argparse.Namespace, scores: dict, tuned: dict) -> dict:
    arms: dict = {}
    for (arm, seed), found in scores.items():
        arms.setdefault(arm, {})[str(seed)] = found
    return {"settings": settings(args), "arms": arms, SFT: {str(seed): found for seed, found in tuned.items()}}


def show(scores: dict, tuned: dict) -> None:
    """Per arm and kind of text the improvement of the held-out continuations over no plan, all seeds beside another."""
    rows = []
    for arm in dict.fromkeys(arm for arm, _ in scores):
        runs = [found for (name, _), found in scores.items() if name == arm]
        rows += [cells(f"{arm}: {kind}", [run[kind] for run in runs]) for kind in KINDS]
        for when, (plan, another) in OWN.items():
            rows.append(cells(f"{arm}: the plan's own, {when}", [own(run, plan, another) for run in runs]))
    rows.append(cells(SFT, list(tuned.values())))
    columns = ["behind", "improvement, % (each seed)", *LEVELS, "words"]
    print_table("True continuations of held-out prompts, against an empty plan", columns, rows)


def own(run: dict, plan: str, another: str) -> dict:
    """Points by which a continuation's own plan does more than another row's: what is said, not how."""
    points = {level: run[plan][level] - run[another][level] for level in (*LEVELS, "mean")}
    return points | {"words": run[plan]["words"]}


def cells(name: str, runs: Sequence[dict]) -> list[str]:
    def mean(what: str) -> float:
        return statistics.mean(run[what] for run in runs)

    each = " ".join(f"{run['mean']:+.1f}" for run in runs)
    return [name, each, *(f"{mean(level):+.1f}" for level in LEVELS), f"{mean('words'):.0f}"]


def figure(scores: dict, tuned: dict):
    """A row for each arm and seed, a mark for each kind of text; fine-tuning far to the right, as a line."""
    made = new_figure(9, 1.8 + 0.32 * len(scores))
    axes = made.subplots()
    rows = range(len(scores))
    marks = {
        UNTRAINED: {"marker": "o", "color": "0.7"},
        OTHERS_BEFORE: {"marker": "x", "color": "0.7", "linewidth": 2},
        SHUFFLED: {"marker": "|", "color": "C1", "linewidth": 2},
        OTHERS: {"marker": "x", "color": "C3", "linewidth": 2},
        TRAINED: {"marker": "o", "color": "0.15"},
    }
    for (_, seed), found, row in zip(scores, scores.values(), rows, strict=True):
        for plan, another in OWN.values():
            ends = [found[another]["mean"], found[plan]["mean"]]
            axes.plot(ends, [row, row], color="0.75", linewidth=1, zorder=1)
        sft = tuned[seed]["mean"]
        axes.plot([sft, sft], [row - 0.4, row + 0.4], color="C0", linewidth=2, label="" if row else SFT)
    for kind, mark in marks.items():
        places = [found[kind]["mean"] for found in scores.values()]
        axes.scatter(places, rows, s=40, zorder=2, label=kind, **mark)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_yticks(rows, [f"{arm}, seed {seed}" for arm, seed in scores])
    axes.invert_yaxis()
    axes.set_xlabel("improvement of the true continuation over no plan, %")
    quiet_axes([axes])
    made.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    title = "What is the plan's own lies between × and ●, before training in grey"
    made.suptitle(title, x=0.01, ha="left", fontsize=12)
    return made


if __name__ == "__main__":
    sys.exit(main())
