"""The tables of T5 and mT5."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.config.entries import Config
from jaxformers.hf.config.settings import Fixed, Kept, Setting
from jaxformers.hf.families.bart import TARGET_TABLE
from jaxformers.hf.families.bert_like import TABLE
from jaxformers.hf.family import Family, linear, norm, rules, same


class GatedName(NamedTuple):
    """T5's name of a feed-forward: an activation, with or without `gated-` before it."""

    default: str

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        name = config.get("feed_forward_proj", self.default, "text")
        if name not in _T5_FEED_FORWARDS:
            config.refuse("feed_forward_proj", f"it must be one of {', '.join(_T5_FEED_FORWARDS)}.")
        fields["feed_forward.gated"], fields["feed_forward.activation"] = _T5_FEED_FORWARDS[name]
        # Newer files have both parts as entries of their own.
        own = config.get("dense_act_fn", None, "text", optional=True)
        if own is not None:
            if own not in ACTIVATION_NAMES:
                config.refuse("dense_act_fn", f"it must be one of {', '.join(ACTIVATION_NAMES)}.")
            fields["feed_forward.activation"] = ACTIVATION_NAMES[own]
        gated = config.get("is_gated_act", fields["feed_forward.gated"], "flag")
        if gated != fields["feed_forward.gated"]:
            config.refuse("is_gated_act", "it contradicts feed_forward_proj.")

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        own = fields["feed_forward.gated"], fields["feed_forward.activation"]
        names = [name for name, meaning in _T5_FEED_FORWARDS.items() if meaning == own]
        if not names:
            raise ValueError(f"feed_forward_proj has no name for {own[1]}.")
        config["feed_forward_proj"] = names[0]
        for key in ("dense_act_fn", "is_gated_act"):
            config.pop(key, None)


_T5_FEED_FORWARDS = {
    **{name: (False, activation) for name, activation in ACTIVATION_NAMES.items()},
    **{f"gated-{name}": (True, activation) for name, activation in ACTIVATION_NAMES.items()},
    # transformers takes GPT-2's GELU here, despite the name.
    "gated-gelu": (True, "gelu_tanh"),
}


class T5Scale(NamedTuple):
    """Whether hidden states are scaled by `d_model^-0.5` before the output layer (T5 v1.0).

    Transformers 4 scales them if the output layer is tied. The written entries agree with that: a
    tied layer that is not scaled is written as one that is not tied.
    """

    @property
    def anew(self) -> bool:
        """Whether each save replaces the entries, also those of the file the model came from."""
        return True

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        # In files of transformers 4, they are scaled if the output layer is tied.
        tied = config.get("tie_word_embeddings", True, "flag")
        on = config.get("scale_decoder_outputs", tied, "flag")
        fields["output.scale"] = fields["d_model"] ** -0.5 if on else 1.0

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        if not fields["output.present"]:
            return  # the entries are about an output layer that is in another file
        scaled = fields["output.scale"] != 1.0
        config["scale_decoder_outputs"] = config["tie_word_embeddings"] = scaled
        if scaled and not fields["output.tied"]:
            raise ValueError("it has no words for an output layer of its own that is scaled.")


def t5_attention(ours: str, theirs: str):
    """Returns the rules of an attention."""
    return rules(*(linear(f"{ours}.w{x}", f"{theirs}.{x}") for x in "qkvo"))


def t5_stack(stack: str, attentions: dict[str, int], feed_forward: int):
    """Returns the rules of a stack; `attentions` are our attentions with their place in a block."""
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
    """Returns the settings of T5 and its successors, with a family's defaults."""
    return (
        Setting("vocab_size", "vocab_size", vocab_size),
        Setting("d_model", "d_model", 512, alias="hidden_size"),
        Setting("d_kv", "attention.head_dim", 64, alias="head_dim"),
        Setting("d_ff", "feed_forward.d_ff", d_ff),
        Setting("num_layers", "num_layers", num_layers, "layers", alias="num_hidden_layers"),
        Setting("num_decoder_layers", "num_decoder_layers", None, "layers", optional=True),
        Setting("num_heads", "attention.num_heads", num_heads, alias="num_attention_heads"),
        Setting("relative_attention_num_buckets", "position.t5_buckets", 32),
        Setting("relative_attention_max_distance", "position.t5_distance", 128, "distance"),
        Setting("dropout_rate", "dropout", 0.1, "number"),
        Setting("layer_norm_epsilon", "norm.eps", 1e-6, "positive"),
        Fixed(
            {
                "norm.kind": "rms",
                "position.kind": "t5",
                "attention.scale": 1.0,
                "embedding.shared": True,
            }
        ),
        GatedName(feed_forward),
        Kept(("n_positions", "max_position_embeddings", "is_decoder")),
        tied,
    )


T5_WEIGHTS = rules(
    same(TARGET_TABLE, "shared.weight"),
    t5_stack("encoder", {"self_attention": 0}, 1),
    t5_stack("decoder", {"self_attention": 0, "cross_attention": 1}, 2),
    linear("output.w", "lm_head"),
)

T5_COPIES = tuple(
    (f"{stack}.embed_tokens.weight", "shared.weight") for stack in ("encoder", "decoder")
)

# An encoder alone has none of these, and its encoder is read from files of whole models.
T5_DECODER = (r"^decoder\.", r"^lm_head\.")
T5_IGNORED = (r"EncDecAttention\.relative_attention_bias",)
T5_REPEATS = (("lm_head.weight", "shared.weight"),)

T5_ENCODER_WEIGHTS = rules(
    same(TABLE, "shared.weight"),
    t5_stack("encoder", {"self_attention": 0}, 1),
)

# The entries of config.json that are about the decoder.
_OF_DECODER = ("num_decoder_layers", "tie_word_embeddings")


def t5_encoder(family: Family) -> Family:
    """Returns the table for the encoder alone of T5 or a successor (Ni et al. 2021)."""
    name = family.classes["base"].removesuffix("Model")
    settings = [
        x
        for x in family.settings
        if getattr(x, "key", None) not in _OF_DECODER and not isinstance(x, T5Scale)
    ]
    return family._replace(
        shape="encoder",
        classes={"base": f"{name}EncoderModel"},
        settings=(
            *settings,
            Kept((*_OF_DECODER, "tie_encoder_decoder", "scale_decoder_outputs")),
            Fixed({"embedding.shared": False, "output.present": False}),
        ),
        weights=T5_ENCODER_WEIGHTS,
        repeats=(),
        copies=T5_COPIES[:1],
        ignored=(*T5_IGNORED, *T5_DECODER),
    )


# Raffel et al. 2020; v1.1 and Flan have gated feed-forwards and an output layer of their own.
T5 = Family(
    model_type="t5",
    shape="seq2seq",
    classes={"output": "T5ForConditionalGeneration", "base": "T5Model"},
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
    classes={"output": "MT5ForConditionalGeneration", "base": "MT5Model"},
    # transformers 4 scales the logits of a tied output layer here too, and 5 does not.
    settings=t5_settings(250112, 1024, 8, 6, "gated-gelu", T5_TIED._replace(never=True)),
    weights=T5_WEIGHTS,
    copies=T5_COPIES,
    repeats=T5_REPEATS,
    ignored=T5_IGNORED,
    special={"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
)

FAMILIES = (
    T5._replace(encoder=t5_encoder(T5)),
    MT5._replace(encoder=t5_encoder(MT5)),
)
