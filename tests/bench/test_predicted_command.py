"""`python -m fusion.bench predicted`, on the results in the repository and on made-up ones."""

import argparse
import json
from pathlib import Path

import pytest

from fusion.bench import predicted_command, predicted_row
from fusion.bench.blocks import TABLE1, TABLE2
from fusion.bench.predicted_row import parse_tile, predicted_rows, report_processor
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.lower import layerwise
from fusion.planner.plan import plan_block
from fusion.planner.processor import PROCESSORS
from fusion.planner.waterline import analyze

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
CONVFIRST, MBCONV = RESULTS / "h200" / "convfirst.json", RESULTS / "h200" / "mbconv.json"
NETWORK, COMPILE = RESULTS / "h100" / "network.json", RESULTS / "h200" / "compile.json"
META = {"device": "NVIDIA H200", "peak_tflops": 790.0, "bandwidth_tbs": 4.3, "ceilings_source": "measured"}
TILE = HopperTile(pixels=64, hidden=32, stages=2, partitions=1, programs=4, slab=32, weight_chunks=0)
ROW = {
    **{"block": "convfirst", "channels": 32, "alpha": 6, "hw": 64, "batch": 128, "dtype": "float16"},
    **{"plan": repr(TILE), "fused_us": 36.0, "inductor_us": 400.0},
}


def run(*arguments):
    parser = argparse.ArgumentParser()
    predicted_command.register(parser.add_subparsers())
    args = parser.parse_args(["predicted", *map(str, arguments)])
    return args.func(args)


def report_of(tmp_path, *arguments):
    assert run(*arguments, "--json", tmp_path / "predicted.json") == 0
    return json.loads((tmp_path / "predicted.json").read_text())


def write(path, *rows, **meta):
    path.write_text(json.dumps({"meta": META | meta, "rows": list(rows)}))
    return path


def test_blocks_of_the_paper(tmp_path, capsys):
    report = report_of(tmp_path, CONVFIRST, MBCONV)
    recorded = [row for path in (CONVFIRST, MBCONV) for row in json.loads(path.read_text())["rows"]]
    ones = [row for row in report["rows"] if row["launch"] == "one"]
    stages = [row for row in report["rows"] if row["launch"] == "stage of 8"]
    assert (len(ones), len(stages)) == (len(TABLE1) + len(TABLE2), len(TABLE2))
    assert [row["measured_us"] for row in stages] == [row["fused_us"] for row in recorded if row["block"] == "mbconv"]
    assert [row["measured_us"] for row in ones] == [row.get("apart_us") or row["fused_us"] for row in recorded]
    for row in report["rows"]:
        assert row["predicted_by"] == "planner" and row["ratio"] == row["measured_us"] / row["minimum_us"]
        assert row["error_pct"] == pytest.approx(100 * (row["predicted_us"] / row["measured_us"] - 1))
    timed = [row for row in report["rows"] if row["inductor_us"] is not None]
    assert [row["inductor_us"] for row in timed] == [row["inductor_us"] for row in recorded]
    meta = report["meta"]
    assert (meta["device"], meta["reports"]) == ("cpu", [str(CONVFIRST), str(MBCONV)])
    for name, summary in (("largest_error_pct", max), ("mean_error_pct", lambda errors: sum(errors) / len(errors))):
        assert set(meta[name]) == {"convfirst_hopper", "mbconv_hopper"}
        for kernel, value in meta[name].items():
            errors = [abs(row["error_pct"]) for row in report["rows"] if row["kernel"] == kernel]
            assert value == pytest.approx(summary(errors))
    out = capsys.readouterr().out
    assert "convfirst 16, α 3, 128²" in out and "stage of 8" in out and "layer-wise minimum µs" in out
    assert f"{CONVFIRST}: NVIDIA H200, 791.8 TFLOP/s and 4.19 TB/s (measured)" in out
    assert "Errors of predictions, absolute" in out and "largest error %" in out


def test_numbers_of_a_block(tmp_path):
    (row,) = report_of(tmp_path, write(tmp_path / "block.json", ROW))["rows"]
    h200 = PROCESSORS["h200"]
    plan = plan_block(TABLE1[2].graph(128), h200, TILE)
    assert (row["block"], row["kernel"], row["launch"]) == ("convfirst 32, α 6, 64²", "convfirst_hopper", "one")
    assert row["plan"] == repr(TILE)
    assert (row["minimum_us"], row["predicted_us"]) == (plan.limit_us, plan.predicted_us)
    assert row["measured_us"] == 36.0 and row["ratio"] == 36.0 / plan.limit_us
    layer_by_layer = analyze(layerwise(TABLE1[2].graph(128)), h200).min_latency * 1e6
    assert row["layerwise_us"] == pytest.approx(layer_by_layer)
    assert row["inductor_ratio"] == pytest.approx(400.0 / layer_by_layer)


def test_ceilings_are_those_of_the_report(tmp_path):
    slow = write(tmp_path / "slow.json", ROW, peak_tflops=395.0, bandwidth_tbs=2.15)
    usual, unknown = write(tmp_path / "usual.json", ROW), write(tmp_path / "unknown.json", ROW, peak_tflops=None)
    slow, usual, unknown = report_of(tmp_path, slow, usual, unknown)["rows"]
    assert slow["minimum_us"] == pytest.approx(2 * usual["minimum_us"]) == pytest.approx(2 * unknown["minimum_us"])
    assert slow["predicted_us"] > 1.5 * usual["predicted_us"]
    assert unknown["ceilings_source"] == PROCESSORS["h200"].source and usual["ceilings_source"] == "measured"


def test_parts_of_networks(tmp_path, capsys):
    rows = report_of(tmp_path, NETWORK)["rows"]
    assert {row["predicted_by"] for row in rows} == {"planner's tile"}
    pico = {row["block"].removeprefix("convfirstnet_pico "): row for row in rows if "pico" in row["block"]}
    assert set(pico) == {
        *("stem, stages.0.0", "stages.1.0", "stages.1.1", "stages.2.0", "stages.2.1", "stages.3.0", "stages.3.1"),
        *("stages.4.0", "stages.4.1", "head"),
    }, "the classifier has no kernel of its own"
    assert (pico["stages.3.1"]["launch"], pico["stages.2.1"]["launch"]) == ("stage of 10", "one")
    assert pico["stages.4.1"]["measured_us"] == pytest.approx(9.745, abs=1e-3)
    assert "planner's tile" in capsys.readouterr().out


def test_blocks_that_torch_compile_found(tmp_path, capsys):
    """Of a ConvFirstNet sizes are known; of other networks the predictions are those of the report."""
    report = report_of(tmp_path, COMPILE, RESULTS / "h200" / "compile_pico.json")
    by_network = {}
    for row in report["rows"]:
        by_network.setdefault(row["block"].split()[0], []).append(row)
    assert {row["predicted_by"] for row in by_network["convfirstnet_pico"]} == {"planner's tile"}
    others = [row for name, rows in by_network.items() for row in rows if name != "convfirstnet_pico"]
    assert {row["predicted_by"] for row in others} == {"report"} and all(row["plan"] is None for row in others)
    assert len(others) == len({(row["kernel"], row["measured_us"]) for row in others}), "each kind of block once"
    assert report["meta"]["largest_error_pct"]["mbconv_windows_hopper, as predicted then"] > 10
    assert "mbconv_hopper" in report["meta"]["mean_error_pct"]
    assert any(row["inductor_us"] for row in others), "where Inductor ran the whole block"


def test_a_picture(tmp_path):
    assert run(CONVFIRST, MBCONV, "--plot", tmp_path / "predicted.svg") == 0
    text = (tmp_path / "predicted.svg").read_text(encoding="utf-8")
    assert "minimum latency [µs]" in text and "predicted latency [µs]" in text and "791.8 TFLOP/s" in text
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        run(CONVFIRST, "--plot", tmp_path / "predicted.jpg")


@pytest.mark.parametrize("name", ["h200/tiles.json", "h200/compile_sweep.json", "h100/network_latency.json"])
def test_reports_without_timed_blocks(name):
    with pytest.raises(ValueError, match=f"{name} has no blocks that were timed; give a report that `convfirst`, `mbc"):
        run(RESULTS / name)


def test_reports_of_other_devices(tmp_path):
    for path in (RESULTS / "h200" / "waterline.json", write(tmp_path / "cpu.json", ROW, device="cpu")):
        with pytest.raises(ValueError, match="was written without a GPU: it has no latencies; run its command on a"):
            run(path)
    with pytest.raises(ValueError, match="is of the device 'NVIDIA T4', of which the planner predicts nothing; it kno"):
        run(write(tmp_path / "t4.json", ROW, device="NVIDIA T4"))
    with pytest.raises(ValueError, match="has no blocks that were timed"):
        run(write(tmp_path / "untimed.json", ROW | {"fused_us": None}))


def test_other_files(tmp_path):
    with pytest.raises(OSError, match="cannot read"):
        run(tmp_path / "missing.json")
    path = tmp_path / "other.json"
    for text, message in (("no JSON", "is not JSON"), ("{}", "has no meta data and rows"), ("[1]", "has no meta data")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            run(path)


def test_tiles_from_their_text():
    assert parse_tile(repr(TILE)) == TILE
    assert parse_tile("HopperTile(64, 32, 2, 1, 4, 32, weight_chunks=0)") == TILE
    for text in ("Other(1)", "HopperTile(pixels=64)", "1 + 1", "HopperTile(", "HopperTile(pixels=f())", ""):
        with pytest.raises(ValueError, match=r"is no tile of this version: .*; measure the block again"):
            parse_tile(text)


def test_a_tile_that_is_no_more_valid(tmp_path):
    path = write(tmp_path / "old.json", ROW | {"plan": repr(TILE).replace("hidden=32", "hidden=8")})
    with pytest.raises(ValueError, match="hidden=8 is not one of 16, 32, 64"):
        run(path)


def test_processors():
    for device, name in (("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "rtx4090")):
        assert report_processor("a.json", {"device": device}) == PROCESSORS[name]
    assert report_processor("a.json", META | {"peak_tflops": 700.0}).peak_ops == 700e12
    (row,) = predicted_rows("a.json", META | {"peak_tflops": 700.0}, [ROW])
    assert (row["peak_tflops"], row["bandwidth_tbs"], row["device"]) == (700.0, 4.3, "NVIDIA H200")


def test_stages_are_as_deep_as_those_that_are_timed():
    from fusion import timing

    assert predicted_row.STAGE_DEPTH == timing.STAGE_DEPTH
