"""Settings that one family has and no other."""

from typing import Any, NamedTuple

from jaxformers.hf.activation_names import ACTIVATION_NAMES
from jaxformers.hf.architecture import Architecture, Rope
from jaxformers.hf.settings import Config, Tied


class LayerScale(NamedTuple):
    """GPT-2's two switches for the scale of attention scores."""

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        scaled = config.get("scale_attn_weights", True, "flag")
        by_layer = config.get("scale_attn_by_inverse_layer_idx", False, "flag")
        head_dim = fields["d_model"] // fields["num_heads"]
        scale = max(1, head_dim) ** -0.5 if scaled else 1.0
        fields["attention_scale"] = None if scaled and not by_layer else scale
        if by_layer:
            fields["attention_scale"] = tuple(scale / (i + 1) for i in range(fields["num_layers"]))

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        first = a.layer("attention_scale", 0)
        config["scale_attn_weights"] = first != 1.0
        config["scale_attn_by_inverse_layer_idx"] = isinstance(a.attention_scale, tuple)


class RotaryDim(NamedTuple):
    """GPT-J's rotary positions, of which files say nothing but how many features turn."""

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        dim = config.get("rotary_dim", 64, "size")
        fields["rope"] = Rope(10000.0, dim, interleaved=True)

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        if not isinstance(a.rope, Rope):
            raise ValueError("layers differ in their rotary positions.")
        config["rotary_dim"] = a.rope.dim  # what else it is, is seen when this is read again


class LocalLayers(NamedTuple):
    """GPT-Neo's layers, each of which sees everything or a window."""

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
        fields["window"] = tuple(window if kind == "local" else None for kind in kinds)

    def _expand(self, types: list[Any], layers: int) -> list[Any]:
        """Lists of kinds, each of which is repeated: `[[["global", "local"], 12]]`."""
        kinds: list[Any] = []
        for item in types:
            match item:
                case [list() as some, int() as times] if len(some) * times <= layers:
                    kinds += some * times
                case _:
                    return []
        return kinds

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        windows = [a.layer("window", i) for i in range(a.num_layers)]
        sizes = {window for window in windows if window is not None}
        if len(sizes) > 1:
            raise ValueError(f"layers have windows of different size, {sorted(sizes)}.")
        config["window_size"] = next(iter(sizes), 256)
        kinds = ["global" if window is None else "local" for window in windows]
        config["attention_types"] = [[kinds, 1]]
        config.pop("attention_layers", None)


class FalconLayers(NamedTuple):
    """Falcon's key heads and parallel layers, for which its two generations have switches."""

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        new = config.get("new_decoder_architecture", False, "flag")
        one_key = config.get("multi_query", True, "flag")
        parallel = config.get("parallel_attn", True, "flag")
        norms = config.get("num_ln_in_parallel_attn", None, "size", optional=True)
        heads = fields["num_heads"]
        given = config.get("num_kv_heads", None, "size", optional=True) or heads
        if new and not parallel:
            config.refuse("parallel_attn", "the new architecture has parallel layers only.")
        if norms not in ((None, 1, 2) if new else (None, 1)):
            config.refuse("num_ln_in_parallel_attn", "it is 1, or in the new architecture 2.")
        fields["num_kv_heads"] = given if new else 1 if one_key else heads
        norms = "two norms" if new and norms != 1 else "one norm"
        fields["parallel"] = norms if parallel else None

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        new = a.parallel == "two norms" or a.num_kv_heads not in (1, a.num_heads)
        config["new_decoder_architecture"] = new
        config["multi_query"] = a.num_kv_heads == 1
        config["num_kv_heads"] = a.num_kv_heads
        config["parallel_attn"] = a.parallel is not None
        config["num_ln_in_parallel_attn"] = (2 if a.parallel == "two norms" else 1) if new else None


class FirstPosition(NamedTuple):
    """M2M-100's positions, counted on from the id of padding."""

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        fields["position_offset"] = config.get("pad_token_id", 1, "count") + 1

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        config["pad_token_id"] = a.position_offset - 1 if a.position_offset > 0 else 1


class GatedName(NamedTuple):
    """T5's name for its feed-forward: an activation, with `gated-` before it or not."""

    default: str

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        name = config.get("feed_forward_proj", self.default, "text")
        if name not in _T5_FEED_FORWARDS:
            config.refuse("feed_forward_proj", f"it must be one of {', '.join(_T5_FEED_FORWARDS)}.")
        fields["gated"], fields["activation"] = _T5_FEED_FORWARDS[name]
        # Newer files spell out what follows.
        own = config.get("dense_act_fn", None, "text", optional=True)
        if own is not None:
            if own not in ACTIVATION_NAMES:
                config.refuse("dense_act_fn", f"it must be one of {', '.join(ACTIVATION_NAMES)}.")
            fields["activation"] = ACTIVATION_NAMES[own]
        gated = config.get("is_gated_act", fields["gated"], "flag")
        if gated != fields["gated"]:
            config.refuse("is_gated_act", "it contradicts feed_forward_proj.")

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        names = [
            name for name, what in _T5_FEED_FORWARDS.items() if what == (a.gated, a.activation)
        ]
        if not names:
            raise ValueError(f"feed_forward_proj has no name for {a.activation}.")
        config["feed_forward_proj"] = names[0]
        for key in ("dense_act_fn", "is_gated_act"):
            config.pop(key, None)


_T5_FEED_FORWARDS = {
    **{name: (False, activation) for name, activation in ACTIVATION_NAMES.items()},
    **{f"gated-{name}": (True, activation) for name, activation in ACTIVATION_NAMES.items()},
    # transformers takes GPT-2's GELU here, whatever the name says.
    "gated-gelu": (True, "gelu_tanh"),
}


class T5Scale(NamedTuple):
    """Whether hidden states are scaled by `d_model^-0.5` before the output layer (T5 v1.0).

    For transformers 4 that is whether the output layer is tied, and so it is in what is written: a
    tied layer that is not scaled gets a tensor all the same.
    """

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        # Files of transformers 4 say it by whether the output layer is tied.
        tied = config.get("tie_word_embeddings", True, "flag")
        on = config.get("scale_decoder_outputs", tied, "flag")
        fields["logits_scale"] = fields["d_model"] ** -0.5 if on else 1.0

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        config["scale_decoder_outputs"] = config["tie_word_embeddings"] = a.logits_scale != 1.0
        if a.logits_scale != 1.0 and not a.tied:
            raise ValueError("it has no words for an output layer of its own that is scaled.")


class Vocabularies(NamedTuple):
    """Marian's: one token table for source and target, or one for each."""

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
        fields |= {"src_vocab_size": source, "vocab_size": target, "shared": shared}

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        config["vocab_size"] = a.src_vocab_size
        config["decoder_vocab_size"] = a.vocab_size
        config["share_encoder_decoder_embeddings"] = a.shared
        config["tie_word_embeddings"] = a.tied if a.output else a.shared
        if config.get("decoder_start_token_id") is None:
            config["decoder_start_token_id"] = -1  # none, which its class has no other word for
