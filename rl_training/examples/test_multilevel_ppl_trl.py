"""Checks the calculator and the reward with one model, and prints a report.

    python test_multilevel_ppl_trl.py --model_name gpt2

Exit code 1 if a check fails. (A script for users, not for pytest: the project's own tests are in tests/.)
"""

import argparse
import math
import sys
from collections.abc import Sequence

from mlppl import cli
from mlppl.cli import script
from mlppl.config import DEFAULT_THRESHOLDS, LEVELS
from mlppl.models import check_reachable, model_path

TEXT = "The quick brown fox jumps over the lazy dog..."
LINE = "=" * 60


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.parser("Checks the calculator and the reward with one model: exit code 1 if a check fails.")
    cli.add_model_flags(parser)
    return parser.parse_args(argv)


@script
def main(argv) -> int:
    return cli.run(parse_args(argv), report)


def report(args: argparse.Namespace) -> int:
    check_reachable(model_path(args.model_name))  # before the seconds that it takes to import torch
    import torch

    device = args.device.partition(":")[0] if args.device else "cuda" if torch.cuda.is_available() else "cpu"
    print(f"Multi-Level PPL Reward Function Test (TRL)\n{LINE}\nModel: {args.model_name}\nDevice: {device}\n")
    print("Loading model...", flush=True)

    from mlppl.models import load_model
    from mlppl.scoring.calculator import MultiLevelPPLCalculator

    model, tokenizer, _ = load_model(
        args.model_name, load_in_4bit=bool(args.load_in_4bit), dtype=args.dtype, device=args.device
    )
    print("Model loaded!")

    print(f"\nTesting Multi-Level PPL Calculator\n{LINE}\n\nTest text: {TEXT}", flush=True)
    calculator = MultiLevelPPLCalculator(tokenizer)
    scored, levels = outcome(lambda: calculator.compute_all_levels(model=model, texts=TEXT), args.debug)
    if scored:
        print("\nResults:")
        for level, perplexity in levels.items():
            print(f"  {f'{level.capitalize()}-level PPL:':<20}{perplexity:.4f}")
    else:
        print(f"  ✗ it cannot be scored: {levels}")

    print("\nChecks:", flush=True)
    failures = int(not scored)
    for name, check in CHECKS.items():
        passed, found = outcome(lambda check=check: check(model, tokenizer), args.debug)
        print(f"  ✓ {name} ({found})" if passed else f"  ✗ {name}: {found}", flush=True)
        failures += not passed

    if failures:
        print(f"\n✗ {failures} failed")
        return 1
    print("\n✓ All tests passed!")
    return 0


def outcome(check, debug: bool) -> tuple[bool, object]:
    """(whether `check()` passed, what it returned, or what it raised in one line)."""
    try:
        return True, check()
    # A check that breaks has failed like one that finds a wrong number, and the others still run.
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, CheckFailed) else f"{type(error).__name__}: "
        return False, kind + " ".join(str(error).split())


# --- the checks: each returns what it found, or raises `CheckFailed` with the numbers ---------------------------------

# (context, text), hard ones: abbreviations, quotes, brackets, line breaks, scripts without spaces, emoji, one word.
SAMPLES = (
    ("", "The quick brown fox jumps over the lazy dog. It was fast!"),
    ("Tell me a story.", ' Mr. Brown said: "Come in (quickly)!" The fox, who was hungry, ran home; it rained.'),
    ("", "One line\nand another 😀\r\n\r\n中文没有空格，对吗？"),
    ("The fox", " slept."),
    ("", "fox"),
)
# Completions of one prompt, long enough that its forward pass is shared.
PROMPT = " ".join(["Once upon a time there was a small fox, and it lived near the old mill by the river."] * 8)
COMPLETIONS = tuple(
    f" One day {who} {what}."
    for who in ("the fox", "an old crow", "Anna", "nobody")
    for what in ("came to the mill", "found a shiny stone in the grass, and it was warm")
)

# Largest relative difference of a level's perplexity between two ways to compute it. A half precision rounds
# differently with every shape of batch, and the kernels of quantised weights differ by shape, too.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


class CheckFailed(AssertionError):
    """Says what was found, what was expected, and where."""


def tolerance(model) -> float:
    from mlppl.scoring.identity import precision

    made = precision(model)
    allowed = TOLERANCES.get(made["dtype"], TOLERANCES["float32"])
    return allowed if made["quantization"] == "none" else max(allowed, TOLERANCES["bfloat16"])


def batch_equals_one_by_one(model, tokenizer) -> str:
    from mlppl.scoring.calculator import MultiLevelPPLCalculator

    pairs = [*SAMPLES, *((PROMPT, completion) for completion in COMPLETIONS)]
    contexts, texts = zip(*pairs, strict=True)
    calculator = MultiLevelPPLCalculator(tokenizer)
    batch: dict = calculator.compute_all_levels(model=model, texts=list(texts), contexts=list(contexts))
    single = [calculator.compute_all_levels(model=model, texts=text, contexts=context) for context, text in pairs]
    together = [{level: float(batch[level][index]) for level in LEVELS} for index in range(len(pairs))]
    return _largest_difference(texts, together, single, tolerance(model))


def fast_path_equals_brute_force(model, tokenizer) -> str:
    from mlppl.scoring.calculator import MultiLevelPPLCalculator

    calculator = MultiLevelPPLCalculator(tokenizer)
    fast = [calculator.compute_all_levels(model=model, texts=text, contexts=context) for context, text in SAMPLES]
    slow = []
    for context, text in SAMPLES:
        scored = _brute_force(model, tokenizer, context, text)
        units = calculator.explain(model=model, text=text, context=context)
        slow.append({level: _geometric_mean(units[level], scored) for level in LEVELS})
    return _largest_difference([text for _, text in SAMPLES], fast, slow, tolerance(model))


def units_partition_the_tokens(model, tokenizer) -> str:
    from mlppl.models import check_vocabulary
    from mlppl.scoring.calculator import MultiLevelPPLCalculator

    check_vocabulary(model, tokenizer, getattr(tokenizer, "name_or_path", ""))
    calculator = MultiLevelPPLCalculator(tokenizer)
    total = 0
    for context, text in SAMPLES:
        tokens = len(_scored_tokens(tokenizer, context, text)[1])
        total += tokens
        sums = {}
        for level, units in calculator.explain(model=model, text=text, context=context).items():
            end = 0
            for unit in units:
                if unit["start"] < end or unit["text"] != text[unit["start"] : unit["end"]]:
                    raise CheckFailed(f"{level} {unit!r} of {text!r} starts before {end} or is not what stands there")
                end = unit["end"]
            if (held := sum(unit["n_tokens"] for unit in units)) != tokens:
                raise CheckFailed(f"the {level}s of {text!r} hold {held} tokens, expected {tokens}")
            sums[level] = math.fsum(unit["surprisal"] for unit in units)
        if not max(sums.values()) - min(sums.values()) <= 1e-9 * max(sums.values()):
            raise CheckFailed(f"the surprisals of {text!r} add up to {sums} nats, expected the same at each level")
    return f"{total} tokens of {len(SAMPLES)} texts"


def rewards_on_known_baselines(model, tokenizer) -> str:
    """Baselines that the text is x % better than: x on each threshold, just below it, 0, and worse."""
    from mlppl.reward.function import MultiLevelPPLRewardFunction
    from mlppl.scoring.calculator import MultiLevelPPLCalculator

    _, text = SAMPLES[0]
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, baselines=None)
    measured = MultiLevelPPLCalculator(tokenizer).compute_all_levels(model=model, texts=text)
    expected = {0.0: 0.0, -10.0: 0.0}
    below = 0.0
    for improvement, reward in DEFAULT_THRESHOLDS:
        expected |= {improvement * 0.98: below, improvement: reward}
        below = reward
    # Rows of the same text are scored once, so every one of them has the perplexity measured first.
    _, details = reward_fn.compute_rewards([text], baselines=[measured], return_details=True)
    ppl = {level: float(details["ppls"][level][0]) for level in LEVELS}
    rows = [{level: ppl[level] / (1 - percent / 100) for level in LEVELS} for percent in expected]
    rewards, _ = reward_fn.compute_rewards([text] * len(rows), baselines=rows, return_details=True)
    for (improvement, reward), given in zip(expected.items(), rewards.tolist(), strict=True):
        if not abs(given - reward) <= 1e-6:
            raise CheckFailed(f"an improvement of {improvement:g} % got the reward {given:g}, expected {reward:g}")
    _largest_difference([text], [ppl], [measured], tolerance(model))
    return ", ".join(f"{improvement:g} % → {reward:g}" for improvement, reward in DEFAULT_THRESHOLDS)


def trl_calling_convention(model, tokenizer) -> str:
    """Called as GRPOTrainer calls a reward function."""
    import torch

    from mlppl.reward.function import MultiLevelPPLRewardFunction

    easy = dict.fromkeys(LEVELS, 1e12)  # whatever is scored is better
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, baselines={"a": easy}, missing="skip")
    if not isinstance(getattr(reward_fn, "__name__", None), str) or isinstance(reward_fn, torch.nn.Module):
        raise CheckFailed("the reward function has no __name__ or is an nn.Module, which TRL takes for a reward model")
    calls: list[tuple[str, list, list]] = [("text", ["The fox"] * 4, [" ran home.", " slept.", " \n", " ran."])]
    if getattr(tokenizer, "chat_template", None):
        chat = [[{"role": "assistant", "content": completion}] for completion in calls[0][2]]
        calls.append(("chat messages", [[{"role": "user", "content": "Tell me of the fox."}]] * 4, chat))
    for kind, prompts, completions in calls:
        metrics: dict[str, float] = {}
        rewards = reward_fn(
            prompts=prompts,
            completions=completions,
            completion_ids=tokenizer(calls[0][2], add_special_tokens=False)["input_ids"],
            trainer_state=None,
            log_extra=lambda column, values: None,
            log_metric=metrics.__setitem__,
            id=["a", "a", "a", "unknown"],
            topic=["foxes"] * 4,
        )
        wanted = [1.0, 1.0, 0.0, None]  # blank text gets nothing, a row without a baseline is skipped
        if not isinstance(rewards, list) or rewards != wanted or not all(type(r) is float for r in rewards[:3]):
            raise CheckFailed(f"{kind}: the rewards are {rewards!r}, expected the list {wanted}")
        names = {f"{name}{level}" for name in ("reward_", "ppl/") for level in LEVELS} | {"reward_time"}
        if set(metrics) != names or not all(math.isfinite(value) for value in metrics.values()):
            raise CheckFailed(f"{kind}: it logged {metrics}, expected finite numbers named {', '.join(sorted(names))}")
    return f"{' and '.join(kind for kind, *_ in calls)}, {len(names)} metrics"


CHECKS = {
    "batch equals one by one": batch_equals_one_by_one,
    "fast path equals brute-force log-softmax": fast_path_equals_brute_force,
    "units partition the tokens": units_partition_the_tokens,
    "rewards on known baselines": rewards_on_known_baselines,
    "TRL's calling convention": trl_calling_convention,
}


def _largest_difference(
    texts: Sequence[str], measured: Sequence[dict], expected: Sequence[dict], allowed: float
) -> str:
    """The largest relative difference of perplexities by text and level; `CheckFailed` if it is over `allowed`."""
    differences = []
    for text, ours, theirs in zip(texts, measured, expected, strict=True):
        for level in LEVELS:
            a, b = ours[level], theirs[level]
            # A text without a scored token is nan either way.
            difference = 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b) / b
            where = f"{level} level of {text!r}: {a:.6f} against {b:.6f}"
            differences.append((math.inf if math.isnan(difference) else difference, where))
    largest, where = max(differences)
    if largest > allowed:
        raise CheckFailed(f"largest relative difference {largest:.1e}, allowed {allowed:.0e}, at the {where}")
    return f"largest relative difference {largest:.1e}"


# --- brute force: no code in common with the fast path ---------------------------------------------------------------


def _scored_tokens(tokenizer, context: str, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, [(index in ids, first visible character in text) of each scored token])."""
    whole = context + text
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    # What the tokenizer itself puts before a text, else BOS.
    as_given = tokenizer(whole)
    before = as_given["input_ids"][: as_given.sequence_ids(0).index(0)]
    if not before and tokenizer.bos_token_id is not None:
        before = [tokenizer.bos_token_id]
    ids, spans = [*before, *ids], [(0, 0)] * len(before) + spans
    scored: list[tuple[int, int]] = []
    blank: list[int] = []  # tokens of white space, until the next visible one
    for index in range(max(1, len(before)), len(ids)):
        start, end = spans[index]
        if end <= len(context) or ids[index] in tokenizer.all_special_ids:
            continue
        visible = [char for char in range(max(start, len(context)), end) if not whole[char].isspace()]
        blank.append(index)
        if visible:
            scored += [(one, visible[0] - len(context)) for one in blank]
            blank = []
    if scored:
        scored += [(one, scored[-1][1]) for one in blank]
    return ids, scored


def _brute_force(model, tokenizer, context: str, text: str) -> list[tuple[int, float]]:
    """(character, surprisal in nats) of each scored token, from the model's own logits, one forward pass a token."""
    import torch

    from mlppl.scoring.frozen import frozen

    ids, indices = _scored_tokens(tokenizer, context, text)
    scored = []
    with frozen(model):
        for index, char in indices:
            logits = model(input_ids=torch.tensor([ids[:index]], device=model.device)).logits[0, -1]
            scored.append((char, -torch.log_softmax(logits.float(), dim=-1)[ids[index]].item()))
    return scored


def _geometric_mean(units: Sequence[dict], scored: Sequence[tuple[int, float]]) -> float:
    logarithms = []
    for unit in units:
        inside = [surprisal for char, surprisal in scored if unit["start"] <= char < unit["end"]]
        logarithms.append(sum(inside) / len(inside) if inside else math.nan)
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


if __name__ == "__main__":
    sys.exit(main())
