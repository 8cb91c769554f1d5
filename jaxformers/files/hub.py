"""The files of a checkpoint: finding them, and reading and writing their tensors one by one.

A directory has model.safetensors, or several such files (shards) with an index that says which
tensor is in which shard. If it has neither, pytorch_model.bin is read, or its shards with their
index. Those are pickles: their tensors are read, and no code in them is run.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxformers.checks import check_size
from jaxformers.files.found import describe_directory, describe_file, describe_hub, list_names
from jaxformers.files.json_file import read_json as read_json
from jaxformers.files.json_file import shorten
from jaxformers.files.safetensors_file import (
    NAMES,
    FileTensor,
    Stored,
    Unsaved,
    read_header,
    write_file,
)
from jaxformers.files.torch_file import TorchTensor, read_torch_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_SINGLE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

# A checkpoint has at least one of these files.
WEIGHTS = (SINGLE, INDEX, TORCH_SINGLE, TORCH_INDEX)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_SHARD_NAME = r"\w[\w .+-]*"
_WRITTEN_HERE = re.compile(
    r"model(-b)?-\d{5,}-of-\d{5,}\.safetensors|model\.safetensors(\.index\.json)?"
)

_T = TypeVar("_T", Stored, TorchTensor)


def locate(path_or_hub_name: str | os.PathLike, patterns: Sequence[str]) -> Path:
    """Returns the directory of a checkpoint, downloaded if it is a name on the Hugging Face hub.

    Arguments:
        path_or_hub_name: a directory, or "owner/name". An existing directory of that name is
            preferred. An argument that can only be a path (a `Path`, "./name", "a/b/c") is not
            looked up on the hub.
        patterns: the files to download, such as `["*.json", "model*.safetensors"]`.

    Raises:
        ValueError: if there is no such directory, or the download from the hub fails.
        ImportError: if the hub is needed and `huggingface_hub` is missing.

    Example:
        >>> locate(".", ["*.json"]).is_dir()
        True
    """
    if not isinstance(path_or_hub_name, str | os.PathLike):
        raise ValueError(
            f"a checkpoint must be a directory or a name on the hub, got {path_or_hub_name!r:.80}."
        )
    path = Path(path_or_hub_name).expanduser()
    if os.path.isdir(path) and path_or_hub_name != "":  # "" would be the current directory
        return path
    if os.path.isfile(path):
        hint = f" {describe_file(path)}".rstrip()
        raise ValueError(f"{path} is a file. Pass the directory in which config.json lies.{hint}")
    if path.suffix == ".gguf" and len(path.parts) != 2:
        raise ValueError(
            f"there is no file {shorten(os.fspath(path))} (as seen from {Path.cwd()}). A file on "
            "the hub is fetched with `hf download owner/name file.gguf --local-dir .`."
        )
    if not (isinstance(path_or_hub_name, str) and _HUB_NAME.fullmatch(path_or_hub_name)):
        raise ValueError(
            f"there is no directory {shorten(os.fspath(path))} (as seen from {Path.cwd()}). Pass "
            "one with config.json and model.safetensors, or a name on the hub like 'owner/name'."
        )
    return _fetch(path_or_hub_name, list(patterns))


def _fetch(name: str, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"there is no directory {name!r}, and fetching it from the Hugging Face hub needs "
            "huggingface_hub: pip install 'jaxformers[hf]'."
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the errors have no common class
        raise ValueError(
            f"there is no directory {name!r} (as seen from {Path.cwd()}), and the Hugging Face hub "
            f"did not give it: {type(error).__name__}: {error}\nCheck the name; log in with `hf "
            "auth login` if it is gated or private; without a connection, download it elsewhere "
            "and pass its directory."
        ) from error


def has_safetensors(directory: Path) -> bool:
    """Returns whether the tensors of a checkpoint exist as safetensors."""
    return (directory / SINGLE).exists() or (directory / INDEX).exists()


def check_there(path_or_hub_name: str | os.PathLike, directory: Path) -> None:
    """Raises an error if a directory from `locate` is not a checkpoint, and describes its files.

    Raises:
        ValueError: if there is no config.json, or there are no weights.
    """
    there = any((directory / name).exists() for name in WEIGHTS)
    if there and (directory / "config.json").exists():
        return
    is_path = os.path.isdir(Path(path_or_hub_name).expanduser())
    # From a repository on the hub only the useful files were downloaded.
    found = describe_directory(directory) if is_path else describe_hub(os.fspath(path_or_hub_name))
    if (directory / "config.json").exists():
        raise ValueError(_without_weights(directory, found))
    hint = "Weights are there: copy their config.json from where they came." if there else found
    raise ValueError(f"{directory / 'config.json'} is missing. {hint}".strip())


def _without_weights(directory: Path, found: str) -> str:
    return f"{directory} has no {SINGLE} and no {INDEX}. {found}".strip()


class TensorFiles:
    """The tensors of a checkpoint. Opening it reads and checks only the headers.

    Arguments:
        directory: the directory with model.safetensors, or model.safetensors.index.json and its
            shards; or else pytorch_model.bin, or pytorch_model.bin.index.json and its shards.
        complete: whether each tensor in an index must exist, True by default. If False, `lacking`
            has the missing ones, each with the shard that the index names.

    Raises:
        ValueError: if a file is missing or damaged, a pickle holds more than tensors, or the files
            contradict each other.
        ImportError: if the `safetensors` package is missing.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> w = jnp.ones((2, 3), jnp.bfloat16)
        >>> write_tensors(directory, [("w", w.shape, w.dtype, lambda: w)])
        >>> files = TensorFiles(directory)
        >>> files.names, files.shape("w"), files.dtype("w")
        (['w'], (2, 3), dtype(bfloat16))
        >>> bool((files.read("w") == w).all())
        True
    """

    directory: Path
    lacking: dict[str, str]
    _tensors: Mapping[str, FileTensor]

    def __init__(self, directory: str | os.PathLike, complete: bool = True):
        self.directory = Path(directory)
        self.lacking = {}
        if not self.directory.is_dir():
            raise ValueError(f"there is no directory {self.directory}.")
        # This is the order of transformers: a single file is preferred to an index beside it.
        if (self.directory / SINGLE).exists():
            self._tensors = read_header(self.directory / SINGLE)
        elif (self.directory / INDEX).exists():
            self._tensors = self._read_shards(INDEX, ".safetensors", read_header, complete)
        elif (self.directory / TORCH_SINGLE).exists():
            self._tensors = read_torch_file(self.directory / TORCH_SINGLE)
        elif (self.directory / TORCH_INDEX).exists():
            self._tensors = self._read_shards(TORCH_INDEX, ".bin", read_torch_file, complete)
        else:
            raise ValueError(_without_weights(self.directory, describe_directory(self.directory)))

    @classmethod
    def of(cls, directory: Path, tensors: Mapping[str, FileTensor]) -> "TensorFiles":
        """Returns tensors of another format by name; `directory` is where they are."""
        files = cls.__new__(cls)
        files.directory, files.lacking, files._tensors = directory, {}, tensors
        return files

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        """The names of all tensors, in their order in the files."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self.find(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of a tensor, which may also be an integer or an 8-bit float."""
        return self.find(name).dtype

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, in memory that `jax.device_put` takes over on a CPU without a copy."""
        return self.find(name).read()

    def _read_shards(
        self, index: str, ending: str, read: Callable[[Path], dict[str, _T]], complete: bool
    ) -> dict[str, _T]:
        """Returns the tensors of all shards, after a check that each has those in the index."""
        listed = _read_index(self.directory / index, ending)
        there = (self.directory / shard for shard in listed)
        found = {path.name: read(path) for path in there if complete or path.exists()}
        everything = {name for tensors in found.values() for name in tensors}
        for shard, tensors in found.items():
            missing, surplus = listed[shard] - tensors.keys(), tensors.keys() - listed[shard]
            if surplus or missing & everything or (complete and missing):
                raise ValueError(
                    f"{self.directory / shard} does not hold the tensors that {index} lists: "
                    f"missing {list_names(missing)}; not listed for this file "
                    f"{list_names(surplus)}. Download or save the checkpoint again."
                )
        for shard, names in listed.items():
            self.lacking |= dict.fromkeys(sorted(names - everything), shard)
        return {name: x for tensors in found.values() for name, x in tensors.items()}

    def find(self, name: str) -> FileTensor:
        """Returns a tensor, which is not read yet."""
        if name not in self._tensors:
            close = difflib.get_close_matches(name, self._tensors, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{self.directory} has no tensor {shorten(name)}.{hint}")
        return self._tensors[name]


def _read_index(path: Path, ending: str) -> dict[str, set[str]]:
    """Returns the shards in an index, sorted, with the tensors that each must have."""
    weight_map = read_json(path).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise ValueError(f"{path} must have a 'weight_map', an object from tensors to files.")
    names: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        # Links are followed, since the hub's cache consists of them. Paths are not.
        if not (isinstance(shard, str) and re.fullmatch(_SHARD_NAME + re.escape(ending), shard)):
            raise ValueError(
                f"{path}: tensor {shorten(name)} must be in a {ending} file beside the index, "
                f"named without a folder, got {shorten(shard)}."
            )
        names.setdefault(shard, set()).add(name)
    return dict(sorted(names.items()))


def write_tensors(
    directory: str | os.PathLike,
    tensors: Iterable[tuple[str, Sequence[int], Any, Callable[[], Any]]],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes model.safetensors, or shards with an index, with one tensor in memory at a time.

    The files get their names when all are complete, and only then the files of an earlier save are
    removed. After a crash at any point the directory has one whole checkpoint, the old or the new.

    Arguments:
        directory: the directory, which is made if it does not exist.
        tensors: for each tensor its name, shape and dtype, and a function that makes it just before
            it is written.
        max_shard_bytes: the largest size of a file, default 5 GB. A larger tensor gets a file of
            its own.

    Raises:
        ValueError: if there are no tensors, a name comes twice, safetensors does not have a dtype,
            or a function makes a tensor of another shape or dtype.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> w = jnp.ones((2, 3))
        >>> write_tensors(directory, [(name, w.shape, w.dtype, lambda: w) for name in "abc"], 48)
        >>> sorted(os.listdir(directory))[:2]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    check_size(max_shard_bytes=max_shard_bytes)
    shards = _split(tensors, max_shard_bytes)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = dict(zip(_file_names(directory, len(shards)), shards, strict=True))
    # The index is renamed last. Until then the old one is valid.
    names = [*files, INDEX] if len(files) > 1 else [*files]
    try:
        for name, shard in files.items():
            write_file(directory / f"{name}.tmp", shard)
        if len(files) > 1:
            _write_index(directory / f"{INDEX}.tmp", files)
        for name in names:
            os.replace(directory / f"{name}.tmp", directory / name)
    finally:
        for name in names:
            (directory / f"{name}.tmp").unlink(missing_ok=True)
    for name in os.listdir(directory):
        if _WRITTEN_HERE.fullmatch(name.removesuffix(".tmp")) and name not in names:
            (directory / name).unlink()


def _split(tensors: Iterable[tuple], max_shard_bytes: int) -> list[list[Unsaved]]:
    """Returns the tensors of each file, in the order given."""
    shards: list[list[Unsaved]] = []
    names: set[str] = set()
    size = 0
    for name, shape, dtype, make in tensors:
        tensor = Unsaved(name, tuple(shape), np.dtype(dtype), make)
        if tensor.dtype not in NAMES:
            raise ValueError(f"tensor {name!r}: safetensors has no dtype {tensor.dtype}. Cast it.")
        if name in names or name == "__metadata__":
            raise ValueError(f"the name {name!r} is taken: give every tensor its own.")
        names.add(name)
        size += tensor.size
        if not shards or size > max_shard_bytes:
            shards.append([])
            size = tensor.size
        shards[-1].append(tensor)
    if not shards:
        raise ValueError("there must be at least one tensor to write.")
    return shards


def _file_names(directory: Path, count: int) -> list[str]:
    """Returns names for the files that differ from those in an old index of the directory."""
    if count == 1:
        return [SINGLE]
    index = directory / INDEX
    taken = index.is_file() and b'"model-0' in index.read_bytes()
    stem = "model-b" if taken else "model"
    return [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _write_index(path: Path, shards: dict[str, list[Unsaved]]) -> None:
    weight_map = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    size = sum(tensor.size for shard in shards.values() for tensor in shard)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    with path.open("w") as file:
        file.write(json.dumps(index, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
