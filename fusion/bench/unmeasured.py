"""Blocks without a GPU: what can be checked on a CPU on one small image, nothing timed."""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from fusion import kernels
from fusion.bench import report
from fusion.bench.block_command import BlockCommand
from fusion.bench.block_row import Row, block_row
from fusion.bench.blocks import BlockConfig
from fusion.bench.random_blocks import random_block
from fusion.bench.report import Column
from fusion.planner.families import MBCONV, PORTABLE
from fusion.planner.plan import Plan, plan_block
from fusion.planner.processor import get_processor
from fusion.progress import progress_bar
from fusion.reference import relative_error

INTERPRETED = {"convfirst": PORTABLE, "mbconv": MBCONV}
"""Kernel families that Triton's interpreter runs, by type of block."""
CHECKED_PIXELS = 20
"""Height and width of the image: not a multiple of any tile, with pixels on and off the border."""


def check_blocks(blocks: Sequence[BlockConfig], args: argparse.Namespace, protocol: str) -> tuple[Row, list[Row]]:
    """Meta data and one row for each block; everything that needs a clock is None.

    Portable kernels run in Triton's interpreter, which has no others; an FFN's operator computes its reference. Raises
    ValueError for those kernels in bfloat16, whose products the interpreter gets wrong.
    """
    if args.dtype != "float16" and any(config.block in INTERPRETED for config in blocks):
        raise ValueError(
            f"--dtype {args.dtype} needs a GPU: Triton's interpreter computes wrong products in bfloat16; use float16"
        )
    processor = get_processor(args.processor or "h200")
    meta = report.collect_meta(protocol, processor, batch=args.batch, dtype=args.dtype, timed=False)
    rows = []
    with torch.inference_mode(), progress_bar("checking blocks", len(blocks)) as bar:
        for config in blocks:
            family = INTERPRETED.get(config.block)
            kernel = family and family.name
            plan = plan_block(config.graph(args.batch, args.dtype), processor, kernel=kernel)
            rows.append(check_block(config, plan))
            bar.advance()
    return meta, rows


def check_block(config: BlockConfig, plan: Plan) -> Row:
    """Check a block, as planned, against float64 on one small image."""
    size = min(config.hw, CHECKED_PIXELS)
    block, dtype = random_block(config, seed=0), getattr(torch, plan.shape.dtype)
    x = torch.randn(1, config.channels, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    out = _interpret(block, plan, x) if plan.family in INTERPRETED.values() else block.fused(lambda *_: plan)(x)
    eager = block.to(dtype)(x)
    expected = block.double()(x.double())
    row = block_row(config, plan, relative_error(out, expected), relative_error(eager, expected))
    return {**row, "checked": list(x.shape)}


def _interpret(block: torch.nn.Module, plan: Plan, x: Tensor) -> Tensor:
    out = torch.full_like(x, float("nan"))
    fused = block.fused()
    packed = kernels.pack(fused.weights, plan.tile, x.dtype, "cpu")
    kernels.launch(x, packed, out, plan.tile, fused.weights, **fused.options)
    return out


def print_blocks(meta: Row, rows: Sequence[Row], command: BlockCommand) -> None:
    """The rows as a table that says that nothing was timed."""
    columns = (
        Column("C"),
        Column("α"),
        Column("H=W"),
        Column("checked at"),
        Column("error", "{:.1e}"),
        Column("eager error", "{:.1e}"),
        Column("predicted µs", "{:.1f}"),
        Column("limit µs", "{:.1f}"),
        Column("kernel"),
        Column("plan"),
    )
    cells = [
        [
            row["channels"],
            row["alpha"],
            row["hw"],
            "x".join(map(str, row["checked"])),
            row["error"],
            row["eager_error"],
            row["predicted_us"],
            row["limit_us"],
            row["kernel"],
            row["plan"],
        ]
        for row in rows
    ]
    title = (
        f"{command.title} blocks, NOT TIMED (no GPU): {command.checked_on_cpu} checked; predictions for "
        f"{meta['processor']}, batch {meta['batch']}, {meta['dtype']}"
    )
    report.print_table(columns, cells, title)
