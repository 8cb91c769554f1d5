"""The small parts: linear maps, dropout and feed-forwards."""

from collections.abc import Callable
from typing import Annotated, Any, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformers.activations import relu, silu
from jaxformers.axes import Letters
from jaxformers.checks import (
    check_accepts,
    check_flag,
    check_key,
    check_size,
)
from jaxformers.initializers import Initializer, xavier_uniform


def linear(
    x: Float[Array, "... i"], w: Float[Array, "i o"], b: Float[Array, " o"] | None = None
) -> Float[Array, "... o"]:
    """`x @ w + b` over all leading axes of `x` at once.

    On three-dimensional activations XLA's CPU backend transposes copies of them before each
    weight gradient, which costs a third of a training step; on flattened ones it does not.
    """
    y = x.reshape(-1, x.shape[-1]) @ w
    y = y if b is None else add(y, b)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def add(x: Float[Array, "*n d"], y: Float[Array, "..."]) -> Float[Array, "*n d"]:
    """`x + y` in the type of `x`; the gradient of a `y` that is spread over rows is a float32 sum.

    (In bfloat16 a sum of ones ends at 256.)
    """
    return (widened(x) + widened(y)).astype(x.dtype)


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` in float32 if it has 16 bits."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


@jax.custom_jvp
def lookup(table: Float[Array, "p d"], rows: Int[Array, "..."]) -> Float[Array, "... d"]:
    """Rows of a table, NaN for one beyond its end; the gradient of a row is summed in float32."""
    return table.at[rows].get(mode="fill", fill_value=jnp.nan)


@lookup.defjvp
def _lookup_jvp(primals, tangents):
    (table, rows), change = primals, tangents[0]
    of_rows = widened(change).at[rows].get(mode="fill", fill_value=0)
    return lookup(table, rows), of_rows.astype(change.dtype)


def scaled(x: Float[Array, "..."], factor: float) -> Float[Array, "..."]:
    """`x` times a number that 16 bits would round."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


@overload
def split_key(key: PRNGKeyArray, num: int) -> list[PRNGKeyArray]: ...
@overload
def split_key(key: PRNGKeyArray | None, num: int) -> list[PRNGKeyArray | None]: ...
def split_key(key, num):
    """`num` keys from one, or `num` Nones from None (no key means inference)."""
    return [None] * num if key is None else list(jax.random.split(check_key(key), num))


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """`x` with each element zeroed with probability `rate` and the rest scaled up to keep the mean.

    Without a key, or at rate 0, `x` itself (Srivastava et al. 2014).
    """
    if key is None or rate == 0.0:
        return x
    # 16 random bits decide as well as 32 and cost half; the kept share is exact, so is the scale.
    dropped = min(round(rate * 2**16), 2**16 - 1)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= np.uint16(dropped)
    return jnp.where(keep, x * (2**16 / (2**16 - dropped)), 0.0)


class Function(eqx.Module):
    """A plain function as a module without arrays, so that all leaves of a model are arrays."""

    function: Callable = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> "Function":
        # Functions compare by identity: a copied one would make the copy another kind of tree.
        return self


def as_module(function: Callable) -> Callable:
    """Modules as they are (they may hold weights), plain functions wrapped in `Function`."""
    if not callable(function) or isinstance(function, type):
        raise ValueError(f"expected a function or a module to call, got {function!r}.")
    return function if isinstance(function, eqx.Module) else Function(function)


def construct(name: str, constructor: Callable, sizes: dict[str, Any], **options: Any) -> Any:
    """Returns what the constructor that was passed as the piece `name` makes.

    Arguments:
        name: the name of the piece, for errors.
        constructor: a class or a function, called `constructor(*sizes, **options)`.
        sizes: what it is called with by position, and the names of these for errors.
        **options: what it is called with by name.

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

    Vaswani et al. 2017, section 3.3.

    Arguments:
        d_model: width of input and output.
        d_ff: width between the maps.
        activation: any elementwise function or module, ReLU as in the paper.
        use_bias: whether both maps have a bias.
        init: how `w_in` is drawn.
        residual_init: how `w_out` is drawn, as `init` unless given.
        key: PRNG key, required.

    Example:
        >>> FeedForward(64, 256, key=jax.random.key(0))(jnp.ones((2, 10, 64))).shape
        (2, 10, 64)
    """

    w_in: Float[Array, "d f"]
    b_in: Float[Array, " f"] | None
    w_out: Float[Array, "f d"]
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
        hidden = self.activation(linear(x, self.w_in, self.b_in))
        return linear(checkpoint_name(hidden, "feed_forward"), self.w_out, self.b_out)


class GatedFeedForward(eqx.Module):
    """One map gates another: `(activation(x w_gate) * (x w_up)) w_down`, SwiGLU by default.

    Shazeer 2020. It has three maps where `FeedForward` has two: at 2/3 of the d_ff both cost the
    same.

    Arguments:
        d_model: width of input and output.
        d_ff: width between the maps.
        activation: applied to the gate, SiLU.
        use_bias: whether the three maps have biases.
        init: how `w_gate` and `w_up` are drawn.
        residual_init: how `w_down` is drawn, as `init` unless given.
        key: PRNG key, required.

    Example:
        >>> GatedFeedForward(64, 160, key=jax.random.key(0))(jnp.ones((2, 10, 64))).shape
        (2, 10, 64)
    """

    w_gate: Float[Array, "d f"]
    b_gate: Float[Array, " f"] | None
    w_up: Float[Array, "d f"]
    b_up: Float[Array, " f"] | None
    w_down: Float[Array, "f d"]
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
        gate = self.activation(linear(x, self.w_gate, self.b_gate))
        hidden = gate * linear(x, self.w_up, self.b_up)
        return linear(checkpoint_name(hidden, "feed_forward"), self.w_down, self.b_down)


class Dense(eqx.Module):
    """A linear map, then an activation, then a norm; each of the last two may be absent.

    What stands between a stack and a head (BERT's pooler and masked-LM transform), or between
    token vectors of one width and a stack of another (OPT, ALBERT).

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

    w: Float[Array, "i o"]
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
        y = linear(x, self.w, self.b)
        y = y if self.activation is None else self.activation(y)
        return y if self.norm is None else self.norm(y)
