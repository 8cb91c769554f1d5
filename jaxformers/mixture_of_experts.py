"""A mixture of experts: many feed-forwards, of which each token uses a few.

The letters of shapes are those of `attention.py`.
"""

import copy
from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformers.activations import silu
from jaxformers.checks import check_flag, check_key, check_size
from jaxformers.initializers import Initializer, xavier_uniform
from jaxformers.layers import GatedFeedForward, as_module, split_key
from jaxformers.native.products import keeps_products
from jaxformers.sharding.constraints import by_rows
from jaxformers.sites import scope, site, unwatched
from jaxformers.weights import Weight, contract, contract_each


class MixtureOfExperts(eqx.Module):
    """Gated feed-forwards, the experts, and a router that chooses k of them for each token.

    The output is the sum of the k experts' outputs, weighted by the router's probabilities. A model
    has the weights of all experts and the cost of k. Every token gets all of its k experts, however
    many other tokens have the same ones (Shazeer et al. 2017; Jiang et al. 2024, Mixtral).

    Arguments:
        d_model: width of input and output.
        d_ff: width inside one expert.
        num_experts: number of experts e.
        top_k: number k of experts for each token.
        activation: applied to the gates, SiLU.
        renormalize: whether the weights of the k experts are scaled to sum to 1, True as in
            Mixtral.
        shared_d_ff: width of one more expert that serves all tokens, times a trained gate in (0, 1)
            (Qwen2-MoE); None is no such expert.
        use_bias: must be False, since experts have no biases.
        init: how the router, `w_gate` and `w_up` are drawn.
        residual_init: how `w_down` is drawn; None is `init`.
        key: PRNG key, required.

    Raises:
        ValueError: if a size is not a positive integer, `top_k` is above `num_experts`, biases are
            asked for, or there is no key.

    Example:
        >>> MixtureOfExperts(64, 96, 8, 2, key=jax.random.key(0))(jnp.ones((2, 10, 64))).shape
        (2, 10, 64)
        >>> from functools import partial
        >>> mixture = partial(MixtureOfExperts, num_experts=8, top_k=2)
        >>> model = TransformerLM(65, feed_forward=mixture, key=key)
    """

    router: Float[Weight, "d e"]
    w_gate: Float[Weight, "e d f"]
    w_up: Float[Weight, "e d f"]
    w_down: Float[Weight, "e f d"]
    shared_expert: GatedFeedForward | None
    w_shared_gate: Float[Weight, "d 1"] | None
    activation: Callable
    top_k: int = eqx.field(static=True)
    renormalize: bool = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        top_k: int,
        activation: Callable = silu,
        renormalize: bool = True,
        shared_d_ff: int | None = None,
        *,
        use_bias: bool = False,
        init: Initializer = xavier_uniform,
        residual_init: Initializer | None = None,
        key: PRNGKeyArray | None = None,
    ):
        check_size(d_model=d_model, d_ff=d_ff, num_experts=num_experts, top_k=top_k)
        check_flag(use_bias=use_bias, renormalize=renormalize)
        _check_experts(num_experts, top_k, use_bias)
        keys = split_key(check_key(key), 6)
        inner, outer = (num_experts, d_model, d_ff), (num_experts, d_ff, d_model)
        self.router = init(keys[0], (d_model, num_experts), d_model, num_experts)
        self.w_gate = init(keys[1], inner, d_model, d_ff)
        self.w_up = init(keys[2], inner, d_model, d_ff)
        self.w_down = (residual_init or init)(keys[3], outer, d_ff, d_model)
        self.activation = as_module(activation)
        self.shared_expert = self.w_shared_gate = None
        if shared_d_ff is not None:
            check_size(shared_d_ff=shared_d_ff)
            # A copy, since an activation may have weights, and no array may be there twice.
            self.shared_expert = GatedFeedForward(
                d_model,
                shared_d_ff,
                copy.deepcopy(self.activation),
                use_bias=False,
                init=init,
                residual_init=residual_init,
                key=keys[4],
            )
            self.w_shared_gate = init(keys[5], (d_model, 1), d_model, 1)
        self.top_k = int(top_k)
        self.renormalize = bool(renormalize)

    @property
    def num_experts(self) -> int:
        return self.router.shape[-1]

    # Compiled here, since outside of a `jit` each call would compile the loop over blocks anew.
    @eqx.filter_jit
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        with unwatched():  # blocks of sorted tokens are no value of a token
            return by_rows(MixtureOfExperts._apply, self, x)

    def _apply(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        rows = x.reshape(-1, x.shape[-1])
        weights, experts = self.route(rows)
        outputs = self._through_experts(rows, experts).astype(jnp.float32)
        y = jnp.einsum("tk,tkd->td", weights, outputs).astype(x.dtype)
        if self.shared_expert is not None and self.w_shared_gate is not None:
            gate = jax.nn.sigmoid(contract(rows, self.w_shared_gate))
            with scope("shared_expert"):
                y = y + gate * self.shared_expert(rows)
        return y.reshape(x.shape)

    def route(
        self, x: Float[Array, "*b d"]
    ) -> tuple[Float[Array, "*b {self.top_k}"], Int[Array, "*b {self.top_k}"]]:
        """Returns the weights, in float32, and the k experts of each token, best first."""
        weights, experts = lax.top_k(self._probabilities(x), self.top_k)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdims=True)
        return weights, experts

    def load_balancing_loss(self, x: Float[Array, "*b d"]) -> Float[Array, ""]:
        """Returns a loss that is lowest where the tokens spread evenly over the experts.

        Add it to the loss of a training, times 0.01 or so. It is
        `e * sum_i share_i * probability_i`, where `share_i` is the share of tokens that have expert
        i, and `probability_i` its mean probability. It is k where tokens spread evenly, and more
        where they do not (Fedus et al. 2022, Switch Transformers, section 2.2; for k > 1 as in
        Mixtral).

        Arguments:
            x: inputs of this module, `(..., d_model)`; leave out those of padding.

        Example:
            >>> mixture = MixtureOfExperts(16, 32, 4, 2, key=key)
            >>> loss = 0.01 * mixture.load_balancing_loss(x)
        """
        probabilities = self._probabilities(x).reshape(-1, self.num_experts)
        _, experts = lax.top_k(probabilities, self.top_k)
        counts = jnp.bincount(experts.reshape(-1), length=self.num_experts)
        shares = counts.astype(jnp.float32) / len(probabilities)
        return self.num_experts * (shares * probabilities.mean(0)).sum()

    def _probabilities(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        return jax.nn.softmax(contract(x, self.router).astype(jnp.float32))

    def _through_experts(
        self, rows: Float[Array, "t d"], experts: Int[Array, "t k"]
    ) -> Float[Array, "t k d"]:
        """Returns the outputs of each token's experts.

        The pairs of token and expert are sorted into blocks of one expert each, and blocks are
        filled up with zeros. A loop computes block after block. Its cost does not depend on the
        routing, and it reads only the experts that are used. (`lax.ragged_dot` computes every row
        with every expert on CPU.)
        """
        size, slots, block_experts = _blocks(experts.reshape(-1), self.num_experts)
        d = rows.shape[-1]
        blocks = jnp.zeros((len(block_experts) * size, d), rows.dtype)
        pairs = jnp.repeat(rows, self.top_k, axis=0)
        blocks = blocks.at[slots].set(pairs, unique_indices=True).reshape(-1, size, d)

        # Without this policy the backward pass keeps a copy of the weights for each block.
        @partial(jax.checkpoint, policy=keeps_products)
        def through_one(block_and_expert):
            block, i = block_and_expert
            gate, up = contract_each(block, (self.w_gate[i], None), (self.w_up[i], None))
            hidden = self.activation(gate) * up
            return contract(site(hidden, "activations"), self.w_down[i])

        outputs = lax.map(through_one, (blocks, block_experts))
        return outputs.reshape(-1, d)[slots].reshape(*experts.shape, d)


def _blocks(
    experts: Int[Array, " pairs"], num_experts: int
) -> tuple[int, Int[Array, " pairs"], Int[Array, " blocks"]]:
    """Returns the size of a block, the slot of each pair in all blocks, and each block's expert."""
    pairs = len(experts)
    # A large block has a fast product. With small blocks, less is filled up.
    size = max(1, min(128, pairs // num_experts))
    # The most blocks that can be needed: the last block of each expert then has one row.
    num_blocks = (pairs + min(num_experts, pairs) * (size - 1)) // size
    counts = jnp.bincount(experts, length=num_experts)
    blocks = -(-counts // size)
    shift = (jnp.cumsum(blocks) - blocks) * size - (jnp.cumsum(counts) - counts)
    slots = jnp.argsort(jnp.argsort(experts)) + shift[experts]
    indices = jnp.arange(num_experts)
    return size, slots, jnp.repeat(indices, blocks, total_repeat_length=num_blocks)


def _check_experts(num_experts: int, top_k: int, use_bias: bool) -> None:
    if top_k > num_experts:
        raise ValueError(f"top_k must be at most num_experts = {num_experts}, got {top_k}.")
    if use_bias:
        raise ValueError(
            "experts have no biases, got use_bias=True. Pass use_bias=False; attention has its own "
            "use_qkv_bias and use_out_bias."
        )
