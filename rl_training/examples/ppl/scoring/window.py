"""How many tokens a model takes at once."""

from collections.abc import Iterator

import torch


def window_of(base: torch.nn.Module) -> int | None:
    """Most tokens that the transformers model takes, BOS included; None if its architecture sets no limit."""
    config = base.config.get_text_config(decoder=True)
    sizes = [
        *(getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "max_target_positions")),
        getattr(base, "max_seq_length", None),  # Unsloth cuts there without a word
        *_positions_behind_padding(base),
    ]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def _positions_behind_padding(model) -> Iterator[int]:
    """RoBERTa counts positions from behind the one that padding has, so that it has 512 of 514."""
    ahead = 1 if getattr(model.config, "ngram", None) else 0  # ProphetNet also asks for the one after a token's own
    for name, module in model.named_modules():
        if "position" in name and isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            yield module.num_embeddings - module.padding_idx - 1 - ahead
