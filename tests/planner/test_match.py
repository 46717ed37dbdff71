import pytest

from fusion.planner.blocks import convfirst, ffn
from fusion.planner.graph import ELEMENT_SIZE
from fusion.planner.lower import block_fused
from fusion.planner.plan import block_shape


@pytest.mark.parametrize(
    "graph", [convfirst(3, 9, 13, 24, 4), convfirst(2, 8, 8, 16, 3, out_channels=40), ffn(3, 9, 13, 72, 2)]
)
def test_activations_are_what_the_fused_program_moves_besides_weights(graph):
    shape = block_shape(graph)
    weights = sum(weight.size for op in graph.ops for weight in op.weights) * ELEMENT_SIZE[graph.dtype]
    moved = block_fused(graph).bytes
    assert shape.pixels * shape.pixel_bytes + weights == moved
