"""How fast a ConvFirstNet can be: its parts as graphs of the planner, each as one kernel.

The parts are the stem, every block, the head (1x1 convolution, activation and global average pool) and the classifier.
A part takes at least max(OPs / peak, bytes / bandwidth), where its input, weights and output are moved once and nothing
between its layers is; the network takes the sum. So the stem's output is counted, the map that the head pools is not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from fusion.planner import blocks
from fusion.planner.graph import BlockGraph, OpKind, Role, Tensor, make_op
from fusion.planner.layer_kind import LayerKind, layer_kind
from fusion.planner.processor import Processor
from fusion.planner.waterline import KernelBound, kernel_bound
from models.convfirstnet import STAGE_BLOCKS, ConvFirstNetConfig
from models.mbconv import MBConv

COUNTED_OPS = (OpKind.CONV, OpKind.LINEAR)


@dataclass(frozen=True)
class Part:
    """A part of a network that one kernel runs. `name` is that of its module, such as "stages.3.1"."""

    name: str
    kind: str
    stride: int
    graph: BlockGraph

    @property
    def layer_kind(self) -> LayerKind:
        """What kind of layer this is, or a fused block."""
        return layer_kind(self.graph.ops)

    @property
    def ops_count(self) -> int:
        """OPs of all its operations."""
        return self.graph.ops_count

    @property
    def bytes(self) -> int:
        """What one kernel moves: inputs, weights and outputs."""
        tensors = (*self.graph.inputs, *self.graph.weights(), *self.graph.outputs)
        return self.graph.element_size * sum(tensor.size for tensor in tensors)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """`[N, C, H, W]` of its input, or `[N, C]`."""
        (x,) = self.graph.inputs
        return (x["N"], x["C"], x["H"], x["W"]) if x.layout == "NHWC" else (x["N"], x["C"])

    @property
    def out_channels(self) -> int:
        return self.graph.outputs[0]["C"]

    def bound(self, processor: str | Processor) -> KernelBound:
        """The least time that it takes on a processor (section 4)."""
        return kernel_bound(self, processor)


def network_parts(
    config: ConvFirstNetConfig,
    batch: int,
    size: int,
    dtype: str = "float16",
    num_classes: int = 1000,
    joined: bool = False,
) -> list[Part]:
    """The parts of a ConvFirstNet in execution order, for `batch` images of `size` x `size` pixels in colour.

    If `joined`, the stem and the first block are one part.

    Raises ValueError for a batch or size that is not positive, or a dtype that the planner does not know.
    """
    stem = blocks.conv(
        batch, size, size, 3, config.stem_channels, kernel_size=3, stride=2, activation="relu", dtype=dtype
    )
    parts = [Part("stem", "stem", 2, stem)]
    x = stem.outputs[0]
    for stage, (out_channels, depth, expansion) in enumerate(
        zip(config.stage_channels, config.depths, config.expansions, strict=True)
    ):
        kind = "mbconv" if STAGE_BLOCKS[stage] is MBConv else "convfirst"
        constructor = blocks.mbconv if kind == "mbconv" else blocks.convfirst
        for position in range(depth):
            stride = 2 if stage and not position else 1
            graph = constructor(
                batch,
                x["H"],
                x["W"],
                x["C"],
                expansion,
                out_channels=out_channels,
                stride=stride,
                group_width=config.group_width,
                dtype=dtype,
            )
            parts.append(Part(f"stages.{stage}.{position}", kind, stride, graph))
            x = graph.outputs[0]
    if joined:
        graph = blocks.stem_convfirst(
            batch,
            size,
            size,
            3,
            config.stem_channels,
            config.expansions[0],
            out_channels=config.stage_channels[0],
            group_width=config.group_width,
            dtype=dtype,
        )
        parts[:2] = [Part("stem, stages.0.0", "stem+convfirst", 2, graph)]
    head = blocks.head(batch, x["H"], x["W"], x["C"], config.head_channels, dtype=dtype)
    return [*parts, Part("head", "head", 1, head), Part("classifier", "classifier", 1, _classifier(head, num_classes))]


def network_limit_ms(parts: Iterable[Part], processor: str | Processor) -> float:
    """Sum of the parts' minimum latencies in milliseconds."""
    return 1e3 * sum(part.bound(processor).min_latency for part in parts)


def network_ops(parts: Iterable[Part]) -> int:
    """OPs of convolutions and linear layers alone, which is how the paper counts networks: 2 x multiply-accumulates."""
    return sum(op.ops_count for part in parts for op in part.graph.ops if op.kind in COUNTED_OPS)


def runs_of_equal_parts(parts: Iterable[Part]) -> list[Sequence[Part]]:
    """Parts that follow each other and are the same but for their weights: the rows of the paper's tables 5 to 8."""
    return [tuple(run) for _, run in groupby(parts, key=lambda part: part.graph)]


def _classifier(head: BlockGraph, num_classes: int) -> BlockGraph:
    x = Tensor("x", head.outputs[0].dims)
    linear = make_op(OpKind.LINEAR, "linear", (x,), (Tensor("weight", {"K": num_classes, "C": x["C"]}, Role.WEIGHT),))
    return BlockGraph("classifier", (linear,), (x,), (linear.output,), head.dtype)
