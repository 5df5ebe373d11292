"""Train the tiny story model of this folder: a byte-level BPE tokenizer and a small Llama, from train.json alone.

    python build.py

takes a few minutes on one CPU core, needs no network, and writes model.safetensors, config.json,
generation_config.json, tokenizer.json and tokenizer_config.json. It then loads what it wrote and prints how well that
predicts the stories of test.json, which it has never seen. The same seed on the same machine gives the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"  # ids 0, 1, 2

VOCABULARY = 1024
WINDOW = 512  # tokens
HIDDEN, INTERMEDIATE, LAYERS, HEADS = 128, 384, 3, 4  # widths: multiples of bitsandbytes' 4-bit block, 64

# Chosen on 30 stories held out of train.json; the model is then trained on all 200.
EPOCHS = 28
ROWS, STORIES_PER_ROW = 3, 3  # of a batch
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.5
DROPOUT = 0.2
TOKEN_NOISE = 0.2  # share of input tokens replaced by random ones: of all remedies against overfitting it helped most


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE, help="where to write it (default: this folder)")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, order, dropout and shuffled words")
    return parser.parse_args(argv)


def read_stories(name: str) -> list[str]:
    rows = json.loads((HERE / name).read_text(encoding="utf-8"))
    return [row["prompt"] + row["completion"] for row in rows]


def train_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def add_dropout(model) -> None:
    """Llama has none but in its attention weights; hooks add it to each layer's two branches and to the last norm."""
    from torch.nn.functional import dropout

    def hook(module, _, output):
        if isinstance(output, tuple):  # attention returns its weights too
            return dropout(output[0], DROPOUT, module.training), *output[1:]
        return dropout(output, DROPOUT, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(hook)
        layer.mlp.register_forward_hook(hook)
    model.model.norm.register_forward_hook(hook)


def train(model, stories: list, pad: int, seed: int) -> None:
    """`stories`: a tensor of token ids each, from BOS to EOS."""
    import torch
    from tqdm import tqdm

    rng = random.Random(seed)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]  # not decayed
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    batch_size = ROWS * STORIES_PER_ROW
    total = EPOCHS * math.ceil(len(stories) / batch_size)
    # up over the first 5 % of the steps, level, down to zero over the last 60 %
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * total), 1.0, (total - step) / (0.6 * total))
    )
    model.train()
    with tqdm(total=total, desc="training", unit="step") as bar:
        for _ in range(EPOCHS):
            order = rng.sample(stories, len(stories))
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                # several stories one after the other fill the window: late positions are learned as well as early ones
                rows = [torch.cat(batch[row::ROWS]) for row in range(min(ROWS, len(batch)))]
                ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)  # [ROWS, T]
                noise = torch.rand(ids.shape) < TOKEN_NOISE
                noise[:, 0] = False  # the first BOS stays
                inputs = torch.where(noise, torch.randint(3, VOCABULARY, ids.shape), ids)
                # no attention mask: padding is on the right, where a causal model does not look
                loss = model(input_ids=inputs, labels=ids.masked_fill(ids == pad, -100)).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.2f}")
    model.eval()


def save(model, tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # written beside their place and renamed: nobody reads half a file
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        config = Path(temporary) / "tokenizer_config.json"
        # the name that transformers 4 knows too; 5 writes TokenizersBackend for the same class
        settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.write_text(json.dumps(settings, indent=2) + "\n")
        for name in FILES:
            (Path(temporary) / name).chmod(0o644)  # safetensors makes its file private
            os.replace(Path(temporary) / name, folder / name)


def perplexity(model, tokenizer, texts: list[str]) -> float:
    """Per token, over all tokens of all texts; BOS conditions and is not scored."""
    import torch

    surprisal, n_tokens = 0.0, 0  # nats
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids  # [1, T], from BOS
            n_scored = ids.shape[1] - 1
            surprisal += model(input_ids=ids, labels=ids).loss.item() * n_scored
            n_tokens += n_scored
    return math.exp(surprisal / n_tokens)


def unigram_perplexity(tokenizer, train_texts: list[str], texts: list[str]) -> float:
    """Of the model that knows only how often each token is, add-one smoothed over the vocabulary."""
    from collections import Counter

    counts = Counter(i for text in train_texts for i in tokenizer(text, add_special_tokens=False).input_ids)
    total = counts.total() + len(tokenizer)
    scored = [i for text in texts for i in tokenizer(text, add_special_tokens=False).input_ids]
    return math.exp(-sum(math.log((counts[i] + 1) / total) for i in scored) / len(scored))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # matrices this small gain nothing from more, and a fixed number keeps sums reproducible
    torch.manual_seed(args.seed)
    train_texts, test_texts = read_stories("train.json"), read_stories("test.json")
    tokenizer = train_tokenizer(train_texts)
    model = new_model(tokenizer)
    add_dropout(model)
    stories = [torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id]) for text in train_texts]
    train(model, stories, tokenizer.pad_token_id, args.seed)
    save(model, tokenizer, args.output_dir)

    model = AutoModelForCausalLM.from_pretrained(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    rng = random.Random(args.seed)
    shuffled_texts = [" ".join(rng.sample(words, len(words))) for words in map(str.split, test_texts)]
    original = perplexity(model, tokenizer, test_texts)
    unigram = unigram_perplexity(tokenizer, train_texts, test_texts)
    shuffled = perplexity(model, tokenizer, shuffled_texts)
    print(f"{model.num_parameters():,} parameters, {sum(map(len, stories)):,} training tokens")
    print(f"perplexity per token, {len(test_texts)} held-out stories   {original:.1f}")
    print(f"  of the unigram model                       {unigram:.1f}   {unigram / original:.1f} times as high")
    print(f"  with each story's words shuffled           {shuffled:.1f}   {shuffled / original:.1f} times as high")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
