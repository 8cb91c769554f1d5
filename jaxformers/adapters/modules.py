"""The modules of transformers that adapters change, and the weights of ours that they are.

One matrix of transformers may be several weights here, such as queries, keys and values. Its
adapter is then one `a` for all of them, and a `b` that is split as the matrix is. The rules of the
family, `hf/layouts.py`, say how.
"""

import json
from dataclasses import dataclass
from math import prod
from typing import Any

import equinox as eqx
import numpy as np

from jaxformers.adapters.lora import adapter_names, unload
from jaxformers.hf.architecture.describe import describe
from jaxformers.hf.family import Family
from jaxformers.hf.layouts import Rule, Shape, tensor_shapes, to_ours, to_theirs
from jaxformers.hf.model_type import family_of
from jaxformers.hf.plan import WeightPlan
from jaxformers.hf.save import class_name, describe_for_file
from jaxformers.weights import merge

# How the outputs of a map are joined, in its `b` and in its vector of magnitudes, by the layout of
# its matrix. The matrix of `b` is `(out, r)` also where the other is stored as `(in, out)`.
_OF_B = {
    "linear": "linear",
    "conv1d": "linear",
    "linear rows": "linear rows",
    "conv1d columns": "linear rows",
    "linear heads": "linear heads",
    "experts": "experts",
}
_OF_VECTOR = {"linear": "flat", "linear rows": "flat rows", "linear heads": "flat heads"}
# The names of the rows of tables: tokens, token types, positions, and buckets of distances.
_TABLES = "v", "y", "p", "u"


@dataclass(frozen=True)
class Modules:
    """The modules of a model that is made of arrays alone.

    Arguments:
        family: the table of the model.
        plan: its rules for the model.
        prefix: the beginning of names that the class of the model in transformers lacks.
    """

    family: Family
    plan: WeightPlan
    prefix: str

    @classmethod
    def of(cls, model: Any) -> "Modules":
        """Returns the modules of a model with or without adapters, whose layers are a tuple.

        Raises:
            ValueError: if no family has models like this one.
        """
        bare = unload(model) if adapter_names(model) else model
        like = eqx.filter_eval_shape(merge, bare)
        a = describe(like)
        if model.origin is None:
            plan, _ = describe_for_file(like)
        else:
            family = family_of(json.loads(model.origin.config), a.shape)
            plan = WeightPlan.of(family, like, a)
        family = plan.family
        is_bare = class_name(a, family) == family.classes.get("base")
        return cls(family, plan, family.prefix if is_bare else "")

    def maps(self) -> dict[str, Rule]:
        """Returns the rule of each linear map and each table, by the name of its module."""
        return {
            name.removesuffix(".weight"): rule
            for rule in self.plan.rules
            for name in rule.theirs
            if name.endswith(".weight") and (rule.layout in _OF_B or is_table(rule))
        }

    def shapes(self, rule: Rule) -> list[Shape]:
        """Returns the shapes of our arrays in a rule."""
        return [self.plan.leaves[path].shape for path in rule.ours]

    def tensors(self, rule: Rule) -> dict[str, Shape]:
        """Returns the names of the tensors in a rule with their shapes."""
        return dict(zip(rule.theirs, tensor_shapes(rule, self.shapes(rule)), strict=True))

    def rule_of(self, tensor: str) -> Rule | None:
        """Returns the rule of a tensor, or None if the model has no such tensor."""
        return next((rule for rule in self.plan.rules if tensor in rule.theirs), None)

    def shape_of(self, tensor: str) -> Shape:
        """Returns the shape of a tensor, also of that of an output layer that shares a table."""
        rule = self.rule_of(tensor)
        if rule is not None:
            return self.tensors(rule)[tensor]
        return next(self.plan.leaves[self.maps()[x].ours[0]].shape for x in self.token_tables)

    @property
    def tied_output(self) -> str | None:
        """The tensor that the output layer would have if it did not share a table; else None."""
        rules = [rule for rule in self.family.weights if rule.ours == ("output.w",)]
        return rules[0].theirs[0] if rules and "output.w" not in self.plan.leaves else None

    @property
    def token_tables(self) -> list[str]:
        """The modules of tables of tokens."""
        return [
            name
            for name, rule in self.maps().items()
            if is_table(rule) and rule.axes[0].names[0] == "v"
        ]

    def matrix(self, rule: Rule) -> tuple[int, int]:
        """Returns the numbers of inputs and outputs of each matrix in a rule."""
        pairs = rule.matrix_shapes(self.shapes(rule))
        return pairs[0][0], sum(out for _, out in pairs)


def is_table(rule: Rule) -> bool:
    """Returns whether a rule is that of a table, such as one of embeddings."""
    axes = rule.axes[0]
    return rule.layout == "same" and [axes.names[i] for i in axes.inputs][:1] in map(list, _TABLES)


def split_a(rule: Rule, shapes: list[Shape], matrices: list[np.ndarray]) -> list[np.ndarray]:
    """Returns `a` of each of our weights from matrices `(r, in)`, one or one for each expert."""
    r = matrices[0].shape[0]
    a = np.stack([x.T for x in matrices])
    return [
        a.reshape(*(shape[i] for i in (*axes.apart, *axes.inputs)), r)
        for axes, shape in zip(rule.axes, shapes, strict=True)
    ]


def split_b(rule: Rule, shapes: list[Shape], matrices: list[np.ndarray]) -> list[np.ndarray]:
    """Returns `b` of each of our weights from matrices `(out, r)`, one or one for each expert."""
    r = matrices[0].shape[1]
    own = [
        (*(shape[i] for i in axes.apart), r, *(shape[i] for i in axes.outputs))
        for axes, shape in zip(rule.axes, shapes, strict=True)
    ]
    return to_ours(_rule_of_b(rule), matrices, own)


def split_magnitude(rule: Rule, shapes: list[Shape], vectors: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the magnitudes of each of our weights from vectors `(out,)`."""
    own = [
        tuple(shape[i] for i in (*axes.apart, *axes.outputs))
        for axes, shape in zip(rule.axes, shapes, strict=True)
    ]
    if rule.layout not in _OF_B or rule.layout == "experts":
        return [np.stack(vectors).reshape(own[0])]
    layout = _OF_VECTOR[_OF_B[rule.layout]]
    return to_ours(rule._replace(layout=layout), [vectors[0].reshape(-1)], own)


def join_a(rule: Rule, a: np.ndarray) -> list[np.ndarray]:
    """Returns the matrices `(r, in)` of `a`, one or one for each expert."""
    apart = prod(a.shape[i] for i in rule.axes[0].apart)
    return [x.T for x in a.reshape(apart, -1, a.shape[-1])]


def join_b(rule: Rule, parts: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the matrices `(out, r)` of the `b` of our weights."""
    return to_theirs(_rule_of_b(rule), parts)


def join_magnitude(rule: Rule, parts: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the vectors `(out,)` of magnitudes of our weights."""
    if rule.layout not in _OF_B:
        return parts
    if rule.layout == "experts":
        return list(parts[0])
    return to_theirs(rule._replace(layout=_OF_VECTOR[_OF_B[rule.layout]]), parts)


def _rule_of_b(rule: Rule) -> Rule:
    axes = tuple(x.factors()[1] for x in rule.axes)
    return rule._replace(layout=_OF_B.get(rule.layout, "linear"), axes=axes)
