"""TRL's GRPOTrainer, with what a resumed run needs to go on as if it had never stopped. Import Unsloth before this."""

import contextlib
import io
import json
import math
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from ..config import ALL_LEVELS
from ..errors import InputError
from ..files import write_text
from ..reward.terms import as_nats
from ..scoring.sampling import GivenIds, own_settings, prompt_ids, settings_kept
from .diagnostics import Diagnostics, in_one_line
from .job import Job
from .rewards import Reward, perplexity_rewards
from .settings import STATE_FILE, resume_command


class EvaluationStopped(Exception):
    """Ends an evaluation between two batches, after Ctrl-C."""


class ResumableGRPOTrainer(GRPOTrainer):
    """Eight differences: prompts are read as the scorer reads them, of the model's generation_config.json only the
    special tokens act on the sampling and all of it is saved, reward functions get the `prompt_ids` that the policy was
    given, adapters keep their precision, an epoch's order follows from its number, a resumed run with `beta` takes up
    the trained adapter, too, the model card says what the run was, an evaluation can be stopped and
    leaves the random state of training as it was.

    chat: what the chat template is given, keywords of `mlppl.prompts.render_prompt`. card: called with the trainer's
    state when TRL has written README.md into the output folder.

    On 4-bit weights TRL turns adapters into bfloat16, where a step of 5e-5 is lost beside a weight of 0.1, and where a
    checkpoint that is loaded again makes them float32; Unsloth's own trainer leaves them in float32, and so does this.
    """

    def __init__(self, model, *args, chat: Mapping | None = None, card: Callable | None = None, **kwargs) -> None:
        trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        try:
            super().__init__(model, *args, **kwargs)
        except (ValueError, TypeError, ImportError, NotImplementedError, OSError) as error:
            raise InputError(f"TRL's GRPOTrainer does not take these settings: {error}") from error
        for parameter, data in trained:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        self.chat = chat or {}
        self.card = card
        if self.chat_template is not None:  # TRL's own, for tools: the scorer reads it, too
            self.processing_class.chat_template = self.chat_template

    def _tokenize_prompts(self, prompts: list):
        if self.environment_factories is not None:  # it brings tools of its own for each prompt
            return super()._tokenize_prompts(prompts)
        return prompt_ids(prompts, self.processing_class, **self.chat), None, {}

    def _generate(self, prompts: list):
        with own_settings(self.model):
            generated = super()._generate(prompts)
        self._given_ids = generated[0]  # also where a `rollout_func` makes other ones of the prompts
        return generated

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        given = [GivenIds(ids, self.processing_class) for ids in self._given_ids]
        inputs = [{**row, "prompt_ids": ids} for row, ids in zip(inputs, given, strict=True)]
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _save(self, output_dir=None, state_dict=None) -> None:
        with settings_kept(self.model, output_dir or self.args.output_dir):
            super()._save(output_dir, state_dict)

    def create_model_card(self, *args, **kwargs) -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # Weights & Biases, asked for the address of an offline run
            super().create_model_card(*args, **kwargs)
        if self.card is not None and self.is_world_process_zero():
            self.card(self.state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        # With --beta TRL adds an adapter `ref`, a copy of the start, which is saved in a folder of its own. Where there
        # are such folders, transformers loads from them alone: the adapter in training would begin anew.
        if "ref" in getattr(model, "peft_config", {}):
            model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)

    def _evaluate(self, *args, **kwargs):
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):  # the steps after it are the same, also if it is stopped
                return super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            self._metrics["eval"].clear()  # of the batches until then
            return defaultdict(lambda: math.nan)

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        return _OrderOfEpoch(sampler, lambda: int(self.state.epoch or 0))


class _OrderOfEpoch(RepeatSampler):
    """TRL's sampler draws each epoch's order after the last one's: a new process would begin with the first again."""

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]) -> None:
        shape = (sampler.mini_repeat_count, sampler.batch_size, sampler.repeat_count)
        super().__init__(sampler.data_source, *shape, sampler.shuffle, sampler.seed)
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()


def watch(trainer, job: Job, rewards: Sequence[Reward], kl: Callable) -> Diagnostics:
    """Give the trainer the callbacks of this file, and the reward's diagnostics. kl: of `HeldOutPrompts`."""
    for shown in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):  # in a notebook transformers has one of its own
        trainer.remove_callback(shown)
    functions = perplexity_rewards(rewards)
    diagnostics = Diagnostics(functions[0], kl)
    state = RewardState(functions, diagnostics, job.checkpoint)
    for callback in (state, diagnostics, SafeStops(), OneLineProgress(job.reward.aggregation == "nested")):
        trainer.add_callback(callback)
    return diagnostics


def stopped_by(trainer, job: Job) -> int | None:
    """The signal that ended the training early, None without one. Says how to go on."""
    [stops] = [one for one in trainer.callback_handler.callbacks if isinstance(one, SafeStops)]
    if stops.received is not None and trainer.is_world_process_zero():
        step = trainer.state.global_step
        command = resume_command(job.command, str(job.output / f"checkpoint-{step}"))
        print(f"Stopped at step {step}. Go on with\n  {command}")
    return stops.received


class OneLineProgress(ProgressCallback):
    """Trainer's progress bar, and of each log entry what one watches; all of it is in the trainer's state and W&B.

    After the first step, or the first ones that share a sampling, it says how long the others will take. nested: levels
    are shown in nats."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self._nested = nested

    _began: tuple[int, float] | None = None  # the first step of this process, and when

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._began = self._began or (state.global_step, time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        super().on_step_end(args, state, control, **kwargs)
        first, start = self._began
        several = max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)
        steps = state.max_steps - first
        if self.training_bar is not None and state.global_step == first + several < state.max_steps:
            seconds = time.perf_counter() - start
            took = f"Step {first + 1}" if several == 1 else f"Steps {first + 1} to {first + several}"
            self.training_bar.write(
                f"{took} took {duration(seconds)}: {steps:,} steps take about {duration(seconds / several * steps)}, "
                "beside evaluations and the held-out prompts"
            )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is None:
            return
        for prefix in ("", "eval_"):
            of = {name.removeprefix(prefix): value for name, value in logs.items() if name.startswith(prefix)}
            if "reward" in of:
                reward, spread = (or_none(of[name], "{:.3f}") for name in ("reward", "reward_std"))
                levels = [level for level in ALL_LEVELS if f"reward_{level}" in of]
                gains = {level: of[f"reward_{level}"] for level in levels}
                form = "{:+.1f} %"
                if self._nested:
                    gains = {level: None if gain is None else float(as_nats(gain)) for level, gain in gains.items()}
                    form = "{:+.2f} nats"
                told = [f"{level} {or_none(gain, form)}" for level, gain in gains.items()]
                told.append(f"{of['completions/mean_length']:.0f} tokens")
                if "entropy" in of:  # Unsloth's trainer on a GPU computes none
                    told.append(f"entropy {of['entropy']:.2f}")
                self.training_bar.write(
                    f"step {state.global_step}{', eval' if prefix else ''}: reward {reward} (spread {spread}), "
                    f"{', '.join(told)}{in_one_line(of)}"
                )


def or_none(value: float | None, form: str) -> str:
    """None or nan where rows were skipped: the mean of none, the spread of one."""
    return "none" if value is None or math.isnan(value) else form.format(value)


def duration(seconds: float) -> str:
    """
    >>> duration(0.42), duration(95), duration(1500), duration(86400)
    ('0.4 s', '95 s', '25 min', '24.0 h')
    """
    for most, unit, size in ((100, "s", 1), (6000, "min", 60)):
        if seconds < most:
            return f"{seconds / size:.{int(seconds < 10)}f} {unit}"
    return f"{seconds / 3600:.1f} h"


class RewardState(TrainerCallback):
    """Keeps the reward's own state in every checkpoint, and takes it up again from the one a run resumes from.

    The file is the last of a checkpoint to be written: without it, the checkpoint is not whole. It also names the run
    of Weights & Biases, so that a resumed run goes on there, too. functions: the reward, or its levels, of which each
    has the same state.
    """

    def __init__(self, functions: Sequence, diagnostics: Diagnostics, resume_from: str | None = None) -> None:
        self.functions, self.diagnostics = functions, diagnostics
        if resume_from is not None:
            state = json.loads(Path(resume_from, STATE_FILE).read_text(encoding="utf-8"))
            for function in functions:
                function.load_state_dict(state)
            if "diagnostics" in state:
                diagnostics.load_state_dict(state["diagnostics"])
            if "wandb_run" in state:
                os.environ.setdefault("WANDB_RUN_ID", state["wandb_run"])
                os.environ.setdefault("WANDB_RESUME", "allow")

    def on_save(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        content = {**self.functions[0].state_dict(), "diagnostics": self.diagnostics.state_dict()}
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            content["wandb_run"] = wandb.run.id
        write_text(Path(args.output_dir, f"checkpoint-{state.global_step}", STATE_FILE), json.dumps(content))


class SafeStops(TrainerCallback):
    """Saves where a run can go on exactly, and after SIGTERM or Ctrl-C saves and stops at the next such place.

    An evaluation ends between two batches. Completions are sampled for `steps_per_generation` x `num_iterations`
    batches at once and are not part of a checkpoint: one that is due in between waits for the next sampling. A second
    signal ends the process at once. Must come after the trainer's own callbacks. With several processes, a signal to
    one of them stops all.

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
        self._tell_all(args)
        control.should_evaluate &= self.received is None
        if control.should_training_stop:
            return
        self._save_is_due |= control.should_save or self.received is not None
        control.should_save = self._save_is_due and self._is_safe(args)
        if control.should_save:
            self._save_is_due = False
            # What was measured since the last entry is logged: the next process would begin to count anew.
            control.should_log |= self.received is not None
            control.should_training_stop = self.received is not None

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        self._tell_all(args)
        if self.received is None:
            return
        control.should_evaluate = False  # as at the end of one
        # The step before it has ended. Where that is no safe place, the next steps come to one.
        if state.global_step > 0 and self._is_safe(args):
            control.should_save = control.should_training_stop = True
        raise EvaluationStopped

    def _is_safe(self, args) -> bool:
        return self._batches % (args.steps_per_generation * args.num_iterations) == 0

    def _tell_all(self, args) -> None:
        """Let all processes know of a signal to one of them."""
        if torch.distributed.is_initialized():
            anywhere = torch.tensor([self.received or 0], device=args.device)
            torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
            self.received = int(anywhere) or None
