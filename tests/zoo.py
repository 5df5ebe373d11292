"""Every architecture of transformers' causal mapping as a toy: its configuration's sizes made small by their names."""

import torch
import toys
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

HIDDEN, HEADS, LAYERS = 64, 4, 2
SIZES = {
    "vocab_size": toys.VOCABULARY,
    "vocab_size_per_layer_input": toys.VOCABULARY,
    "text_vocab_size": toys.VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim"), HIDDEN),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size", "input_embedding_size"), HIDDEN),
    **dict.fromkeys(("lru_width", "mamba_d_ssm"), HIDDEN),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "ffn_hidden_size", "dim_ff",
         "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "d_inner", "dff",
         "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "block_ff_dim", "mlp_hidden_size"), 64,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_decoder_layers",
         "num_layers", "num_blocks"), LAYERS,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads",
         "num_decoder_attention_heads", "num_encoder_attention_heads", "num_heads", "mamba_n_heads"), HEADS,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "v_head_dim", "mamba_d_head", "dim_head"), 16),
    **dict.fromkeys(("kv_channels", "global_head_dim", "swa_head_dim", "swa_v_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_layer"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "mamba_state_dim", "time_step_rank"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "n_ctx"), 256),
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "use_cache": True,
}  # fmt: skip


# What an architecture wants beside small sizes; a size that is None is left as it comes.
WANTS = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "falcon": {"head_dim": None},
    "gemma4_text": {"head_dim": None},
    "gemma4_unified_text": {"head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {"num_hidden_layers": None, "num_attention_heads": None, "is_encoder_decoder": False},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"v_head_dim": None},
    "xmod": {"default_language": "en_XX"},
}


def _has(config, key):
    try:
        return getattr(config, key, None) is not None
    except RuntimeError:  # layers that differ in it
        return False


def toy(name):
    """A random model of the architecture. Raises what building it raises, and `ValueError` if it does not get small."""
    config_class = CONFIG_MAPPING[name]
    default = config_class()
    sizes = {key: value for key, value in SIZES.items() if _has(default, key)}
    if "kv_lora_rank" in sizes:  # latent attention: every head has keys and values of its own
        sizes["num_key_value_heads"] = HEADS
    sizes |= {"is_decoder": True, **WANTS.get(name, {})}
    config = config_class(**{key: value for key, value in sizes.items() if value is not None})
    model_class = getattr(transformers, NAMES[name])
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if parameters > 5e6:
        raise ValueError(f"{name} has {parameters / 1e6:.0f} million parameters")
    return toys.build(model_class, config)
