"""What the benchmarks need: alternating timings, a process apart, a timed GRPO step, rows and tables."""

import functools
import itertools
import json
import multiprocessing
import os
import platform
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "rl_training" / "examples"
# Of levels prompt and examples: rows that are shown, other rows, and at most so many times geometric's time.
SHOWN, OTHERS, OUTER = 3, 2, 4.5


def machine() -> str:
    import torch

    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    parts = [f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        parts.insert(0, torch.cuda.get_device_name())
    return ", ".join([*parts, f"Python {platform.python_version()}", f"torch {torch.__version__}"])


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet() -> None:
    """No warnings and progress bars of the libraries between the lines."""
    import logging

    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def now() -> float:
    """Seconds, once the GPU has done what it was asked to."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, `rounds` times, in turns: what else the machine does falls on all of them alike.

    Each runs once before, untimed.
    """
    for run in runs.values():
        run()
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = now()
            run()
            seconds[name].append(now() - start)
    return seconds


def in_turn(run: Callable, groups: Sequence) -> Callable[[], object]:
    """What takes the next group at each call. A group that comes again would find what it begins with kept from before,
    and in training the prompts change."""
    following = itertools.cycle(groups)
    return lambda: run(next(following))


def behind_prompts(texts: Sequence[str], group: int) -> list[list[tuple[str, str]]]:
    """(prompt, completion) of each completion of some groups. texts: of each group its prompt, then its completions."""
    return [
        [(texts[start], f" {text}") for text in texts[start + 1 : start + 1 + group]]
        for start in range(0, len(texts), 1 + group)
    ]


def time_outer_levels(model, tokenizer, texts: Sequence[str], groups: Sequence, rounds: int) -> tuple[dict, dict]:
    """({name: calculator}, {name: seconds of each round}) of the geometric levels, and of levels prompt and examples.

    texts: prompt and reference of `SHOWN` examples, then of the rows that `OTHERS` are drawn from. groups: of
    `behind_prompts`.
    """
    from mlppl.scoring.calculator import MultiLevelPPLCalculator

    rows = list(zip(texts[::2], texts[1::2], strict=True))
    outer = {"levels": ("prompt", "examples"), "examples": rows[:SHOWN], "others": rows[SHOWN:], "contrast": OTHERS}
    calculators = {
        "geometric": MultiLevelPPLCalculator(tokenizer),
        "levels prompt and examples": MultiLevelPPLCalculator(tokenizer, aggregation="nested", **outer),
    }

    def measure(calculator, pairs):
        prompts, completions = map(list, zip(*pairs, strict=True))
        return calculator.compute_all_levels(model, completions, prompts)

    runs = {name: in_turn(functools.partial(measure, one), groups) for name, one in calculators.items()}
    return calculators, alternate(runs, rounds)


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def whole_rows():
    """The scorer's class with prefix sharing left out."""
    import numpy as np

    from mlppl.scoring.batching import Group
    from mlppl.scoring.surprisal import SurprisalScorer

    class WholeRows(SurprisalScorer):
        def groups(self, rows):
            return [Group(0, rows)]

        def behind(self, groups):
            return [(np.array([], dtype=np.int64), groups)]

    return WholeRows


def peak_bytes(run: Callable[[], object]) -> int:
    """Most memory that `run` took beyond what was taken when it began; for a short run before it, so that what stays
    for good (libraries, buffers of the matrix product) is not counted.

    On a GPU what PyTorch allocated there. On a CPU resident memory as Linux counts it (VmHWM, set back to VmRSS
    before): PyTorch does not count there, and its profiler would miss what libraries take.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def apart(function: Callable, **options):
    """function(**options) in a fresh process, its output kept off the table. Raises `RuntimeError` if it fails."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_quietly, function, options).result()


def _quietly(function: Callable, options: dict):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # Unsloth leaves compiled files where it runs
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            return function(**options)
        # It has to travel between processes, which not every exception can.
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from None
        finally:
            os.chdir("/")


def grpo_step(
    model: str, unsloth: bool, in_4bit: bool, prompts: list[str], group: int, batch: int, new_tokens: int, steps: int
) -> dict[str, float]:
    """Seconds of one GRPO step (the median after the first) with its parts, and its peak memory. Call it `apart`.

    model: folder. prompts: of all steps. group: completions a prompt. batch: completions in one forward and backward
    pass. Returns "step", "generation", "reward" and "rest" (log-probabilities, loss, backward, optimizer) in seconds;
    "peak", bytes: on a GPU what PyTorch reserved there, weights included, on a CPU resident memory; "allocated", what
    of it were tensors; "perplexity", that of the first prompt's words under the starting model, asked after the
    training; "rewards", the seconds of one call of the reward on the last step's completions, by aggregation.
    """
    from mlppl.models import add_lora, import_unsloth, load_model

    if unsloth and (reason := import_unsloth()):
        raise RuntimeError(reason)
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from mlppl.reward.function import MultiLevelPPLRewardFunction
    from mlppl.scoring.calculator import MultiLevelPPLCalculator

    policy, tokenizer, refused = load_model(model, load_in_4bit=in_4bit, unsloth=unsloth, max_seq_length=2048)
    if refused:
        raise RuntimeError(refused)
    policy = add_lora(policy, r=16, alpha=16, seed=0, unsloth=unsloth)
    seconds = {"step": [], "generation": [], "reward": []}
    reward = MultiLevelPPLRewardFunction(policy, tokenizer, use_cache=False)
    last_call = {}

    def scored(prompts, completions, **columns):
        last_call.update(prompts=prompts, completions=completions, completion_ids=columns["completion_ids"])
        return reward(prompts, completions, **columns)

    def timed(name, function):
        def call(*args, **kwargs):
            start = now()
            result = function(*args, **kwargs)
            seconds[name][-1] += now() - start
            return result

        call.__name__ = name
        return call

    class StepTime(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            for values in seconds.values():
                values.append(0.0)
            self.start = now()

        def on_step_end(self, *args, **kwargs):
            seconds["step"][-1] = now() - self.start

    cuda = torch.cuda.is_available()
    trainer = GRPOTrainer(
        model=policy,
        args=GRPOConfig(
            output_dir="grpo",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=len(prompts) * group // (batch * steps),
            num_generations=group,
            max_completion_length=new_tokens,
            max_steps=steps,
            bf16=cuda,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        reward_funcs=timed("reward", scored),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[StepTime()],
    )
    trainer._generate = timed("generation", trainer._generate)
    trainer.train()
    measured = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    measured["rest"] = measured["step"] - measured["generation"] - measured["reward"]
    measured["peak"] = torch.cuda.max_memory_reserved() if cuda else _status("VmHWM")
    measured["allocated"] = torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")
    measured["perplexity"] = MultiLevelPPLCalculator(tokenizer).compute_all_levels(policy, prompts[0])["word"]
    rewards = {
        name: MultiLevelPPLRewardFunction(policy, tokenizer, use_cache=False, aggregation=name)
        for name in ("geometric", "nested")
    }
    calls = alternate({name: lambda one=one: one(**last_call) for name, one in rewards.items()}, 3)
    measured["rewards"] = {name: statistics.median(values) for name, values in calls.items()}
    return measured


def judged(value: float, target: float, least: bool = True, form: str = "{:.2f}") -> tuple[str, str]:
    """Two cells of a table: the value, and its target with a word if that is missed."""
    met = value >= target if least else value <= target
    bound = f"{'>=' if least else '<='} {form.format(target)}"
    return form.format(value), bound if met else f"{bound} [bold red]missed[/]"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """In a file or a pipe the table is Markdown."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(title=title, title_justify="left", box=box.ROUNDED if console.is_terminal else box.MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if 0 < index < len(columns) - 1 else "left")
    for row in rows:
        table.add_row(*row)  # the cells that a row lacks stay empty
    console.print(table)


class Rows:
    """Writes and prints each row as soon as it is measured: a run that is cut off leaves all that it has found.

    path: of a file of JSON lines, appended to. part: what the rows belong to.
    """

    def __init__(self, path: Path, part: str) -> None:
        self.path = path
        self.part = part

    def add(
        self,
        what: str,
        value: float | None = None,
        unit: str = "",
        ratio: float | None = None,
        target: float | None = None,
        *,
        least: bool = True,
        of: str = "",
        note: str = "",
    ) -> None:
        """target: what the ratio, without one the value, must reach; `least=False`: must not exceed. of: of what."""
        judged_value = value if ratio is None else ratio
        met = None if target is None else bool(judged_value >= target if least else judged_value <= target)
        row = {
            "part": self.part, "what": what, "value": value, "unit": unit, "ratio": ratio,
            "target": None if target is None else f"{'>=' if least else '<='} {target:g}", "met": met,
            "of": of, "note": note,
        }  # fmt: skip
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(" | ".join(cell for cell in _cells(row) if cell), flush=True)


def read_rows(path: Path) -> list[dict]:
    """What `Rows` has written so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def markdown(title: str, rows: Sequence[Mapping]) -> str:
    """A table of the rows of `Rows`."""
    lines = [f"{title}\n", "| what | measured | ratio | target | of what |", "|---|--:|--:|--:|---|"]
    for row in rows:
        lines.append("| {} |".format(" | ".join(_cells(row))))
    return "\n".join(lines) + "\n"


def failure(output: str) -> str:
    """The line of a process's output that says why it failed: its last error, else its last line."""
    lines = output.strip().splitlines()
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b|error:", line)]
    return (errors or lines or [""])[-1][:300]


def _cells(row: Mapping) -> list[str]:
    value, ratio_of = row["value"], row["ratio"]
    measured = "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    target = "" if row["target"] is None else row["target"] + ("" if row["met"] else " **missed**")
    note = "; ".join(filter(None, (row["of"], row["note"])))
    return [
        row["what"], f"{measured} {row['unit']}".strip(), "" if ratio_of is None else f"{ratio_of:.3g}", target, note
    ]  # fmt: skip


def _status(name: str) -> int:
    """Bytes, of this process."""
    return next(int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith(name))


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
