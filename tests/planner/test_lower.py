import pytest

from fusion.planner.blocks import conv, convfirst, ffn, head, mbconv, stem_convfirst
from fusion.planner.graph import BlockGraph, OpKind, make_op
from fusion.planner.lower import block_fused, image_fused, layerwise, scaled, two_pass
from fusion.planner.program import Memory


def local_and_global(program):
    (kernel,) = program.kernels
    by_memory = {memory: {t.name for t, m in kernel.placement if m is memory} for memory in Memory}
    return by_memory[Memory.LOCAL], by_memory[Memory.GLOBAL]


@pytest.mark.parametrize(
    "graph, kernels",
    [
        (ffn(1, 8, 8, 16, 2), ["expand", "project"]),
        (convfirst(1, 8, 8, 16, 2), ["conv", "expand", "project"]),
        (convfirst(1, 8, 8, 16, 2, stride=2), ["conv", "expand", "project"]),
        (mbconv(1, 8, 8, 16, 2), ["expand", "conv", "pool", "squeeze", "excite", "gate", "project"]),
        (mbconv(1, 8, 8, 16, 2, stride=2), ["expand", "conv", "pool", "squeeze", "excite", "gate", "project"]),
        (
            mbconv(1, 8, 8, 16, 2, stride=2, blur=False),
            ["expand", "conv", "pool", "squeeze", "excite", "gate", "project"],
        ),
        (conv(1, 8, 8, 3, 16, stride=2, activation="relu"), ["conv"]),
    ],
    ids=["ffn", "convfirst", "convfirst-s2", "mbconv", "mbconv-s2", "mbconv-s2-no-blur", "conv"],
)
def test_layerwise_is_one_kernel_per_costed_op(graph, kernels):
    program = layerwise(graph)
    assert [kernel.name for kernel in program.kernels] == kernels
    fused = block_fused(graph)
    assert len(fused.kernels) == 1
    assert program.ops_count == fused.ops_count == graph.ops_count
    io = sum(tensor.size for tensor in (*graph.inputs, *graph.weights(), *graph.outputs))
    assert fused.bytes == 2 * io
    assert program.bytes >= fused.bytes


def test_layerwise_bytes_by_hand():
    x = 2 * 8 * 8 * 16
    kernels = layerwise(convfirst(2, 8, 8, 16, 3)).kernels
    assert [kernel.bytes // 2 for kernel in kernels] == [
        2 * x + 16 * 8 * 9,
        x + 3 * x + 16 * 48,
        3 * x + 48 * 16 + x + x,
    ]


def test_residual_costs_a_read_layerwise_and_nothing_fused():
    plain, residual = (convfirst(4, 8, 8, 16, 3, residual=flag) for flag in (False, True))
    assert layerwise(residual).bytes - layerwise(plain).bytes == 2 * residual.inputs[0].size
    assert block_fused(residual).bytes == block_fused(plain).bytes


def test_out_channels_other_than_in_channels():
    graph = convfirst(2, 8, 8, 16, 3, out_channels=40)
    pixels = 2 * 8 * 8
    assert graph.ops_count == 2 * pixels * (16 * 8 * 9 + 16 * 48 + 48 * 40)
    assert block_fused(graph).bytes == 2 * (pixels * (16 + 40) + 16 * 8 * 9 + 16 * 48 + 48 * 40)


def test_convfirst_keeps_hidden_tensors_local_and_walks_hidden_channels():
    program = block_fused(convfirst(1, 8, 8, 16, 2), pixel_tile=(4, 8), hidden_tile=16)
    assert local_and_global(program) == ({"conv.out", "expand.out", "activation.out", "project.out"}, set())
    (kernel,) = program.kernels
    assert kernel.partition.dims == (("N", 1), ("H", 4), ("W", 8))
    (loop,) = kernel.loops
    assert (loop.tensor, loop.dims) == ("expand.out", (("C", 16),))
    assert loop.streams == ("expand.weight", "project.weight")
    assert loop.through == (Memory.GLOBAL, Memory.LOCAL)


def test_mbconv_divides_hidden_channels_and_meets_in_global_memory():
    program = block_fused(mbconv(1, 16, 16, 32, 4), hidden_tile=64)
    local, shared = local_and_global(program)
    assert shared == {"squeeze.out", "project.out"}
    assert {"expand.out", "conv.out", "pool.out", "excite.out", "gate.out"} <= local
    (kernel,) = program.kernels
    assert (kernel.partition.tensor, kernel.partition.dims) == ("expand.out", (("N", 1), ("C", 64)))
    assert kernel.loops == ()


@pytest.mark.parametrize(
    "graph",
    [
        convfirst(2, 16, 16, 512, 6),
        convfirst(2, 16, 16, 512, 6, out_channels=640),
        convfirst(2, 16, 16, 512, 6, stride=2),
        convfirst(2, 16, 16, 512, 6, stride=2, blur=False),
        ffn(2, 16, 16, 512, 4),
    ],
    ids=["convfirst", "convfirst-k", "convfirst-s2", "convfirst-s2-no-blur", "ffn"],
)
@pytest.mark.parametrize("processors", [2, 4])
def test_scaled_adds_hidden_channels_in_global_memory(graph, processors):
    program = scaled(graph, processors, pixel_tile=(4, 8), hidden_tile=32)
    fused = block_fused(graph, pixel_tile=(4, 8), hidden_tile=32)
    assert (program.name, program.ops_count, program.bytes) == ("scaled", fused.ops_count, fused.bytes)
    local, shared = local_and_global(program)
    assert shared == {"expand.out"}
    assert local | shared == local_and_global(fused)[0] and "activation.out" in local
    (kernel,), (unscaled,) = program.kernels, fused.kernels
    channels = graph.outputs[0]["C"]
    assert kernel.partition.tensor == graph.outputs[0].name
    assert kernel.partition.dims == (("N", 1), ("H", 4), ("W", 8), ("C", channels // processors))
    assert (kernel.loops, kernel.partition.streams) == (unscaled.loops, unscaled.partition.streams)


def test_scaled_leaves_tiles_open():
    (kernel,) = scaled(convfirst(2, 16, 16, 512, 6)).kernels
    assert kernel.partition.dims == (("N", 1), ("H", None), ("W", None), ("C", 256))
    assert kernel.loops[0].dims == (("C", None),)


def test_blocks_that_cannot_be_scaled():
    with pytest.raises(ValueError, match="has no hidden channels that processors could add up; use the fused program"):
        scaled(conv(1, 8, 8, 16))
    with pytest.raises(ValueError, match="has no hidden channels"):
        scaled(head(1, 8, 8, 16, 32))
    for graph in (mbconv(1, 16, 16, 32, 4), stem_convfirst(1, 16, 16, 4, 32, 3)):
        with pytest.raises(ValueError, match=r"needs whole sums elsewhere .*; use the fused program"):
            scaled(graph)
    block = ffn(1, 8, 8, 16, 2)
    pool = make_op(OpKind.GLOBAL_AVERAGE_POOL, "pool", block.outputs)
    with pytest.raises(ValueError, match="pools over pixels outside of hidden channels"):
        scaled(BlockGraph("ffn_pool", (*block.ops, pool), block.inputs, (pool.output,)))


@pytest.mark.parametrize("processors", [1, 0, -2, 2.0])
def test_numbers_of_processors_that_divide_nothing(processors):
    with pytest.raises(ValueError, match=rf"over processors={processors}; use 2, 4, \.\.\."):
        scaled(convfirst(1, 8, 8, 64, 2), processors)


def test_channels_that_processors_cannot_divide():
    with pytest.raises(ValueError, match=r"the channels of x\[.*C=40\] do not divide over 3 processors"):
        scaled(convfirst(1, 8, 8, 40, 2), 3)
    with pytest.raises(ValueError, match=r"the channels of project.out\[.*C=42\] do not divide over 4 processors"):
        scaled(convfirst(1, 8, 8, 32, 2, out_channels=42), 4)
    with pytest.raises(ValueError, match="2 processors split a group of 'conv', whose group width is 8; use fewer"):
        scaled(convfirst(1, 8, 8, 24, 2), 2)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("stride, blur", [(1, True), (2, True), (2, False)])
def test_two_passes_meet_in_global_memory(stride, blur, residual):
    graph = mbconv(2, 16, 16, 32, 4, stride=stride, blur=blur, residual=residual and stride == 1)
    program = two_pass(graph, pixel_tile=(8, 16), hidden_tile=64)
    produce, project = program.kernels
    assert [op.name for op in produce.ops][-1] == "squeeze" and project.ops[0].name == "squeeze_activation"
    y = "blurpool.out" if stride == 2 and blur else "conv_activation.out"
    for kernel in program.kernels:
        assert {tensor.name for tensor, memory in kernel.placement if memory is Memory.GLOBAL} == {y, "squeeze.out"}
    assert produce.partition.dims == (("N", 1), ("H", 8), ("W", 16), ("C", 64))
    assert produce.partition.streams == ("x", "expand.weight", "conv.weight", "squeeze.weight")
    assert [(loop.tensor, loop.streams) for loop in project.loops] == [(y, ("excite.weight", "project.weight"))]
    assert program.ops_count == graph.ops_count
    # The fused program reads the input once, for the residual too.
    again = graph.inputs[0].size if residual and stride == 1 else 0
    assert program.bytes == block_fused(graph).bytes + 2 * again
    assert project.partition.streams == (("x",) if again else ())


def test_whole_images_leave_their_hidden_channels_in_global_memory():
    graph = mbconv(2, 16, 16, 32, 4)
    program = image_fused(graph, hidden_tile=64)
    (kernel,) = program.kernels
    local, shared = local_and_global(program)
    assert shared == {"conv_activation.out"}
    assert {"expand.out", "squeeze.out", "gate.out", "project.out"} <= local
    assert (kernel.partition.dims, kernel.partition.streams) == ((("N", None),), ("x",))
    (walk,) = kernel.loops
    assert (walk.tensor, walk.dims) == ("expand.out", (("C", 64),))
    assert set(walk.streams) == {tensor.name for tensor in graph.weights()}
    assert (program.ops_count, program.bytes) == (graph.ops_count, block_fused(graph).bytes)
    small, _ = local_and_global(image_fused(graph, hidden_tile=64, in_local_memory=True))
    assert small == local | shared


def test_blocks_that_have_no_two_passes():
    for graph in (convfirst(1, 8, 8, 16, 2), ffn(1, 8, 8, 16, 2), conv(1, 8, 8, 16)):
        with pytest.raises(ValueError, match="sums nothing over its hidden channels before the last product; use the"):
            two_pass(graph)
        with pytest.raises(ValueError, match="sums nothing over its hidden channels before the last product; use the"):
            image_fused(graph)
    with pytest.raises(ValueError, match="hidden_tile=12 splits a group of 'conv'; use a multiple of 8"):
        two_pass(mbconv(1, 16, 16, 32, 4), hidden_tile=12)


def test_tiles_must_suit_the_block():
    with pytest.raises(ValueError, match="give hidden_tile only"):
        block_fused(mbconv(1, 16, 16, 32, 4), pixel_tile=(8, 8))
    with pytest.raises(ValueError, match="use a multiple of 8"):
        block_fused(mbconv(1, 16, 16, 32, 4), hidden_tile=12)
    with pytest.raises(ValueError, match="has no hidden channels"):
        block_fused(conv(1, 8, 8, 16), hidden_tile=16)


def test_a_pooling_head_has_no_fused_program():
    head = conv(1, 8, 8, 16, 32, kernel_size=1)
    pool = make_op(OpKind.GLOBAL_AVERAGE_POOL, "pool", head.outputs)
    graph = BlockGraph("head", (*head.ops, pool), head.inputs, (pool.output,))
    with pytest.raises(ValueError, match="use the layerwise program"):
        block_fused(graph)
    assert len(layerwise(graph).kernels) == 2
