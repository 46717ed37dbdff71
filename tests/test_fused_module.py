"""What `fusion.fuse` returns: calls, errors, and what else a module is asked for."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fusion
from fusion.cuda_graphs import CudaGraphs
from fusion.modules import FusedBlock
from fusion.planner.plan import PlanError
from models import ConvFirst, MBConv


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = MBConv(16, 16, expansion=2), MBConv(16, 16, expansion=2), nn.Conv2d(16, 8, 1)
    return nn.Sequential(*layers, ConvFirst(8, 8, expansion=2)).eval()


@pytest.fixture
def fused(network):
    return fusion.fuse(network)


def images(**options):
    return torch.randn(2, 16, 6, 7, generator=torch.Generator().manual_seed(0), **options)


def test_needs_no_context_for_inference(fused, network):
    out = fused(images())
    assert not out.requires_grad and not any(parameter.requires_grad for parameter in fused.parameters())
    with torch.no_grad():
        torch.testing.assert_close(out, network(images()), rtol=1e-4, atol=1e-5)


def test_gradients_are_refused(fused):
    x = images(requires_grad=True)
    for run in (fused, lambda x: fused.explain(x)):
        with pytest.raises(RuntimeError, match=r"its input requires one; call it under torch.no_grad\(\) or"):
            run(x)
    with torch.no_grad():
        assert not fused(x).requires_grad
    with pytest.raises(RuntimeError, match=r"has no gradient, but one of its inputs requires a gradient"):
        fused.module[0](x)


def test_training_mode_is_refused(fused):
    with pytest.raises(RuntimeError, match="a fused module is for inference: train the original module"):
        fused.train()
    assert fused.eval() is fused and fused.train(False) is fused
    assert not any(module.training for module in fused.modules())


def test_state_dicts_are_refused_with_advice(fused, network):
    message = r"loads no state_dict: load it into the original module and call fusion.fuse on that again"
    for holder in (fused, nn.Sequential(fused)):
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=message):
                holder.load_state_dict(network.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=r"0 is a FusedMBConv, whose weights are folded.*and fuse that again"):
        fused.module.load_state_dict(network.state_dict())
    assert set(fused.state_dict()) == {"module.2.weight", "module.2.bias"}


def test_an_input_of_another_dtype_is_explained(fused):
    with pytest.raises(
        TypeError, match=r"dtype torch.float64, the layers that are not fused have torch.float32: conve"
    ):
        fused(images(dtype=torch.float64))
    assert fused.double()(images(dtype=torch.float64)).dtype == torch.float64


def test_an_input_on_another_device_is_explained(fused):
    with pytest.raises(RuntimeError, match=r"the input is on meta, the layers that are not fused are on cpu: move one"):
        fused(images().to("meta"))


def test_errors_of_the_network_itself_are_not_changed(fused):
    with pytest.raises(ValueError, match=r"FusedStage: the input must be \[N, 16, H, W\], got \[2, 8, 6, 7\]"):
        fused(images()[:, :8])


def test_no_kernel_for_a_shape_says_what_to_do():
    fused = fusion.fuse(ConvFirst(12, 12, expansion=2, group_width=4).eval())
    with pytest.raises(PlanError) as caught:
        fused(images()[:, :12])
    assert "example_input" in caught.value.__notes__[0]


def test_attributes_and_methods_of_the_original_are_found(small_network):
    network = small_network()
    fused = fusion.fuse(network)
    assert fused.config is not network.config and fused.config == network.config
    assert fused.get_classifier() is fused.module.classifier
    assert fused.stages[1][0] is fused.module.stages[1][0]
    with pytest.raises(AttributeError, match="'FusedModule' object has no attribute 'unknown'"):
        fused.unknown  # noqa: B018
    assert not hasattr(fused, "fused")


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_independent(copy_of, cuda_graphs, network):
    fused = fusion.fuse(network, images(), cuda_graphs=cuda_graphs)
    twin = copy_of(fused)
    expected = fused(images())
    assert torch.equal(twin(images()), expected)
    assert twin.explain().rows[0].name == "0"
    if cuda_graphs:
        assert isinstance(twin.graphs, CudaGraphs) and twin.graphs.module is twin.module
    nn.init.zeros_(fused.module[2].weight)
    assert torch.equal(twin(images()), expected)


def test_compiles_as_one_graph(fused):
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), fused(images()), rtol=1e-6, atol=1e-6)


def test_conversions_reach_what_is_not_fused_and_forget_what_ran(network):
    fused = fusion.fuse(network, images(), cuda_graphs=True)
    assert fused.explain().rows[0].input is not None
    fused.bfloat16()
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.bfloat16}
    assert fused(images().bfloat16()).dtype == torch.bfloat16
    assert fused.explain().rows[0].plan.shape.dtype == "bfloat16"


def test_folded_weights_are_on_the_cpu(fused):
    for block in fused.modules():
        if isinstance(block, FusedBlock):
            assert {tensor.device.type for tensor in vars(block.weights).values()} == {"cpu"}
