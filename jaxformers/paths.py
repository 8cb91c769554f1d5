"""Where a leaf is in a model, as text."""

import jax


def path_name(path: tuple) -> str:
    """A path into a tree as text: `decoder.layers.0.self_attention.wq`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
