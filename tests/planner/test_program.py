from dataclasses import replace

import pytest

from fusion.planner.blocks import convfirst, mbconv
from fusion.planner.lower import block_fused, layerwise
from fusion.planner.program import Loop, Memory, Program

GRAPH = convfirst(2, 8, 8, 16, 3)
X, Y = GRAPH.inputs[0], GRAPH.op("conv").output


def place(kernel, tensor, memory):
    placement = {**dict(kernel.placement), tensor: memory}
    return replace(kernel, placement=tuple(placement.items()))


def test_a_tensor_is_read_once_per_kernel():
    fused = block_fused(GRAPH).kernels[0]
    assert fused.reads.count(X) == 1
    weights = sum(weight.size for weight in GRAPH.weights())
    assert fused.bytes == 2 * (X.size + weights + GRAPH.outputs[0].size)
    conv, _, project = layerwise(GRAPH).kernels
    assert X in conv.reads and X in project.reads


def test_only_dram_tensors_cost_bytes():
    kernel = block_fused(GRAPH).kernels[0]
    assert place(kernel, Y, Memory.GLOBAL).bytes == kernel.bytes
    assert place(kernel, Y, Memory.DRAM).bytes == kernel.bytes + 2 * Y.size


def test_element_size_scales_bytes():
    half, single = (block_fused(convfirst(2, 8, 8, 16, 3, dtype=dtype)) for dtype in ("float16", "float32"))
    assert single.bytes == 2 * half.bytes
    assert single.ops_count == half.ops_count


def test_kernel_validates_placements():
    kernel = layerwise(GRAPH).kernels[1]
    with pytest.raises(ValueError, match=r"'expand' must place each tensor .* check conv\.out"):
        replace(kernel, placement=tuple((t, m) for t, m in kernel.placement if t != Y))
    with pytest.raises(ValueError, match="local tensors do not cross kernels"):
        place(kernel, Y, Memory.LOCAL)
    with pytest.raises(ValueError, match=r"loops over \['nothing'\]"):
        replace(kernel, loops=(Loop("nothing", (("C", 8),)),))
    with pytest.raises(ValueError, match="has no ops"):
        replace(kernel, ops=(), placement=(), partition=None)


def test_loop_validates_tiles():
    with pytest.raises(ValueError, match="tile of C must be positive"):
        Loop("x", (("C", 0),))


def test_program_validates_the_flow_of_tensors():
    conv, expand, project = layerwise(GRAPH).kernels
    with pytest.raises(ValueError, match=r"expects 'conv.out' in DRAM, where no earlier kernel left it"):
        Program("broken", GRAPH, (expand, conv, project))
    with pytest.raises(ValueError, match=r"expects 'conv.out' in DRAM"):
        Program("broken", GRAPH, (place(conv, Y, Memory.GLOBAL), expand, project))
    with pytest.raises(ValueError, match="they must run the graph's ops in its order"):
        Program("broken", GRAPH, (conv, expand))
    with pytest.raises(ValueError, match=r"op 'conv' runs twice"):
        Program("broken", GRAPH, (conv, conv, expand, project))
    with pytest.raises(ValueError, match=r"output 'residual.out' does not end in DRAM"):
        Program("broken", GRAPH, (conv, expand, place(project, GRAPH.outputs[0], Memory.GLOBAL)))
    with pytest.raises(ValueError, match="has 4-byte elements, not float16"):
        Program("broken", GRAPH, (replace(conv, element_size=4), expand, project))


def test_global_tensors_may_cross_kernels():
    conv, expand, project = layerwise(GRAPH).kernels
    program = Program("cached", GRAPH, (place(conv, Y, Memory.GLOBAL), place(expand, Y, Memory.GLOBAL), project))
    assert program.bytes == layerwise(GRAPH).bytes - 2 * 2 * Y.size


def test_a_local_tensor_may_be_recomputed():
    graph = mbconv(1, 8, 8, 16, 4)
    fused = block_fused(graph).kernels[0]
    pool = graph.op("pool")
    before, after = graph.ops[: graph.ops.index(pool)], graph.ops[graph.ops.index(pool) + 1 :]
    memories = {**dict(fused.placement), pool.output: Memory.GLOBAL}

    def kernel(name, ops):
        touched = dict.fromkeys(tensor for op in ops for tensor in (*op.inputs, *op.weights, op.output))
        placement = tuple((tensor, memories[tensor]) for tensor in touched)
        return replace(fused, name=name, ops=ops, placement=placement, partition=None)

    two_pass = Program("two-pass", graph, (kernel("pool", (*before, pool)), kernel("project", (*before, *after))))
    assert two_pass.ops_count == graph.ops_count + sum(op.ops_count for op in before)
    read_again = graph.inputs[0].size + sum(weight.size for op in before for weight in op.weights)
    assert two_pass.bytes == fused.bytes + 2 * read_again


def test_program_prints_kernels_placement_loops_and_cost():
    text = str(block_fused(convfirst(128, 64, 64, 32, 6), pixel_tile=(8, 16), hidden_tile=16))
    assert text.startswith("fused convfirst (float16), 1 kernel: 15.3 GOP, 67.14 MB, 227.9 OP/byte")
    assert "processors divide residual.out over N by 1 H by 8 W by 16, streaming x, conv.weight" in text
    assert "loop expand.out over C by 16, streaming expand.weight, project.weight via global -> local" in text
    assert "conv: conv 3x3, group width 8 (x, conv.weight) -> conv.out[N=128 H=64 W=64 C=32] in local" in text
    assert "-> residual.out[N=128 H=64 W=64 C=32] in DRAM" in text
    assert "3 kernels" in layerwise(GRAPH).describe()
