"""`python -m fusion.bench mbconv`: MBConv blocks fused, next to eager PyTorch and Inductor."""

from fusion.bench.block_command import BlockCommand
from fusion.bench.blocks import TABLE2

DESCRIPTION = """\
Fuse MBConv blocks with squeeze-and-excitation (expand, SiLU, grouped 3x3 convolution, SiLU, pool, gate, project,
residual), check every one against float64 and compare its speed with eager PyTorch, Inductor and the block's own limit.

On a GPU: microseconds per block of a stage of eight blocks with distinct weights in a CUDA graph, channels_last, batch
norm folded by Inductor too. The limit is the sum of max(OPs / peak, DRAM bytes / bandwidth) of the program's kernels,
with both ceilings measured in the same run. Without a GPU: small images through Triton's interpreter, nothing timed.
"""

EXAMPLES = """\
examples:
  python -m fusion.bench mbconv --json mbconv.json --plot mbconv.png
  python -m fusion.bench mbconv --block 128,4,14 --block 72,6,32 --dtype bfloat16
  python -m fusion.bench mbconv --no-tune --micro-batch auto
"""

COMMAND = BlockCommand(
    block="mbconv",
    title="MBConv",
    help="fuse, check and time MBConv blocks (the paper's table 2)",
    description=DESCRIPTION,
    examples=EXAMPLES,
    blocks=TABLE2,
    blocks_help="the ten of table 2",
    checked_on_cpu="the portable kernels in Triton's interpreter",
    figure=14,
    has_micro_batches=True,
)
