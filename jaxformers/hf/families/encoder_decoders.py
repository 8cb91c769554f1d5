"""Encoder-decoder families."""

from jaxformers.hf.activation_names import ACTIVATION_NAMES
from jaxformers.hf.family import Family, linear, norm, rules, same, when
from jaxformers.hf.layouts import Rule
from jaxformers.hf.settings import Fixed, Kept, Named, Present, Scaled, Setting, Tied
from jaxformers.hf.special_settings import FirstPosition, GatedName, T5Scale, Vocabularies

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


T5_TIED = Tied(True, table="shared.weight", by_file=True)


def t5_settings(
    vocab_size: int,
    d_ff: int,
    num_layers: int,
    num_heads: int,
    feed_forward: str,
    tied: Tied = T5_TIED,
):
    """What T5 and its successors have in common, with a family's defaults."""
    return (
        Setting("vocab_size", "vocab_size", vocab_size),
        Setting("d_model", "d_model", 512, alias="hidden_size"),
        Setting("d_kv", "head_dim", 64, alias="head_dim"),
        Setting("d_ff", "d_ff", d_ff),
        Setting("num_layers", "num_layers", num_layers, "layers", alias="num_hidden_layers"),
        Setting("num_decoder_layers", "num_decoder_layers", None, "layers", optional=True),
        Setting("num_heads", "num_heads", num_heads, alias="num_attention_heads"),
        Setting("relative_attention_num_buckets", "t5_buckets", 32),
        Setting("relative_attention_max_distance", "t5_distance", 128, "distance"),
        Setting("dropout_rate", "dropout", 0.1, "number"),
        Setting("layer_norm_epsilon", "norm_eps", 1e-6, "positive"),
        Fixed({"norm": "rms", "position": "t5", "attention_scale": 1.0, "shared": True}),
        GatedName(feed_forward),
        Kept(("n_positions", "max_position_embeddings", "is_decoder")),
        tied,
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
T5_REPEATS = (("lm_head.weight", "shared.weight"),)

# Raffel et al. 2020; v1.1 and Flan have gated feed-forwards and an output layer of their own.
T5 = Family(
    model_type="t5",
    shape="seq2seq",
    classes={"output": "T5ForConditionalGeneration"},
    settings=(*t5_settings(32128, 2048, 6, 8, "relu"), T5Scale()),
    weights=T5_WEIGHTS,
    copies=T5_COPIES,
    repeats=T5_REPEATS,
    ignored=T5_IGNORED,
    special={"pad_token_id": 0, "eos_token_id": 1},
)

# Xue et al. 2021.
MT5 = Family(
    model_type="mt5",
    shape="seq2seq",
    classes={"output": "MT5ForConditionalGeneration"},
    # transformers 4 scales the logits of a tied output layer here too, and 5 does not.
    settings=t5_settings(250112, 1024, 8, 6, "gated-gelu", T5_TIED._replace(never=True)),
    weights=T5_WEIGHTS,
    copies=T5_COPIES,
    repeats=T5_REPEATS,
    ignored=T5_IGNORED,
    special={"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
)


def bart_settings(activation: str = "gelu", attention_dropout: float = 0.0, scaled: bool = False):
    """What BART and its successors have in common, with a family's defaults."""
    return (
        Setting("d_model", "d_model", 1024, alias="hidden_size"),
        Setting("encoder_layers", "num_layers", 12, "layers", alias="num_hidden_layers"),
        Setting("decoder_layers", "num_decoder_layers", 12, "layers"),
        Setting("encoder_attention_heads", "num_heads", 16, alias="num_attention_heads"),
        Setting("decoder_attention_heads", "decoder_num_heads", 16),
        Setting("encoder_ffn_dim", "d_ff", 4096),
        Setting("decoder_ffn_dim", "decoder_d_ff", 4096),
        Setting("max_position_embeddings", "max_seq_length", 1024),
        Setting("dropout", "dropout", 0.1, "number"),
        Setting("attention_dropout", "attention_dropout", attention_dropout, "number"),
        Named("activation_function", "activation", activation, ACTIVATION_NAMES),
        Scaled(default=scaled),
        Fixed({"qkv_bias": True, "out_bias": True, "ff_bias": True}),
        Kept(("activation_dropout", "encoder_layerdrop", "decoder_layerdrop", "is_decoder")),
        # Older files say as well what their family does anyway, and repeat themselves.
        Kept(
            ("add_bias_logits", "add_final_layer_norm", "normalize_before", "normalize_embedding")
        ),
        Kept(("extra_pos_embeddings", "force_bos_token_to_be_generated")),
        Kept(("classif_dropout", "_num_labels", "output_past", "save_step", "replacing_rate")),
    )


BART_LEARNED = Fixed({"position": "learned", "position_offset": 2, "embedding_norm": True})
BART_SINUSOIDS = Fixed({"position": "sinusoid", "sinusoid_interleaved": False})
BART_POST_NORM = Fixed({"placement": "post", "final_norm": False})
LOGITS_BIAS = Present("logits_bias", "final_logits_bias")


def bart_vocabulary(vocab_size: int = 50265):
    """One vocabulary for source and target."""
    return (
        Setting("vocab_size", "vocab_size", vocab_size),
        Fixed({"shared": True}),
        Tied(True, table="model.shared.weight", stacks=True),
    )


def bart_stack(stack: str, attentions: dict[str, str]):
    """One of BART's stacks: `attentions` are ours with their name in the file."""
    ours, theirs = f"{stack}.layers.{{i}}", f"model.{stack}.layers.{{i}}"
    parts = []
    for name, their_name in attentions.items():
        parts += [linear(f"{ours}.{name}.w{x}", f"{theirs}.{their_name}.{x}_proj") for x in "qkv"]
        parts += [
            linear(f"{ours}.{name}.wo", f"{theirs}.{their_name}.out_proj"),
            norm(f"{ours}.{name}_residual.norm", f"{theirs}.{their_name}_layer_norm"),
        ]
    embedding = {"encoder": "src_embedding", "decoder": "tgt_embedding"}[stack]
    return rules(
        *parts,
        linear(f"{ours}.feed_forward.w_in", f"{theirs}.fc1"),
        linear(f"{ours}.feed_forward.w_out", f"{theirs}.fc2"),
        norm(f"{ours}.feed_forward_residual.norm", f"{theirs}.final_layer_norm"),
        norm(f"{stack}.norm", f"model.{stack}.layer_norm"),
        norm(f"{embedding}.norm", f"model.{stack}.layernorm_embedding"),
    )


BART_STACKS = rules(
    bart_stack("encoder", {"attention": "self_attn"}),
    bart_stack("decoder", {"self_attention": "self_attn", "cross_attention": "encoder_attn"}),
    linear("output.w", "lm_head")[:1],
)
BART_BIAS = (Rule(("output.b",), ("final_logits_bias",), "row"),)
BART_TABLE = same(TARGET_TABLE, "model.shared.weight")
BART_POSITIONS = rules(
    same("src_embedding.position.weight", "model.encoder.embed_positions.weight"),
    same("tgt_embedding.position.weight", "model.decoder.embed_positions.weight"),
)
BART_COPIES = tuple(
    (f"model.{stack}.embed_tokens.weight", "model.shared.weight")
    for stack in ("encoder", "decoder")
)
BART_IGNORED = (r"coder\.version$",)
# Sinusoids that are stored.
SINUSOIDS_IGNORED = (*BART_IGNORED, r"embed_positions\.weights?$")

# Lewis et al. 2020.
BART = Family(
    model_type="bart",
    shape="seq2seq",
    classes={"output": "BartForConditionalGeneration", "base": "BartModel"},
    settings=(*bart_settings(), *bart_vocabulary(), LOGITS_BIAS, BART_LEARNED, BART_POST_NORM),
    weights=rules(BART_TABLE, BART_POSITIONS, BART_STACKS, BART_BIAS),
    prefix="model.",
    copies=BART_COPIES,
    repeats=BART_COPIES,
    ignored=BART_IGNORED,
    special={
        **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        **{"decoder_start_token_id": 2, "forced_eos_token_id": 2},
    },
)

# Liu et al. 2020.
MBART = Family(
    model_type="mbart",
    shape="seq2seq",
    classes={"output": "MBartForConditionalGeneration", "base": "MBartModel"},
    settings=(*bart_settings(), *bart_vocabulary(), LOGITS_BIAS, BART_LEARNED),
    weights=rules(BART_TABLE, BART_POSITIONS, BART_STACKS, BART_BIAS),
    prefix="model.",
    copies=BART_COPIES,
    repeats=BART_COPIES,
    ignored=BART_IGNORED,
    special={
        **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        **{"forced_eos_token_id": 2},
    },
)

# Junczys-Dowmunt et al. 2018; Tiedemann and Thottingal 2020.
MARIAN = Family(
    model_type="marian",
    shape="seq2seq",
    classes={"output": "MarianMTModel", "base": "MarianModel"},
    settings=(*bart_settings(), Vocabularies(), LOGITS_BIAS, BART_SINUSOIDS, BART_POST_NORM),
    weights=rules(
        when(lambda a: a.shared, BART_TABLE),
        when(lambda a: not a.shared, same(TARGET_TABLE, "model.decoder.embed_tokens.weight")),
        same("src_embedding.token_embedding.weight", "model.encoder.embed_tokens.weight"),
        BART_STACKS,
        BART_BIAS,
    ),
    prefix="model.",
    repeats=BART_COPIES,
    ignored=SINUSOIDS_IGNORED,
    special={
        **{"pad_token_id": 58100, "eos_token_id": 0},
        **{"decoder_start_token_id": 58100, "forced_eos_token_id": 0},
    },
)

# Zhang et al. 2020.
PEGASUS = Family(
    model_type="pegasus",
    shape="seq2seq",
    classes={"output": "PegasusForConditionalGeneration", "base": "PegasusModel"},
    settings=(*bart_settings(), *bart_vocabulary(), LOGITS_BIAS, BART_SINUSOIDS),
    weights=rules(BART_TABLE, BART_STACKS, BART_BIAS),
    prefix="model.",
    copies=BART_COPIES,
    repeats=BART_COPIES,
    ignored=SINUSOIDS_IGNORED,
    special={
        **{"pad_token_id": 0, "eos_token_id": 1},
        **{"decoder_start_token_id": 0, "forced_eos_token_id": 1},
    },
)

# Fan et al. 2021; NLLB Team 2022.
M2M_100 = Family(
    model_type="m2m_100",
    shape="seq2seq",
    classes={"output": "M2M100ForConditionalGeneration", "base": "M2M100Model"},
    settings=(
        *bart_settings("relu", attention_dropout=0.1, scaled=True),
        *bart_vocabulary(128112),
        BART_SINUSOIDS,
        Fixed({"sinusoid_inclusive": True}),
        FirstPosition(),
    ),
    weights=rules(BART_TABLE, BART_STACKS),
    prefix="model.",
    copies=BART_COPIES,
    repeats=BART_COPIES,
    ignored=SINUSOIDS_IGNORED,
    special={
        **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        **{"decoder_start_token_id": 2},
    },
)

ENCODER_DECODERS = (T5, MT5, BART, MARIAN, MBART, PEGASUS, M2M_100)
