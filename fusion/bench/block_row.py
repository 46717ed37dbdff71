"""One row of a block benchmark: the JSON contract of `fusion.bench`, in one place."""

from fusion.bench.blocks import BlockConfig
from fusion.planner.plan import Plan

Row = dict[str, object]


def block_row(
    config: BlockConfig,
    plan: Plan,
    error: float,
    eager_error: float,
    *,
    eager_us: float | None = None,
    inductor_us: float | None = None,
    fused_us: float | None = None,
    apart_us: float | None = None,
    stage_error: float | None = None,
    eager_stage_error: float | None = None,
    micro_batched_us: float | None = None,
) -> Row:
    """A block's row. Times are in microseconds; what follows from one that was not taken is None.

    `fused_us` is that of a stage's blocks, in one launch where a kernel can, `apart_us` then with one for each, and
    `micro_batched_us` when a stage runs in micro-batches. OPs, bytes and the limit are those of the plan's program, for
    one block. Errors are relative to float64, of a block and of the stage.
    """
    tflops = None if fused_us is None else plan.ops_count / fused_us / 1e6
    return {
        "block": config.block,
        "channels": config.channels,
        "alpha": config.alpha,
        "hw": config.hw,
        "batch": plan.shape.batch,
        "dtype": plan.shape.dtype,
        "eager_us": eager_us,
        "inductor_us": inductor_us,
        "fused_us": fused_us,
        "apart_us": apart_us,
        "micro_batched_us": micro_batched_us,
        "speedup": None if None in (inductor_us, fused_us) else inductor_us / fused_us,
        "tflops": tflops,
        "pct_peak": None if tflops is None else 100 * tflops * 1e12 / plan.processor.peak_ops,
        "limit_us": plan.limit_us,
        "pct_limit": None if fused_us is None else 100 * plan.limit_us / fused_us,
        "error": error,
        "eager_error": eager_error,
        "stage_error": stage_error,
        "eager_stage_error": eager_stage_error,
        "kernel": plan.kernel,
        "plan": repr(plan.tile),
        "plan_why": plan.why,
        "predicted_us": plan.predicted_us,
        "ops": plan.ops_count,
        "bytes": plan.bytes,
    }
