"""The tables of GPT-2 and the families that grew from it: GPT-Neo, GPT-J and GPT-NeoX."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.architecture.parts import of_layer
from jaxformers.hf.architecture.rope import Rope, Rotary
from jaxformers.hf.config.entries import Config
from jaxformers.hf.config.settings import Derived, Fixed, Kept, Named, Setting
from jaxformers.hf.families.decoder_paths import (
    ATTENTION,
    FEED_FORWARD,
    FOUR_TIMES,
    LAYER,
    QKV,
    TABLE,
)
from jaxformers.hf.family import Family, conv1d, fused, linear, norm, rules, same


class LayerScale(NamedTuple):
    """GPT-2's two switches for the scale of attention scores."""

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        scaled = config.get("scale_attn_weights", True, "flag")
        by_layer = config.get("scale_attn_by_inverse_layer_idx", False, "flag")
        head_dim = fields["d_model"] // fields["attention.num_heads"]
        scale = max(1, head_dim) ** -0.5 if scaled else 1.0
        fields["attention.scale"] = None if scaled and not by_layer else scale
        if by_layer:
            fields["attention.scale"] = tuple(scale / (i + 1) for i in range(fields["num_layers"]))

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        first = of_layer(fields["attention.scale"], 0)
        config["scale_attn_weights"] = first != 1.0
        config["scale_attn_by_inverse_layer_idx"] = isinstance(fields["attention.scale"], tuple)


class RotaryDim(NamedTuple):
    """GPT-J's rotary positions. Files say only how many features rotate."""

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        dim = config.get("rotary_dim", 64, "size")
        fields["position.rope"] = Rope(10000.0, dim, interleaved=True)

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        rope = fields["position.rope"]
        if not isinstance(rope, Rope):
            raise ValueError("layers differ in their rotary positions.")
        config["rotary_dim"] = rope.dim  # the written file is read again, which shows the rest


class LocalLayers(NamedTuple):
    """GPT-Neo's layers. Each of them sees all positions or a window."""

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        layers = fields["num_layers"]
        window = config.get("window_size", 256, "size")
        types = config.get("attention_types", [[["global", "local"], 12]], "list")
        kinds = config.get("attention_layers", None, "list", optional=True)
        key = "attention_types" if kinds is None else "attention_layers"
        kinds = self._expand(types, layers) if kinds is None else kinds
        if len(kinds) != layers or any(kind not in ("global", "local") for kind in kinds):
            raise ValueError(
                f"config.json: {key} must say 'global' or 'local' for each of the {layers} layers, "
                f"got {config.entries.get(key)!r:.120}."
            )
        fields["attention.window"] = tuple(window if kind == "local" else None for kind in kinds)

    def _expand(self, types: list[Any], layers: int) -> list[Any]:
        """Returns the kinds that repeated lists make, such as `[[["global", "local"], 12]]`."""
        kinds: list[Any] = []
        for item in types:
            match item:
                case [list() as some, int() as times] if len(some) * times <= layers:
                    kinds += some * times
                case _:
                    return []
        return kinds

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        windows = [of_layer(fields["attention.window"], i) for i in range(fields["num_layers"])]
        sizes = {window for window in windows if window is not None}
        if len(sizes) > 1:
            raise ValueError(f"layers have windows of different size, {sorted(sizes)}.")
        config["window_size"] = next(iter(sizes), 256)
        kinds = ["global" if window is None else "local" for window in windows]
        config["attention_types"] = [[kinds, 1]]
        config.pop("attention_layers", None)


H = "transformer.h.{i}"
GPT_TABLE = "transformer.wte.weight"
GPT_IGNORED = (r"\.attn\.(attention\.)?(masked_)?bias$",)
INNER = (Setting("n_inner", "feed_forward.d_ff", None, optional=True), FOUR_TIMES)

# Radford et al. 2019.
GPT2 = Family(
    model_type="gpt2",
    shape="lm",
    classes={"output": "GPT2LMHeadModel", "base": "GPT2Model"},
    settings=(
        Setting("vocab_size", "vocab_size", 50257),
        Setting("n_positions", "position.max_seq_length", 1024, alias="max_position_embeddings"),
        Setting("n_embd", "d_model", 768, alias="hidden_size"),
        Setting("n_layer", "num_layers", 12, "layers", alias="num_hidden_layers"),
        Setting("n_head", "attention.num_heads", 12, alias="num_attention_heads"),
        *INNER,
        Named("activation_function", "feed_forward.activation", "gelu_new", ACTIVATION_NAMES),
        Setting("resid_pdrop", "dropout", 0.1, "number"),
        Setting("attn_pdrop", "attention.dropout", 0.1, "number"),
        Setting("layer_norm_epsilon", "norm.eps", 1e-5, "positive"),
        Fixed(
            {
                "position.kind": "learned",
                "attention.qkv_bias": True,
                "attention.out_bias": True,
                "feed_forward.bias": True,
            }
        ),
        LayerScale(),
        Kept(("embd_pdrop", "n_ctx", "reorder_and_upcast_attn")),
        Tied(True, table=GPT_TABLE),
    ),
    weights=rules(
        same(TABLE, GPT_TABLE),
        same("embedding.position.weight", "transformer.wpe.weight"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{H}.ln_1"),
        fused(QKV, f"{H}.attn.c_attn", "conv1d columns"),
        conv1d(f"{ATTENTION}.wo", f"{H}.attn.c_proj"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{H}.ln_2"),
        conv1d(f"{FEED_FORWARD}.w_in", f"{H}.mlp.c_fc"),
        conv1d(f"{FEED_FORWARD}.w_out", f"{H}.mlp.c_proj"),
        norm("decoder.norm", "transformer.ln_f"),
        linear("output.w", "lm_head"),
    ),
    prefix="transformer.",
    ignored=GPT_IGNORED,
    special={"bos_token_id": 50256, "eos_token_id": 50256},
)

NEOX_LAYER = "gpt_neox.layers.{i}"

# Black et al. 2022; Biderman et al. 2023 (Pythia).
GPT_NEOX = Family(
    model_type="gpt_neox",
    shape="lm",
    classes={"output": "GPTNeoXForCausalLM", "base": "GPTNeoXModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 50432),
        Setting("hidden_size", "d_model", 6144),
        Setting("num_hidden_layers", "num_layers", 44, "layers"),
        Setting("num_attention_heads", "attention.num_heads", 64),
        Setting("intermediate_size", "feed_forward.d_ff", 24576),
        Setting("hidden_dropout", "dropout", 0.0, "number"),
        Setting("attention_dropout", "attention.dropout", 0.0, "number"),
        Setting("layer_norm_eps", "norm.eps", 1e-5, "positive"),
        Named("hidden_act", "feed_forward.activation", "gelu", ACTIVATION_NAMES),
        Named("use_parallel_residual", "residual.parallel", True, {True: "two norms", False: None}),
        Setting("attention_bias", "attention.qkv_bias", True, "flag"),
        Derived("attention.out_bias", lambda fields: fields["attention.qkv_bias"]),
        Fixed({"feed_forward.bias": True}),
        Rotary(partial=0.25, partial_key="rotary_pct", theta_key="rotary_emb_base"),
        # Some files repeat entries under other names.
        Kept(("rope_theta", "partial_rotary_factor", "is_decoder")),
        Kept(("attention_probs_dropout_prob", "hidden_dropout_prob")),
        Kept((), {"max_position_embeddings": 2048}),
        Tied(False, "embed_out.weight", "gpt_neox.embed_in.weight"),
    ),
    weights=rules(
        same(TABLE, "gpt_neox.embed_in.weight"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{NEOX_LAYER}.input_layernorm"),
        fused(
            QKV,
            f"{NEOX_LAYER}.attention.query_key_value",
            "linear heads",
        ),
        linear(f"{ATTENTION}.wo", f"{NEOX_LAYER}.attention.dense"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{NEOX_LAYER}.post_attention_layernorm"),
        linear(f"{FEED_FORWARD}.w_in", f"{NEOX_LAYER}.mlp.dense_h_to_4h"),
        linear(f"{FEED_FORWARD}.w_out", f"{NEOX_LAYER}.mlp.dense_4h_to_h"),
        norm("decoder.norm", "gpt_neox.final_layer_norm"),
        linear("output.w", "embed_out"),
    ),
    prefix="gpt_neox.",
    ignored=(r"\.attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$"),
    special={"bos_token_id": 0, "eos_token_id": 2},
    aliases=((r"^lm_head\.", "embed_out."),),
)

# Wang and Komatsuzaki 2021.
GPTJ = Family(
    model_type="gptj",
    shape="lm",
    classes={"output": "GPTJForCausalLM", "base": "GPTJModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 50400),
        Setting("n_embd", "d_model", 4096, alias="hidden_size"),
        Setting("n_layer", "num_layers", 28, "layers", alias="num_hidden_layers"),
        Setting("n_head", "attention.num_heads", 16, alias="num_attention_heads"),
        *INNER,
        Named("activation_function", "feed_forward.activation", "gelu_new", ACTIVATION_NAMES),
        Setting("resid_pdrop", "dropout", 0.0, "number"),
        Setting("attn_pdrop", "attention.dropout", 0.0, "number"),
        Setting("layer_norm_epsilon", "norm.eps", 1e-5, "positive"),
        RotaryDim(),
        Fixed({"residual.parallel": "one norm", "feed_forward.bias": True, "output.bias": True}),
        Kept(("embd_pdrop", "rotary", "scale_attn_weights", "max_position_embeddings")),
        Kept((), {"n_positions": 2048}),
        Tied(False, table=GPT_TABLE),
    ),
    weights=rules(
        same(TABLE, GPT_TABLE),
        norm(f"{LAYER}.self_attention_residual.norm", f"{H}.ln_1"),
        *(linear(f"{ATTENTION}.w{x}", f"{H}.attn.{x}_proj") for x in "qkv"),
        linear(f"{ATTENTION}.wo", f"{H}.attn.out_proj"),
        linear(f"{FEED_FORWARD}.w_in", f"{H}.mlp.fc_in"),
        linear(f"{FEED_FORWARD}.w_out", f"{H}.mlp.fc_out"),
        norm("decoder.norm", "transformer.ln_f"),
        linear("output.w", "lm_head"),
    ),
    prefix="transformer.",
    ignored=GPT_IGNORED,
    special={"bos_token_id": 50256, "eos_token_id": 50256},
)

# Black et al. 2021.
GPT_NEO = Family(
    model_type="gpt_neo",
    shape="lm",
    classes={"output": "GPTNeoForCausalLM", "base": "GPTNeoModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 50257),
        Setting("max_position_embeddings", "position.max_seq_length", 2048),
        Setting("hidden_size", "d_model", 2048),
        Setting("num_layers", "num_layers", 24, "layers", alias="num_hidden_layers"),
        Setting("num_heads", "attention.num_heads", 16, alias="num_attention_heads"),
        Setting("intermediate_size", "feed_forward.d_ff", None, optional=True),
        FOUR_TIMES,
        Named("activation_function", "feed_forward.activation", "gelu_new", ACTIVATION_NAMES),
        Setting("resid_dropout", "dropout", 0.0, "number"),
        Setting("attention_dropout", "attention.dropout", 0.0, "number"),
        Setting("layer_norm_epsilon", "norm.eps", 1e-5, "positive"),
        LocalLayers(),
        Fixed(
            {
                "position.kind": "learned",
                "attention.scale": 1.0,
                "attention.out_bias": True,
                "feed_forward.bias": True,
            }
        ),
        Kept(("embed_dropout",)),
        Tied(True, table=GPT_TABLE),
    ),
    weights=rules(
        same(TABLE, GPT_TABLE),
        same("embedding.position.weight", "transformer.wpe.weight"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{H}.ln_1"),
        *(linear(f"{ATTENTION}.w{x}", f"{H}.attn.attention.{x}_proj") for x in "qkv"),
        linear(f"{ATTENTION}.wo", f"{H}.attn.attention.out_proj"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{H}.ln_2"),
        linear(f"{FEED_FORWARD}.w_in", f"{H}.mlp.c_fc"),
        linear(f"{FEED_FORWARD}.w_out", f"{H}.mlp.c_proj"),
        norm("decoder.norm", "transformer.ln_f"),
        linear("output.w", "lm_head"),
    ),
    prefix="transformer.",
    ignored=GPT_IGNORED,
    special={"bos_token_id": 50256, "eos_token_id": 50256},
)

FAMILIES = (
    GPT2,
    GPT_NEOX,
    GPTJ,
    GPT_NEO,
)
