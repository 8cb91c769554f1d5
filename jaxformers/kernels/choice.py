"""The choice of a kernel for this machine: by backend, types, sizes and the mask."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxformers.checks import check_choice
from jaxformers.kernels.blockwise import BLOCK, blockwise_attention
from jaxformers.kernels.flash import flash_attention
from jaxformers.kernels.plain import AttentionFunction, check_inputs, dot_product_attention
from jaxformers.kernels.ring import can_travel, ring_attention
from jaxformers.masks import AttentionMask, Mask, as_mask
from jaxformers.native.attention import FEW, native_attention, obstacle_to_native
from jaxformers.sites import is_asked_for

logger = logging.getLogger(__name__)

SCORES = "scores", "pattern"  # the sites that plain attention alone has
# Scores per head that may be kept for the backward pass. Beyond them memory is linear in the
# sequence. Measured on a CPU, where that is as fast from there on; chosen elsewhere, where loops
# cost more.
FEW_SCORES = {"cpu": 512**2, "gpu": 1024**2}
FEW_SCORES_ELSEWHERE = 2048**2
# Measured on a CPU, chosen elsewhere: accelerators want more work at a time.
FLASH_BLOCKS = {"cpu": (256, 512)}
FLASH_BLOCKS_ELSEWHERE = (2048, 512)


class Choice(NamedTuple):
    """A kernel, and the reason for it.

    If `cudnn` is True, cuDNN's kernel runs in its place wherever the program is placed on a GPU.

    Example:
        >>> q = jnp.ones((1, 8, 300, 4))
        >>> choose_attention(q, q, q, AttentionMask(causal=True), backend="cpu").why
        '300 x 300 scores per head are few enough to keep'
    """

    kernel: AttentionFunction
    why: str
    cudnn: bool = False

    def __str__(self) -> str:
        function: Any = getattr(self.kernel, "func", self.kernel)
        return f"{'cuDNN' if self.cudnn else function.__name__}: {self.why}"


def fast_attention(
    q: Float[Array, "*b n t h"],
    k: Float[Array, "*b g s h"],
    v: Float[Array, "*b g s h"],
    mask: Mask | None,
    *,
    softcap: float | None = None,
    dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "*b n t h"]:
    """Returns attention by the fast kernel for this machine; it is the default `attention_fn`.

    `choose_attention` says which kernel that is and why, and so does the log at level debug. All
    kernels give the same numbers but for rounding. If the kernel is `flash_attention`, for long
    sequences, or cuDNN's, the program has no forward-mode derivative (`jax.jvp`). cuDNN's has no
    second derivative either, and does not take sequences that are spread over devices. Pass
    `dot_product_attention` for these.

    The arguments and the result are those of `dot_product_attention`.

    Example:
        >>> q, k = jnp.ones((2, 8, 5, 4)), jnp.ones((2, 2, 5, 4))
        >>> fast_attention(q, k, k, AttentionMask(causal=True)).shape
        (2, 8, 5, 4)
    """
    mask = as_mask(mask)
    check_inputs(q, k, v)
    if can_travel(q, k, dropout) and not is_asked_for(*SCORES):
        return ring_attention(q, k, v, mask, softcap=softcap)
    choice = choose_attention(q, k, v, mask, softcap=softcap, dropout=dropout)
    logger.debug("%s queries, %s keys: %s", q.shape, k.shape, choice)
    kernel = partial(choice.kernel, mask=mask, softcap=softcap, dropout=dropout)
    if not choice.cudnn:
        return kernel(q, k, v)
    # The program may still be placed on the CPU of a machine that has a GPU.
    return lax.platform_dependent(q, k, v, cuda=partial(_cudnn, mask=mask), default=kernel)


def choose_attention(
    q: Float[Array, "*b n t h"] | jax.ShapeDtypeStruct,
    k: Float[Array, "*b g s h"] | jax.ShapeDtypeStruct,
    v: Float[Array, "*b g s h"] | jax.ShapeDtypeStruct,
    mask: Mask | None,
    *,
    softcap: float | None = None,
    dropout: Callable[[Array], Array] | None = None,
    backend: str | None = None,
) -> Choice:
    """Returns the kernel that `fast_attention` runs, with the reason.

    Arguments:
        q, k, v, mask, softcap, dropout: as for `fast_attention`; shapes and types are enough.
        backend: "cpu", "gpu" or "tpu"; None is the one that JAX uses.

    Raises:
        ValueError: if the backend is another.

    Example:
        >>> q = jax.ShapeDtypeStruct((1, 8, 4096, 64), jnp.float32)
        >>> print(choose_attention(q, q, q, AttentionMask(causal=True), backend="cpu"))
        flash_attention: 4096 x 4096 scores per head are too many to keep
    """
    if backend is None:
        backend = jax.default_backend()
    else:
        check_choice(("cpu", "gpu", "tpu"), backend=backend)
    mask, t, s = as_mask(mask), q.shape[-2], k.shape[-2]
    if dropout is not None:
        return Choice(dot_product_attention, "dropout is applied to all attention weights")
    if is_asked_for(*SCORES):
        return Choice(dot_product_attention, "its scores or weights are looked at")
    obstacle = None
    if backend == "cpu" and t <= FEW:
        obstacle = obstacle_to_native(q, k, v)
        if obstacle is None:
            return Choice(native_attention, "few queries are one call of C")
    few = t * s <= FEW_SCORES.get(backend, FEW_SCORES_ELSEWHERE)
    if few or t <= BLOCK:
        why = f"{t} x {s} scores per head are few enough to keep" if few else "few queries"
        why = why if obstacle is None else f"{why}; {obstacle}"
        choice = Choice(blockwise_attention if backend == "cpu" else dot_product_attention, why)
    else:
        blocks = FLASH_BLOCKS.get(backend, FLASH_BLOCKS_ELSEWHERE)
        kernel = partial(flash_attention, blocks=blocks)
        choice = Choice(kernel, f"{t} x {s} scores per head are too many to keep")
    if backend != "gpu":
        return choice
    obstacle = _obstacle_to_cudnn(q, k, v, mask, softcap)
    if obstacle is None:
        return choice._replace(cudnn=True, why="its fused kernel takes these types and this mask")
    return choice._replace(why=f"{choice.why}; not cuDNN, since {obstacle}")


def _obstacle_to_cudnn(q: Any, k: Any, v: Any, mask: AttentionMask, softcap: Any) -> str | None:
    """Returns why cuDNN's fused attention cannot be used, or None if it can."""
    t, s = q.shape[-2], k.shape[-2]
    obstacles = {
        "there is a softcap": softcap is not None,
        "the mask has an explicit array": mask.explicit is not None,
        "positions are given": mask.q_positions is not None or mask.k_positions is not None,
        "documents are packed": mask.q_segments is not None,
        "the scores are biased": mask.bias is not None,
        "its causal masks are for as many keys as queries": mask.causal and t != s,
        "its windows are causal": mask.window is not None and not mask.causal,
        f"it computes in 16 bits, not in {q.dtype}": q.dtype not in (jnp.bfloat16, jnp.float16),
        "one query is no work for it": t == 1,
        "there are several axes of batch": len(q.shape) > 4,
    }
    for obstacle, is_there in obstacles.items():
        if is_there:
            return obstacle
    try:  # JAX knows the rest: head sizes, the generation of the GPU, the version of cuDNN
        jax.eval_shape(partial(_cudnn, mask=mask), q, k, v)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None


def _cudnn(
    q: Float[Array, "*b n t h"],
    k: Float[Array, "*b g s h"],
    v: Float[Array, "*b g s h"],
    mask: AttentionMask,
) -> Float[Array, "*b n t h"]:
    """Returns cuDNN's fused attention, for a causal mask, with or without a window, or none."""
    # JAX's order of axes is (b, t, n, h), with exactly one axis of batch.
    shape = q.shape
    q, k, v = (jnp.swapaxes(x if x.ndim == 4 else x[None], 1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=mask.causal,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )
    return jnp.swapaxes(out, 1, 2).reshape(shape)
