"""Encoder-decoder families."""

from jaxformers.hf.family import Family, linear, norm, rules, same
from jaxformers.hf.settings import Fixed, Kept, Setting, Tied
from jaxformers.hf.special_settings import GatedName, T5Scale

TARGET_TABLE = "tgt_embedding.token_embedding.weight"


def t5_attention(ours: str, theirs: str):
    """One of T5's attentions."""
    return rules(*(linear(f"{ours}.w{x}", f"{theirs}.{x}") for x in "qkvo"))


def t5_stack(stack: str, attentions: dict[str, int], feed_forward: int):
    """One of T5's stacks: `attentions` are ours with their place in the block and their name."""
    ours, theirs = f"{stack}.layers.{{i}}", f"{stack}.block.{{i}}.layer"
    parts = []
    for name, place in attentions.items():
        kind = "EncDecAttention" if name == "cross_attention" else "SelfAttention"
        parts += [
            t5_attention(f"{ours}.{name}", f"{theirs}.{place}.{kind}"),
            norm(f"{ours}.{name}_residual.norm", f"{theirs}.{place}.layer_norm"),
        ]
    dense = f"{theirs}.{feed_forward}.DenseReluDense"
    return rules(
        *parts,
        linear(f"{ours}.feed_forward.w_in", f"{dense}.wi"),
        linear(f"{ours}.feed_forward.w_out", f"{dense}.wo"),
        linear(f"{ours}.feed_forward.w_gate", f"{dense}.wi_0"),
        linear(f"{ours}.feed_forward.w_up", f"{dense}.wi_1"),
        linear(f"{ours}.feed_forward.w_down", f"{dense}.wo"),
        norm(f"{ours}.feed_forward_residual.norm", f"{theirs}.{feed_forward}.layer_norm"),
        norm(f"{stack}.norm", f"{stack}.final_layer_norm"),
        same(
            f"{stack}.score_bias.weight",
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
    )


def t5_settings(vocab_size: int, d_ff: int, num_layers: int, num_heads: int, feed_forward: str):
    """What T5 and its successors have in common, with a family's defaults."""
    return (
        Setting("vocab_size", "vocab_size", vocab_size),
        Setting("d_model", "d_model", 512),
        Setting("d_kv", "head_dim", 64),
        Setting("d_ff", "d_ff", d_ff),
        Setting("num_layers", "num_layers", num_layers, "layers"),
        Setting("num_decoder_layers", "num_decoder_layers", None, "layers", optional=True),
        Setting("num_heads", "num_heads", num_heads),
        Setting("relative_attention_num_buckets", "t5_buckets", 32),
        Setting("relative_attention_max_distance", "t5_distance", 128),
        Setting("dropout_rate", "dropout", 0.1, "number"),
        Setting("layer_norm_epsilon", "norm_eps", 1e-6, "positive"),
        Fixed({"norm": "rms", "position": "t5", "attention_scale": 1.0, "shared": True}),
        GatedName(feed_forward),
        Kept(("initializer_factor", "n_positions", "output_past", "is_decoder")),
        Tied(True, table="shared.weight", by_file=True),
    )


T5_WEIGHTS = rules(
    same(TARGET_TABLE, "shared.weight"),
    t5_stack("encoder", {"attention": 0}, 1),
    t5_stack("decoder", {"self_attention": 0, "cross_attention": 1}, 2),
    linear("output.w", "lm_head"),
)
T5_COPIES = tuple(
    (f"{stack}.embed_tokens.weight", "shared.weight") for stack in ("encoder", "decoder")
)
T5_IGNORED = (r"EncDecAttention\.relative_attention_bias",)

# Raffel et al. 2020; v1.1 and Flan have gated feed-forwards and an output layer of their own.
T5 = Family(
    model_type="t5",
    shape="seq2seq",
    classes={"output": "T5ForConditionalGeneration"},
    settings=(*t5_settings(32128, 2048, 6, 8, "relu"), T5Scale()),
    weights=T5_WEIGHTS,
    copies=T5_COPIES,
    ignored=T5_IGNORED,
    special={"pad_token_id": 0, "eos_token_id": 1},
)

# Xue et al. 2021.
MT5 = Family(
    model_type="mt5",
    shape="seq2seq",
    classes={"output": "MT5ForConditionalGeneration"},
    settings=t5_settings(250112, 1024, 8, 6, "gated-gelu"),
    weights=T5_WEIGHTS,
    copies=T5_COPIES,
    ignored=T5_IGNORED,
    special={"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
)

ENCODER_DECODERS = (T5, MT5)
