"""Writes after which there is either the old file or the new one, whenever the process ends."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO


def sync(file: BinaryIO) -> None:
    """Waits until the file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def replace_json(path: Path, content: Mapping[str, Any], indent: int = 2) -> None:
    """Writes a JSON file. After a crash there is either the old file or the new one."""
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write((json.dumps(content, indent=indent) + "\n").encode())
        sync(file)
    os.replace(new, path)
