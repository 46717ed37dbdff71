from itertools import combinations

import pytest

from fusion.bench.gap_plot import Gap, draw_gaps, network_gaps, plot_gap
from fusion.bench.paper_networks import PAPER_NETWORKS

META = {
    "timed": True,
    "device": "NVIDIA H200",
    "processor": "NVIDIA H200",
    "dtype": "float16",
    "peak_tflops": 790.0,
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


def made_up_rows(names=tuple(NETWORKS), batch=128):
    rows = []
    for name in names:
        macs, inductor_ms, fused_ms = NETWORKS[name]
        paper = PAPER_NETWORKS.get(name)
        rows.append(
            {
                "model": name,
                "batch": batch,
                "ops": 2e9 * macs * batch,
                "inductor_ms": inductor_ms,
                "fused_ms": fused_ms,
                "limit_ms": None if fused_ms is None else fused_ms / 2,
                "top1": paper.top1 if paper else None,
            }
        )
    return rows


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_picture_by_suffix(tmp_path, suffix, magic):
    path = tmp_path / f"networks{suffix}"
    plot_gap(made_up_rows(), META, path)
    assert path.read_bytes().startswith(magic)
    assert path.stat().st_size > 10_000


def test_lines_of_the_picture():
    gaps = network_gaps(made_up_rows(), META)
    assert len(gaps) == 4 + 4 + 8, "no line for a network whose accuracy is unknown"
    femto = next(gap for gap in gaps if gap.label == "ConvNeXt-Femto")
    assert (femto.family, femto.program, femto.top1, femto.actual_ms) == ("ConvNeXt", "inductor", 78.7, 4.3)
    assert femto.ideal_ms == pytest.approx(2 * 1.3 * 128 / 790)
    assert femto.text == "ConvNeXt-Femto 10%"
    assert {gap.label for gap in gaps} >= {"EfficientNet-B1", "EfficientNetV2-S", "ConvFirstNet-Pico"}


def test_the_largest_batch_is_drawn():
    rows = made_up_rows(("convfirstnet_pico",)) + made_up_rows(("convfirstnet_nano",), batch=8)
    assert {gap.label for gap in network_gaps(rows, META)} == {"ConvFirstNet-Pico"}


def test_limits_stand_in_where_nothing_was_timed(tmp_path):
    rows = [{**row, "inductor_ms": None, "fused_ms": None} for row in made_up_rows(("convfirstnet_pico",))]
    meta = {**META, "timed": False}
    (gap,) = network_gaps(rows, meta)
    assert (gap.program, gap.actual_ms) == ("limit", 0.375)
    plot_gap(rows, meta, tmp_path / "limits.svg")
    text = (tmp_path / "limits.svg").read_text(encoding="utf-8")
    assert "NOT TIMED" in text and "limit, not timed" in text


def overlap(a, b):
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5


@pytest.mark.parametrize("names", [tuple(NETWORKS), ("convfirstnet_pico",), ("convfirstnet_tiny", "convnext_tiny")])
def test_no_text_covers_another_nor_a_line(names):
    gaps = network_gaps(made_up_rows(names), META)
    figure = draw_gaps(gaps, "made up")
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "log"]
    for axes in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        frame = axes.get_window_extent(renderer)
        assert len(boxes) == len(gaps)
        assert not [pair for pair in combinations(boxes, 2) if overlap(*pair)]
        for box in boxes:
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 + 1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            for gap in gaps:
                (x0, y), (x1, _) = axes.transData.transform([(gap.ideal_ms, gap.top1), (gap.actual_ms, gap.top1)])
                assert not (box.y0 < y < box.y1 and min(x1, box.x1) > max(x0, box.x0)), gap


def test_efficiency():
    assert Gap("ConvNeXt", "ConvNeXt-Tiny", "inductor", 82.7, 2.0, 8.0).efficiency == 0.25


@pytest.mark.parametrize("name", ["networks.jpg", "networks"])
def test_other_suffixes(tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        plot_gap(made_up_rows(), META, tmp_path / name)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no network of known accuracy has a latency"):
        plot_gap(made_up_rows(("efficientnetv2_rw_s",)), META, tmp_path / "networks.png")
