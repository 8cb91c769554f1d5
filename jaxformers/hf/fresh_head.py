"""Puts a fresh classifier of sequences on the checkpoint of an encoder.

The tensors of the file stay as they are. What the file has beside the encoder and the classifier,
such as a masked-LM head, is left out, and what the classifier needs and the file lacks is drawn.
Everything else then reads the file as if it held the classifier.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxformers.checks import check_key, check_size
from jaxformers.hf.architecture.heads import Heads
from jaxformers.hf.families import FAMILIES
from jaxformers.hf.family import Family
from jaxformers.hf.plan import WeightPlan
from jaxformers.hf.tensors import FileTensors, matcher

ROLE = "sequence"
STDDEV = 0.02  # of the weights that transformers draws, unless config.json says another one


class FreshHead(NamedTuple):
    """A classifier of sequences that a checkpoint shall get.

    Arguments:
        labels: the number of classes.
        names: the name of each class; None for none.
        key: PRNG key of its weights.
    """

    labels: int
    names: tuple[str, ...] | None
    key: PRNGKeyArray

    @classmethod
    def of(
        cls,
        num_labels: int | None,
        id2label: Mapping[int, str] | Sequence[str] | None,
        key: PRNGKeyArray | None,
    ) -> "FreshHead | None":
        """Returns the classifier that these arguments of `from_pretrained` ask for, if any.

        Raises:
            ValueError: if they contradict each other.
        """
        if num_labels is None and id2label is None:
            if key is not None:
                raise ValueError("key is for a fresh classifier: pass num_labels= too.")
            return None
        names = None if id2label is None else _names(id2label)
        labels = len(names or ()) if num_labels is None else num_labels
        check_size(num_labels=labels)
        if names is not None and len(names) != labels:
            raise ValueError(
                f"id2label must name each of the {labels} classes of num_labels once, got "
                f"{len(names)} names."
            )
        return cls(labels, names, jax.random.key(0) if key is None else check_key(key))

    def begin(self, stored: FileTensors, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the entries of config.json for the checkpoint with this classifier.

        A checkpoint that has a classifier of sequences with as many classes keeps it.

        Arguments:
            stored: the tensors, of which those of other heads are removed.
            config: the entries of config.json, as they are in the file.

        Raises:
            ValueError: if the family has no classifier of sequences.
        """
        family = stored.family
        heads = next((x for x in family.settings if isinstance(x, Heads)), None)
        if ROLE not in family.classes or heads is None:
            known = sorted(name for name, x in FAMILIES.items() if ROLE in x.classes)
            raise ValueError(
                f"num_labels is for families with a classifier of sequences, which are "
                f"{', '.join(known)}; this checkpoint is a {family.model_type}."
            )
        given, last = config.get("id2label"), next(iter(heads.sequence))
        names = [f"LABEL_{i}" for i in range(self.labels)]
        if not self._has(stored, heads, last, config):
            self._behead(stored, heads)
            pools = heads.sequence[last].get("heads.pooling") == "pooler"
            if not pools:
                stored.names.pop(heads.pooler, None)
            needed = (last, heads.pooler) if pools else (last,)
            for name in (x for x in needed if not stored.has(x)):
                stored.put(name, np.zeros((self.labels, 0), np.float32))  # `finish` draws it
        elif isinstance(given, dict) and len(given) == self.labels:
            names = list(given.values())
        names = names if self.names is None else list(self.names)
        return {key: x for key, x in config.items() if key not in _OF_LABELS} | {
            "architectures": [family.classes[ROLE]],
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {str(name): i for i, name in enumerate(names)},
        }

    def _has(self, stored: FileTensors, heads: Heads, last: str, config: Mapping[str, Any]) -> bool:
        """Returns whether a checkpoint has such a classifier, whose last map is the tensor."""
        named, classes = config.get("architectures"), stored.family.classes.items()
        named = named if isinstance(named, list) else []
        another = any(role != ROLE and name in named for role, name in classes)
        alone = heads.shared or not stored.has(heads.output)
        same_size = stored.has(last) and stored.shape(last)[:1] == (self.labels,)
        return same_size and alone and not another

    def _behead(self, stored: FileTensors, heads: Heads) -> None:
        """Removes the output layer, the last map of each classifier, and heads that no table has.

        The name of a tensor of the encoder begins with the family's prefix. Files of a bare
        encoder lack the prefix, and have no heads.
        """
        family = stored.family
        classifier, output = _matcher(family, "classifier."), _matcher(family, "output.")
        whole = any(name.startswith(family.prefix) for name in stored.names.values())
        for name in list(stored.names):
            of_output = output(name) and not classifier(name)
            foreign = name in stored.unknown and whole and not name.startswith(family.prefix)
            if of_output or foreign or name in {**heads.sequence, **heads.tokens}:
                del stored.names[name]

    def finish(self, stored: FileTensors, plan: WeightPlan, stddev: Any) -> None:
        """Draws the weights of a fresh classifier that the file lacks.

        Arguments:
            stored: the tensors, which get them.
            plan: the plan of the model with its classifier.
            stddev: the standard deviation by config.json, if it is a number.
        """
        if not stored.made:
            return
        usual = isinstance(stddev, float) and 0 < stddev < 1
        scale = np.float32(stddev if usual else STDDEV)
        expected = plan.shapes()
        of_heads = _matcher(stored.family, "output.", "classifier.", "pooler.")
        for name in [x for x in stored.names if of_heads(x) and x not in expected]:
            del stored.names[name]
        dtype = next(stored.dtype(x) for x in stored.names if x not in stored.made)
        keys = jax.random.split(self.key, len(plan.rules))
        for rule, key in zip(plan.rules, keys, strict=True):
            [name, *_] = rule.theirs
            fresh = name in stored.made or not stored.has(name)
            if of_heads(name) and (fresh or rule.ours[0].startswith("classifier.out.")):
                stored.put(name, _draw(name, expected[name], scale, key).astype(dtype))


# The entries of config.json about the classes of another head.
_OF_LABELS = (
    *("id2label", "label2id", "num_labels", "_num_labels", "problem_type", "finetuning_task"),
)


def _names(id2label: Any) -> tuple[str, ...]:
    """Returns the names of the classes in their order."""
    names: Any = () if isinstance(id2label, str) or not hasattr(id2label, "__iter__") else id2label
    if isinstance(names, Mapping):  # config.json has texts as keys
        names = [names.get(i, names.get(str(i))) for i in range(len(names))]
    names = tuple(names)
    if not names or not all(isinstance(x, str) for x in names) or len({*names}) < len(names):
        raise ValueError(
            "id2label must have a different name for each class, as {0: 'bad', 1: 'good'} or "
            f"['bad', 'good'], got {id2label!r:.80}."
        )
    return names


def _matcher(family: Family, *paths: str) -> Callable[[str], Any]:
    """Returns a function that tells whether a tensor makes arrays whose paths begin so."""
    rules = [rule for rule in family.weights if rule.ours[0].startswith(paths)]
    return matcher(x for rule in rules for x in rule.theirs)


def _draw(name: str, shape: tuple[int, ...], stddev: np.float32, key: PRNGKeyArray) -> np.ndarray:
    """Returns the values of a fresh tensor: zeros of a bias, ones of a norm, or normal numbers."""
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return stddev * np.asarray(jax.random.normal(key, shape, jnp.float32))
