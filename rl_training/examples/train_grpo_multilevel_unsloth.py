"""Trains a 4-bit Unsloth model with TRL's GRPO on the multi-level perplexity reward.

    python train_grpo_multilevel_unsloth.py --baselines_path baselines.pkl --output_dir output

Every field of TRL's GRPOConfig is a flag as well (--warmup_steps 100 --beta 0.04 ...), here or in --config run.yaml.
They are listed at https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig
"""

import argparse
import sys

from mlppl import cli
from mlppl.cli import script
from mlppl.data import prepare_rows
from mlppl.training.settings import parse


def parse_args(argv) -> tuple[argparse.Namespace, list[str]]:
    """(our flags, the rest: flags of GRPOConfig)."""
    parser = cli.parser(__doc__.splitlines()[0], epilog=" ".join(__doc__.splitlines()[-2:]))
    cli.add_training_flags(parser)
    return parse(parser, argv)


def prepare_dataset(dataset, columns, form):
    """The rows that the trainer gets: `prompt`, `id`, `reference`, and the data set's other columns for the rewards.

    Edit this function to make prompts of your own:

        rows = prepare_rows(dataset, columns, form)
        return rows.map(lambda row: {"prompt": row["prompt"].rstrip(" .") + ", and then"})

    A baseline is of one prompt: those of the unedited rows are refused. Compute them of yours, from a file that
    `rows.to_json("rows.jsonl")` writes here. What --prompt_template, --chat and --prompt_sentences can say needs no
    edit and is the same in compute_baselines_trl.py.

    dataset: a `datasets.Dataset`. columns: `mlppl.data.Columns`, which of its columns holds what. form:
    `mlppl.data.PromptForm`, what the flags say of prompts.
    """
    return prepare_rows(dataset, columns, form)


def make_rewards(job, policy, scorer):
    """The reward functions, the perplexity reward first, each with its weight; --reward_weights, in this order, wins.

    Edit this function to add one. It is called as TRL calls it, with prompts, completions (behind chat prompts: lists
    of messages), completion_ids and the data set's columns, and returns a number a completion, or None to skip it:

        from mlppl.data import message_text

        def brevity(completions, **columns):
            return [-len(message_text(one).split()) / 100 for one in completions]

        rewards.append((brevity, 0.5))

    The log and the held-out table have a row of its name.

    job: `mlppl.training.job.Job`. policy: the model that is trained and its tokenizer, whose ids the completions are.
    scorer: the frozen model and its tokenizer.
    """
    from mlppl.reward.function import MultiLevelPPLRewardFunction
    from mlppl.reward.loop_guard import copy_guard, loop_guard, loop_veto

    asked, guard, of_prompts = job.reward, job.loop_penalty, job.guarded_prompts(policy.tokenizer)
    perplexity = MultiLevelPPLRewardFunction(
        *scorer, job.baselines, policy=policy, **vars(asked), **job.chat, **job.contexts
    )
    if job.per_level:
        veto = loop_veto(guard, **of_prompts) if guard else None
        rewards = list(zip(perplexity.per_level(veto), asked.weights, strict=True))
    else:
        rewards = [(perplexity, 1.0)]
        skips = perplexity.skips if asked.missing == "skip" else None
        if guard:
            rewards.append(loop_guard(guard, asked.reward_thresholds, form=asked.form, **of_prompts, skips=skips))
        if not (asked.reference_context.reads_prompt or job.allow_copies):
            rewards.append(copy_guard(asked.most, policy.tokenizer, skips, asked.reference_context))
    return rewards


def make_trainer(job, policy, rewards):
    """The trainer: TRL's GRPOTrainer, which goes on where it was stopped and reads prompts as the scorer does.

    Edit this function to swap it for another one of TRL's that takes reward functions:

        import dataclasses
        from trl import RLOOConfig, RLOOTrainer

        fields = {field.name for field in dataclasses.fields(RLOOConfig) if field.init}
        asked = {name: value for name, value in job.asked.items() if name in fields}
        config = RLOOConfig(**{**asked, "reward_weights": job.config.reward_weights})
        functions = [function for function, _ in rewards]
        return RLOOTrainer(policy.model, functions, config, job.train_rows, job.eval_rows, policy.tokenizer)

    job: `mlppl.training.job.Job`. policy: the model that is trained and its tokenizer. rewards: of `make_rewards`.
    """
    from mlppl.training.card import complete_card
    from mlppl.training.trainer import ResumableGRPOTrainer

    return ResumableGRPOTrainer(
        model=policy.model,
        args=job.config,
        reward_funcs=[function for function, _ in rewards],
        train_dataset=job.train_rows,
        eval_dataset=job.eval_rows,
        processing_class=policy.tokenizer,
        chat=job.chat,
        card=lambda state: complete_card(job, state),
    )


@script
def main(argv) -> int:
    args, rest = parse_args(argv)
    return cli.run(args, lambda args: train(args, rest, argv))


def train(args: argparse.Namespace, rest: list[str], command: list[str]) -> int:
    from mlppl.training.job import Job

    job = Job(args, rest, command, prepare_dataset)  # imports Unsloth: what imports TRL has to come after it

    from mlppl.pages.compare import print_run
    from mlppl.pages.run import finish_report, start_report
    from mlppl.training.card import print_use
    from mlppl.training.heldout import HeldOutPrompts
    from mlppl.training.policy import NOT_PUSHED, load_policy_and_scorer, merge, publish
    from mlppl.training.preview import announce, dry_run
    from mlppl.training.rewards import perplexity_rewards, weighted
    from mlppl.training.trainer import stopped_by, watch

    policy, scorer = load_policy_and_scorer(job)
    rewards = weighted(job, make_rewards(job, policy, scorer))
    trainer = make_trainer(job, policy, rewards)
    perplexity = perplexity_rewards(rewards)[0]
    held_out = HeldOutPrompts(job, policy, scorer, rewards, trainer)
    diagnostics = watch(trainer, job, rewards, held_out.kl)
    announce(job, trainer, perplexity)
    if args.dry_run:
        return dry_run(job, trainer, diagnostics)
    job.write_config()
    page = start_report(job, perplexity, held_out.before())
    trainer.add_callback(page)
    trainer.train(resume_from_checkpoint=job.checkpoint)
    stopped = stopped_by(trainer, job)
    code = 0 if stopped is None else 128 + stopped
    if stopped is None:
        trainer.save_model(str(job.output), _internal_call=True)  # not pushed yet: the report is not finished
        finish_report(job, page, perplexity, after := held_out.after(), trainer.state)
        code = 0 if publish(trainer, job) else NOT_PUSHED
        merge(job, policy)
        print_use(job)
        if trainer.is_world_process_zero():
            print_run(page.before, after)
    trainer.accelerator.end_training()  # an interpreter that ends with gloo's threads at work may be aborted
    return code


if __name__ == "__main__":
    sys.exit(main())
