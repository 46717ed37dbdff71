import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusion
from fusion.analysis.network_waterline import NetworkWaterline
from fusion.planner.blocks import convfirst, ffn, mbconv
from fusion.planner.layer_kind import LayerKind
from fusion.planner.lower import block_fused, layerwise
from fusion.planner.plan import plan_block
from fusion.planner.processor import PROCESSORS
from models import ConvFirst, Ffn, MBConv

N, C, H, W = 2, 8, 6, 10
PIXELS = N * H * W
X = torch.empty(N, C, H, W)


class Function(nn.Module):
    """A network that calls a function with its layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args):
        return self.function(self, *args)


def analysed(function, *args, processor="h200", **layers) -> NetworkWaterline:
    return fusion.waterline(Function(function, **layers).eval(), args or (X,), processor, progress=False)


def costs(found):
    """Name, kind, OPs and fp16 elements moved of each kernel."""
    return [(k.name, k.layer_kind, k.ops_count, k.bytes // 2) for k in found.layerwise.kernels]


@pytest.mark.parametrize(
    "block, graph",
    [
        (ConvFirst(C, C, expansion=3), convfirst(N, H, W, C, 3)),
        (MBConv(C, C), mbconv(N, H, W, C, 4)),
        (Ffn(C, C, expansion=4), ffn(N, H, W, C, 4)),
    ],
    ids=["convfirst", "mbconv", "ffn"],
)
def test_blocks_are_counted_as_the_planner_counts_them(block, graph):
    found = fusion.waterline(block.eval(), X, "h200", progress=False)
    expected = layerwise(graph).kernels
    assert [(k.ops_count, k.bytes) for k in found.layerwise.kernels] == [(k.ops_count, k.bytes) for k in expected]
    assert [k.layer_kind for k in found.layerwise.kernels] == [k.layer_kind for k in expected]
    (kernel,) = found.fused.kernels
    fused = block_fused(graph)
    assert (kernel.ops_count, kernel.bytes, kernel.layer_kind) == (fused.ops_count, fused.bytes, LayerKind.FUSED)
    (gain,) = found.blocks
    assert gain.gain == pytest.approx(found.layerwise.min_latency / found.fused.min_latency)
    assert gain.predicted == pytest.approx(plan_block(graph, "h200").predicted_us / 1e6)
    assert found.unknown == found.left == ()


def test_a_block_without_a_kernel_is_fused_in_theory_only():
    block = ConvFirst(C, C, expansion=3, group_width=4).eval()
    planned, found = (fusion.waterline(block, X, processor, progress=False) for processor in ("h200", "b200"))
    assert planned.blocks[0].kernel == found.blocks[0].kernel == "convfirst"
    found = fusion.waterline(Ffn(C, C, expansion=4).eval(), X, "a5000", progress=False)
    (gain,) = found.blocks
    assert gain.kernel is gain.predicted is None and "compute capability 9.0" in gain.reason
    assert found.fused == found.layerwise
    (kernel,) = found.all_fused.kernels
    assert kernel.bytes == block_fused(ffn(N, H, W, C, 4)).bytes
    assert gain.gain == pytest.approx(found.layerwise.min_latency / found.all_fused.min_latency)
    assert list(found.programs) == ["layerwise", "all fused"]


def test_trivial_fusions():
    found = analysed(
        lambda m, x: F.relu(m.norm(m.conv(x)) + x).mul_(m.scale),
        conv=nn.Conv2d(C, C, 3, padding=1),
        norm=nn.BatchNorm2d(C),
        scale=nn.Parameter(torch.ones(C, 1, 1)),
    )
    # Input, shortcut (the same tensor, once), weight and output; bias, norm, scale and activation are free.
    elements = 2 * PIXELS * C + C * C * 9
    assert costs(found) == [("conv", LayerKind.CONVOLUTION, 2 * PIXELS * C * C * 9, elements)]


def test_a_shortcut_from_further_back_is_read_once_more():
    found = analysed(
        lambda m, x: x + m.second(F.relu(m.first(x))), first=nn.Conv2d(C, 4 * C, 1), second=nn.Conv2d(4 * C, C, 1)
    )
    assert [elements for *_, elements in costs(found)] == [
        PIXELS * 5 * C + 4 * C * C,
        PIXELS * (4 * C + C + C) + 4 * C * C,
    ]


def test_what_waits_for_another_kernel_is_one_of_its_own():
    """The gate of squeeze-and-excitation is computed from the tensor that it gates."""

    def run(m, x):
        y = m.conv(x)
        return y * m.excite(F.relu(m.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()

    layers = {"conv": nn.Conv2d(C, C, 1), "squeeze": nn.Conv2d(C, 4, 1), "excite": nn.Conv2d(4, C, 1)}
    found = analysed(run, **layers)
    assert costs(found)[1:] == [
        ("mean", LayerKind.OTHER, PIXELS * C, PIXELS * C + N * C),
        ("squeeze", LayerKind.POINTWISE, 2 * N * C * 4, N * C + 4 * C + N * 4),
        ("excite", LayerKind.POINTWISE, 2 * N * C * 4, N * C + 4 * C + N * 4),
        ("mul", LayerKind.OTHER, PIXELS * C, 2 * PIXELS * C + N * C),
    ]


def test_element_wise_functions_of_inputs_and_of_several_kernels():
    found = analysed(lambda m, x: torch.sigmoid(x) + 1)
    assert costs(found) == [("sigmoid", LayerKind.OTHER, 0, 2 * PIXELS * C)]
    # The second convolution adds what the first made; the first waits in DRAM.
    found = analysed(lambda m, x: m.a(x) + m.b(x), a=nn.Conv2d(C, C, 1), b=nn.Conv2d(C, C, 1))
    assert [elements for *_, elements in costs(found)] == [2 * PIXELS * C + C * C, 3 * PIXELS * C + C * C]


def test_both_values_of_a_kernel_are_written_if_both_are_needed():
    found = analysed(lambda m, x: m.b(F.relu(y := m.a(x))) + y, a=nn.Conv2d(C, C, 1), b=nn.Conv2d(C, C, 1))
    assert [elements for *_, elements in costs(found)] == [3 * PIXELS * C + C * C, 3 * PIXELS * C + C * C]


@pytest.mark.parametrize(
    "layer, x, kind, ops, elements",
    [
        (nn.Conv2d(8, 16, 3, 2, 1, groups=2), X, LayerKind.GROUPED, 2 * N * 15 * 16 * 4 * 9, 240 * N + 480 * N + 576),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8), X, LayerKind.DEPTHWISE, 2 * PIXELS * 8 * 25, 16 * PIXELS + 200),
        (nn.Conv2d(8, 8, 2, 2), X, LayerKind.CONVOLUTION, 2 * N * 15 * 64 * 4, 480 * N + 120 * N + 256),
        (nn.Conv2d(8, 4, (1, 3), dilation=2), X, LayerKind.CONVOLUTION, 2 * N * 36 * 96, 480 * N + 144 * N + 96),
        (nn.Conv1d(8, 4, 3), X[:, :, 0], LayerKind.CONVOLUTION, 2 * N * 8 * 96, 80 * N + 32 * N + 96),
        (nn.Conv3d(8, 4, 3, padding=1), X[:, :, None], LayerKind.CONVOLUTION, 2 * PIXELS * 864, 12 * PIXELS + 864),
        (nn.ConvTranspose2d(8, 4, 2, 2), X, LayerKind.CONVOLUTION, 2 * PIXELS * 128, 8 * PIXELS + 16 * PIXELS + 128),
        (nn.Linear(10, 3), X, LayerKind.POINTWISE, 2 * N * 48 * 30, N * 48 * 13 + 30),
        (nn.MaxPool2d(2), X, LayerKind.OTHER, 480 * N, 480 * N + 120 * N),
        (nn.LayerNorm(10), X, LayerKind.OTHER, 0, 960 * N),
        (nn.GroupNorm(2, 8), X, LayerKind.OTHER, 0, 960 * N),
        (nn.Softmax(1), X, LayerKind.OTHER, 0, 960 * N),
        (nn.Upsample(scale_factor=2), X, LayerKind.OTHER, 0, 480 * N + 1920 * N),
        (nn.PixelShuffle(2), X, LayerKind.OTHER, 0, 960 * N),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_single_layers(layer, x, kind, ops, elements):
    found = fusion.waterline(layer.eval(), x.contiguous(), "h200", progress=False)
    (kernel,) = found.layerwise.kernels
    assert (kernel.layer_kind, kernel.ops_count, kernel.bytes // 2) == (kind, ops, elements)
    assert found.unknown == ()


def test_attention_is_one_kernel():
    heads, tokens, keys, size = 3, 5, 7, 4
    q, k, v = (torch.empty(N, heads, length, size) for length in (tokens, keys, keys))
    found = analysed(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v).transpose(1, 2), q, k, v)
    (kernel,) = found.layerwise.kernels
    assert kernel.layer_kind is LayerKind.MATMUL
    assert kernel.ops_count == 2 * 2 * N * heads * tokens * keys * size
    assert kernel.bytes // 2 == N * heads * size * (2 * tokens + 2 * keys)


def test_products_of_activations():
    found = analysed(lambda m, x: (x @ x.transpose(2, 3)).softmax(-1) @ x)
    ops = 2 * N * C * H * H * W
    inputs, scores = PIXELS * C, N * C * H * H
    assert [cost[1:] for cost in costs(found)] == [
        (LayerKind.MATMUL, ops, 2 * inputs + scores),  # both operands, though they are the same here
        (LayerKind.OTHER, 0, 2 * scores),
        (LayerKind.MATMUL, ops, scores + 2 * inputs),
    ]


def test_products_with_one_matrix_for_all():
    table = nn.Parameter(torch.empty(W, 3))
    found = analysed(lambda m, x: torch.bmm(x.flatten(0, 1), m.table.expand(N * C, W, 3)), table=table)
    assert costs(found) == [("bmm", LayerKind.POINTWISE, 2 * N * C * H * W * 3, N * C * H * (W + 3) + W * 3)]
    many, one = torch.empty(5, 4, 6), torch.empty(6, 7)
    found = analysed(lambda m, a, b: torch.bmm(a, b.expand(5, 6, 7)), many, one)
    assert costs(found) == [("bmm", LayerKind.MATMUL, 2 * 5 * 4 * 6 * 7, 120 + 42 + 140)]
    found = analysed(lambda m, a, b: torch.bmm(b.t().expand(5, 7, 6), a.mT), many, one)
    assert costs(found) == [("bmm", LayerKind.MATMUL, 2 * 5 * 4 * 6 * 7, 120 + 42 + 140)]


def test_copies_and_views():
    # Concatenation moves; splitting and reshaping do not, and what is read of a split is the part.
    found = analysed(lambda m, x: m.conv(torch.cat([x, x], 1).chunk(2, 1)[0]).flatten(1), conv=nn.Conv2d(C, C, 1))
    assert [cost[1:] for cost in costs(found)] == [
        (LayerKind.OTHER, 0, PIXELS * C + 2 * PIXELS * C),
        (LayerKind.POINTWISE, 2 * PIXELS * C * C, 2 * PIXELS * C + C * C),
    ]


def test_padding_moves_nothing():
    conv = nn.Conv2d(C, C, 3)
    (padded,) = analysed(lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1))), conv=conv).layerwise.kernels
    (plain,) = analysed(lambda m, x: m.conv(x), conv=nn.Conv2d(C, C, 3, padding=1)).layerwise.kernels
    assert (padded.ops_count, padded.bytes) == (plain.ops_count, plain.bytes)


def test_what_depends_on_no_input_is_free():
    def run(m, x):
        weight = m.weight / m.weight.norm()
        return F.conv2d(x, weight) + torch.arange(W, device=x.device)

    (kernel,) = analysed(run, weight=nn.Parameter(torch.empty(C, C, 1, 1))).layerwise.kernels
    assert kernel.bytes // 2 == 2 * PIXELS * C + C * C


def test_unknown_operators_are_counted_by_bytes_and_listed():
    found = analysed(lambda m, x: m.conv(x).cumsum(1).topk(2, 1)[0], conv=nn.Conv2d(C, C, 1))
    assert found.unknown == ("cumsum", "topk")
    _, cumsum, topk = found.layerwise.kernels
    assert (cumsum.layer_kind, cumsum.bytes // 2) == (LayerKind.UNKNOWN, 2 * PIXELS * C)
    assert topk.bytes // 2 == PIXELS * C + 2 * PIXELS * 2  # values and indices
    assert "unknown, counted by bytes: cumsum, topk" in found.table()


def test_no_single_graph():
    def run(m, x):
        y = m.conv(x)
        torch._dynamo.graph_break()
        return F.relu(m.block(y))

    layers = {"conv": nn.Conv2d(C, C, 1), "block": ConvFirst(C, C, expansion=3)}
    found = analysed(run, **layers)
    assert [kernel.name for kernel in found.layerwise.kernels] == [
        "conv",
        "block.conv",
        "block.expand",
        "block.project",
    ]
    assert found.blocks == () and "it is no single graph" in found.why_no_blocks
    assert "no blocks were looked for: it is no single graph" in found.table()
    whole = analysed(lambda m, x: F.relu(m.block(m.conv(x))), **layers).layerwise
    assert [(k.ops_count, k.bytes) for k in found.layerwise.kernels] == [(k.ops_count, k.bytes) for k in whole.kernels]


def test_no_values_are_needed_and_none_are_changed():
    with torch.device("meta"):
        bare = nn.Sequential(ConvFirst(C, 16, expansion=3, stride=2), MBConv(16, 16)).eval()
    real = nn.Sequential(ConvFirst(C, 16, expansion=3, stride=2), MBConv(16, 16)).eval()
    before = {name: value.clone() for name, value in real.state_dict().items()}
    found, expected = (fusion.waterline(model, X, "h200", progress=False) for model in (bare, real))
    assert found == expected
    assert [block.kind for block in found.blocks] == ["ConvFirst", "MBConv"]
    assert all(torch.equal(value, before[name]) for name, value in real.state_dict().items())
    assert all(parameter.is_meta for parameter in bare.parameters())
    half = fusion.waterline(real.half(), X.half(), "h200", progress=False)
    assert half == expected


def test_dtype_and_processor():
    conv = nn.Conv2d(C, C, 1).eval()
    found = fusion.waterline(conv, X, PROCESSORS["a5000"].with_ceilings(10.0, 2.0), dtype="float32", progress=False)
    (kernel,) = found.layerwise.kernels
    assert kernel.bytes == 4 * (2 * PIXELS * C + C * C)
    assert found.layerwise.min_latency == max(kernel.ops_count / 10, kernel.bytes / 2)
    assert found.name == "Conv2d"


def test_arguments_by_name_and_by_tuple():
    model = Function(lambda m, x, y: x + y).eval()
    found = fusion.waterline(model, (X, X), "h200", progress=False)
    assert found.layerwise.bytes // 2 == 3 * PIXELS * C
    identity = nn.Conv2d(C, C, 1).eval()
    named = fusion.waterline(identity, {"input": X}, "h200", progress=False)
    assert named == fusion.waterline(identity, X, "h200", progress=False)


def test_compiled_and_fused_networks():
    block = ConvFirst(C, C, expansion=3).eval()
    assert fusion.waterline(torch.compile(block), X, progress=False) == fusion.waterline(block, X, progress=False)
    with pytest.raises(TypeError, match="takes the original network; this one is fused"):
        fusion.waterline(fusion.fuse(block), X)


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        (nn.Conv2d(C, C, 1), {}, "training mode.*call eval"),
        (nn.Conv2d(C, C, 1).eval(), {"dtype": "int8"}, "dtype 'int8' is not supported, use float16"),
        (nn.Conv2d(C, C, 1).eval(), {"processor": "tpu"}, "processor 'tpu' is unknown; use one of a5000"),
        (nn.Identity().eval(), {}, "computes nothing"),
    ],
)
def test_errors(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        fusion.waterline(model, X, **arguments)


def test_errors_of_the_model_itself():
    with pytest.raises(RuntimeError, match="channel"):
        fusion.waterline(nn.Conv2d(3, 3, 1).eval(), X)


def test_json_and_table(tmp_path):
    model = nn.Sequential(ConvFirst(C, C, expansion=3), ConvFirst(C, C, expansion=3), nn.Conv2d(C, 3, 1)).eval()
    found = fusion.waterline(model, X, name="two blocks", progress=False)
    report = json.loads(found.to_json(tmp_path / "report.json"))
    assert report == json.loads((tmp_path / "report.json").read_text())
    meta, rows = report["meta"], report["rows"]
    assert meta["model"] == "two blocks"
    assert meta["layerwise_max_efficiency_pct"] == pytest.approx(100 * found.layerwise.max_efficiency)
    assert meta["fused_max_efficiency_pct"] == pytest.approx(100 * found.fused.max_efficiency)
    assert [block["name"] for block in meta["blocks"]] == ["0", "1"]
    assert [row["program"] for row in rows] == ["layerwise"] * 7 + ["fused"] * 3
    for program in ("layerwise", "fused"):
        own = [row for row in rows if row["program"] == program]
        for key in ("ops", "bytes", "minimum_us"):
            assert sum(row[key] for row in own) == pytest.approx(meta[f"{program}_{key}"])
    table = found.table(kernels=True)
    assert "two blocks, float16, on NVIDIA H200" in table
    assert "0 to 1" in table and "1.conv" in table and "blocks fused as planned" in table
    assert str(found) == found.table() and "1.conv" not in str(found)


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_plot(tmp_path, suffix, magic):
    path = tmp_path / f"network{suffix}"
    fusion.waterline(ConvFirst(C, C, expansion=3).eval(), X, progress=False).plot(path)
    assert path.read_bytes().startswith(magic)
    figure = fusion.waterline(nn.Conv2d(C, C, 1).eval(), X, progress=False).plot()
    assert figure.axes and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        fusion.waterline(nn.Conv2d(C, C, 1).eval(), X, progress=False).plot(tmp_path / "network.jpg")
