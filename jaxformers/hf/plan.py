"""The plan of a checkpoint: which of its tensors make which arrays of a model."""

import re
from collections import Counter
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxformers.axes import axes_of
from jaxformers.files.json_file import shorten
from jaxformers.hf.architecture.build import build
from jaxformers.hf.architecture.record import Architecture
from jaxformers.hf.family import Family
from jaxformers.hf.layouts import Rule, tensor_shapes
from jaxformers.hf.tensors import FileTensors
from jaxformers.paths import path_name
from jaxformers.precision import FLOATS


class WeightPlan:
    """The rules of a family for the arrays of one model."""

    def __init__(self, family: Family, paths: Any, leaves: dict[str, Any], rules: list[Rule]):
        self.family = family
        self.paths = paths  # the model with the path of each array in its place
        self.leaves = leaves
        self.rules = rules
        uses = Counter(path for rule in rules for path in rule.ours)
        self.unnamed = [path for path in leaves if uses[path] != 1]  # the family has no tensor

    @classmethod
    def of(cls, family: Family, model: Any, a: Architecture) -> "WeightPlan":
        """Returns the plan for a model of the architecture `a`."""
        leaves = arrays_by_path(model)
        arrays = eqx.filter(model, is_array)
        axes_by_path = dict(zip(leaves, jax.tree.leaves(axes_of(arrays)), strict=True))
        layers = 1 + max(
            (int(n) for name in leaves for n in re.findall(r"layers\.(\d+)", name)), default=0
        )
        rules = []
        for rule in family.weights:
            if rule.when is not None and not rule.when(a):
                continue
            layered = any("{i}" in name for name in rule.ours)
            for i in range(layers if layered else 1):
                at = rule.at(i)
                axes = tuple(axes_by_path[path] for path in at.ours if path in leaves)
                experts = rule.layout.startswith("experts")
                if len(axes) == len(at.ours) and (not experts or axes[0].apart):
                    rules.append(at.of(axes, leaves[at.ours[0]].shape))
        structure = jax.tree.structure(arrays)
        return cls(family, jax.tree.unflatten(structure, list(leaves)), leaves, rules)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the names of the tensors in the file with their shapes."""
        found: dict[str, tuple[int, ...]] = {}
        for rule in self.rules:
            shapes = tensor_shapes(rule, [self.leaves[path].shape for path in rule.ours])
            found |= dict(zip(rule.theirs, shapes, strict=True))
        return found

    def check(self, stored: FileTensors) -> None:
        """Checks that a file holds these tensors.

        Raises:
            ValueError: with every difference.
        """
        if self.unnamed:
            raise ValueError(
                f"config.json: a {self.family.model_type} has no tensor for "
                f"{', '.join(self.unnamed[:5])}."
            )
        expected = self.shapes()
        here = {name for name in expected if stored.has(name)}
        faults = {
            "missing": sorted(set(expected) - here),
            "surplus": sorted(set(stored.names) - set(expected)),
            "of another shape than config.json says": [
                f"{name} {stored.shape(name)} for {expected[name]}"
                for name in sorted(here)
                if stored.shape(name) != expected[name]
            ],
            f"not of {', '.join(map(str, FLOATS[:-1]))} or {FLOATS[-1]}": [
                f"{name} {stored.dtype(name)}"
                for name in sorted(here)
                if stored.dtype(name) not in FLOATS
            ],
        }
        lines = [
            f"{len(names)} {what}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
            for what, names in faults.items()
            if names
        ]
        if len(lines) == 1 and self._is_output(faults["missing"]):
            lines.append(
                "That is the output layer. For a model that gives hidden states alone, config.json "
                f'names the class without it: "architectures": ["{self.family.classes["base"]}"].'
            )
        if lines and stored.files.lacking:
            name, shard = next(iter(stored.files.lacking.items()))
            lines.append(
                f"The index lists {len(stored.files.lacking)} tensors that are not in its files, "
                f"such as {shorten(name)}, which shall be in {shard}: was everything downloaded?"
            )
        if lines:
            raise ValueError(
                f"the tensors in {stored.files.directory} are not those of this "
                f"{self.family.model_type}.\n" + "\n".join(lines)
            )

    def _is_output(self, names: list[str]) -> bool:
        """Returns whether tensors are those of an output layer without which there is a class."""
        own = [rule for rule in self.rules if rule.ours[0].startswith("output.")]
        is_output = set(names) <= {name for rule in own for name in rule.theirs}
        return (
            bool(names)
            and is_output
            and self.family.shape != "encoder"
            and "base" in self.family.classes
        )


def is_array(x: Any) -> bool:
    """Returns whether a leaf is an array or stands for one."""
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def abstract(a: Architecture, model: Any) -> Any:
    """Returns the model that an architecture describes, with shapes in place of arrays."""

    def zeros(key, shape, fan_in, fan_out):
        return jnp.zeros(shape, jnp.float32)

    return eqx.filter_eval_shape(partial(build, a, model, zeros), jax.random.key(0))


def arrays_by_path(model: Any) -> dict[str, Any]:
    """Returns the arrays of a model (or their shapes) by path, in the order of its leaves."""
    flat, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(model, is_array))
    return {path_name(path): array for path, array in flat}
