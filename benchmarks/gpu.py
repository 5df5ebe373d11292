"""What scoring and a GRPO step cost on one GPU. One table; under 8 minutes; no hub.

    pip install -r requirements.txt
    python benchmarks/gpu.py

Models of published shapes with random weights: their perplexities mean nothing, their cost is real. The largest takes
17 GB of the host's memory on its way to 4 bits, and 6 GB of the folder for temporary files. Without a GPU, or with
--toy, the same code runs on toy models in a minute; that shows that it works, and no number of it means anything.
"""

import argparse
import statistics
import sys
import tempfile
import time
from typing import NamedTuple

from common import alternate, apart, grpo_step, judged, machine, peak_bytes, print_table, quiet, ratio, whole_rows

# name -> (model type, shape). Sources: config.json of openai-community/gpt2, meta-llama/Llama-3.2-1B and
# meta-llama/Meta-Llama-3-8B on the Hugging Face hub.
PUBLISHED = {
    "GPT-2 124M": (
        "gpt2",
        {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
    ),
    "Llama 3.2 1B": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": True,
        },
    ),
    "Llama 3 8B": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": False,
        },
    ),
}
# 4-bit weights and Unsloth want widths that are multiples of 64.
TOY = {
    "GPT-2 toy": ("gpt2", {"vocab_size": 2048, "n_positions": 1024, "n_embd": 64, "n_layer": 2, "n_head": 2}),
    "Llama toy": (
        "llama",
        {
            "vocab_size": 2048,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
        },
    ),
}


class Sizes(NamedTuple):
    models: dict
    matrix: int  # side of the square matrices whose product is timed
    texts: int  # of 20 to 700 tokens
    prompt: int  # tokens
    group: int
    completion: int
    long_text: int  # 8 of them for the peak memory
    grpo_prompts: int
    grpo_tokens: int  # of a completion; its prompt has half as many
    grpo_batch: int  # completions of one forward and backward pass


FULL = Sizes(PUBLISHED, 8192, 96, 4096, 8, 256, 4096, 8, 256, 8)
SMALL = Sizes(TOY, 512, 6, 256, 4, 16, 256, 2, 16, 4)


def parse_args(argv=None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="toy models (default: only where there is no GPU)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are (default: 3)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    started = time.perf_counter()
    import torch

    quiet()
    torch.set_grad_enabled(False)
    toy = args.toy or not torch.cuda.is_available()
    if toy:
        print("Toy models: this shows that the benchmark runs, its numbers mean nothing.")
    sizes = SMALL if toy else FULL
    print(machine())
    rate = matrix_rate(sizes.matrix)
    sections = [[[f"product of two {sizes.matrix} x {sizes.matrix} bf16 matrices", f"{rate / 1e12:.3g} TFLOP/s"]]]
    deviations = [["[bold]perplexities against float32"]]
    with tempfile.TemporaryDirectory() as folder:
        for name in sizes.models:
            rows, deviation = score_model(name, sizes, rate, args.rounds, folder)
            sections.append(rows)
            deviations += deviation
        sections += [deviations, grpo_rows(name, sizes, folder)]  # of the last model, which is what `folder` holds
    if toy:
        sections = [[[*row[:3], "", *row[4:]] for row in rows] for rows in sections]
    title = f"{'Toy size' if toy else 'One GPU'}, {time.perf_counter() - started:.0f} s in all"
    print_table(title, ("what", "measured", "ratio", "target", "of what"), sections)
    return int(any("failed" in row[0] for rows in sections for row in rows))


# --- models and texts ------------------------------------------------------------------------------------------------


def random_model(kind: str, shape: dict):
    """In bf16, on the GPU if there is one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(_device()):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), dtype=torch.bfloat16).eval()


def in_4bit(model):
    """A copy with NF4 weights, as `load_in_4bit` makes them from a checkpoint; `model` moves to the host's memory."""
    import torch
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    state = model.cpu().state_dict()
    options = {"dtype": torch.bfloat16, "device_map": {"": _device()}, "quantization_config": nf4}
    return type(model).from_pretrained(None, config=model.config, state_dict=state, **options).eval()


def word_tokenizer(vocabulary: int):
    """One token a word, with or without punctuation at its end, so that whatever a random model writes is text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<bos>", "<eos>", "<pad>", "<unk>"]
    for n in range(len(tokens), vocabulary):
        letters = "".join(chr(ord("a") + n // 26**place % 26) for place in range(4))
        tokens.append(letters + {0: ".", 1: ","}.get(n % 16, ""))
    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def random_texts(tokenizer, lengths) -> list[str]:
    """Texts of so many tokens."""
    import numpy as np

    random = np.random.default_rng(0)
    return [tokenizer.decode(random.integers(4, len(tokenizer), size=length)) for length in lengths]


# --- scoring ---------------------------------------------------------------------------------------------------------


def matrix_rate(side: int) -> float:
    """Operations a second of a product of two bf16 matrices, the best of several."""
    import torch

    a, b = (torch.randn(side, side, device=_device()).bfloat16() for _ in range(2))
    times = alternate({"product": lambda: [a @ b for _ in range(5)]}, 5)["product"]
    return 5 * 2 * side**3 / min(times)


def score_model(name: str, sizes: Sizes, rate: float, rounds: int, folder: str):
    """Rows of one model in bf16 and in 4-bit, and how far its perplexities are from float32's; saves the latter."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kind, shape = sizes.models[name]
    tokenizer = word_tokenizer(shape["vocab_size"])
    model = random_model(kind, shape)
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear | Conv1D)]
    parameters = sum(layer.weight.numel() for layer in layers)  # what is multiplied with: LM head yes, embedding no
    rows = [[f"[bold]{name}, {parameters / 1e6:,.1f} M parameters in matrices"]]
    found = {"bf16": scoring_rows("bf16", model, tokenizer, parameters, sizes, rate, rounds, rows)}
    small = in_4bit(model)
    found["4-bit"] = scoring_rows("4-bit", small, tokenizer, parameters, sizes, rate, rounds, rows)
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del small
    if torch.cuda.is_available() and 5 * parameters > torch.cuda.get_device_properties(0).total_memory:
        return rows, [[f"{name}: float32 does not fit on this card"]]
    exact = perplexities(model.float().to(_device()), tokenizer, sizes)
    deviations = []
    for kind, values in found.items():
        off = 100 * abs(values / exact - 1)
        measured = f"{off.mean():.2g} %"
        deviations.append([f"{name}, {kind}: mean deviation", measured, "", "", f"largest {off.max():.2g} %"])
    return rows, deviations


def scoring_rows(dtype: str, model, tokenizer, parameters: int, sizes: Sizes, rate: float, rounds: int, rows: list):
    """Appends to `rows`; returns the perplexities of the texts, float64 [B, 3]."""
    import numpy as np

    from ppl.scoring.surprisal import SurprisalScorer
    from ppl.scoring.tokens import TextEncoder

    lengths = text_lengths(sizes)
    span = f"{len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens"
    speed = statistics.median(alternate({span: lambda: perplexities(model, tokenizer, sizes)}, rounds)[span])
    share = 2 * parameters * sum(lengths) / speed / rate
    judgement = judged(share, 0.5) if dtype == "bf16" and parameters > 5e9 else (f"{share:.2f}", "")
    of = "2 x parameters x tokens to the matrix rate"
    rows.append([f"{dtype}: {span}", f"{sum(lengths) / speed:,.0f} tokens/s", *judgement, of])

    scorer, alone = SurprisalScorer(model), whole_rows()(model)
    encoder = TextEncoder(tokenizer)
    if scorer.window > sizes.prompt + sizes.completion:
        prompt, *texts = random_texts(tokenizer, [sizes.prompt] + [sizes.completion] * sizes.group)
        encoded = encoder.encode([prompt] * sizes.group, [" " + text for text in texts])
        a, b = (np.concatenate(one.score(encoded)) for one in (scorer, alone))
        found = alternate({"alone": lambda: alone.score(encoded), "shared": lambda: scorer.score(encoded)}, rounds)
        ideal = sizes.group * (sizes.prompt + sizes.completion) / (sizes.prompt + sizes.group * sizes.completion)
        speedup = ratio(found["alone"], found["shared"])
        group = f"{sizes.group} x {sizes.completion} tokens behind the same {sizes.prompt}"
        rows.append([f"{dtype}: {group}, without sharing", f"{statistics.median(found['alone']):.2f} s"])
        of = f"speed-up, {speedup:.1f} x, to the ideal one, {ideal:.1f} x"
        measured = f"{statistics.median(found['shared']):.2f} s"
        rows.append([f"{dtype}: the same with sharing", measured, f"{speedup / ideal:.2f}", "", of])
        rows.append([f"{dtype}: mean difference of a token's surprisal", f"{np.mean(abs(a - b)):.1e} nats"])

    length = min(sizes.long_text, scorer.window - 1)
    encoded = encoder.encode([""] * 8, random_texts(tokenizer, [length] * 8))
    peak = peak_bytes(lambda: scorer.score(encoded))
    share = peak / (4 * 8 * length * len(tokenizer))
    of = "one float32 log-softmax of them"
    rows.append(
        [f"{dtype}: memory beyond the weights, 8 x {length} tokens", f"{peak / 1e9:.2f} GB", f"{share:.2f}", "", of]
    )
    return perplexities(model, tokenizer, sizes)


def text_lengths(sizes: Sizes) -> list[int]:
    return [int(20 * 35 ** (place / (sizes.texts - 1))) for place in range(sizes.texts)]


def perplexities(model, tokenizer, sizes: Sizes):
    from ppl.scoring.calculator import MultiLevelPPLCalculator

    texts = random_texts(tokenizer, text_lengths(sizes))
    return MultiLevelPPLCalculator(tokenizer).score_pairs(model, [("", text) for text in texts])


# --- GRPO ------------------------------------------------------------------------------------------------------------


def grpo_rows(name: str, sizes: Sizes, folder: str) -> list:
    """Rows of a step of the model in `folder`; a run that fails has its error for a row."""
    import torch
    from transformers import AutoTokenizer

    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the other processes need it
    steps = 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = random_texts(tokenizer, [sizes.grpo_tokens // 2] * sizes.grpo_prompts * steps)
    options = {"model": folder, "in_4bit": True, "group": 8, "new_tokens": sizes.grpo_tokens, "steps": steps}
    runs = {
        "Unsloth": {"unsloth": True, "prompts": prompts, "batch": sizes.grpo_batch},
        "transformers + PEFT": {"unsloth": False, "prompts": prompts, "batch": sizes.grpo_batch},
        "Unsloth, 1 prompt, batch 1": {"unsloth": True, "prompts": prompts[:steps], "batch": 1},
    }
    size = f"{sizes.grpo_prompts} prompts x 8 completions x {sizes.grpo_tokens} tokens"
    rows = [[f"[bold]GRPO step of {name} in 4-bit with LoRA, {size}"]]
    step, perplexity = {}, {}
    for title, more in runs.items():
        try:
            found = apart(grpo_step, **options, **more)
        except RuntimeError as error:
            rows.append([f"{title}: [bold red]failed[/]", "", "", "", str(error)])
            continue
        step[title], perplexity[title] = found["step"], found["perplexity"]
        rows.append([f"{title}: step", f"{found['step']:.2f} s"])
        for part in ("generation", "reward", "rest"):
            share = found[part] / found["step"]
            judgement = judged(share, 0.1, least=False) if part == "reward" else (f"{share:.2f}", "")
            rows.append([f"{title}: {part}", f"{found[part]:.2f} s", *judgement, "of the step"])
        value, bound = judged(found["peak"] / 1e9, 10 if "batch 1" in title else 24, least=False, form="{:.1f} GB")
        rows.append([f"{title}: peak memory, weights included", value, "", bound if "Unsloth" in title else ""])
    if {"Unsloth", "transformers + PEFT"} <= set(step):
        speedup = step["transformers + PEFT"] / step["Unsloth"]
        rows.append(["Unsloth against transformers + PEFT", "", *judged(speedup, 1.5), "their step times"])
        off = 100 * abs(perplexity["Unsloth"] / perplexity["transformers + PEFT"] - 1)
        rows.append(["Unsloth's perplexities against transformers': deviation", f"{off:.2g} %"])
    return rows


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
