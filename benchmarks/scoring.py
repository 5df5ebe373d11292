"""How near the scoring comes to what the model alone takes, and how other tools fare. A table a part; 15 minutes or so.

    pip install --no-deps -r benchmarks/requirements.txt    (optional: the tools to compare with)
    python benchmarks/scoring.py

GPT-2 124M with random weights: a speed does not depend on what the weights are. Everything is measured in turns within
one process, so that the ratios hold also on a busy machine.
"""

import argparse
import copy
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

from common import (
    EXAMPLES,
    OTHERS,
    OUTER,
    SHOWN,
    alternate,
    apart,
    behind_prompts,
    grpo_step,
    in_turn,
    judged,
    machine,
    peak_bytes,
    print_table,
    quiet,
    ratio,
    time_outer_levels,
    whole_rows,
)

SHORTEST, LONGEST = 20, 700  # tokens of a text
BATCH = 8  # of the pad-and-cross-entropy loop and of minicons, which leave it to their caller
PEER_BATCHES = (1, 8)  # lm-evaluation-harness: the faster of its default and this
EQUAL = 256  # tokens of a row where the shape is free; 4 of them run fastest together
GROUP, PROMPT, COMPLETION = 8, 512, 128
NESTED_GROUP, NESTED_TEXTS = 2.0, 3.2  # at most so many times geometric's time
# name -> what measures it, of (model, tokenizer, texts, args): a title's row, and the rows
PARTS = {
    "mixed": lambda model, tokenizer, texts, args: mixed_texts(model, tokenizer, texts, args.rounds),
    "shared": lambda model, tokenizer, _, args: shared_prompt(model, tokenizer, args.rounds, args.seed),
    "nested": lambda model, tokenizer, texts, args: nested_levels(model, tokenizer, texts, args.rounds, args.seed),
    "outer": lambda model, tokenizer, texts, args: outer_levels(tokenizer, args.rounds, args.seed),
    "memory": lambda *_, args: memory(args.seed),
    "text": lambda _, tokenizer, texts, args: text_work(tokenizer, texts, 5 * args.rounds),
    "reward": lambda *_, args: reward_share(),
    "start": lambda *_, args: start_up(args.rounds),
}
SAME_PRODUCTS = f"decoder + LM head alone in rows of {EQUAL}, with this engine's matrix products"
MEGABYTE = 1e6


def parse_args(argv=None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer",
        default=str(EXAMPLES / "tiny_stories"),
        help="folder or hub name, for instance gpt2 (default: the embedded one, with texts of as many tokens)",
    )
    parser.add_argument("--tokens", type=int, default=8000, help="of all texts together (default: 8000)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and texts")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=[*PARTS], help="these parts (default: all)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    import torch
    from transformers import AutoTokenizer

    quiet()
    torch.set_grad_enabled(False)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    model = random_gpt2(args.seed)
    texts = stories(tokenizer, mixed_lengths(args.tokens, args.seed), args.seed)
    print(f"{machine()}; GPT-2 124M, float32")
    for name, measure in PARTS.items():
        if name in args.only:
            [title], *rows = measure(model, tokenizer, texts, args=args)
            print_table(title, ("what", "measured", "ratio", "target", "ratio of what"), rows)
            sys.stdout.flush()
    return 0


# --- model and texts -------------------------------------------------------------------------------------------------


def random_gpt2(seed: int, window: int = 1024):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_positions=window)).eval()


def mixed_lengths(total: int, seed: int) -> list[int]:
    """Tokens of each text: their logarithms spread evenly, their order random, their sum about `total`."""
    import numpy as np

    random = np.random.default_rng(seed)
    lengths = []
    while sum(lengths) < total:
        lengths.append(int(SHORTEST * (LONGEST / SHORTEST) ** random.random()))
    return lengths


def stories(tokenizer, lengths: list[int], seed: int) -> list[str]:
    """Texts of about so many tokens, made of the embedded stories in a random order."""
    import random

    rows = json.loads((EXAMPLES / "tiny_stories" / "train.json").read_text(encoding="utf-8"))
    shuffled = random.Random(seed)
    texts = []
    for length in lengths:
        text = " ".join(row["prompt"] + row["completion"] for row in shuffled.sample(rows, 20))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        texts.append(text[: encoded["offset_mapping"][length - 1][1]])
    return texts


def ids_of(tokenizer, text: str):
    """int64 [1, T], BOS first."""
    import torch

    return torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])


# --- mixed lengths: the bare limit, this engine, peers ---------------------------------------------------------------


def mixed_texts(model, tokenizer, texts, rounds):
    import torch

    from mlppl.scoring.calculator import MultiLevelPPLCalculator

    calculator = MultiLevelPPLCalculator(tokenizer)
    rows = [ids_of(tokenizer, text)[:, :-1] for text in texts]
    tokens = sum(row.shape[1] for row in rows)
    equal = torch.cat(rows, dim=1)[0, : tokens // EQUAL * EQUAL].view(-1, EQUAL).split(4)
    runs = {
        "decoder + LM head alone, row by row": lambda: [bare(model, row) for row in rows],
        f"decoder + LM head alone, cut into rows of {EQUAL}": lambda: [bare(model, row) for row in equal],
        "the same, and the LM head on 1,024 rows at once": lambda: [bare(model, row, 1024) for row in equal],
        "this engine, from text to perplexities": lambda: calculator.score_pairs(model, [("", text) for text in texts]),
        SAME_PRODUCTS: lambda: bare_with_our_products(model, equal),
        "pad-and-cross-entropy loop": lambda: pad_and_loop(model, tokenizer, texts),
    }
    targets = {"pad-and-cross-entropy loop": 3.0}
    for name, module, peer, target in (
        ("lm-evaluation-harness", "lm_eval", harness, 1.4),
        ("minicons", "minicons", minicons, 2.5),
    ):
        if importlib.util.find_spec(module) is None:
            print(f"{name} is left out: pip install --no-deps -r benchmarks/requirements.txt")
        else:
            runs[name] = peer(model, tokenizer, texts)
            targets[name] = target
    ours = [sum(unit["surprisal"] for unit in calculator.explain(model, text)["word"]) for text in texts]
    for name in targets:
        check_equal(name, runs[name](), ours, tolerance=1e-3)

    seconds = alternate(runs, rounds)
    *limits, engine = list(runs)[:4]
    limit = min(limits, key=lambda name: statistics.median(seconds[name]))
    table = [[f"[bold]{len(texts)} texts of {SHORTEST} to {LONGEST} tokens, {tokens} in all"]]
    for name, measured in seconds.items():
        speed = f"{tokens / statistics.median(measured):.0f} tokens/s"
        if name in limits:
            table.append([name, speed, "", "", "the bare limit" if name == limit else ""])
        elif name == engine:
            table.append([name, speed, *judged(ratio(seconds[limit], measured), 0.95), "its speed to the bare limit's"])
        elif name == SAME_PRODUCTS:
            table.append([name, speed, f"{ratio(measured, seconds[engine]):.2f}", "", "our speed to its"])
        else:
            table.append([name, speed, *judged(ratio(measured, seconds[engine]), targets[name]), "our speed to its"])
    return table


def bare(model, ids, head_rows: int = 128) -> None:
    """What nobody can do without: hidden states and logits."""
    hidden = model.transformer(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    for piece in hidden.tensor_split(-(-len(hidden) // head_rows)):
        model.lm_head(piece)


def bare_with_our_products(model, rows) -> None:
    from mlppl.scoring.surprisal import fast_products

    with fast_products(model):
        for row in rows:
            bare(model, row)


def pad_and_loop(model, tokenizer, texts) -> list[float]:
    """The recipe of most perplexity snippets: batches in the caller's order, padded, the whole batch's logits."""
    import torch

    totals = []
    for start in range(0, len(texts), BATCH):
        rows = [ids_of(tokenizer, text)[0] for text in texts[start : start + BATCH]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        totals += (loss * mask[:, 1:]).sum(1).tolist()
    return totals


def harness(model, tokenizer, texts) -> Callable[[], list[float]]:
    """Its `loglikelihood` sorts by length, which its `loglikelihood_rolling` does only within a batch."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    requests = [Instance("loglikelihood", {}, ("", text), index) for index, text in enumerate(texts)]
    peers = {size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size) for size in PEER_BATCHES}
    runs = {
        size: lambda peer=peer: [-likelihood[0] for likelihood in peer.loglikelihood(requests, disable_tqdm=True)]
        for size, peer in peers.items()
    }
    seconds = alternate(runs, 1)
    return runs[min(seconds, key=seconds.get)]


def minicons(model, tokenizer, texts) -> Callable[[], list[float]]:
    from minicons.scorer import IncrementalLMScorer

    peer = IncrementalLMScorer(model, "cpu", tokenizer=copy.deepcopy(tokenizer))  # it changes the tokenizer

    def run():
        totals = []
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            totals += peer.sequence_score(batch, reduction=lambda total: -total.sum().item(), bos_token=True)
        return totals

    return run


def check_equal(name: str, theirs, ours, tolerance: float) -> float:
    """The largest relative difference. Raises if it is above the tolerance: then the two do different work."""
    worst = max(abs(a - b) / abs(b) for a, b in zip(theirs, ours, strict=True))
    if not worst <= tolerance:
        raise RuntimeError(f"{name} differs by {worst:.1e}, at most {tolerance:.0e} was expected: it does other work")
    return worst


# --- a group behind one prompt ---------------------------------------------------------------------------------------


def shared_prompt(model, tokenizer, rounds, seed):
    import numpy as np

    from mlppl.scoring.surprisal import SurprisalScorer
    from mlppl.scoring.tokens import TextEncoder

    groups = groups_behind_prompts(tokenizer, rounds + 1, seed + 1)
    encoded = [TextEncoder(tokenizer).encode(*zip(*pairs, strict=True)) for pairs in groups]
    rows = [[ids_of(tokenizer, prompt + completion)[:, :-1] for prompt, completion in pairs] for pairs in groups]
    shared, alone = SurprisalScorer(model), whole_rows()(model)
    measured = {scorer: np.concatenate(scorer.score(encoded[0])) for scorer in (shared, alone)}
    difference = check_equal("sharing a prefix", measured[shared], measured[alone], tolerance=1e-4)
    bare_rows = f"decoder + LM head alone, {GROUP} full rows, with this engine's matrix products"
    without, sharing = "this engine without sharing", "this engine with sharing"
    seconds = alternate(
        {
            bare_rows: in_turn(lambda some: bare_with_our_products(model, some), rows),
            without: in_turn(alone.score, encoded),
            sharing: in_turn(shared.score, encoded),
        },
        rounds,
    )
    whole, once = GROUP * (PROMPT + COMPLETION), PROMPT + GROUP * COMPLETION  # tokens
    # Without sharing, too, the engine asks the LM head for the completions only.
    decoder, head = (sum(p.numel() for p in part.parameters()) for part in (model.transformer.h, model.lm_head))
    scored = GROUP * COMPLETION * head
    ideals = {bare_rows: whole / once, without: (whole * decoder + scored) / (once * decoder + scored)}
    table = [[f"[bold]prompt of {PROMPT} tokens, {GROUP} completions of {COMPLETION}"]]
    table += [[name, f"{statistics.median(measured):.2f} s", "", "", ""] for name, measured in seconds.items()]
    for name, ideal in ideals.items():
        speedup = ratio(seconds[name], seconds[sharing])
        judgement = judged(speedup / ideal, 0.9)
        of = f"to the ideal one, {ideal:.2f} x" + (
            " = G(P + C) / (P + GC)" if name == bare_rows else ", LM head counted"
        )
        table.append([f"speed-up of sharing over {name}", f"{speedup:.2f} x", *judgement, of])
    table.append(["largest difference of a token's surprisal", f"{difference:.0e}", "", "<= 1e-04", ""])
    return table


def groups_behind_prompts(tokenizer, count, seed) -> list[list[tuple[str, str]]]:
    return behind_prompts(stories(tokenizer, ([PROMPT] + [COMPLETION] * GROUP) * count, seed), GROUP)


# --- nested levels against geometric ones ----------------------------------------------------------------------------


def nested_levels(model, tokenizer, texts, rounds, seed):
    """The same texts scored with both aggregations, from text to perplexities: a group behind a prompt, and `texts`."""
    import numpy as np

    from mlppl.scoring.calculator import MultiLevelPPLCalculator
    from mlppl.scoring.surprisal import SurprisalScorer
    from mlppl.scoring.tokens import TextEncoder

    of_a_group = f"{GROUP} completions of {COMPLETION} tokens behind a prompt of {PROMPT}"
    cases = {
        of_a_group: (groups_behind_prompts(tokenizer, rounds + 1, seed + 1), NESTED_GROUP),
        "mixed texts without a prompt": ([[("", text) for text in texts]], NESTED_TEXTS),
    }
    table = [["[bold]nested levels"]]
    for name, (groups, most) in cases.items():
        calculators = {way: MultiLevelPPLCalculator(tokenizer, aggregation=way) for way in ("geometric", "nested")}
        seconds = alternate(
            {way: in_turn(functools.partial(one.score_pairs, model), groups) for way, one in calculators.items()},
            rounds,
        )
        pairs = groups[0]
        for way, measured in seconds.items():
            table.append([f"{name}, {way}", f"{statistics.median(measured):.2f} s", "", "", ""])
        times = ratio(seconds["nested"], seconds["geometric"])
        table.append([f"{name}: nested", "", *judged(times, most, least=False), "geometric's time"])
        # Whatever the way: the product of the nested levels is the perplexity over all tokens.
        product = np.log(calculators["nested"].score_pairs(model, pairs)).sum(axis=1)
        encoded, _ = TextEncoder(tokenizer).encode_pairs(pairs)
        plain = [surprisal.mean() for surprisal in SurprisalScorer(model).score(encoded)]
        check_equal("the product of nested levels", product, plain, tolerance=1e-4)
    return table


def outer_levels(tokenizer, rounds, seed):
    """A group behind a prompt: levels prompt and examples, with other rows and examples as long as the group's own."""
    import numpy as np

    from mlppl.scoring.contexts import BETWEEN

    model = random_gpt2(seed, window=4096)
    texts = stories(tokenizer, [PROMPT, COMPLETION] * (SHOWN + OTHERS + 1), seed + 2)
    groups = groups_behind_prompts(tokenizer, rounds + 1, seed + 3)
    calculators, seconds = time_outer_levels(model, tokenizer, texts, groups, rounds)
    of = f"{SHOWN} examples, {OTHERS} other rows, all of {PROMPT} + {COMPLETION} tokens"
    table = [[f"[bold]{GROUP} completions of {COMPLETION} tokens behind a prompt of {PROMPT}; {of}"]]
    table += [[name, f"{statistics.median(one):.2f} s", "", "", ""] for name, one in seconds.items()]
    geometric, outer = seconds.values()
    table.append(
        ["levels prompt and examples", "", *judged(ratio(outer, geometric), OUTER, least=False), "geometric's"]
    )
    # Together they are what the examples and the prompt change of the ordinary perplexity.
    calculator = calculators["levels prompt and examples"]
    prompt, completion = groups[0][0]
    levels = calculator.compute_all_levels(model, [completion], [prompt])
    shown = list(zip(texts[::2], texts[1::2], strict=True))[:SHOWN]
    before = "".join(f"{one} {text}{BETWEEN}" for one, text in shown)
    others = [other for other, _ in calculator.contexts.others_of(prompt)]
    contexts = [before + prompt, *others]
    e, *c = calculators["geometric"].mean_surprisals(model, [(context, completion) for context in contexts])
    found = sum(np.log(levels[name].item()) for name in levels)
    check_equal("the sum of the two levels", [found], [e - np.mean(c)], tolerance=1e-4)
    return table


# --- memory, text work, reward share, start-up -----------------------------------------------------------------------


def memory(seed: int):
    table = [["[bold]4 texts of 1024 tokens"]]
    for name, loop in (("this engine", False), ("pad-and-cross-entropy loop", True)):
        peak = max(apart(peak_of_scoring, loop=loop, seed=seed) for _ in range(1 if loop else 3)) / MEGABYTE
        value, bound = judged(peak, 300, least=False, form="{:.0f} MB")
        row = [f"peak memory beyond the weights, {name}", value]
        table.append(row if loop else [*row, "", bound, "the worst of three processes"])
    return table


def peak_of_scoring(loop: bool, seed: int) -> int:
    """Bytes, in a process of its own."""
    import torch

    from mlppl.scoring.surprisal import SurprisalScorer
    from mlppl.scoring.tokens import Encoded

    torch.set_grad_enabled(False)
    model = random_gpt2(seed)
    ids = torch.randint(model.config.vocab_size, (4, 1024))
    texts = [Encoded(row, positions := torch.arange(1, len(row)).numpy(), positions) for row in ids.numpy()]

    def whole_batch():
        logits = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    scorer = SurprisalScorer(model)
    scorer.score([Encoded(texts[0].ids[:64], texts[0].positions[:63], texts[0].chars[:63])])
    return peak_bytes(whole_batch if loop else lambda: scorer.score(texts))


def text_work(tokenizer, texts, rounds):
    """Alignment is what `TextEncoder.encode` takes beyond the tokenization it does itself."""
    from mlppl.scoring.tokens import TextEncoder
    from mlppl.scoring.units import segment

    encoder, contexts = TextEncoder(tokenizer), [""] * len(texts)
    seconds = alternate(
        {
            "tokenization": lambda: encoder._backend.encode_batch(texts, add_special_tokens=False),
            "tokenization + alignment": lambda: encoder.encode(contexts, texts),
            "segmentation": lambda: segment(texts),
        },
        rounds,
    )
    rest = [both + units - tokens for tokens, both, units in zip(*seconds.values(), strict=True)]
    table = [[f"[bold]{sum(map(len, texts))} characters of text"]]
    table += [[name, f"{1e3 * statistics.median(measured):.1f} ms", "", "", ""] for name, measured in seconds.items()]
    share = judged(ratio(rest, seconds["tokenization"]), 1.0, least=False)
    table.append(
        ["segmentation + alignment", f"{1e3 * statistics.median(rest):.1f} ms", *share, "its time to tokenization's"]
    )
    return table


def reward_share():
    """Of a GRPO step of the embedded model, with Unsloth where it can be imported."""
    rows = json.loads((EXAMPLES / "tiny_stories" / "train.json").read_text(encoding="utf-8"))
    options = {
        "model": str(EXAMPLES / "tiny_stories"),
        "prompts": [row["prompt"] for row in rows[:8]],
        "group": 8,
        "batch": 8,
        "new_tokens": 128,
        "steps": 4,
    }
    name, table = "Unsloth, 4-bit", [["[bold]GRPO step of the embedded model: 2 prompts x 8 completions x 128 tokens"]]
    try:
        measured = apart(grpo_step, unsloth=True, in_4bit=True, **options)
    except RuntimeError as error:
        print(f"Unsloth is left out: {error}")
        name, measured = "transformers + PEFT, float32", apart(grpo_step, unsloth=False, in_4bit=False, **options)
    parts = ", ".join(f"{part} {measured[part]:.2f} s" for part in ("generation", "reward", "rest"))
    share = measured["reward"] / measured["step"]
    return [
        table[0],
        [f"{name}: {parts}", f"{measured['step']:.2f} s", f"{share:.2f}", "", "reward's time to the step's"],
    ]


def start_up(rounds):
    scripts = sorted(path for path in EXAMPLES.glob("*.py"))
    seconds = alternate(
        {
            script.name: lambda script=script: subprocess.run(
                [sys.executable, script, "--help"], stdout=subprocess.DEVNULL, check=True
            )
            for script in scripts
        },
        rounds,
    )
    table = [["[bold]--help"]]
    for name, measured in seconds.items():
        value, bound = judged(statistics.median(measured), 0.5, least=False, form="{:.2f} s")
        table.append([name, value, "", bound, ""])
    return table


if __name__ == "__main__":
    sys.exit(main())
