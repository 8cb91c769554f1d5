"""Reads adapters of PEFT: adapter_config.json and adapter_model.safetensors."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.adapters.kinds import Dora, Replaced
from jaxformers.adapters.lora import check_adapter_name, check_new, without_adapters
from jaxformers.adapters.modules import Modules, split_a, split_b, split_magnitude
from jaxformers.adapters.peft_config import CONFIG, EVERYWHERE, AdapterConfig
from jaxformers.checks import check_positive, check_usable
from jaxformers.files.hub import locate
from jaxformers.files.json_file import shorten
from jaxformers.files.safetensors_file import FileTensor, read_header
from jaxformers.files.torch_file import read_torch_file
from jaxformers.hf.arrays import check_finite
from jaxformers.hf.layouts import to_ours, to_theirs
from jaxformers.layer_stack import ScannedLayers, scan_layers, unroll_layers
from jaxformers.paths import path_name
from jaxformers.precision import FLOATS
from jaxformers.weights import LowRank, is_object, merge

Model = TypeVar("Model")

WEIGHTS, TORCH_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
PATTERNS = (CONFIG, WEIGHTS, TORCH_WEIGHTS)

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?P<part>A|B|embedding_A|embedding_B|"
    r"magnitude_vector)(\.weight)?"
)


def load_adapter(
    model: Model, path: str | os.PathLike, *, name: str = "default", scale: float = 1.0
) -> Model:
    """Returns the model with an adapter of PEFT.

    The low-rank changes become `LowRank` weights, or `Dora` ones where the adapter has magnitudes.
    Modules that it saves whole, and biases, become `Replaced` weights. One matrix of PEFT may be
    several weights here, such as `c_attn` of GPT-2; each of them gets a copy of its `a`.

    Arguments:
        model: the model that the adapter was made for. It may have adapters of other names already.
        path: a directory with adapter_config.json and adapter_model.safetensors, or a name on the
            hub.
        name: the name of the adapter in the model, "default".
        scale: factor on the low-rank changes, beside that of the file. Arrays that the adapter
            saves whole are taken as they are.

    Raises:
        ValueError: if there is no adapter, a file is damaged, the adapter does not fit the model,
            its settings have a meaning that is not handled, or it differs from layer to layer and
            the model's layers are scanned.
        ImportError: if the `safetensors` package is missing.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> options = {"learnable_pos": True, "tie_embeddings": True, "embedding_scale": 1.0}
        >>> model = TransformerLM(65, 16, 2, 1, 32, 32, 0.0, **options, key=key)  # as GPT-2 is
        >>> save_adapter(lora(model, rank=4, key=key), directory)
        >>> load_adapter(model, directory, name="fr").decoder.layers[0].self_attention.wq.name
        'fr'
    """
    check_usable(model=model)
    check_positive(scale=scale)
    check_adapter_name(name)
    directory = locate(path, [*PATTERNS])
    if not (directory / CONFIG).is_file():
        raise ValueError(
            f"{directory} has no {CONFIG}: an adapter is a directory with {CONFIG} and {WEIGHTS}."
        )
    config = AdapterConfig.read(directory)
    unrolled = unroll_layers(model)
    found = _Found.of(directory, Modules.of(unrolled), config)
    found.check_bases(unrolled)
    changes = found.low_rank(name, scale) | found.whole(name)
    changed = _changed(unrolled, changes, name)
    is_scanned = any(isinstance(x, ScannedLayers) for x in _stacks(model))
    if not is_scanned:
        return changed
    try:
        return scan_layers(changed)
    except ValueError as error:
        raise ValueError(
            f"the adapter in {directory} differs from layer to layer, and the layers of this model "
            "are scanned. Load it on unroll_layers(model)."
        ) from error


def _stacks(model: Any) -> list[Any]:
    return jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, ScannedLayers))


@dataclass
class _Found:
    """The tensors of an adapter, by the modules and the tensors of the model that they are for."""

    where: Path
    modules: Modules
    config: AdapterConfig
    parts: dict[str, dict[str, FileTensor]] = field(default_factory=dict)
    tensors: dict[str, FileTensor] = field(default_factory=dict)
    bases: dict[str, FileTensor] = field(default_factory=dict)
    lacking: str = ""  # the beginning of the table's names that the adapter's names lack

    @classmethod
    def of(cls, directory: Path, modules: Modules, config: AdapterConfig) -> "_Found":
        """Returns the tensors, after a check that they are just those that the settings call for.

        Raises:
            ValueError: with all differences.
        """
        found = cls(directory, modules, config)
        maps, unknown = modules.maps(), []
        known = modules.plan.shapes()
        for name, tensor in _read_tensors(directory).items():
            matched = _TENSOR.fullmatch(name)
            own = matched["module"] if matched else _tensor_name(name)
            own = found._own_name(own, maps if matched else known)
            if own is None:
                unknown.append(name)
            elif name.endswith(".base_layer.weight"):
                found.bases[own] = tensor
            elif matched:
                part = matched["part"].removeprefix("embedding_")
                found.parts.setdefault(own, {})[part] = tensor
            else:
                found.tensors[own] = tensor
        found._check(unknown)
        return found

    def _own_name(self, name: str, known: Mapping[str, Any]) -> str | None:
        """Returns a name of the table, whose names may have a prefix that the adapter's lack."""
        family = self.modules.family
        longer = f"{family.prefix}{name}"
        names: tuple[str, ...] = (name, longer, name.removeprefix(family.prefix))
        twice = [*family.copies, *((y, x) for x, y in family.repeats), *family.repeats]
        names = (*names, *(of for copy, of in twice if copy in names))
        own = next((x for x in names if x in known or x == self.modules.tied_output), None)
        if own == longer != name:
            self.lacking = family.prefix
        return own

    def _check(self, unknown: list[str]) -> None:
        config, modules = self.config, self.modules
        maps = modules.maps()
        targets = {name for name in maps if config.targets(name.removeprefix(self.lacking))}
        biases = {f"{x}.bias" for x in self.parts} if config.bias == "lora_only" else set()
        faults = {
            "for modules that this model does not have": unknown,
            "for modules that target_modules does not name": sorted(self.parts.keys() - targets),
            "missing for modules that target_modules names": sorted(
                set() if config.target_modules == EVERYWHERE else targets - self.parts.keys()
            ),
            "missing for modules_to_save": self._unsaved(),
            "neither in modules_to_save nor a bias that is trained": [
                name
                for name in self.tensors
                if not config.saves(name)
                and not (config.bias == "all" and "bias" in name or name in biases)
            ],
            "without the other half": [
                name for name, parts in self.parts.items() if not {"A", "B"} <= parts.keys()
            ],
            "with magnitudes where use_dora is false, or without where it is true": [
                name
                for name, parts in self.parts.items()
                if ("magnitude_vector" in parts) != config.use_dora
            ],
            "for a table that the output layer shares here": self._shared(),
            "of another shape": [*self._misfits()],
        }
        lines = [
            f"{len(names)} {what}: {', '.join(map(shorten, names[:8]))}"
            f"{' ...' if len(names) > 8 else ''}"
            for what, names in faults.items()
            if names
        ]
        if not lines and not self.parts and not self.tensors:
            lines = ["There are no tensors."]
        if any("classifier" in x or "score" in x for x in unknown):
            lines.append(
                "If the adapter has a classifier, the model needs one: from_pretrained(..., "
                "num_labels=N)."
            )
        if lines:
            raise ValueError(
                f"the tensors of the adapter in {self.where} are not those that its {CONFIG} "
                f"describes for this {modules.family.model_type}.\n" + "\n".join(lines)
            )

    def _unsaved(self) -> list[str]:
        """Returns the modules to save that the model has and the file does not."""
        known = [*self.modules.plan.shapes(), *filter(None, [self.modules.tied_output])]
        missing = []
        for module in self.config.modules_to_save:
            alone = self.config._replace(modules_to_save=(module,))
            names = [name for name in known if alone.saves(name)]
            if names and not any(name in self.tensors for name in names):
                missing.append(module)
        return missing

    def _shared(self) -> list[str]:
        """Returns the tables that an adapter changes, and with them the output layer, unlike PEFT.

        An adapter that has the output layer too, or says that both stay one, is meant so.
        """
        tied = self.modules.tied_output
        if tied is None:
            return []
        meant = self.config.ensure_weight_tying or tied in self.tensors
        names = [*self.parts, *(() if meant else (x.removesuffix(".weight") for x in self.tensors))]
        return [x for x in names if x in self.modules.token_tables]

    def _misfits(self) -> Any:
        maps = self.modules.maps()
        for name, parts in self.parts.items():
            r, (width, out) = self.config.rank(name), self.modules.matrix(maps[name])
            wanted = {"A": (r, width), "B": (out, r), "magnitude_vector": (out,)}
            for part, tensor in parts.items():
                yield from _misfit(f"{name} {part}", tensor, wanted[part])
        for name, tensor in self.tensors.items():
            yield from _misfit(name, tensor, self.modules.shape_of(name))

    def check_bases(self, model: Any) -> None:
        """Checks copies of tables, which PEFT saves beside their adapters, against the model.

        Raises:
            ValueError: if one differs.
        """
        leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_object)
        arrays = {path_name(path): without_adapters(x) for path, x in leaves}
        for name, tensor in self.bases.items():
            rule = self.modules.rule_of(name)
            ours = [merge(arrays[path]) for path in rule.ours] if rule is not None else []
            theirs = to_theirs(rule, [np.asarray(x, np.float32) for x in ours]) if rule else []
            if len(theirs) != 1 or not np.array_equal(_numbers(name, tensor), theirs[0]):
                raise ValueError(
                    f"the adapter was made for another model: {name} differs. Put it on that one."
                )

    def low_rank(self, name: str, scale: float) -> dict[str, Any]:
        """Returns functions `weight -> object` by path, for the low-rank changes."""
        changes: dict[str, Any] = {}
        maps = self.modules.maps()
        for rule in {maps[module].ours: maps[module] for module in self.parts}.values():
            modules = [x.removesuffix(".weight") for x in rule.theirs]
            missing = [x for x in modules if x not in self.parts]
            scales = {self.config.scale(x) for x in modules}
            if missing or len(scales) > 1:
                raise ValueError(
                    f"the experts of {', '.join(rule.ours)} must all have an adapter of one scale, "
                    f"got {len(modules) - len(missing)} of {len(modules)} and the scales {scales}."
                )
            shapes = self.modules.shapes(rule)
            read = {
                part: [_numbers(x, self.parts[x][part]) for x in modules]
                for part in self.parts[modules[0]]
            }
            a, b = split_a(rule, shapes, read["A"]), split_b(rule, shapes, read["B"])
            m: list[Any] = [None] * len(a)
            if "magnitude_vector" in read:
                m = split_magnitude(rule, shapes, read["magnitude_vector"])
            (factor,) = scales
            for path, *arrays in zip(rule.ours, a, b, m, strict=True):
                changes[path] = _low_rank_change(arrays, scale * factor, name)
        return changes

    def whole(self, name: str) -> dict[str, Any]:
        """Returns functions `array -> object` by path, for arrays that are saved whole."""
        found: dict[str, np.ndarray] = {}
        rules = [self.modules.rule_of(tensor) for tensor in self.tensors]
        for rule in {rule.ours: rule for rule in rules if rule is not None}.values():
            missing = [x for x in rule.theirs if x not in self.tensors]
            if missing:
                raise ValueError(
                    f"the adapter has tensors of {', '.join(rule.ours)} without the others: "
                    f"{', '.join(missing)}. Save it again."
                )
            tensors = [_numbers(x, self.tensors[x]) for x in rule.theirs]
            arrays = to_ours(rule, tensors, self.modules.shapes(rule))
            found |= dict(zip(rule.ours, arrays, strict=True))
        tied = self.modules.tied_output
        if tied in self.tensors:
            output = _numbers(tied, self.tensors[tied])
            tables = [self.tensors.get(f"{x}.weight") for x in self.modules.token_tables]
            if not any(x is not None and np.array_equal(x.read(), output) for x in tables):
                found["output.w"] = output.T  # it gets weights of its own
        return {path: _replacement(x, name) for path, x in found.items()}


def _replacement(x: np.ndarray, name: str) -> Any:
    return lambda base: Replaced(base, jnp.array(x), name)


def _low_rank_change(arrays: list[Any], scale: float, name: str) -> Any:
    a, b, *m = (jnp.array(x) for x in arrays if x is not None)
    if not m:
        return lambda base: LowRank(base, a, b, scale, name)
    return lambda base: Dora(base, a, b, m[0], scale, name)


def _changed(model: Model, changes: dict[str, Any], name: str) -> Model:
    """Returns the model with objects at the paths that have a change."""
    left = dict(changes)

    def change(path: tuple, x: Any) -> Any:
        make = left.pop(path_name(path), None)
        if make is None:
            return x
        check_new(path_name(path), x, name)
        return make(x)

    changed = jax.tree_util.tree_map_with_path(change, model, is_leaf=is_object)
    if "output.w" in left:  # the layer shares the table: it gets weights of its own
        make = left.pop("output.w")
        at = lambda m: m.output.w  # noqa: E731
        changed = eqx.tree_at(at, changed, make(None), is_leaf=lambda x: x is None)
    return changed


def _read_tensors(directory: Path) -> Mapping[str, FileTensor]:
    if (directory / WEIGHTS).exists():
        return read_header(directory / WEIGHTS)
    if (directory / TORCH_WEIGHTS).exists():
        return read_torch_file(directory / TORCH_WEIGHTS)
    raise ValueError(f"{directory} has a {CONFIG} and no {WEIGHTS}.")


def _tensor_name(name: str) -> str:
    """Returns the name of a tensor that is saved whole, without what PEFT adds to it."""
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.(base_layer|modules_to_save|original_module)\.", ".", name)


def _misfit(name: str, tensor: FileTensor, shape: tuple[int, ...]) -> list[str]:
    if tensor.dtype not in FLOATS:
        return [f"{name} is of {tensor.dtype}"]
    return [] if tensor.shape == shape else [f"{name} {tensor.shape} for {shape}"]


def _numbers(name: str, tensor: FileTensor) -> np.ndarray:
    return check_finite(name, tensor.read()).astype(np.float32)
