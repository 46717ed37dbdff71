"""`python -m fusion.bench convfirst`: ConvFirst blocks fused into one kernel, next to eager PyTorch and Inductor."""

from fusion.bench.block_command import BlockCommand
from fusion.bench.blocks import TABLE1

DESCRIPTION = """\
Fuse ConvFirst blocks (grouped 3x3 convolution, expand, ReLU, project, residual) into one kernel each, check every one
against float64 and compare its speed with eager PyTorch, Inductor and the block's own limit.

On a GPU: microseconds per block of a stage of eight blocks with distinct weights in a CUDA graph, channels_last, batch
norm folded by Inductor too. The limit is max(OPs / peak, DRAM bytes / bandwidth) with both ceilings measured in the
same run. Without a GPU: small images through Triton's interpreter, nothing timed.
"""

EXAMPLES = """\
examples:
  python -m fusion.bench convfirst --json convfirst.json --plot convfirst.png
  python -m fusion.bench convfirst --block 24,3,128 --block 72,6,32 --dtype bfloat16
  python -m fusion.bench convfirst --no-tune
"""

COMMAND = BlockCommand(
    block="convfirst",
    title="ConvFirst",
    help="fuse, check and time ConvFirst blocks (the paper's table 1)",
    description=DESCRIPTION,
    examples=EXAMPLES,
    blocks=TABLE1,
    blocks_help="the eight of table 1",
    checked_on_cpu="the portable kernel in Triton's interpreter",
)
