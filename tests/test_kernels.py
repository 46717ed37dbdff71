from dataclasses import replace

import pytest
import torch

from fusion import kernels
from fusion.convfirst_down_weights import PackedConvFirstDown
from fusion.mbconv_weights import PackedMBConv
from fusion.planner.convfirst_down_tile import ConvFirstDownTile
from fusion.planner.families import FAMILIES, family_of
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.mbconv_down_tile import MBConvDownTile
from fusion.planner.mbconv_tile import MBConvTile
from fusion.planner.tile import ConvFirstTile
from fusion.reference import convfirst as reference
from fusion.weights import PackedConvFirst, PackedHopper

PORTABLE, HOPPER = ConvFirstTile(4, 8, 32, 32, 2), HopperTile(64, 32, 3, 1, 1, 32, 0)


def run(tile, x, weights, activation="relu", **changes):
    packed = kernels.pack(weights, tile, x.dtype, x.device).tensors()
    options = {"activation": activation, "residual": True, "squeeze_activation": "relu", "stride": 1, **changes}
    return kernels.run(family_of(tile).name, x, packed, tile.to_ints(), weights, **options)


def test_every_family_has_a_runner():
    assert set(kernels.RUNNERS) == {family.name for family in FAMILIES}
    for runner in kernels.RUNNERS.values():
        tile = runner.family.tile_type
        assert all(name in tile.__dataclass_fields__ or hasattr(tile, name) for name in runner.packed_for), tile
        has_activation = ["activation" in options for options in (runner.operator_options, runner.launch_options)]
        lacks_some = runner.other_activations is not None
        assert has_activation == [not lacks_some or len(runner.activations) > 1] * 2, tile


@pytest.mark.parametrize("tile, packed_type", [(PORTABLE, PackedConvFirst), (HOPPER, PackedHopper)], ids=str)
def test_every_tile_runs_its_kernel(tile, packed_type, random_weights):
    weights = random_weights(24, 40)
    assert isinstance(kernels.pack(weights, tile, torch.float32, "cpu"), packed_type)
    x = torch.randn(2, 24, 5, 7)
    exact = (weights.conv, weights.expand, weights.expand_bias, weights.project, weights.project_bias)
    torch.testing.assert_close(run(tile, x, weights), reference(x, *exact, "relu", True), rtol=1e-5, atol=1e-5)


def test_tiles_of_equal_packing_share_weights(random_weights):
    tiles = [
        *(ConvFirstTile(4, 8, hidden, slab, warps) for hidden in (16, 32) for slab in (16, 32) for warps in (1, 2)),
        *(
            HopperTile(64, hidden, 3, 2, 1, slab, chunks)
            for hidden in (32, 64)
            for slab in (16, 32)
            for chunks in (0, 2)
        ),
    ]
    weights = random_weights(24, 40)
    packed = [kernels.pack(weights, tile, torch.float32, "cpu").tensors() for tile in tiles]
    for tile, tensors in zip(tiles, packed, strict=True):
        for other, others in zip(tiles, packed, strict=True):
            if kernels.packing(tile) == kernels.packing(other):
                assert all(map(torch.equal, tensors, others))
    assert len({kernels.packing(tile) for tile in tiles}) == 4 + 4


@pytest.mark.parametrize("stride", [1, 2])
def test_the_portable_kernel_is_launched(stride, device, random_weights):
    weights, x = random_weights(24, 40), torch.randn(2, 24, 5, 7).to(device, torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.full_like(x[..., ::stride, ::stride], float("nan")).contiguous(memory_format=torch.channels_last)
    packed = kernels.pack(weights, PORTABLE, x.dtype, x.device)
    options = {"activation": "silu", "residual": stride == 1, "stride": stride}
    kernels.launch(x, packed, out, PORTABLE, weights, **options)
    torch.testing.assert_close(out, run(PORTABLE, x, weights, **options), rtol=1e-2, atol=1e-2)


DOWN = ConvFirstDownTile(32, 32, 32, 2)


def test_the_stride_2_kernel_is_launched(device, random_weights):
    weights = random_weights(24, 40, 48, stride=2)
    x = torch.randn(2, 24, 5, 6).to(device, torch.float16).contiguous(memory_format=torch.channels_last)
    out = torch.full((2, 3, 3, 48), float("nan"), dtype=x.dtype, device=device).permute(0, 3, 1, 2)
    packed = kernels.pack(weights, DOWN, x.dtype, x.device)
    assert isinstance(packed, PackedConvFirstDown)
    kernels.launch(x, packed, out, DOWN, weights, activation="silu", residual=False)
    expected = run(DOWN, x, weights, "silu", residual=False)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)


def test_stride_2_tiles_of_equal_packing_share_weights(random_weights):
    fields = {"pixels": 64, "hidden": 64, "conv_slab": 16, "warps": 1, "conv_stages": 4, "copy_bytes": 8}
    tiles = [DOWN, *(replace(DOWN, **{name: value}) for name, value in fields.items())]
    weights = random_weights(24, 40, stride=2)
    packed = [kernels.pack(weights, tile, torch.float32, "cpu").tensors() for tile in tiles]
    for tile, tensors in zip(tiles, packed, strict=True):
        for other, others in zip(tiles, packed, strict=True):
            if kernels.packing(tile) == kernels.packing(other):
                assert all(map(torch.equal, tensors, others))
    assert len({kernels.packing(tile) for tile in tiles}) == 3


MBCONV = MBConvTile(2, 8, 8, 64, 32, 32, 4, 3, 64, 32, 128, 4, 3)


def test_the_mbconv_kernels_are_launched(device, random_mbconv_weights):
    weights, x = random_mbconv_weights(24, 64), torch.randn(2, 24, 5, 7).to(device, torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.full_like(x, float("nan"))
    packed = kernels.pack(weights, MBCONV, x.dtype, x.device)
    assert isinstance(packed, PackedMBConv)
    options = {"activation": "relu", "residual": True, "squeeze_activation": "silu"}
    kernels.launch(x, packed, out, MBCONV, weights, **options)
    torch.testing.assert_close(out, run(MBCONV, x, weights, **options), rtol=1e-2, atol=1e-2)


def test_mbconv_tiles_of_equal_packing_share_weights(random_mbconv_weights):
    fields = {"hidden": 128, "project_hidden": 64, "channels": 16, "conv_slab": 16, "project_out": 16}
    fields |= {"images": 1, "height": 4, "warps": 2, "stages": 2, "project_pixels": 16, "project_warps": 2}
    tiles = [MBCONV, *(replace(MBCONV, **{name: value}) for name, value in fields.items())]
    weights = random_mbconv_weights(24, 40)
    packed = [kernels.pack(weights, tile, torch.float32, "cpu").tensors() for tile in tiles]
    for tile, tensors in zip(tiles, packed, strict=True):
        for other, others in zip(tiles, packed, strict=True):
            if kernels.packing(tile) == kernels.packing(other):
                assert all(map(torch.equal, tensors, others))
    assert len({kernels.packing(tile) for tile in tiles}) == 1 + 5


MBCONV_DOWN = MBConvDownTile(2, 3, 4, 4, 32, 32, 16, 32, 4, 3, 16, 32, 16, 64, 4, 3)


@pytest.mark.parametrize("blur", [True, False])
def test_the_stride_2_mbconv_kernels_are_launched(blur, device, random_mbconv_weights):
    weights, x = random_mbconv_weights(24, 64, 48), torch.randn(2, 24, 5, 8).to(device, torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.full((2, 3, 4, 48), float("nan"), dtype=x.dtype, device=device).permute(0, 3, 1, 2)
    packed = kernels.pack(weights, MBCONV_DOWN, x.dtype, x.device)
    assert isinstance(packed, PackedMBConv)
    options = {"activation": "relu", "squeeze_activation": "silu", "blur": blur}
    kernels.launch(x, packed, out, MBCONV_DOWN, weights, **options)
    torch.testing.assert_close(out, run(MBCONV_DOWN, x, weights, **options), rtol=1e-2, atol=1e-2)


def test_stride_2_mbconv_tiles_of_equal_packing_share_weights(random_mbconv_weights):
    fields = {"hidden": 64, "project_hidden": 64, "channels": 16, "conv_slab": 32, "project_out": 16}
    fields |= {"images": 1, "programs": 1, "height": 8, "quads": 16, "warps": 2, "stages": 2, "copy_bytes": 8}
    fields |= {"project_pixels": 16, "project_warps": 2}
    tiles = [MBCONV_DOWN, *(replace(MBCONV_DOWN, **{name: value}) for name, value in fields.items())]
    weights = random_mbconv_weights(24, 40)
    packed = [kernels.pack(weights, tile, torch.float32, "cpu").tensors() for tile in tiles]
    for tile, tensors in zip(tiles, packed, strict=True):
        for other, others in zip(tiles, packed, strict=True):
            if kernels.packing(tile) == kernels.packing(other):
                assert all(map(torch.equal, tensors, others))
    assert len({kernels.packing(tile) for tile in tiles}) == 1 + 5


def test_activations_that_a_kernel_lacks_are_refused(random_weights):
    weights, x = random_weights(24, 40), torch.randn(2, 24, 5, 7)
    message = "the Hopper kernel has no activation 'silu', only 'relu'; use a ConvFirstTile"
    with pytest.raises(ValueError, match=message):
        run(HOPPER, x, weights, "silu")
    packed = kernels.pack(weights, HOPPER, x.dtype, x.device)
    with pytest.raises(ValueError, match=message):
        kernels.launch(x, packed, x.clone(), HOPPER, weights, activation="silu", residual=True)
    runner = kernels.RUNNERS["mbconv_hopper"]
    runner.check_activation("silu")
    with pytest.raises(ValueError, match="no activation 'gelu', only 'relu' or 'silu'; use an MBConvTile"):
        runner.check_activation("gelu")
