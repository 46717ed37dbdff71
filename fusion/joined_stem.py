"""A stem and the ConvFirst block after it, which may run as one kernel."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from fusion.edge_modules import FusedStem
from fusion.identity import Identified
from fusion.launch_record import InputKind
from fusion.modules import FusedConvFirst, processor_of_device
from fusion.planner.families import STEM_CONVFIRST_HOPPER
from fusion.planner.graph import BlockGraph
from fusion.planner.plan import Plan, PlanError, block_shape
from fusion.planner.processor import get_processor
from fusion.stem_convfirst_module import FusedStemConvFirst
from fusion.stem_convfirst_weights import StemConvFirstWeights


class JoinedStem(Identified):
    """The twins of a stem and of the block after it, and that of both together: `[N, C, H, W] -> [N, K, H', W']`.

    So the stem's output, a network's largest tensor, need not reach memory. For every shape of the input the faster
    way is taken, by the plans' predictions, or by their measurements if all of them are measured; where no kernel runs
    both, one after the other. `fusion.fuse` puts it in the block's place, and an identity in that of the stem.

    Raises (in `forward`) what the twins raise.
    """

    DERIVED = ("_decided",)
    """Attributes that follow from the others."""

    _decided: Mapping[InputKind, bool] = MappingProxyType({})

    def __init__(self, stem: FusedStem, block: FusedConvFirst, together: FusedStemConvFirst):
        super().__init__()
        self.stem = stem
        self.block = block
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        self.guard_identity()
        return self.together(x) if self.runs_together(x) else self.block(self.stem(x))

    @torch.compiler.assume_constant_result
    def runs_together(self, x: Tensor | InputKind) -> bool:
        """Whether inputs like `x` take one kernel."""
        kind = InputKind.of(x) if isinstance(x, Tensor) else x
        if kind not in self._decided:
            faster = self._has_kernel(kind) and _is_faster(
                self.together.plan(kind), (self.stem.plan(kind), self.block.plan(self.between(kind)))
            )
            self._decided = {**self._decided, kind: faster}
        return self._decided[kind]

    def _has_kernel(self, x: InputKind) -> bool:
        try:
            shape = block_shape(self.together_graph(x))
        except PlanError:
            return False
        return STEM_CONVFIRST_HOPPER.why_none(shape, get_processor(processor_of_device(x.device))) is None

    def repack(self) -> None:
        """Pack all weights again, into the tensors that hold them, after others were put in place of the twins'."""
        self.together.weights = StemConvFirstWeights.join(self.stem.weights, self.block.weights)
        for twin in (self.stem, self.block, self.together):
            twin.repack()

    def between(self, x: InputKind) -> InputKind:
        """What the stem makes of inputs like `x`."""
        batch, _, height, width = x.shape
        shape = batch, self.stem.weights.out_channels, (height + 1) // 2, (width + 1) // 2
        return InputKind(shape, x.dtype, x.device)

    def together_graph(self, x: InputKind) -> BlockGraph:
        """Both as a graph, for inputs like `x`."""
        batch, channels, height, width = x.shape
        return self.together.graph(max(batch, 1), height, width, channels, x.dtype)


def _is_faster(plan: Plan, others: Sequence[Plan]) -> bool:
    plans = (plan, *others)
    times = [each.measured_us for each in plans]
    if None in times:
        times = [each.predicted_us for each in plans]
    return times[0] < sum(times[1:])
