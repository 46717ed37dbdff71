"""Tuned tiles on disk (see `fusion.disk_cache`).

An entry names a kernel family and holds integers, which still have to make a valid tile.
"""

from dataclasses import asdict, replace

from fusion.disk_cache import BlockKey, Entries
from fusion.planner.families import Tile, family_named, family_of

TILES = Entries("tiles", format=2, what="tuned tile", again="tuning again")
PORTABLE_TILES = replace(TILES, folder="portable_tiles")
"""The fastest of portable kernels, where only those were asked for."""


def load(key: BlockKey, portable: bool = False) -> tuple[Tile, float] | None:
    """The tuned tile of a key and its microseconds; None if it has to be tuned."""
    entries = PORTABLE_TILES if portable else TILES
    return entries.load(
        key, lambda entry: (family_named(entry["kernel"]).tile_type(**entry["tile"]), float(entry["us"]))
    )


def store(key: BlockKey, tile: Tile, us: float, portable: bool = False) -> None:
    """Remember the tuned tile of a key."""
    entries = PORTABLE_TILES if portable else TILES
    entries.store(key, {"kernel": family_of(tile).name, "tile": asdict(tile), "us": us})
