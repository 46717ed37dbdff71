"""The search, with measurements made up where there is no GPU."""

import pytest
import torch

from fusion.planner import blocks
from fusion.planner.families import FAMILIES, HOPPER, PORTABLE, Tile, family_of
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.plan import PlanError, block_shape, ranked_tiles
from fusion.planner.processor import get_processor
from fusion.planner.tile import ConvFirstTile
from fusion.tuner import cache, tune

H200 = get_processor("h200")
GRAPH = blocks.convfirst(4, 19, 23, 48, 6)
SHAPE = block_shape(GRAPH)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class MadeUpPool:
    """Stands for the worker pool: times are made up by `microseconds`, which returns None for a tile that crashes."""

    asked: list[Tile]

    def __init__(self, device):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def compile(self, jobs, done):
        for _ in jobs:
            done()

    def measure(self, shape, tile):
        type(self).asked.append(tile)
        us = self.microseconds(tile)
        return {"failed": "worker died with exit code -11: it said nothing"} if us is None else {"us": us}


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "WorkerPool", MadeUpPool)
    monkeypatch.setattr(tune, "cuda_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "made-up GPU")
    MadeUpPool.asked = []
    MadeUpPool.microseconds = staticmethod(lambda tile: 100 + sum(tile.to_ints()))
    return MadeUpPool


def test_the_fastest_tile_wins_and_is_remembered(made_up):
    plan = tune.tune_block(GRAPH, H200, progress=False)
    times = {tile: made_up.microseconds(tile) for tile in made_up.asked}
    assert plan.tile == min(times, key=times.__getitem__)
    assert plan.measured_us == times[plan.tile]
    assert f"measured fastest of {len(times)} tiles on made-up GPU" in str(plan)
    made_up.asked = []
    again = tune.tune_block(GRAPH, H200, progress=False)
    assert (again.tile, again.measured_us, made_up.asked) == (plan.tile, plan.measured_us, [])
    assert tune.tune_block(GRAPH, H200, progress=False, refresh=True).tile == plan.tile
    assert made_up.asked


def test_no_tile_is_tried_twice(made_up):
    tune.tune_block(GRAPH, H200, progress=False)
    assert len(made_up.asked) == len(set(made_up.asked))


@pytest.mark.parametrize(("winner", "loser"), [(HOPPER, PORTABLE), (PORTABLE, HOPPER)])
def test_kernels_compete_and_the_loser_is_told(made_up, winner, loser):
    made_up.microseconds = staticmethod(
        lambda tile: (100 if family_of(tile) is winner else 200) + sum(tile.to_ints()) / 1000
    )
    plan = tune.tune_block(GRAPH, H200, progress=False)
    slower = min(made_up.microseconds(tile) for tile in made_up.asked if family_of(tile) is loser)
    assert plan.kernel == winner.name
    assert f"  rejected {loser.title}: measured {slower:.1f} us at best" in str(plan).splitlines()
    assert tune.tune_block(GRAPH, H200, progress=False).tile == plan.tile


def test_only_kernels_that_the_processor_runs_are_tried(made_up):
    plan = tune.tune_block(GRAPH, "a100", progress=False)
    assert {type(tile) for tile in made_up.asked} == {ConvFirstTile}
    assert "rejected Hopper kernel: it is for compute capability 9.0, a100 has 8.0" in str(plan)


def test_only_portable_tiles_are_tried_if_asked_and_their_winner_is_kept_apart(made_up):
    made_up.microseconds = staticmethod(lambda tile: 100 if family_of(tile) is HOPPER else 200 + sum(tile.to_ints()))
    best = tune.tune_block(GRAPH, H200, progress=False)
    made_up.asked = []
    plan = tune.tune_block(GRAPH, H200, progress=False, portable=True)
    assert {type(tile) for tile in made_up.asked} == {ConvFirstTile}
    assert (best.kernel, plan.kernel) == ("convfirst_hopper", "convfirst")
    made_up.asked = []
    for portable, known in ((False, best), (True, plan)):
        assert tune.tune_block(GRAPH, H200, progress=False, portable=portable).tile == known.tile
    assert made_up.asked == []


def design(tile):
    if isinstance(tile, HopperTile):
        return "hopper", tile.pixels, tile.hidden, tile.partitions, tile.weight_chunks > 0
    return "portable", tile.pixels, tile.hidden, tile.conv_slab, tile.warps


def test_the_first_round_has_the_best_of_each_design_and_a_share_for_every_kernel():
    ranked = ranked_tiles(SHAPE, H200)
    first = tune.first_round(ranked)
    assert len({design(tile) for tile in first}) == len(first) <= tune.FIRST_ROUND
    assert [tile for tile in first if isinstance(tile, ConvFirstTile)] == first[-tune.ALTERNATIVES :]
    assert {design(tile) for tile in first if isinstance(tile, HopperTile)} == set(map(design, ranked[HOPPER]))
    for tiles in ranked.values():
        assert tiles[0] in first
    assert len(tune.first_round({PORTABLE: ranked[PORTABLE]})) == tune.FIRST_ROUND


@pytest.mark.parametrize("index", [0, -1], ids=["Hopper", "portable"])
def test_the_second_round_tries_the_other_tiles_of_the_winning_designs(index):
    ranked = ranked_tiles(SHAPE, H200)
    first = tune.first_round(ranked)
    second = tune.second_round(ranked, [first[index]], first)
    assert second
    assert {design(tile) for tile in second} == {design(first[index])}
    assert not set(second) & set(first)


def test_tiles_that_crash_are_counted_and_never_chosen(made_up):
    made_up.microseconds = staticmethod(lambda tile: None if tile.hidden == 64 else 100 + tile.hidden)
    plan = tune.tune_block(GRAPH, H200, progress=False)
    crashed = sum(tile.hidden == 64 for tile in made_up.asked)
    assert crashed
    assert plan.tile.hidden != 64
    assert f"rejected {crashed} tiles: worker died" in str(plan)


def test_without_a_tile_that_works_the_error_says_why(made_up):
    made_up.microseconds = staticmethod(lambda tile: None)
    with pytest.raises(RuntimeError, match=r"no tile gives right results.*worker died"):
        tune.tune_block(GRAPH, H200, progress=False)


@pytest.mark.parametrize("tile", [ConvFirstTile(7, 9, 16, 16, 4), HopperTile(64, 64, 5, 1, 1, 16, 0)])
def test_a_cached_tile_that_is_not_valid_is_tuned_again(made_up, tile):
    cache.store(tune.cache_key(SHAPE, torch.device("cuda", 0)), tile, 0.1)
    plan = tune.tune_block(GRAPH, H200, progress=False)
    assert plan.measured_us > 1


def test_a_measurement_depends_on_the_sources_of_all_kernels(made_up, tmp_path, monkeypatch):
    shared = {"hopper_parts.py", "hopper_layouts.py"}
    assert {f"{family.name}.py" for family in FAMILIES} | shared <= {path.name for path in tune.kernel_sources()}
    copies = [tmp_path / path.name for path in tune.kernel_sources()]
    monkeypatch.setattr(tune, "kernel_sources", lambda: copies)
    keys = set()
    for changed in (None, *copies):
        for path in copies:
            path.write_text("changed" if path == changed else "as it was")
        keys.add(tune.cache_key(SHAPE, torch.device("cuda", 0)))
    assert len(keys) == 1 + len(copies)


def test_blocks_are_tuned_together_and_equal_ones_once(made_up):
    other = blocks.convfirst(4, 19, 23, 64, 6)
    plans = tune.tune_blocks([GRAPH, other, GRAPH], H200, progress=False)
    assert [plan.shape.in_channels for plan in plans] == [48, 64, 48]
    assert plans[0].tile == plans[2].tile
    assert max(made_up.asked.count(tile) for tile in made_up.asked) == 2, "once for each of the two different blocks"


def test_a_progress_bar_is_drawn_on_standard_error(made_up, capsys):
    tune.tune_block(GRAPH, H200)
    captured = capsys.readouterr()
    assert "tuning 1 block" in captured.err
    assert captured.out == ""


def test_a_block_without_a_kernel_is_refused(made_up):
    with pytest.raises(PlanError, match="no fused kernel runs"):
        tune.tune_block(blocks.conv(4, 16, 16, 64), H200, progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_error_says_what_to_do():
    with pytest.raises(RuntimeError, match="needs a CUDA GPU and none is available; plan from shapes"):
        tune.tune_block(GRAPH, H200)


@needs_gpu
def test_a_real_search_finds_a_tile_that_works(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "FIRST_ROUND", 3)
    monkeypatch.setattr(tune, "ALTERNATIVES", 1)
    monkeypatch.setattr(tune, "SECOND_ROUND_SEEDS", 0)
    plan = tune.tune_block(GRAPH, progress=False)
    assert 0 < plan.measured_us < 1e4
    assert "tiles: " not in str(plan), "a tile failed"
    assert tune.tune_block(GRAPH, progress=False).measured_us == plan.measured_us
