"""Saves a model as a checkpoint, by the table of its family."""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from jaxformers.files.atomic import replace_json
from jaxformers.files.hub import write_tensors
from jaxformers.hf.architecture.describe import describe
from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.architecture.record import Architecture, option_name
from jaxformers.hf.architecture.rope import OLDER_KEYS
from jaxformers.hf.arrays import is_finite
from jaxformers.hf.config.harmless import REDUNDANT
from jaxformers.hf.config.settings import Kept, Older
from jaxformers.hf.families import FAMILIES
from jaxformers.hf.family import Family
from jaxformers.hf.generation_config import generation_entries
from jaxformers.hf.layouts import Rule, to_theirs
from jaxformers.hf.load import read_settings
from jaxformers.hf.model_type import family_of, known_classes
from jaxformers.hf.plan import FLOATS, WeightPlan, abstract, arrays_by_path
from jaxformers.hf.saved_tokenizer import copy_tokenizer
from jaxformers.hf.tensors import ModelTensors
from jaxformers.layer_stack import unroll_layers
from jaxformers.origin import Origin
from jaxformers.paths import path_name
from jaxformers.sharding.hosts import check_here
from jaxformers.sites import is_watched
from jaxformers.weights import merge


def save(model: Any, path: Any, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes a model as a checkpoint; see `save_pretrained` of the models."""
    directory = check_directory(path)
    if is_watched(model):
        raise ValueError(
            "patch(...) replaces values of this model, which no checkpoint of transformers can "
            "say. Save the model that was patched."
        )
    for name, x in jax.tree_util.tree_leaves_with_path(model):
        check_here(path_name(name), x)  # on one host alone, the next line would wait for the others
    model = merge(unroll_layers(model))
    dtype = check_arrays(arrays_by_path(model))
    model = without_scale(model)
    arrays = arrays_by_path(model)
    plan, config = describe_for_file(model)
    config["dtype"] = config["torch_dtype"] = dtype  # as versions 5 and 4 of transformers spell it
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory, _tensors(plan, arrays, config, model.origin), max_shard_bytes)
    replace_json(directory / "config.json", config)
    known = model.origin is not None and model.origin.generation_config is not None
    if plan.family.shape != "encoder" and (known or model.output is not None):
        generation = generation_entries(model.origin, plan.family, config)
        replace_json(directory / "generation_config.json", generation)
    copy_tokenizer(model.origin, directory)


def without_scale(model: Any) -> Any:
    """Returns the model with the scale of its logits moved into the output layer's weights.

    That is done for an encoder-decoder with an output layer of its own. The original T5 scales the
    logits of a tied one. transformers 4 scales no others, so that files cannot say it of them.
    """
    output = model.output
    if not hasattr(model, "tgt_embedding") or output is None or output.tied or output.scale == 1.0:
        return model
    weights = [x for x in (output.w, output.b) if x is not None]
    scaled = [(x * output.scale).astype(x.dtype) for x in weights]
    model = eqx.tree_at(
        lambda m: [x for x in (m.output.w, m.output.b) if x is not None], model, scaled
    )
    object.__setattr__(model.output, "scale", 1.0)  # of a fresh copy that nobody has seen yet
    return model


def check_directory(path: Any) -> Path:
    """Returns the directory to write to, which may not be there yet."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"a model is saved in a directory, got {path!r:.80}.")
    if os.path.isfile(path):
        raise ValueError(f"{path} is a file. Pass the directory in which config.json shall lie.")
    return Path(path)


def check_arrays(arrays: Mapping[str, Any]) -> str:
    """Returns the dtype of a model's weights, after a check that they are those of one model.

    Raises:
        ValueError: for a model inside of a transformation, of shapes alone, stacked or quantized.
    """
    unreal = jax.core.Tracer, jax.ShapeDtypeStruct
    if not arrays or any(isinstance(x, unreal) for x in arrays.values()):
        raise ValueError(
            "a model can be saved where its weights are numbers: outside of jit, grad and vmap, "
            "and not as shapes or as what is left beside its arrays."
        )
    for path, x in arrays.items():
        if path.endswith("token_embedding.weight") and x.ndim != 2:
            raise ValueError(
                f"{path} must have 2 axes, got {x.shape}. Save models that are stacked one by "
                "one: jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, models)."
            )
    dtypes = {np.dtype(x.dtype) for x in arrays.values()}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        raise ValueError(
            f"all arrays of a checkpoint must have one dtype, {', '.join(map(str, FLOATS[:-1]))} "
            f"or {FLOATS[-1]}, got {', '.join(sorted(map(str, dtypes)))}. Cast them with "
            "jax.tree.map."
        )
    return str(dtypes.pop())


def _tensors(
    plan: WeightPlan,
    arrays: Mapping[str, jax.Array],
    config: Mapping[str, Any],
    origin: Origin | None,
) -> list[tuple]:
    """Returns for each tensor its name, shape, dtype, and a function that makes it."""
    shapes, listed, family = plan.shapes(), {}, plan.family
    for rule in plan.rules:
        for j, name in enumerate(rule.theirs):

            def make(rule: Rule = rule, j: int = j) -> np.ndarray:
                x = to_theirs(rule, [np.asarray(arrays[path]) for path in rule.ours])[j]
                if not is_finite(x):
                    raise ValueError(f"{', '.join(rule.ours)}: there are NaN or infinite weights.")
                return x

            listed[name] = (shapes[name], arrays[rule.ours[0]].dtype, make)
    if config.get("tie_word_embeddings") is False:
        repeats = {copy: of for copy, of in family.repeats if copy not in listed}
        listed |= {copy: listed[of] for copy, of in repeats.items() if of in listed}
    prefix = family.prefix if is_bare(family, config, origin, listed) else ""
    return [(name.removeprefix(prefix), *tensor) for name, tensor in listed.items()]


def is_bare(
    family: Family, config: Mapping[str, Any], origin: Origin | None, names: Collection[str]
) -> bool:
    """Returns whether tensors are written without the prefix of whole models.

    A model that still is of the class in its checkpoint has the names of its checkpoint.

    Arguments:
        family: the table of the model.
        config: the entries of config.json that are written.
        origin: the origin of the model.
        names: the names of the tensors, with the prefix.
    """
    named = config.get("architectures")
    kept = origin is not None and json.loads(origin.config).get("architectures") == named
    as_it_came = origin.bare if origin is not None and kept else None
    bare = named == [family.classes.get("base")] if as_it_came is None else as_it_came
    return bare and all(name.startswith(family.prefix) for name in names)


def describe_for_file(model: Any) -> tuple[WeightPlan, dict[str, Any]]:
    """Returns the plan for a model's arrays in the family that it belongs to, and its config.json.

    A model from a checkpoint stays in its family. For another the families are tried in order: one
    fits if its config.json, when read again, describes this very model.
    """
    a = describe(model)
    check_described(a, model)
    if model.origin is not None:
        entries = json.loads(model.origin.config)
        family = family_of(entries, a.shape)
        try:
            return fit(family, model, a, entries)
        except Misfit as error:
            raise ValueError(
                f"this model came from a {family.model_type}, whose format does not hold it any "
                f"more: {error}"
            ) from error
    misfits: dict[str, Misfit] = {}
    for family in (x.of_shape(a.shape) for x in FAMILIES.values()):
        if family.shape == a.shape:
            try:
                return fit(family, model, a, {})
            except Misfit as error:
                misfits[family.model_type] = error
    nearest = sorted(misfits, key=lambda name: len(misfits[name].faults))[:3]
    raise ValueError(
        "no family of transformers has models like this one, so that there is no checkpoint format "
        f"for it. What stands against the nearest of {len(misfits)} families:\n"
        + "\n".join(f"{name}: {misfits[name]}" for name in nearest)
    )


class Misfit(ValueError):
    """The reasons why the format of a family does not hold a model."""

    def __init__(self, faults: Sequence[str]):
        self.faults = tuple(dict.fromkeys(faults))
        more = f"; and {len(self.faults) - 4} more" if len(self.faults) > 4 else ""
        super().__init__("; ".join(self.faults[:4]) + more + ".")


def check_described(a: Architecture, model: Any) -> None:
    """Raises for a model with other arrays than its architecture has."""
    own, usual = (
        {path: array.shape for path, array in arrays_by_path(x).items()}
        for x in (model, abstract(a, type(model)))
    )
    odd = sorted(path for path in {**own, **usual} if own.get(path) != usual.get(path))
    if odd:
        listed = ", ".join(f"{x} {own.get(x)} for {usual.get(x)}" for x in odd[:5])
        raise ValueError(
            "this model has parts that no checkpoint of transformers has: its arrays are not those "
            f"of a model with its options, but {listed}."
        )


def fit(
    family: Family, model: Any, a: Architecture, entries: dict[str, Any]
) -> tuple[WeightPlan, dict[str, Any]]:
    """Returns a plan and a config.json for a model in this family.

    Raises:
        Misfit: if the format of the family does not hold the model.
    """
    plan, fields = WeightPlan.of(family, model, a), a.flat()
    shapes = plan.shapes()
    bare = is_bare(family, entries, model.origin, shapes)
    named = ModelTensors(shapes, bare)
    unnamed = [f"no tensor for {re.sub(r'[.][0-9]+', '[i]', path)}" for path in plan.unnamed]
    # Other heads than the file's make it another class. A class that no table has stays.
    given, classes = entries.get("architectures"), class_names(a, family, bare)
    faults = [] if classes else ["no class with these heads"]
    fitting = given in [[name] for name in classes]
    same_class = fitting or given not in [[name] for name in known_classes(family.model_type)]
    renamed = {old for x in family.settings if isinstance(x, Older) for old in x.names}
    if (
        entries
        and same_class
        and not renamed & entries.keys()
        and not faults
        and not unnamed
        and not differences(family, entries, named, a)
    ):
        return plan, _respell(family, entries, named, a)
    # The default special tokens of the class belong to another vocabulary.
    config = {**(entries or dict.fromkeys(family.special)), "model_type": family.model_type}
    kept = {key for x in family.settings if isinstance(x, Kept) for key in x.keys}
    for key in (REDUNDANT.keys() - kept) & config.keys():  # the table overwrites its own
        config[key] = fields[REDUNDANT[key]]
    for setting in family.settings:
        try:
            setting.write(fields, config)
        except ValueError as error:
            faults.append(str(error).rstrip("."))
    config["architectures"] = given if fitting else classes[:1]
    faults += differences(family, config, named, a)
    if faults or unnamed:
        raise Misfit(faults or unnamed)  # a difference explains why a tensor is missing
    _warn_of_version_4(family, config, named, a)
    return plan, config


def _respell(
    family: Family, entries: dict[str, Any], tensors: ModelTensors, a: Architecture
) -> dict[str, Any]:
    """Returns the entries of a file, and those that readers of other versions know beside them.

    The entries of the file stay, unless a reader would misunderstand them.
    """
    words = dict(entries)
    config: dict[str, Any] = {}
    for setting in family.settings:
        twice = getattr(setting, "twice", False)
        anew = getattr(setting, "anew", False) or getattr(setting, "disputed", False)
        if twice or anew:
            before = dict(words)
            with contextlib.suppress(ValueError):  # the file has other words, which stay
                setting.write(a.flat(), words)
            if not twice:
                config |= {key: x for key, x in words.items() if before.get(key) != x}
    own = {key: x for key, x in entries.items() if x is not None}
    config = {**words, **own, **config}
    either = (family.newer, (), OLDER_KEYS)
    if any(differences(family, _without(config, keys), tensors, a) for keys in either):
        config = words
    _warn_of_version_4(family, config, tensors, a)
    return config


def _without(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: x for key, x in config.items() if key not in keys}


def _warn_of_version_4(
    family: Family, config: Mapping[str, Any], tensors: ModelTensors, a: Architecture
) -> None:
    """Warns if only version 5 of transformers has words for the model."""
    faults = differences(family, _without(config, family.newer), tensors, a)
    if faults:
        warnings.warn(
            f"transformers before version 5, and what reads checkpoints as it does, takes this "
            f"{family.model_type} for another model, without an error: {'; '.join(faults[:3])}.",
            stacklevel=6,
        )


def differences(
    family: Family, entries: Mapping[str, Any], tensors: Any, a: Architecture
) -> list[str]:
    """Returns how a config.json describes another architecture; dropout does not count."""
    try:
        read = read_settings(family, entries, tensors).flat()
    except ValueError as error:
        return [str(error).rstrip(".")]
    return [
        f"{option_name(name)} is {value!r:.80}, not {read[name]!r:.80}"
        for name, value in a.flat().items()
        if "dropout" not in name and value != read[name]
    ]


def class_names(a: Architecture, family: Family, bare: bool) -> list[str]:
    """Returns the classes that config.json may name for a model, the usual one first.

    The table of tokens is the output layer of a tied model, so that its file may be one of the bare
    class. Files of bare models may also name the class of the whole model.
    """
    own, names = class_name(a, family), family.classes
    if a.shape != "encoder" and "base" in names:
        whole = a.output.present and a.output.tied and not a.output.bias
        by_file = any(x.by_file for x in family.settings if isinstance(x, Tied))
        if whole and not by_file:
            return [names["output"], names["base"]]
        if not a.output.present and bare:
            return [names["base"], names["output"]]
    return [] if own is None else [own]


def class_name(a: Architecture, family: Family) -> str | None:
    """Returns the family's class that has the model's heads, or None if there is none."""
    role = "output" if a.output.present else "base"
    if a.heads.labels is not None:
        role = "tokens" if a.heads.pooling == "none" else "sequence"
        role = "pretraining" if a.output.present else role
        if role == "tokens" and a.heads.transform is not None:
            role = "discriminator" if "discriminator" in family.classes else role
    return family.classes.get(role)
