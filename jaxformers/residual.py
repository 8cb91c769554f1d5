"""The residual stream: the sum that runs through a stack, and how sublayers are joined to it.

A layer reads from the stream, computes, and writes back. A *joint* is the object that reads and
writes, so it decides where the norms are. Each sublayer has one:

    y = attention(joint.read(x))
    x = joint.write(x, y, key)
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformers.checks import check_accepts, check_choice, check_positive, check_rate
from jaxformers.layers import as_module, construct, dropout
from jaxformers.precision import scaled
from jaxformers.sites import site

Stream = Float[Array, "*b t d"]


@runtime_checkable
class Joint(Protocol):
    """An object that joins one sublayer to the residual stream.

    The joints of this library are `PreNorm`, `PostNorm`, `Sandwich`, `OutputNorm` and `NoNorm`. You
    can pass a class of your own as `norm_placement=`. It is called with three arguments for each
    sublayer: the constructor of norms, the width of the stream, and the `Addition` to the stream.

    Example:
        LayerScale (Touvron et al. 2021) multiplies each feature of the output by a weight.

        >>> class LayerScale(eqx.Module):
        ...     norm: LayerNorm
        ...     gain: jax.Array
        ...     add: Addition
        ...
        ...     def __init__(self, norm, d_model, add):
        ...         self.norm, self.gain, self.add = norm(d_model), jnp.full(d_model, 0.1), add
        ...
        ...     def read(self, x):
        ...         return self.norm(x)
        ...
        ...     def write(self, x, y, key):
        ...         return self.add(x, self.gain * y, key)
        >>> layer = EncoderLayer(16, 2, 32, norm_placement=LayerScale, key=key)
    """

    def read(self, x: Stream) -> Stream:
        """Returns the input of the sublayer."""
        ...

    def write(self, x: Stream, y: Stream, key: PRNGKeyArray | None) -> Stream:
        """Returns the stream `x` after the sublayer's output `y` was added."""
        ...


class Addition(eqx.Module):
    """The sum in a joint: `x + dropout(scale * y)`.

    Arguments:
        dropout_rate: dropout on the output `y` of the sublayer.
        scale: factor on the output of the sublayer.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> Addition(dropout_rate=0.0, scale=0.5)(x, x, None).shape
        (2, 5, 16)
    """

    dropout_rate: float = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(self, dropout_rate: float = 0.1, scale: float = 1.0):
        check_rate(dropout_rate=dropout_rate)
        check_positive(residual_scale=scale)
        self.dropout_rate, self.scale = float(dropout_rate), float(scale)

    def __call__(self, x: Stream, y: Stream, key: PRNGKeyArray | None) -> Stream:
        return x + dropout(scaled(y, self.scale), self.dropout_rate, key)


class PreNorm(eqx.Module):
    """A joint with the norm before the sublayer: `x + sublayer(norm(x))`.

    Such layers train without warmup at any depth (Xiong et al. 2020). The arguments are those of
    every `Joint`.

    Example:
        >>> layer = EncoderLayer(16, 2, 32, norm_placement=PreNorm, key=key)
    """

    norm: Callable
    add: Addition
    placement: ClassVar[str] = "pre"

    def __init__(self, norm: Callable, d_model: int, add: Addition):
        self.norm, self.add = build_norm(norm, d_model), add

    def read(self, x: Stream) -> Stream:
        return self.norm(x)

    def write(self, x: Stream, y: Stream, key: PRNGKeyArray | None) -> Stream:
        return self.add(x, y, key)


class PostNorm(eqx.Module):
    """A joint with the norm after the sum: `norm(x + sublayer(x))`.

    The first Transformer has it (Vaswani et al. 2017, section 3.1). The arguments are those of
    every `Joint`.

    Example:
        >>> layer = EncoderLayer(16, 2, 32, norm_placement=PostNorm, key=key)
    """

    norm: Callable
    add: Addition
    placement: ClassVar[str] = "post"

    def __init__(self, norm: Callable, d_model: int, add: Addition):
        self.norm, self.add = build_norm(norm, d_model), add

    def read(self, x: Stream) -> Stream:
        return x

    def write(self, x: Stream, y: Stream, key: PRNGKeyArray | None) -> Stream:
        return self.norm(self.add(x, y, key))


class Sandwich(eqx.Module):
    """A joint with norms on both sides of the sublayer: `x + output_norm(sublayer(norm(x)))`.

    CogView (Ding et al. 2021) and Gemma 2 (2024) have it. The arguments are those of every `Joint`.

    Example:
        >>> layer = EncoderLayer(16, 2, 32, norm_placement=Sandwich, key=key)
    """

    norm: Callable
    output_norm: Callable
    add: Addition
    placement: ClassVar[str] = "sandwich"

    def __init__(self, norm: Callable, d_model: int, add: Addition):
        self.norm, self.add = build_norm(norm, d_model), add
        self.output_norm = build_norm(norm, d_model)

    def read(self, x: Stream) -> Stream:
        return self.norm(x)

    def write(self, x: Stream, y: Stream, key: PRNGKeyArray | None) -> Stream:
        return self.add(x, self.output_norm(y), key)


class OutputNorm(eqx.Module):
    """A joint with the norm on the output of the sublayer: `x + output_norm(sublayer(x))`.

    Swin Transformer V2 (Liu et al. 2022) and OLMo 2 (2025) have it. The arguments are those of
    every `Joint`.

    Example:
        >>> layer = EncoderLayer(16, 2, 32, norm_placement=OutputNorm, key=key)
    """

    output_norm: Callable
    add: Addition
    placement: ClassVar[str] = "output"

    def __init__(self, norm: Callable, d_model: int, add: Addition):
        self.output_norm, self.add = build_norm(norm, d_model), add

    def read(self, x: Stream) -> Stream:
        return x

    def write(self, x: Stream, y: Stream, key: PRNGKeyArray | None) -> Stream:
        return self.add(x, self.output_norm(y), key)


class NoNorm(eqx.Module):
    """A joint without a norm: `x + sublayer(x)` (He et al. 2016).

    The arguments are those of every `Joint`; the first two have no effect.

    Example:
        >>> layer = EncoderLayer(16, 2, 32, norm_placement=NoNorm, key=key)
    """

    add: Addition
    placement: ClassVar[str] = "none"

    def __init__(self, norm: Callable, d_model: int, add: Addition):
        self.add = add

    def read(self, x: Stream) -> Stream:
        return x

    def write(self, x: Stream, y: Stream, key: PRNGKeyArray | None) -> Stream:
        return self.add(x, y, key)


# The short forms of `norm_placement=`.
PLACEMENTS = {x.placement: x for x in (PreNorm, PostNorm, Sandwich, OutputNorm, NoNorm)}


def as_placement(placement: Any) -> Callable[..., Joint]:
    """Returns the constructor of joints that was passed as `norm_placement`, or by its short form.

    Raises:
        ValueError: if it is no short form and cannot be called like a constructor of joints.
    """
    if isinstance(placement, Joint) and not isinstance(placement, type):
        kind = type(placement).__name__
        raise ValueError(
            "norm_placement must be a constructor, which is called for each sublayer, got an "
            f"instance of {kind}, which is built already. Pass norm_placement={kind}."
        )
    if callable(placement):
        check_accepts("norm_placement", placement, ["norm", "d_model", "add"])
        return placement
    check_choice(tuple(PLACEMENTS), norm_placement=placement)
    return PLACEMENTS[placement]


def build_norm(norm: Callable, d_model: int) -> Callable:
    """Returns a norm of the residual stream as a module."""
    return as_module(construct("norm", norm, {"d_model": d_model}))


def Residual(
    norm: Callable,
    d_model: int,
    dropout_rate: float = 0.1,
    placement: str | Callable[..., Joint] = "pre",
    scale: float = 1.0,
) -> Joint:
    """Returns the joint of one sublayer to the residual stream.

    Arguments:
        norm: constructor of the norms, called `norm(d_model)`.
        d_model: width of the stream.
        dropout_rate: dropout on the output of the sublayer.
        placement: `PreNorm`, `PostNorm`, `Sandwich`, `OutputNorm`, `NoNorm`, or a class of your
            own (see `Joint`). The short forms are "pre", "post", "sandwich", "output", "none".
        scale: factor on the output of the sublayer.

    Raises:
        ValueError: if the placement is another, or a number is out of range.

    Example:
        >>> residual = Residual(LayerNorm, 16, placement="sandwich")
        >>> x = residual.write(x, feed_forward(residual.read(x)), key)
    """
    joint = as_placement(placement)(norm, d_model, Addition(dropout_rate, scale))
    if not isinstance(joint, Joint):
        raise ValueError(
            "norm_placement must return an object with the methods read(x) and write(x, y, key), "
            f"got {joint!r:.80}. See PreNorm."
        )
    return joint


def write(joint: Joint, x: Stream, y: Stream, key: PRNGKeyArray | None) -> Stream:
    """Returns the stream after the joint wrote the sublayer's output `y`, which is a site."""
    return joint.write(x, site(y, "sublayer_output"), key)


@runtime_checkable
class Parallel(Protocol):
    """An object that places the feed-forward beside attention, as `OneNorm` and `TwoNorms` do."""

    @property
    def placement(self) -> Callable[..., Joint]:
        """Returns the constructor of the feed-forward's joint."""
        ...

    def source(self, x: Stream, seen: Stream) -> Stream:
        """Returns what the feed-forward's joint reads.

        Arguments:
            x: the stream before the layer.
            seen: the input of attention, which attention's joint has read from `x`.
        """
        ...


class OneNorm(eqx.Module):
    """A feed-forward beside attention, behind the same norm.

    The layer is `x + attention(norm(x)) + feed_forward(norm(x))` (GPT-J, Wang and Komatsuzaki
    2021; PaLM, Chowdhery et al. 2022, section 2).

    Example:
        >>> layer = EncoderLayer(16, 2, 32, parallel=OneNorm(), key=key)
    """

    parallel: ClassVar[str] = "one norm"
    placement: ClassVar[Callable[..., Joint]] = NoNorm

    def source(self, x: Stream, seen: Stream) -> Stream:
        return seen


class TwoNorms(eqx.Module):
    """A feed-forward beside attention, behind a norm of its own.

    The layer is `x + attention(norm(x)) + feed_forward(norm'(x))` (GPT-NeoX, Black et al. 2022,
    section 2.1).

    Example:
        >>> layer = EncoderLayer(16, 2, 32, parallel=TwoNorms(), key=key)
    """

    parallel: ClassVar[str] = "two norms"
    placement: ClassVar[Callable[..., Joint]] = PreNorm

    def source(self, x: Stream, seen: Stream) -> Stream:
        return x


# The short forms of `parallel=`.
PARALLELS: dict[str, Parallel] = {x.parallel: x() for x in (OneNorm, TwoNorms)}


def as_parallel(parallel: Any) -> Parallel | None:
    """Returns the object that was passed as `parallel`, or by its short form.

    Raises:
        ValueError: if it is no short form and no such object.
    """
    if parallel is None or isinstance(parallel, Parallel) and not isinstance(parallel, type):
        return parallel
    if isinstance(parallel, type):
        raise ValueError(
            f"parallel must be an object, got the class {parallel.__name__}. "
            f"Pass parallel={parallel.__name__}()."
        )
    check_choice(tuple(PARALLELS), parallel=parallel)
    return PARALLELS[parallel]
