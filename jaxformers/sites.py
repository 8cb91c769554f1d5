"""Sites: the names of the values that flow through a model.

The modules of this package name these values with `site`, which gives the value back. Whoever
keeps, reads or changes values in the middle of a model refers to them by name: `rematerialize`,
and `trace` and `patch` of `jaxformers.inspect`. No module knows of any of that.

The path of a site is that of the part of the model that has it, and its name: the queries of layer
3 are `decoder.layers.3.self_attention.queries`. `scope` says which part it is. Profiles show the
same names. Neither names nor scopes add an operation to the compiled program.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, PyTree, Shaped

# The sites inside a layer, which a gradient may keep or compute again. `attention.py` explains the
# letters.
LAYER_SITES = {
    "queries": "the queries (b, n, t, h), normed, rotated and scaled",
    "keys": "the keys (b, g, s, h) of the new tokens, normed and rotated",
    "values": "the values (b, g, s, h) of the new tokens",
    "scores": "the scores (b, n, t, s) of plain attention, the lowest number where hidden",
    "pattern": "the weights (b, n, t, s) of plain attention, after dropout",
    "head_outputs": "the values that each head has gathered (b, n, t, h)",
    "activations": "the activations (b, t, f) between the maps of a feed-forward",
    "sublayer_output": "the output (b, t, d) of attention or a feed-forward",
    "residual_between": "the residual stream (b, t, d) after self-attention",
    "residual_between_2": "the residual stream (b, t, d) after cross-attention",
    "residual_after": "the residual stream (b, t, d) after a layer",
}

SITES = LAYER_SITES | {
    "embedded": "the embedded tokens (b, t, d), which enter a stack",
    "residual_before": "the residual stream (b, t, d) before a layer",
    "hidden": "the output (b, t, d) of a stack, after its norm",
    "logits": "the logits (b, t, v) in float32",
}

# From the names of sites in files of earlier versions to the names that they have now.
RENAMED = {
    "residual": ("residual_between", "residual_between_2", "residual_after"),
    "attention_weights": ("pattern",),
    "feed_forward": ("activations",),
}


class Watched:
    """The mark of a field of a model in which values are replaced: calls then add no padding."""


def is_watched(model: Any) -> bool:
    """Returns whether values of a model are replaced. Of a tuple, the model is its first part."""
    first = model[0] if isinstance(model, tuple) else model
    return any(isinstance(part, Watched) for part in getattr(first, "__dict__", {}).values())


class Turn(NamedTuple):
    """Which layer of a scan runs: its number, which is traced, and how many layers there are."""

    layer: Array
    number: int
    depth: int  # the place of "layers" in the path


@runtime_checkable
class Watcher(Protocol):
    """Whoever sees the values of a model while its program is traced."""

    def see(self, path: str, turn: Turn | None, x: Array) -> Array:
        """Returns what takes the place of the value at a path.

        Arguments:
            path: the path of the site. The layers of a scan share "layers.*".
            turn: which of them it is, None outside of a scan.
            x: the value.
        """
        ...

    def asks(self, name: str) -> bool:
        """Returns whether it asks for sites of this name."""
        ...


def paths_of(path: str, turn: Turn | None) -> list[str]:
    """Returns the paths for which one value stands: those of all layers in a scan.

    Example:
        >>> paths_of("decoder.layers.*.hidden", Turn(None, 2, 1))
        ['decoder.layers.0.hidden', 'decoder.layers.1.hidden']
    """
    return [path] if turn is None else [path.replace("*", str(i)) for i in range(turn.number)]


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Returns whether a path matches one of some patterns, which are as for `fnmatch`.

    Example:
        >>> matches("decoder.layers.0.self_attention.queries", ["*.keys", "*.queries"])
        True
    """
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def can_match(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether a path that ends with this name may match one of some patterns.

    Example:
        >>> can_match("scores", ["decoder*"]), can_match("scores", ["*.pattern"])
        (True, False)
    """
    # The end of a pattern, from any place on, must match: "*" and "?" may stand for dots.
    return any(
        fnmatchcase(f".{name}", pattern[i:]) or pattern == name
        for pattern in patterns
        for i in range(len(pattern))
    )


class Recorder:
    """A watcher that keeps the values of the sites whose paths match one of some patterns.

    Arguments:
        patterns: as for `fnmatch`, such as "*.queries".
    """

    def __init__(self, patterns: Sequence[str]):
        self._patterns = patterns
        self.found: dict[str, Array] = {}
        self.reached: dict[str, None] = {}  # all paths in their order

    def see(self, path: str, turn: Turn | None, x: Array) -> Array:
        self.reached[path] = None
        if any(map(self.wants, paths_of(path, turn))):
            self.found[path] = x
        return x

    def asks(self, name: str) -> bool:
        return can_match(name, self._patterns)

    def wants(self, path: str) -> bool:
        """Returns whether the value at a path is kept."""
        return matches(path, self._patterns)


# Functions that are compiled inside of a model are compiled anew for each part and each watching,
# since their programs have what the watchers put there.
_program = jax.make_user_context(default_value=None)
_numbers = itertools.count()
_watching: ContextVar[int | None] = ContextVar("watching", default=None)
_path: ContextVar[tuple[str, ...]] = ContextVar("path", default=())
_turn: ContextVar[Turn | None] = ContextVar("turn", default=None)
_watchers: ContextVar[tuple[Any, ...]] = ContextVar("watchers", default=())


def site(x: Shaped[Array, "..."], name: str) -> Shaped[Array, "..."]:
    """Returns `x` itself, which is the site `name` of the program from here on.

    Raises:
        ValueError: if there is no such name in `SITES`.

    Example:
        >>> site(jnp.ones((2, 8, 10, 4)), "queries").shape
        (2, 8, 10, 4)
    """
    if name not in SITES:
        raise ValueError(f"a site must be one of {', '.join(SITES)}, got {name!r}.")
    turn, path = _turn.get(), [*_path.get(), name]
    if turn is not None:
        path.insert(turn.depth + 1, "*")
    for watcher in _watchers.get():
        x = watcher.see(".".join(path), turn, x)
    return checkpoint_name(x, name)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Opens a part of a model by its field's name, a context or a decorator."""
    token = _path.set((*_path.get(), name))
    try:
        with jax.named_scope(name), _own_program():
            yield
    finally:
        _path.reset(token)


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Shows the values of the models that are traced in this context to a watcher.

    A model must be traced within it. A function that was compiled before is not traced again.
    """
    token, number = _watchers.set((watcher, *_watchers.get())), _watching.set(next(_numbers))
    try:
        with _own_program():
            yield
    finally:
        _watchers.reset(token)
        _watching.reset(number)


def _own_program() -> contextlib.AbstractContextManager:
    """Opens a context in which JAX uses no program of another part or watching."""
    if not _watchers.get():
        return contextlib.nullcontext()
    return _program((_watching.get(), _path.get()))


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Hides the sites of a part whose values are not those of tokens from watchers."""
    token = _watchers.set(())
    try:
        with _program(None):
            yield
    finally:
        _watchers.reset(token)


def is_recording() -> bool:
    """Returns whether values leave the model, which they cannot from within a gradient's rule."""
    return any(isinstance(watcher, Recorder) for watcher in _watchers.get())


def is_watched_now() -> bool:
    """Returns whether values are read or replaced while the program is traced."""
    return bool(_watchers.get())


def is_asked_for(*names: str) -> bool:
    """Returns whether a watcher asks for sites of one of these names."""
    return any(watcher.asks(name) for watcher in _watchers.get() for name in names)


def scan(body: Callable, x: Array, xs: PyTree) -> tuple[Array, Any]:
    """Returns `lax.scan(body, x, xs)`, whose turns are layers.

    The body opens the scope "layers". To watchers its sites are those of "layers.0" and so on.
    """
    if not _watchers.get():
        return lax.scan(body, x, xs)
    number, depth = len(jax.tree.leaves(xs)[0]), len(_path.get())
    recorders = [watcher for watcher in _watchers.get() if isinstance(watcher, Recorder)]
    outside = [(recorder.found, recorder.reached) for recorder in recorders]

    def turn(x: Array, inputs: Any) -> tuple[Array, Any]:
        token = _turn.set(Turn(inputs[0], number, depth))
        for recorder in recorders:
            recorder.found, recorder.reached = {}, {}
        try:
            x, y = body(x, inputs[1])
            return x, (y, [recorder.found for recorder in recorders])
        finally:
            _turn.reset(token)

    x, (y, stacked) = lax.scan(turn, x, (jnp.arange(number), xs))
    for recorder, (found, reached), inside in zip(recorders, outside, stacked, strict=True):
        for i in range(number):
            here = {path: path.replace("*", str(i)) for path in recorder.reached}
            reached |= dict.fromkeys(here.values())
            found |= {here[x]: inside[x][i] for x in inside if recorder.wants(here[x])}
        recorder.found, recorder.reached = found, reached
    return x, y
