import copy

import pytest
import torch
from torch import nn

from fusion.fused_sequential import FusedSequential
from fusion.stage import FusedStage
from models import ConvFirst, MBConv


@pytest.fixture(scope="module")
def blocks():
    torch.manual_seed(0)
    blocks = [MBConv(16, 16, expansion=2) for _ in range(3)] + [ConvFirst(16, 16, expansion=2)]
    return [block.eval().requires_grad_(False) for block in blocks]


@pytest.fixture
def layers(blocks):
    return {"a": blocks[0].fused(), "b": blocks[1].fused(), "eager": blocks[2], "c": blocks[3].fused()}


def x():
    return torch.randn(3, 16, 5, 6, generator=torch.Generator().manual_seed(0))


def same(out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_consecutive_fused_blocks_make_stages(layers, blocks):
    chain = FusedSequential(layers)
    stage, eager, alone = chain.parts
    assert list(stage.blocks) == [chain.a, chain.b]
    assert eager is blocks[2] and alone is chain.c
    same(chain(x()), nn.Sequential(*blocks)(x()))
    assert [name for name, _ in chain.named_children()] == ["a", "b", "eager", "c"]


@pytest.mark.parametrize("micro_batch", [1, "auto"])
def test_micro_batches(micro_batch, layers, blocks):
    chain = FusedSequential(layers, micro_batch)
    assert [type(part) for part in chain.parts] == [FusedStage, MBConv, FusedStage]
    assert chain.parts[0].micro_batch == chain[1:].parts[0].micro_batch == micro_batch
    same(chain(x()), nn.Sequential(*blocks)(x()))
    assert f"micro_batch={micro_batch!r}" in repr(chain)


def test_layers_can_be_indexed_and_exchanged(layers, blocks):
    chain = FusedSequential(layers)
    same(chain[:2](x()), nn.Sequential(*blocks[:2])(x()))
    same(chain[1](x()), blocks[1](x()))
    chain(x())
    chain[1] = nn.Identity()
    same(chain(x()), nn.Sequential(blocks[0], *blocks[2:])(x()))
    chain.append(blocks[1].fused())
    same(chain(x()), nn.Sequential(blocks[0], *blocks[2:], blocks[1])(x()))
    assert len(chain.parts) == 4


def test_a_copy_runs_its_own_blocks(layers):
    chain = FusedSequential(layers)
    expected = chain(x())
    twin = copy.deepcopy(chain)
    assert twin.parts[0].blocks[0] is twin.a is not chain.a
    assert torch.equal(twin(x()), expected)


def test_compiles_as_one_graph(layers):
    chain = FusedSequential(layers)
    with torch.no_grad():
        compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x()), chain(x()), rtol=1e-6, atol=1e-6)


def test_strides_and_a_head_in_a_stage_that_the_planner_divides():
    """Sizes change from block to block, and the head has no map."""
    from models import ConvBnAct
    from models.pooled_head import PooledHead

    torch.manual_seed(0)
    blocks = [
        ConvBnAct(3, 16, 3, stride=2),
        ConvFirst(16, 24, expansion=2, stride=2),
        MBConv(24, 24),
        MBConv(24, 32, stride=2),
    ]
    network = nn.Sequential(*blocks, PooledHead(32, 40)).eval().requires_grad_(False)
    images = torch.randn(3, 3, 35, 40)
    for micro_batch in (None, 2, "auto"):
        chain = FusedSequential({str(i): block.fused() for i, block in enumerate(network)}, micro_batch)
        assert len(chain.parts) == 1
        same(chain(images), network(images))
    head = FusedStage([network[-1].fused()], "auto")
    same(head(torch.ones(2, 32, 3, 3)), network[-1](torch.ones(2, 32, 3, 3)))
