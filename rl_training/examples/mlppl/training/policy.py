"""Policy and scorer, the same model with its adapter on and off or two: loaded, and what was trained saved."""

import copy
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data import Text, message_text
from ..errors import InputError
from ..models import add_lora, load_model, train_text_only, where, whole_weights
from ..processes import is_first, is_sharded, whole
from ..prompts import render_prompt
from ..scoring.frozen import frozen
from ..scoring.sampling import ignores_padding, prompt_ids, settings_kept
from ..scoring.surprisal import SurprisalScorer
from .job import Job, push_command

# --- merge -----------------------------------------------------------------------------------------------------------

# An adapter and the weights under it -> one model in 16 bit that needs neither PEFT nor bitsandbytes.

MOST_NATS = 0.1  # that a probe's log-probabilities may be off by, on average


@whole_weights()
def save_merged(model, tokenizer, adapter: str | Path, folder: str | Path) -> None:
    """Save the model with its adapter merged into its weights, and the tokenizer.

    model: the PeftModel as it was trained. adapter: folder that its adapter was saved to.

    4-bit weights are turned into the 16-bit numbers they stand for, since those are what the adapter was trained on; to
    merge it into the weights from before quantization, as Unsloth's `save_pretrained_merged` does on a GPU, gives
    another model than the one that was measured. Works on the CPU and takes 2 bytes a parameter there. Of a model whose
    weights are spread over processes, all of them must call; the first one saves.
    """
    from accelerate import init_empty_weights
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = model.get_base_model()
    dtype = torch.float16 if base.dtype == torch.float16 else torch.bfloat16
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights():
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights, trained = _plain_weights(base, plain, dtype), _log_probabilities(model, adapters=True)
    if not is_first():
        return
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    plain.generation_config = base.generation_config

    def refusal(reason: str) -> InputError:
        return InputError(f"--save_merged: {reason}: the adapter is saved unmerged in {adapter}")

    if unfilled := [name for name, parameter in plain.named_parameters() if parameter.is_meta]:
        others = f"{unfilled[0]} and {len(unfilled) - 1} more"
        raise refusal(f"no weights for {others} in {type(base).__name__} with this adapter")
    try:
        merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    except Exception as error:  # PEFT has kinds of adapters that it cannot merge, and says so in many ways
        raise refusal(f"PEFT cannot merge this adapter ({type(error).__name__}: {error})") from error
    # Large where an adapter is on an embedding that the LM head shares: merged, it changes the head, too.
    of_merged = _log_probabilities(merged)
    off = (of_merged - trained).abs().masked_fill(of_merged == trained, 0.0)  # two infinities are equal
    if not (difference := float(off.mean())) <= MOST_NATS:
        raise refusal(
            f"the merged model's log-probabilities are {difference:.2f} nats off the trained one's, more than 16 bit "
            "loses (an adapter on tied embeddings?)"
        )

    partial = Path(f"{folder}.part")
    shutil.rmtree(partial, ignore_errors=True)
    with settings_kept(merged, partial):
        merged.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _log_probabilities(model, adapters: bool = False) -> torch.Tensor:
    """float32 [1, 12, V], nats, of a probe, on the CPU."""
    ids = torch.linspace(0, model.config.get_text_config(decoder=True).vocab_size - 1, 12).long()[None]
    with frozen(model, adapters):
        return model(input_ids=ids.to(model.device)).logits.float().cpu().log_softmax(-1)


def _plain_weights(base, plain, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The base model's parameters and buffers under the names they have without PEFT, on the CPU, 4 bit made 16 bit.

    `model.dequantize()` gives a Llama the same weights, but a GPT-2 transposed ones, and leaves them on the GPU.
    """
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.pytorch_utils import Conv1D

    base.state_dict()  # bitsandbytes repacks 4-bit weights for the CPU; this puts them back
    weights = {}
    for name, value in [*base.named_parameters(), *base.named_buffers()]:
        if any(part in name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_")):
            continue
        owner, _, last = re.sub(r"(?<=\.)(base_layer|original_module|token_adapter)\.", "", name).rpartition(".")
        value = whole(value)
        if isinstance(value, torch.nn.Parameter):
            quantized = not value.is_floating_point()
            value = dequantize_bnb_weight(value)
            # bitsandbytes has them as linear layers, whose weight is the transpose.
            if quantized and isinstance(plain.get_submodule(owner), Conv1D):
                value = value.T
        weights[f"{owner}.{last}"] = value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
    return weights


# --- load ------------------------------------------------------------------------------------------------------------

NOT_PUSHED = 3  # the exit code of a run that is finished and saved, but could not be pushed to the hub


class Loaded(NamedTuple):
    model: Any
    tokenizer: Any


def load_policy_and_scorer(job: Job) -> tuple[Loaded, Loaded]:
    """(what is trained, what scores). Raises `InputError` for prompts that the chat template refuses."""
    asked, reason = job.models, job.without_unsloth
    full_finetuning = asked.lora is None
    if reason:
        check_trl(reason)
    if is_first():
        options = ", ".join(f"{name}={asked.policy_load[name]}" for name in ("load_in_4bit", "dtype"))
        print(f"Loading {asked.name} ({options}) ...", flush=True)
    options = {**asked.policy_load, "full_finetuning": full_finetuning}
    model, tokenizer, refused = load_model(asked.name, unsloth=reason is None, **options)
    if refused:
        check_trl(refused)
    reason = reason or refused
    if is_first():
        way = f"transformers and PEFT: {reason}" if reason else "Unsloth"
        print(f"{where(asked.name, model)}. Training with {way}", flush=True)
    if full_finetuning:
        train_text_only(model)
    else:
        model = add_lora(model, **asked.lora, unsloth=reason is None)
    policy = scorer = Loaded(model, tokenizer)  # its adapter is off while it scores
    name = asked.scorer or asked.name
    if asked.scorer_url:
        from ..scoring.server import connect

        scorer = Loaded(*connect(asked.scorer_url, name, asked.scorer_load["chat_template_path"]))
    elif full_finetuning or asked.scorer:
        scorer = Loaded(*load_model(name, unsloth=reason is None, **asked.scorer_load)[:2])
        scorer.model.requires_grad_(False)
    config, group = job.config, job.config.num_generations
    evaluated = config.per_device_eval_batch_size // (config.num_generations_eval or group)
    splits = (
        (job.train_rows, config.generation_batch_size // group),
        (job.heldout_rows, 1),
        (job.eval_rows, evaluated),
    )
    for rows, at_once in splits:
        if rows is not None:
            check_prompts(rows["prompt"], policy, scorer, job, at_once)
    return policy, scorer


def check_trl(reason: str) -> None:
    """Raises `InputError` if the installed TRL cannot train here without Unsloth.

    Its 1.15.0 has one implementation of log-probabilities, in Triton, which needs a GPU; the versions before and after
    have another. reason: why Unsloth is not used.
    """
    import trl

    if trl.__version__.startswith("1.15.") and not torch.cuda.is_available():
        raise InputError(
            f"TRL {trl.__version__} cannot train without a GPU and without Unsloth ({reason}): install trl==1.14.2 or "
            "trl==1.16.0, or train with Unsloth"
        )


def check_prompts(prompts: Sequence[Text], policy: Loaded, scorer: Loaded, job: Job, at_once: int = 1) -> None:
    """Raises `InputError` for a prompt that a chat template refuses, or that leaves no room for a completion, and for
    prompts of several lengths in one batch of a policy that reads padding: TRL pads them on the left, to sample and to
    train. at_once: prompts in a batch."""
    if scorer.tokenizer is not policy.tokenizer:
        for prompt in prompts:
            render_prompt(prompt, scorer.tokenizer, **job.chat)
    window, longest = SurprisalScorer(policy.model).window, job.config.max_completion_length
    lengths = [len(ids) for ids in prompt_ids(list(prompts), policy.tokenizer, **job.chat)]
    for prompt, length in zip(prompts, lengths, strict=True):
        if window is not None and length + longest > window:
            raise InputError(
                f"a prompt of {length} tokens, {message_text(prompt)!r:.60}, and a completion of up to {longest} are "
                f"more than the model's {window} positions: shorten or drop it, lower --max_new_tokens, or raise "
                "--max_seq_length if the model has more"
            )
    if at_once > 1 and len(set(lengths)) > 1 and not ignores_padding(policy.model):
        raise InputError(
            f"{policy.model.config.model_type} reads the padding before a prompt, and a batch has {at_once} of "
            f"{min(lengths)} to {max(lengths)} tokens: train with one prompt a batch (--per_device_train_batch_size "
            f"{job.config.num_generations} --gradient_accumulation_steps 1), with prompts of equal length, or with "
            "another model"
        )


def publish(trainer, job: Job) -> bool:
    """The model card; with --push_to_hub all of the output folder goes to the hub. Whether that worked: a push that
    fails is told in one line, since all else is there. Several processes must all call."""
    pushed = True
    if job.config.push_to_hub:
        try:
            trainer.push_to_hub(revision=job.config.hub_revision)
        except Exception as error:  # whatever the network and the hub may raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            print(f"error: not pushed to the hub ({reason}); push it with: {push_command(job.config)}", file=sys.stderr)
            pushed = False
    else:
        trainer.create_model_card(model_name=job.output.name)
    if is_first():
        print(f"Model card: {job.output / 'README.md'}")
    return pushed


def merge(job: Job, policy: Loaded) -> None:
    """The merged model that --save_merged asks for; last of all, so that nothing else is lost if it cannot be had."""
    if job.models.save_merged and (is_first() or is_sharded(policy.model)):
        folder = job.output / "merged"
        save_merged(policy.model, policy.tokenizer, job.output, folder)
        if is_first():
            print(f"Merged model, in 16 bits: {folder}")
