"""Tuned tiles on disk: one small JSON file for each block, so that processes can share the folder without locks.

The folder is `$FUSION_CACHE_DIR`, or `fusion` in `$XDG_CACHE_HOME` or `~/.cache`. A file is written whole and then
renamed into place. Nothing read from it is executed: it names a kernel family and holds integers, which still have to
make a valid tile.
"""

import hashlib
import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion.planner.families import Tile, family_named, family_of
from fusion.planner.match import BlockShape

FORMAT = 2


@dataclass(frozen=True)
class CacheKey:
    """What a measurement depends on. `kernel_hash` is that of the kernels' sources."""

    device: str
    triton: str
    kernel_hash: str
    shape: BlockShape

    def path(self) -> Path:
        """The file of this key; it may not exist."""
        text = json.dumps(asdict(self), sort_keys=True)
        return cache_folder() / "tiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def cache_folder() -> Path:
    """Where tuned tiles are kept."""
    if "FUSION_CACHE_DIR" in os.environ:
        return Path(os.environ["FUSION_CACHE_DIR"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fusion"


def load(key: CacheKey) -> tuple[Tile, float] | None:
    """The tuned tile of a key and its microseconds; None if it has to be tuned.

    A file that cannot be used (corrupt, of another format, for another block) gives one warning and None.
    """
    path = key.path()
    try:
        entry = json.loads(path.read_text())
        if entry["format"] != FORMAT:
            raise ValueError(f"format {entry['format']!r}, this version of fusion reads {FORMAT}")
        if entry["key"] != json.loads(json.dumps(asdict(key))):
            raise ValueError("it belongs to another block")
        return family_named(entry["kernel"]).tile_type(**entry["tile"]), float(entry["us"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"the tuned tile in {path} cannot be used ({type(error).__name__}: {error}); tuning again and replacing it",
            stacklevel=2,
        )
        return None


def store(key: CacheKey, tile: Tile, us: float) -> None:
    """Remember the tuned tile of a key. Warns, and goes on, if the folder cannot be written."""
    path = key.path()
    kernel = family_of(tile).name
    entry = {"format": FORMAT, "key": asdict(key), "kernel": kernel, "tile": asdict(tile), "us": us}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(entry, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(
            f"the tuned tile cannot be written to {path} ({error}); it will be tuned again next time. Set "
            "FUSION_CACHE_DIR to a folder that can be written",
            stacklevel=2,
        )
