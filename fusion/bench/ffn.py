"""`python -m fusion.bench ffn`: FFN blocks fused into one kernel, next to eager PyTorch and Inductor."""

from fusion.bench.block_command import BlockCommand
from fusion.bench.blocks import FFN_BLOCKS

DESCRIPTION = """\
Fuse FFN blocks (expand, ReLU, project, residual) into one kernel each, check every one against float64 and compare its
speed with eager PyTorch, Inductor and the block's own limit. The kernel is for GPUs of compute capability 9.0 only.

On a GPU: microseconds per block of a stage of eight blocks with distinct weights in a CUDA graph, channels_last, batch
norm folded by Inductor too. The limit is max(OPs / peak, DRAM bytes / bandwidth) with both ceilings measured in the
same run. Without a GPU: packed weights through the operator's reference on small images, nothing timed.
"""

EXAMPLES = """\
examples:
  python -m fusion.bench ffn --json ffn.json --plot ffn.png
  python -m fusion.bench ffn --block 32,6,64 --block 72,4,64 --dtype bfloat16
"""

COMMAND = BlockCommand(
    block="ffn",
    title="FFN",
    help="fuse, check and time FFN blocks",
    description=DESCRIPTION,
    examples=EXAMPLES,
    blocks=FFN_BLOCKS,
    blocks_help=", ".join(f"{config.channels},{config.alpha},{config.hw}" for config in FFN_BLOCKS),
    checked_on_cpu="packed weights through the operator's reference (not the kernel)",
)
