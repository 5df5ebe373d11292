"""What does the scorer prefer before anything is trained: the human text, or temperature, talk and manner?

    python prefers.py --output_dir study_prefers

Three parts: completions of a story's beginning, which the policy is asked for through a chat; plans, behind which the
true continuation is scored; summaries, behind which the story is scored. Texts of known kinds are scored behind their
own prompt and other rows' prompts, with and without examples before these, and the tables say what each reward made of
these numbers prefers. Nothing is trained. Each number is kept once it is there: a stopped study goes on with the same
command, and further numbers of examples are added to what a folder has.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common import print_table, write_json
from damage import BLAND
from measures import talks
from stories import story_rows

from mlppl import cli

ASK = "Here is the beginning of a story.\n\n{prompt}\n\nGo on with the story."
PLAN = "Here is the beginning of a story.\n\n{prompt}\n\nSay in one sentence what happens next."
GO_ON = "Go on with the story."
SUMMARY = "Here is a story.\n\n{document}\n\nSay in one sentence what happens in it."
TELL, TELL_THIS = "Tell me a story.", "Tell me this story: {text}"

TALK = (
    "I'd be absolutely thrilled to start a new story with you. I'm here to help spark ideas and bring it to life.",
    "Your story is a wonderful beginning, and I love how you set the scene. The narrative could go on with a twist.",
)
NONSENSE = "It is like a light. It is very very before for, very."  # a plan that today's reward makes a model write
TRUE, OWN = "true", "T 1"
SAMPLES = {OWN: (1.0, 4), "T 0.8": (0.8, 2), "T 0.6": (0.6, 2)}  # of the model itself: temperature, texts a prompt
# Rewards of a text, made of nats a token: c behind another prompt, d behind its own; f and e the same behind examples.
# Both orders, what examples add and then the prompt or the other way round, have the same sum, c - e.
CAP = 0.5  # about what the true continuations' own prompts add to them
REWARDS: dict[str, Callable] = {
    "today -d": lambda c, d, e, f: -d,
    "ex. before -e": lambda c, d, e, f: -e,
    "ex. d-e": lambda c, d, e, f: d - e,
    "ex. c-f": lambda c, d, e, f: c - f,
    "prompt c-d": lambda c, d, e, f: c - d,
    "prompt f-e": lambda c, d, e, f: f - e,
    "sum c-e": lambda c, d, e, f: c - e,
    "d-e+f-e": lambda c, d, e, f: d - e + f - e,
    "2(d-e)+f-e": lambda c, d, e, f: 2 * (d - e) + f - e,
    "d-e+min(c-d,.5)": lambda c, d, e, f: d - e + (c - d).clip(max=CAP),
    "d-e+min(f-e,.5)": lambda c, d, e, f: d - e + (f - e).clip(max=CAP),
}
STOP = frozenset(
    "the a an and or but of to in on at it is was were be been he she they his her their them him you i we that this "  # noqa: SIM905
    "with for as not no so up down out had has have did do said then there when what who by from into over all one very"
    .split()
)  # fmt: skip
FOR_EXAMPLES = 8  # rows kept for contexts, so that a further N changes no other number
PARTS = ("completions", "plans", "summaries")


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.parser(__doc__.splitlines()[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("--output_dir", default="study_prefers", help="numbers and texts, a file for each part")
    parser.add_argument("--model_name", default="smollm2", help="as for the training script; one with chats")
    parser.add_argument("--dataset_name", default="tiny-stories", help="as for the training script; stories")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to make tables of")
    parser.add_argument(
        "--forms", nargs="+", choices=("chat", "text"), default=["chat", "text"],
        help="how the scorer reads completions: as the policy was asked, or as judges read",
    )  # fmt: skip
    parser.add_argument("--rows", type=cli.positive_int, default=24, help="rows that are scored")
    parser.add_argument("--examples", nargs="+", type=cli.positive_int, default=[3, 1, 5], help="N, before a prompt")
    parser.add_argument("--contrast", nargs="+", type=cli.positive_int, default=[1, 2, 4], help="M, other rows")
    parser.add_argument("--max_new_tokens", type=cli.positive_int, default=48, help="longest completion of the model")
    parser.add_argument("--seed", type=int, default=0, help="of rows, examples, other rows and samples")
    parser.add_argument("--quick", action="store_true", help="three rows, one example, one other row: a try")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(rows=3, examples=[1], contrast=[1], max_new_tokens=8)
    return args


def main(argv=None) -> int:
    return cli.run(parse_args(argv), study)


def study(args: argparse.Namespace) -> int:
    output = Path(args.output_dir).resolve()
    output.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    for part in args.parts:
        path = output / f"{part}.json"
        {"completions": completions, "plans": plans, "summaries": summaries}[part](args, bench, Kept(path, args))
        print(f"Numbers and texts: {path}\n")
    return 0


class Kept:
    """A JSON file of what was computed, by name: nothing in it is computed again, unless the settings are others."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self.path = path
        names = ("model_name", "dataset_name", "rows", "max_new_tokens", "seed")
        settings = {name: getattr(args, name) for name in names}
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
        self.content = found if found.get("settings") == settings else {"settings": settings}

    def __call__(self, name: str, compute: Callable):
        if name not in self.content:
            print(f"{self.path.name}: {name} ...", file=sys.stderr, flush=True)
            self.content[name] = compute()
            write_json(self.path, self.content)
        return self.content[name]


class Bench:
    """The scorer, the rows that are scored, those that are examples, and those that are the other rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        from mlppl.errors import InputError
        from mlppl.models import load_model
        from mlppl.scoring.calculator import MultiLevelPPLCalculator

        self.model, self.tokenizer, _ = load_model(args.model_name)
        self.calculator = MultiLevelPPLCalculator(self.tokenizer)
        rows, others = story_rows(args.dataset_name), max(args.contrast)
        if max(args.examples) > FOR_EXAMPLES:
            raise InputError(f"--examples is {max(args.examples)}, expected at most {FOR_EXAMPLES}")
        if len(rows) < args.rows + FOR_EXAMPLES + others:
            raise InputError(
                f"data set {args.dataset_name!r} has {len(rows)} rows: expected at least "
                f"{args.rows + FOR_EXAMPLES + others}, for --rows, --contrast and {FOR_EXAMPLES} that may be examples"
            )
        random.Random(args.seed).shuffle(rows)
        self.rows, self.examples, pool = rows[: args.rows], rows[-FOR_EXAMPLES:], rows[args.rows : -FOR_EXAMPLES]
        # Of each row; the first m of them are its m other rows, however many there may be.
        self.others = [random.Random(f"{args.seed} {row['id']}").sample(pool, len(pool)) for row in self.rows]

    def nats(self, kinds: dict[str, list[list[str]]], pair: Callable[[int, str], tuple[str, str]]) -> dict:
        """{kind: [rows][texts]} nats a token, the mean of the logarithms of the three levels; nan for an empty target.

        pair: of a row's number and a text, the context and what is scored behind it.
        """
        import numpy as np

        pairs = [pair(row, text) for groups in kinds.values() for row, group in enumerate(groups) for text in group]
        values = iter(np.log(self.calculator.score_pairs(self.model, pairs)).mean(axis=1).tolist())
        return {kind: [[next(values) for _ in group] for group in groups] for kind, groups in kinds.items()}

    def chat(self, *said: str) -> str:
        """A chat in which user and assistant speak in turns, up to the assistant's next one."""
        roles = ("user", "assistant")
        return self.calculator.render([{"role": roles[turn % 2], "content": one} for turn, one in enumerate(said)])

    def samples(self, prompts: Sequence[str], temperature: float, number: int, max_new_tokens: int, seed: int) -> list:
        """[prompts][number] texts that the model says to a user's messages."""
        from mlppl.scoring.sampling import sample_completions

        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return sample_completions(
            self.model, self.tokenizer, asked, num_generations=number, max_new_tokens=max_new_tokens,
            temperature=temperature, seed=seed,
        )  # fmt: skip


def following(groups: list) -> list:
    """Each row's group becomes the next one's."""
    return [*groups[1:], groups[0]]


def first_sentence(text: str) -> str:
    from mlppl.data import split_sentences

    return split_sentences(text.strip(), 1, "en")[0]


def key_words(text: str, number: int) -> str:
    """The first words that say something.

    >>> key_words("The fox ran to the sea, and the fox swam.", 3)
    'fox, ran, sea'
    """
    words = [word for word in re.findall(r"[A-Za-z']+", text) if word.lower() not in STOP]
    return ", ".join(list(dict.fromkeys(words))[:number])


# --- completions -----------------------------------------------------------------------------------------------------


def completions(args: argparse.Namespace, bench: Bench, kept: Kept) -> None:
    import numpy as np

    def texts() -> dict:
        asked = [ASK.format(prompt=row["prompt"]) for row in bench.rows]
        true = [[row["reference"]] for row in bench.rows]
        return {
            TRUE: true,
            "another's true": following(true),
            **{
                kind: bench.samples(asked, temperature, number, args.max_new_tokens, args.seed)
                for kind, (temperature, number) in SAMPLES.items()
            },
            "talk": [TALK] * len(bench.rows),
            "bland": [[" ".join(BLAND[:3]), " ".join(BLAND[3:6])]] * len(bench.rows),
            "loop": [[" ".join([first_sentence(row["reference"])] * 4)] for row in bench.rows],
            "prompt": [[row["prompt"]] for row in bench.rows],
        }

    kinds = kept("texts", texts)

    def cell(form: str, examples: int, other: int | None) -> dict[str, np.ndarray]:
        """{kind: [rows, texts]} nats, behind so many examples and the row's own prompt, or another one's"""

        def pair(row: int, text: str) -> tuple[str, str]:
            prompt = bench.rows[row]["prompt"] if other is None else bench.others[row][other]["prompt"]
            shown = bench.examples[:examples]
            if form == "chat":
                said = [(ASK.format(prompt=one["prompt"]), one["reference"]) for one in shown]
                return bench.chat(*sum(said, ()), ASK.format(prompt=prompt)), text.strip()
            return "".join(f"{one['prompt']} {one['reference']}\n\n" for one in shown) + prompt, " " + text.strip()

        name = f"{form}, {examples} examples, {'own prompt' if other is None else f'other prompt {other + 1}'}"
        found = kept(name, lambda: bench.nats(kinds, pair))
        return {kind: np.array(groups, dtype=float) for kind, groups in found.items()}

    seen: dict[tuple, dict] = {}  # each reward by what it depends on
    for form in args.forms:
        d, cs = cell(form, 0, None), [cell(form, 0, other) for other in range(max(args.contrast))]
        for n in args.examples:
            e, fs = cell(form, n, None), [cell(form, n, other) for other in range(max(args.contrast))]
            for m in args.contrast:
                c, f = ({kind: np.mean([one[kind] for one in many[:m]], axis=0) for kind in kinds} for many in (cs, fs))
                rewards = {
                    name: {kind: reward(c[kind], d[kind], e[kind], f[kind]) for kind in kinds}
                    for name, reward in REWARDS.items()
                }
                preferred(f"Read as {form}, N = {n} examples, M = {m} other prompts", rewards)
                for name, reward in rewards.items():
                    terms = name.rpartition(" ")[2]
                    has_n, has_m = ({*one} & {*terms} for one in ("ef", "cf"))
                    seen[form, name, str(n) if has_n else "", str(m) if has_m else ""] = reward
    talk = [talks([row["prompt"]] * len(texts), texts) for row, texts in zip(bench.rows, kinds[OWN], strict=True)]
    separates(seen, np.array(talk))


def preferred(title: str, rewards: dict[str, dict]) -> None:
    """Of each kind how often its reward is above the mean of its row's own samples at temperature 1; by how much."""
    import numpy as np

    rows = []
    for kind in next(iter(rewards.values())):
        cells = []
        for reward in rewards.values():
            above = reward[kind] - np.nanmean(reward[OWN], axis=1, keepdims=True)
            above = above[~np.isnan(above)]
            cells.append(f"{(above > 0).mean():.0%} {above.mean():+.2f}")
        rows.append([kind, *cells])
    print_table(f"{title}: above the mean of own samples at T 1, and nats a token", ["text", *rewards], rows)


def separates(seen: dict[tuple, dict], talk) -> None:
    """How often the true continuation has more of each reward than the other texts of its row.

    sd: how much the reward differs within a row's own samples at temperature 1. talkers: how much more those of them
    have that talk about the story, bool [rows, samples], in these.
    """
    import numpy as np

    rows = []
    for (form, name, n, m), reward in seen.items():
        true = reward[TRUE]
        wins = [np.mean((true > values)[~np.isnan(values)]) for kind, values in reward.items() if kind != TRUE]
        centred = reward[OWN] - np.nanmean(reward[OWN], axis=1, keepdims=True)
        sd = np.nanmean(np.nanstd(reward[OWN], axis=1))
        talkers = (np.nanmean(centred[talk]) - np.nanmean(centred[~talk])) / sd if 0 < talk.mean() < 1 else np.nan
        shares = [f"{share:.0%}" for share in (*wins, min(wins), np.mean(wins))]
        rows.append([f"{form}: {name}", n, m, *shares, f"{sd:.2f}", f"{talkers:+.2f} sd"])
    kinds = [kind for kind in reward if kind != TRUE]
    print_table(
        "How often the true continuation has more than its row's",
        ["reward", "N", "M", *kinds, "least", "mean", "sd", "talkers"], rows,
    )  # fmt: skip


# --- plans and summaries ---------------------------------------------------------------------------------------------


def yardsticks(true: list[str], words: int, name: str = "") -> dict[str, list[list[str]]]:
    """What a perfect writer could say: so many key words of each row's true text, and its first sentence; the same of
    another row's."""
    own = {
        "key words": [[key_words(one, words)] for one in true],
        "first sentence": [[first_sentence(one)] for one in true],
    }
    kinds = {}
    for kind, texts in own.items():
        kinds |= {f"{kind}{name}": texts, f"{kind} of another row's": following(texts)}
    return kinds


def plans(args: argparse.Namespace, bench: Bench, kept: Kept) -> None:
    def texts() -> dict:
        asked = [PLAN.format(prompt=row["prompt"]) for row in bench.rows]
        untrained = bench.samples(asked, 1.0, 2, 32, args.seed)
        true = [row["reference"] for row in bench.rows]
        return yardsticks(true, 8, " of the true continuation") | {
            "another row's true continuation (manner)": following([[one] for one in true]),
            "nonsense that training found": [[NONSENSE]] * len(true),
            "untrained plan": untrained,
            "another row's untrained plan": following(untrained),
        }

    def context(row: dict, text: str, shown: Sequence[dict]) -> str:
        said = [(ASK.format(prompt=one["prompt"]), one["reference"]) for one in shown]
        return bench.chat(*sum(said, ()), PLAN.format(prompt=row["prompt"]), text, GO_ON)

    gains("Plans", args, bench, kept, kept("texts", texts), context, "reference")


def summaries(args: argparse.Namespace, bench: Bench, kept: Kept) -> None:
    def texts() -> dict:
        asked = [SUMMARY.format(document=row["document"]) for row in bench.rows]
        untrained = bench.samples(asked, 1.0, 2, 32, args.seed)
        documents = [row["document"] for row in bench.rows]
        return yardsticks(documents, 12) | {
            "nonsense that training found": [[NONSENSE]] * len(documents),
            "untrained summary": untrained,
            "another row's untrained summary": following(untrained),
        }

    def context(row: dict, text: str, shown: Sequence[dict]) -> str:
        said = [(TELL, one["document"]) for one in shown]
        return bench.chat(*sum(said, ()), TELL_THIS.format(text=text) if text else TELL)

    gains("Summaries", args, bench, kept, kept("texts", texts), context, "document")


def gains(
    title: str, args: argparse.Namespace, bench: Bench, kept: Kept, kinds: dict, context: Callable, target: str
) -> None:
    """The table of what a text adds, in nats a token, to a row's `target`; less what it adds to M other rows'.

    Clipped: where it adds less than nothing to another row's, that earns nothing.

    context: of a row, the text ("" for none) and the rows that are examples.
    """
    import numpy as np

    def added(examples: int, other: int | None) -> dict[str, np.ndarray]:
        def pair(row: int, text: str) -> tuple[str, str]:
            of = bench.rows[row] if other is None else bench.others[row][other]
            return context(of, text, bench.examples[:examples]), of[target]

        name = f"{examples} examples, {'own row' if other is None else f'other row {other + 1}'}"
        with_none = {"none": [[""]] * len(bench.rows), **kinds}
        found = kept(name, lambda: bench.nats(with_none, pair))
        return {kind: np.array(found["none"], dtype=float) - np.array(found[kind], dtype=float) for kind in kinds}

    columns: dict[str, dict] = {}
    for n in [0, *args.examples]:
        own = added(n, None)
        columns[f"N {n}"] = own
        others = [added(n, other) for other in range(max(args.contrast))]
        for m in args.contrast:
            for name, least in (("", -np.inf), (" clipped", 0)):
                columns[f"N {n}, M {m}{name}"] = {
                    kind: own[kind] - np.mean([one[kind].clip(min=least) for one in others[:m]], axis=0)
                    for kind in kinds
                }
    untrained = next(kind for kind in kinds if kind.startswith("untrained"))
    rows = []
    for kind in kinds:
        above = [column[kind] > column[untrained].mean(axis=1, keepdims=True) for column in columns.values()]
        means = [column[kind].mean() for column in columns.values()]
        rows.append([kind, *(f"{more.mean():.0%} {mean:+.3f}" for more, mean in zip(above, means, strict=True))])
    rows.append([
        "sd of a row's untrained ones", *(f"{column[untrained].std(axis=1).mean():.3f}" for column in columns.values())
    ])  # fmt: skip
    title = f"{title}: how often above the mean of the row's untrained ones, and nats a token added to the {target}"
    print_table(title, ["text", *columns], rows)


if __name__ == "__main__":
    sys.exit(main())
