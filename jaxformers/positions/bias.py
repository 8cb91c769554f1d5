"""Position schemes that add a bias to the attention scores: ALiBi, and the buckets of T5."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformers.checks import check_key, check_size
from jaxformers.initializers import Initializer, xavier_uniform
from jaxformers.weights import Weight, lookup


class ALiBi(eqx.Module):
    """Attention with linear biases (Press et al. 2022).

    A score decreases linearly with the distance between query and key, by a slope per head.
    Nothing is added to the embeddings, and the length of a sequence is not limited.

    Example:
        >>> model = TransformerLM(65, position=ALiBi(), key=key)
    """

    def bias(
        self,
        q_positions: Int[Array, "*b t"],
        k_positions: Int[Array, "*b s"],
        num_heads: int,
        causal: bool = False,
    ) -> Float[Array, "*b n t s"]:
        """Returns `-slope * |q - k|` for each head. The bias is the same for any mask."""
        distance = jnp.abs(q_positions[..., :, None] - k_positions[..., None, :])
        slopes = jnp.asarray(alibi_slopes(num_heads))[:, None, None]
        return -slopes * distance[..., None, :, :].astype(jnp.float32)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Returns the slopes of ALiBi, one for each head, in float32.

    For a power of two they are `2^(-8i/n)`. For other numbers the authors' rule takes the slopes
    of the largest power of two below, then every other slope of twice that many heads. BLOOM and
    MPT compute the same slopes.
    """
    power = 2 ** int(np.log2(num_heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * power + 1, 2) / power)
    return np.concatenate([slopes, between])[:num_heads].astype(np.float32)


class T5PositionBias(eqx.Module):
    """A table of trained biases for the scores, one per head and bucket of distances (T5).

    Each small distance has a bucket of its own, and larger distances share buckets. All distances
    from `max_distance` on share the last one. Where the mask is not causal, half of the buckets
    are for keys before the query and half for keys after it. Nothing is added to the embeddings,
    and the length of a sequence is not limited (Raffel et al. 2020).

    Arguments:
        num_heads: the number of query heads.
        num_buckets: the number of rows of the table, at least 4; default 32.
        max_distance: the distance at which the last bucket begins, above `num_buckets / 2`;
            default 128.
        init: the initializer of the table, Xavier-uniform by default.
        key: PRNG key, required.

    Raises:
        ValueError: if a size is out of its range, or there is no key.

    Example:
        >>> model = TransformerLM(65, position=lambda key: T5PositionBias(8, key=key), key=key)
    """

    weight: Float[Weight, "u n"]
    max_distance: int = eqx.field(static=True)

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        *,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray | None = None,
    ):
        check_size(num_heads=num_heads, num_buckets=num_buckets, max_distance=max_distance)
        if num_buckets < 4:
            raise ValueError(f"num_buckets must be at least 4, got {num_buckets}.")
        if max_distance <= num_buckets // 2:
            raise ValueError(
                f"max_distance must be above num_buckets / 2, got {max_distance} and {num_buckets}."
            )
        self.weight = init(check_key(key), (num_buckets, num_heads), num_buckets, num_heads)
        self.max_distance = int(max_distance)

    @property
    def num_buckets(self) -> int:
        return self.weight.shape[0]

    @property
    def num_heads(self) -> int:
        return self.weight.shape[1]

    def bias(
        self,
        q_positions: Int[Array, "*b t"],
        k_positions: Int[Array, "*b s"],
        num_heads: int,
        causal: bool = False,
    ) -> Float[Array, "*b n t s"]:
        """Returns the bias of each head for the bucket of `k - q`, in float32."""
        if num_heads != self.num_heads:
            raise ValueError(
                f"this T5PositionBias is for {self.num_heads} heads, got {num_heads}. Build it "
                f"with num_heads={num_heads}."
            )
        far = self.max_distance
        buckets = t5_buckets(np.arange(-far, far + 1), self.num_buckets, far, causal)
        by_distance = lookup(self.weight, jnp.asarray(buckets, jnp.int32)).astype(jnp.float32)
        ahead = jnp.clip(k_positions[..., None, :] - q_positions[..., :, None], -far, far)
        return jnp.moveaxis(by_distance[ahead + far], -1, -3)


def t5_buckets(
    ahead: Int[np.ndarray, " r"], num_buckets: int, max_distance: int, causal: bool
) -> Int[np.ndarray, " r"]:
    """Returns the bucket of each distance `key - query`.

    Half of the buckets have one distance each. The width of the others grows with the logarithm.
    """
    distance = np.maximum(-ahead, 0) if causal else np.abs(ahead)
    n = num_buckets if causal else num_buckets // 2
    exact = n // 2
    growth = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    # Without 1e-9 a rounding error could move the first distance of a bucket to the one before.
    shared = exact + (growth * (n - exact) + 1e-9).astype(int)
    bucket = np.where(distance < exact, distance, np.minimum(shared, n - 1))
    return bucket if causal else bucket + n * (ahead > 0)
