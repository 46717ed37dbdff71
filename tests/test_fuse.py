"""`fusion.fuse`: which parts of a network run fused, and what the result computes."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fusion
from fusion.fused_sequential import FusedSequential
from fusion.modules import FusedBlock, FusedConvFirst, FusedMBConv
from fusion.stem_convfirst_module import FusedStemConvFirst
from models import ConvBnAct, ConvFirst, Ffn, MBConv


@pytest.fixture
def network(small_network):
    return small_network().double()


def images(batch=2, height=37, width=33, channels=3):
    torch.manual_seed(1)
    return torch.randn(batch, channels, height, width, dtype=torch.float64)


def chain(*blocks):
    """A sequence of blocks in eval mode, float64."""
    return nn.Sequential(*blocks).eval().double()


def fused_names(fused):
    return [name for name, module in fused.module.named_modules() if isinstance(module, FusedBlock)]


@torch.no_grad()
def assert_same(fused, original, *inputs):
    """Up to the rounding of biases, which are packed in fp32 for float64 inputs too."""
    torch.testing.assert_close(fused(*inputs), original(*inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}, {"micro_batch": "auto"}, {"cuda_graphs": True}], ids=str)
@pytest.mark.parametrize("with_example", [False, True])
def test_a_whole_network_computes_the_same(with_example, options, network):
    x = images()
    fused = fusion.fuse(network, x if with_example else None, **options)
    blocks = [f"stages.{s}.{b}" for s, n in enumerate(network.config.depths) for b in range(n)]
    joined = [f"{blocks[0]}.{part}" for part in ("stem", "block", "together")]
    assert fused_names(fused) == [*joined, *blocks[1:], "head"]
    for inputs in (x, x.contiguous(memory_format=torch.channels_last), images(1, 17, 40)):
        assert_same(fused, network, inputs)
    assert fused.left_eager == {}


def test_the_original_is_untouched_and_its_weights_are_not_shared(network):
    before = copy.deepcopy(network.state_dict())
    fused = fusion.fuse(network, images())
    expected = fused(images())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(fused(images()), expected)


def test_weights_that_are_loaded_into_the_original_count_when_it_is_fused_again(network, small_network):
    other = small_network(seed=1).double()
    first = fusion.fuse(network)
    network.load_state_dict(other.state_dict())
    assert_same(fusion.fuse(network), other, images())
    with torch.no_grad():
        assert not torch.allclose(first(images()), other(images()))


def test_plans_are_made_at_once_for_an_example_and_later_for_other_shapes(network):
    fused = fusion.fuse(network, images())
    blocks = [module for module in fused.modules() if isinstance(module, FusedBlock)]
    blocks = [block for block in blocks if not isinstance(block, FusedStemConvFirst)]
    assert [len(block.plans) for block in blocks] == [1] * len(blocks)
    assert all(block.layouts or isinstance(block, FusedMBConv) for block in blocks)
    assert not any(block.plans for block in fusion.fuse(network).modules() if isinstance(block, FusedBlock))
    fused(images())
    assert [len(block.plans) for block in blocks] == [1] * len(blocks)
    fused(images(1))
    assert [len(block.plans) for block in blocks] == [2] * len(blocks)


@pytest.mark.parametrize(
    "block",
    [
        lambda: ConvFirst(16, 16, expansion=3),
        lambda: ConvFirst(16, 24, expansion=3, stride=2),
        lambda: MBConv(16, 16, expansion=2),
        lambda: MBConv(16, 24, expansion=2, stride=2),
        lambda: Ffn(16, 16, expansion=2),
    ],
)
def test_a_single_block(block):
    block = block().eval().double()
    fused = fusion.fuse(block, images(channels=16))
    assert isinstance(fused.module, FusedBlock)
    assert_same(fused, block, images(channels=16))


class Branches(nn.Module):
    """Blocks in containers of every kind, one of them in two places."""

    def __init__(self):
        super().__init__()
        self.shared = ConvFirst(16, 16, expansion=2)
        self.many = nn.ModuleList([ConvFirst(16, 16, expansion=2), MBConv(16, 16, expansion=2)])
        self.named = nn.ModuleDict({"a": MBConv(16, 16, expansion=2), "b": nn.Sequential(nn.Identity(), self.shared)})
        self.deep = nn.Sequential(nn.Sequential(nn.Sequential(ConvFirst(16, 16, expansion=2)), nn.ReLU()))
        self.nothing = None
        self.register_module("no_module", None)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, *, factor=1.0):
        y = self.shared(x)
        for block in self.many:
            y = y + block(y)
        y = self.named["b"](self.named["a"](y))
        return {"out": [self.scale * self.deep(y) * factor, len(self.many)], "first": y}


def test_containers_and_a_block_in_two_places():
    network = Branches().eval().double()
    x = images(channels=16)
    for example in (None, x, (x,), {"x": x, "factor": 2.0}):
        fused = fusion.fuse(network, example)
        assert fused_names(fused) == ["shared", "many.0", "many.1", "named.a", "deep.0.0.0"]
        assert fused.module.named["b"][1] is fused.module.shared
        assert fused.module.nothing is None and fused.module.no_module is None
        with torch.no_grad():
            out, expected = fused(x, factor=3.0), network(x, factor=3.0)
        torch.testing.assert_close(out, expected)
        assert out["out"][1] == 2


@pytest.mark.parametrize("make", [lambda: MBConv(16, 16, expansion=2), lambda: ConvFirst(16, 16, expansion=2)])
def test_a_block_twice_in_a_sequence(make):
    block = make()
    network = chain(block, block, make(), block)
    fused = fusion.fuse(network, images(channels=16))
    assert fused.module[0] is fused.module[1] is fused.module[3] is not fused.module[2]
    assert_same(fused, network, images(channels=16))
    assert [row.name for row in fused.explain().rows] == ["0", "0", "2", "0"]


class Iterating(nn.Module):
    """Runs the layers of a sequence one by one, and returns what each of them gives."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(MBConv(16, 16, expansion=2) for _ in range(3)), ConvFirst(16, 16, expansion=2))

    def forward(self, x):
        outs = [self.blocks(x), self.blocks[1:3](x)]
        for index, block in enumerate(self.blocks):
            x = block(x)
            outs.append(x * index)
        return outs


def test_a_sequence_can_still_be_indexed_and_iterated_over():
    network = Iterating().eval().double()
    fused = fusion.fuse(network)
    assert isinstance(fused.module.blocks, FusedSequential) and len(fused.module.blocks) == 4
    assert_same(fused, network, images(channels=16))


def test_subclasses_of_sequences_are_kept():
    class Doubling(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    network = nn.Sequential(Doubling(MBConv(16, 16), MBConv(16, 16))).eval().double()
    fused = fusion.fuse(network)
    assert type(fused.module[0]) is Doubling and fused_names(fused) == ["0.0", "0.1"]
    assert_same(fused, network, images(channels=16))


def test_hooks_and_attributes_of_a_sequence_are_kept():
    network = chain(MBConv(16, 16), MBConv(16, 16))
    network.title = "stage"
    network.register_forward_hook(lambda module, args, out: 2 * out)
    fused = fusion.fuse(network)
    assert isinstance(fused.module, FusedSequential) and fused.title == "stage"
    assert_same(fused, network, images(channels=16))


def test_blocks_with_hooks_stay_as_they_are():
    network = chain(ConvFirst(16, 16, expansion=2), ConvFirst(16, 16, expansion=2), ConvFirst(16, 16, expansion=2))
    network[0].register_forward_hook(lambda module, args, out: out + 1)
    network[1].expand.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    fused = fusion.fuse(network)
    assert fused_names(fused) == ["2"]
    assert fused.left_eager["0"] == "it has hooks, which a fused kernel would not run; remove them before fusing"
    assert fused.left_eager["1"].startswith("its submodule 'expand' has hooks")
    assert_same(fused, network, images(channels=16))


def test_hooks_on_fused_blocks_run():
    network = chain(MBConv(16, 16), MBConv(16, 16), MBConv(16, 16))
    fused = fusion.fuse(network)
    seen = []
    fused.module[1].register_forward_hook(lambda module, args, out: seen.append(out))
    assert_same(fused, network, images(channels=16))
    torch.testing.assert_close(seen[0], network[:2](images(channels=16)))


def test_parametrized_weights_are_folded():
    network = chain(ConvFirst(16, 16, expansion=2), ConvFirst(16, 16, expansion=2))
    parametrizations.weight_norm(network[0].expand).eval()
    with torch.no_grad():
        network[0].expand.parametrizations.weight.original0.mul_(1.5)
    fused = fusion.fuse(network)
    assert fused_names(fused) == ["0", "1"]
    assert_same(fused, network, images(channels=16))


def test_a_subclass_with_another_forward_is_not_taken_for_its_base():
    class Twice(ConvFirst):
        def forward(self, x):
            return super().forward(super().forward(x))

    class Named(ConvFirst):
        title = "a subclass that changes nothing"

    network = chain(Twice(16, 16, expansion=2), Named(16, 16, expansion=2))
    fused = fusion.fuse(network)
    assert fused_names(fused) == ["1"]
    assert "Twice overrides the forward of ConvFirst, but not fused()" in fused.left_eager["0"]
    assert_same(fused, network, images(channels=16))


def test_a_forward_that_was_replaced_is_not_ignored():
    network = chain(ConvFirst(16, 16, expansion=2))
    network[0].forward = lambda x: -x
    fused = fusion.fuse(network)
    assert "its forward is replaced" in fused.left_eager["0"]
    assert_same(fused, network, images(channels=16))


def test_layers_that_the_block_does_not_have_by_itself_are_not_ignored():
    class LowRank(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    network = chain(*(ConvFirst(16, 16, expansion=2) for _ in range(4)))
    network[0].project = LowRank(32, 16, 1, bias=False)
    network[1].project_bn = nn.Identity()
    network[2].conv_bn = nn.BatchNorm2d(16, track_running_stats=False)
    network.double().eval()
    fused = fusion.fuse(network)
    assert fused_names(fused) == ["3"]
    assert fused.left_eager["0"] == "its submodule 'project' is a LowRank, which ConvFirst does not have by itself"
    assert "running_mean" in fused.left_eager["1"]
    assert "batch norm without running statistics cannot be folded" in fused.left_eager["2"]
    assert_same(fused, network, images(channels=16))


def test_blocks_without_a_kernel_stay_as_they_are_and_are_named(caplog):
    network = chain(MBConv(16, 16), MBConv(16, 16, activation=nn.Mish), MBConv(16, 16))
    with caplog.at_level(logging.WARNING):
        fused = fusion.fuse(network)
    assert fused_names(fused) == ["0", "2"]
    assert list(fused.left_eager) == ["1"] and "Mish" in fused.left_eager["1"]
    assert "2 blocks are fused, 1 stay eager: 1 (reasons in left_eager" in caplog.text
    assert_same(fused, network, images(channels=16))


def test_blocks_without_a_tile_for_the_example_stay_as_they_are():
    network = chain(ConvFirst(12, 12, expansion=2, group_width=4), ConvFirst(12, 16, expansion=2, group_width=4))
    network.append(ConvFirst(16, 16, expansion=2).double().eval())
    x = images(channels=12)
    fused = fusion.fuse(network, x)
    assert fused_names(fused) == ["2"]
    assert "in_channels=12 is not supported" in fused.left_eager["0"]
    assert_same(fused, network, x)
    with pytest.raises(ValueError, match="in_channels=12") as caught:
        fusion.fuse(network)(x)
    assert "example_input: blocks that have no kernel for it then stay" in caught.value.__notes__[0]


def test_a_block_inside_of_a_block_that_cannot_be_fused_is():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ConvFirst(16, 16, expansion=2)

        def fused(self, tuner):
            raise fusion.planner.plan.PlanError("there is no such kernel")

        def forward(self, x):
            return self.inner(x)

    Outer.__module__ = ConvFirst.__module__
    fused = fusion.fuse(chain(Outer()))
    assert fused_names(fused) == ["0.inner"]
    assert fused.left_eager == {"0": "there is no such kernel"}


def test_fused_must_give_a_fused_block():
    class Odd(nn.Module):
        def fused(self, tuner):
            return nn.Identity()

        def forward(self, x):
            return x

    fused = fusion.fuse(chain(Odd()))
    assert "fused() of Odd returns a Identity; it must return a fusion.modules.FusedBlock" in fused.left_eager["0"]


def test_fused_blocks_and_fused_networks_inside_of_a_network():
    block = ConvFirst(16, 16, expansion=2).eval().double()
    network = chain(ConvFirst(16, 16, expansion=2), block.fused(), fusion.fuse(chain(MBConv(16, 16))))
    fused = fusion.fuse(network, images(channels=16))
    assert len(fused_names(fused)) == 3
    assert_same(fused, network, images(channels=16))


def test_dtype_converts_what_is_not_fused_after_folding(small_network):
    """So weights are rounded once: the result is that of the float64 weights, not of rounded ones."""
    network = small_network().double()
    x = images().float()
    fused = fusion.fuse(network, x, dtype=torch.float32)
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.float32}
    out = fused(x)
    with torch.no_grad():
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), network(x.double()), rtol=1e-4, atol=1e-5)
    block = next(module for module in fused.modules() if isinstance(module, FusedConvFirst))
    assert block.weights.expand.dtype == torch.float64


def test_a_module_in_training_mode_is_refused(network):
    network.stages[1][0].conv_bn.train()
    with pytest.raises(RuntimeError, match=r"submodule 'stages.1.0.conv_bn' is in training mode.*call eval\(\) on"):
        fusion.fuse(network)
    with pytest.raises(RuntimeError, match="it is in training mode"):
        fusion.fuse(network.train())


def test_what_cannot_be_fused_is_refused(network):
    with pytest.raises(TypeError, match=r"takes an nn.Module, got a function"):
        fusion.fuse(lambda x: x)
    with pytest.raises(ValueError, match="is fused already"):
        fusion.fuse(fusion.fuse(network))
    with pytest.raises(ValueError, match=r"'stem.conv.weight' is on the meta device"):
        fusion.fuse(network.to("meta"))
    with pytest.raises(ValueError, match="micro_batch=0 is not supported"):
        fusion.fuse(chain(), micro_batch=0)
    with pytest.raises(ValueError, match="max_graphs=0 is not supported"):
        fusion.fuse(chain(), cuda_graphs=True, max_graphs=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tuning_needs_a_gpu(network):
    with pytest.raises(RuntimeError, match="tune=True measures kernels on a CUDA GPU and none is available"):
        fusion.fuse(network, tune=True)


def test_the_example_must_suit_the_network(network):
    with pytest.raises(
        TypeError, match=r"input has dtype torch.float32, the layers that are not fused have torch.float64"
    ):
        fusion.fuse(network, images().float())
    with pytest.raises(ValueError, match="add a batch dimension"):
        fusion.fuse(network, images()[0])


def test_importing_the_package_imports_no_torch():
    code = "import sys, fusion; import fusion.planner.plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="'fusion' has no attribute 'unknown'"):
        fusion.unknown  # noqa: B018


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_on_a_gpu(dtype, small_network, assert_within_rule):
    network = small_network().cuda()
    x = images(2, 64, 64).to("cuda", dtype)
    fused = fusion.fuse(network, x, dtype=dtype)
    assert not fused.left_eager
    with torch.no_grad():
        for inputs in (x, x.contiguous(memory_format=torch.channels_last), x[:1, :, :40]):
            exact = copy.deepcopy(network).double()(inputs.double())
            assert_within_rule(fused(inputs), copy.deepcopy(network).to(dtype)(inputs), exact)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp32_on_a_gpu_is_refused_with_advice(small_network):
    network = small_network().cuda()
    x = images(2, 64, 64).float().cuda()
    with pytest.raises(TypeError, match=r"fused kernels take torch.float16 or torch.bfloat16.*dtype=torch.half"):
        fusion.fuse(network, x)
    with pytest.raises(TypeError, match=r"supported are torch.float16 or torch.bfloat16"):
        fusion.fuse(network)(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tuned_plans_have_their_times(small_network, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_CACHE_DIR", str(tmp_path))
    block = ConvFirst(16, 16, expansion=2).eval().cuda()
    x = torch.randn(2, 16, 16, 16, device="cuda", dtype=torch.half)
    fused = fusion.fuse(block, x, dtype=torch.half, tune=True, progress=False)
    (row,) = fused.explain().rows
    assert row.measured_us > 0 and "measured fastest" in row.plan.why
    assert list(tmp_path.rglob("*.json"))


def test_a_stem_alone():
    stem = ConvBnAct(3, 16, 3, stride=2).eval().double()
    assert_same(fusion.fuse(stem), stem, images())
