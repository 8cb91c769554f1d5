"""Checks of arguments. Each error names the expected value, the given value and a remedy.

JAX clamps silently: an id beyond the vocabulary reads the last row of the table. So every argument
of a user is checked here once. Shapes and types are checked under `jit` too; values are checked
where they are known.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Int, PRNGKeyArray

from jaxformers.elsewhere import OPTIONS, Names
from jaxformers.ids import as_ids
from jaxformers.paths import path_name

P = ParamSpec("P")
R = TypeVar("R")


class OptionError(ValueError, TypeError):
    """The error for an option that does not exist, for which Python raises a `TypeError`."""


def is_known(x: Any) -> bool:
    """Returns whether the values of `x` are known; under `jit`, `vmap` and `grad` they are not."""
    return not isinstance(x, jax.core.Tracer)


def check_size(**sizes: Any) -> None:
    """Raises `ValueError` unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}.")


def check_flag(**flags: Any) -> None:
    """Raises `ValueError` unless every flag is True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool | np.bool):
            raise ValueError(f"{name} must be True or False, got {flag!r}.")


def check_choice(choices: tuple[str, ...], **values: Any) -> None:
    """Raises `ValueError` unless every value is one of the choices."""
    for name, value in values.items():
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def check_callable(**functions: Any) -> None:
    """Raises `ValueError` unless every value is callable."""
    for name, function in functions.items():
        if not callable(function):
            raise ValueError(f"{name} must be a function or a class to call, got {function!r}.")


def check_accepts(
    name: str, function: Callable, arguments: Sequence[str], options: Sequence[str] = ()
) -> None:
    """Checks that a function takes these arguments by position and these options by keyword.

    Raises:
        ValueError: if it cannot be called like that.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have no signature
        return
    try:
        signature.bind(*arguments, **dict.fromkeys(options))
    except TypeError as error:
        call = ", ".join([*arguments, *(f"{option}=..." for option in options)])
        raise ValueError(
            f"{name} must be a function that can be called as {name}({call}), got "
            f"{getattr(function, '__name__', function)!s:.80}{signature}: {error}."
        ) from None


def check_rate(**rates: Any) -> None:
    """Raises `ValueError` unless every rate is a number in [0, 1)."""
    for name, rate in rates.items():
        if not (_is_number(rate) and 0 <= rate < 1):
            raise ValueError(f"{name} must be a number in [0, 1), got {rate!r}.")


def check_positive(**values: Any) -> None:
    """Raises `ValueError` unless every value is a finite number above 0."""
    for name, value in values.items():
        if not (_is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}.")


def check_nonnegative(**values: Any) -> None:
    """Raises `ValueError` unless every value is a finite number of at least 0."""
    for name, value in values.items():
        if not (_is_number(value) and 0 <= value < math.inf):
            raise ValueError(
                f"{name} must be a finite number of at least 0, got {value!r}. "
                "Pass a plain Python number."
            )


def check_options(
    given: Iterable[str],
    known: Iterable[str],
    where: str,
    elsewhere: Names = OPTIONS,
    kind: str = "option",
    advice: str = "",
) -> None:
    """Raises `OptionError` for the names in `given` that are not in `known`.

    Arguments:
        given: the names that were given.
        known: the names that exist.
        where: the owner of the names, for the error.
        elsewhere: a table of `jaxformers.elsewhere`.
        kind: the kind of thing that the names denote, for the error.
        advice: a further sentence for the error.
    """
    known = sorted(known)
    unknown = [str(name) for name in given if name not in known]
    if not unknown:
        return
    meant = {name: _meant(name, known, elsewhere) for name in unknown}
    hints = [f"{here!r} for {name!r}" for name, here in meant.items() if here]
    if len(unknown) == 1:
        hints = [repr(here) for here in meant.values() if here]
    hint = f" Did you mean {', '.join(hints)}?" if hints else ""
    raise OptionError(
        f"{where} has no {kind} {', '.join(map(repr, unknown))}.{hint}{advice and ' '}{advice} Its "
        f"{kind}s are: {', '.join(known)}."
    )


def _meant(name: str, known: list[str], elsewhere: Names) -> str | None:
    """Returns the known name for a name of another library or a misspelled name, or None."""
    meant = {
        there: next((x for x in here if x in known), None) for there, here in elsewhere.items()
    }
    meant |= {x: x for x in known}
    if name not in meant:
        # Other libraries have many names: only a very close match counts as a misspelling of one.
        there = [x for x, here in meant.items() if here and x not in known]
        near = difflib.get_close_matches(name, there, n=1, cutoff=0.8)
        close = difflib.get_close_matches(name, [*known, *near], n=1)
        name = close[0] if close else name
    return meant.get(name)


def explain_options(function: Callable[P, R], elsewhere: Names = OPTIONS) -> Callable[P, R]:
    """Returns a decorated function, whose error for an unknown argument suggests a known one."""
    known = set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:  # **options: Unpack[Options]
            (options,) = get_args(parameter.annotation)
            known |= options.__annotations__.keys()
        elif name != "self":
            known.add(name)

    @functools.wraps(function)
    def explained(*args: P.args, **kwargs: P.kwargs) -> R:
        if not kwargs.keys() <= known:
            check_options(kwargs, known, function.__qualname__, elsewhere)
        # From Python 3.12 on, the function can free an argument that has no other reference.
        held = [args]
        del args
        return function(*held.pop(), **kwargs)

    return explained


def check_key(
    key: Any, purpose: str = "(for weights when building, for dropout in a call)"
) -> PRNGKeyArray:
    """Returns the PRNG key itself, or raises `ValueError` for any other value."""
    ok = isinstance(key, jax.Array) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.ndim == 0
        else key.shape == (2,) and key.dtype == jnp.uint32
    )
    if not ok:
        raise ValueError(
            f"key must be a JAX PRNG key, got {_describe(key)}. "
            "Pass key=jax.random.key(0), or one part of jax.random.split(key)."
        )
    return key


def check_tokens(tokens: Any, vocab_size: int, name: str = "tokens") -> Int[Array, "..."]:
    """Returns `tokens` as an int32 array, `(t,)` or `(b, t)`, with ids in `[0, vocab_size)`.

    Raises:
        ValueError: if they have another type or shape, are empty, or are outside the vocabulary.
    """
    tokens = as_ids(tokens, name)
    if tokens.ndim not in (1, 2):
        raise ValueError(
            f"{name} must have shape (t,) or (batch, t), got {tokens.shape}. "
            "Add or remove an axis, for instance tokens[None]."
        )
    if 0 in tokens.shape:
        raise ValueError(f"{name} must not be empty, got shape {tokens.shape}.")
    if is_known(tokens):
        low, high = least_and_most(tokens)
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name} must be ids from 0 to {vocab_size - 1} (the vocabulary has {vocab_size}), "
                f"got {low if low < 0 else high}. Mark padding with padding_mask=, not by an id "
                "outside the vocabulary."
            )
    # NumPy arrays are cast in NumPy, because JAX would compile a program for each new shape.
    if isinstance(tokens, np.ndarray):
        return jax.device_put(tokens.astype(np.int32))
    return tokens.astype(jnp.int32)


def least_and_most(x: Any) -> tuple[int, int]:
    """Returns the smallest and the largest integer of an array whose values are known."""
    if getattr(x, "is_fully_addressable", True):
        x = np.asarray(x)  # JAX would compile two programs for each new shape
        return int(x.min()), int(x.max())
    with jax.ensure_compile_time_eval():  # a caller's `jit` would trace them
        return int(x.min()), int(x.max())


def check_seq_length(length: int, max_seq_length: int | None, name: str = "a sequence") -> None:
    """Raises `ValueError` if `length` is above `max_seq_length`; None is no limit."""
    if max_seq_length is not None and length > max_seq_length:
        raise ValueError(
            f"{name} may have at most max_seq_length = {max_seq_length} tokens, got {length}. "
            "Shorten it, build the model with a larger max_seq_length, or use "
            "position=RotaryPositionalEncoding(), which has no limit."
        )


def check_padding_mask(
    padding_mask: ArrayLike | None, shape: tuple[int, ...], name: str = "padding_mask"
) -> Bool[Array, "..."] | None:
    """Returns `padding_mask` as a boolean array of the tokens' shape, or None.

    Raises:
        ValueError: if it has another type or shape.
    """
    if padding_mask is None:
        return None
    if is_known(padding_mask) and not isinstance(padding_mask, jax.Array):
        padding_mask = jax.device_put(np.asarray(padding_mask))  # jnp would compile for each shape
    padding_mask = jnp.asarray(padding_mask)
    if padding_mask.dtype != jnp.bool_ or padding_mask.shape != shape:
        raise ValueError(
            f"{name} must be boolean with the tokens' shape {shape}, True where a token is real, "
            f"got {_describe(padding_mask)}. For 0/1 integers write {name} == 1."
        )
    return padding_mask


def check_activations(x: Any, d_model: int, name: str = "x") -> None:
    """Raises `ValueError` unless `x` is a float array, `(t, d_model)` or `(b, t, d_model)`."""
    if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)):
        raise ValueError(f"{name} must be a floating-point array, got {_describe(x)}.")
    if x.ndim not in (2, 3) or x.shape[-1] != d_model or 0 in x.shape:
        raise ValueError(
            f"{name} must have shape (t, {d_model}) or (batch, t, {d_model}) without empty axes, "
            f"got {x.shape}."
        )


def check_same_batch(**arrays: Any) -> None:
    """Raises `ValueError` unless all arrays agree in the axes before that of the sequence."""
    (first, a), *others = ((name, x) for name, x in arrays.items() if x is not None)
    for name, other in others:
        if other.shape[:-2] != a.shape[:-2]:
            raise ValueError(
                f"{first} and {name} must have the same batch axis, got shapes {a.shape} and "
                f"{other.shape}."
            )


def check_usable(**trees: Any) -> None:
    """Raises `ValueError` if an array in one of the trees was donated and so overwritten."""
    if not any(_is_deleted(x) for x in jax.tree.leaves(trees)):
        return
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    place = next(path_name(path) for path, x in leaves if _is_deleted(x))
    raise ValueError(
        f"{place} was donated to an earlier step, which wrote its result over it: use the model "
        "and the state that the step returned. fit leaves the model that it is given as it is; "
        "give train_step a copy if the old one is needed: "
        "jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, model)."
    )


def _is_deleted(x: Any) -> bool:
    return isinstance(x, jax.Array) and is_known(x) and x.is_deleted()


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.number) and not isinstance(x, bool)


def _describe(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array of dtype {x.dtype} and shape {x.shape}"
    return repr(x)
