from dataclasses import replace

import pytest
import torch
from torch import nn

from fusion import kernels
from fusion.planner.micro_batch import micro_batch_images
from fusion.planner.plan import plan_block
from fusion.planner.processor import get_processor
from fusion.stage import FusedStage
from models import ConvFirst, MBConv


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return [
        MBConv(16, 24, expansion=2).eval().requires_grad_(False),
        MBConv(24, 24, expansion=2).eval().requires_grad_(False),
        ConvFirst(24, 24, expansion=2).eval().requires_grad_(False),
    ]


@pytest.mark.parametrize("micro_batch, batches", [(None, [5]), (1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (8, [5])])
def test_micro_batches_compute_the_same(micro_batch, batches, blocks):
    planned = []

    def tuner(graph, processor):
        planned.append(graph.inputs[0]["N"])
        return plan_block(graph, processor)

    stage = FusedStage((block.fused(tuner) for block in blocks), micro_batch)
    x = torch.randn(5, 16, 6, 7)
    out = stage(x)
    torch.testing.assert_close(out, nn.Sequential(*blocks)(x), rtol=1e-4, atol=1e-4)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert set(planned) == set(batches)


def test_the_planner_chooses(blocks, monkeypatch):
    stage = FusedStage((block.fused() for block in blocks), "auto")
    x = torch.randn(5, 16, 6, 7)
    inputs = x, *(torch.randn(5, 24, 6, 7) for _ in range(2))
    graphs = [block.plan(part).program.graph for block, part in zip(stage.blocks, inputs, strict=True)]
    whole_images = stage.blocks[0].plan(x).kernel == "mbconv_hopper"
    assert stage.images(x) == micro_batch_images(graphs, get_processor("h200"), whole_images) == 5
    asked = []

    def answer(graphs, processor, whole_images):
        asked.append((graphs, processor.name, whole_images))
        return 2

    monkeypatch.setattr("fusion.stage.micro_batch_images", answer)
    stage = FusedStage(stage.blocks, "auto")
    for _ in range(2):
        torch.testing.assert_close(stage(x), FusedStage(stage.blocks)(x), rtol=1e-5, atol=1e-5)
    assert asked == [(graphs, "h200", whole_images)]


def test_compiles_as_one_graph(blocks):
    stage = FusedStage((block.fused() for block in blocks), 2)
    x = torch.randn(3, 16, 5, 5)
    with torch.no_grad():
        compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), stage(x), rtol=1e-6, atol=1e-6)


def test_an_empty_batch(blocks):
    assert FusedStage((block.fused() for block in blocks), 2)(torch.randn(0, 16, 5, 5)).shape == (0, 24, 5, 5)


def test_errors(blocks):
    fused = [block.fused() for block in blocks]
    for micro_batch in (0, -1, True, "all", 1.5):
        with pytest.raises(
            ValueError, match=r"micro_batch=.* is not supported, use a number of images, 'auto' or None"
        ):
            FusedStage(fused, micro_batch)
    with pytest.raises(ValueError, match="at least one block"):
        FusedStage([])
    with pytest.raises(TypeError, match=r"takes fused blocks, got a MBConv; call its fused\(\) first"):
        FusedStage(blocks)
    for size in ((16, 5, 5), (2, 24, 5, 5)):
        with pytest.raises(ValueError, match=r"the input must be \[N, 16, H, W\], got \["):
            FusedStage(fused)(torch.randn(*size))


def test_prints_its_micro_batch(blocks):
    assert repr(FusedStage([blocks[0].fused()], "auto")).startswith(
        "FusedStage(\n  micro_batch='auto', one_launch=True\n"
    )


@pytest.fixture
def launches(monkeypatch):
    """Blocks of each call of the Hopper operator."""
    counts, runner = [], kernels.RUNNERS["mbconv_hopper"]

    def counted(x, expand, *packed, **options):
        counts.append(len(expand))
        return runner.operator(x, expand, *packed, **options)

    monkeypatch.setitem(kernels.RUNNERS, "mbconv_hopper", replace(runner, operator=counted))
    return counts


def equal_blocks(count, **options):
    return [MBConv(24, 24, expansion=2, **options).eval().requires_grad_(False) for _ in range(count)]


def test_equal_blocks_run_in_one_launch(blocks, launches):
    """Those with other sizes, other activations or no residual end it."""
    torch.manual_seed(0)
    changes = {"activation": nn.ReLU}, {"se_ratio": 0.5}, {"se_ratio": 0.5, "squeeze_activation": nn.SiLU}
    blocks = [*blocks[:1], *equal_blocks(3)]
    for options in changes:
        blocks += equal_blocks(2, **options)
    x = torch.randn(2, 16, 6, 7)
    expected = nn.Sequential(*blocks)(x)
    twins = [block.fused() for block in blocks]
    torch.testing.assert_close(FusedStage(twins)(x), expected, rtol=1e-4, atol=1e-4)
    assert launches == [1, 3, 2, 2, 2]
    launches.clear()
    apart = FusedStage(twins, one_launch=False)
    torch.testing.assert_close(apart(x), expected, rtol=1e-4, atol=1e-4)
    assert launches == [1] * 10


def test_weights_are_stacked_once(launches):
    stage = FusedStage(block.fused() for block in equal_blocks(2))
    x = torch.randn(2, 24, 6, 7)
    first, again = stage(x), stage(x)
    assert torch.equal(first, again) and launches == [2, 2]
    assert len(stage._stacked) == 1
    with torch.no_grad():
        compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), first, rtol=1e-6, atol=1e-6)
