"""Writes GGUF files of one model in several types, and of an encoder of sentences."""

import json
from pathlib import Path

import numpy as np

UNQUANTIZED = "position_embd", "token_types"  # llama.cpp leaves these tables as they are
BERT = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
BERT_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def recast(source, target, kind):
    """Writes the model of a GGUF file with matrices of another type, such as "Q8_0".

    The weights are those of the source, unpacked to float32 and rounded to the type.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    left_out = "GGUF.", "general.architecture", "general.file_type"  # the writer has its own
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(left_out):
            of_items = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], of_items)
    for tensor in reader.tensors:
        add(writer, tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type), kind)
    finish(writer)


def encoder_file(directory, target, kind):
    """Writes the BERT of a directory of sentence-transformers, with its tokenizer and pooling."""
    import gguf
    from safetensors.numpy import load_file

    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] != "bert":
        raise SystemExit(f"the encoder must be a BERT, got {config['model_type']}.")
    writer = gguf.GGUFWriter(target, "bert")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    add_word_pieces(writer, json.loads((directory / "tokenizer.json").read_text()))
    for name, x in load_file(directory / "model.safetensors").items():
        if (new := bert_name(name.removeprefix("bert."))) is not None:
            add(writer, new, x, kind)
    finish(writer)


def add_word_pieces(writer, tokenizer):
    """Adds a WordPiece vocabulary, in which a piece that begins a word has a sign before it."""
    import gguf

    ids = tokenizer["model"]["vocab"]
    control = {token["content"] for token in tokenizer["added_tokens"]}
    pieces = sorted(ids, key=ids.get)
    normal, special = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(2)
    writer.add_token_list([
        piece if piece in control else piece[2:] if piece.startswith("##") else f"\u2581{piece}"
        for piece in pieces
    ])  # fmt: skip
    writer.add_token_types([special if piece in control else normal for piece in pieces])
    for name, token in {"bos": "CLS", "eos": "SEP", "sep": "SEP"}.items():
        getattr(writer, f"add_{name}_token_id")(ids[f"[{token}]"])
    for name in "unk", "pad", "mask":
        getattr(writer, f"add_{name}_token_id")(ids[f"[{name.upper()}]"])


def bert_name(name):
    """Returns the name in GGUF files of a tensor, or None of one that these files lack."""
    module, _, suffix = name.rpartition(".")
    if module in BERT:
        return f"{BERT[module]}.{suffix}"
    if module.startswith("encoder.layer."):
        layer, _, part = module.removeprefix("encoder.layer.").partition(".")
        return f"blk.{layer}.{BERT_LAYER[part]}.{suffix}"
    return None


def add(writer, name, x, kind):
    """Adds a tensor, in float32 if it is a vector or a table that llama.cpp leaves so."""
    import gguf

    small = x.ndim < 2 or name.startswith(UNQUANTIZED)
    dtype = gguf.GGMLQuantizationType["F32" if small else kind]
    writer.add_tensor(name, gguf.quantize(x.astype(np.float32), dtype), raw_dtype=dtype)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
