import json
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from fusion.bench.predicted_row import predicted_rows
from fusion.planner.families import FAMILIES
from fusion.plots.predicted_plot import KERNEL_STYLES, RATIOS, plot_predicted
from tests.plots.picture_texts import check_texts, text_boxes

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def rows_of(*names):
    rows = []
    for name in names:
        report = json.loads((RESULTS / f"{name}.json").read_text())
        rows += predicted_rows(name, report["meta"], report["rows"])
    return rows


BLOCKS = rows_of("h200/convfirst", "h200/mbconv", "h200/ffn")
ALL = BLOCKS + rows_of("h200/convfirst_portable", "h200/mbconv_windows", "h200/compile", "h100/network", "h100/mbconv")


def points(axes):
    """Markers, as (x, y, marker, face)."""
    lines = [line for line in axes.lines if len(line.get_xdata()) == 1]
    return [
        (line.get_xdata()[0], line.get_ydata()[0], line.get_marker(), to_hex(line.get_markerfacecolor()))
        for line in lines
    ]


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_pictures_by_suffix(tmp_path, suffix, magic):
    path = tmp_path / f"predicted{suffix}"
    plot_predicted(BLOCKS, path)
    assert path.read_bytes().startswith(magic)


def test_points_and_guides(tmp_path, saved_figures):
    plot_predicted(BLOCKS, tmp_path / "predicted.png")
    limit, prediction = saved_figures[0].axes
    assert {axes.get_xscale() for axes in (limit, prediction)} == {"log"}
    assert limit.get_xlabel() == "minimum latency [µs]" and prediction.get_xlabel() == "predicted latency [µs]"
    assert {axes.get_ylabel() for axes in (limit, prediction)} == {"measured latency [µs]"}
    timed = [row for row in BLOCKS if row["inductor_us"] is not None]
    by_inductor = [(row["layerwise_us"], row["inductor_us"]) for row in timed]
    fused = [(row["minimum_us"], row["measured_us"]) for row in BLOCKS]
    assert [point[:2] for point in points(limit)] == by_inductor + fused
    assert {face for *_, face in points(limit)[: len(timed)]} == {"#ffffff"}, "Inductor's markers are empty"
    assert "#ffffff" not in {face for *_, face in points(limit)[len(timed) :]}
    assert [point[:2] for point in points(prediction)] == [(row["predicted_us"], row["measured_us"]) for row in BLOCKS]
    guides = [line for line in limit.lines if len(line.get_xdata()) == 2]
    assert [line.get_ydata()[0] / line.get_xdata()[0] for line in guides] == pytest.approx(RATIOS)
    texts = {text.get_text() for text in text_boxes(saved_figures[0])}
    assert {"limit", "2×", "5×", "10×", "(a) how far from the limit"} <= texts
    assert any("NVIDIA H200: 777.1 to 791.8 TFLOP/s fp16, 4192 to 4209 GB/s" in text for text in texts)
    assert any(text.startswith("(b) predictions, ±25% in grey; largest error ") for text in texts)


def test_kernels_are_told_apart_without_colour():
    assert set(KERNEL_STYLES) == {family.name for family in FAMILIES}
    assert len({style["marker"] for style in KERNEL_STYLES.values()}) == len(KERNEL_STYLES)


def test_several_blocks_of_a_launch_have_half_a_marker(tmp_path, saved_figures):
    plot_predicted(BLOCKS, tmp_path / "predicted.png")
    legend = [text.get_text() for text in saved_figures[0].legends[0].get_texts()]
    assert legend == [
        *("convfirst_hopper", "ffn_hopper", "mbconv_hopper", "mbconv_hopper, several a launch"),
        *("Inductor: convfirst", "Inductor: mbconv", "Inductor: ffn"),
    ]
    styles = [line.get_fillstyle() for line in saved_figures[0].axes[1].lines if len(line.get_xdata()) == 1]
    assert styles.count("left") == sum(row["launch"] != "one" for row in BLOCKS) == 10


def test_predictions_of_an_earlier_version_are_left_out(tmp_path, saved_figures):
    rows = rows_of("h200/compile")
    assert {row["predicted_by"] for row in rows} == {"report"}
    plot_predicted(rows, tmp_path / "predicted.png")
    (limit,) = saved_figures[0].axes
    assert len(points(limit)) == len(rows)


@pytest.mark.parametrize("rows", [BLOCKS, ALL, BLOCKS[:1], ALL[-3:]], ids=["blocks", "all", "one", "three"])
def test_no_text_covers_another(tmp_path, saved_figures, rows):
    plot_predicted(rows, tmp_path / "predicted.png")
    check_texts(saved_figures[0])


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="there are no rows"):
        plot_predicted([], tmp_path / "predicted.png")
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        plot_predicted(BLOCKS, tmp_path / "predicted.jpg")
