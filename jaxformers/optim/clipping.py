"""The global norm of gradients, and gradient clipping."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxformers.checks import check_positive, is_known


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """Returns the Euclidean norm of all inexact arrays of a tree as one vector, in float32.

    Arguments:
        tree: any pytree, such as gradients. Other leaves are ignored.

    Example:
        >>> print(global_norm({"w": jnp.asarray([3.0]), "b": jnp.asarray([4.0])}))
        5.0
    """
    arrays = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in arrays]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def clip_by_global_norm(grads: PyTree, max_norm: float) -> tuple[PyTree, Float[Array, ""]]:
    """Returns gradients whose global norm is at most `max_norm`, and the norm before clipping.

    All gradients are scaled by one factor. Gradients within the limit do not change (Pascanu et al.
    2013).

    Arguments:
        grads: gradients. Leaves that are not inexact arrays are returned unchanged.
        max_norm: largest global norm, above 0.

    Raises:
        ValueError: if `max_norm` is not a finite number above 0.

    Example:
        >>> grads, norm = clip_by_global_norm({"w": jnp.asarray([3.0, 4.0])}, 1.0)
        >>> print(grads["w"], norm)
        [0.6 0.8] 5.0
    """
    if is_known(max_norm):
        check_positive(max_norm=max_norm)
    norm = global_norm(grads)
    scale = max_norm / jnp.maximum(norm, jnp.asarray(max_norm, jnp.float32))
    arrays, rest = eqx.partition(grads, eqx.is_inexact_array)
    arrays = jax.tree.map(lambda x: (x.astype(jnp.float32) * scale).astype(x.dtype), arrays)
    return eqx.combine(arrays, rest), norm
