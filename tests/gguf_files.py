"""A toy model and its tokenizer as a GGUF file, written as llama.cpp's converter writes Llamas and Gemma 3."""

import json

import toys


def write(path, model=None, quantized=False, without=(), architecture="llama", vocabulary=None):
    """(model, tokenizer) that the file holds, float32; quantized: matrices in Q8_0. without: names of tensors to leave
    out. vocabulary: a function that writes another tokenizer than `toys.byte_level` by the GGUFWriter it is given."""
    import gguf

    model, tokenizer = model or toys.llama(), toys.byte_level(chat=True)
    config, gemma = model.config, architecture == "gemma3"
    # llama.cpp pairs neighbours in Llama's rotation.
    heads = {} if gemma else {"q_proj": config.num_attention_heads, "k_proj": 2}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("toy")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if gemma:
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_key_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)

    if vocabulary is None:
        pieces, merges, ids = fields_of(tokenizer)
        write_tokenizer(writer, "gpt2", pieces, merges, scores=False, **ids)
        writer.add_chat_template(toys.CHAT_TEMPLATE)
    else:
        vocabulary(writer)

    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.GEMMA3 if gemma else gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if (target := names.get_name(name, (".weight",))) in without:
            continue
        data = tensor.float() + 1 if gemma and "norm" in name else tensor.float()
        if (projection := name.split(".")[-2]) in heads:
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


def write_tokenizer(writer, kind, pieces, merges=None, pre="default", scores=True, **fields):
    """pieces: [(token, score, type)]. fields: what else the file says, by the names that it has there."""
    pieces = pieces + [(f"<spare_{index}>", -1000.0, 5) for index in range(toys.VOCABULARY - len(pieces))]
    tokens, values, types = zip(*pieces, strict=True)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if scores:
        writer.add_token_scores(values)
    writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    for name, value in fields.items():
        add = (
            writer.add_bool
            if isinstance(value, bool)
            else writer.add_uint32
            if isinstance(value, int)
            else writer.add_array
        )
        add(f"tokenizer.ggml.{name}", value)


def fields_of(tokenizer):
    """(pieces, merges, special ids) of a tokenizer of transformers: SentencePiece counts its merges in the scores."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    types = {str(token): 3 if token.special else 4 for token in tokenizer.added_tokens_decoder.values()}
    pieces = [
        (token, float(-index), types.get(token, 6 if token.startswith("<0x") else 1))
        for index, token in enumerate(tokens)
    ]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown"}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{short}_token_id") for short, name in names.items()}
    return pieces, model["merges"], {name: index for name, index in ids.items() if index is not None}
