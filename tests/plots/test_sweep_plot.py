from itertools import combinations

import pytest

from fusion.bench.network_limit import network_parts
from fusion.planner.blocks import convfirst, mbconv
from fusion.planner.lower import block_fused, layerwise
from fusion.planner.op_byte_sweep import OP_BYTES, sweep
from fusion.planner.processor import PROCESSORS
from fusion.plots.sweep_plot import SweepCurve, plot_sweep
from models.convfirstnet import CONFIGS
from tests.plots.picture_texts import check_texts, overlap, text_boxes
from tests.plots.plot_programs import Kernels

BLOCK = convfirst(128, 64, 64, 32, 6)
CURVES = (
    SweepCurve("layer by layer", sweep(layerwise(BLOCK))),
    SweepCurve("fused", sweep(block_fused(BLOCK))),
    SweepCurve("MBConv, layer by layer", sweep(layerwise(mbconv(128, 16, 16, 128, 4)))),
    SweepCurve("MBConv, fused", sweep(block_fused(mbconv(128, 16, 16, 128, 4)))),
)
GPUS = tuple(PROCESSORS.values())


def written(figure):
    return [text.get_text() for text in text_boxes(figure)]


def curves_of(axes):
    """The lines of the panel that are neither those of processors nor of the legend."""
    return [line for line in axes.lines if len(line.get_xdata()) > 2]


def test_efficiency_of_the_fused_network_of_figure_16():
    network = Kernels(tuple(network_parts(CONFIGS["convfirstnet_small"], 128, 256)))
    a5000, at_500 = sweep(network, (76.7 / 0.48, 500))
    assert a5000.waterline_efficiency == pytest.approx(0.97, abs=0.005)
    assert at_500.waterline_efficiency == pytest.approx(0.78, abs=0.03)


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_pictures_by_suffix(tmp_path, suffix, magic):
    path = tmp_path / f"sweep{suffix}"
    plot_sweep(CURVES[:2], GPUS, path)
    assert path.read_bytes().startswith(magic)


def test_one_panel(tmp_path, saved_figures):
    plot_sweep(CURVES, GPUS, tmp_path / "sweep.png", title="Blocks")
    (figure,) = saved_figures
    (axes,) = figure.axes
    assert axes.get_xlim() == (0, 600)
    lines = curves_of(axes)
    assert [line.get_linestyle() for line in lines] == ["--", "-"] * 4
    for curve, roofline, waterline in zip(CURVES, lines[::2], lines[1::2], strict=True):
        assert list(waterline.get_xdata()) == list(OP_BYTES)
        assert list(waterline.get_ydata()) == [100 * point.waterline_efficiency for point in curve.points]
        assert list(roofline.get_ydata()) == [100 * point.roofline_efficiency for point in curve.points]
        assert waterline.get_color() == roofline.get_color()
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines[1::2]}) == 4
    assert {curve.label for curve in CURVES} | {"Blocks", "A5000 160", "H200 184"} <= set(written(figure))
    assert any("790 TFLOP/s fp16, 4300 GB/s" in text.replace("\n", " ") for text in written(figure))


def test_a_label_is_beside_the_end_of_its_line(tmp_path, saved_figures):
    plot_sweep(CURVES[:2], [], tmp_path / "sweep.png")
    (figure,) = saved_figures
    (axes,) = figure.axes
    boxes = {text.get_text(): box for text, box in text_boxes(figure).items()}
    for curve in CURVES[:2]:
        end, y = axes.transData.transform((600, 100 * curve.points[-1].waterline_efficiency))
        assert end < boxes[curve.label].x0
        assert boxes[curve.label].y0 < y < boxes[curve.label].y1


def test_vertical_lines_and_their_flags(tmp_path, saved_figures):
    plot_sweep(CURVES[:1], GPUS, tmp_path / "sweep.png")
    (figure,) = saved_figures
    (axes,) = figure.axes
    lines = sorted(line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2)
    assert lines == sorted(processor.op_byte for processor in GPUS)
    expected = {f"{processor.name.upper()} {processor.op_byte:.0f}" for processor in GPUS}
    flags = {text.get_text(): box for text, box in text_boxes(figure).items() if text.get_text() in expected}
    tops = [axes.transData.transform((x, 0))[0] for x in lines]
    assert set(flags) == expected
    names = sorted(flags, key=lambda name: int(name.split()[-1]))
    for name, top in zip(names, tops, strict=True):
        assert top < flags[name].x0 < top + 10
        crossing = [other for other, x in zip(names, tops, strict=True) if flags[name].x0 < x < flags[name].x1]
        assert all(flags[other].y1 < flags[name].y1 for other in crossing), "no line runs through a text"


def test_a_processor_beyond_the_range_is_left_out(tmp_path, saved_figures):
    curve = SweepCurve("fused", sweep(block_fused(BLOCK), range(0, 201, 10)))
    plot_sweep([curve], GPUS, tmp_path / "sweep.png")
    texts = written(saved_figures[0])
    assert "H200 184" in texts and "H100 295" not in texts
    assert saved_figures[0].axes[0].get_xlim() == (0, 200)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_panel_for_each(tmp_path, saved_figures, count):
    plot_sweep(CURVES[:count], GPUS, tmp_path / "sweep.png", title="Blocks", together=False)
    (figure,) = saved_figures
    assert len(figure.axes) == count
    assert all(len(curves_of(axes)) == 2 for axes in figure.axes)
    assert [axes.get_title("left") for axes in figure.axes] == [curve.label for curve in CURVES[:count]]
    check_texts(figure)


@pytest.mark.parametrize("copies", [1, 4])
def test_no_text_covers_another(tmp_path, saved_figures, copies):
    curves = [SweepCurve(f"{curve.label} {copy}", curve.points) for copy in range(copies) for curve in CURVES]
    plot_sweep(curves, GPUS, tmp_path / "sweep.png", title="Blocks")
    check_texts(saved_figures[0])
    boxes = text_boxes(saved_figures[0])
    labels = [box for text, box in boxes.items() if text.get_text() in {curve.label for curve in curves}]
    assert len(labels) == len(curves)
    assert not [pair for pair in combinations(labels, 2) if overlap(*pair)]


@pytest.mark.parametrize(
    "curves, message",
    [([], "there are no curves"), ([SweepCurve("short", CURVES[0].points[:1])], "'short' has fewer than two points")],
)
def test_nothing_to_draw(tmp_path, curves, message):
    with pytest.raises(ValueError, match=message):
        plot_sweep(curves, GPUS, tmp_path / "sweep.png")


def test_other_suffixes(tmp_path):
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        plot_sweep(CURVES, GPUS, tmp_path / "sweep.jpg")
