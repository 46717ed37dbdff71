from dataclasses import replace

import pytest

from fusion.bench.gap import Ceilings, Gap, network_gaps
from fusion.bench.paper_networks import PAPER_NETWORKS
from fusion.plots.gap_plot import (
    HEIGHT,
    common_peak,
    draw_gaps,
    drawn_gaps,
    family,
    gap_series,
    plot_gap,
    plot_gaps,
    variant_name,
)
from fusion.plots.placement import line_boxes
from fusion.plots.style import new_figure
from tests.plots.picture_texts import check_texts, text_boxes

META = {
    "timed": True,
    "device": "NVIDIA H200",
    "processor": "NVIDIA H200",
    "dtype": "float16",
    "peak_tflops": 790.0,
    "bandwidth_tbs": 4.3,
    "ceilings_source": "measured",
}
# Multiply-accumulates [G], Inductor and fused ms: of the size that is to be expected, not measured.
NETWORKS = {
    "convfirstnet_pico": (0.86, 5.5, 0.75),
    "convfirstnet_nano": (1.81, 8.8, 1.5),
    "convfirstnet_tiny": (3.23, 13.5, 2.5),
    "convfirstnet_small": (5.49, 15.8, 4.0),
    "convnext_femto": (1.3, 4.3, None),
    "convnext_nano": (4.1, 7.7, None),
    "convnext_tiny": (7.4, 12.0, None),
    "convnext_small": (14.4, 19.7, None),
    "efficientnet_b1": (0.8, 5.4, None),
    "efficientnet_b3": (2.0, 11.6, None),
    "efficientnet_b5": (9.6, 39.0, None),
    "efficientnetv2_rw_s": (4.9, 10.0, None),
    "tf_efficientnetv2_s": (8.4, 16.5, None),
}
DEVICE = Ceilings("NVIDIA H100 80GB HBM3", 760.0, 3.0, "measured")


def made_up_rows(names=tuple(NETWORKS), batch=128):
    rows = []
    for name in names:
        macs, inductor_ms, fused_ms = NETWORKS[name]
        paper = PAPER_NETWORKS.get(name)
        rows.append(
            {
                "model": name,
                "batch": batch,
                "size": None,
                "dtype": "float16",
                "ops": 2e9 * macs * batch,
                "eager_ms": 2 * inductor_ms,
                "inductor_ms": inductor_ms,
                "fused_ms": fused_ms,
                "limit_ms": None if fused_ms is None else fused_ms / 2,
                "top1": paper.top1 if paper else None,
            }
        )
    return rows


def made_up_gaps(names=tuple(NETWORKS)):
    return drawn_gaps(network_gaps(made_up_rows(names), META)[0])


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_picture_by_suffix(tmp_path, suffix, magic):
    path = tmp_path / f"networks{suffix}"
    plot_gap(made_up_rows(), META, path)
    assert path.read_bytes().startswith(magic)
    assert path.stat().st_size > 10_000


def test_the_picture_says_what_it_assumes(tmp_path):
    plot_gap(made_up_rows(), META, tmp_path / "networks.svg")
    text = (tmp_path / "networks.svg").read_text(encoding="utf-8")
    for words in (
        "Efficiency gap on NVIDIA H200, batch 128, float16",
        "790 TFLOP/s and 4.3 TB/s (measured)",
        "Top-1: the paper",
        "MACs of an image [G]",
        "ideal latency of 128 images [ms]",
        "ImageNet-1k top-1 [%]",
        "ConvFirstNet-Small",
        "EfficientNetV2-S",
    ):
        assert words in text
    assert text.count("<!-- ConvNeXt-Small -->") == 2, "networks are named in two panels"
    assert text.count("<!-- Femto -->") == 2, "with the family's name at the most accurate one only"
    assert "eager" not in text


def test_what_is_drawn():
    gaps = network_gaps(made_up_rows(), META)[0]
    assert len(gaps) == 4 * 3 + 8 * 2, "no gap for a network whose accuracy is unknown"
    shown = drawn_gaps(gaps)
    assert len(shown) == 4 * 2 + 8, "eager PyTorch is not shown"
    fused = next(gap for gap in shown if gap.engine == "fused")
    compiled = replace(fused, engine="fusion", actual_ms=0.8)
    assert drawn_gaps([*shown, compiled]) == shown, "nor the backend where fusion.fuse is"
    assert drawn_gaps([compiled]) == [compiled]
    assert drawn_gaps([fused, replace(fused, actual_ms=0.9)]) == [fused], "nor a second report of the same"
    assert drawn_gaps([replace(fused, batch=8), fused]) == [fused], "nor a smaller batch"
    elsewhere = replace(fused, ceilings=DEVICE)
    assert drawn_gaps([fused, elsewhere]) == [fused, elsewhere]


def test_the_ideal_axis_needs_one_peak(tmp_path):
    gaps = made_up_gaps()
    assert common_peak(gaps) == 790.0
    both = [*gaps, replace(gaps[0], ceilings=DEVICE)]
    assert common_peak(both) is None
    for some, seconds in ((gaps, 1), (both, 0)):
        with new_figure(tmp_path / "gap.svg", HEIGHT) as figure:
            draw_gaps(figure, some)
        assert len(figure.axes[0].child_axes) == seconds
    text = (tmp_path / "gap.svg").read_text(encoding="utf-8")
    assert "NVIDIA H200 790 TFLOP/s and 4.3 TB/s (measured); NVIDIA H100 80GB HBM3 760 TFLOP/s" in text
    assert "ConvFirstNet, Inductor, NVIDIA H100 80GB HBM3" in text


def test_series():
    series = gap_series(made_up_gaps())
    assert [(one.family, one.engine, one.variant) for one in series] == [
        ("ConvFirstNet", "fused", 0),
        ("ConvFirstNet", "inductor", 1),
        ("ConvNeXt", "inductor", 0),
        ("EfficientNet", "inductor", 0),
        ("EfficientNetV2", "inductor", 0),
    ]
    assert [gap.top1 for gap in series[0].gaps] == [79.858, 81.834, 82.752, 83.312]


@pytest.mark.parametrize(
    "model, its_family, its_name",
    [
        ("convfirstnet_pico", "ConvFirstNet", "Pico"),
        ("efficientnet_b3", "EfficientNet", "B3"),
        ("efficientnet_b0:group_size=8", "EfficientNet", "B0:group_size=8"),
        ("tf_efficientnetv2_s", "EfficientNetV2", "S"),
        ("efficientnetv2_rw_t", "EfficientNetV2", "RW-T"),
        ("convfirst_uir", "other networks", "convfirst_uir"),
        ("resnet50", "other networks", "resnet50"),
    ],
)
def test_names(model, its_family, its_name):
    assert (family(model), variant_name(model)) == (its_family, its_name)


def test_limits_stand_in_where_nothing_was_timed(tmp_path):
    rows = made_up_rows(("convfirstnet_pico",))
    (gap,), _ = network_gaps(rows, {**META, "timed": False})
    assert (gap.engine, gap.actual_ms) == ("limit", 0.375)
    plot_gap(rows, {**META, "timed": False}, tmp_path / "limits.svg")
    text = (tmp_path / "limits.svg").read_text(encoding="utf-8")
    assert "NOT TIMED" in text and "limit, not timed" in text


def obstacles(figure):
    """Pixels of lines and markers, panel by panel."""
    for axes in figure.axes:
        for line in axes.lines:
            points = axes.transData.transform(line.get_xydata())
            size = line.get_markersize() / 2 * figure.dpi / 72 if line.get_marker() != "None" else 0
            for x, y in points if size else ():
                yield axes, (x - size, y - size, x + size, y + size)
            if line.get_linestyle() != "None":
                yield from ((axes, box) for box in list(line_boxes(points, 0.1))[len(points) :])


SOME = [
    tuple(NETWORKS),
    ("convfirstnet_pico",),
    ("convfirstnet_tiny", "convnext_tiny"),
    tuple(name for name in NETWORKS if not name.startswith("convfirst")),
]


def test_many_series_have_room(tmp_path):
    gaps = made_up_gaps()
    with new_figure(tmp_path / "gap.png", HEIGHT) as figure:
        draw_gaps(figure, [*gaps, *(replace(gap, ceilings=DEVICE) for gap in gaps)])
        labels = figure.legends[0].get_texts()
        boxes = text_boxes(figure)
    assert len(labels) == 11
    top = max(boxes[label].y1 for label in labels)
    assert top < min(boxes[axes.xaxis.label].y0 for axes in figure.axes[2:])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names", SOME, ids=len)
def test_no_text_covers_another_nor_what_is_drawn(tmp_path, names):
    gaps = made_up_gaps(names)
    with new_figure(tmp_path / "gap.png", HEIGHT) as figure:
        draw_gaps(figure, gaps)
        check_texts(figure)
        boxes = text_boxes(figure)
        macs, actual, linear, logarithmic = figure.axes
        assert len(macs.texts) == len(actual.texts) == len({gap.model for gap in gaps})
        assert not linear.texts
        assert sorted(text.get_text() for text in logarithmic.texts) == sorted(
            f"{100 * gap.efficiency:.0f}%" for gap in gaps
        )
        for axes in figure.axes:
            for text in axes.texts:
                box = boxes[text]
                assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1, text
                assert axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1, text
        for axes, (x0, y0, x1, y1) in obstacles(figure):
            for text in axes.texts:
                box = boxes[text]
                assert not (box.x0 < x1 - 1 and x0 + 1 < box.x1 and box.y0 < y1 - 1 and y0 + 1 < box.y1), text
    assert figure.get_figwidth() <= 10


def test_points_of_the_panels(tmp_path):
    gaps = made_up_gaps(("convnext_tiny",))
    with new_figure(tmp_path / "gap.png", HEIGHT) as figure:
        draw_gaps(figure, gaps)
    macs, actual, linear, logarithmic = figure.axes
    ideal_ms = 2 * 7.4 * 128 / 790
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "linear", "linear", "log"]
    assert macs.lines[-1].get_xydata().tolist() == [[pytest.approx(7.4), 82.7]]
    assert actual.lines[-1].get_xydata().tolist() == [[12.0, 82.7]]
    for axes in (linear, logarithmic):
        assert axes.lines[0].get_xydata().tolist() == [[pytest.approx(ideal_ms), 82.7], [12.0, 82.7]]
    low, high = macs.get_xlim()
    assert macs.child_axes[0].get_xlim() == pytest.approx((low * ideal_ms / 7.4, high * ideal_ms / 7.4))


def test_efficiency():
    gap = Gap("convnext_tiny", "inductor", 128, 288, "float16", 7.4, 12.0, 82.7, "the paper", DEVICE)
    assert gap.ideal_ms == pytest.approx(1e3 * 2 * 7.4e9 * 128 / 760e12)
    assert gap.efficiency == pytest.approx(gap.ideal_ms / 12)


@pytest.mark.parametrize("name", ["networks.jpg", "networks"])
def test_other_suffixes(tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        plot_gap(made_up_rows(), META, tmp_path / name)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no network of known accuracy has a latency"):
        plot_gap(made_up_rows(("efficientnetv2_rw_s",)), META, tmp_path / "networks.png")
    with pytest.raises(ValueError, match="no network of known accuracy has a latency"):
        plot_gaps([], tmp_path / "networks.png")
