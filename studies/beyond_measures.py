"""What came of the runs of beyond.py: a table a task, and completions side by side.

    python beyond_measures.py --output_dir study_beyond --judges JUDGES

Untrained completions at temperatures 1, 0.8 and 0.6 stand beside the trained ones, with human texts and, for
references, key words and the first sentence. --judges: the folder of judges.py, with Gemma 3 270M and MiniLM. Numbers
are kept as they come, in OUTPUT_DIR/measured.json; what is there is not measured again.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
from beyond import ASKED, PERMUTED, PLANNED, TASKS, TOLD
from common import print_table, run_folder, write_json
from judges import embedder, gemma_file
from measures import (
    common_share,
    commonest_words,
    copied,
    plain,
    semantic_variety,
    talks,
    tokens_of,
    two_sample_accuracy,
)
from prefers import first_sentence, key_words

from mlppl import cli
from mlppl.training.diagnostics import described
from mlppl.training.found import found

K, COLD = 16, (0.8, 0.6)
# What the judge, which has seen no chats, reads before a reference.
READ = {
    "summaries": "In one sentence: {completion}\n\nThe story: ",
    "plans": "{beginning}\n\nWhat happens next: {completion}\n\nThe story goes on: ",
}


def main(argv=None) -> int:
    parser = cli.parser(__doc__.splitlines()[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("--output_dir", default="study_beyond", help="of beyond.py")
    parser.add_argument("--judges", type=Path, required=True, help="folder of judges.py")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--shown", type=cli.positive_int, default=10, help="prompts of which completions are printed")
    return cli.run(parser.parse_args(argv), measure)


class Bench:
    """Models, loaded once: the scorer of the runs, the judge of another family, the embedder."""

    def __init__(self, judges: Path) -> None:
        from mlppl.models import load_model
        from mlppl.scoring.calculator import MultiLevelPPLCalculator

        self.model, self.tokenizer, _ = load_model("smollm2")
        self.judge = load_model(str(gemma_file(judges)))[:2]
        self.own = MultiLevelPPLCalculator(self.tokenizer)
        self.others = MultiLevelPPLCalculator(self.judge[1])
        self.embed = embedder(judges)

    def nats(self, pairs, judge: bool = True) -> np.ndarray:
        """Mean surprisal of each (context, text), by the judge or by the scorer."""
        model, calculator = (self.judge[0], self.others) if judge else (self.model, self.own)
        return calculator.mean_surprisals(model, pairs)


def measure(args: argparse.Namespace) -> int:
    output = Path(args.output_dir).resolve()
    kept_file, bench = output / "measured.json", Bench(args.judges)
    kept = json.loads(kept_file.read_text("utf-8")) if kept_file.exists() else {}
    for task in args.tasks:
        of_task = kept.setdefault(task, {})
        _, _, arms = TASKS[task]
        shown = {}
        for arm in arms:
            for folder in sorted((output / task).glob(f"{run_folder(Path(), arm, 0).parent}/seed_*")):
                if not (folder / "flags.json").exists():
                    continue
                heldout = json.loads((folder / "heldout.json").read_text("utf-8"))
                seed, prompts = folder.name, heldout["before"]["prompts"]
                references = references_of(output, task, prompts)
                sides = {
                    ("untrained", seed): heldout["before"]["completions"],
                    (arm, seed): heldout["after"]["completions"],
                }
                sides |= {(f"untrained, T {t}", seed): colder(bench, output, task, seed, heldout, t) for t in COLD}
                for (name, run), groups in sides.items():
                    shown.setdefault(name, (prompts, groups))
                    if f"{name}, {run}" not in of_task:
                        of_task[f"{name}, {run}"] = measured(bench, task, prompts, groups, references)
                        write_json(kept_file, kept)
                yardsticks = {"human": [[one] for one in references]}
                if task in ("summaries", "plans"):
                    yardsticks = {
                        "first sentence": [[first_sentence(one)] for one in references],
                        "12 key words": [[key_words(one, 12)] for one in references],
                    }
                for name, groups in yardsticks.items():
                    if f"{name}, {seed}" not in of_task:
                        of_task[f"{name}, {seed}"] = measured(bench, task, prompts, groups, references)
                        write_json(kept_file, kept)
        show(task, of_task)
        for index in range(args.shown if shown else 0):
            prompt = shown[next(iter(shown))][0][index]
            print(f"\n**{plain(prompt, '', ASKED[task])[0][:300]}**")
            for name, (_, groups) in shown.items():
                print(f"- {name}: {' '.join(groups[index][0].split())}")
    return 0


def references_of(output: Path, task: str, prompts) -> list[str]:
    """The true reference of each prompt, by what the prompt was made of."""
    rows = [json.loads(line) for line in (output / f"{task}.jsonl").read_text("utf-8").splitlines()]
    found = []
    for prompt in prompts:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        [row] = [row for row in rows if row["prompt"] in text]
        found.append(row["reference"])
    return found


def colder(bench: Bench, output: Path, task: str, seed: str, heldout: dict, temperature: float) -> list[list[str]]:
    """What the untrained model writes for the same prompts at another temperature, kept in a file."""
    from mlppl.scoring.sampling import sample_completions

    path = output / f"{task}_{seed}_T{temperature}.json"
    if not path.exists():
        asked = {**heldout["sampling"], "temperature": temperature}
        texts = sample_completions(
            bench.model, bench.tokenizer, heldout["before"]["prompts"], progress=path.stem, **asked
        )
        write_json(path, {"completions": texts})
    return json.loads(path.read_text("utf-8"))["completions"]


def measured(bench: Bench, task: str, prompts, groups: list[list[str]], references: list[str]) -> dict[str, float]:
    texts = [text for group in groups for text in group]
    each = len(groups[0])
    rows = [index for index in range(len(prompts)) for _ in range(each)]
    beginnings = [plain(prompt, "", ASKED[task])[0] for prompt in prompts]
    whole = [described([text for text in texts if text.strip()] or ["."])]
    result = {
        "words": whole[0]["words"],
        "distinct-2": whole[0]["distinct-2"],
        "talk": float(np.mean(talks([prompts[row] for row in rows], texts))),
        "copied of prompt": copied([prompts[row] for row in rows], texts, split=tokens_of(bench.tokenizer)),
    }
    said = [text.strip() or "." for text in texts]
    first = said[::each]
    if task in ("stories", "texts"):
        common = commonest_words(references)
        human, written = bench.embed(references), bench.embed(first)
        result |= {
            "judge PPL": float(
                np.exp(bench.nats([(beginnings[row], f" {text}") for row, text in zip(rows, said, strict=True)]).mean())
            ),
            "bland": common_share(texts, common),
            "told from human": two_sample_accuracy(human, written),
            "variety": semantic_variety(written),
        }
        # By the judge, as text.
        seen = found(-in_blocks(bench.nats, lambda i, j: (beginnings[j], f" {first[i]}"), len(first), K), K)
        result |= {f"found among {K}": seen.top_1, "p": float(seen.p)}
    else:
        put_together = {"summaries": TOLD, "plans": PLANNED}

        def put(row: int, text: str) -> str:
            return put_together[task].format(prompt=bench.own.render(prompts[row]), completion=text)

        def put_as_text(row: int, text: str) -> str:
            return READ[task].format(beginning=beginnings[row], completion=text)

        result |= gains(lambda pairs: bench.nats(pairs, judge=False), put, first, references, K)
        by_judge = gains(bench.nats, put_as_text, first, references, 2)
        result |= {f"{name} (judge)": by_judge[name] for name in ("own", "others")}
        result["copied of reference"] = copied(
            [references[row] for row in rows], texts, split=tokens_of(bench.tokenizer)
        )
    return result


def gains(nats, put, texts: list[str], references: list[str], k: int) -> dict[str, float]:
    """How much likelier, in nats a token, what was written makes its own reference and others', and how often its own
    the most among k. put: of a row's number and a text, what stands before the row's reference."""
    values = in_blocks(nats, lambda i, j: (put(j, texts[i]), references[j]), len(texts), k)
    scores = nats([(put(row, ""), references[row]) for row in range(len(values))]) - values
    seen = found(scores, k)
    others = scores[~np.eye(len(scores), dtype=bool)]
    return {
        "own": float(np.diag(scores).mean()),
        "others": float(np.nanmean(others)),
        f"found among {k}": seen.top_1,
        "p": float(seen.p),
    }


def in_blocks(nats, pair, rows: int, k: int) -> np.ndarray:
    """[text, row] of `pair(text, row)`, each of k rows' texts with these rows; nan elsewhere. What is no whole block is
    left out."""
    size = rows - rows % k
    values = np.full((size, size), np.nan)
    for start in range(0, size, k):
        block = range(start, start + k)
        values[start : start + k, start : start + k] = nats([pair(i, j) for i in block for j in block]).reshape(k, k)
    return values


def show(task: str, of_task: dict[str, dict]) -> None:
    """Mean over the seeds, and the least and the most."""
    names: dict[str, list[dict]] = {}
    for name, numbers in of_task.items():
        names.setdefault(name.rpartition(", seed_")[0], []).append(numbers)
    if not names:
        return
    columns = list(dict.fromkeys(key for runs in names.values() for key in runs[0]))
    table = []
    for name, runs in names.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs if run.get(column) is not None]
            span = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{span}" if values else "")
        table.append([f"{name}{'' if name != PERMUTED else ' (manner)'}", str(len(runs)), *cells])
    print_table(task, ["completions", "seeds", *columns], table)


if __name__ == "__main__":
    sys.exit(main())
