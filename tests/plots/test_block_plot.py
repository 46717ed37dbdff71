import pytest

from fusion.bench.blocks import FIGURE12, TABLE1
from fusion.bench.report import collect_meta
from fusion.bench.waterline import block_rows
from fusion.planner.processor import get_processor
from fusion.plots.block_plot import draw_blocks, page_height, plot_blocks
from fusion.plots.style import new_figure
from tests.plots.picture_texts import check_texts

H200 = get_processor("h200")
META = {**collect_meta("made up", H200, batch=128, dtype="float16"), "device": "NVIDIA H200"}
BIG_ENOUGH = 5000


def made_up_rows(configs=TABLE1, timed=True):
    rows = []
    for config in configs:
        fused = block_rows(config, 128, H200)[1]
        limit = fused["minimum_us"]
        timings = {"eager_us": 12 * limit, "inductor_us": 9 * limit, "fused_us": 1.5 * limit}
        rows.append({**fused, "limit_us": limit, "predicted_us": 1.3 * limit})
        rows[-1].update(timings if timed else dict.fromkeys(timings))
    return rows


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_picture_by_suffix(tmp_path, suffix, magic):
    path = tmp_path / f"blocks{suffix}"
    plot_blocks(made_up_rows(), META, path)
    assert path.read_bytes().startswith(magic)
    assert path.stat().st_size > BIG_ENOUGH


def svg_text(tmp_path, rows):
    path = tmp_path / "blocks.svg"
    plot_blocks(rows, META, path)
    # The backend draws letters as shapes and keeps the text in comments.
    return path.read_text(encoding="utf-8")


def test_timed_rows(tmp_path):
    text = svg_text(tmp_path, made_up_rows())
    assert "Throughput of ConvFirst blocks on NVIDIA H200, batch 128, float16" in text
    assert "Assumed: 790 TFLOP/s and 4.3 TB/s" in text
    assert all(label in text for label in ("TFLOP/s", "% of peak", "eager PyTorch", "Inductor", "limit of the fused"))
    assert text.count("6.0×") == text.count("67% of limit") == len(TABLE1)
    assert "predicted" not in text


def test_rows_without_timings_are_labelled_so(tmp_path):
    text = svg_text(tmp_path, made_up_rows(timed=False))
    assert "Predicted, not timed" in text
    assert "fused: predicted, not timed" in text
    assert text.count("77% of limit") == len(TABLE1)
    assert "Inductor" not in text


def test_a_program_that_was_not_timed_is_left_out(tmp_path):
    rows = made_up_rows(FIGURE12[:2])
    rows[0]["inductor_us"] = rows[0]["eager_us"] = rows[1]["eager_us"] = None
    text = svg_text(tmp_path, rows)
    assert "MBConv" in text and "eager" not in text
    assert text.count("6.0×") == 1
    assert text.count("67% of limit") == 2


def crowded_rows(count):
    """As many blocks as asked for, some at their limit, over it, and slower than Inductor."""
    rows = [row for _ in range(3) for row in made_up_rows((*TABLE1, *FIGURE12))][:count]
    for row, part in zip(rows, (1.0, 0.97, 0.9, 0.85, 0.8, 0.1, 1.1), strict=False):
        row["fused_us"] = row["limit_us"] / part
    return [dict(row) for row in rows]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 3, 8, 10, 11, 27])
def test_nothing_overlaps(tmp_path, count):
    rows = crowded_rows(count)
    with new_figure(tmp_path / "blocks.png", page_height(rows)) as figure:
        draw_blocks(figure, rows, META)
        check_texts(figure)
    assert len(figure.axes) == -(-count // 10), "more blocks fill further panels"
    assert sum(len(axes.get_xticks()) for axes in figure.axes) == count
    assert figure.get_figwidth() <= 10


@pytest.mark.parametrize("name", ["blocks.jpg", "blocks", "png"])
def test_other_suffixes(tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        plot_blocks(made_up_rows(), META, tmp_path / name)


def test_no_rows(tmp_path):
    with pytest.raises(ValueError, match="there are no rows"):
        plot_blocks([], META, tmp_path / "blocks.png")
