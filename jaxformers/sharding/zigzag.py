"""The order of positions that divides the work of causal attention evenly over a ring."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxformers.sharding.mesh import SEQUENCE, as_auto, sizes_of


def zigzag(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Returns a language model's batch with its positions in zigzag order, for causal attention.

    A causal query attends to what is before it. In natural order the last of n devices therefore
    computes with almost all keys, while the first computes with few, and all wait for the last. So
    rows are cut into 2n chunks here, and device i gets chunks i and 2n - 1 - i, which is as much
    work for each (Brandon et al. 2023, Striped Attention; Llama 3, section 3.3.2). Models read the
    positions, not the order, and losses are means over tokens: their values stay as they are.
    Dropout draws numbers by the order, and so has other ones.

    `fit(mesh=)` calls it where that is safe: for `language_model_loss` and a `TransformerLM` of
    parts of this package, without dropout. Before `train_step` call it yourself, and `shard_batch`
    after it.

    Arguments:
        batch: arrays `(b, t)` under the names of `language_model_loss`, of NumPy or JAX. Other
            arrays of these first sizes are reordered as well, and all else stays as it is.
        mesh: from `make_mesh`. One that does not divide positions changes nothing.

    Returns:
        The batch with `positions` and `segment_ids` in place of a `padding_mask`, also where it had
        none of them.

    Raises:
        ValueError: if the number of positions is no multiple of 2n, or segments have no positions.

    Example:
        >>> from jaxformers.sharding import make_mesh
        >>> mesh = make_mesh(sequence=2, devices=jax.devices()[:2])
        >>> rows = zigzag({"tokens": np.array([[5, 6, 7, 8]])}, mesh)
        >>> rows["tokens"], rows["positions"]
        (array([[5, 8, 6, 7]]), array([[0, 3, 1, 2]], dtype=int32))
    """
    n = sizes_of(as_auto(mesh)).get(SEQUENCE, 1)
    if n == 1:
        return dict(batch)
    if batch.get("tokens") is None:
        raise ValueError(
            "the zigzag order is for a language model's batch, which has tokens, got "
            f"{', '.join(batch) or 'nothing'}. Leave zigzag out for other batches."
        )
    shape = np.shape(batch["tokens"])
    if len(shape) != 2 or shape[1] % (2 * n):
        raise ValueError(
            f"the zigzag order of sequence={n} needs tokens (b, t) with t a multiple of {2 * n}, "
            f"got {shape}. Pass rows of another length, or leave zigzag out."
        )
    first = np.arange(shape[1]).reshape(2 * n, -1)
    order = np.stack([first[:n], first[n:][::-1]], axis=1).reshape(-1)

    def reorder(x: Any) -> Any:
        return x[:, order] if np.shape(x)[:2] == shape else x

    return {name: reorder(x) for name, x in _placed(batch, shape).items()}


def _placed(batch: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the batch with positions, from its padding mask if it has one, and segments."""
    found = {name: x for name, x in batch.items() if x is not None}
    if "positions" in found:
        return found
    if "segment_ids" in found:
        raise ValueError(
            "a batch of packed documents must have both positions and segment_ids, got segment_ids "
            "alone. Add positions."
        )
    real = found.pop("padding_mask", None)
    real = np.ones(shape, np.bool_) if real is None else np.asarray(real)
    if real.dtype != np.bool_ or real.shape != shape:
        raise ValueError(
            f"padding_mask must be boolean with the tokens' shape {shape}, True where a token is "
            f"real, got {real.dtype} {real.shape}. For 0/1 integers write padding_mask == 1."
        )
    counts = np.cumsum(real, axis=-1, dtype=np.int32)
    places = np.where(real, counts - 1, -1).astype(np.int32)
    return found | {"positions": places, "segment_ids": np.zeros(shape, np.int32)}
