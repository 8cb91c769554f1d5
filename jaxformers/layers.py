"""The small parts: feed-forwards, dense layers, dropout, and pieces that are passed in."""

from collections.abc import Callable
from typing import Annotated, Any, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformers.activations import relu, silu
from jaxformers.axes import Letters
from jaxformers.checks import (
    check_accepts,
    check_flag,
    check_key,
    check_size,
)
from jaxformers.initializers import Initializer, xavier_uniform
from jaxformers.sites import site
from jaxformers.weights import Weight, contract, contract_each


@overload
def split_key(key: PRNGKeyArray, num: int) -> list[PRNGKeyArray]: ...
@overload
def split_key(key: PRNGKeyArray | None, num: int) -> list[PRNGKeyArray | None]: ...
def split_key(key, num):
    """Returns `num` keys made of one, or `num` times None for None (no key means inference)."""
    return [None] * num if key is None else list(jax.random.split(check_key(key), num))


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Returns `x` with each element zero with probability `rate`, and scaled to keep the mean.

    Without a key, or at rate 0, it returns `x` itself (Srivastava et al. 2014).
    """
    if key is None or rate == 0.0:
        return x
    # 16 random bits per element cost half as much as 32. The rate is rounded to them, and the scale
    # is exact for the rounded rate.
    dropped = min(round(rate * 2**16), 2**16 - 1)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= np.uint16(dropped)
    return jnp.where(keep, x * (2**16 / (2**16 - dropped)), 0.0)


class Function(eqx.Module):
    """A plain function as a module without arrays, so that all leaves of a model are arrays."""

    function: Callable = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> "Function":
        # A copied function is another one, and a tree with another function has another structure.
        return self


def as_module(function: Callable) -> Callable:
    """Returns a module as it is, since it may hold weights, and a plain function in a `Function`.

    Raises:
        ValueError: if it cannot be called, or is a class.
    """
    if not callable(function) or isinstance(function, type):
        raise ValueError(f"expected a function or a module to call, got {function!r}.")
    return function if isinstance(function, eqx.Module) else Function(function)


def construct(name: str, constructor: Callable, sizes: dict[str, Any], **options: Any) -> Any:
    """Returns the module or function that a constructor makes.

    Arguments:
        name: the name of the piece that the constructor was passed as, for errors.
        constructor: a class or a function, called `constructor(*sizes, **options)`.
        sizes: its arguments by position, under their names, which errors show.
        **options: its arguments by name.

    Raises:
        ValueError: if it is a module that is built already, cannot be called like that, or does not
            return a module or function.
    """
    if isinstance(constructor, eqx.Module) and not isinstance(constructor, eqx.Partial):
        kind = type(constructor).__name__
        raise ValueError(
            f"{name} must be a constructor, which is called as {name}({', '.join(sizes)}) for each "
            f"place that needs one, got an instance of {kind}, which is built already. Pass {kind} "
            f"itself, or partial({kind}, ...) with its options."
        )
    check_accepts(name, constructor, list(sizes), list(options))
    made = constructor(*sizes.values(), **options)
    if not callable(made):
        raise ValueError(
            f"{name} must be a constructor, which returns a module or a function to call, got "
            f"{constructor!r:.80}, which returned {made!r:.80}."
        )
    return made


class FeedForward(eqx.Module):
    """Two linear maps with an activation between: `activation(x w_in + b_in) w_out + b_out`.

    (Vaswani et al. 2017, section 3.3.)

    Arguments:
        d_model: width of input and output.
        d_ff: width between the maps.
        activation: an elementwise function or module, ReLU as in the paper.
        use_bias: whether both maps have a bias.
        init: how `w_in` is drawn.
        residual_init: how `w_out` is drawn; None is `init`.
        key: PRNG key, required.

    Example:
        >>> FeedForward(64, 256, key=jax.random.key(0))(jnp.ones((2, 10, 64))).shape
        (2, 10, 64)
    """

    w_in: Float[Weight, "d f"]
    b_in: Float[Array, " f"] | None
    w_out: Float[Weight, "f d"]
    b_out: Float[Array, " d"] | None
    activation: Callable = eqx.field(converter=as_module)

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: Callable = relu,
        use_bias: bool = True,
        *,
        init: Initializer = xavier_uniform,
        residual_init: Initializer | None = None,
        key: PRNGKeyArray | None = None,
    ):
        check_size(d_model=d_model, d_ff=d_ff)
        check_flag(use_bias=use_bias)
        in_key, out_key = split_key(check_key(key), 2)
        self.w_in = init(in_key, (d_model, d_ff), d_model, d_ff)
        self.w_out = (residual_init or init)(out_key, (d_ff, d_model), d_ff, d_model)
        self.b_in = jnp.zeros(d_ff, jnp.float32) if use_bias else None
        self.b_out = jnp.zeros(d_model, jnp.float32) if use_bias else None
        self.activation = activation

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        hidden = self.activation(contract(x, self.w_in, self.b_in))
        return contract(site(hidden, "activations"), self.w_out, self.b_out)


class GatedFeedForward(eqx.Module):
    """A feed-forward with a gate: `(activation(x w_gate) * (x w_up)) w_down`, SwiGLU by default.

    (Shazeer 2020.) It has three maps where `FeedForward` has two, and costs the same at 2/3 of the
    d_ff.

    Arguments:
        d_model: width of input and output.
        d_ff: width between the maps.
        activation: applied to the gate, SiLU.
        use_bias: whether the three maps have biases.
        init: how `w_gate` and `w_up` are drawn.
        residual_init: how `w_down` is drawn; None is `init`.
        key: PRNG key, required.

    Example:
        >>> GatedFeedForward(64, 160, key=jax.random.key(0))(jnp.ones((2, 10, 64))).shape
        (2, 10, 64)
    """

    w_gate: Float[Weight, "d f"]
    b_gate: Float[Array, " f"] | None
    w_up: Float[Weight, "d f"]
    b_up: Float[Array, " f"] | None
    w_down: Float[Weight, "f d"]
    b_down: Float[Array, " d"] | None
    activation: Callable = eqx.field(converter=as_module)

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: Callable = silu,
        use_bias: bool = True,
        *,
        init: Initializer = xavier_uniform,
        residual_init: Initializer | None = None,
        key: PRNGKeyArray | None = None,
    ):
        check_size(d_model=d_model, d_ff=d_ff)
        check_flag(use_bias=use_bias)
        gate_key, up_key, down_key = split_key(check_key(key), 3)
        self.w_gate = init(gate_key, (d_model, d_ff), d_model, d_ff)
        self.w_up = init(up_key, (d_model, d_ff), d_model, d_ff)
        self.w_down = (residual_init or init)(down_key, (d_ff, d_model), d_ff, d_model)
        self.b_gate = jnp.zeros(d_ff, jnp.float32) if use_bias else None
        self.b_up = jnp.zeros(d_ff, jnp.float32) if use_bias else None
        self.b_down = jnp.zeros(d_model, jnp.float32) if use_bias else None
        self.activation = activation

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        gate, up = contract_each(x, (self.w_gate, self.b_gate), (self.w_up, self.b_up))
        hidden = self.activation(gate) * up
        return contract(site(hidden, "activations"), self.w_down, self.b_down)


class Dense(eqx.Module):
    """A linear map, then an activation and a norm if there are any.

    It serves between a stack and a head (BERT's pooler and masked-LM transform), and between token
    vectors of one width and a stack of another (OPT, ALBERT).

    Arguments:
        d_in: width of the input.
        d_out: width of the output.
        activation: an elementwise function or module; None is the identity.
        norm: constructor of the norm, called `norm(d_out)`; None is no norm.
        use_bias: whether the map has a bias.
        init: how the weights are drawn.
        key: PRNG key, required.

    Example:
        >>> Dense(64, 32, jnp.tanh, key=jax.random.key(0))(jnp.ones((2, 10, 64))).shape
        (2, 10, 32)
    """

    w: Float[Weight, "i o"]
    b: Float[Array, " o"] | None
    activation: Callable | None
    norm: Annotated[Callable | None, Letters(d="o")]

    def __init__(
        self,
        d_in: int,
        d_out: int,
        activation: Callable | None = None,
        norm: Callable | None = None,
        use_bias: bool = True,
        *,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray | None = None,
    ):
        check_size(d_in=d_in, d_out=d_out)
        check_flag(use_bias=use_bias)
        self.w = init(check_key(key), (d_in, d_out), d_in, d_out)
        self.b = jnp.zeros(d_out, jnp.float32) if use_bias else None
        self.activation = None if activation is None else as_module(activation)
        self.norm = None if norm is None else as_module(construct("norm", norm, {"d_out": d_out}))

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        y = contract(x, self.w, self.b)
        y = y if self.activation is None else self.activation(y)
        return y if self.norm is None else self.norm(y)
