"""The tables of BART and its successors: mBART, Marian, Pegasus and M2M-100."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.embedding import Scaled
from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.config.entries import Config
from jaxformers.hf.config.settings import Fixed, Kept, Named, Present, Setting
from jaxformers.hf.family import Family, Rule, linear, norm, rules, same, when


class FirstPosition(NamedTuple):
    """M2M-100's positions, which begin after the id of padding."""

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        fields["position.offset"] = config.get("pad_token_id", 1, "count") + 1

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        offset = fields["position.offset"]
        config["pad_token_id"] = offset - 1 if offset > 0 else 1


class Vocabularies(NamedTuple):
    """Marian's vocabularies: one token table for source and target, or one for each."""

    @property
    def anew(self) -> bool:
        """Whether each save replaces the entries, also those of the file the model came from."""
        return True

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        source = config.get("vocab_size", 58101, "size")
        target = config.get("decoder_vocab_size", None, "size", optional=True) or source
        shared = config.get("share_encoder_decoder_embeddings", True, "flag")
        if shared and source != target:
            config.refuse("decoder_vocab_size", "one table for both must be that of vocab_size.")
        if shared:
            for stack in ("encoder", "decoder"):
                config.tensors.merge(f"model.{stack}.embed_tokens.weight", "model.shared.weight")
        table = "model.shared.weight" if shared else "model.decoder.embed_tokens.weight"
        Tied(True, table=table).read(config, fields)
        fields |= {"src_vocab_size": source, "vocab_size": target, "embedding.shared": shared}

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        shared, tied = fields["embedding.shared"], fields["output.tied"]
        config["vocab_size"] = fields["src_vocab_size"]
        config["decoder_vocab_size"] = fields["vocab_size"]
        config["share_encoder_decoder_embeddings"] = shared
        config["tie_word_embeddings"] = tied
        if config.get("decoder_start_token_id") is None:
            config["decoder_start_token_id"] = -1  # its class has no other word for none


TARGET_TABLE = "tgt_embedding.token_embedding.weight"


def bart_settings(activation: str = "gelu", attention_dropout: float = 0.0, scaled: bool = False):
    """Returns the settings of BART and its successors, with a family's defaults."""
    return (
        Setting("d_model", "d_model", 1024, alias="hidden_size"),
        Setting("encoder_layers", "num_layers", 12, "layers", alias="num_hidden_layers"),
        Setting("decoder_layers", "num_decoder_layers", 12, "layers"),
        Setting("encoder_attention_heads", "attention.num_heads", 16, alias="num_attention_heads"),
        Setting("decoder_attention_heads", "attention.decoder_num_heads", 16),
        Setting("encoder_ffn_dim", "feed_forward.d_ff", 4096),
        Setting("decoder_ffn_dim", "feed_forward.decoder_d_ff", 4096),
        Setting("max_position_embeddings", "position.max_seq_length", 1024),
        Setting("dropout", "dropout", 0.1, "number"),
        Setting("attention_dropout", "attention.dropout", attention_dropout, "number"),
        Named("activation_function", "feed_forward.activation", activation, ACTIVATION_NAMES),
        Scaled(default=scaled),
        Fixed({"attention.qkv_bias": True, "attention.out_bias": True, "feed_forward.bias": True}),
        Kept(("activation_dropout", "encoder_layerdrop", "decoder_layerdrop", "is_decoder")),
        # Entries of older files that only repeat the options of their family.
        Kept(
            ("add_bias_logits", "add_final_layer_norm", "normalize_before", "normalize_embedding")
        ),
        Kept(("extra_pos_embeddings", "force_bos_token_to_be_generated")),
        Kept(("classif_dropout", "_num_labels", "output_past", "save_step", "replacing_rate")),
    )


BART_LEARNED = Fixed({"position.kind": "learned", "position.offset": 2, "embedding.norm": True})
BART_SINUSOIDS = Fixed({"position.kind": "sinusoid", "position.sinusoid_interleaved": False})
BART_POST_NORM = Fixed({"residual.placement": "post", "residual.final_norm": False})
LOGITS_BIAS = Present("output.bias", "final_logits_bias")


def bart_vocabulary(vocab_size: int = 50265):
    """Returns the settings of one vocabulary for source and target."""
    return (
        Setting("vocab_size", "vocab_size", vocab_size),
        Fixed({"embedding.shared": True}),
        Tied(True, table="model.shared.weight"),
    )


def bart_stack(stack: str, attentions: dict[str, str]):
    """Returns the rules of a stack; `attentions` are our attentions with their names in files."""
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
    bart_stack("encoder", {"self_attention": "self_attn"}),
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

# Some files have sinusoids.
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
        when(lambda a: a.embedding.shared, BART_TABLE),
        when(
            lambda a: not a.embedding.shared,
            same(TARGET_TABLE, "model.decoder.embed_tokens.weight"),
        ),
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
        Fixed({"position.sinusoid_inclusive": True}),
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

FAMILIES = (
    BART,
    MBART,
    MARIAN,
    PEGASUS,
    M2M_100,
)
