"""What a worker does with a tile; without a GPU in the interpreter, where nothing is timed."""

from dataclasses import asdict

import pytest
import torch

from fusion import reference
from fusion.ffn_weights import PackedFfn, unpack_ffn
from fusion.planner.convfirst_down_tile import ConvFirstDownTile
from fusion.planner.ffn_tile import FfnTile
from fusion.planner.hopper_tile import COMPUTE_CAPABILITY, HopperTile
from fusion.planner.match import ConvFirstDownShape, ConvFirstShape, FfnShape, MBConvDownShape, MBConvShape
from fusion.planner.mbconv_down_tile import MBConvDownTile
from fusion.planner.mbconv_tile import MBConvTile
from fusion.planner.tile import ConvFirstTile
from fusion.triton_kernels import convfirst, convfirst_down, convfirst_hopper, ffn_hopper, mbconv, mbconv_down
from fusion.tuner import worker
from fusion.weights import unpack_hopper

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
TILE = ConvFirstTile(4, 8, 32, 16, 4)
HOPPER_TILE = HopperTile(64, 32, 3, 1, 1, 16, 0)


def shape(**changes) -> ConvFirstShape:
    sizes = {"batch": 2, "height": 5, "width": 7, "in_channels": 24, "hidden_channels": 72, "out_channels": 24}
    options = {"group_width": 8, "activation": "relu", "residual": True, "dtype": "float16"}
    return ConvFirstShape(**{**sizes, **options, **changes})


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(worker, "graph_us", lambda run: (run(), 8.0)[1])
        monkeypatch.setattr(worker, "STAGE_DEPTH", 2)
        worker.bench_of.cache_clear()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "silu"},
        {"out_channels": 40, "residual": False},
        {"batch": 1, "height": 1},
        {"residual": False, "stride": 2, "activation": "gelu"},
    ],
)
def test_a_right_tile_is_timed(changes):
    assert (
        worker.answer(asdict(shape(**changes)), "convfirst", TILE.to_ints(), compile_only=False, device=DEVICE)["us"]
        > 0
    )


def reference_launch(x, weights, project_bias, out, *, hidden_channels, residual, tile):
    """What the Hopper kernel computes, where there is no Hopper GPU."""
    conv, expand, expand_bias, project = unpack_hopper(weights, tile, x.shape[1], hidden_channels, out.shape[1])
    project_bias = project_bias[: out.shape[1]].to(x.dtype)
    out.copy_(reference.convfirst(x, conv, expand, expand_bias, project, project_bias, "relu", residual))


@pytest.mark.parametrize("changes", [{}, {"out_channels": 40, "residual": False}])
def test_a_tile_of_the_hopper_kernel_is_packed_checked_and_timed(changes, monkeypatch):
    if DEVICE == "cpu" or torch.cuda.get_device_capability() != COMPUTE_CAPABILITY:
        monkeypatch.setattr(convfirst_hopper, "launch", reference_launch)
    arguments = asdict(shape(**changes)), "convfirst_hopper", HOPPER_TILE.to_ints()
    assert worker.answer(*arguments, compile_only=False, device=DEVICE)["us"] > 0
    monkeypatch.setattr(convfirst_hopper, "launch", lambda x, weights, project_bias, out, **_: out.zero_())
    assert worker.answer(*arguments, compile_only=False, device=DEVICE)["failed"].startswith("wrong result: error")


def reference_ffn_launch(x, *arguments, hidden_channels, residual, tile):
    """What the FFN kernel computes, where there is no Hopper GPU."""
    *packed, out = arguments
    weights = unpack_ffn(PackedFfn(*packed), tile, x.shape[1], hidden_channels, out.shape[1])
    out.copy_(reference.ffn(x, *vars(weights).values(), "relu", residual))


@pytest.mark.parametrize("out_channels", [24, 40])
def test_a_tile_of_the_ffn_kernel_is_packed_checked_and_timed(out_channels, monkeypatch):
    if DEVICE == "cpu" or torch.cuda.get_device_capability() != COMPUTE_CAPABILITY:
        monkeypatch.setattr(ffn_hopper, "launch", reference_ffn_launch)
    block = FfnShape(2, 5, 7, 24, 72, out_channels, "relu", out_channels == 24, "float16")
    arguments = asdict(block), "ffn_hopper", FfnTile(2, 32, 2, 3, 3, 1).to_ints()
    assert worker.answer(*arguments, compile_only=False, device=DEVICE)["us"] > 0
    monkeypatch.setattr(ffn_hopper, "launch", lambda *arguments, **_: arguments[-1].zero_())
    assert worker.answer(*arguments, compile_only=False, device=DEVICE)["failed"].startswith("wrong result: error")


DOWN_TILE = ConvFirstDownTile(32, 32, 32, 2)


@pytest.mark.parametrize("out_channels, activation", [(24, "relu"), (40, "silu")])
def test_a_tile_of_the_stride_2_kernel_is_packed_checked_and_timed(out_channels, activation, monkeypatch):
    block = ConvFirstDownShape(2, 5, 6, 24, 40, out_channels, 8, activation, "float16")
    arguments = asdict(block), "convfirst_down", DOWN_TILE.to_ints()
    assert worker.answer(*arguments, compile_only=False, device=DEVICE)["us"] > 0
    monkeypatch.setattr(convfirst_down, "launch", lambda *arguments, **_: arguments[-1].zero_())
    assert worker.answer(*arguments, compile_only=False, device=DEVICE)["failed"].startswith("wrong result: error")


MBCONV_TILE = MBConvTile(2, 8, 8, 64, 32, 32, 4, 3, 64, 32, 128, 4, 3)


def answer_mbconv(**changes):
    sizes = {"batch": 2, "height": 5, "width": 7, "in_channels": 24, "hidden_channels": 72, "out_channels": 24}
    options = {"squeeze_channels": 6, "group_width": 8, "activation": "silu", "residual": True, "dtype": "float16"}
    block = MBConvShape(**{**sizes, **options, **changes})
    return worker.answer(asdict(block), "mbconv", MBCONV_TILE.to_ints(), compile_only=False, device=DEVICE)


@pytest.mark.parametrize(
    "changes", [{}, {"out_channels": 40, "residual": False, "activation": "relu", "squeeze_activation": "silu"}]
)
def test_a_tile_of_the_mbconv_kernels_is_packed_checked_and_timed(changes):
    assert answer_mbconv(**changes)["us"] > 0


MBCONV_DOWN_TILE = MBConvDownTile(2, 3, 4, 4, 32, 32, 16, 32, 4, 3, 16, 32, 32, 64, 4, 3)


@pytest.mark.parametrize("out_channels, activation", [(24, "silu"), (40, "relu")])
def test_a_tile_of_the_stride_2_mbconv_kernels_is_packed_checked_and_timed(out_channels, activation, monkeypatch):
    block = MBConvDownShape(2, 5, 6, 24, 40, out_channels, 6, 8, activation, "float16")
    arguments = asdict(block), "mbconv_down", MBCONV_DOWN_TILE.to_ints()
    assert worker.answer(*arguments, compile_only=False, device=DEVICE)["us"] > 0
    monkeypatch.setattr(mbconv_down, "launch", lambda *arguments, **_: arguments[-1].zero_())
    assert worker.answer(*arguments, compile_only=False, device=DEVICE)["failed"].startswith("wrong result: error")


@pytest.mark.parametrize("difference, is_right", [(1e-6, True), (0.01, False)])
def test_two_runs_of_atomic_sums_may_differ_by_rounding_errors_only(difference, is_right, monkeypatch):
    launch = mbconv.launch
    runs = []

    def unrepeatable(*args, **kwargs):
        launch(*args, **kwargs)
        out = args[11]
        runs.append(out)
        if len(runs) == 2:
            out[0] *= 1 + difference
            out[0, 0, 0, 0] = torch.nextafter(out[0, 0, 0, 0].cpu(), torch.tensor(9.0, dtype=out.dtype))

    monkeypatch.setattr(mbconv, "launch", unrepeatable)
    reply = answer_mbconv()
    assert ("us" in reply) == is_right, reply
    assert not torch.equal(runs[0], runs[1])


@pytest.mark.parametrize(
    "block, kernel, tile",
    [
        (shape(), "convfirst", TILE),
        (ConvFirstDownShape(2, 5, 6, 24, 40, 24, 8, "relu", "float16"), "convfirst_down", DOWN_TILE),
        (MBConvDownShape(2, 5, 6, 24, 40, 24, 6, 8, "silu", "float16"), "mbconv_down", MBCONV_DOWN_TILE),
    ],
    ids=["convfirst", "convfirst_down", "mbconv_down"],
)
def test_a_compilation_times_nothing(block, kernel, tile, monkeypatch):
    monkeypatch.setattr(worker, "graph_us", None)
    assert worker.answer(asdict(block), kernel, tile.to_ints(), compile_only=True, device=DEVICE) == {}


@pytest.mark.parametrize("damage", ["wrong image", "missing pixel", "race"])
def test_a_wrong_result_is_refused(monkeypatch, damage):
    launch = convfirst.launch
    runs = []

    def damaged(x, *args, **kwargs):
        launch(x, *args, **kwargs)
        out = args[5]
        runs.append(out)
        if damage == "wrong image":
            out[-1] *= 1.01
        elif damage == "missing pixel":
            out[1, 0, 4, 4] = float("nan")
        elif len(runs) == 2:
            out[0, 0, 0, 0] += 0.01

    monkeypatch.setattr(convfirst, "launch", damaged)
    reply = worker.answer(asdict(shape()), "convfirst", TILE.to_ints(), compile_only=False, device=DEVICE)
    assert reply["failed"].startswith("wrong result: error")
