"""Strides and sharing of memory under the backend: as in the model, though fused blocks give channels_last."""

import pytest
import torch
from torch import nn

from fusion.backend import compile_graph
from fusion.backend.chain import run_chain


class Model(nn.Module):
    """Two blocks of 8 channels and a function of them and an image."""

    def __init__(self, blocks, function):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.function = function

    def forward(self, x):
        return self.function(*self.blocks, x)


@pytest.fixture
def assert_same(random_block, uncompiled):
    """`(function, x=None)`: compiled, a model gives what it gives uncompiled, its strides too, and has a chain."""
    blocks = [random_block(8, 8, expansion=expansion).double().eval() for expansion in (2, 3)]

    def check(function, x=None):
        model = Model(blocks, function).eval()
        x = torch.randn(2, 8, 9, 7, dtype=torch.float64) if x is None else x
        fused = torch.compile(model, backend=compile_graph, options={"min_speedup": 0, "strict": True})
        outs, expected = (each if isinstance(each, tuple) else (each,) for each in (fused(x.clone()), model(x.clone())))
        for out, eager in zip(outs, expected, strict=True):
            torch.testing.assert_close(out, eager, rtol=1e-6, atol=1e-6)
            assert out.stride() == eager.stride()
        assert any(node.target is run_chain._opoverload for node in uncompiled[0].graph.nodes)

    return check


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y.flatten(2),
        lambda y: y.flatten(2).transpose(1, 2),
        lambda y: y.permute(0, 2, 3, 1),
        lambda y: y[:, :, 1:-1],
        lambda y: y.unbind(0),
        lambda y: y.unsqueeze(1) * 2,
    ],
    ids=["flatten", "tokens", "permute", "slice", "unbind", "five"],
)
def test_outputs_of_any_shape_have_their_strides(function, assert_same):
    assert_same(lambda first, second, x: function(second(first(x))))


def test_an_input_of_unusual_strides(assert_same):
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64).transpose(2, 3)
    assert_same(lambda first, second, x: first(x), x)


@pytest.mark.parametrize(
    "function",
    [
        lambda y: torch.as_strided(y, (2, 8), (504, 63)),
        lambda y: y.view_as(y.flatten(1)),
        lambda y: torch.ops.aten.view.default(y, [2, -1]),
        lambda y: torch.view_as_complex(nn.functional.pad(y, (0, 1)).unflatten(3, (4, 2))),
    ],
    ids=["as_strided", "view_as", "aten", "complex"],
)
def test_functions_that_read_strides(function, assert_same):
    assert_same(lambda first, second, x: function(first(x)))


def test_an_operator_of_the_users_own_may_read_strides(assert_same):
    @torch.library.custom_op("fusion_tests::first_of_memory", mutates_args=())
    def first_of_memory(x: torch.Tensor) -> torch.Tensor:
        return torch.as_strided(x, (5,), (1,)).clone()

    first_of_memory.register_fake(lambda x: x.new_empty(5))
    assert_same(lambda first, second, x: first_of_memory(first(x)))


def test_blocks_that_share_an_output_keep_formats(assert_same):
    def function(first, second, x):
        y = first(x)
        return (second(y) * y).view(len(y), -1)

    assert_same(function)


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y.flatten(1),
        lambda y: y.contiguous(),
        lambda y: y.reshape(-1),
        lambda y: y.permute(0, 2, 3, 1).contiguous(),
    ],
    ids=["flatten", "contiguous", "reshape", "copy"],
)
def test_changes_in_place_of_what_may_be_a_view(view, assert_same):
    def function(first, second, x):
        y = first(x)
        view(y).mul_(2)
        return second(y), y

    assert_same(function)


@pytest.mark.parametrize("view", [lambda y: y[:1], lambda y: y.flatten(1)], ids=["slice", "flatten"])
def test_outputs_that_share_memory_still_do(view, random_block, uncompiled):
    block = random_block(8, 8, expansion=3).double()

    def function(x):
        y = block(x)
        return y, view(y)

    fused = torch.compile(function, backend=compile_graph, options={"min_speedup": 0, "strict": True})
    y, viewed = fused(torch.randn(2, 8, 9, 7, dtype=torch.float64))
    y.add_(1)
    assert torch.equal(viewed, view(y))


def test_a_view_of_single_pixels_is_no_reason_for_copies(random_block, uncompiled):
    block = random_block(8, 8, expansion=3).double()

    def function(x):
        y = nn.functional.adaptive_avg_pool2d(torch.tanh(block(x)), 1)
        return y.view(len(y), -1)

    torch.compile(function, backend=compile_graph, options={"min_speedup": 0, "strict": True})(
        torch.randn(2, 8, 9, 7, dtype=torch.float64)
    )
    (chain,) = (node for node in uncompiled[0].graph.nodes if node.target is run_chain._opoverload)
    assert [user.target for user in chain.users] == [torch.tanh]
