"""Which level sees what: texts are damaged at one level, and each level's perplexity says how much it noticed.

    python levels.py --output_dir study_levels

Effect size: the mean over pairs of ln PPL(damaged) - ln PPL(original), over its standard deviation; its interval holds
95 % of 1,000 bootstrap samples of the texts. Both aggregations are computed from the same surprisals. Preferred: the
share of pairs in which the whole reward, in nats and with the loop guard, is higher for the damaged text.
"""

import argparse
import sys
from itertools import combinations
from pathlib import Path

from common import new_figure, print_table, quiet_axes, write_figure, write_json
from damage import DAMAGES, Damages

from mlppl import cli
from mlppl.config import AGGREGATIONS, DEFAULT_WEIGHTS, LEVELS, NATS_KNEE
from mlppl.data import PromptForm, find_columns, load_split, make_row, message_text
from mlppl.errors import InputError
from mlppl.prompts import render_prompt

PAIRS = list(combinations(LEVELS, 2))
CORRELATIONS = {"damages": "all damages", "within": "within a damage", "samples": "its own samples"}
WEIGHTS = {"0.2 0.3 0.5": (0.2, 0.3, 0.5), "equal": (1.0, 1.0, 1.0), "0.3 0.3 0.4": (0.3, 0.3, 0.4), "1 2 1": (1, 2, 1)}
QUICK = {"num_samples": 12, "draws": 2, "samples": 4}


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.parser(__doc__.splitlines()[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("--output_dir", default="study_levels", help="numbers and picture")
    parser.add_argument("--num_samples", type=cli.positive_int, help="only the first rows with text (default: all)")
    parser.add_argument("--draws", type=cli.positive_int, default=6, help="damaged texts of each kind for a text")
    parser.add_argument("--samples", type=cli.positive_int, default=8, help="completions the model writes for a prompt")
    parser.add_argument("--seed", type=int, default=0, help="of damages, samples and bootstrap")
    parser.add_argument("--language", default="en", help="ISO 639 code for splitting sentences")
    parser.add_argument("--prompt_sentences", type=cli.positive_int, metavar="N", help="as for the other scripts")
    parser.add_argument("--quick", action="store_true", help="12 texts, 2 draws, 4 completions: a try")
    cli.add_model_flags(parser)
    cli.add_data_flags(parser)
    parser.set_defaults(dataset_split="test")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    return args


def main(argv=None) -> int:
    return cli.run(parse_args(argv), study)


def study(args: argparse.Namespace) -> int:
    dataset = load_split(args.dataset_name, args.dataset_config, args.dataset_split)
    sentences = args.prompt_sentences
    columns = find_columns(dataset.column_names, *cli.column_options(args))
    # As the baselines: the reference after its prompt, a prompt without a reference by itself.
    form = PromptForm(prompt_sentences=sentences, language=args.language)
    rows = [make_row(example, index, columns, form) for index, example in enumerate(dataset)]
    rows = [(row["prompt"], row["reference"]) if row["reference"] else ("", row["prompt"]) for row in rows]
    rows = [row for row in rows if message_text(row[1]).strip()][: args.num_samples]
    if len(rows) < 2:
        raise InputError(f"{args.dataset_name} has {len(rows)} rows with text: a stranger's sentence needs at least 2")

    from mlppl.models import load_model

    model, tokenizer, _ = load_model(
        args.model_name, load_in_4bit=bool(args.load_in_4bit), dtype=args.dtype, device=args.device
    )
    damaged, samples = damaged_texts(args, rows), sampled(args, model, tokenizer, rows)
    contexts = [render_prompt(prompt, tokenizer) for prompt, _ in rows]
    texts = [(index, message_text(text)) for index, (_, text) in enumerate(rows)]
    texts += [(index, text) for index, _, text in damaged] + samples
    print(f"Scoring {len(texts):,} texts ...", file=sys.stderr)
    pairs = [(contexts[index], text) for index, text in texts]
    levels = log_perplexities(args, model, tokenizer, pairs)
    penalty = penalties(tokenizer, [rows[index][0] for index, _ in texts], [text for _, text in texts])
    numbers = {
        "settings": {name: getattr(args, name) for name in ("model_name", "dataset_name", "dataset_split", "seed")},
        "texts": len(rows),
        "aggregations": {
            name: of_aggregation(args, values, penalty, damaged, samples) for name, values in levels.items()
        },
    }
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "levels.json", numbers)
    write_figure(output / "levels.png", figure(numbers))
    show(numbers)
    print(f"Numbers: {output / 'levels.json'}\nPicture: {output / 'levels.png'}")
    return 0


def damaged_texts(args: argparse.Namespace, rows: list) -> list[tuple[int, str, str]]:
    """[(row, kind of damage, damaged text)]"""
    damaged = []
    for draw in range(args.draws):
        prompts, texts = zip(*((message_text(prompt), message_text(text)) for prompt, text in rows), strict=True)
        damages = Damages(texts, f"{args.seed} {draw}", args.language, prompts=prompts)
        damaged += [(index, name, text) for index in range(len(rows)) for name, text in damages.all(index).items()]
    return damaged


def sampled(args: argparse.Namespace, model, tokenizer, rows: list) -> list[tuple[int, str]]:
    """[(row, completion)]: what the model itself writes after each prompt, as in training."""
    from mlppl.scoring.sampling import sample_completions

    indices = [index for index, (prompt, _) in enumerate(rows) if message_text(prompt)]
    groups = sample_completions(
        model, tokenizer, [rows[index][0] for index in indices],
        num_generations=args.samples, max_new_tokens=64, seed=args.seed, progress="completions",
    )  # fmt: skip
    return [(index, text) for index, group in zip(indices, groups, strict=True) for text in group if text.strip()]


def log_perplexities(args: argparse.Namespace, model, tokenizer, pairs: list[tuple[str, str]]) -> dict:
    """Per aggregation float64 [N, 3], ln PPL of (context, text) at each level."""
    import numpy as np

    from mlppl.scoring.calculator import MultiLevelPPLCalculator

    calculators = {
        name: MultiLevelPPLCalculator(tokenizer, language=args.language, aggregation=name) for name in AGGREGATIONS
    }
    return {name: np.log(one.score_pairs(model, pairs)) for name, one in calculators.items()}


def penalties(tokenizer, prompts: list, texts: list[str]):
    """float64 [N], what the loop guard takes from each text with the reward in nats."""
    import numpy as np

    from mlppl.reward.loop_guard import loop_guard

    penalty, weight = loop_guard(form="nats", tokenizer=tokenizer)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return -weight * np.array(penalty(completion_ids=ids, prompts=prompts))


# --- numbers ---------------------------------------------------------------------------------------------------------


def of_aggregation(args: argparse.Namespace, values, penalty, damaged, samples) -> dict:
    """values: float64 [N, 3], ln PPL of the rows' texts, of `damaged` and of `samples`, in this order. penalty: float64
    [N], of the loop guard."""
    import numpy as np

    size = len(values) - len(damaged) - len(samples)
    indices = np.array([index for index, _, _ in damaged])
    names = np.array([name for _, name, _ in damaged])
    rise = values[size : size + len(damaged)] - values[indices]  # of ln PPL, [pairs, 3]
    # What a damaged text loses of the reward in nats.
    by_weights = {
        name: np.clip(rise @ np.array(weights) / sum(weights), -4 * NATS_KNEE, 4 * NATS_KNEE)
        for name, weights in WEIGHTS.items()
    }
    guard = penalty[size : size + len(damaged)] - penalty[indices]
    results = {"damages": {}, "correlations": {}}
    for name in DAMAGES:
        mine = names == name
        if not mine.any():
            continue  # no prompt that could be copied
        results["damages"][name] = {
            "pairs": int(mine.sum()),
            "preferred": {one: float(((lost + guard)[mine] < 0).mean()) for one, lost in by_weights.items()},
            "preferred, no guard": {one: float((lost[mine] < 0).mean()) for one, lost in by_weights.items()},
        } | {level: effect(rise[mine, column], indices[mine], args.seed) for column, level in enumerate(LEVELS)}
    written = values[size + len(damaged) :]
    group = np.array([index for index, _ in samples])
    written = written - np.array([written[group == index].mean(axis=0) for index in group]).reshape(-1, len(LEVELS))
    for one, other in PAIRS:
        a, b = LEVELS.index(one), LEVELS.index(other)
        within = [correlation(rise[names == name][:, a], rise[names == name][:, b]) for name in DAMAGES]
        within = [value for value in within if value is not None]
        results["correlations"][f"{one}, {other}"] = {
            "damages": correlation(rise[:, a], rise[:, b]),
            "within": sum(within) / len(within) if within else None,
            "samples": correlation(written[:, a], written[:, b]),
        }
    return results


def effect(rise, texts, seed: int) -> dict | None:
    """Paired effect size with its bootstrap interval, and the share of pairs whose damaged text has the higher PPL.

    rise: float64 [pairs]. texts: int64 [pairs], the text each is of: pairs of one text are drawn together.
    """
    import numpy as np

    if len(rise) < 2 or rise.std() == 0:
        return None
    _, text = np.unique(texts, return_inverse=True)
    sums = np.array([np.bincount(text, weights=rise**power) for power in (0, 1, 2)])  # [3, texts]
    drawn = np.random.default_rng(seed).integers(0, sums.shape[1], (1000, sums.shape[1]))
    count, total, squares = sums[:, drawn].sum(axis=2)
    spread = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 1e-12))
    low, high = np.quantile(total / count / spread, [0.025, 0.975])
    return {
        "effect": float(rise.mean() / rise.std()),
        "low": float(low),
        "high": float(high),
        "ranked": float((rise > 0).mean()),
    }


def correlation(a, b) -> float | None:
    """Pearson's, None where there is no spread."""
    import numpy as np

    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 2 and a.std() > 0 and b.std() > 0 else None


def show(numbers: dict) -> None:
    rows = []
    for aggregation, results in numbers["aggregations"].items():
        default = next(name for name, weights in WEIGHTS.items() if weights == DEFAULT_WEIGHTS[aggregation])
        for name, of_damage in results["damages"].items():
            known = {level: of_damage[level] for level in LEVELS if of_damage[level]}
            best = max(known, key=lambda level: known[level]["effect"], default="")
            form = "{effect:.2f} [{low:.2f}, {high:.2f}] {ranked:.0%}"
            cells = [form.format(**known[level]) if level in known else "" for level in LEVELS]
            preferred = [f"{of_damage[name][default]:.0%}" for name in ("preferred", "preferred, no guard")]
            rows.append([f"{aggregation}: {name}", *cells, best, *preferred])
    title = "Paired effect size [95 % interval], and how often the damaged text has the higher perplexity"
    print_table(title, ["", *LEVELS, "most at", "preferred", "no guard"], rows)
    rows = [
        [f"{aggregation}: {name}", *(f"{of_damage['preferred'][one]:.0%}" for one in WEIGHTS)]
        for aggregation, results in numbers["aggregations"].items()
        for name, of_damage in results["damages"].items()
    ]
    print_table("How often the whole reward prefers the damaged text, guard on, by weights", ["", *WEIGHTS], rows)
    rows = [
        [f"{aggregation}: {pair}", *("" if of_pair[key] is None else f"{of_pair[key]:.2f}" for key in CORRELATIONS)]
        for aggregation, results in numbers["aggregations"].items()
        for pair, of_pair in results["correlations"].items()
    ]
    print_table("Correlation between levels, over", ["", *CORRELATIONS.values()], rows)


def figure(numbers: dict):
    """A panel for each damage, in it a group for each aggregation, in it a dot for each level; at last correlations."""
    from mlppl.config import COLORS

    aggregations = numbers["aggregations"]
    damages = list(aggregations["nested"]["damages"])
    made = new_figure(2.1 * len(damages) + 2.5, 3.6)
    *panels, last = made.subplots(1, len(damages) + 1, sharey=True, width_ratios=[1] * len(damages) + [1.25])
    for panel, name in zip(panels, damages, strict=True):
        for group, results in enumerate(aggregations.values()):
            known = {level: results["damages"][name][level] for level in LEVELS}
            most = max((one["effect"] for one in known.values() if one), default=None)
            for shift, (level, one) in zip((-0.24, 0, 0.24), known.items(), strict=True):
                if one:
                    panel.plot([one["low"], one["high"]], [group + shift] * 2, color=COLORS[level], linewidth=1.5)
                    face = COLORS[level] if one["effect"] == most else "white"
                    panel.scatter([one["effect"]], [group + shift], s=34, color=face, edgecolor=COLORS[level], zorder=3)
        panel.axvline(0, color="0.6", linewidth=0.8)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("effect size")
    for group, results in enumerate(aggregations.values()):
        for shift, (pair, of_pair) in zip((-0.24, 0, 0.24), results["correlations"].items(), strict=True):
            for key, mark in {"damages": "o", "within": "|", "samples": "x"}.items():
                if of_pair[key] is not None:
                    last.scatter([of_pair[key]], [group + shift], color="0.25", marker=mark, s=34)
            if group == 0:
                last.text(-0.53, shift, pair.replace(", ", "–"), fontsize=7.5, va="center")
    last.set_title("correlations", fontsize=10)
    last.set_xlabel("● all damages, | within one, × samples", fontsize=8)
    last.set_xlim(-0.55, 1.05)
    panels[0].set_yticks(range(len(aggregations)), list(aggregations))
    panels[0].invert_yaxis()
    for level in LEVELS:
        panels[0].scatter([], [], color=COLORS[level], s=34, label=level)
    made.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    title = "What damage does to the perplexity of each level; filled: the level that sees it best"
    made.suptitle(title, x=0.01, ha="left")
    quiet_axes([*panels, last])
    return made


if __name__ == "__main__":
    sys.exit(main())
