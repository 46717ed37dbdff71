"""ConvFirst blocks without a GPU: the portable kernel in Triton's interpreter on one small image, nothing timed."""

import argparse
from collections.abc import Sequence

import torch

from fusion.bench import report
from fusion.bench.block_row import Row, block_row
from fusion.bench.blocks import BlockConfig
from fusion.bench.random_blocks import random_convfirst
from fusion.bench.report import Column
from fusion.planner.plan import Plan, plan_block
from fusion.planner.processor import get_processor
from fusion.progress import progress_bar
from fusion.reference import relative_error

CHECKED_PIXELS = 20
"""Height and width of the image: not a multiple of any tile, with pixels on and off the border."""


def interpret_blocks(blocks: Sequence[BlockConfig], args: argparse.Namespace, protocol: str) -> tuple[Row, list[Row]]:
    """Meta data and one row for each block; everything that needs a clock is None.

    Raises ValueError for bfloat16, whose products the interpreter gets wrong.
    """
    if args.dtype != "float16":
        raise ValueError(
            f"--dtype {args.dtype} needs a GPU: Triton's interpreter computes wrong products in bfloat16; use float16"
        )
    processor = get_processor(args.processor or "h200")
    meta = report.collect_meta(protocol, processor, batch=args.batch, dtype=args.dtype, timed=False)
    rows = []
    with torch.inference_mode(), progress_bar("checking blocks", len(blocks)) as bar:
        for config in blocks:
            plan = plan_block(config.graph(args.batch, args.dtype), processor, kernel="convfirst")
            rows.append(interpret_block(config, plan))
            bar.advance()
    return meta, rows


def interpret_block(config: BlockConfig, plan: Plan) -> Row:
    """Check a block's kernel, as planned, against float64 on one small image."""
    from fusion.triton_kernels.convfirst import launch

    size = min(config.hw, CHECKED_PIXELS)
    block = random_convfirst(config, seed=0)
    x = torch.randn(1, config.channels, size, size, generator=torch.Generator().manual_seed(0)).half()
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.full_like(x, float("nan"))
    packed = block.fused().weights.pack(plan.tile, x.dtype, "cpu").tensors()
    launch(x, *packed, out, activation="relu", residual=True, tile=plan.tile)
    eager = block.half()(x)
    expected = block.double()(x.double())
    row = block_row(config, plan, relative_error(out, expected), relative_error(eager, expected))
    return {**row, "checked": list(x.shape)}


def print_blocks(meta: Row, rows: Sequence[Row]) -> None:
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
        f"ConvFirst blocks, NOT TIMED (no GPU): portable kernel checked in Triton's interpreter; predictions for "
        f"{meta['processor']}, batch {meta['batch']}, {meta['dtype']}"
    )
    report.print_table(columns, cells, title)
