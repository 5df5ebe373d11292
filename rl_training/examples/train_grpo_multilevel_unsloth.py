"""Trains a 4-bit Unsloth model with TRL's GRPO on the multi-level perplexity reward.

    python train_grpo_multilevel_unsloth.py --baselines_path baselines.pkl --output_dir output

Every field of TRL's GRPOConfig is a flag as well (--warmup_steps 100 --beta 0.04 ...), here or in --config run.yaml.
They are listed at https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig
"""

import argparse
import os
import sys
from pathlib import Path

from ppl import cli
from ppl.baselines.file import Baselines, check_meta, read_meta
from ppl.data import check_references, find_columns, load_split, message_text, split_heldout
from ppl.definitions import (
    DEFAULT_MAX_NEW_TOKENS,
    DEFAULT_SEED,
    DEFAULT_TARGET,
    DEFAULT_TEMPERATURE,
    DEFAULT_WEIGHTS,
    MISSING,
    TARGETS,
)
from ppl.models import add_lora, import_unsloth, load_model, model_path
from ppl.reward.loop_guard import WEIGHT, check_reward_weights, loop_guard
from ppl.training import flags as train_flags
from ppl.training.config import REPORTERS, check_reporters, grpo_config, loading, reward_settings
from ppl.training.plan import plan_batches
from ppl.training.resume import LATEST, find_checkpoint, launched, resume_command


def parse_args(argv=None) -> tuple[argparse.Namespace, list[str]]:
    """(our flags, the rest: flags of GRPOConfig)."""
    parser = cli.parser(__doc__.splitlines()[0], epilog=" ".join(__doc__.splitlines()[-2:]))
    cli.add_model_flags(parser)
    cli.add_unsloth_flags(parser)
    cli.add_data_flags(parser)
    cli.add_definition_flags(parser)
    model = parser.add_argument_group("what is trained (default: a LoRA adapter; the folder of one goes on with it)")
    model.add_argument("--full_finetuning", action="store_true", help="train all weights; a frozen copy is the scorer")
    model.add_argument("--scorer_model", help="scorer (default: the model itself as it was before training)")
    model.add_argument(
        "--save_merged", action="store_true", help="also save model and adapter as one 16-bit model, OUTPUT_DIR/merged"
    )

    data = parser.add_argument_group("training data")
    data.add_argument("--max_samples", type=cli.positive_int, help="use the first rows only (default: all)")
    data.add_argument(
        "--heldout_samples", type=cli.positive_int,
        help="rows kept out of training and scored before and after it (default: a fifth, at most 16)",
    )  # fmt: skip

    data.add_argument("--eval_split", help="split evaluated while training, for instance test or test[:64]")
    data.add_argument("--eval_steps", type=float, default=100, help="steps between two evaluations of it")

    reward = parser.add_argument_group("reward")
    reward.add_argument(
        "--baselines_path", help="of compute_baselines_trl.py (default: each prompt's first completions)"
    )
    reward.add_argument("--target", choices=TARGETS, default=DEFAULT_TARGET, help="whose perplexity")
    reward.add_argument(
        "--extract", metavar="REGEX",
        help="with --target reference, the part of a completion that counts: the first group or the match, such as "
        "'In summary:(.*)' (default, and without a match: all of it)",
    )  # fmt: skip
    cli.add_template_flag(reward)
    reward.add_argument(
        "--ppl_weights", type=float, nargs=3, metavar=("W", "P", "S"), default=list(DEFAULT_WEIGHTS),
        help="weights of word, phrase and sentence",
    )  # fmt: skip
    reward.add_argument(
        "--reward_thresholds", nargs="+", metavar="PERCENT:REWARD", type=_threshold,
        help="from improvement to reward (default: 0.05:0.2 0.5:0.5 1:0.7 2:0.9 3:1)",
    )  # fmt: skip
    reward.add_argument("--interpolate", action="store_true", help="linear between the thresholds instead of steps")
    reward.add_argument("--normalize_rewards", action="store_true", help="mean 0, standard deviation 1 in each call")
    reward.add_argument(
        "--repetition_penalty", type=float, default=WEIGHT, metavar="W",
        help="what loops cost, in ranges of the reward; 0: nothing",
    )  # fmt: skip
    reward.add_argument("--missing", choices=MISSING, default="error", help="rows without a baseline")
    reward.add_argument("--allow_baseline_mismatch", action="store_true", help="use baselines made otherwise")

    training = parser.add_argument_group("training (every other field of TRL's GRPOConfig is a flag, too)")
    training.add_argument("--config", help="YAML file of flags; those on the command line win")
    training.add_argument("--output_dir", default="output_grpo", help="adapter, tokenizer, checkpoints, report")
    training.add_argument("--num_train_epochs", type=float, default=1.0, help="passes over the prompts")
    training.add_argument("--per_device_train_batch_size", type=cli.positive_int, default=4, help="in completions")
    training.add_argument("--gradient_accumulation_steps", type=cli.positive_int, help="(default: the least that fits)")
    training.add_argument(
        "--num_generations", type=cli.positive_int, help="completions a prompt (default: 8 if it fits)"
    )
    training.add_argument(
        "--max_new_tokens", type=cli.positive_int, default=DEFAULT_MAX_NEW_TOKENS, help="longest completion"
    )
    training.add_argument("--temperature", type=float, default=DEFAULT_TEMPERATURE, help="of sampling")
    training.add_argument("--learning_rate", type=float, default=5e-5, help="peak")
    training.add_argument("--lora_r", type=cli.positive_int, default=16, help="rank of the adapter")
    training.add_argument("--lora_alpha", type=cli.positive_int, default=16, help="scale of the adapter")
    training.add_argument("--logging_steps", type=float, default=10, help="steps between log lines")
    training.add_argument("--save_steps", type=float, default=500, help="steps between checkpoints")
    training.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of everything random")
    training.add_argument("--wandb_project", help="log to this project of Weights & Biases")
    training.add_argument(
        "--report_to", nargs="+", choices=REPORTERS,
        help="where logs go (default: wandb with --wandb_project; without one, nothing is sent anywhere)",
    )  # fmt: skip
    training.add_argument("--run_name", help="name of the run")
    training.add_argument(
        "--resume_from_checkpoint", nargs="?", const=LATEST, metavar="PATH",
        help="go on with this checkpoint, without PATH with the newest in --output_dir",
    )  # fmt: skip
    return train_flags.parse(parser, argv)


def _threshold(text: str) -> tuple[float, float]:
    improvement, _, reward = text.partition(":")
    try:
        return float(improvement), float(reward)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, expected PERCENT:REWARD such as 0.5:0.7") from error


def prepare_dataset(dataset, columns):
    """The rows that GRPOTrainer gets: `prompt`, `id`, `reference` (TRL drops a column named `completion`), and the
    columns `baseline_...` if there are any. Edit this function to make prompts of your own.

    dataset: a `datasets.Dataset`. columns: `ppl.data.Columns`, which of its columns holds what.
    """
    dropped = [name for name in dataset.column_names if not name.startswith("baseline_")]
    dataset = dataset.map(columns.row, remove_columns=dropped)
    return dataset.filter(lambda row: bool(message_text(row["prompt"]).strip()))


def load_rows(args: argparse.Namespace, split: str, baselines: Baselines | None, most: int | None = None):
    """A split's first rows as `prepare_dataset` makes them. Raises `InputError` if one has no baseline and needs it."""
    dataset = load_split(args.dataset_name, args.dataset_config, split)
    if most is not None:
        dataset = dataset.select(range(min(most, len(dataset))))
    columns = find_columns(dataset.column_names, args.prompt_column, args.reference_column, args.id_column)
    dataset = prepare_dataset(dataset, columns)
    if args.target == "reference":
        check_references(dataset, columns, blank_is_wrong=args.missing == "error")
    if baselines is not None and args.missing == "error":
        baselines.check_coverage(dataset["id"], dataset["prompt"])
    return dataset


def main(argv=None) -> int:
    args, rest = parse_args(argv)
    command = sys.argv[1:] if argv is None else argv
    return cli.run(args, lambda args: train(args, rest, command))


def train(args: argparse.Namespace, rest: list[str], command: list[str]) -> int:
    # What can be refused is refused before a model is loaded.
    for name in filter(None, (args.model_name, args.scorer_model)):
        model_path(name)
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    settings = reward_settings(args)
    check_reporters(args)
    plan = plan_batches(
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.num_generations,
        int(os.environ.get("WORLD_SIZE", "1")),
    )
    baselines = Baselines.load(args.baselines_path) if args.baselines_path else None
    # A data set that compute_baselines_trl.py wrote has them as columns, and says the same of how they were made.
    columns_of = Baselines({}, read_meta(Path(args.dataset_name, ".baselines")), args.dataset_name)
    meta = (baselines or columns_of).meta
    policy_load, scorer_load = loading(args, meta)
    dataset = load_rows(args, args.dataset_split, baselines, args.max_samples)
    train_rows, heldout_rows = split_heldout(dataset, args.heldout_samples, args.seed)
    eval_rows = load_rows(args, args.eval_split, baselines) if args.eval_split else None

    reason = "--no_unsloth" if args.no_unsloth else import_unsloth()
    from ppl.processes import is_first

    config, asked, defaults = grpo_config(args, rest, plan)
    check_reward_weights(config.reward_weights, guarded=args.repetition_penalty > 0)
    say = print if is_first() else lambda *_, **__: None
    say(f"Loading {args.model_name} ({', '.join(f'{key}={value}' for key, value in policy_load.items())}) ...")
    window = {"device": args.device, "max_seq_length": args.max_seq_length}
    model, tokenizer, refused = load_model(
        args.model_name, unsloth=reason is None, full_finetuning=args.full_finetuning, **window, **policy_load
    )
    reason = reason or refused
    say(f"Training with transformers and PEFT: {reason}" if reason else "Training with Unsloth", flush=True)
    if not args.full_finetuning:
        model = add_lora(model, args.lora_r, args.lora_alpha, args.seed, unsloth=reason is None)
    scorer, scorer_tokenizer = model, tokenizer  # its adapter is off while it scores
    if args.full_finetuning or args.scorer_model:
        name = args.scorer_model or args.model_name
        scorer, scorer_tokenizer, _ = load_model(name, unsloth=reason is None, **window, **scorer_load)
        scorer.requires_grad_(False)

    from transformers import PrinterCallback, ProgressCallback

    from ppl.pages.comparison import plot_training, print_comparison
    from ppl.pages.run import RunPage, command_line, explain_heldout
    from ppl.reward.function import MultiLevelPPLRewardFunction
    from ppl.training.callbacks import OneLineProgress, RewardState, SafeStops
    from ppl.training.diagnostics import Diagnostics
    from ppl.training.heldout import evaluate, read_before, write_heldout
    from ppl.training.merge import save_merged
    from ppl.training.trainer import ResumableGRPOTrainer

    reward_fn = MultiLevelPPLRewardFunction(scorer, scorer_tokenizer, baselines, **settings)
    if baselines is None and not args.allow_baseline_mismatch:
        check_meta(columns_of, reward_fn.identity)
    reward_fn.observer = Diagnostics()
    # TRL adds the rewards up with these weights: one more reward function is one more pair.
    rewards = [(reward_fn, 1.0)]
    if args.repetition_penalty:
        in_one_call = config.per_device_train_batch_size * config.world_size * config.steps_per_generation
        normalized_over = in_one_call if args.normalize_rewards else None
        rewards.append(loop_guard(args.repetition_penalty, settings["reward_thresholds"], normalized_over))
    config.reward_weights = config.reward_weights or [weight for _, weight in rewards]
    stops = SafeStops()
    trainer = ResumableGRPOTrainer(
        model=model,
        args=config,
        reward_funcs=[function for function, _ in rewards],
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        callbacks=[RewardState(reward_fn, checkpoint), reward_fn.observer, stops],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(OneLineProgress)

    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    chosen = {**vars(args), **policy_load, "heldout_samples": len(heldout_rows)}
    chosen["reward_thresholds"] = settings["reward_thresholds"]
    if is_first():
        train_flags.write_config(output / train_flags.CONFIG_FILE, chosen, asked, defaults)
    config.eval_on_start = config.eval_on_start and checkpoint is None
    penalties = rewards[1:]
    sampling = {
        "num_generations": 4,
        "max_new_tokens": config.max_completion_length,
        "temperature": config.temperature,
        "seed": config.seed,
    }
    # What the model was before training: itself without its adapter, a frozen copy, or nothing that is there.
    start = model if not args.full_finetuning else None if args.scorer_model else scorer
    held_out = output / "heldout.json"
    before = read_before(Path(checkpoint).parent / held_out.name, heldout_rows, sampling) if checkpoint else None
    if before is None:
        before = evaluate(
            model, tokenizer, reward_fn, heldout_rows, penalties, start=start, **sampling, progress="held-out, before"
        )
    if is_first():
        write_heldout(held_out, sampling, before)
    facts = {
        "Data": args.dataset_name,
        "Target": args.target,
        "Weights": "word {:g}, phrase {:g}, sentence {:g}".format(*args.ppl_weights),
        "Baselines": args.baselines_path or "no file",
    }
    references = list(heldout_rows["reference"])
    page = RunPage(
        output / "report.html", args.model_name, facts, command_line(launched(command)),
        output / train_flags.CONFIG_FILE, before, explain_heldout(reward_fn, before, references),
    )  # fmt: skip
    trainer.add_callback(page)
    say(f"Report, kept up to date: {page.path}")

    trainer.train(resume_from_checkpoint=checkpoint)
    if stops.received is not None:
        if trainer.is_world_process_zero():
            checkpoint = str(output / f"checkpoint-{trainer.state.global_step}")
            print(f"Stopped at step {trainer.state.global_step}. Go on with\n  {resume_command(command, checkpoint)}")
        return 128 + stops.received
    trainer.save_model(config.output_dir)
    if args.save_merged and is_first():
        save_merged(model, tokenizer, output, output / "merged")

    after = evaluate(
        model, tokenizer, reward_fn, heldout_rows, penalties, start=start, **sampling, progress="held-out, after"
    )
    shown_after = explain_heldout(reward_fn, after, references)
    if is_first():
        write_heldout(held_out, sampling, before, after)
        page.write(trainer.state, after, shown_after)
        plot_training(trainer.state.log_history, output / "reward.png")
        print_comparison(before, after)
        print(f"{'Model' if args.full_finetuning else 'Adapter'} and tokenizer: {output}")
        print(f"Reward curve: {output / 'reward.png'}\nReport: {page.path}")
    trainer.accelerator.end_training()  # an interpreter that ends with gloo's threads at work may be aborted
    return 0


if __name__ == "__main__":
    sys.exit(main())
