"""What a long run needs beside TRL: a reward that resumes with the model, and an orderly end on a signal."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from ..definitions import LEVELS
from ..files import write_text
from .diagnostics import in_one_line
from .job import Job
from .resume import STATE_FILE, resume_command
from .rewards import Reward, perplexity_rewards


def watch(trainer, job: Job, rewards: Sequence[Reward]) -> None:
    """Give the trainer the callbacks of this file, and the reward's diagnostics."""
    for shown in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):  # in a notebook transformers has one of its own
        trainer.remove_callback(shown)
    functions = perplexity_rewards(rewards)
    for callback in (RewardState(functions, job.checkpoint), functions[0].observer, SafeStops(), OneLineProgress):
        trainer.add_callback(callback)


def stopped_by(trainer, job: Job) -> int | None:
    """The signal that ended the training early, None without one. Says how to go on."""
    [stops] = [one for one in trainer.callback_handler.callbacks if isinstance(one, SafeStops)]
    if stops.received is not None and trainer.is_world_process_zero():
        step = trainer.state.global_step
        command = resume_command(job.command, str(job.output / f"checkpoint-{step}"))
        print(f"Stopped at step {step}. Go on with\n  {command}")
    return stops.received


class OneLineProgress(ProgressCallback):
    """Trainer's progress bar, and of each log entry what one watches; all of it is in the trainer's state and W&B."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is None:
            return
        for prefix in ("", "eval_"):
            if f"{prefix}reward" in logs:
                levels = ", ".join(f"{level} {logs[f'{prefix}reward_{level}']:+.1f} %" for level in LEVELS)
                # Unsloth's trainer on a GPU computes none.
                entropy = f", entropy {logs[f'{prefix}entropy']:.2f}" if f"{prefix}entropy" in logs else ""
                # None where rows were skipped: the mean of none, the spread of one.
                reward, spread = (
                    "none" if (value := logs[f"{prefix}{name}"]) is None else f"{value:.3f}"
                    for name in ("reward", "reward_std")
                )
                self.training_bar.write(
                    f"step {state.global_step}{', eval' if prefix else ''}: reward {reward} (spread {spread}), "
                    f"{levels}, {logs[f'{prefix}completions/mean_length']:.0f} tokens{entropy}"
                    f"{in_one_line(logs, prefix)}"
                )


class RewardState(TrainerCallback):
    """Keeps the reward's own state in every checkpoint, and takes it up again from the one a run resumes from.

    The file is the last of a checkpoint to be written: without it, the checkpoint is not whole. It also names the run
    of Weights & Biases, so that a resumed run goes on there, too. functions: the reward, or its levels, of which each
    has the same state.
    """

    def __init__(self, functions: Sequence, resume_from: str | None = None) -> None:
        self.functions = functions
        if resume_from is not None:
            state = json.loads(Path(resume_from, STATE_FILE).read_text(encoding="utf-8"))
            for function in functions:
                function.load_state_dict(state)
            if "wandb_run" in state:
                os.environ.setdefault("WANDB_RUN_ID", state["wandb_run"])
                os.environ.setdefault("WANDB_RESUME", "allow")

    def on_save(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        content = self.functions[0].state_dict()
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            content["wandb_run"] = wandb.run.id
        path = Path(args.output_dir, f"checkpoint-{state.global_step}", STATE_FILE)
        write_text(path, json.dumps(content))


class SafeStops(TrainerCallback):
    """Saves where a run can go on exactly, and after SIGTERM or Ctrl-C saves and stops at the next such place.

    Completions are sampled for `steps_per_generation` x `num_iterations` batches at once and are not part of a
    checkpoint: one that is due in between waits for the next sampling. A second signal ends the process at once.
    Must come after the trainer's own callbacks. With several processes, a signal to one of them stops all.

    received: the signal's number, None without one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._batches = 0  # since this process began, which is at a safe place
        self._save_is_due = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_end(self, args, state, control, **kwargs) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        self.received = number
        # After Ctrl-C a launcher sends its processes the signal that the terminal sent them already; it is the launcher
        # that ends them if they take too long.
        launched = torch.distributed.is_initialized()
        for known in self._before:
            signal.signal(known, signal.SIG_IGN if launched else signal.SIG_DFL)
        more = "" if launched else "; a second signal ends the run at once"
        print(f"Finishing this step and saving a checkpoint{more}.", file=sys.stderr)

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        self._batches += 1

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._batches += 1
        if torch.distributed.is_initialized():
            anywhere = torch.tensor([self.received or 0], device=args.device)
            torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
            self.received = int(anywhere) or None
        if control.should_training_stop:
            return
        self._save_is_due |= control.should_save or self.received is not None
        safe = self._batches % (args.steps_per_generation * args.num_iterations) == 0
        control.should_save = self._save_is_due and safe
        if control.should_save:
            self._save_is_due = False
            # What was measured since the last entry is logged: the next process would begin to count anew.
            control.should_log |= self.received is not None
            control.should_training_stop = self.received is not None
