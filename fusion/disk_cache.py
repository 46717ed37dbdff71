"""Measurements on disk: one small JSON file for each, so that processes can share the folder without locks.

The folder is `$FUSION_CACHE_DIR`, or `fusion` in `$XDG_CACHE_HOME` or `~/.cache`. A file is written whole and then
renamed into place. Nothing read from it is executed.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fusion.planner.match import BlockShape

if TYPE_CHECKING:
    from _typeshed import DataclassInstance as Key

Value = TypeVar("Value")


@dataclass(frozen=True)
class GpuKey:
    """What the measurement of a GPU depends on."""

    device: str
    torch: str


@dataclass(frozen=True)
class BlockKey:
    """What the measurement of a block depends on. `kernel_hash` is that of the kernels' sources."""

    device: str
    triton: str
    kernel_hash: str
    shape: BlockShape


@dataclass(frozen=True)
class Entries:
    """Entries of one kind, in a folder of their own.

    `what` names an entry and `again` what happens without it, for warnings. Entries of another `format` are not read.
    """

    folder: str
    format: int
    what: str
    again: str

    def path(self, key: "Key") -> Path:
        """The file of a key, a dataclass of what the measurement depends on; it may not exist."""
        text = json.dumps(asdict(key), sort_keys=True)
        return cache_folder() / self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def load(self, key: "Key", parse: Callable[[dict], Value]) -> Value | None:
        """What `parse` makes of the entry of a key; None if there is none.

        A file that cannot be used (corrupt, of another format, for another key) gives one warning and None.
        """
        path = self.path(key)
        try:
            entry = json.loads(path.read_text())
            if entry["format"] != self.format:
                raise ValueError(f"format {entry['format']!r}, this version of fusion reads {self.format}")
            if entry["key"] != json.loads(json.dumps(asdict(key))):
                raise ValueError("it belongs to something else")
            return parse(entry)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"the {self.what} in {path} cannot be used ({type(error).__name__}: {error}); {self.again} and "
                "replacing it",
                stacklevel=3,
            )
            return None

    def store(self, key: "Key", value: Mapping[str, object]) -> None:
        """Remember a value for a key. Warns, and goes on, if the folder cannot be written."""
        path = self.path(key)
        entry = {"format": self.format, "key": asdict(key), **value}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
                json.dump(entry, file, indent=1)
            os.replace(file.name, path)
        except OSError as error:
            warnings.warn(
                f"the {self.what} cannot be written to {path} ({error}); {self.again} next time. Set "
                "FUSION_CACHE_DIR to a folder that can be written",
                stacklevel=3,
            )


def cache_folder() -> Path:
    """Where measurements are kept."""
    if "FUSION_CACHE_DIR" in os.environ:
        return Path(os.environ["FUSION_CACHE_DIR"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fusion"
