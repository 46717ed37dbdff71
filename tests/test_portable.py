"""`portable=True`: plans and fused modules without kernels that a compiler cannot look into."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fusion
from fusion.joined_stem import JoinedStem
from fusion.modules import FusedBlock
from fusion.planner import blocks
from fusion.planner.families import FAMILIES, family_named
from fusion.planner.plan import PlanError, plan_block
from models import ConvBnAct, ConvFirst, Ffn, MBConv, PooledHead

GRAPH = blocks.convfirst(128, 32, 32, 64, 6)


def test_plans_take_portable_kernels_and_say_why():
    assert plan_block(GRAPH, "h200").kernel == "convfirst_hopper"
    plan = plan_block(GRAPH, "h200", portable=True)
    assert plan.kernel == "convfirst"
    assert plan.tile == plan_block(GRAPH, "h200", kernel="convfirst").tile
    assert "rejected Hopper kernel: it is not portable, as was asked for" in str(plan)


def test_blocks_and_kernels_that_are_not_portable_have_no_portable_plan():
    with pytest.raises(
        PlanError, match=r"no portable kernel runs .*; run the block layer by layer, or leave out portab"
    ):
        plan_block(blocks.ffn(128, 16, 16, 64, 4), "h200", portable=True)
    with pytest.raises(PlanError, match=r"kernel 'convfirst_hopper' does not run .*; use 'convfirst'"):
        plan_block(GRAPH, "h200", kernel="convfirst_hopper", portable=True)


def test_what_is_portable():
    """Kernels in plain Triton: their modules do not use Gluon."""
    from importlib import import_module

    for family in FAMILIES:
        launch = import_module(f"fusion.triton_kernels.{family.name}").launch
        module = import_module(launch.__module__)
        assert family.is_portable == (not hasattr(module, "gluon")), family.name


@pytest.mark.parametrize("with_example", [False, True])
@torch.no_grad()
def test_a_network_runs_portable_kernels_only(with_example, small_network, device):
    network = small_network()
    x = torch.randn(2, 3, 38, 34)
    dtype = torch.half if device == "cuda" else torch.double
    fused = fusion.fuse(
        network, x.to(device, dtype) if with_example else None, portable=True, dtype=dtype, device=device
    )
    assert fused.portable and fused.left_eager == {}
    out = fused(x.to(device, dtype))
    plans = [plan for block in fused.modules() if isinstance(block, FusedBlock) for _, plan in block.plans]
    assert len(plans) == sum(network.config.depths) + 2 and all(plan.family.is_portable for plan in plans)
    assert not any(isinstance(module, JoinedStem) for module in fused.modules())
    if device == "cpu":
        torch.testing.assert_close(out, network.double()(x.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_example", [False, True])
def test_a_block_without_a_portable_kernel_stays_eager(with_example, caplog):
    network = nn.Sequential(Ffn(16, 16, expansion=2), ConvFirst(16, 16, expansion=2)).eval()
    fused = fusion.fuse(network, torch.randn(2, 16, 6, 6) if with_example else None, portable=True)
    reason = "it runs on no portable kernel, only on ffn_hopper; leave out portable to use that"
    assert fused.left_eager == {"0": reason} and isinstance(fused.module[0], Ffn)
    assert "1 blocks are fused, 1 stay eager: 0" in caplog.text


@pytest.mark.parametrize(
    "copy_of",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), "saved"],
    ids=["deepcopy", "pickle", "saved"],
)
def test_copies_stay_portable(copy_of, tmp_path):
    fused = fusion.fuse(nn.Sequential(MBConv(16, 16, expansion=2)).eval(), portable=True)
    if copy_of == "saved":
        fused.save(tmp_path / "fused")
        twin = fusion.load(tmp_path / "fused")
    else:
        twin = copy_of(fused)
    twin(torch.randn(2, 16, 8, 8))
    ((_, plan),) = twin.module[0].plans
    assert twin.portable and plan.family is family_named("mbconv")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "block",
    [
        ConvFirst(16, 16, expansion=2),
        ConvFirst(16, 16, expansion=2, stride=2),
        ConvFirst(16, 16, expansion=2, stride=2, blur=False),
        MBConv(16, 16, expansion=2),
        MBConv(16, 16, expansion=2, kernel_size=5),
        MBConv(16, 16, expansion=2, stride=2),
        MBConv(16, 16, expansion=2, stride=2, blur=False),
        MBConv(16, 16, expansion=2, stride=2, blur=False, kernel_size=5),
        PooledHead(16, 32),
        ConvBnAct(3, 16, 3, stride=2),
    ],
    ids=lambda block: type(block).__name__,
)
@torch.no_grad()
def test_inductor_writes_portable_kernels_anew(block):
    """It takes their sources, and what those use by name, apart."""
    torch.compiler.reset()  # Dynamo compiles one function, FusedModule.forward, eight times
    channels = 3 if isinstance(block, ConvBnAct) and not isinstance(block, PooledHead) else 16
    x = torch.randn(3, channels, 12, 10, device="cuda", dtype=torch.half)
    fused = fusion.fuse(nn.Sequential(block).eval(), x, portable=True, dtype=torch.half, device="cuda")
    torch.testing.assert_close(torch.compile(fused, fullgraph=True)(x), fused(x), rtol=1e-2, atol=1e-2)
