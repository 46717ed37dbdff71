"""`bench/compile_sweep.py`: what counts as broken, and the script with made-up processes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from fusion.bench.case_worker import CaseWorker
from fusion.bench.model_case import ModelCase, image_size, known_model
from fusion.bench.sweep_models import PREFERRED_SIZE, SWEEP
from fusion.bench.sweep_row import markdown_table, summary, sweep_cells, sweep_columns, sweep_row

CASE = ModelCase("regnety_002", 2, 96)
BLOCKS = [
    {"fused": True, "reason": ""},
    {"fused": False, "reason": "no|kernel"},
    {"fused": False, "reason": "no|kernel"},
]
BUILT = {"build": {}}
INDUCTOR = {"seconds": 20.0, "distance": 1e-3}


def reply(distance=1e-4, blocks=BLOCKS, warnings=()):
    report = {"graphs": 2, "errors": [], "blocks": blocks}
    return {"seconds": 3.0, "distance": distance, "warnings": list(warnings), "report": report}


def test_a_network_that_is_ok():
    row = sweep_row(CASE, {**BUILT, "inductor": INDUCTOR, "default": reply(blocks=[]), "all": reply(2e-3)})
    assert (row["status"], row["why"], row["tolerance"]) == ("ok", "", 2e-3)
    variant = row["variants"]["all"]
    assert (variant["blocks_found"], variant["blocks_fused"], variant["blocks_left"], variant["graphs"]) == (3, 1, 2, 2)
    assert variant["reasons"] == {"no|kernel": 2}


def test_networks_that_break():
    row = sweep_row(CASE, {**BUILT, "inductor": {**INDUCTOR, "distance": 1e-5}, "all": reply(1.1e-3)})
    assert (row["status"], row["tolerance"]) == ("broken", 1e-3)
    assert row["why"] == "all: its result is 1.1e-03 from Inductor's, more than 1.0e-03"
    row = sweep_row(
        CASE, {**BUILT, "inductor": INDUCTOR, "default": reply(None), "all": {"failed": "no answer in 240 s"}}
    )
    assert (row["status"], row["why"]) == ("broken", "default: its result is not finite")
    assert row["variants"]["all"] == {"status": "broken", "why": "no answer in 240 s"}


def test_a_network_that_cannot_be_built_is_broken():
    row = sweep_row(CASE, {"build": {"failed": "ImportError: no"}})
    assert (row["status"], row["why"], row["variants"]) == ("broken", "it cannot be built: ImportError: no", {})


def test_networks_that_say_nothing_are_skipped():
    row = sweep_row(CASE, {**BUILT, "inductor": {"failed": "RuntimeError: no"}})
    assert (row["status"], row["why"]) == ("skipped", "Inductor fails too: RuntimeError: no")
    row = sweep_row(CASE, {**BUILT, "inductor": {**INDUCTOR, "distance": None}, "all": reply(None)})
    assert (row["status"], row["variants"]) == ("skipped", {})


def test_tables_and_summary():
    rows = [
        sweep_row(CASE, {**BUILT, "inductor": INDUCTOR, "all": reply(warnings=["fusion: left"])}),
        sweep_row(CASE, {**BUILT, "inductor": {"failed": "no"}}),
    ]
    columns = sweep_columns(["all"])
    text = markdown_table(columns, [sweep_cells(row, ["all"]) for row in rows])
    lines = text.splitlines()
    assert len(lines) == 4 and all(line.replace("\\|", "").count("|") == len(columns) + 1 for line in lines)
    assert lines[2] == "| regnety_002 | 96 | ok | 20.0 | 1.0e-03 | 3 | 1 | 3.0 | 1.0e-04 | 1 | 2 x no\\|kernel |"
    assert lines[3] == "| regnety_002 | 96 | skipped | - | - | - | - | - | - | 0 | Inductor fails too: no |"
    assert summary(rows) == "2 networks: 1 ok, 0 broken, 1 skipped; 1 with fused blocks, 1 with warnings"


WORKER = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    model, step = request["case"]["model"], request["do"]
    assert os.path.isdir(os.environ["FUSION_CACHE_DIR"])
    if model.endswith("nano") and step == "inductor":
        print(json.dumps({"failed": "RuntimeError: no"}), flush=True)
    elif model.endswith("tiny") and step == "all":
        os._exit(3)
    else:
        report = {"graphs": 1, "errors": [], "blocks": [{"fused": True, "reason": ""}]}
        rest = {} if step in ("build", "inductor") else {"warnings": [], "report": report}
        print(json.dumps({"seconds": 1.0, "distance": 1e-4, **rest}), flush=True)
"""


@pytest.fixture
def script(monkeypatch):
    """The script as a module, on a made-up machine without a GPU, with made-up processes."""
    path = Path(__file__).parents[2] / "bench" / "compile_sweep.py"
    spec = importlib.util.spec_from_file_location("compile_sweep", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FUSION_CACHE_DIR", "")
    monkeypatch.setattr(module, "CaseWorker", lambda command: CaseWorker([sys.executable, "-c", WORKER]))
    return module


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compile_sweep.py", *arguments])
    return script.main()


def test_the_script(script, monkeypatch, tmp_path, capsys):
    files = str(tmp_path / "out.json"), str(tmp_path / "out.md")
    arguments = ["tiny", "nano", "pico", "--workers", "2", "--json", files[0], "--table", files[1]]
    assert run(script, monkeypatch, *arguments) == 1
    report = json.loads(Path(files[0]).read_text())
    statuses = [(row["model"][13:], row["status"]) for row in report["rows"]]
    assert statuses == [("tiny", "broken"), ("nano", "skipped"), ("pico", "ok")], "in the order that was asked for"
    assert report["meta"]["variants"] == ["all"] and report["meta"]["dtype"] == "float32"
    assert report["rows"][0]["size"] == PREFERRED_SIZE
    assert "convfirstnet_pico" in Path(files[1]).read_text()
    out = capsys.readouterr().out
    assert "3 networks: 1 ok, 1 broken, 1 skipped; 1 with fused blocks, 0 with warnings" in out
    assert "all: its process died with exit code 3" in out
    assert run(script, monkeypatch, "pico", "nano") == 0
    assert run(script, monkeypatch, "nano") == 1, "nothing was compared"


def test_the_sweep_has_networks_that_timm_has():
    pytest.importorskip("timm", exc_type=Exception)
    assert len(set(SWEEP)) == len(SWEEP)
    for text in SWEEP:
        assert image_size(known_model(text), preferred=PREFERRED_SIZE) >= PREFERRED_SIZE
