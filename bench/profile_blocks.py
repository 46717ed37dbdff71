"""Read hardware counters of fused kernels with Nsight Compute: what is busy, and what warps wait for.

    python bench/profile_blocks.py --results bench/results/h200/convfirst.json --block 64,6,64 --json profile.json
    python bench/profile_blocks.py --results bench/results/h200/mbconv.json --block mbconv:128,4,16 --json profile.json

Takes each block's tile from the results of `python -m fusion.bench`, for blocks that run as one kernel. Needs `ncu` and
the right to read counters. Clocks are left as they are, and the caches hold what the launch before left.
"""

import argparse
import csv
import io
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from fusion import kernels
from fusion.bench import report
from fusion.bench.blocks import BlockConfig, parse_block
from fusion.bench.random_blocks import random_block
from fusion.planner.families import HOPPER, MBCONV_HOPPER, PORTABLE, Tile, family_of

LAUNCHES = 4
SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "ComputeWorkloadAnalysis", "LaunchStats", "SchedulerStats")
METRICS = {
    "duration": "gpu__time_duration.sum",
    "sm_pct": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_pct": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_pct": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_and_shared_memory_pct": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "tensor_pipe_pct": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "tensor_hmma_pct": "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",
    "issue_active_pct": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "achieved_occupancy_pct": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
LEAST_STALL = 0.1
"""Warps that wait for a reason at a time, per issued instruction, below which it is left out."""


def launch(config: BlockConfig, batch: int, tile: Tile) -> None:
    """Launch the kernel a few times on random input and weights."""
    twin = random_block(config, seed=0).fused()
    packed = kernels.pack(twin.weights, tile, torch.float16, "cuda")
    x = torch.randn(batch, config.channels, config.hw, config.hw, device="cuda", dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    for _ in range(LAUNCHES):
        kernels.launch(x, packed, out, tile, twin.weights, **twin.options)
    torch.cuda.synchronize()


def read_tile(text: str) -> Tile:
    """A tile of a kernel that runs a block by itself, from its `repr`. Raises NameError for any other."""
    kinds = {family.tile_type.__name__: family.tile_type for family in (HOPPER, PORTABLE, MBCONV_HOPPER)}
    return eval(text, {"__builtins__": {}}, kinds)


def read_counters(config: BlockConfig, batch: int, tile: str) -> dict[str, object]:
    """Counters of the last launch in a process of its own."""
    script = [sys.executable, __file__, "--block", str(config), "--batch", str(batch), "--launch", tile]
    ncu = [
        "ncu",
        "--clock-control",
        "none",
        "--cache-control",
        "none",
        "-k",
        f"regex:{family_of(read_tile(tile)).name}_kernel",
    ]
    ncu += ["--launch-skip", str(LAUNCHES - 1), "--launch-count", "1", "--csv", "--page", "raw"]
    ncu += [argument for section in SECTIONS for argument in ("--section", section)]
    result = subprocess.run([*ncu, *script], capture_output=True, text=True)
    table = [line for line in result.stdout.splitlines() if line.startswith('"')]
    if result.returncode or len(table) != 3:
        raise RuntimeError(f"ncu failed on {config}: {(result.stderr or result.stdout)[-2000:]}")
    names, units, values = csv.reader(io.StringIO("\n".join(table)))
    read = dict(zip(names, values, strict=True))
    counters: dict[str, object] = {
        name: float(read[metric].replace(",", "")) for name, metric in METRICS.items() if metric in read
    }
    counters["duration_unit"] = dict(zip(names, units, strict=True))[METRICS["duration"]]
    stalls = {match[1]: float(read[match[0]]) for match in map(STALL.fullmatch, names) if match and read[match[0]]}
    counters["stalls_per_issue"] = {reason: ratio for reason, ratio in stalls.items() if ratio >= LEAST_STALL}
    return counters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    block = partial(parse_block, types=("convfirst", "mbconv"))
    parser.add_argument("--block", action="append", type=block, required=True, metavar="[TYPE:]C,ALPHA,HW")
    parser.add_argument("--results", type=Path, help="JSON of python -m fusion.bench convfirst or mbconv")
    parser.add_argument("--batch", type=int, default=128, metavar="N")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--launch", metavar="TILE", help="only launch the one block's kernel with this tile")
    args = parser.parse_args()
    if args.launch:
        launch(args.block[0], args.batch, read_tile(args.launch))
        return
    if args.results is None:
        parser.error("--results says which tiles to run: make it with python -m fusion.bench COMMAND --json PATH")
    if args.json:
        report.check_writable(args.json)
    measured = json.loads(args.results.read_text())["rows"]
    plans = {(row["block"], row["channels"], row["alpha"], row["hw"]): row["plan"] for row in measured}
    rows = []
    for config in args.block:
        sizes = {"block": config.block, "channels": config.channels, "alpha": config.alpha, "hw": config.hw}
        plan = plans[tuple(sizes.values())]
        rows.append({**sizes, "batch": args.batch, "plan": plan, **read_counters(config, args.batch, plan)})
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        protocol = f"the last of {LAUNCHES} launches under Nsight Compute, sections {', '.join(SECTIONS)}"
        report.write_json(args.json, report.collect_meta(protocol), rows)


if __name__ == "__main__":
    main()
