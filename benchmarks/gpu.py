"""What scoring and a GRPO step cost on one GPU. Each row is printed and written as soon as it is measured; no hub.

    pip install -r requirements.txt
    python benchmarks/gpu.py

Models of published shapes with random weights: their perplexities mean nothing, their cost is real. The parts run one
after the other, the most important first, each in a process of its own, until --seconds are over; what does not come
to its turn is named. OUT/rows.jsonl holds a JSON object for each row, OUT/table.md the table.

Without a GPU, or with --toy, the same code runs on toy models in two minutes; that shows that it works, and no number
of it means anything.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gpu_grpo
import gpu_scoring
import gpu_train
from common import EXAMPLES, Rows, failure, machine, markdown, quiet, read_rows

# name -> (what --only calls it, function of rows, toy, folder); `folder` holds the 4-bit model of the largest shape,
# which the first part makes. In the order in which they are measured.
PARTS = {
    "4-bit 8B": ("all", gpu_scoring.make_4bit),
    "GRPO 8B, Unsloth": ("grpo", gpu_grpo.unsloth),
    "scoring 8B": ("scoring", gpu_scoring.largest),
    "GRPO 8B, transformers + PEFT": ("grpo", gpu_grpo.peft),
    "GRPO 8B, Unsloth, batch 1": ("grpo", gpu_grpo.batch_of_one),
    "memory 8B": ("memory", gpu_scoring.memory_of_largest),
    "scoring 1B": ("scoring", gpu_scoring.middle),
    "scoring GPT-2": ("scoring", gpu_scoring.smallest),
    "precision": ("scoring", gpu_scoring.precision),
    "scripts": ("train", gpu_train.scripts),
}
NEED_4BIT = {"GRPO 8B, Unsloth", "scoring 8B", "GRPO 8B, transformers + PEFT", "GRPO 8B, Unsloth, batch 1", "memory 8B"}
ONLY = ("scoring", "grpo", "train", "memory")


def parse_args(argv=None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=ONLY, nargs="+", default=ONLY, help="these parts (default: all)")
    parser.add_argument("--out", type=Path, default=Path("output_gpu"), help="folder of the rows (default: output_gpu)")
    parser.add_argument("--seconds", type=float, default=480, help="no part runs any longer (default: 480)")
    parser.add_argument("--toy", action="store_true", help="toy models (default: only where there is no GPU)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    return run_part(args) if args.part else run_all(args)


def run_part(args: argparse.Namespace) -> int:
    """One part, in the process that `run_all` made for it."""
    quiet()
    _, measure = PARTS[args.part]
    measure(Rows(args.out / "rows.jsonl", args.part), args.toy, args.folder)
    return 0


def run_all(args: argparse.Namespace) -> int:
    import torch

    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    toy = args.toy or not torch.cuda.is_available()
    rows = Rows(args.out / "rows.jsonl", "machine")
    rows.path.unlink(missing_ok=True)
    rows.add(machine(), note="toy models: no number means anything" if toy else "")
    wanted = [name for name, (group, _) in PARTS.items() if group in args.only and not (toy and name == "scoring 1B")]
    if NEED_4BIT & set(wanted):
        wanted.insert(0, "4-bit 8B")
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            left = args.seconds - (time.monotonic() - started)
            command = [sys.executable, __file__, "--part", name, "--folder", folder, "--out", str(args.out.resolve())]
            reason = run_for(left, [*command, "--toy"] if toy else command)
            if reason:
                Rows(rows.path, name).add("not measured to its end", note=reason)
    measured = read_rows(rows.path)
    title = f"{'Toy size' if toy else 'One GPU'}, {time.monotonic() - started:.0f} s in all"
    table = markdown(title, measured)
    (args.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    return int(any("failed" in row["what"] or "failed" in row["note"] for row in measured))


def run_for(seconds: float, command: list[str]) -> str | None:
    """Run the command for so long at most. None, or the reason why it did not come to its end."""
    if seconds < 1:
        return "no time was left"
    # A part's own processes end with it: it leads a process group.
    with tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])}
        process = subprocess.Popen(command, stderr=errors, start_new_session=True, env=environment)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped: no time was left after {seconds:.0f} s of it"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
        errors.seek(0)
        return f"failed: {failure(errors.read()) or f'exit code {code}'}" if code else None


if __name__ == "__main__":
    sys.exit(main())
