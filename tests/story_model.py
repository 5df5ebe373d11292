"""A second real model beside the embedded one: a small Llama with a SentencePiece tokenizer.

Both are trained on the embedded stories when a test first asks, in some seconds. What the embedded tokenizer hides:
this one's decoder strips the first space of a completion.
"""

import json
from pathlib import Path

import torch
import toys
from transformers import LlamaConfig, LlamaForCausalLM

STORIES = Path(__file__).parent.parent / "rl_training" / "examples" / "tiny_stories" / "train.json"


def rows():
    return json.loads(STORIES.read_text(encoding="utf-8"))


def prompts():
    """Beginnings of stories, of seven words each."""
    return [" ".join(row["prompt"].split()[:7]) for row in rows()[:24]]


def train(steps=100, length=64, rows_a_step=8):
    """(model in eval mode, tokenizer)"""
    texts = [row["prompt"] + row["completion"] for row in rows()]
    tokenizer = toys.llama2_like(sentences=texts, vocab_size=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids = torch.tensor([token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        starts = torch.randint(len(ids) - length, (rows_a_step,)).tolist()
        batch = torch.stack([ids[start : start + length] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer
