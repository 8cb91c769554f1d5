"""Writes adapters for PEFT: adapter_config.json and adapter_model.safetensors."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from jaxformers.adapters.kinds import Dora, Replaced
from jaxformers.adapters.lora import (
    adapter_names,
    check_name,
    is_adapter,
    without_adapters,
)
from jaxformers.adapters.modules import Modules, is_table, join_a, join_b, join_magnitude
from jaxformers.adapters.peft_config import CONFIG
from jaxformers.adapters.peft_load import WEIGHTS
from jaxformers.axes import Axes
from jaxformers.checks import check_usable
from jaxformers.files.atomic import replace_json
from jaxformers.files.safetensors_file import Unsaved, write_file
from jaxformers.hf.arrays import is_finite
from jaxformers.hf.layouts import Rule, to_theirs
from jaxformers.hf.save import check_directory
from jaxformers.layer_stack import unroll_layers
from jaxformers.paths import path_name
from jaxformers.precision import widened
from jaxformers.weights import LowRank, is_object

# The task of PEFT by the shape of a family, for models with an output layer.
_TASKS = {"lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
BEFORE = "base_model.model."


class Pair(NamedTuple):
    """The adapter of one matrix of PEFT: `a (r, in)`, `b (out, r)`, and the factor on them."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    scale: float


class Whole(NamedTuple):
    """The tensors that are saved whole: those of modules, and biases alone."""

    tensors: dict[str, np.ndarray]
    modules: list[str]
    biases: list[str]


def save_adapter(model: Any, path: str | os.PathLike, *, name: str | None = None) -> None:
    """Writes an adapter of a model so that PEFT loads it: its settings and its tensors.

    Several weights here may be one matrix of PEFT, such as queries, keys and values of GPT-2. If
    their `a` are equal, as in a loaded adapter that was not trained, the matrix gets this `a`.
    Otherwise it gets the `a` of all of them, one below the other, and a `b` that is zero elsewhere:
    the rank is then the sum of their ranks, and the numbers are the same.

    Arguments:
        model: a model with an adapter.
        path: directory, made if it is not there.
        name: the name of the adapter; None is the only one.

    Raises:
        ValueError: if the model has no such adapter or several, is not of a family of transformers,
            or the adapter changes what PEFT's format has no words for.
        ImportError: if the `safetensors` package is missing.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> options = {"learnable_pos": True, "tie_embeddings": True, "embedding_scale": 1.0}
        >>> model = TransformerLM(65, 16, 2, 1, 32, 32, 0.0, **options, key=key)  # as GPT-2 is
        >>> save_adapter(lora(model, rank=4, key=key), directory)
        >>> sorted(os.listdir(directory))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_usable(model=model)
    directory, model = check_directory(path), unroll_layers(model)
    check_name(model, name)
    names = adapter_names(model)
    if name is None and len(names) > 1:
        raise ValueError(f"the model has the adapters {names}: pass name=, one of them.")
    modules, adapters = Modules.of(model), _adapters(model, names[0] if name is None else name)
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_object)
    arrays = {path_name(path): without_adapters(x) for path, x in leaves}
    pairs = _pairs(modules, adapters, arrays)
    whole = _whole(modules, adapters, arrays, pairs)
    tensors = [*map(_unsaved, _named(pairs, whole, modules).items())]
    config = _config(model, modules, pairs, whole)
    directory.mkdir(parents=True, exist_ok=True)
    new = directory / f"{WEIGHTS}.new"
    write_file(new, tensors)
    new.replace(directory / WEIGHTS)
    replace_json(directory / CONFIG, config)


def _adapters(model: Any, name: str) -> dict[str, Any]:
    """Returns the adapted weights of an adapter by path."""
    found: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_object):
        while is_adapter(x):
            if x.name == name:
                found[path_name(path)] = x
            x = x.base
    for where, x in found.items():
        what = "" if isinstance(x, LowRank | Dora | Replaced) else f"is a {type(x).__name__}"
        if isinstance(x, Dora) and is_adapter(x.base):
            what = "lies on another adapter"
        if what:
            raise ValueError(f"PEFT has no such adapter: {where} {what}. Merge the model instead.")
    return found


def _pairs(
    modules: Modules, adapters: Mapping[str, Any], arrays: Mapping[str, Any]
) -> dict[str, Pair]:
    """Returns the low-rank changes by module."""
    low = {path: x for path, x in adapters.items() if not isinstance(x, Replaced)}
    dora = any(isinstance(x, Dora) for x in low.values())
    pairs: dict[str, Pair] = {}
    for module, rule in modules.maps().items():
        parts = [low.pop(path, None) for path in rule.ours]
        if module == rule.theirs[0].removesuffix(".weight") and any(parts):
            if modules.tied_output is not None and module in modules.token_tables:
                raise ValueError(
                    f"{rule.ours[0]} is shared with the output layer, and PEFT would change the "
                    "table alone. Merge the model, and save it whole."
                )
            weights = [arrays[path] for path in rule.ours] if dora else None
            names = [x.removesuffix(".weight") for x in rule.theirs]
            pairs |= dict(zip(names, _joined(modules, rule, parts, weights), strict=True))
    if low:
        raise ValueError(f"transformers has no linear map for {', '.join(low)}.")
    if not pairs:
        raise ValueError("PEFT has no adapter without low-rank changes. Merge the model instead.")
    return pairs


def _joined(
    modules: Modules, rule: Rule, parts: list[Any], weights: list[Any] | None
) -> list[Pair]:
    """Returns the adapter of each matrix of a rule from those of our weights, None for none.

    With the weights it has magnitudes.
    """
    there = [x for x in parts if x is not None]
    first, shapes = there[0], modules.shapes(rule)
    same = len(there) == len(parts) and all(
        x.scale == first.scale and np.array_equal(x.a, first.a) for x in there
    )
    a = [np.asarray(x.a, np.float32) for x in (there[:1] if same else there)]
    total, start, b = sum(x.shape[-1] for x in a), 0, []
    for part, axes, shape in zip(parts, rule.axes, shapes, strict=True):
        apart = [shape[i] for i in axes.apart]
        rows = np.zeros((*apart, total, *(shape[i] for i in axes.outputs)), np.float32)
        if part is not None:
            r = part.a.shape[-1]
            own = np.asarray(part.b, np.float32) * np.float32(part.scale / first.scale)
            rows[(*(slice(None),) * len(apart), slice(start, start + r))] = own
            start += 0 if same else r
        b.append(rows)
    lengths: list[Any] = [None] * len(rule.theirs)
    if weights is not None:
        lengths = join_magnitude(rule, list(map(_magnitude, parts, weights, rule.axes)))
    halves = join_a(rule, np.concatenate(a, axis=-1)), join_b(rule, b)
    return [Pair(*x, first.scale) for x in zip(*halves, lengths, strict=True)]


def _magnitude(part: Any, weight: Any, axes: Axes) -> np.ndarray:
    """Returns the magnitudes of a weight. Without trained ones they are those that it has."""
    if isinstance(part, Dora):
        return np.asarray(part.magnitude, np.float32)
    wide = weight.dense() if is_object(weight) else weight
    wide = widened(wide) if part is None else part.wide()
    return np.sqrt(np.square(np.asarray(wide)).sum(axes.inputs))


def _whole(
    modules: Modules,
    adapters: Mapping[str, Any],
    arrays: Mapping[str, Any],
    pairs: Mapping[str, Pair],
) -> Whole:
    """Returns the arrays that are trained whole, with all others of their modules."""
    paths = {path for path, x in adapters.items() if isinstance(x, Replaced)}
    tied = modules.tied_output
    values = {path: _value(x, adapters.get(path)) for path, x in arrays.items()}
    trained = {x for rule in modules.plan.rules if paths & {*rule.ours} for x in rule.theirs}
    saved = {_owner(x) for x in trained if not x.endswith(".bias")}
    biases = {x for x in trained if _owner(x) not in saved}
    clash = [x for x in saved if not x or x in pairs]
    if clash:
        raise ValueError(
            f"PEFT saves a module whole or adapts it, got both for {', '.join(sorted(clash))!r}. "
            "Train its weights in one way, or merge the model."
        )
    tensors: dict[str, np.ndarray] = {}
    for rule in modules.plan.rules:
        if any(x in biases or x.startswith(tuple(f"{y}." for y in saved)) for x in rule.theirs):
            there = to_theirs(rule, [values[path] for path in rule.ours])
            tensors |= dict(zip(rule.theirs, there, strict=True))
    tables = [x for x in (f"{x}.weight" for x in modules.token_tables) if x in tensors]
    if tied is not None and ("output.w" in paths or tables):
        # PEFT gives a layer that shares a table weights of its own if either is saved.
        tensors[tied] = values["output.w"].T if "output.w" in paths else tensors[tables[0]]
        saved.add(_owner(tied))
    return Whole(tensors, sorted(saved), sorted(biases))


def _owner(tensor: str) -> str:
    """Returns the module of a tensor."""
    return tensor.rpartition(".")[0]


def _value(x: Any, adapter: Any) -> Any:
    """Returns the array that replaces another, or else the array itself; None for other leaves."""
    if isinstance(adapter, Replaced):
        return np.asarray(adapter.value)
    if is_object(x):
        return np.asarray(x.dense())
    return np.asarray(x) if eqx.is_array(x) else None


def _named(pairs: Mapping[str, Pair], whole: Whole, modules: Modules) -> dict[str, np.ndarray]:
    """Returns all tensors by the names that PEFT has for them."""
    found: dict[str, np.ndarray] = {}
    maps = modules.maps()
    for module, pair in pairs.items():
        names = (
            ("embedding_A", "embedding_B") if is_table(maps[module]) else ("A.weight", "B.weight")
        )
        found |= {f"{module}.lora_{x}": y for x, y in zip(names, pair[:2], strict=True)}
        if pair.magnitude is not None:
            found[f"{module}.lora_magnitude_vector"] = pair.magnitude
    for name, x in whole.tensors.items():
        found[f"{_owner(name)}.base_layer.bias" if _owner(name) in pairs else name] = x
    prefix = modules.prefix
    return {f"{BEFORE}{name.removeprefix(prefix)}": x for name, x in found.items()}


def _config(
    model: Any, modules: Modules, pairs: Mapping[str, Pair], whole: Whole
) -> dict[str, Any]:
    """Returns the entries of adapter_config.json, in which modules have their full names."""
    maps, prefix = modules.maps(), modules.prefix
    ranks = {x.removeprefix(prefix): pair.a.shape[0] for x, pair in pairs.items()}
    alphas = {
        x.removeprefix(prefix): _number(pair.scale * pair.a.shape[0]) for x, pair in pairs.items()
    }
    (r, _), (alpha, _) = (Counter(x.values()).most_common(1)[0] for x in (ranks, alphas))
    layouts = {maps[x].layout for x in pairs}
    has_output = getattr(model, "output", None) is not None
    origin = model.origin
    return {
        "peft_type": "LORA",
        "task_type": _TASKS.get(modules.family.shape) if has_output else None,
        "base_model_name_or_path": None if origin is None else _base_name(origin.directory),
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {x: n for x, n in sorted(ranks.items()) if n != r},
        "alpha_pattern": {x: n for x, n in sorted(alphas.items()) if n != alpha},
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": any(pair.magnitude is not None for pair in pairs.values()),
        "fan_in_fan_out": any(x.startswith("conv1d") for x in layouts),
        "bias": _bias(pairs, whole),
        "modules_to_save": [x.removeprefix(prefix) for x in whole.modules] or None,
        "init_lora_weights": True,
    }


def _bias(pairs: Mapping[str, Pair], whole: Whole) -> str:
    """Returns the word of PEFT for the biases that are trained."""
    if not whole.biases:
        return "none"
    return "lora_only" if {_owner(x) for x in whole.biases} <= pairs.keys() else "all"


def _number(x: float) -> float | int:
    """Returns a number as an integer if it is one but for rounding."""
    return round(x) if abs(x - round(x)) < 1e-9 * max(1.0, abs(x)) else x


def _base_name(directory: str | None) -> str | None:
    """Returns the name of a checkpoint on the hub if its directory is in the hub's cache."""
    found = re.search(r"models--(.+?)--(.+?)[/\\]snapshots[/\\]", f"{directory or ''}/")
    return f"{found[1]}/{found[2]}" if found else directory


def _unsaved(tensor: tuple[str, np.ndarray]) -> Unsaved:
    name, x = tensor
    x = np.ascontiguousarray(x, np.float32)
    if not is_finite(x):
        raise ValueError(f"{name.removeprefix(BEFORE)}: there are NaN or infinite weights.")
    return Unsaved(name, x.shape, x.dtype, lambda: x)
