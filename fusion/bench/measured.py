"""Blocks timed on a GPU: eager PyTorch, Inductor and the fused kernel, in one run."""

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn

from fusion.bench import report
from fusion.bench.block_command import BlockCommand
from fusion.bench.block_row import Row, block_row
from fusion.bench.blocks import BlockConfig
from fusion.bench.random_blocks import random_block
from fusion.bench.report import Column
from fusion.planner.families import MBCONV_HOPPER
from fusion.planner.plan import Plan, plan_block
from fusion.planner.processor import get_processor
from fusion.probe import probe_processor
from fusion.progress import progress_bar
from fusion.reference import relative_error
from fusion.stage import FusedStage, MicroBatch
from fusion.timing import STAGE_DEPTH, graph_us
from fusion.tuner import tune_blocks

CHECKED_IMAGES = 4


def measure_blocks(blocks: Sequence[BlockConfig], args: argparse.Namespace, protocol: str) -> tuple[Row, list[Row]]:
    """Meta data and one row for each block (see `fusion.bench.report`)."""
    torch.backends.cudnn.benchmark = True
    processor = probe_processor() if args.processor is None else get_processor(args.processor)
    meta = report.collect_meta(protocol, processor, batch=args.batch, dtype=args.dtype, timed=True)
    graphs = [config.graph(args.batch, args.dtype) for config in blocks]
    if args.no_tune or args.portable:
        plans = [plan_block(graph, processor, portable=args.portable) for graph in graphs]
    else:
        plans = tune_blocks(graphs, processor, refresh=args.retune)
    rows = []
    with torch.no_grad(), progress_bar("timing blocks", len(blocks)) as bar:
        for config, plan in zip(blocks, plans, strict=True):
            rows.append(measure_block(config, plan, args.micro_batch))
            bar.advance()
    return meta, rows


def measure_block(config: BlockConfig, plan: Plan, micro_batch: MicroBatch = None) -> Row:
    """Time a stage of `STAGE_DEPTH` blocks in three ways, and check a fused block and the stage against float64.

    Fused blocks of a stage run in one launch where a kernel can, and are then timed one by one too. With a
    `micro_batch`, time the fused stage that way too, its blocks planned for so many images.
    """
    dtype, batch = getattr(torch, plan.shape.dtype), plan.shape.batch
    blocks = [random_block(config, seed) for seed in range(STAGE_DEPTH)]
    eager = nn.Sequential(*(copy.deepcopy(block).to("cuda", dtype) for block in blocks))
    eager = eager.to(memory_format=torch.channels_last)
    fused = FusedStage(block.fused(lambda *_: plan) for block in blocks)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(batch, config.channels, config.hw, config.hw, device="cuda", generator=generator)
    x = x.to(dtype, memory_format=torch.channels_last)

    some = torch.linspace(0, batch - 1, CHECKED_IMAGES, device="cuda").long()
    exact = nn.Sequential(*(copy.deepcopy(block).to("cuda", torch.float64) for block in blocks))
    errors = []
    for count in (1, STAGE_DEPTH):
        expected = exact[:count](x[some].double())
        out = fused(x) if count == STAGE_DEPTH else fused.blocks[0](x)
        error = relative_error(out[some], expected) if out.isfinite().all() else float("nan")
        errors.append((error, relative_error(eager[:count](x[some]), expected)))
    (error, eager_error), (stage_error, eager_stage_error) = errors

    fused_us = graph_us(lambda: fused(x)) / STAGE_DEPTH
    apart_us = None
    if plan.kernel == MBCONV_HOPPER.name:
        apart = FusedStage(fused.blocks, one_launch=False)
        apart_us = graph_us(lambda: apart(x)) / STAGE_DEPTH
    micro_batched_us = None
    if micro_batch is not None:
        stage = FusedStage((block.fused() for block in blocks), micro_batch)
        micro_batched_us = graph_us(lambda: stage(x)) / STAGE_DEPTH
    eager_us = graph_us(lambda: eager(x)) / STAGE_DEPTH
    inductor_us = graph_us(_inductor(eager, x)) / STAGE_DEPTH
    return block_row(
        config,
        plan,
        error,
        eager_error,
        eager_us=eager_us,
        inductor_us=inductor_us,
        fused_us=fused_us,
        apart_us=apart_us,
        stage_error=stage_error,
        eager_stage_error=eager_stage_error,
        micro_batched_us=micro_batched_us,
    )


def print_blocks(meta: Row, rows: Sequence[Row], command: BlockCommand) -> None:
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
        Column("kernel"),
        Column("plan"),
    )
    keys = ("channels", "alpha", "hw", "eager_us", "inductor_us", "fused_us", "speedup", "tflops", "pct_peak")
    keys += ("limit_us", "pct_limit", "error", "eager_error", "kernel", "plan")
    if any(row["apart_us"] is not None for row in rows):
        columns, keys = (*columns, Column("one by one µs", "{:.1f}")), (*keys, "apart_us")
    if any(row["micro_batched_us"] is not None for row in rows):
        columns, keys = (*columns, Column("micro-batched µs", "{:.1f}")), (*keys, "micro_batched_us")
    title = (
        f"{command.title} blocks on {meta['device']}, batch {meta['batch']}, {meta['dtype']}, µs per block; limits at "
        f"{meta['peak_tflops']:.0f} TFLOP/s and {meta['bandwidth_tbs']:.2f} TB/s ({meta['ceilings_source']})"
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
