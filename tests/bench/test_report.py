import json
import os
import sys

import pytest

import fusion
from fusion.bench import report
from fusion.bench.report import Column, check_writable, collect_meta, print_table, write_json
from fusion.planner.processor import get_processor


def test_meta_names_versions_protocol_and_ceilings():
    meta = collect_meta("by hand", get_processor("a5000"), batch=128)
    assert (meta["fusion"], meta["protocol"], meta["batch"]) == (fusion.__version__, "by hand", 128)
    assert (meta["peak_tflops"], meta["bandwidth_tbs"]) == (76.7, 0.48)
    assert meta["ceilings_source"].startswith("the paper's")
    assert meta["date"].endswith("+00:00")
    assert all(meta[key] for key in ("device", "torch", "triton", "python"))
    json.dumps(meta)


def test_meta_says_whether_ceilings_are_measured():
    processor = get_processor("h200").with_ceilings(peak_ops=7e14, bandwidth=4e12)
    assert collect_meta("", processor)["ceilings_source"] == "measured"
    assert collect_meta("")["peak_tflops"] is collect_meta("")["processor"] is None


def test_without_torch_the_device_is_a_cpu(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    meta = collect_meta("")
    assert (meta["device"], meta["driver"]) == ("cpu", None)


def test_an_installed_copy_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "SOURCE", tmp_path)
    monkeypatch.delenv("FUSION_COMMIT", raising=False)
    assert collect_meta("")["commit"] is None
    monkeypatch.setenv("FUSION_COMMIT", "0123abc")
    assert collect_meta("")["commit"] == "0123abc"


def test_json_creates_folders_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "folder" / "report.json"
    write_json(path, {"α": 1}, [{"x": float("inf"), "y": [float("nan"), 1.5]}])
    assert json.loads(path.read_text(encoding="utf-8")) == {"meta": {"α": 1}, "rows": [{"x": None, "y": [None, 1.5]}]}
    assert os.listdir(path.parent) == ["report.json"]


def test_a_failed_report_keeps_the_old_one(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {}, [])
    old = path.read_text()
    with pytest.raises(TypeError):
        write_json(path, {}, [{"x": object()}])
    assert path.read_text() == old
    assert os.listdir(tmp_path) == ["report.json"]


def test_devices_are_written_in_place():
    check_writable(os.devnull)
    write_json(os.devnull, {}, [])
    assert not os.path.isfile(os.devnull)


def test_unwritable_paths_are_refused_early(tmp_path):
    with pytest.raises(OSError, match="it is a directory; name a file in it"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "report.json", tmp_path / ("long" * 100)):
        with pytest.raises(OSError, match=r"cannot write .*"):
            check_writable(path)
    check_writable(tmp_path / "report.json")
    assert os.listdir(tmp_path) == ["file"]


def test_table_is_neither_squeezed_nor_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    plan = "ConvFirstTile(" + "x" * 200 + ")"
    print_table(["C", Column("us", "{:.1f}"), "plan"], [(16, 3.14159, plan), (128, None, "[none]")], "title " * 30)
    title, *_, first, second, _ = capsys.readouterr().out.splitlines()
    assert title.strip() == ("title " * 30).strip()
    assert plan in first
    assert [cell.strip() for cell in first.split()] == ["16", "3.1", plan]
    assert second.split() == ["128", "-", "[none]"]
    assert first.index("16") + 2 == second.index("128") + 3


def test_rows_must_fit_the_columns():
    with pytest.raises((ValueError, IndexError)):
        print_table(["a", "b"], [(1,)], "")
