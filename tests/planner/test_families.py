from itertools import islice, pairwise

import pytest

from fusion.planner.blocks import conv, convfirst, ffn, head, mbconv, stem_convfirst
from fusion.planner.convfirst_down_tile import ConvFirstDownTile
from fusion.planner.families import (
    CONVFIRST_DOWN,
    FFN,
    HEAD,
    HOPPER,
    MBCONV,
    MBCONV_DOWN,
    MBCONV_HOPPER,
    MBCONV_WINDOWS_HOPPER,
    PORTABLE,
    STEM,
    families_of,
    family_named,
    family_of,
)
from fusion.planner.ffn_tile import FfnTile
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.match import (
    match_convfirst,
    match_convfirst_down,
    match_ffn,
    match_head,
    match_mbconv,
    match_mbconv_down,
    match_stem,
    match_stem_convfirst,
)
from fusion.planner.mbconv_down_tile import MBConvDownTile
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile
from fusion.planner.mbconv_tile import MBConvTile
from fusion.planner.mbconv_windows_hopper_tile import MBConvWindowsHopperTile
from fusion.planner.processor import PROCESSORS
from fusion.planner.tile import ConvFirstTile

SHAPES = [
    match_convfirst(convfirst(*sizes, **options))
    for sizes, options in (
        ((128, 64, 64, 64, 6), {}),
        ((128, 32, 32, 96, 6), {}),
        ((4, 19, 23, 32, 3), {"group_width": 32}),
        ((4, 19, 23, 16, 3), {"activation": "silu"}),
        ((1, 8, 8, 4096, 1), {}),
    )
]
SHAPES += [
    match_convfirst_down(convfirst(*sizes, stride=2, **options))
    for sizes, options in (
        ((128, 64, 64, 64, 6), {"out_channels": 96}),
        ((4, 19, 23, 24, 6), {"activation": "silu"}),
        ((1, 2, 3, 32, 3), {"group_width": 32}),
        ((1, 1, 8, 32, 3), {}),
        ((1, 8, 8, 4096, 1), {}),
    )
]
SHAPES += [
    match_ffn(ffn(*sizes, **options))
    for sizes, options in (
        ((128, 64, 64, 64, 6), {}),
        ((4, 19, 23, 144, 3), {"out_channels": 24}),
        ((4, 19, 23, 16, 3), {"activation": "silu"}),
        ((1, 8, 8, 4096, 1), {}),
    )
]
SHAPES += [
    match_stem(conv(*sizes, stride=2, **options))
    for sizes, options in (
        ((128, 256, 256, 3, 32), {"activation": "relu"}),
        ((4, 19, 23, 1, 24), {}),
        ((1, 8, 8, 64, 128), {}),
    )
]
SHAPES += [
    match_stem_convfirst(stem_convfirst(*sizes, **options))
    for sizes, options in (
        ((128, 256, 256, 3, 24, 3), {}),
        ((4, 18, 24, 3, 16, 3), {"out_channels": 24}),
        ((4, 18, 24, 3, 16, 3), {"activation": "silu"}),
        ((1, 8, 260, 3, 16, 3), {}),
    )
]
SHAPES += [
    match_head(head(*sizes, **options))
    for sizes, options in (
        ((128, 8, 8, 256, 1280), {}),
        ((4, 19, 23, 24, 40), {"activation": None}),
        ((1, 8, 8, 4096, 1280), {}),
    )
]
SHAPES += [
    match_mbconv_down(mbconv(*sizes, stride=2, **options))
    for sizes, options in (
        ((128, 32, 32, 48, 4), {"out_channels": 128}),
        ((4, 19, 23, 144, 3), {"out_channels": 24, "activation": "relu"}),
        ((1, 2, 3, 32, 2), {"group_width": 32}),
        ((1, 1, 8, 24, 2), {}),
    )
]
SHAPES += [
    match_mbconv(mbconv(*sizes, **options))
    for sizes, options in (
        ((128, 16, 16, 128, 4), {}),
        ((4, 19, 23, 144, 3), {"out_channels": 24, "activation": "relu"}),
        ((128, 28, 28, 40, 6), {"kernel_size": 5}),
        ((1, 56, 56, 256, 4), {}),
        ((1, 8, 8, 24, 2), {"group_width": 24}),
    )
]
CASES = [(family, shape) for shape in SHAPES for family in families_of(shape)]


def test_a_tile_knows_its_family_and_a_name_finds_it():
    assert family_of(HopperTile(64, 64, 2, 2, 1, 64, 0)) is HOPPER is family_named("convfirst_hopper")
    assert family_of(ConvFirstTile(8, 16, 32, 32, 4)) is PORTABLE is family_named("convfirst")
    assert family_of(ConvFirstDownTile(128, 32, 16, 4)) is CONVFIRST_DOWN is family_named("convfirst_down")
    assert family_of(FfnTile(2, 64, 2, 4, 4, 1)) is FFN is family_named("ffn_hopper")
    assert family_of(MBConvTile(1, 4, 8, 32, 16, 16, 2, 2, 32, 16, 64, 2, 2)) is MBCONV is family_named("mbconv")
    down_tile = MBConvDownTile(1, 8, 4, 8, 32, 16, 16, 16, 2, 2, 16, 32, 16, 64, 2, 2)
    assert family_of(down_tile) is MBCONV_DOWN is family_named("mbconv_down")
    assert family_of(MBConvHopperTile(1, 4, 32, 6)) is MBCONV_HOPPER is family_named("mbconv_hopper")
    windows_tile = MBConvWindowsHopperTile(4, 8, 32, 4)
    assert family_of(windows_tile) is MBCONV_WINDOWS_HOPPER is family_named("mbconv_windows_hopper")
    assert families_of(SHAPES[-1]) == (MBCONV_HOPPER, MBCONV_WINDOWS_HOPPER, MBCONV), "in order of preference"
    with pytest.raises(ValueError, match="kernel 'fast' is unknown; use one of convfirst_hopper, convfirst, "):
        family_named("fast")
    with pytest.raises(TypeError, match="None is not a tile; use a HopperTile or a ConvFirstTile or a "):
        family_of(None)


@pytest.mark.parametrize("processor", ["h200", "a5000", "b200"])
@pytest.mark.parametrize("family, shape", CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_a_family_has_candidates_or_a_reason(family, shape, processor):
    processor = PROCESSORS[processor]
    tiles = list(islice(family.candidate_tiles(shape, processor), 20))
    assert bool(tiles) != bool(family.why_none(shape, processor))
    for tile in tiles:
        assert family_of(tile) is family
        assert family.why_invalid(tile, shape, processor) is None
        assert family.tile_type(*tile.to_ints()) == tile
        assert 0 < family.local_memory_bytes(tile, shape, processor) <= processor.local_memory_bytes
        assert family.programs_per_processor(tile, shape, processor) >= 1


@pytest.mark.parametrize(
    "family",
    [HOPPER, PORTABLE, CONVFIRST_DOWN, FFN, MBCONV_HOPPER, MBCONV_WINDOWS_HOPPER, MBCONV, STEM, HEAD],
    ids=lambda family: family.name,
)
def test_tiles_are_ranked_by_prediction(family):
    shape = next(shape for shape in SHAPES if isinstance(shape, family.shape_type))
    tiles = family.ranked_tiles(shape, PROCESSORS["h200"])
    assert set(tiles) == set(family.candidate_tiles(shape, PROCESSORS["h200"]))
    predictions = [family.predicted_us(tile, shape, PROCESSORS["h200"]) for tile in tiles]
    assert all(slower > faster - 0.011 for faster, slower in pairwise(predictions))
