"""`torch.compile(model, backend=fusion)`: results, fallbacks, and what may change between calls."""

import copy
import gc
import threading
import warnings

import pytest
import torch
from torch import nn

from fusion.backend import chain as chain_module
from fusion.backend import compile_graph
from fusion.backend.chain import run_chain
from models import ConvFirst, MBConv

FUSE_ALL = {"min_speedup": 0, "strict": True}


def compiled(model, **options):
    return torch.compile(model, backend=compile_graph, options={**FUSE_ALL, **options})


def assert_close(out, expected):
    """Up to the rounding of biases, which are packed in fp32 for float64 inputs too."""
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def chains_in(graph_module):
    return [node for node in graph_module.graph.nodes if node.target is run_chain._opoverload]


@pytest.fixture
def network(small_network):
    return small_network().double().requires_grad_(False)


def test_a_network_is_one_chain_and_computes_the_same(network, images, uncompiled):
    fused = compiled(network)
    for x in (images(), images(seed=3), images().contiguous(memory_format=torch.channels_last)):
        assert_close(fused(x), network(x))
    (node,) = chains_in(uncompiled[0])
    image, anchor, _ = node.args
    inputs = {part for part in uncompiled[0].graph.nodes if part.op == "placeholder"}
    assert {image, anchor} <= inputs
    left = [part.target for part in inputs - {image, anchor}]
    assert all("classifier" in name for name in left), "folded parameters are still inputs"


def test_inductor_compiles_what_is_left(network, images):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network
            self.scale = nn.Parameter(torch.randn(10, dtype=torch.float64), requires_grad=False)

        def forward(self, x):
            return torch.softmax(self.network(x * 2 - 1) * self.scale, dim=1)

    model = Model().eval()
    fused = compiled(model)
    assert_close(fused(images()), model(images()))


def test_any_batch_runs_without_compiling_again(network, images, uncompiled):
    fused = compiled(network)
    for batch in (2, 5, 3, 7, 4):
        x = images(batch)
        assert_close(fused(x), network(x))
    assert len(uncompiled) == 2, "one graph for the first batch, one for all others"
    x = images(1)
    assert_close(fused(x), network(x))


def test_a_batch_that_is_marked_dynamic_compiles_once(network, images, uncompiled):
    fused = compiled(network)
    for batch in (2, 6):
        x = images(batch)
        torch._dynamo.mark_dynamic(x, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            assert_close(fused(x), network(x))
    assert len(uncompiled) == 1


def test_graph_breaks_leave_several_chains(images, uncompiled, random_block):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = random_block(8, 8, expansion=3)
            self.second = random_block(8, 16, expansion=3)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x).relu()

    model = Broken().eval().double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    assert_close(compiled(model)(x), model(x))
    assert [len(chains_in(graph)) for graph in uncompiled] == [1, 1]


def test_blocks_with_layers_between_them_are_chains_of_their_own(random_block, uncompiled):
    first, second, third = (random_block(8, 8, expansion=3).double() for _ in range(3))
    model = nn.Sequential(first, second, nn.AvgPool2d(2), third).eval()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    assert_close(compiled(model)(x), model(x))
    assert len(chains_in(uncompiled[0])) == 2


def test_a_block_whose_output_is_used_twice_ends_its_chain(random_block, uncompiled):
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = random_block(8, 8, expansion=3)
            self.second = random_block(8, 8, expansion=3)

        def forward(self, x):
            y = self.first(x)
            return self.second(y) * y

    model = Skip().eval().double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    assert_close(compiled(model)(x), model(x))
    assert len(chains_in(uncompiled[0])) == 2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(context, small_network, images, uncompiled):
    model = small_network().double()  # its parameters require gradients
    fused = compiled(model)
    for _ in range(2):
        with context():
            assert_close(fused(images()), model(images()))
    assert len(chains_in(uncompiled[0])) == 1


def test_where_gradients_may_be_needed_nothing_is_fused(small_network, images, uncompiled):
    model = small_network().double()
    fused = compiled(model)
    out = fused(images())
    assert out.requires_grad
    assert_close(out, model(images()))
    assert not chains_in(uncompiled[0])
    with torch.no_grad():
        assert_close(fused(images()), model(images()))
    assert len(chains_in(uncompiled[-1])) == 1


def test_training_is_untouched(small_network, images, uncompiled):
    model = small_network().double()
    fused = compiled(model)
    with torch.no_grad():
        fused(images())
    model.train()
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    out = fused(images())
    torch.manual_seed(0)
    expected = twin(images())
    assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert_close(ours, theirs)
    assert [len(chains_in(graph)) for graph in uncompiled] == [1, 0]


def test_weights_that_are_loaded_later_count(network, small_network, images, uncompiled):
    other = small_network(seed=5).double()
    fused = compiled(network)
    fused(images())
    network.load_state_dict(other.state_dict())
    assert_close(fused(images()), other(images()).detach())
    with torch.no_grad():
        network.stages[1][0].project_bn.running_mean.add_(1.0)
    assert_close(fused(images()), network(images()))
    assert len(uncompiled) == 1, "folding again is no reason to compile again"


def test_a_parameter_that_is_replaced_counts(network, images, uncompiled):
    fused = compiled(network)
    fused(images())
    conv = network.stages[0][0].conv
    conv.weight = nn.Parameter(torch.randn_like(conv.weight), requires_grad=False)
    assert_close(fused(images()), network(images()))


def test_frozen_weights_are_not_watched(network, images, uncompiled):
    fused = compiled(network, freezing=True)
    before = fused(images())
    for parameter in network.stages.parameters():
        parameter.mul_(2)
    assert torch.equal(fused(images()), before)


def test_a_failure_gives_one_warning_and_the_unchanged_graph(network, images, uncompiled, monkeypatch):
    def fail(*_):
        raise RuntimeError("the matcher is broken")

    monkeypatch.setattr("fusion.backend.examine.find_blocks", fail)
    with pytest.warns(RuntimeWarning, match="left to Inductor.*the matcher is broken") as record:
        fused = compiled(network, strict=False)
        assert_close(fused(images()), network(images()))
    assert len(record) == 1
    torch.compiler.reset()
    with pytest.raises(Exception, match="the matcher is broken"):
        compiled(network, strict=True)(images())


def test_a_chain_that_fails_runs_layer_by_layer_with_one_warning(network, images, uncompiled, monkeypatch):
    fused = compiled(network, strict=False)
    fused(images())

    def fail(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("fusion.kernels.run", fail)
    with pytest.warns(RuntimeWarning, match=r"'stem' to 'head' cannot run.*layer by layer.*no such kernel") as record:
        for _ in range(2):
            assert_close(fused(images()), network(images()))
    assert len(record) == 1


def test_strict_raises_what_fails_while_running(network, images, uncompiled, monkeypatch):
    fused = compiled(network)
    fused(images())

    def fail(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("fusion.kernels.run", fail)
    with pytest.raises(RuntimeError, match="no such kernel"):
        fused(images())


def test_on_cpus_blocks_are_left_to_inductor(network, images, uncompiled):
    fused = torch.compile(network, backend=compile_graph)
    assert_close(fused(images()), network(images()))
    assert not chains_in(uncompiled[0])


def test_numbers_among_the_inputs(random_block):
    """Inductor has Dynamo trace a graph of changing numbers again, which is no failure."""
    block = random_block(8, 8, expansion=3).double()

    def model(x, scale):
        return block(x * scale) + scale

    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    fused = torch.compile(model, backend=compile_graph, dynamic=True, options={"min_speedup": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for scale in (0.1, 0.2, 0.3):
            assert_close(fused(x, scale), model(x, scale))


def test_an_unknown_option_raises(network, images):
    with pytest.raises(Exception, match="'fuse_all' of the backend 'fusion' is unknown"):
        torch.compile(network, backend=compile_graph, options={"fuse_all": True})(images())


def test_autocast_computes_in_its_dtype(small_network, images, uncompiled):
    model = small_network().requires_grad_(False)
    x = images(dtype=torch.float32)
    fused = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = fused(x), model(x)
    assert out.dtype == expected.dtype
    (node,) = chains_in(uncompiled[0])
    assert node.args[0].target == "to" and node.args[0].args[1] == torch.bfloat16
    exact = model(x)
    assert (out - exact).norm() <= 2 * (expected - exact).norm()


def test_threads_share_a_compiled_model(network, images, uncompiled):
    fused = compiled(network)
    fused(images(2))
    fused(images(3))
    inputs = [images(batch, seed=batch) for batch in (2, 3, 4, 5)]
    outs = [None] * len(inputs)

    def run(index):
        outs[index] = fused(inputs[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, x in zip(outs, inputs, strict=True):
        assert_close(out, network(x))


def test_memory_formats_that_the_model_sees_stay(random_block, uncompiled):
    """A block gives channels_last, but what it was compiled from gave contiguous tensors, and code relies on that."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = random_block(8, 8, expansion=3)

        def forward(self, x):
            y = self.block(x)
            return y, y.view(len(y), -1)

    model = Views().eval().double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    for each, expected in zip(compiled(model)(x), model(x), strict=True):
        assert_close(each, expected)
        assert each.stride() == expected.stride()
    torch.compiler.reset()
    block = random_block(8, 8, expansion=3).double()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        inputs = x.contiguous(memory_format=memory_format)
        weights = block.to(memory_format=memory_format)
        assert compiled(weights)(inputs).stride() == weights(inputs).stride()


def test_chains_go_with_the_graph_that_holds_them(network, images, uncompiled):
    gc.collect()
    before = set(chain_module._chains)
    fused = compiled(network)
    fused(images())
    assert len(set(chain_module._chains) - before) == 1
    del fused
    uncompiled.clear()
    torch.compiler.reset()
    gc.collect()
    assert not set(chain_module._chains) - before


def test_modules_that_share_a_graph_have_weights_of_their_own(uncompiled, caplog):
    """Dynamo compiles the blocks of a model one by one, with one graph for all of a class."""
    models = [ConvFirst(8, 8, expansion=3).eval().double().requires_grad_(False) for _ in range(3)]
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    fused = [compiled(model) for model in models]
    with caplog.at_level("INFO", logger="fusion.backend"):
        for _ in range(3):
            for each, model in zip(fused, models, strict=True):
                assert_close(each(x), model(x))
    assert len(uncompiled) == 1
    assert caplog.text.count("folding weights again") == 2
    chain = chain_module._chains[chains_in(uncompiled[0])[0].args[2]]
    assert len(chain._runners) == 3
    del models[0], fused[0], each, model
    gc.collect()
    assert len(chain._runners) == 2
    for each, model in zip(fused, models, strict=True):
        assert_close(each(x), model(x))


def test_graphs_tell_chains_of_other_sizes_apart(random_block, uncompiled):
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    for channels in (8, 16):
        compiled(random_block(8, channels, expansion=3).double())(x)
    compiled(MBConv(8, 8).eval().double().requires_grad_(False))(x)
    handles = [chains_in(graph)[0].args[2] for graph in uncompiled]
    assert len({handle.split(":")[0] for handle in handles}) == 3


def test_a_model_without_blocks_goes_to_inductor_as_it_is(uncompiled):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).eval()
    x = torch.randn(2, 3, 8, 8)
    model(x)
    fused = compiled(model.requires_grad_(False))
    assert torch.equal(fused(x), model(x))
    assert not chains_in(uncompiled[0])


def test_the_operator_refuses_gradients(network, images, uncompiled):
    compiled(network)(images())
    (node,) = chains_in(uncompiled[0])
    (address,) = chain_module._chains[node.args[2]]._runners
    (anchor,) = (each for each in (*network.parameters(), *network.buffers()) if each.data_ptr() == address)
    with pytest.raises(RuntimeError, match=r"fusion::chain.*no gradient"):
        run_chain(images().requires_grad_(), anchor, node.args[2])


def test_the_report_is_logged(network, images, uncompiled, caplog):
    with caplog.at_level("INFO", logger="fusion.backend"):
        compiled(network)(images())
    assert "blocks fused, 0 left to Inductor" in caplog.text
    assert "stages.3.1" in caplog.text
