"""The run of a stack's layers, one by one or scanned, and their rematerialization.

A stack holds its layers as a tuple, and each of them is compiled. If the layers are scanned, their
arrays are stacked and one program serves all layers. It compiles as fast as a single layer and runs
somewhat slower.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformers.axes import Stacked
from jaxformers.checks import check_key, is_known
from jaxformers.layers import split_key
from jaxformers.sharding.constraints import divide_rows, gather, gathers
from jaxformers.sharding.mesh import traced_mesh
from jaxformers.sites import LAYER_SITES, RENAMED, is_recording, is_watched_now, scan, scope, site

Model = TypeVar("Model")


class ScannedLayers(eqx.Module):
    """Equal layers as one layer, whose arrays have a leading axis of layers.

    Arguments:
        layers: layers that differ only in the numbers of their arrays.

    Raises:
        ValueError: if they differ in another way.
    """

    stacked: Annotated[Any, Stacked("l")]

    def __init__(self, layers: Sequence[Any]):
        for i, layer in enumerate(layers):
            difference = _difference(layers[0], layer)
            if difference:
                raise ValueError(
                    "layers that are scanned must be equal in all but the numbers of their "
                    f"arrays, but of layers 0 and {i} {difference}. Leave these layers a tuple."
                )
        self.stacked = jax.tree.map(lambda *x: jnp.stack(x) if _is_array(x[0]) else x[0], *layers)

    def __len__(self) -> int:
        return next(x for x in jax.tree.leaves(self.stacked) if _is_array(x)).shape[0]

    def __getitem__(self, i: int) -> Any:
        """Returns layer i alone."""
        i = range(len(self))[i]
        return jax.tree.map(
            lambda x: lax.index_in_dim(x, i, keepdims=False) if _is_array(x) else x, self.stacked
        )

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def scan(self, step: Callable, x: Array, key: PRNGKeyArray | None) -> Array:
        """Returns `x` after all layers; `step` is as in `run_layers`."""
        arrays, rest = eqx.partition(self.stacked, _is_array)
        keys = None if key is None else jax.random.split(check_key(key), len(self))

        def body(x, inputs):
            layer, layer_key = inputs
            with scope("layers"):
                return step(eqx.combine(layer, rest), site(x, "residual_before"), layer_key, None)

        return scan(body, x, (arrays, keys))[0]


class Rematerialization(eqx.Module):
    """A policy for the gradient, which keeps the inputs of a layer and the sites with these names.

    The gradient computes all other activations again.

    Arguments:
        keep: names of sites.
    """

    keep: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, step: Callable) -> Callable:
        """Returns a step, as in `run_layers`, whose gradient computes the rest again."""
        keep = (new for name in self.keep for new in RENAMED.get(name, (name,)))
        policy = jax.checkpoint_policies.save_only_these_names(*keep)

        def rematerialized(*inputs):
            again = _checkpointed(step, policy, inputs)
            if traced_mesh(inputs[1]) is not None:  # what is late on one device is a barrier here
                return again(*inputs)
            return _recomputed_late((again, inputs))

        return rematerialized


def _checkpointed(step: Callable, policy: Callable, inputs: tuple) -> Callable:
    # Arrays that the step closes over, such as an encoder's output, have gradients as well.
    closed = eqx.filter_closure_convert(step, *inputs)
    return eqx.filter_checkpoint(closed, policy=policy, prevent_cse=False)


# What makes another form of a weight out of it, none of which the gradient shall keep.
_FORMS = "sharding_constraint", "reshape", "transpose", "convert_element_type", "name"


def _on_mesh(step: Callable, again: bool) -> Callable:
    """Returns a step, as in `run_layers`, for layers on a mesh; on one device it is the same.

    Arguments:
        step: the step.
        again: whether the gradient gathers the weights of a layer again. Otherwise the gathered
            weights of all layers would be kept, which is the memory that "fsdp" shall save.
    """

    def on_mesh(layer, x, key, cache):
        if traced_mesh(x) is None:
            return step(layer, x, key, cache)
        return step(gather(layer), divide_rows(x), key, cache)

    def gathered_again(*inputs):
        if not gathers(inputs[1]):
            return on_mesh(*inputs)

        def policy(primitive, *_, **__):
            return primitive.name not in _FORMS

        return _checkpointed(on_mesh, policy, inputs)(*inputs)

    return gathered_again if again else on_mesh


@eqx.filter_custom_vjp
def _recomputed_late(step_and_inputs):
    """Runs a checkpointed step that is computed again only when its gradient is due.

    `jax.checkpoint` alone leaves the order to XLA. Its CPU backend computes all layers again early,
    and then needs as much memory as without `jax.checkpoint`. Here the kept arrays depend on the
    gradient: a zero that is computed from the gradient is added to them.
    """
    step, inputs = step_and_inputs
    return step(*inputs)


@_recomputed_late.def_fwd
def _forward(perturbed, step_and_inputs):
    del perturbed
    y, pull = eqx.filter_vjp(lambda both: both[0](*both[1]), step_and_inputs)
    # The zero is not added to the weights, because the addition would copy them.
    weights = {id(x) for x in jax.tree.leaves(step_and_inputs[1][0])}
    return y, eqx.partition(pull, lambda x: eqx.is_inexact_array(x) and id(x) not in weights)


@_recomputed_late.def_bwd
def _backward(kept_and_rest, gradient, perturbed, step_and_inputs):
    del perturbed, step_and_inputs
    kept, rest = kept_and_rest
    zero = jnp.minimum(_unknown(gradient[0]), 0)
    kept = jax.tree.map(lambda x: x + zero.astype(x.dtype), kept)
    return eqx.combine(kept, rest)(gradient)[0]


def _materialized(x: Array) -> Array:
    """Returns `x`, and makes XLA's CPU backend compute it only once.

    That backend fuses a sum into every operation that reads it. Each layer would then add up the
    outputs of all earlier layers again, and so would its gradient: the work and the size of the
    program would grow with the square of the depth. XLA does not repeat a division in this way. So
    `x` is divided by a number that is always one, which XLA cannot know.
    """
    if jax.default_backend() != "cpu" or traced_mesh(x) is not None:
        return x
    return x / lax.stop_gradient(jnp.maximum(_unknown(x), 1))


def _unknown(x: Array) -> Array:
    """Returns 0 or 1, depending on `x`."""
    return jnp.isnan(jnp.ravel(x)[0]).astype(x.dtype)


def run_layers(
    layers: Sequence[Any] | ScannedLayers,
    step: Callable,
    x: Float[Array, "*b t d"],
    key: PRNGKeyArray | None,
    caches: Sequence[Any] | None = None,
    rematerialization: Rematerialization | None = None,
) -> tuple[Float[Array, "*b t d"], tuple[Any, ...] | None]:
    """Returns `x` after all layers, and the caches of the layers if there are any.

    Arguments:
        layers: a tuple of layers, or `ScannedLayers`.
        step: the function `(layer, x, key, cache) -> (x, cache)` that runs one layer.
        x: the residual stream.
        key: PRNG key for dropout, which is split into one key per layer; None is no dropout.
        caches: one cache per layer; None is no cache.
        rematerialization: the policy for the gradient; None keeps every activation.
    """
    if caches is None and not is_recording():
        scanned = isinstance(layers, ScannedLayers)
        step = _on_mesh(step, again=scanned and rematerialization is None)
        step = step if rematerialization is None else rematerialization(step)
    # A scan would copy all caches at every token.
    if isinstance(layers, ScannedLayers) and caches is None:
        return layers.scan(step, x, key), None
    step = _traced_once(step) if _is_staged(x) else step
    written = []
    for i, (layer, layer_key) in enumerate(zip(layers, split_key(key, len(layers)), strict=True)):
        with scope(f"layers.{i}"):
            cache = None if caches is None else caches[i]
            x, cache = step(layer, site(x, "residual_before"), layer_key, cache)
        x = _materialized(x) if caches is None else x
        written.append(cache)
    return x, None if caches is None else tuple(written)


def _traced_once(step: Callable) -> Callable:
    """Returns a step, as in `run_layers`, that is traced once for all layers of a kind.

    A kind has the same shapes, types and settings. Its layers share one function of the program,
    which XLA writes in place of its calls, so that what runs is the same.
    """

    @jax.jit
    def layer(*inputs):  # profiles show its name
        return step(*inputs)

    def once(*inputs):
        is_whole = all(map(eqx.is_array, jax.tree.leaves(inputs)))
        return (layer if is_whole else step)(*inputs)

    return once


def _is_staged(x: Array) -> bool:
    """Returns whether `x` is a value of a program that is compiled later, and that nobody watches.

    A gradient or a batch outside of `jax.jit` is computed at once, and would compile a function
    within it in each call. Values that are watched could not leave that function.
    """
    if is_known(x) or is_watched_now():
        return False
    return not is_known(lax.full((), 0, jnp.int32))  # constants are known unless compiled later


def scan_layers(model: Model) -> Model:
    """Returns the model with the layers of its stacks scanned, which compiles fast at any depth.

    The results are the same, and a step takes somewhat longer on CPU. Scan the layers before
    `optimizer.init`, because gradients and optimizer states have the structure of the model. A call
    with a cache indexes the layers one by one, which copies the weights at every token: undo the
    scan with `unroll_layers` before you generate.

    Arguments:
        model: a model or a stack, such as `TransformerLM` or `Encoder`.

    Raises:
        ValueError: if layers differ in more than numbers, or the encoder has a `layer_order`.

    Example:
        >>> deep = scan_layers(TransformerLM(65, 64, 4, 48, 256, 128, key=key))
        >>> deep.decoder.layers.stacked.self_attention.wq.shape
        (48, 64, 4, 16)
    """

    def scan(stack):
        if getattr(stack, "layer_order", None) is not None:
            raise ValueError(
                "layers that are scanned run once each, this encoder has the layer_order "
                f"{stack.layer_order}. Leave its layers a tuple."
            )
        if isinstance(stack.layers, ScannedLayers):
            return stack
        return eqx.tree_at(lambda x: x.layers, stack, ScannedLayers(stack.layers))

    return _change_stacks(model, scan)


def unroll_layers(model: Model) -> Model:
    """Returns the model with its layers as a tuple, which undoes `scan_layers` bit for bit.

    Arguments:
        model: a model or a stack; a tuple of layers stays as it is.

    Raises:
        ValueError: if there are no layers.

    Example:
        >>> model = unroll_layers(scan_layers(model))
        >>> model.decoder.layers[0].self_attention.wq.shape
        (16, 2, 8)
    """
    return _change_stacks(
        model, lambda stack: eqx.tree_at(lambda x: x.layers, stack, tuple(stack.layers))
    )


def rematerialize(model: Model, keep: Sequence[str] | None = ()) -> Model:
    """Returns the model with a gradient that keeps few activations and computes the rest again.

    Activations take up most of the memory of training. If only the inputs of each layer are kept,
    the memory is that of the activations of one layer plus one residual stream per layer. The cost
    is one more forward pass (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost).
    Scanned layers can be rematerialized as well. The model then has no forward-mode derivative.

    Arguments:
        model: a model or a stack, such as `TransformerLM` or `Encoder`.
        keep: names of sites that are kept besides, such as "queries" or "head_outputs"; the table
            `LAYER_SITES` of `jaxformers.sites` has all of them. None keeps every activation, which
            undoes the rematerialization.

    Raises:
        ValueError: if there is no such site, or there are no layers.

    Example:
        >>> model = rematerialize(model, keep=("head_outputs",))
        >>> as_it_was = rematerialize(model, keep=None)
    """
    unknown = [] if keep is None else [name for name in keep if name not in LAYER_SITES]
    if isinstance(keep, str) or unknown:
        names = ", ".join(LAYER_SITES)
        raise ValueError(f"keep must be names of sites, {names}, or None for all, got {keep!r}.")
    new = None if keep is None else Rematerialization(tuple(keep))
    return _change_stacks(
        model,
        lambda stack: eqx.tree_at(
            lambda x: x.rematerialization, stack, new, is_leaf=lambda x: x is None
        ),
    )


def has_separate_layers(model: Any) -> bool:
    """Returns whether a stack of a model has several layers that are not scanned."""
    stacks = filter(_is_stack, jax.tree.leaves(model, is_leaf=_is_stack))
    return any(not isinstance(x.layers, ScannedLayers) and len(x.layers) > 1 for x in stacks)


def _is_stack(x: Any) -> bool:
    return hasattr(x, "layers") and hasattr(x, "rematerialization")


def _change_stacks(model: Any, change: Callable) -> Any:
    if not any(map(_is_stack, jax.tree.leaves(model, is_leaf=_is_stack))):
        raise ValueError(
            "expected a model with layers, such as TransformerLM or Encoder, got "
            f"{type(model).__name__}."
        )
    return jax.tree.map(lambda x: change(x) if _is_stack(x) else x, model, is_leaf=_is_stack)


def _difference(a: Any, b: Any, path: str = "") -> str | None:
    """Returns the first difference between two layers in more than numbers, or None."""
    if isinstance(a, eqx.Module) and type(a) is type(b):
        inside = (
            _difference(getattr(a, name), getattr(b, name), f"{path}.{name}")
            for name in (field.name for field in dataclasses.fields(a))
        )
        return next(filter(None, inside), None)
    elif isinstance(a, tuple | list) and type(a) is type(b) and len(a) == len(b):
        inside = (_difference(a[i], b[i], f"{path}[{i}]") for i in range(len(a)))
        return next(filter(None, inside), None)
    elif _is_array(a) and _is_array(b):
        a, b = (f"{x.dtype} of shape {x.shape}" for x in (a, b))
    return None if a == b else f"{path.removeprefix('.')} is {a!r:.80} and {b!r:.80}"


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")
