"""The names by which users ask for sites: paths, patterns, and the names of TransformerLens."""

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

# From TransformerLens' names (https://transformerlensorg.github.io/TransformerLens) to the name of
# a site; "blocks.3." before them is a layer. Theirs have heads after positions, (b, t, n, h).
# `hook_q` and `hook_k` are before the rotation there, and `hook_embed` is without the vectors of
# positions; here they are after the rotation, and with these vectors.
TRANSFORMER_LENS = {
    "hook_embed": "embedding.embedded",
    "hook_resid_pre": "residual_before",
    "hook_resid_mid": "residual_between",
    "hook_resid_post": "residual_after",
    "attn.hook_q": "self_attention.queries",
    "attn.hook_k": "self_attention.keys",
    "attn.hook_rot_q": "self_attention.queries",
    "attn.hook_rot_k": "self_attention.keys",
    "attn.hook_v": "self_attention.values",
    "attn.hook_attn_scores": "self_attention.scores",
    "attn.hook_pattern": "self_attention.pattern",
    "attn.hook_z": "self_attention.head_outputs",
    "hook_attn_out": "self_attention.sublayer_output",
    "cross_attn.hook_pattern": "cross_attention.pattern",
    "cross_attn.hook_z": "cross_attention.head_outputs",
    "hook_cross_attn_out": "cross_attention.sublayer_output",
    "mlp.hook_post": "feed_forward.activations",
    "hook_mlp_out": "feed_forward.sublayer_output",
    "ln_final.hook_normalized": "hidden",
}


def as_path(name: str, stack: str) -> str:
    """Returns the path for a name of TransformerLens; other names stay as they are.

    Arguments:
        name: a path or a pattern.
        stack: the stack that "blocks" means, "decoder" or "encoder".

    Example:
        >>> as_path("blocks.3.attn.hook_pattern", "decoder")
        'decoder.layers.3.self_attention.pattern'
        >>> as_path("encoder.*.hook_mlp_out", "decoder")
        'encoder.layers.*.feed_forward.sublayer_output'
    """
    if "hook_" not in name:
        return name
    layer = re.fullmatch(r"(blocks|encoder|decoder)\.(\d+|\*)\.(.+)", name)
    if layer is not None and layer[3] in TRANSFORMER_LENS:
        place = stack if layer[1] == "blocks" else layer[1]
        return f"{place}.layers.{layer[2]}.{TRANSFORMER_LENS[layer[3]]}"
    if layer is None and name in TRANSFORMER_LENS:
        path = TRANSFORMER_LENS[name]
        return f"{stack}.{path}" if path == "hidden" else path
    return name


def as_paths(names: Any, model: Any) -> tuple[str, ...]:
    """Returns the paths and patterns for what a user asks for."""
    listed = isinstance(names, list | tuple)
    if not listed or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"sites must be a list of names such as ['decoder.layers.*.residual_after'], "
            f"got {names!r:.200}."
        )
    encodes = hasattr(model, "encoder") and not hasattr(model, "decoder")
    stack = "encoder" if encodes else "decoder"  # what a function calls is most often a decoder
    return tuple(as_path(name, stack) for name in names)


def check_reached(patterns: Iterable[str], reached: Iterable[str]) -> None:
    """Raises an error if a pattern matches none of the paths that a program has."""
    reached = list(reached)
    if not reached:
        raise ValueError(
            "the program has no sites. What is compiled already, such as model.generate or a "
            "function of jax.jit, is not seen into, and neither is what reads no argument: trace "
            "the model, or a function of its arrays that is not compiled."
        )
    for pattern in patterns:
        if any(fnmatchcase(path, pattern) for path in reached):
            continue
        near = difflib.get_close_matches(pattern, reached, 5, 0.4)
        kernel = (
            " Attention has it where attention_fn is fast_attention or dot_product_attention."
            if pattern.endswith(("scores", "pattern"))
            else ""
        )
        raise ValueError(
            f"the program has no site {pattern!r}. Near it are {', '.join(near) or 'none'}; "
            f"trace(model, shapes=True) lists all.{kernel}"
        )
