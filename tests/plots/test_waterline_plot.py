import math

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from fusion.bench.blocks import FIGURE8, FIGURE12
from fusion.planner.blocks import convfirst, mbconv
from fusion.planner.layer_kind import LayerKind
from fusion.planner.lower import block_fused, layerwise
from fusion.planner.processor import PROCESSORS, get_processor
from fusion.planner.waterline import analyze
from fusion.plots.kernel_bars import bar_limit
from fusion.plots.style import INK, KIND_STYLES, WIDTH
from fusion.plots.waterline_plot import WaterlinePanel, Well, plot_waterline, plot_wells
from tests.plots.picture_texts import check_texts, text_boxes
from tests.plots.plot_programs import Cost, Kernels, bottlenecks, depthwise_blocks

UNIT = get_processor("a5000").with_ceilings(peak_ops=10e3, bandwidth=2e3)
"""Peak 10 OP/ms, bandwidth 2 byte/ms: op:byte 5."""
BY_HAND = Kernels((Cost(10, 8, LayerKind.GROUPED), Cost(90, 2, LayerKind.POINTWISE), Cost(0, 6)))
"""4 ms at 1.25 OP/byte, 9 ms at 45, 3 ms at 0."""


def panel(program, title="a network", processor="a5000"):
    return WaterlinePanel(title, analyze(program, processor))


def well(config, processor="a5000"):
    graph = config.graph(128)
    return Well(f"C {config.label}", analyze(layerwise(graph), processor), analyze(block_fused(graph), processor))


def main_axes(figure):
    return [axes for axes in figure.axes if axes.get_yscale() == "function"]


def bars(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def written(figure):
    return [text.get_text() for text in text_boxes(figure)]


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_pictures_by_suffix(tmp_path, suffix, magic):
    plot_waterline([panel(BY_HAND)], tmp_path / f"waterline{suffix}")
    plot_wells([well(FIGURE8[0])], tmp_path / f"wells{suffix}")
    for name in ("waterline", "wells"):
        assert (tmp_path / f"{name}{suffix}").read_bytes().startswith(magic)


def test_pages_are_opaque_white_and_no_wider_than_a_readme(tmp_path):
    plot_waterline([panel(BY_HAND)], tmp_path / "waterline.png")
    picture = imread(tmp_path / "waterline.png")
    assert picture.shape[1] <= 160 * WIDTH
    assert picture[0, 0].min() == 1 and picture[..., 3].min() == 1


def test_bars_by_hand(tmp_path, saved_figures):
    plot_waterline([panel(BY_HAND, processor=UNIT)], tmp_path / "waterline.png")
    (axes,) = main_axes(saved_figures[0])
    first, second, third = bars(axes)
    assert [bar.get_x() for bar in (first, second, third)] == pytest.approx([0, 4, 13])
    assert [bar.get_width() for bar in (first, second, third)] == pytest.approx([4, 9, 3])
    assert (first.get_height(), second.get_height()) == (1.25, 45)
    assert 0 < third.get_height() < 0.1, "a kernel without OPs shows"
    assert "[ms]" in axes.get_xlabel()
    assert axes.get_ylim()[1] > 45 and axes.get_xlim()[1] > 16
    kinds = (LayerKind.GROUPED, LayerKind.POINTWISE, LayerKind.OTHER)
    for bar, kind in zip((first, second, third), kinds, strict=True):
        assert bar.get_facecolor()[:3] == to_rgb(KIND_STYLES[kind]["facecolor"])
        assert bar.get_hatch() == KIND_STYLES[kind]["hatch"]


def test_texts(tmp_path, saved_figures):
    line = panel(layerwise(mbconv(128, 16, 16, 128, 4)), "MBConv, layer by layer")
    plot_waterline([line], tmp_path / "waterline.png", title="One block")
    texts = written(saved_figures[0])
    assert {"One block", "MBConv, layer by layer", "NVIDIA RTX A5000\n160 OP/byte", "26%"} <= set(texts)
    assert "7 kernels, at least 544 µs, 100% of it memory-bound" in texts
    assert any("76.7 TFLOP/s fp16, 480 GB/s" in text for text in texts)
    (legend,) = saved_figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        LayerKind.POINTWISE,
        LayerKind.GROUPED,
        LayerKind.OTHER,
    ]


def test_water_reaches_the_op_byte_behind_and_in_front_of_the_bars(tmp_path, saved_figures):
    plot_waterline([panel(BY_HAND, processor=UNIT)], tmp_path / "waterline.png")
    (axes,) = main_axes(saved_figures[0])
    water = [collection for collection in axes.collections if collection.get_alpha()]
    assert [collection.get_paths()[0].get_extents().y1 for collection in water] == [5, 5]
    orders = sorted(collection.get_zorder() for collection in water)
    assert orders[0] < bars(axes)[0].get_zorder() < orders[1]
    (surface,) = [line for line in axes.lines if len(line.get_ydata()) == 2]
    assert list(surface.get_ydata()) == [5, 5]
    assert list(surface.get_xdata()) == list(axes.get_xlim())


def test_gauge(tmp_path, saved_figures):
    lines = [panel(layerwise(convfirst(128, 64, 64, 32, 6))), panel(block_fused(convfirst(128, 64, 64, 32, 6)))]
    plot_waterline(lines, tmp_path / "waterline.png")
    gauges = [axes for axes in saved_figures[0].axes if axes not in main_axes(saved_figures[0])]
    assert [bars(axes)[0].get_height() for axes in gauges] == pytest.approx(
        [100 * panel.line.max_efficiency for panel in lines]
    )
    assert {"17%", "100%"} <= set(written(saved_figures[0]))
    assert all(axes.get_ylim() == (0, 100) for axes in gauges)


def test_panels_share_their_latency_axis(tmp_path, saved_figures):
    panels = [panel(layerwise(convfirst(128, 64, 64, 32, 6))), panel(layerwise(convfirst(8, 64, 64, 32, 6)))]
    plot_waterline(panels, tmp_path / "shared.png")
    plot_waterline(panels, tmp_path / "own.png", share_x=False)
    shared, own = (main_axes(figure) for figure in saved_figures)
    assert shared[0].get_xlim() == shared[1].get_xlim()
    assert own[0].get_xlim()[1] > 1.188 and own[1].get_xlim()[1] > 74
    assert ["[ms]" in axes.get_xlabel() for axes in own] == [True, False]
    assert "[µs]" in own[1].get_xlabel()


@pytest.mark.parametrize("processor, share_x", [("a5000", True), ("h200", True), ("rtx4090", False)])
def test_no_bar_is_under_the_name_of_the_processor(tmp_path, saved_figures, processor, share_x):
    programs = (layerwise(mbconv(128, 16, 16, 128, 4)), layerwise(mbconv(8, 16, 16, 128, 4)))
    panels = [panel(program, processor=processor) for program in programs]
    plot_waterline(panels, tmp_path / "waterline.png", share_x=share_x)
    (figure,) = saved_figures
    boxes = text_boxes(figure)
    names = [box for text, box in boxes.items() if text.get_text().endswith("OP/byte")]
    for axes, name in zip(main_axes(figure), names, strict=True):
        last = bars(axes)[-1]
        assert axes.transData.transform((last.get_x() + last.get_width(), 0))[0] < name.x0


def test_clipping(tmp_path, saved_figures):
    slow = Cost(4, 10_000)
    high = [Cost(1000 * intensity, 1000) for intensity in (1800, 1300, 1400, 1400)]
    program = Kernels((*high[:2], slow, high[2], slow, high[3]))
    plot_waterline([panel(program)], tmp_path / "waterline.png")
    (figure,) = saved_figures
    (axes,) = main_axes(figure)
    assert [bar.get_height() for bar in bars(axes)[:2]] == [1000, 1000]
    texts = written(figure)
    assert "higher than the axis" in texts
    assert texts.count("1800") == texts.count("1400") == 1 and "1300" not in texts
    arrows = [line for line in axes.lines if len(line.get_ydata()) == 1]
    assert [list(arrow.get_ydata()) for arrow in arrows] == [[1000]] * 3
    for box in (box for text, box in text_boxes(figure).items() if text.get_text() in ("1800", "1400")):
        assert axes.get_window_extent().y1 >= box.y1


def test_bars_without_traffic_are_clipped(tmp_path, saved_figures):
    plot_waterline([panel(Kernels((Cost(1000, 0), Cost(1000, 10))))], tmp_path / "waterline.png")
    assert bars(main_axes(saved_figures[0])[0])[0].get_height() == 1000
    assert "∞" in written(saved_figures[0])


@pytest.mark.parametrize(
    "intensities, max_intensity, expected",
    [
        ((20, 1100), None, 1100),
        ((20, 1300), None, 1000),
        ((20, 1300), 2000, 1300),
        ((20, 900), 500, 500),
        ((20, 30), None, 1.5 * 76.7 / 0.48),
        ((20, 900), 10, 1.5 * 76.7 / 0.48),
        ((20, math.inf), None, 1000),
    ],
)
def test_where_bars_end(intensities, max_intensity, expected):
    kernels = tuple(Cost(1000, 0) if i == math.inf else Cost(100 * i, 100) for i in intensities)
    limit = bar_limit([analyze(Kernels(kernels), "a5000")], max_intensity)
    assert limit == pytest.approx(expected)


def test_six_hundred_kernels(tmp_path, saved_figures):
    program = depthwise_blocks()
    assert len(program.kernels) == 600
    plot_waterline([panel(program)], tmp_path / "waterline.png")
    (figure,) = saved_figures
    (axes,) = main_axes(figure)
    assert len(bars(axes)) == 600
    points = axes.get_window_extent().width / (figure.dpi / 72) / axes.get_xlim()[1]
    for bar in bars(axes):
        width = bar.get_width() * points
        assert bar.get_linewidth() <= max(0.1 * width, 0.25), "outlines do not add up to black"
        assert width > 1.4 or bar.get_edgecolor() == bar.get_facecolor()
        assert width > 6.5 or not bar.get_hatch()
    assert max(bars(axes), key=Rectangle.get_width).get_edgecolor()[:3] == to_rgb(INK)
    texts = written(figure)
    assert not {"expand", "conv", "project"} & set(texts)
    assert any(text.startswith("600 kernels, at least") for text in texts)


def test_the_names_of_a_few_kernels(tmp_path, saved_figures):
    plot_waterline([panel(layerwise(mbconv(128, 16, 16, 128, 4)))], tmp_path / "waterline.png")
    (figure,) = saved_figures
    (axes,) = main_axes(figure)
    boxes = {text.get_text(): box for text, box in text_boxes(figure).items()}
    names = ("expand", "conv", "pool", "gate", "project")
    assert set(names) <= set(boxes) and not {"squeeze", "excite"} & set(boxes)
    surface = axes.transData.transform((0, PROCESSORS["a5000"].op_byte))[1]
    drawn = [bar for bar in bars(axes) if bar.get_width() > 10]
    for name, bar in zip(names, drawn, strict=True):
        left, right = axes.transData.transform([(bar.get_x(), 0), (bar.get_x() + bar.get_width(), 0)])[:, 0]
        assert left <= boxes[name].x0 and boxes[name].x1 <= right
        assert not boxes[name].y0 < surface < boxes[name].y1


def test_the_name_of_a_high_kernel_is_inside(tmp_path, saved_figures):
    kernels = Kernels((Cost(1800, 1, LayerKind.FUSED, "first"), Cost(90, 1, LayerKind.CONVOLUTION, "second")))
    plot_waterline([panel(kernels)], tmp_path / "waterline.png")
    (figure,) = saved_figures
    (axes,) = main_axes(figure)
    boxes = {text.get_text(): box for text, box in text_boxes(figure).items()}
    assert boxes["first"].y1 < axes.transData.transform((0, 1000))[1]


def test_a_long_title_stands_over_the_summary(tmp_path, saved_figures):
    plot_waterline([panel(BY_HAND, "a network " * 8)], tmp_path / "waterline.png")
    check_texts(saved_figures[0])


@pytest.mark.parametrize("share_x", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_no_text_covers_another(tmp_path, saved_figures, count, share_x):
    programs = (bottlenecks(), *(layerwise(convfirst(n, 64, 64, 32, 6)) for n in (1, 8, 128)))
    processors = ("a5000", "h200", "h200", "b200")
    panels = [
        panel(program, f"network {i}", processor)
        for i, (program, processor) in enumerate(zip(programs, processors, strict=True))
    ]
    plot_waterline(panels[:count], tmp_path / "waterline.png", title="Networks", share_x=share_x)
    check_texts(saved_figures[0])


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="there are no panels"):
        plot_waterline([], tmp_path / "waterline.png")
    with pytest.raises(ValueError, match="there are no wells"):
        plot_wells([], tmp_path / "wells.png")


@pytest.mark.parametrize("name", ["picture.jpg", "picture"])
def test_other_suffixes(tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        plot_waterline([panel(BY_HAND)], tmp_path / name)
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        plot_wells([well(FIGURE8[0])], tmp_path / name)


def test_wells_by_hand(tmp_path, saved_figures):
    layer_by_layer = analyze(BY_HAND, UNIT)
    fused = analyze(Kernels((Cost(40, 1, LayerKind.FUSED),)), UNIT)
    plot_wells([Well("this", layer_by_layer, fused)], tmp_path / "wells.png")
    (axes,) = main_axes(saved_figures[0])
    assert [bar.get_width() for bar in bars(axes)] == pytest.approx([4 / 16, 9 / 16, 3 / 16, 4 / 16])
    assert bars(axes)[3].get_height() == 40
    assert bars(axes)[3].get_x() > 1
    assert {"this", "16000 µs", "4000 µs"} <= set(written(saved_figures[0]))


@pytest.mark.parametrize("configs, rows", [(FIGURE8, (5, 4)), (FIGURE12, (5, 5)), (FIGURE12[:3], (3,))])
def test_wells_of_the_figures(tmp_path, saved_figures, configs, rows):
    plot_wells([well(config) for config in configs], tmp_path / "wells.png", title="Blocks")
    (figure,) = saved_figures
    kernels = 4 if configs is FIGURE8 else 8
    assert tuple(len(bars(axes)) // kernels for axes in main_axes(figure)) == rows
    texts = written(figure)
    assert {f"C {config.label}" for config in configs} <= set(texts)
    assert {"1538 µs", "280 µs"} <= set(texts) if configs is FIGURE8 else {"544 µs", "144 µs"} <= set(texts)
    check_texts(figure)


@pytest.mark.parametrize("max_intensity", [None, 300])
@pytest.mark.parametrize("count", [1, 2, 6, 11])
def test_no_text_of_any_number_of_wells_covers_another(tmp_path, saved_figures, count, max_intensity):
    wells = [well(config, "h200") for config in (*FIGURE12, *FIGURE8)[:count]]
    plot_wells(wells, tmp_path / "wells.png", max_intensity=max_intensity)
    check_texts(saved_figures[0])
    assert ("higher than the axis" in written(saved_figures[0])) == (max_intensity is not None)
