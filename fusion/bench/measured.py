"""ConvFirst blocks timed on a GPU: eager PyTorch, Inductor and the fused kernel, in one run."""

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn

from fusion.bench import report
from fusion.bench.blocks import BlockConfig
from fusion.bench.random_blocks import random_convfirst, relative_error
from fusion.bench.report import Column
from fusion.planner.plan import Plan, plan_block
from fusion.planner.processor import get_processor
from fusion.probe import probe_processor
from fusion.progress import progress_bar
from fusion.timing import graph_us
from fusion.tuner import tune_blocks

DEPTH = 8
"""Blocks of a stage: their weights together are not hot in L2 between replays."""
CHECKED_IMAGES = 4

Row = dict[str, object]


def measure_blocks(blocks: Sequence[BlockConfig], args: argparse.Namespace, protocol: str) -> tuple[Row, list[Row]]:
    """Meta data and one row for each block (see `fusion.bench.report`)."""
    torch.backends.cudnn.benchmark = True
    processor = probe_processor() if args.processor is None else get_processor(args.processor)
    meta = report.collect_meta(protocol, processor, batch=args.batch, dtype=args.dtype, timed=True)
    graphs = [config.graph(args.batch, args.dtype) for config in blocks]
    if args.no_tune:
        plans = [plan_block(graph, processor) for graph in graphs]
    else:
        plans = tune_blocks(graphs, processor, refresh=args.retune)
    rows = []
    with torch.no_grad(), progress_bar("timing blocks", len(blocks)) as bar:
        for config, plan in zip(blocks, plans, strict=True):
            rows.append(measure_block(config, plan))
            bar.advance()
    return meta, rows


def measure_block(config: BlockConfig, plan: Plan) -> Row:
    """Time a stage of `DEPTH` blocks in three ways and check the fused block against float64."""
    dtype, batch = getattr(torch, plan.shape.dtype), plan.shape.batch
    blocks = [random_convfirst(config, seed) for seed in range(DEPTH)]
    eager = nn.Sequential(*(copy.deepcopy(block).to("cuda", dtype) for block in blocks))
    eager = eager.to(memory_format=torch.channels_last)
    fused = nn.Sequential(*(block.fused(lambda *_: plan) for block in blocks))
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(batch, config.channels, config.hw, config.hw, device="cuda", generator=generator)
    x = x.to(dtype, memory_format=torch.channels_last)

    some = torch.linspace(0, batch - 1, CHECKED_IMAGES, device="cuda").long()
    expected = copy.deepcopy(blocks[0]).to("cuda", torch.float64)(x[some].double())
    eager_error = relative_error(eager[0](x[some]), expected)
    out = fused[0](x)
    error = relative_error(out[some], expected) if out.isfinite().all() else float("nan")

    fused_us = graph_us(lambda: fused(x)) / DEPTH
    eager_us = graph_us(lambda: eager(x)) / DEPTH
    inductor_us = graph_us(_inductor(eager, x)) / DEPTH
    tflops = plan.ops_count / fused_us / 1e6
    return {
        "block": config.block,
        "channels": config.channels,
        "alpha": config.alpha,
        "hw": config.hw,
        "batch": batch,
        "dtype": plan.shape.dtype,
        "eager_us": eager_us,
        "inductor_us": inductor_us,
        "fused_us": fused_us,
        "speedup": inductor_us / fused_us,
        "tflops": tflops,
        "pct_peak": 100 * tflops * 1e12 / plan.processor.peak_ops,
        "limit_us": plan.limit_us,
        "pct_limit": 100 * plan.limit_us / fused_us,
        "error": error,
        "eager_error": eager_error,
        "plan": repr(plan.tile),
        "plan_why": plan.why,
        "predicted_us": plan.predicted_us,
        "ops": plan.ops_count,
        "bytes": plan.bytes,
    }


def print_blocks(meta: Row, rows: Sequence[Row]) -> None:
    """The rows as a table, and the geometric mean of the speedups."""
    columns = (
        Column("C"),
        Column("α"),
        Column("H=W"),
        Column("eager µs", "{:.1f}"),
        Column("Inductor µs", "{:.1f}"),
        Column("fused µs", "{:.1f}"),
        Column("speedup", "{:.2f}x"),
        Column("TFLOP/s", "{:.0f}"),
        Column("% of peak", "{:.1f}"),
        Column("limit µs", "{:.1f}"),
        Column("% of limit", "{:.1f}"),
        Column("error", "{:.1e}"),
        Column("eager error", "{:.1e}"),
        Column("plan"),
    )
    keys = ("channels", "alpha", "hw", "eager_us", "inductor_us", "fused_us", "speedup", "tflops", "pct_peak")
    keys += ("limit_us", "pct_limit", "error", "eager_error", "plan")
    title = (
        f"ConvFirst blocks on {meta['device']}, batch {meta['batch']}, {meta['dtype']}, µs per block; measured peak "
        f"{meta['peak_tflops']:.0f} TFLOP/s, bandwidth {meta['bandwidth_tbs']:.2f} TB/s"
    )
    report.print_table(columns, [[row[key] for key in keys] for row in rows], title)
    speedups = torch.tensor([row["speedup"] for row in rows])
    print(f"geometric mean of the speedups over Inductor: {speedups.log().mean().exp().item():.2f}x")


def _inductor(stage: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A call of the stage compiled by Inductor with frozen weights."""
    torch.compiler.reset()
    compiled = torch.compile(stage)
    with inductor_config.patch(freezing=True):
        compiled(x)
    return lambda: compiled(x)
