import pytest

from fusion.planner.graph import BlockGraph, OpKind, Role, Tensor, make_op

X = Tensor("x", {"N": 2, "H": 5, "W": 6, "C": 16})


def conv_weight(k=16, t=8, r=3, s=3, name="weight"):
    return Tensor(name, {"K": k, "T": t, "R": r, "S": s}, Role.WEIGHT)


def test_tensor_knows_its_dimensions():
    assert (X["H"], X.layout, X.size) == (5, "NHWC", 2 * 5 * 6 * 16)
    assert Tensor("x", (("N", 2), ("H", 5), ("W", 6), ("C", 16))) == X
    assert str(X) == "x[N=2 H=5 W=6 C=16]"
    with pytest.raises(KeyError, match="no dimension 'K'"):
        X["K"]


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_tensor_sizes_are_positive_integers(size):
    with pytest.raises(ValueError, match="dimension C must be a positive integer"):
        Tensor("x", {"C": size})


def test_ops_follow_from_kind_and_shapes():
    conv = make_op(OpKind.CONV, "conv", (X,), (conv_weight(k=32),), stride=2)
    assert conv.output.dims == (("N", 2), ("H", 3), ("W", 3), ("C", 32))
    assert conv.ops_count == 2 * 2 * 3 * 3 * 32 * 8 * 3 * 3
    pool = make_op(OpKind.GLOBAL_AVERAGE_POOL, "pool", (X,))
    assert pool.ops_count == X.size
    linear = make_op(OpKind.LINEAR, "fc", (pool.output,), (Tensor("fc.weight", {"K": 10, "C": 16}, Role.WEIGHT),))
    assert linear.output.dims == (("N", 2), ("C", 10))
    assert linear.ops_count == 2 * 2 * 10 * 16
    assert make_op(OpKind.MULTIPLY, "gate", (X, pool.output)).ops_count == X.size
    free = [
        make_op(OpKind.RELU, "relu", (X,)),
        make_op(OpKind.SILU, "silu", (X,)),
        make_op(OpKind.SIGMOID, "sigmoid", (pool.output,)),
        make_op(OpKind.ADD, "add", (X, X)),
        make_op(OpKind.CONCAT, "concat", (X, X)),
        make_op(OpKind.BLURPOOL, "blurpool", (X,), stride=2),
    ]
    assert [op.ops_count for op in free] == [0] * len(free)
    assert free[-2].output["C"] == 32
    assert free[-1].output.dims == (("N", 2), ("H", 3), ("W", 3), ("C", 16))


def test_convolution_attributes_are_those_of_its_weight():
    grouped = make_op(OpKind.CONV, "conv", (X,), (conv_weight(),))
    assert (grouped.kernel_size, grouped.group_width) == (3, 8)
    assert grouped.is_spatial_conv and not grouped.is_dense and not grouped.is_pointwise
    pointwise = make_op(OpKind.CONV, "conv", (X,), (conv_weight(k=4, t=16, r=1, s=1),))
    assert pointwise.is_pointwise and pointwise.is_dense and not pointwise.is_spatial_conv


@pytest.mark.parametrize(
    "kind, inputs, weights, message",
    [
        (OpKind.CONV, (X,), (), "cannot take inputs"),
        (OpKind.CONV, (X, X), (conv_weight(),), "it takes one NHWC tensor"),
        (OpKind.CONV, (X,), (conv_weight(t=5),), "group width 5 does not divide"),
        (OpKind.CONV, (X,), (conv_weight(k=15),), "15 output channels"),
        (OpKind.CONV, (X,), (conv_weight(r=2, s=2),), "odd-sized, got 2x2"),
        (OpKind.ADD, (X, Tensor("y", {"N": 2, "H": 5, "W": 6, "C": 8})), (), "differ in shape"),
        (OpKind.CONCAT, (X, Tensor("y", {"N": 2, "H": 5, "W": 5, "C": 8})), (), "agree in N, H and W"),
        (OpKind.MULTIPLY, (X, Tensor("g", {"N": 2, "C": 8})), (), "differ in N or C"),
        (
            OpKind.LINEAR,
            (Tensor("s", {"N": 2, "C": 8}),),
            (Tensor("w", {"K": 4, "C": 16}, Role.WEIGHT),),
            "differ in C",
        ),
    ],
)
def test_operands_must_fit(kind, inputs, weights, message):
    with pytest.raises(ValueError, match=message):
        make_op(kind, "op", inputs, weights)


def test_only_some_ops_have_a_stride():
    with pytest.raises(ValueError, match="stride 2 is not supported"):
        make_op(OpKind.RELU, "relu", (X,), stride=2)


def test_op_checks_its_output():
    relu = make_op(OpKind.RELU, "relu", (X,))
    with pytest.raises(ValueError, match="its inputs give"):
        type(relu)(OpKind.RELU, "relu", (X,), Tensor("y", {"N": 2, "H": 5, "W": 6, "C": 8}))


def test_graph_queries():
    conv = make_op(OpKind.CONV, "conv", (X,), (conv_weight(),))
    add = make_op(OpKind.ADD, "add", (X, conv.output))
    graph = BlockGraph("block", (conv, add), (X,), (add.output,))
    assert graph.producer(conv.output) is conv and graph.producer(X) is None
    assert graph.consumers(X) == (conv, add)
    assert graph.consumers(conv.weights[0]) == (conv,)
    assert graph.weights() == conv.weights
    assert [tensor.name for tensor in graph.tensors()] == ["x", "weight", "conv.out", "add.out"]
    assert graph.op("add") is add
    assert graph.ops_count == conv.ops_count
    assert graph.element_size == 2
    assert "conv: conv 3x3, group width 8 (x, weight) -> conv.out[N=2 H=5 W=6 C=16]" in str(graph)
    with pytest.raises(KeyError, match="no op 'pool', it has conv, add"):
        graph.op("pool")


def test_graph_validates_itself():
    relu = make_op(OpKind.RELU, "relu", (X,))
    after = make_op(OpKind.RELU, "after", (relu.output,))
    with pytest.raises(ValueError, match=r"op 'after' consumes relu\.out"):
        BlockGraph("block", (after, relu), (X,), (after.output,))
    with pytest.raises(ValueError, match="two ops are named 'relu'"):
        BlockGraph("block", (relu, relu), (X,), (relu.output,))
    with pytest.raises(ValueError, match="two tensors are named 'x'"):
        BlockGraph("block", (relu,), (X, X), (relu.output,))
    with pytest.raises(ValueError, match=r"output after.out.* is never produced"):
        BlockGraph("block", (relu,), (X,), (after.output,))
    with pytest.raises(ValueError, match="'int8' is not supported, use float16, bfloat16, float32"):
        BlockGraph("block", (relu,), (X,), (relu.output,), dtype="int8")
    with pytest.raises(ValueError, match="has no ops"):
        BlockGraph("block", (), (X,), (X,))
