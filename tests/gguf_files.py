"""A toy model and its tokenizer as a GGUF file, written as llama.cpp's converter writes Llamas."""

import json

import toys


def write(path, model=None, quantized=False, without=(), architecture="llama"):
    """(model, tokenizer) that the file holds, float32; quantized: matrices in Q8_0. without: names of tensors to leave
    out."""
    import gguf

    model, tokenizer = model or toys.llama(), toys.byte_level(chat=True)
    config, heads = model.config, {"q_proj": model.config.num_attention_heads, "k_proj": 2}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("toy")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)

    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    control = set(tokenizer.all_special_tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    spare = [f"<spare_{index}>" for index in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *spare])
    writer.add_token_types([3 if token in control else 1 for token in tokens] + [5] * len(spare))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(toys.CHAT_TEMPLATE)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if (target := names.get_name(name, (".weight",))) in without:
            continue
        data = tensor.float()
        if (projection := name.split(".")[-2]) in heads:  # llama.cpp pairs neighbours in its rotation
            count, width = heads[projection], data.shape[1]
            data = data.view(count, 2, -1, width).transpose(1, 2).reshape(-1, width)
        data = data.numpy()
        if quantized and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tokenizer
