"""Checkpoints to models and back: the one engine, which reads the families' tables."""

import dataclasses
import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.hf.architecture import Architecture, build
from jaxformers.hf.describe import describe
from jaxformers.hf.families import FAMILIES
from jaxformers.hf.family import Family
from jaxformers.hf.files import TensorFiles, locate, write_tensors
from jaxformers.hf.json_file import read_json
from jaxformers.hf.layouts import Rule, tensor_shapes, to_ours, to_theirs
from jaxformers.hf.settings import Config, Only
from jaxformers.hf.tokenizer_files import TOKENIZER_FILES
from jaxformers.origin import Origin, SpecialTokens

# What is fetched of a hub's repository beside the tokenizer's files.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "*.safetensors.index.json",
)


def load(path: Any, classes: Mapping[str, Any], dtype: Any = None, sharding: Any = None) -> Any:
    """The model of a checkpoint; `classes` are ours by shape. See `jaxformers.from_pretrained`."""
    directory = locate(path, [*PATTERNS, *TOKENIZER_FILES])
    config = read_json(directory / "config.json")
    family = family_of(config)
    if family.shape not in classes:
        raise ValueError(
            f"{directory} holds a {family.model_type}, a model of shape {family.shape!r}, which "
            f"{' or '.join(x.__name__ for x in classes.values())} is not. Load it with "
            "jaxformers.from_pretrained, which knows the class."
        )
    stored = Stored(family, TensorFiles(directory))
    a = read_settings(family, config, stored)
    check_sizes(a, stored)
    origin = read_origin(directory, config, family, a.vocab_size)
    plan = Plan.of(family, abstract(a, classes[family.shape]), a)
    plan.check(stored)
    arrays = read_arrays(plan, stored, dtype, sharding)
    return with_origin(jax.tree.map(lambda path: arrays[path], plan.paths), origin)


def family_of(config: Mapping[str, Any]) -> Family:
    """The table for a config.json."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"config.json: model_type must be one of {', '.join(sorted(FAMILIES))}, got "
            f"{name!r:.80}."
        )
    return FAMILIES[name]


class Stored:
    """A checkpoint's tensors under the names of its family's table.

    Files may lack the prefix that the table's names have, use older names, and hold tensors that
    are of no interest.
    """

    def __init__(self, family: Family, files: TensorFiles):
        self.files = files
        self.names: dict[str, str] = {}
        expected = [theirs for rule in family.weights for theirs in rule.theirs]
        expected += [copy for copy, _ in family.copies]
        known = [_pattern(name) for name in expected]
        for name in files.names:
            new = name
            for old, replacement in family.aliases:
                new = re.sub(old, replacement, new)
            candidates = (new, f"{family.prefix}{new}", new.removeprefix(family.prefix))
            ours = [x for x in candidates if any(p.fullmatch(x) for p in known)]
            if not ours and any(re.search(p, new) for p in family.ignored):
                continue
            canonical = ours[0] if ours else new
            if canonical in self.names:
                raise ValueError(
                    f"{files.directory} has two tensors for {canonical}: {self.names[canonical]} "
                    f"and {name}."
                )
            self.names[canonical] = name
        for copy, of in family.copies:
            self.merge(copy, of)

    def has(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files.shape(self.names[name])

    def dtype(self, name: str) -> np.dtype:
        return self.files.dtype(self.names[name])

    def read(self, name: str) -> np.ndarray:
        return self.files.read(self.names[name])

    def merge(self, copy: str, of: str) -> bool:
        """Whether two tensors are one, stored under one of the names or twice."""
        if not self.has(copy):
            return True
        if not self.has(of):
            self.names[of] = self.names[copy]
        elif self.shape(copy) != self.shape(of) or not self._equal(copy, of):
            return False
        del self.names[copy]
        return True

    def choose(self, names: Sequence[str], name: str) -> None:
        """Keep the first of these tensors that is there, under the last argument's name."""
        found = [self.names.pop(x) for x in names if x in self.names]
        if found:
            self.names[name] = found[0]

    def _equal(self, name: str, other: str) -> bool:
        same_type = self.dtype(name) == self.dtype(other)
        return same_type and bool((self.read(name) == self.read(other)).all())


def _pattern(name: str) -> re.Pattern:
    return re.compile(re.escape(name).replace(r"\{i\}", r"\d+").replace(r"\{e\}", r"\d+"))


def read_settings(family: Family, entries: Mapping[str, Any], tensors: Any) -> Architecture:
    """The architecture that a config.json describes.

    Raises:
        ValueError: if an entry has the wrong type or a meaning that is not handled.
    """
    config = Config(entries, tensors)
    fields: dict[str, Any] = {"shape": family.shape}
    for setting in family.settings:
        try:
            setting.read(config, fields)
        except (ValueError, ArithmeticError) as error:
            if str(error).startswith("config.json"):
                raise
            raise ValueError(f"config.json: its numbers do not fit together: {error}") from error
    if family.shape != "encoder":
        Only("is_causal", (True,), True).read(config, fields)
    unknown = config.unknown()
    if unknown:
        pairs = [f"{key:.80} = {value!r:.60}" for key, value in sorted(unknown.items())]
        listed = ", ".join(pairs[:8]) + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")
        raise ValueError(
            f"config.json of this {family.model_type} has settings that are not handled, and a "
            f"model that ignored them could give other numbers: {listed}."
        )
    return Architecture(**{k: x for k, x in fields.items() if not k.startswith("_")})


def check_sizes(a: Architecture, stored: "Stored") -> None:
    """Raise before anything is built of a config.json that asks for more than its file can hold."""
    tensors = len(stored.names)
    counts = {"layers": a.num_layers, "decoder layers": a.num_decoder_layers, "experts": a.experts}
    for what, count in counts.items():
        if count is not None and count > tensors:
            raise ValueError(
                f"config.json asks for {count} {what}, the file has {tensors} tensors."
            )
    # A size that is only wrong shows in the shapes, an absurd one would be felt before.
    longest = max([2**20, *(n for name in stored.names for n in stored.shape(name))])
    for name in AXES:
        size = getattr(a, name) or 0
        if size > longest:
            raise ValueError(
                f"config.json asks for a {name} of {size}, no tensor of the file is so long."
            )


AXES = (
    *("vocab_size", "src_vocab_size", "embedding_dim", "d_model", "d_ff", "decoder_d_ff"),
    *("num_heads", "num_kv_heads", "decoder_num_heads", "head_dim", "t5_buckets", "token_types"),
    "max_seq_length",
)


def abstract(a: Architecture, model: Any) -> Any:
    """The model without memory: shapes in place of arrays."""

    def zeros(key, shape, fan_in, fan_out):
        return jnp.zeros(shape, jnp.float32)

    try:
        return eqx.filter_eval_shape(partial(build, a, model, zeros), jax.random.key(0))
    except ValueError as error:
        raise ValueError(f"config.json describes no model that can be built: {error}") from error


class Plan:
    """Which tensors of a file make which arrays of a model."""

    def __init__(self, family: Family, paths: Any, leaves: dict[str, Any], rules: list[Rule]):
        self.family = family
        self.paths = paths  # the model with the path of each array in its place
        self.leaves = leaves
        self.rules = rules

    @classmethod
    def of(cls, family: Family, model: Any, a: Architecture) -> "Plan":
        """The family's rules for the arrays that this model has, which is of the architecture `a`.

        Raises:
            ValueError: if it has an array that the family has no tensor for.
        """
        flat, structure = jax.tree_util.tree_flatten_with_path(eqx.filter(model, _is_array))
        names = [_name(path) for path, _ in flat]
        leaves = {name: leaf for name, (_, leaf) in zip(names, flat, strict=True)}
        layers = 1 + max(
            (int(n) for name in names for n in re.findall(r"layers\.(\d+)", name)), default=0
        )
        rules = []
        for rule in family.weights:
            if rule.when is not None and not rule.when(a):
                continue
            layered = any("{i}" in name for name in rule.ours)
            for i in range(layers if layered else 1):
                at = rule.at(i)
                if all(path in leaves for path in at.ours):
                    rules.append(at.expand(leaves[at.ours[0]].shape))
        uses = Counter(path for rule in rules for path in rule.ours)
        wrong = [path for path in names if uses[path] != 1]
        if wrong:
            raise ValueError(f"a {family.model_type} has no tensor for {', '.join(wrong[:5])}.")
        return cls(family, jax.tree_util.tree_unflatten(structure, names), leaves, rules)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the file and their shapes."""
        found: dict[str, tuple[int, ...]] = {}
        for rule in self.rules:
            shapes = tensor_shapes(rule, [self.leaves[path].shape for path in rule.ours])
            found |= dict(zip(rule.theirs, shapes, strict=True))
        return found

    def check(self, stored: Stored) -> None:
        """Raise one error with everything in which a file differs from what it should hold."""
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
            "not of floating point": [
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
        if lines:
            raise ValueError(
                f"the tensors in {stored.files.directory} are not those of this "
                f"{self.family.model_type}.\n" + "\n".join(lines)
            )


FLOATS = tuple(jnp.dtype(x) for x in ("float32", "bfloat16", "float16", "float64"))


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _name(path: tuple) -> str:
    """A path into a model as text: `decoder.layers.0.self_attention.wq`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def read_arrays(plan: Plan, stored: Stored, dtype: Any, sharding: Any) -> dict[str, jax.Array]:
    """The arrays of a model, read one tensor at a time and put where they belong."""
    names = [name for rule in plan.rules for name in rule.theirs]
    dtype = read_dtype(dtype, {stored.dtype(name) for name in names})
    arrays = {}
    for rule in plan.rules:
        tensors = [check_finite(name, stored.read(name)) for name in rule.theirs]
        made = to_ours(rule, tensors, [plan.leaves[path].shape for path in rule.ours])
        for path, x in zip(rule.ours, made, strict=True):
            x = x.astype(dtype, copy=False)
            place = sharding
            if callable(sharding):
                place = sharding(path, jax.ShapeDtypeStruct(x.shape, x.dtype))
            # One tensor at a time: what is copied must be there before the next is read.
            arrays[path] = jax.device_put(x, place).block_until_ready()
    return arrays


def read_dtype(dtype: Any, stored: set[Any]) -> Any:
    """The type that weights get: as asked, else that of the file (the widest, if it mixes them)."""
    if dtype is None:
        dtype = jnp.float32 if len(stored) > 1 else next(iter(stored))
    try:
        given, dtype = dtype, jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype must be a type such as jnp.bfloat16, got {dtype!r}.") from None
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be a floating-point type of 16 bits or more, got {given!r}.")
    return jax.dtypes.canonicalize_dtype(dtype)


def check_finite(name: str, x: np.ndarray) -> np.ndarray:
    """The tensor itself, or an error if it holds NaN or infinity."""
    flat, step = x.reshape(-1), 1 << 22
    if not all(np.isfinite(flat[i : i + step]).all() for i in range(0, flat.size, step)):
        raise ValueError(
            f"the tensor {name} holds numbers that are NaN or infinite: the file is damaged."
        )
    return x


def read_origin(
    directory: Path, config: Mapping[str, Any], family: Family, vocab_size: int
) -> Origin:
    """What a checkpoint says beside its weights."""
    path = directory / "generation_config.json"
    generation = read_json(path) if path.exists() else None
    special = read_special({**family.special, **config}, vocab_size, "config.json")
    if generation is not None:
        entries = {**family.special, **config, **generation}
        special = read_special(entries, vocab_size, "generation_config.json")
    return Origin(
        config=json.dumps(config),
        generation_config=None if generation is None else json.dumps(generation),
        directory=str(directory),
        special_tokens=special,
    )


def read_special(entries: Mapping[str, Any], vocab_size: int, where: str) -> SpecialTokens:
    """The special tokens among them; an id that the vocabulary does not have can never come up."""

    def ids(key: str) -> tuple[int, ...]:
        given = entries.get(key)
        given = given if isinstance(given, list) else [] if given is None else [given]
        if any(type(x) is not int for x in given):
            raise ValueError(f"{where}: {key} must be a token id or several, got {given!r:.80}.")
        return tuple(dict.fromkeys(x for x in given if 0 <= x < vocab_size))

    def one(key: str) -> int | None:
        return next(iter(ids(key)), None)

    start = one("decoder_start_token_id")
    words = entries.get("bad_words_ids")
    words = [] if words is None else words
    if not isinstance(words, list) or not all(
        isinstance(word, list) and word and all(type(x) is int for x in word) for word in words
    ):
        raise ValueError(
            f"{where}: bad_words_ids must be lists of token ids, as [[7], [8, 9]], got "
            f"{words!r:.80}."
        )
    return SpecialTokens(
        start=one("bos_token_id") if start is None else start,
        end=ids("eos_token_id"),
        pad=one("pad_token_id"),
        forced_first=one("forced_bos_token_id"),
        forced_last=one("forced_eos_token_id"),
        bad_words=tuple(tuple(word) for word in words if all(0 <= x < vocab_size for x in word)),
    )


def with_origin(model: Any, origin: Origin) -> Any:
    """The same model, which knows where it came from."""
    model = jax.tree.map(lambda x: x, model)
    object.__setattr__(model, "origin", origin)  # a fresh copy that nobody has seen yet
    return model


def save(model: Any, path: Any, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a model as a checkpoint; see `save_pretrained` of the models."""
    directory = Path(path)
    plan, config = describe_for_file(model)
    arrays = _by_path(model)
    dtypes = {str(array.dtype) for array in arrays.values()}
    if len(dtypes) > 1:
        raise ValueError(f"all arrays of a checkpoint must have one dtype, got {sorted(dtypes)}.")
    config["dtype" if "dtype" in config else "torch_dtype"] = dtypes.pop()
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory, _tensors(plan, arrays, config), max_shard_bytes)
    _write_json(directory / "config.json", config)
    if plan.family.shape != "encoder":
        origin = model.origin
        generation = "{}" if origin is None else origin.generation_config or "{}"
        _write_json(directory / "generation_config.json", json.loads(generation))
    _copy_tokenizer(model.origin, directory)


def _by_path(model: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(model, _is_array))
    return {_name(path): array for path, array in flat}


def _tensors(plan: Plan, arrays: Mapping[str, jax.Array], config: Mapping[str, Any]) -> list[tuple]:
    """For each tensor its name, shape, dtype, and a function that makes it."""
    shapes, listed = plan.shapes(), []
    family = plan.family
    bare = config.get("architectures") == [family.classes.get("base")]
    for rule in plan.rules:
        for j, name in enumerate(rule.theirs):

            def make(rule: Rule = rule, j: int = j) -> np.ndarray:
                return to_theirs(rule, [np.asarray(arrays[path]) for path in rule.ours])[j]

            written = name.removeprefix(family.prefix) if bare else name
            listed.append((written, shapes[name], arrays[rule.ours[0]].dtype, make))
    return listed


def _write_json(path: Path, entries: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _copy_tokenizer(origin: Origin | None, directory: Path) -> None:
    """Copy the tokenizer's files of the checkpoint that the model came from."""
    if origin is None or origin.directory is None:
        return
    source = Path(origin.directory)
    if not source.is_dir():
        warnings.warn(
            f"{source}, from where this model was loaded, is gone, and with it its tokenizer: copy "
            f"the tokenizer's files to {directory} yourself.",
            stacklevel=4,
        )
        return
    if source.resolve() == directory.resolve():
        return
    for file in (file for pattern in TOKENIZER_FILES for file in source.glob(pattern)):
        copy = directory / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


class Named:
    """The tensors of a model that is about to be written, as settings ask about them."""

    def __init__(self, plan: Plan):
        self.shapes = plan.shapes()

    def has(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def merge(self, copy: str, of: str) -> bool:
        return not self.has(copy)

    def choose(self, names: Sequence[str], name: str) -> None:
        pass  # they have their names already


def describe_for_file(model: Any) -> tuple[Plan, dict[str, Any]]:
    """The family that a model belongs to, as a plan for its arrays, and its config.json.

    A model from a checkpoint stays in its family. For another the families are tried in order: one
    fits if its config.json, when read again, describes this very model.
    """
    a = describe(model)
    check_described(a, model)
    if model.origin is not None:
        entries = json.loads(model.origin.config)
        return fit(family_of(entries), model, a, entries)
    reasons = []
    for family in FAMILIES.values():
        if family.shape == a.shape:
            try:
                return fit(family, model, a, {})
            except ValueError as error:
                reasons.append(f"{family.model_type}: {error}")
    raise ValueError(
        "this model is none that transformers knows, so that there is no checkpoint format for it. "
        "What stands against each family:\n" + "\n".join(reasons)
    )


def check_described(a: Architecture, model: Any) -> None:
    """Raise for a model with other arrays than its architecture calls for."""
    own, usual = (
        {path: array.shape for path, array in _by_path(x).items()}
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
) -> tuple[Plan, dict[str, Any]]:
    """A plan and a config.json for a model in this family.

    Raises:
        ValueError: if the family has no words for something in the model.
    """
    plan = Plan.of(family, model, a)
    named = Named(plan)
    if entries and not differences(family, entries, named, a):
        return plan, entries
    # The class's own special tokens are another vocabulary's.
    config = {**(entries or dict.fromkeys(family.special)), "model_type": family.model_type}
    for setting in family.settings:
        setting.write(a, config)
    config["architectures"] = [_class(a, family)]
    different = differences(family, config, named, a)
    if different:
        raise ValueError(f"it has no words for {', '.join(different)}.")
    return plan, config


def differences(
    family: Family, entries: Mapping[str, Any], tensors: Any, a: Architecture
) -> list[str]:
    """Where a config.json describes another architecture than this one; dropout does not count."""
    read = read_settings(family, entries, tensors)
    return [
        f"{field.name} = {getattr(a, field.name)!r} (it would be {getattr(read, field.name)!r})"
        for field in dataclasses.fields(a)
        if "dropout" not in field.name and getattr(a, field.name) != getattr(read, field.name)
    ]


def _class(a: Architecture, family: Family) -> str:
    """Which of the family's classes the model is."""
    role = "output" if a.output else "base"
    if a.labels is not None:
        role = "tokens" if a.classifier == "none" else "sequence"
        role = "pretraining" if a.output else role
        if role == "tokens" and a.classifier_transform is not None:
            role = "discriminator" if "discriminator" in family.classes else role
    if role not in family.classes:
        raise ValueError(f"it has no class for a model with the heads of {role!r}.")
    return family.classes[role]
