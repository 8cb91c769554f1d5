"""Paths to the leaves of a model, as text."""

import jax


def path_name(path: tuple) -> str:
    """Returns a path into a tree as text: `decoder.layers.0.self_attention.wq`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
