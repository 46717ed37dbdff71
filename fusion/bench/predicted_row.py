"""Rows of `python -m fusion.bench predicted`: a block's minimum, predicted and measured latency, from saved reports."""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

from fusion.bench.blocks import BLOCK_TYPES, BlockConfig
from fusion.bench.network_case import CONVFIRSTNETS
from fusion.bench.saved_results import processor_of
from fusion.planner.families import FAMILIES, Tile
from fusion.planner.graph import BlockGraph
from fusion.planner.lower import layerwise
from fusion.planner.plan import Plan, plan_block
from fusion.planner.processor import PROCESSORS, Processor
from fusion.planner.waterline import analyze

STAGE_DEPTH = 8
"""Blocks of a stage that the commands for blocks time, in one launch where a kernel can: `fusion.timing`'s, which is
not imported, for it needs PyTorch."""
THIS_PLANNER, ITS_TILE, THE_REPORT = "planner", "planner's tile", "report"
"""Who predicted: this planner, for the tile that was timed or, if the report has none, for the one that it chooses; or
the planner that made the report."""
ONE, STAGE = "one", "stage of {}"
"""Blocks of a launch."""
BLOCK_KEYS = ("block", "channels", "alpha", "hw", "batch", "dtype", "plan", "fused_us", "inductor_us")
WRITERS = "`convfirst`, `mbconv`, `ffn`, `network --by-block` or `compile`"
"""Commands whose reports have blocks that were timed."""

Row = dict[str, object]


def predicted_rows(path: str, meta: Row, rows: Iterable[Row]) -> list[Row]:
    """The rows of a report of a command for blocks, of `network --by-block`, or of `compile`.

    Times are in microseconds for a block. `minimum_us` is that of its program, and `layerwise_us` the sum for one
    kernel after another, which `inductor_us` is to be compared with. `predicted_us` is for a block with a launch of its
    own where `launch` is "one", for one of a stage in one launch otherwise; `error_pct` is its error in percent of
    `measured_us`, `ratio` measured over minimum, `predicted_by` who predicted. What a report does not tell is None.

    Raises ValueError for a report without such rows or a GPU that the planner does not know, and for tiles that are no
    more.
    """
    processor = report_processor(path, meta)
    found: list[Row] = []
    for row in rows:
        if all(key in row for key in BLOCK_KEYS):
            found += _of_block(row, processor)
        elif isinstance(row.get("blocks"), list):
            found += _of_network(row, processor)
        elif isinstance(row.get("report"), Mapping):
            found += _of_compiled(row, processor)
    if not found:
        raise ValueError(f"{path} has no blocks that were timed; give a report that {WRITERS} wrote on a GPU")
    device = {"device": meta.get("device"), "report": path}
    assumed = {"peak_tflops": processor.peak_ops / 1e12, "bandwidth_tbs": processor.bandwidth / 1e12}
    return [{**row, **device, **assumed, "ceilings_source": processor.source} for row in found]


def report_processor(path: str, meta: Row) -> Processor:
    """The GPU of a report, with the ceilings that were measured with it, or those that the planner knows.

    Raises ValueError for a GPU that the planner does not know.
    """
    device = str(meta.get("device"))
    processor = processor_of(device)
    if device == "cpu":
        raise ValueError(f"{path} was written without a GPU: it has no latencies; run its command on a GPU")
    if processor is None:
        raise ValueError(
            f"{path} is of the device {device!r}, of which the planner predicts nothing; it knows "
            f"{', '.join(PROCESSORS)}"
        )
    if meta.get("peak_tflops") is None or meta.get("bandwidth_tbs") is None:
        return processor
    ceilings = meta["peak_tflops"] * 1e12, meta["bandwidth_tbs"] * 1e12
    return processor.with_ceilings(*ceilings, meta.get("ceilings_source") or "measured")


def parse_tile(text: str) -> Tile:
    """A tile from its `repr`. Raises ValueError for anything else."""
    types = {family.tile_type.__name__: family.tile_type for family in FAMILIES}
    try:
        call = ast.parse(text, mode="eval").body
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        return types[call.func.id](*map(ast.literal_eval, call.args), **arguments)
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{text!r} is no tile of this version: {error!r}; measure the block again") from None


def errors_by_kernel(rows: Sequence[Row]) -> dict[str, tuple[int, float, float]]:
    """For each kernel how many predictions there are, the largest of their absolute errors, and the mean, in percent.

    What the planner predicted that made a report is apart.
    """
    errors: dict[str, list[float]] = {}
    for row in rows:
        then = ", as predicted then" if row["predicted_by"] == THE_REPORT else ""
        errors.setdefault(f"{row['kernel']}{then}", []).append(abs(row["error_pct"]))
    return {kernel: (len(found), max(found), sum(found) / len(found)) for kernel, found in sorted(errors.items())}


def _of_block(row: Row, processor: Processor) -> Iterator[Row]:
    """Of a stage of equal blocks: in one launch if a kernel ran them so, and one by one."""
    if row["fused_us"] is None or row["block"] not in BLOCK_TYPES:
        return
    config = BlockConfig(row["block"], row["channels"], row["alpha"], row["hw"])
    graph = config.graph(row["batch"], row["dtype"])
    plan = plan_block(graph, processor, parse_tile(row["plan"]))
    inductor = _inductor(graph, processor, row["inductor_us"])
    name = f"{row['block']} {config.label}"
    apart_us = row.get("apart_us")
    stage = plan.family.stage_us is not None and plan.shape.residual and apart_us is not None
    yield _row(name, plan, THIS_PLANNER, row["fused_us"], STAGE_DEPTH if stage else 1) | inductor
    if stage:
        yield _row(name, plan, THIS_PLANNER, apart_us)


def _of_network(row: Row, processor: Processor) -> Iterator[Row]:
    """Of the parts of a ConvFirstNet: equal blocks that follow each other were timed as a stage."""
    for part in row["blocks"]:
        if not part.get("us") or part["kernel"] in (None, "eager"):
            continue
        graph = _part_graphs(row["model"], row["batch"], row["size"], row["dtype"])[part["name"]]
        plan = plan_block(graph, processor, kernel=part["kernel"])
        stage = part["depth"] if plan.family.stage_us is not None else 1
        yield _row(f"{row['model']} {part['name']}", plan, ITS_TILE, part["us"], stage)


def _of_compiled(row: Row, processor: Processor) -> list[Row]:
    """Of blocks that `torch.compile` found, each kind once."""
    is_known = row["model"] in CONVFIRSTNETS
    graphs = _part_graphs(row["model"], row["batch"], row["size"], row["dtype"]) if is_known else {}
    found: dict[object, Row] = {}
    for block in row["report"].get("blocks") or ():
        if block.get("fused_us") is None or block.get("predicted_us") is None:
            continue
        name, graph = f"{row['model']} {block['name']}", graphs.get(block["name"])
        inductor_us = block["other_us"] if block.get("other") == "Inductor" else None
        if graph is not None:
            plan = plan_block(graph, processor, kernel=block["kernel"])
            new = _row(name, plan, ITS_TILE, block["fused_us"]) | _inductor(graph, processor, inductor_us)
        else:
            new = _as_reported(name, row, block, inductor_us)
        found.setdefault((block["kernel"], block["predicted_us"], block["fused_us"]), new)
    return list(found.values())


def _as_reported(name: str, row: Row, block: Row, inductor_us: float | None) -> Row:
    """Of a block whose sizes the report does not tell."""
    return {
        "block": name,
        "batch": row["batch"],
        "dtype": row["dtype"],
        "kernel": block["kernel"],
        "launch": ONE,
        "plan": None,
        "predicted_by": THE_REPORT,
        **_compared(block["limit_us"], block["predicted_us"], block["fused_us"]),
        **_measured_by_inductor(None, inductor_us),
    }


@cache
def _part_graphs(model: str, batch: int, size: int, dtype: str) -> dict[str, BlockGraph]:
    """By name the parts of a ConvFirstNet, and the stem and the first block as one."""
    from fusion.bench.network_limit import network_parts
    from models.convfirstnet import CONFIGS

    parts = (network_parts(CONFIGS[model], batch, size, dtype, joined=joined) for joined in (False, True))
    return {part.name: part.graph for several in parts for part in several}


def _row(name: str, plan: Plan, predicted_by: str, measured_us: float, stage: int = 1) -> Row:
    predicted_us = plan.predicted_us if stage == 1 else plan.predicted_stage_us(stage)
    return {
        "block": name,
        "batch": plan.shape.batch,
        "dtype": plan.shape.dtype,
        "kernel": plan.kernel,
        "launch": ONE if stage == 1 else STAGE.format(stage),
        "plan": repr(plan.tile),
        "predicted_by": predicted_by,
        **_compared(plan.limit_us, predicted_us, measured_us),
        **_measured_by_inductor(None, None),
    }


def _compared(minimum_us: float, predicted_us: float, measured_us: float) -> Row:
    return {
        "minimum_us": minimum_us,
        "predicted_us": predicted_us,
        "measured_us": measured_us,
        "ratio": measured_us / minimum_us,
        "error_pct": 100 * (predicted_us / measured_us - 1),
    }


def _inductor(graph: BlockGraph, processor: Processor, inductor_us: float | None) -> Row:
    layerwise_us = analyze(layerwise(graph), processor).min_latency * 1e6
    return _measured_by_inductor(layerwise_us, inductor_us)


def _measured_by_inductor(layerwise_us: float | None, inductor_us: float | None) -> Row:
    ratio = None if None in (layerwise_us, inductor_us) else inductor_us / layerwise_us
    return {"layerwise_us": layerwise_us, "inductor_us": inductor_us, "inductor_ratio": ratio}
