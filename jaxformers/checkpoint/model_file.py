"""Models in safetensors files, one file each, which are never visible half-written.

The header of a file holds the structure of the model as JSON, and a digest of every byte. A file
contains no code, and reading it imports nothing that it names.
"""

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformers.checkpoint.construction import Decoder, Encoder
from jaxformers.checks import check_usable
from jaxformers.files.json_file import parse_json, shorten
from jaxformers.files.safetensors_file import (
    Stored,
    Unsaved,
    check_seal,
    read_header_and_metadata,
    read_tensor,
    write_sealed_file,
)
from jaxformers.paths import path_name
from jaxformers.placement import place_of, put, put_parts
from jaxformers.sharding.rules import Places

_FORMAT = "jaxformers 1"


def save(path: str | os.PathLike, model: Any) -> None:
    """Writes a model to one file, from which `load` builds it again.

    The file has the safetensors format, and its header describes the structure of the model. The
    file gets its name when it is complete, and an earlier file stays until then.

    Arguments:
        path: the file, such as "model.safetensors". Its directory is created if it does not exist.
        model: a model, a layer, a module of your own, or tuples, lists and dicts of these, with
            any arrays. An array that occurs at two places is stored once, and loaded as one array.

    Raises:
        ValueError: if a field cannot be saved, such as a lambda. The error names the field.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> save(path, model)
        >>> bool((load(path)(tokens) == model(tokens)).all())
        True
    """
    path = check_path(path)
    # An object that contains itself or is nested too deeply has no leaves. Encoding it raises the
    # error that says so.
    with contextlib.suppress(RecursionError, SystemError):
        check_usable(model=model)
    if path.is_dir():
        raise ValueError(f"{path} is a directory. Pass the file, such as {path}/model.safetensors.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_object(path, model)


def check_path(path: Any) -> Path:
    """Returns a path as a `Path`.

    Raises:
        ValueError: if it is empty or no path.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"path must be that of a file, got {path!r:.200}.")
    return Path(path)


class SavedState(dict[str, Any]):
    """The state of a training at a step, with the text of `describe_model` for its model."""

    model: str

    def __init__(self, step: int, leaves: dict[str, Any], model: str):
        super().__init__(step=step, leaves=leaves)
        self.model = model


def write_object(path: Path, x: Any, notes: Mapping[str, Any] | None = None) -> None:
    """Writes an object to a temporary file, and renames the file when it is safely on the disk.

    Notes are numbers and text that the file holds beside the object. `read_notes` returns them.
    """
    texts = {"format": _FORMAT} | ({} if notes is None else {"notes": json.dumps(dict(notes))})
    if isinstance(x, SavedState):
        x, texts["model"] = dict(x), x.model
    encoder = Encoder()
    try:
        text = json.dumps({"object": encoder.encode(x)}, separators=(",", ":"))
    except RecursionError as error:
        raise ValueError("what is to be saved is nested too deeply.") from error
    parse_json(text.encode(), "what is to be saved")  # raises now what reading would raise
    tensors = [
        Unsaved(name, tuple(x.shape), np.dtype(x.dtype), partial(np.asarray, x))
        for name, x in encoder.arrays.items()
    ]
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        write_sealed_file(temporary, tensors, texts | {"construction": text})
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} cannot be written: {error.strerror or error}. What was there before is as it "
            "was; make room, or pass a place that can be written to",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_notes(path: Path) -> dict[str, Any]:
    """Returns the notes in a file of `write_object`, an empty dict if it has none.

    Raises:
        ValueError: if the file does not exist or cannot be read.
    """
    _, metadata = read_header_and_metadata(path)
    return parse_json(metadata.get("notes", "{}").encode(), f"the notes in {path}")


def _sync_directory(directory: Path) -> None:
    """Writes a directory to the disk, with the new names of its files."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_object(path: Path, known: Iterable[Any] = (), sharding: Any = None) -> Any:
    """Returns the object in a file of `write_object`; arguments and errors are those of `load`."""
    tensors, described, _ = read_description(path)
    used: set[str] = set()

    def read(name: str, kind: str) -> Any:
        if name not in tensors:
            raise ValueError(f"the tensor {shorten(name)} is missing")
        used.add(name)
        return read_array(name, tensors[name], kind, sharding)

    try:
        if isinstance(sharding, Mesh):
            sharding = _places(tensors, described, known, sharding)
        made = Decoder(read, known).decode(described)
        surplus = sorted(tensors.keys() - used)
        if surplus:
            raise ValueError(f"the tensors {', '.join(map(shorten, surplus[:5]))} belong nowhere.")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return made


def _places(
    tensors: Mapping[str, Stored], described: Any, known: Iterable[Any], mesh: Mesh
) -> Callable[[str, Any], Any]:
    """Returns the function from the name of a tensor to its place in the layout of the model."""
    shapes: dict[str, jax.ShapeDtypeStruct] = {}

    def outline(name: str, kind: str) -> jax.ShapeDtypeStruct:
        stored = tensors.get(name)
        if stored is None:
            raise ValueError(f"the tensor {shorten(name)} is missing")
        return shapes.setdefault(name, jax.ShapeDtypeStruct(stored.shape, stored.dtype))

    model = Decoder(outline, known).decode(described)
    names = {id(shape): name for name, shape in shapes.items()}
    places = Places(model, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(model)
    found = {names[id(x)]: places(path_name(path), x) for path, x in leaves if id(x) in names}
    # An array that is no leaf, in a static field, lies on every device.
    return lambda name, shape: found.get(name, NamedSharding(places.mesh, PartitionSpec()))


def read_description(path: Path) -> tuple[dict[str, Stored], Any, str | None]:
    """Returns the tensors of a file, the JSON of its object, and the description of its model.

    Raises:
        ValueError: if the file does not exist, is damaged, or is no file of `save`.
    """
    tensors, metadata = read_header_and_metadata(path)
    form = metadata.get("format")
    if isinstance(form, str) and re.fullmatch(r"jaxformers \d+", form) and form != _FORMAT:
        raise ValueError(
            f"{path} has the format {form!r}, this version of jaxformers reads {_FORMAT!r}. The "
            "file is of a newer version: load it with that one."
        )
    if form != _FORMAT or "construction" not in metadata:
        raise ValueError(
            f"{path} is a safetensors file, but not one of jaxformers.save ({_FORMAT!r}): its "
            f"metadata are {shorten(metadata)}. A checkpoint of Hugging Face is loaded by "
            "from_pretrained(directory)."
        )
    check_seal(path)
    construction = parse_json(metadata["construction"].encode(), f"the construction in {path}")
    if construction.keys() != {"object"}:
        raise ValueError(f"{path} must describe one object, got {shorten(construction)}.")
    return tensors, construction["object"], metadata.get("model")


def read_array(name: str, stored: Stored, kind: str, sharding: Any, dtype: Any = None) -> Any:
    """Returns a tensor as an array of the kind that was saved.

    Arguments:
        name: its path in the model, for errors and for `sharding`.
        stored: the tensor in the file.
        kind: "jax", "numpy", "scalar" or "key <implementation>".
        sharding: the placement, as for `load`.
        dtype: the dtype of a JAX array. None is the dtype in the file.
    """
    if kind == "numpy":
        return read_tensor(stored)
    if kind == "scalar" and stored.shape == ():
        return read_tensor(stored)[()]
    if kind == "jax":
        if jax.dtypes.canonicalize_dtype(stored.dtype) != stored.dtype:
            raise ValueError(
                f"{name} has the dtype {stored.dtype}, which needs "
                "jax.config.update('jax_enable_x64', True)."
            )
        dtype = stored.dtype if dtype is None else dtype
        place = place_of(name, jax.ShapeDtypeStruct(stored.shape, dtype), sharding)
        if isinstance(place, NamedSharding) and not place.is_fully_replicated:
            return put_parts(name, stored.view(), dtype, place, lambda x: x.astype(dtype))
        return put(name, read_tensor(stored).astype(dtype, copy=False), place)
    if kind.startswith("key ") and stored.dtype == np.uint32:
        try:
            data = put(name, read_tensor(stored), sharding)
            return jax.random.wrap_key_data(data, impl=kind.removeprefix("key "))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{shorten(name)} holds no PRNG keys: {error}") from error
    raise ValueError(
        f"{shorten(name)} is to be {shorten(kind)}, but it is {stored.dtype} {stored.shape}."
    )
