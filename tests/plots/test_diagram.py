from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise, product

import pytest
from matplotlib.path import Path
from matplotlib.transforms import Bbox

from fusion.planner.blocks import conv, convfirst, ffn, head, mbconv, stem_convfirst
from fusion.planner.graph import BlockGraph, OpKind, Role, Tensor, make_op
from fusion.planner.lower import block_fused, image_fused, layerwise, pool_fused, scaled, two_pass
from fusion.planner.program import Kernel, Loop, Memory, Program
from fusion.plots.diagram import draw as drawing
from fusion.plots.diagram.draw import draw_legend, draw_program
from fusion.plots.diagram.layout import page_of
from fusion.plots.diagram.symbols import MEMORY_STYLES
from fusion.plots.diagram.text import widest
from fusion.plots.style import SETTINGS, WIDTH
from tests.plots.picture_texts import overlap, text_boxes

CONVFIRST = convfirst(128, 64, 64, 64, 6)
MBCONV = mbconv(128, 16, 16, 128, 4)


def branches() -> Program:
    """Two branches that meet: no chain, operations with wires from above and from below."""

    def convolve(name, x, group_width, size):
        weight = {"K": 64, "T": group_width, "R": size, "S": size}
        return make_op(OpKind.CONV, name, (x,), (Tensor(f"{name}.weight", weight, Role.WEIGHT),))

    x = Tensor("x", {"N": 128, "H": 32, "W": 32, "C": 64})
    left = convolve("left", x, 64, 1)
    bend = make_op(OpKind.RELU, "bend", (left.output,))
    right = convolve("right", x, 8, 3)
    add = make_op(OpKind.ADD, "add", (bend.output, right.output))
    mix = convolve("mix", add.output, 8, 3)
    join = make_op(OpKind.CONCAT, "join", (x, bend.output, mix.output))
    graph = BlockGraph("branches", (left, bend, right, add, mix, join), (x,), (join.output,))
    touched = dict.fromkeys(t for op in graph.ops for t in (*op.inputs, *op.weights, op.output))
    outside = {x, join.output, *graph.weights()}
    placement = tuple((tensor, Memory.DRAM if tensor in outside else Memory.LOCAL) for tensor in touched)
    partition = Loop("join.out", (("N", 1), ("H", 8), ("W", 8)))
    return Program("fused", graph, (Kernel("branches", graph.ops, placement, 2, partition),))


def nested() -> Program:
    """A loop in a loop."""
    program = block_fused(CONVFIRST, (8, 16), 16)
    (kernel,) = program.kernels
    rows = Loop("residual.out", (("H", 4), ("W", None)), ("x",))
    return replace(program, kernels=(replace(kernel, loops=(rows, *kernel.loops)),))


PROGRAMS = {
    "convfirst-layerwise": layerwise(CONVFIRST),
    "convfirst-fused": block_fused(CONVFIRST, (8, 16), 16),
    "convfirst-open": block_fused(CONVFIRST),
    "convfirst-scaled": scaled(convfirst(128, 32, 32, 512, 6), 4, (8, 16), 32),
    "convfirst-other-channels": block_fused(convfirst(8, 32, 32, 64, 3, out_channels=96)),
    "convfirst-s2-layerwise": layerwise(convfirst(128, 64, 64, 64, 6, stride=2)),
    "convfirst-s2-fused": block_fused(convfirst(128, 64, 64, 64, 6, stride=2)),
    "convfirst-s2-scaled": scaled(convfirst(128, 32, 32, 512, 6, stride=2, out_channels=640), 2),
    "ffn-layerwise": layerwise(ffn(128, 64, 64, 64, 6, activation="gelu")),
    "ffn-fused": block_fused(ffn(128, 64, 64, 64, 6), (8, 16), 16),
    "ffn-scaled": scaled(ffn(128, 16, 16, 512, 4), 2),
    "mbconv-layerwise": layerwise(MBCONV),
    "mbconv-fused": block_fused(MBCONV, hidden_tile=64),
    "mbconv-two-pass": two_pass(MBCONV, (4, 8), 64),
    "mbconv-image": image_fused(MBCONV, 64),
    "mbconv-image-local": image_fused(MBCONV, in_local_memory=True),
    "mbconv-s2-layerwise": layerwise(mbconv(128, 16, 16, 128, 4, stride=2)),
    "mbconv-s2-fused": block_fused(mbconv(128, 16, 16, 128, 4, stride=2)),
    "mbconv-s2-two-pass": two_pass(mbconv(128, 16, 16, 128, 4, stride=2)),
    "mbconv-large": layerwise(mbconv(1024, 224, 224, 1024, 6)),
    "mbconv-small": block_fused(mbconv(1, 8, 8, 8, 1), hidden_tile=8),
    "stem": block_fused(conv(128, 224, 224, 3, 32, stride=2, activation="relu"), (2, 64)),
    "head-layerwise": layerwise(head(128, 8, 8, 256, 1280)),
    "head-fused": pool_fused(head(128, 8, 8, 256, 1280), 5, 128),
    "stem-convfirst-layerwise": layerwise(stem_convfirst(128, 224, 224, 3, 32, 3)),
    "stem-convfirst-fused": block_fused(stem_convfirst(128, 224, 224, 3, 32, 3), (8, 16), 16),
    "branches": branches(),
    "nested": nested(),
}


def drawn(draw, *arguments):
    """The figure that a function draws, not saved."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures = []

    @contextmanager
    def new_figure(path, height, width=WIDTH):
        with rc_context(SETTINGS):
            figures.append(Figure(figsize=(width, height)))
            FigureCanvasAgg(figures[0])
            yield figures[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "new_figure", new_figure)
        draw(*arguments, "diagram.png")
    return figures[0]


@cache
def figure_of(name):
    return drawn(draw_program, PROGRAMS[name])


def words(figure):
    return " ".join(text.get_text() for text in figure.axes[0].texts).replace("\N{NO-BREAK SPACE}", " ")


def boxes(figure):
    return [patch for patch in figure.axes[0].patches if patch.get_label().startswith("tensor ")]


def box_of(figure, name):
    return [patch for patch in boxes(figure) if patch.get_label() == f"tensor {name}"]


def extent(artist, figure):
    return artist.get_window_extent(figure.canvas.get_renderer())


def in_inches(box, figure):
    box = figure.axes[0].transData.inverted().transform_bbox(box)
    return Bbox.from_extents(box.xmin, box.ymin, box.xmax, box.ymax)


def is_on_page(box, figure):
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_overlaps(name):
    figure = figure_of(name)
    inscriptions = text_boxes(figure)
    tensors = {box: extent(box, figure) for box in boxes(figure)}
    assert all(text.get_size() >= 8 for text in inscriptions)
    for (a, extent_a), (b, extent_b) in combinations(inscriptions.items(), 2):
        assert not overlap(extent_a, extent_b), (a.get_text(), b.get_text())
    for a, b in combinations(tensors, 2):
        assert not overlap(tensors[a], tensors[b]), (a.get_label(), b.get_label())
    for patch in (*inscriptions, *figure.axes[0].patches):
        assert is_on_page(extent(patch, figure), figure), patch
    for text, where in inscriptions.items():
        for box, around in tensors.items():
            inside = around.x0 <= where.x0 and where.x1 <= around.x1 and around.y0 <= where.y0 and where.y1 <= around.y1
            assert inside or not overlap(where, around), (text.get_text(), box.get_label())


@pytest.mark.parametrize("name", PROGRAMS)
def test_wires_cross_neither_texts_nor_boxes_nor_symbols(name):
    program, figure = PROGRAMS[name], figure_of(name)
    obstacles = [(text.get_text(), in_inches(box, figure)) for text, box in text_boxes(figure).items()]
    obstacles += [(box.get_label(), in_inches(extent(box, figure), figure)) for box in boxes(figure)]
    page = page_of(program, drawing.MARGIN + drawing.TITLE_HEIGHT)
    assert page.wires
    for wire in page.wires:
        for segment in pairwise(wire.points):
            path = Path(segment)
            for obstacle, box in obstacles:
                assert not path.intersects_bbox(box.padded(-0.01), filled=False), (obstacle, wire)
            for op in page.ops:
                square = Bbox.from_bounds(op.x - 0.1, op.y - 0.1, 0.2, 0.2)
                assert not path.intersects_bbox(square, filled=False), (op, wire)


@pytest.mark.parametrize("name", PROGRAMS)
def test_wires_can_be_told_apart(name):
    wires = page_of(PROGRAMS[name], 0.0).wires
    for one, other in combinations(wires, 2):
        for (a, b), (c, d) in product(pairwise(one.points), pairwise(other.points)):
            for along, across in ((0, 1), (1, 0)):
                if a[across] == b[across] and c[across] == d[across] and abs(a[across] - c[across]) < 0.07:
                    shared = min(max(a[along], b[along]), max(c[along], d[along]))
                    shared -= max(min(a[along], b[along]), min(c[along], d[along]))
                    assert shared < 0.05, (one, other)


@pytest.mark.parametrize("name", PROGRAMS)
def test_frames_and_loops_hold_their_texts(name):
    page = page_of(PROGRAMS[name], 0.0)
    for frame in page.frames:
        (left, _), (right, _) = frame.outline[:2]
        assert widest(frame.lines) < right - left
    for band in page.bands:
        assert not band.lines or widest(band.lines) < band.area.right - band.area.left


@pytest.mark.parametrize("name", PROGRAMS)
def test_frames_hold_operations_and_local_memory_but_no_dram(name):
    page = page_of(PROGRAMS[name], 0.0)
    outlines = {frame.kernel: Path(frame.outline) for frame in page.frames}
    for placed in page.ops:
        (kernel,) = (k for k, outline in outlines.items() if outline.contains_point((placed.x, placed.y)))
        assert placed.op in PROGRAMS[name].kernels[kernel].ops
    for placed in page.boxes:
        width, height = placed.shape.width, placed.shape.height
        corners = [(placed.left + x, placed.top + y) for x in (0, width) for y in (0, height)]
        inside = [any(outline.contains_point(corner) for outline in outlines.values()) for corner in corners]
        assert set(inside) <= {placed.box.memory is not Memory.DRAM, placed.box.memory is Memory.LOCAL}, placed


@pytest.mark.parametrize("name", PROGRAMS)
def test_all_of_a_program_is_drawn(name):
    program, figure = PROGRAMS[name], figure_of(name)
    everything = words(figure)
    for kernel in program.kernels:
        assert kernel.name in everything
        assert str(replace(kernel.partition, streams=())) in everything
        for loop in kernel.loops:
            assert f"loop {loop.tensor} over" in everything
            assert all(weight in everything for weight in loop.streams)
    for tensor in program.graph.tensors():
        assert box_of(figure, tensor.name), tensor
    page = page_of(program, 0.0)
    assert [op.op for op in sorted(page.ops, key=lambda placed: program.graph.ops.index(placed.op))] == list(
        program.graph.ops
    )
    reads = sum(len(kernel.reads) for kernel in program.kernels)
    writes = sum(len(kernel.writes) for kernel in program.kernels)
    assert sum(wire.memory is Memory.DRAM for wire in page.wires) == reads + writes, "one thick arrow a read or write"
    assert f"{len(program.kernels)} kernel" in everything
    assert "DRAM" in everything and "global memory" in everything and "local memory" in everything


@pytest.mark.parametrize("name", PROGRAMS)
def test_colours_are_those_of_the_memories(name):
    from matplotlib.colors import to_rgba

    program, figure = PROGRAMS[name], figure_of(name)
    for kernel in program.kernels:
        for tensor, memory in kernel.placement:
            faces = {box.get_facecolor() for box in box_of(figure, tensor.name)}
            assert to_rgba(MEMORY_STYLES[memory]["face"]) in faces, tensor


def test_another_placement_is_another_colour():
    from matplotlib.colors import to_rgba

    program = block_fused(CONVFIRST)
    (kernel,) = program.kernels
    hidden = program.graph.op("expand").output
    for memory in Memory:
        placement = tuple((tensor, memory if tensor == hidden else home) for tensor, home in kernel.placement)
        moved = replace(program, kernels=(replace(kernel, placement=placement),))
        (box,) = box_of(drawn(draw_program, moved), "expand.out")
        assert box.get_facecolor() == to_rgba(MEMORY_STYLES[memory]["face"])


def test_layerwise_convfirst_has_a_large_hidden_tensor_in_dram():
    figure = figure_of("convfirst-layerwise")
    everything = words(figure)
    assert "activation.out 128×64×64×384 403 MB" in everything
    (hidden,), (first, again) = box_of(figure, "activation.out"), box_of(figure, "x")
    assert hidden.get_height() > 1.5 * first.get_height() == 1.5 * again.get_height()
    assert all(label in everything for label in ("3×3, T=8", "1×1", "ReLU", "add"))


def test_fused_convfirst_walks_tiles_in_local_memory():
    everything = words(figure_of("convfirst-fused"))
    assert "x 1×10×18×64" in everything, "a tile with its halo"
    assert "expand.out 1×8×16×16" in everything
    assert "loop expand.out over C by 16, streaming expand.weight, project.weight via global → local" in everything
    assert "processors divide residual.out over N by 1 H by 8 W by 16" in everything
    open_tiles = words(figure_of("convfirst-open"))
    assert "x 1×(h+2)× (w+2)×64" in open_tiles and "expand.out 1×h×w×c" in open_tiles
    assert "sum over processors" not in everything


def test_processors_of_the_scaled_program_add_hidden_channels_in_global_memory():
    everything = words(figure_of("convfirst-scaled"))
    assert "x 1×10×18×128" in everything, "a quarter of the input channels"
    assert "expand.out 1×8×16×32 sum over processors" in everything
    assert everything.count("sum over") == 1


def test_processors_of_fused_mbconv_meet_at_the_squeeze_vector():
    figure = figure_of("mbconv-fused")
    everything = words(figure)
    assert "squeeze.out 1×32 sum over processors" in everything
    assert "conv. out" not in everything and "conv.out 1×16×16×64" in everything
    assert all(label in everything for label in ("avg pool", "linear", "sigmoid", "multiply", "SiLU"))


def test_what_is_needed_again_is_held_whole():
    everything = words(figure_of("mbconv-image"))
    assert "conv_ activation.out n×16×16×512" in everything
    assert "gate.out n×16×16×64" in everything
    assert everything.count("loop expand.out over C by 64") == 2, "one walk to the squeeze vector, one from there"


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_pictures_by_suffix(tmp_path, suffix, magic):
    for name, draw in (("program", draw_program), ("legend", draw_legend)):
        path = tmp_path / f"{name}{suffix}"
        draw(*([PROGRAMS["mbconv-fused"]] if draw is draw_program else []), path)
        assert path.read_bytes().startswith(magic)
        assert path.stat().st_size > 10_000


def test_a_title_of_ones_own(tmp_path):
    draw_program(PROGRAMS["ffn-fused"], tmp_path / "ffn.svg", "An FFN of its own")
    text = (tmp_path / "ffn.svg").read_text(encoding="utf-8")
    assert "An FFN of its own" in text and "ffn, fused" not in text


def test_other_suffixes(tmp_path):
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        draw_program(PROGRAMS["ffn-fused"], tmp_path / "ffn.jpg")
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        draw_legend(tmp_path / "legend")


def test_legend():
    figure = drawn(draw_legend)
    everything = words(figure)
    for name in ("DRAM", "global memory", "local memory", "loop", "Kernel", "SiLU", "ReLU", "sigmoid", "grouped"):
        assert name in everything
    inscriptions = text_boxes(figure)
    assert not [pair for pair in combinations(inscriptions, 2) if overlap(*map(inscriptions.get, pair))]
    assert all(is_on_page(extent(artist, figure), figure) for artist in (*inscriptions, *figure.axes[0].patches))
