"""Similarities of vectors, on the host: nothing is compiled for a new number of vectors."""

from typing import Any

import numpy as np
from jaxtyping import Float

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


def to_unit_length(vectors: Float[np.ndarray, "... d"]) -> Float[np.ndarray, "... d"]:
    """Returns vectors scaled to length 1; vectors of length 0 stay as they are."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, np.float32(1e-12))


def compare(first: Any, second: Any, how: str) -> Float[np.ndarray, "..."]:
    """Returns the similarity of each vector of the first to each of the second, in float32.

    Arguments:
        first: `(n, d)` or `(d,)`.
        second: `(m, d)` or `(d,)`.
        how: "cosine", "dot", or the negative distance "euclidean" or "manhattan".

    Returns:
        `(n, m)`, without the axis of an argument that is one vector.

    Raises:
        ValueError: if the arrays are no vectors of one width.
    """
    a, b = _as_vectors("a", first), _as_vectors("b", second)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"a and b must be vectors of one width, got the shapes {a.shape} and {b.shape}."
        )
    if how == "cosine":
        a, b = to_unit_length(a), to_unit_length(b)
    rows = np.atleast_2d(a)
    if how in ("cosine", "dot"):
        scores = rows @ np.atleast_2d(b).T
    else:  # row by row, since all differences at once are `(n, m, d)`
        order = 2 if how == "euclidean" else 1
        scores = np.zeros((len(rows), len(np.atleast_2d(b))), np.float32)
        for i, row in enumerate(rows):
            scores[i] = -np.linalg.norm(np.atleast_2d(b) - row, order, axis=-1)
    return scores.reshape(a.shape[:-1] + b.shape[:-1])


def _as_vectors(name: str, x: Any) -> Float[np.ndarray, "..."]:
    try:
        vectors = np.asarray(x, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be vectors, (n, d) or (d,), got {x!r:.80}: {error}. Call the embedder "
            "to make vectors of texts."
        ) from None
    if vectors.ndim not in (1, 2) or not vectors.shape[-1]:
        raise ValueError(f"{name} must have shape (n, d) or (d,), got {vectors.shape}.")
    return vectors
