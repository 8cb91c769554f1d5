"""The paths of a decoder-only model's arrays, and a width that several families share."""

from jaxformers.hf.config.settings import Derived

LAYER = "decoder.layers.{i}"
ATTENTION = f"{LAYER}.self_attention"
FEED_FORWARD = f"{LAYER}.feed_forward"
TABLE = "embedding.token_embedding.weight"
QKV = tuple(f"{ATTENTION}.w{x}" for x in "qkv")
FOUR_TIMES = Derived(
    "feed_forward.d_ff", lambda fields: fields["feed_forward.d_ff"] or 4 * fields["d_model"]
)
