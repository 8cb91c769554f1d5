"""Checks the files that are published: python tests/built_package.py BUILT DIRECT.

BUILT is a directory with a source distribution and the wheel that was built from it, and DIRECT one
with the wheel that was built from the clone in which this runs.
"""

import argparse
import subprocess
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

NOT_PUBLISHED = (".ci/run", ".ci/slow", ".ci/constraints.txt", ".pre-commit-config.yaml")


def check(built: Path, direct: Path) -> None:
    """Raises an error if a file is missing, or one too many."""
    command = ["git", "ls-files"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    committed = {name for name in run.stdout.splitlines() if not name.startswith(NOT_PUBLISHED)}
    source, wheel = files_of_source(built), files_of_wheel(built)
    same(source.keys(), committed | {"PKG-INFO"}, "the source distribution")
    package = {name for name in committed if name.startswith("jaxformers/")}
    info = {f"dist-info/{name}" for name in INFO}
    same(wheel.keys(), package | info, "the wheel")
    assert "jaxformers/py.typed" in wheel
    assert wheel == files_of_wheel(direct), "the wheels of the clone and of the source differ"
    assert wheel["dist-info/METADATA"] == source["PKG-INFO"]
    metadata = message_from_bytes(wheel["dist-info/METADATA"])
    assert metadata["License-Expression"] == "MIT"
    print(f"version {metadata['Version']}: {len(source)} files, of which {len(wheel)} in the wheel")


INFO = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")


def files_of_source(directory: Path) -> dict[str, bytes]:
    """Returns the files of the source distribution in a directory, by their paths in it."""
    [path] = directory.glob("*.tar.gz")
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.isfile()]
        return {m.name.partition("/")[2]: tar.extractfile(m).read() for m in members}


def files_of_wheel(directory: Path) -> dict[str, bytes]:
    """Returns the files of the wheel in a directory; paths of metadata lack name and version."""
    [path] = directory.glob("*.whl")
    version = path.name.split("-")[1]
    with zipfile.ZipFile(path) as file:
        return {n.removeprefix(f"jaxformers-{version}."): file.read(n) for n in file.namelist()}


def same(found, expected, where: str) -> None:
    """Raises an error if two sets of names differ."""
    missing, extra = sorted(expected - found), sorted(found - expected)
    assert not missing and not extra, f"{where} lacks {missing} and has {extra} in addition"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("built", type=Path)
    parser.add_argument("direct", type=Path)
    check(**vars(parser.parse_args()))
