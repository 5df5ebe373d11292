"""What a long run needs beside TRL: a reward that resumes with the model, and an orderly end on a signal."""

import json
import signal
from pathlib import Path

from transformers import ProgressCallback, TrainerCallback

from .baselines import write_atomically
from .units import LEVELS

STATE_FILE = "reward_state.json"


class OneLineProgress(ProgressCallback):
    """Trainer's progress bar, and of each log entry what one watches; all of it is in the trainer's state and W&B."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None and "reward" in logs:
            levels = ", ".join(f"{level} {logs[f'reward_{level}']:+.1f} %" for level in LEVELS)
            self.training_bar.write(
                f"step {state.global_step}: reward {logs['reward']:.3f} (spread {logs['reward_std']:.3f}), {levels}, "
                f"{logs['completions/mean_length']:.0f} tokens, entropy {logs['entropy']:.2f}"
            )


class RewardState(TrainerCallback):
    """Keeps the reward's own state in every checkpoint, and takes it up again from the one a run resumes from."""

    def __init__(self, reward_fn, resume_from: str | None = None) -> None:
        self.reward_fn = reward_fn
        if resume_from is not None and (path := Path(resume_from, STATE_FILE)).exists():
            reward_fn.load_state_dict(json.loads(path.read_text(encoding="utf-8")))

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            content = json.dumps(self.reward_fn.state_dict()).encode()
            path = Path(args.output_dir, f"checkpoint-{state.global_step}", STATE_FILE)
            write_atomically(path, lambda file: file.write(content))


class StopOnSignal(TrainerCallback):
    """After SIGTERM or Ctrl-C: finish the step, save a checkpoint, stop. A second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self.received = number
        for known in (signal.SIGINT, signal.SIGTERM):
            signal.signal(known, signal.SIG_DFL)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True
