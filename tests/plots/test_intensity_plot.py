import pytest

from fusion.planner.intensity import CONV_TYPES, intensity_curve
from fusion.planner.layer_kind import LayerKind
from fusion.planner.processor import PROCESSORS
from fusion.plots.intensity_plot import plot_intensity
from fusion.plots.style import KIND_STYLES, WATER
from tests.plots.picture_texts import check_texts, text_boxes

CHANNELS = tuple(range(16, 513, 16))
CURVES = tuple(intensity_curve(conv_type, CHANNELS) for conv_type in CONV_TYPES)
A5000 = PROCESSORS["a5000"]


def drawn_curves(axes):
    return [line for line in axes.lines if line.get_color() != WATER]


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_pictures_by_suffix(tmp_path, suffix, magic):
    path = tmp_path / f"intensity{suffix}"
    plot_intensity(CURVES, [A5000], path)
    assert path.read_bytes().startswith(magic)


def test_lines_and_texts(tmp_path, saved_figures):
    plot_intensity(CURVES, [A5000], tmp_path / "intensity.png", title="Convolutions")
    (figure,) = saved_figures
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "32", "64", "128", "256", "512"]
    for curve, line in zip(CURVES, drawn_curves(axes), strict=True):
        assert list(line.get_xdata()) == [point.channels for point in curve]
        assert list(line.get_ydata()) == [point.intensity for point in curve]
        marked = [point.channels for point in (curve[at] for at in line.get_markevery())]
        assert marked == [c for c in (16, 32, 64, 128, 256, 512) if c >= curve[0].channels]
    (waterline,) = [line for line in axes.lines if line.get_color() == WATER]
    assert list(waterline.get_ydata()) == [A5000.op_byte] * 2
    texts = {text.get_text() for text in text_boxes(figure)}
    assert {conv_type.label for conv_type in CONV_TYPES} <= texts
    assert {"Convolutions", "A5000, 160 OP/byte", "under water: memory-bound on A5000"} <= texts
    assert any("76.7 TFLOP/s fp16, 480 GB/s" in text for text in texts)


def test_colours_are_those_of_the_kinds(tmp_path, saved_figures):
    plot_intensity(CURVES, [A5000], tmp_path / "intensity.png")
    lines = drawn_curves(saved_figures[0].axes[0])
    kinds = ("CONVOLUTION", "POINTWISE", "GROUPED", "GROUPED", "DEPTHWISE")
    assert [line.get_color() for line in lines] == [KIND_STYLES[LayerKind[kind]]["facecolor"] for kind in kinds]
    assert len({line.get_marker() for line in lines}) == 5, "told apart without colour"


@pytest.mark.parametrize("first", [16, 24])
@pytest.mark.parametrize("processors", [(), ("h200",), tuple(PROCESSORS)])
def test_no_text_covers_another(tmp_path, saved_figures, first, processors):
    curves = [intensity_curve(conv_type, range(first, 513, 8), batch=1, hw=14) for conv_type in CONV_TYPES]
    plot_intensity(curves, [PROCESSORS[name] for name in processors], tmp_path / "intensity.png", title="Convolutions")
    check_texts(saved_figures[0])


@pytest.mark.parametrize("curves", [[], [()]])
def test_nothing_to_draw(tmp_path, curves):
    with pytest.raises(ValueError, match="there are no curves, or one has no points"):
        plot_intensity(curves, [A5000], tmp_path / "intensity.png")


def test_other_suffixes(tmp_path):
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        plot_intensity(CURVES, [A5000], tmp_path / "intensity.jpg")
