"""Groups of leaves, each with an optimizer of its own or frozen."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from jaxformers.checks import check_callable, check_positive
from jaxformers.optim.clipping import clip_by_global_norm
from jaxformers.optim.compiled import check_fit, check_state, compiled
from jaxformers.optim.layout import leaf_path
from jaxformers.optim.optimizer import Model, Optimizer, as_optimizer
from jaxformers.paths import path_name, some_of
from jaxformers.trainability import trainable

Predicate = Callable[[str, Any], Any]


class Groups(Optimizer):
    """An optimizer that trains each group of leaves by another optimizer, or freezes it.

    Frozen leaves need no gradients in `train_step` and no moments.

    Arguments:
        groups: pairs of a predicate and an optimizer. The optimizer is an `Optimizer`, an optax
            transformation, or None, which freezes the group. A predicate is a function
            `(path, array) -> bool`. It gets paths such as "decoder.layers.0.self_attention.wq", and
            arrays of which it may read shape and dtype. A leaf belongs to the first group whose
            predicate holds.
        rest: the optimizer of all other leaves. None freezes them.
        max_grad_norm: norm over all groups to which gradients are clipped before the update. None,
            the default, does not clip. The limit of a group's optimizer applies to that group
            alone.

    Raises:
        ValueError: if a predicate is no function or an optimizer is no optimizer. `init` raises it
            if a group has no leaf, or if all leaves are frozen.

    Example:
        >>> def is_norm(path, array):
        ...     return path.endswith("gain")
        >>> slow_norms = Groups([(is_norm, AdamW(1e-4))], rest=AdamW(1e-3), max_grad_norm=1.0)
        >>> state = slow_norms.init(model)
        >>> print(slow_norms.rate(state))
        0.001
    """

    predicates: tuple[Predicate, ...]
    optimizers: tuple[Optimizer | None, ...]  # those of the groups, then that of the rest
    max_grad_norm: float | None

    def __init__(
        self,
        groups: Sequence[Any],
        rest: Any,
        max_grad_norm: float | None = None,
    ):
        if not all(isinstance(group, tuple | list) and len(group) == 2 for group in groups):
            raise ValueError(
                f"groups must be pairs (predicate, optimizer or None), got {groups!r}."
            )
        self.predicates = tuple(predicate for predicate, _ in groups)
        check_callable(**{f"predicate {i}": p for i, p in enumerate(self.predicates)})
        optimizers = (*(optimizer for _, optimizer in groups), rest)
        self.optimizers = tuple(None if x is None else as_optimizer(x) for x in optimizers)
        self.max_grad_norm = max_grad_norm
        if max_grad_norm is not None:
            check_positive(max_grad_norm=max_grad_norm)

    def init(self, model: PyTree) -> tuple[PyTree, ...]:
        """Returns the states of the groups and of the rest, None for frozen ones."""
        self._check_groups(model)
        parts = self._split(model, model)
        return tuple(
            None if optimizer is None else optimizer.init(part)
            for optimizer, part in zip(self.optimizers, parts, strict=True)
        )

    @compiled
    def update(
        self, grads: PyTree, state: PyTree, model: Model, **extra: Any
    ) -> tuple[Model, tuple[PyTree, ...]]:
        """Returns the model and the states after one update; ignores gradients of frozen leaves."""
        for name in extra:
            if not self.takes(name):
                raise TypeError(f"none of the optimizers takes {name}=.")
        check_state(state, tuple, len(self.optimizers))
        check_fit(model, grads=grads)
        grads = eqx.filter(grads, self.trains(model))
        if self.max_grad_norm is not None:
            grads, _ = clip_by_global_norm(grads, self.max_grad_norm)
        parts = list(self._split(model, model))
        states = list(state)
        for i, (optimizer, part_grads) in enumerate(
            zip(self.optimizers, self._split(grads, model), strict=True)
        ):
            if optimizer is not None:
                taken = {name: x for name, x in extra.items() if optimizer.takes(name)}
                parts[i], states[i] = optimizer.update(part_grads, states[i], parts[i], **taken)
        return eqx.combine(*parts, model), tuple(states)

    def takes(self, name: str) -> bool:
        """Returns whether one of the optimizers takes an argument of this name."""
        return any(x is not None and x.takes(name) for x in self.optimizers)

    def trains(self, model: PyTree) -> PyTree[bool]:
        """Returns the model's tree with True for each leaf that its group's optimizer trains."""
        parts = zip(self.optimizers, self._split(model, model), strict=True)
        trained = [optimizer.trains(part) for optimizer, part in parts if optimizer is not None]
        return eqx.combine(*trained, jax.tree.map(lambda _: False, model))

    def rate(self, state: tuple[PyTree, ...]) -> Float[Array, ""] | None:
        """Returns the learning rate of the rest, or else of the last group that has one."""
        pairs = zip(self.optimizers, state, strict=True)
        rates = [optimizer.rate(s) for optimizer, s in pairs if optimizer is not None]
        return next((rate for rate in reversed(rates) if rate is not None), None)

    def averaged(self, model: Model, state: tuple[PyTree, ...]) -> Model:
        """Returns the model with the averages of the groups that keep one."""
        parts = zip(self.optimizers, self._split(model, model), state, strict=True)
        averages = [o.averaged(part, s) for o, part, s in parts if o is not None]
        return eqx.combine(*averages, model)

    def _owners(self, model: PyTree) -> PyTree:
        """Returns the index of the group of each array to train, None for other leaves."""
        return self._groups_of(model, trainable(model))

    def _groups_of(self, model: PyTree, among: PyTree[bool]) -> PyTree:
        """Returns the index of the group of each leaf among those, None for other leaves."""

        def owner(path: tuple, leaf: Any, counts: bool) -> int | None:
            if not counts:
                return None
            seen = leaf_path(model, path), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            holds = (i for i, predicate in enumerate(self.predicates) if predicate(*seen))
            return next(holds, len(self.predicates))

        return jax.tree_util.tree_map_with_path(owner, model, among)

    def _split(self, tree: PyTree, model: PyTree) -> tuple[PyTree, ...]:
        """Returns for each group and the rest a tree with its leaves, and None for the others."""
        owners = self._owners(model)
        return tuple(
            jax.tree.map(lambda _, x, owner, i=i: x if owner == i else None, model, tree, owners)
            for i in range(len(self.optimizers))
        )

    def _check_groups(self, model: PyTree) -> None:
        owners = jax.tree_util.tree_leaves_with_path(self._owners(model))
        floats = self._groups_of(model, jax.tree.map(eqx.is_inexact_array, model))
        taken = {owner for _, owner in owners}
        # What is frozen may be an array that is not trained in any case, as beside adapters.
        taken |= {i for i in jax.tree.leaves(floats) if self.optimizers[i] is None}
        paths = some_of([path_name(path) for path, _ in owners])
        for i, predicate in enumerate(self.predicates):
            if i not in taken:
                raise ValueError(
                    f"predicate {i}, {predicate!r}, holds for no array that an earlier one has not "
                    f"taken. It is called with paths such as {paths}."
                )
        if not any(jax.tree.leaves(self.trains(model))):
            raise ValueError("all arrays are frozen: leave some for an optimizer to train.")


def freeze(optimizer: Any, predicate: Predicate) -> Groups:
    """Returns an optimizer that trains all leaves except those for which the predicate holds.

    Arguments:
        optimizer: an `Optimizer` or an optax transformation.
        predicate: function `(path, array) -> bool`, True for leaves that are frozen.

    Raises:
        ValueError: if the predicate is no function or the optimizer is no optimizer. `init` raises
            it if the predicate holds for no leaf, or for all leaves.

    Example:
        >>> frozen_embedding = freeze(AdamW(1e-3), lambda path, array: "embedding" in path)
        >>> state = frozen_embedding.init(model)
    """
    return Groups([(predicate, None)], optimizer)
