"""Tuned tiles on disk."""

import json
import os
import stat
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fusion.disk_cache import BlockKey, cache_folder
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.match import ConvFirstShape
from fusion.planner.tile import ConvFirstTile
from fusion.tuner import cache

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ConvFirstShape(128, 64, 64, 48, 288, 48, 8, "relu", True, "float16")
KEY = BlockKey("NVIDIA H200", "3.6.0", "0123456789abcdef", SHAPE)
TILE = ConvFirstTile(8, 16, 32, 32, 4, conv_stages=5, ffn_stages=2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("tile", "kernel"), [(TILE, "convfirst"), (HopperTile(128, 16, 3, 1, 4, 16, 0), "convfirst_hopper")]
)
def test_what_is_stored_is_loaded(tile, kernel):
    cache.store(KEY, tile, 123.5)
    assert cache.load(KEY) == (tile, 123.5)
    assert json.loads(cache.TILES.path(KEY).read_text())["kernel"] == kernel


def test_a_missing_entry_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load(KEY) is None


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, device="NVIDIA A100"),
        replace(KEY, triton="3.7.0"),
        replace(KEY, kernel_hash="fedcba9876543210"),
        replace(KEY, shape=replace(SHAPE, dtype="bfloat16")),
        replace(KEY, shape=replace(SHAPE, batch=1)),
    ],
)
def test_every_part_of_the_key_counts(other):
    cache.store(KEY, TILE, 123.5)
    assert cache.load(other) is None


def _entry(**changes) -> str:
    entry = json.loads(cache.TILES.path(KEY).read_text())
    entry.update(changes)
    return json.dumps(entry)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (lambda: "{", "JSONDecodeError"),
        (lambda: "", "JSONDecodeError"),
        (lambda: "[]", "TypeError"),
        (lambda: _entry(format=cache.TILES.format + 1), f"format {cache.TILES.format + 1}"),
        (lambda: _entry(key={}), "belongs to something else"),
        (lambda: _entry(kernel="__import__('os')"), "ValueError: kernel .* is unknown"),
        (lambda: _entry(kernel="convfirst_hopper"), "TypeError"),
        (lambda: _entry(tile={"height": 8}), "TypeError"),
        (lambda: _entry(tile={**_TILE_FIELDS, "height": "__import__('os')"}), "ValueError"),
        (lambda: _entry(us="fast"), "ValueError"),
    ],
)
def test_a_corrupt_entry_gives_one_warning_and_is_replaced(text, reason):
    cache.store(KEY, TILE, 123.5)
    cache.TILES.path(KEY).write_text(text())
    with pytest.warns(UserWarning, match=f"cannot be used.*{reason}.*tuning again") as record:
        assert cache.load(KEY) is None
    assert len(record) == 1
    cache.store(KEY, TILE, 99.0)
    assert cache.load(KEY) == (TILE, 99.0)


_TILE_FIELDS = {
    "height": 8,
    "width": 16,
    "hidden": 32,
    "conv_slab": 32,
    "warps": 4,
    "conv_stages": 3,
    "ffn_stages": 3,
}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_gives_a_warning(folder):
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(UserWarning, match="cannot be written.*FUSION_CACHE_DIR"):
        cache.store(KEY, TILE, 1.0)


def test_a_file_in_place_of_the_folder_gives_a_warning(folder):
    folder.write_text("")
    with pytest.warns(UserWarning, match="cannot be written.*FUSION_CACHE_DIR"):
        cache.store(KEY, TILE, 1.0)


STORE_MANY = """
import json, sys
from fusion.disk_cache import BlockKey
from fusion.planner.match import ConvFirstShape
from fusion.planner.tile import ConvFirstTile
from fusion.tuner import cache

key, shape, tile, us = map(json.loads, sys.argv[1:])
key = BlockKey(**{**key, "shape": ConvFirstShape(**shape)})
print("ready", flush=True)
sys.stdin.readline()
for _ in range(200):
    cache.store(key, ConvFirstTile(**tile), us)
"""


def test_processes_share_the_folder():
    """Another process and this one write the same entry, while this one reads it too."""
    arguments = [json.dumps(asdict(value)) for value in (KEY, SHAPE, TILE)]
    writer = subprocess.Popen(
        [sys.executable, "-c", STORE_MANY, *arguments, "1.0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert writer.stdout.readline() == "ready\n"
    writer.stdin.write("go\n")
    writer.stdin.flush()
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while writer.poll() is None:
            seen.add(cache.load(KEY))
            cache.store(KEY, TILE, 2.0)
            seen.add(cache.load(KEY))
    assert writer.communicate() and writer.returncode == 0
    assert (TILE, 2.0) in seen
    assert seen <= {None, (TILE, 1.0), (TILE, 2.0)}
    assert cache.load(KEY) in {(TILE, 1.0), (TILE, 2.0)}
    assert [path.suffix for path in cache.TILES.path(KEY).parent.iterdir()] == [".json"]


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fusion"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "fusion"
