"""Made-up files and flags: each is read, or refused in one line; never a traceback, and nothing in a file is executed.

    python tools/fuzzed.py --count 100000

Inputs are valid ones damaged at random: bytes changed, cut, doubled; in JSON and YAML also keys renamed, values
replaced by others of any kind, lists emptied. Flags are drawn from each script's own, with values of every kind. What
a script checks before it loads a model is asked, in this process. `tests/test_fuzz.py` does a small part of it.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "rl_training" / "examples"
SHARE = {  # of the inputs, by kind; data sets take a thousand times as long as flags
    "flags": 50, "pickle": 14, "json": 14, "meta": 8, "config": 5, "reward": 4, "tools": 2, "template": 1,
    "heldout": 1, "data": 1,
}  # fmt: skip
SECONDS = 60  # an input takes some thousandths of one
EXECUTED = ("exec", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class")
ANY = (
    *(None, True, False, 0, -1, 3, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "a", "\0", "\ud800"),
    *(
        "é" * 40,
        "{prompt}",
        "{",
        "../x",
        "/",
        "C:\\x",
        "-1:0",
        "1:2",
        "0.5:nan",
        "NaN",
        "null",
        "auto",
        "word",
        "(",
        ")",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"a": 1},
        {"word": 1.0, "phrase": 2.0, "sentence": 3.0},
        [{"role": "user", "content": "a"}],
    ),
)


class Payload:
    """Were it unpickled by `pickle`, it would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        at, size = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 8, 64))
        kind = rng.randrange(5)
        if kind == 0:
            content[at : at + size] = rng.randbytes(len(content[at : at + size]))
        elif kind == 1:
            del content[at : at + size]
        elif kind == 2:
            content[at:at] = content[at : at + size]
        elif kind == 3:
            content[at:at] = rng.randbytes(size)
        else:
            del content[at:]
    return bytes(content)


def damaged(rng: random.Random, value, depth: int = 0):
    """A value of JSON with something in it replaced, renamed, doubled or left out."""
    if rng.random() < 0.08 or depth > 6:
        return rng.choice(ANY)
    if isinstance(value, dict) and value:
        made = {}
        for key, item in value.items():
            if rng.random() < 0.06:
                continue
            name = rng.choice(("", "x", key + "s", "word", "model")) if rng.random() < 0.05 else key
            made[name] = damaged(rng, item, depth + 1) if rng.random() < 0.4 else item
        return made
    if isinstance(value, list) and value:
        return [damaged(rng, item, depth + 1) if rng.random() < 0.3 else item for item in value * rng.choice((1, 1, 2))]
    return value


def as_text(value) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


PROMPT_ID = "c7efb86b337326d2"  # of "The fox"
RECORDS = {
    f"row {n}": {
        "word": 3.0 + n,
        "phrase": 2.5,
        "sentence": 2.0,
        "n_tokens": 7,
        "prompt_id": PROMPT_ID,
        "prompt": "The fox",
    }
    for n in range(3)
}
META = {
    "model": {"name": "tiny-stories", "quantization": None, "dtype": "float32", "adapter": None, "weights": "12ab"},
    "tokenizer": "34cd", "window": 512, "target": "completion", "longest": 40, "generated": None, "template": None,
    "definitions": {"max_phrase_words": 4, "language": "en", "aggregation": "geometric"},
    "dataset": {"name": "tiny-stories", "config": None, "split": "train", "columns": {"prompt": "prompt"}},
    "counts": {"baselines": 3, "rows": 3}, "created": "2026-01-01", "run": "x", "versions": {"torch": "2"},
}  # fmt: skip
TRAINING = {"learning_rate": 1e-4, "target": "reference", "max_steps": 3, "reward_thresholds": [[0.5, 0.5], [1, 1]]}
TRAINING |= {"ppl_weights": [0.2, 0.3, 0.5], "load_in_4bit": True, "prompt_template": "{prompt}", "beta": 0.1}
REWARD = {"model_name": "tiny-stories", "weights": [0.2, 0.3, 0.5], "target": "reference", "dtype": "float32"}
REWARD |= {"reward_thresholds": [[0.5, 0.5]], "device": "cpu", "load_in_4bit": False, "language": "en"}
SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
HELDOUT = {
    "sampling": {"seed": 1}, "after": None,
    "before": {"prompts": ["a"], "completions": [["b"]], "rewards": [[0.5]], "scores": {"word": 1.0}},
}  # fmt: skip


class Fuzz:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.mark = folder / "executed"
        self.tokenizer = None

    def cases(self) -> dict[str, Callable[[], None]]:
        return {kind: getattr(self, kind) for kind in SHARE}

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def _baselines(self, suffix: str, content: bytes, meta: bytes | None = None) -> None:
        from mlppl.baselines.file import Baselines, check_meta
        from mlppl.training.settings import models

        path = self.file(f"b{suffix}", content)
        Path(f"{path}.meta.json").unlink(missing_ok=True)
        if meta is not None:
            self.file(f"b{suffix}.meta.json", meta)
        baselines = Baselines.load(path)
        rows = list(RECORDS)
        baselines.check_coverage(rows, ["The fox"] * 3, None, needed=self.rng.random() < 0.5)
        for row in rows:
            baselines.find(row, "The fox", None, 0)
        models(training_args([]), baselines.meta)
        check_meta(baselines, {name: META[name] for name in ("model", "tokenizer", "window", "target", "definitions")})

    def pickle(self) -> None:
        value = damaged(self.rng, RECORDS)
        if self.rng.random() < 0.5:
            value = self.rng.choice(([Payload(self.mark)], {"row 0": Payload(self.mark)}, Payload(self.mark)))
        content = pickle.dumps(value, protocol=self.rng.randrange(6))
        self._baselines(".pkl", damaged_bytes(self.rng, content))

    def json(self) -> None:
        self._baselines(".json", damaged_bytes(self.rng, as_text(damaged(self.rng, RECORDS))))

    def meta(self) -> None:
        content = as_text(damaged(self.rng, META))
        self._baselines(
            ".json", as_text(RECORDS), damaged_bytes(self.rng, content) if self.rng.random() < 0.3 else content
        )

    def config(self) -> None:
        content = damaged_bytes(self.rng, as_text(damaged(self.rng, TRAINING)))
        training_checks(["--config", str(self.file("config.yaml", content))])

    def reward(self) -> None:
        from mlppl.reward.configured import read_settings

        read_settings(self.file("reward.yaml", damaged_bytes(self.rng, as_text(damaged(self.rng, REWARD)))))

    def tools(self) -> None:
        from mlppl.prompts import read_tools

        read_tools(str(self.file("tools.json", damaged_bytes(self.rng, as_text(damaged(self.rng, [SCHEMA] * 2))))))

    def template(self) -> None:
        from mlppl.prompts import read_template, render_prompt

        if self.tokenizer is None:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny_stories")
        text = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{{ [].__class__ }}"
        path = self.file("chat.jinja", damaged_bytes(self.rng, text.encode()))
        self.tokenizer.chat_template = read_template(str(path))
        render_prompt([{"role": "user", "content": "a"}], self.tokenizer)

    def heldout(self) -> None:
        from mlppl.training.heldout import read_before

        content = damaged_bytes(self.rng, as_text(damaged(self.rng, HELDOUT)))
        read_before(self.file("heldout.json", content), {"prompt": ["a"]}, {"seed": 1}, {})

    def data(self) -> None:
        from mlppl.data import PromptForm, find_columns, load_split, prepare_rows

        rows = [{"id": str(n), "prompt": f"The fox {n}", "completion": " ran."} for n in range(3)]
        form = self.rng.choice(("jsonl", "json", "csv"))
        made_up = damaged(self.rng, rows)
        rows = [row if isinstance(row, dict) else {} for row in (made_up if isinstance(made_up, list) else [])]
        if form == "csv":
            content = "prompt,completion\n" + "".join(",".join(map(str, row.values())) + "\n" for row in rows)
            content = content.encode("utf-8", "surrogatepass")
        else:
            content = as_text(rows) if form == "json" else b"\n".join(map(as_text, rows))
        # Another name for each: `datasets` keeps what it has read of a file.
        path = self.file(f"data{self.rng.randrange(10**9)}.{form}", damaged_bytes(self.rng, content))
        try:
            dataset = load_split(str(path))
            columns = find_columns(dataset.column_names)
            prepare_rows(dataset, columns, PromptForm(prompt_sentences=self.rng.choice((None, 1))))
        finally:
            path.unlink()

    def flags(self) -> None:
        self.rng.choice((training_checks, baselines_checks, text_checks, report_checks))(list(self._argv()))

    def _argv(self) -> Iterator[str]:
        import compute_baselines_trl
        import multi_level_ppl_trl
        import train_grpo_multilevel_unsloth
        from mlppl.cli import grpo_fields

        if not hasattr(self, "names"):
            self.names = [f"--{name}" for name in sorted(grpo_fields())]
            for script in (compute_baselines_trl, multi_level_ppl_trl, train_grpo_multilevel_unsloth):
                with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
                    script.parse_args(["--help"])
                self.names += [w.strip("[],") for w in shown.getvalue().split() if w.strip("[],").startswith("--")] * 4
        for _ in range(self.rng.choice((1, 1, 2, 3, 5))):
            name = self.rng.choice(self.names)
            if name in ("--help", "--debug"):
                continue
            yield name if self.rng.random() < 0.95 else name[:-1]
            for _ in range(self.rng.choice((0, 1, 1, 1, 2, 3))):
                value = self.rng.choice(ANY)
                text = value if isinstance(value, str) else json.dumps(value)
                # No argument of a program holds these; bytes that are no UTF-8 are others.
                yield text.replace("\0", "").replace("\ud800", "\udc80")


def training_args(argv):
    import train_grpo_multilevel_unsloth

    return train_grpo_multilevel_unsloth.parse_args(argv)[0]


def training_checks(argv: list[str]) -> None:
    """What the training script checks before it reads data and models."""
    import train_grpo_multilevel_unsloth
    from mlppl import cli
    from mlppl.reward.loop_guard import check_weight
    from mlppl.training.settings import check_reporters, find_checkpoint, models, plan_batches

    args, _ = train_grpo_multilevel_unsloth.parse_args(argv)
    for part in (cli.reward_config, cli.sampling, cli.prompt_form, cli.chat_options):
        part(args)
    find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    check_weight(args.loop_penalty)
    check_reporters(args.report_to or [])
    plan_batches(args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_generations, 1)
    models(args, {})


def baselines_checks(argv: list[str]) -> None:
    import compute_baselines_trl
    from mlppl.baselines.job import prepare

    args = compute_baselines_trl.parse_args(argv)
    args.dataset_name = "missing.jsonl"  # what is made up is the flags
    prepare(args)


def text_checks(argv: list[str]) -> None:
    import multi_level_ppl_trl
    from mlppl import cli
    from mlppl.models import model_path

    args = multi_level_ppl_trl.parse_args(argv)
    model_path(args.model_name)
    cli.reward_config(args)
    multi_level_ppl_trl.read_text(args)


def report_checks(argv: list[str]) -> None:
    import test_multilevel_ppl_trl
    from mlppl.models import model_path

    model_path(test_multilevel_ppl_trl.parse_args(argv).model_name)


class Executed(Exception):
    """Code in a file would have run."""


class TooLong(Exception):
    """No `OSError`, as `TimeoutError` is: what reads a file would refuse it for that."""


def too_long(*_) -> None:
    raise TooLong(f"over {SECONDS} s")


def fuzz(count: int, seed: int = 0, progress: bool = False) -> tuple[Counter, list[str]]:
    """(how many of each kind were read and refused, what went wrong with the inputs that did)."""
    from mlppl.errors import InputError

    watching = False

    def hook(event: str, given: tuple) -> None:
        if not watching or event not in EXECUTED:
            return
        # Modules are executed when they are imported, and Jinja and dataclasses compile what they are made of.
        if event == "exec" and (Path(given[0].co_filename).exists() or kind not in ("pickle", "json", "meta")):
            return
        raise Executed(event)

    outcomes: Counter = Counter()
    wrong: list[str] = []
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # made-up names of files stay in here
        made = Fuzz(Path(folder), seed)
        cases = made.cases()
        for case in cases.values():  # what is imported late is imported now
            with contextlib.suppress(Exception, SystemExit), contextlib.redirect_stderr(io.StringIO()):
                case()
        sys.addaudithook(hook)
        signal.signal(signal.SIGALRM, too_long)
        kinds = made.rng.choices(list(SHARE), weights=SHARE.values(), k=count)
        try:
            for number, kind in enumerate(kinds):
                said = io.StringIO()
                watching = True
                signal.alarm(SECONDS)
                try:
                    with contextlib.redirect_stderr(said):
                        cases[kind]()
                    outcomes[kind, "read"] += 1
                except InputError as error:
                    outcomes[kind, "refused"] += 1
                    if not str(error).strip():
                        wrong.append(f"{kind} {number}: refused without a word")
                except SystemExit as end:
                    outcomes[kind, "refused"] += 1
                    if end.code != 2 or len(said.getvalue().strip().splitlines()) != 1:
                        wrong.append(f"{kind} {number}: exit code {end.code}, {said.getvalue()[-300:]!r}")
                except Exception as error:
                    steps = traceback.extract_tb(error.__traceback__)
                    [*_, ours] = [step for step in steps if str(EXAMPLES) in step.filename] or steps
                    at = f"{Path(ours.filename).name}:{ours.lineno}"
                    wrong.append(f"{kind} {number}: {type(error).__name__} at {at}: {str(error)[:160]!r}")
                finally:
                    signal.alarm(0)
                    watching = False
                if progress and number % 1000 == 999:
                    print(f"{number + 1:,} of {count:,}, wrong: {wrong[-3:] or 'none'}", file=sys.stderr, flush=True)
        finally:
            os.chdir(home)
        if made.mark.exists():
            wrong.append("a pickle's payload was executed")
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.path.insert(0, str(EXAMPLES))
    outcomes, wrong = fuzz(args.count, args.seed, progress=True)
    for kind in SHARE:
        print(f"{kind:10} {outcomes[kind, 'read']:7,} read {outcomes[kind, 'refused']:7,} refused")
    print(f"{args.count:,} files and command lines, {len(wrong)} of which ended otherwise")
    for line in wrong[:40]:
        print(f"  {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
