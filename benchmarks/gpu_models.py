"""Models of published shapes with seeded random weights, made where they run, and texts for them.

Their perplexities mean nothing; what they cost is real.
"""

from common import device

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


def random_model(kind: str, shape: dict):
    """In bf16, on the GPU if there is one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), dtype=torch.bfloat16).eval()


def in_4bit(model):
    """A copy with NF4 weights, as `load_in_4bit` makes them from a checkpoint."""
    import torch
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    if device() == "cuda" and torch.cuda.mem_get_info()[0] < model.get_memory_footprint() / 2:
        model.cpu()
    options = {"dtype": torch.bfloat16, "device_map": {"": device()}, "quantization_config": nf4}
    return type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), **options).eval()


def word_tokenizer(vocabulary: int):
    """One token a word, with or without punctuation at its end, so that whatever a random model writes is text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<bos>", "<eos>", "<pad>", "<unk>"]
    for n in range(len(tokens), vocabulary):
        letters = "".join(chr(ord("a") + n // 26**digit % 26) for digit in range(4))
        tokens.append(letters + {0: ".", 1: ","}.get(n % 16, ""))
    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def random_texts(tokenizer, lengths, seed: int = 0) -> list[str]:
    """Texts of so many tokens."""
    import numpy as np

    random = np.random.default_rng(seed)
    return [tokenizer.decode(random.integers(4, len(tokenizer), size=length)) for length in lengths]


def parameters(model) -> int:
    """In matrices that are multiplied with: the LM head, not the embedding."""
    import torch
    from transformers.pytorch_utils import Conv1D

    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear | Conv1D)]
    return sum(layer.weight.numel() for layer in layers)
