"""A chain of layers in which consecutive fused blocks run as stages."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import nn

from fusion.modules import FusedBlock
from fusion.stage import FusedStage, MicroBatch


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` some of whose layers are fused blocks; those that follow each other run as a `FusedStage`.

    A stage may run several blocks in one launch, or, with `micro_batch`, few images at a time (see `FusedStage`). The
    layers keep their names and places, so that the chain can be indexed, sliced and iterated over as before; a layer
    that is called by itself computes its own output.
    """

    DERIVED = ("_parts", "_grouped")
    """Attributes that follow from the others."""

    # Lists, for the layers are registered under their own names only.
    _parts: Sequence[nn.Module] = ()
    _grouped: Sequence[nn.Module] = ()

    def __init__(self, layers: Mapping[str, nn.Module], micro_batch: MicroBatch = None):
        super().__init__(OrderedDict(layers))
        self.micro_batch = micro_batch
        self.group()

    @property
    def parts(self) -> Sequence[nn.Module]:
        """What runs one after the other: stages, and layers that are in none."""
        if self._grouped != list(self):
            self.group()
        return self._parts

    def forward(self, input):
        for part in self.parts:
            input = part(input)
        return input

    def __getitem__(self, index: int | slice) -> nn.Module:
        if isinstance(index, slice):
            return FusedSequential(dict(list(self._modules.items())[index]), self.micro_batch)
        return super().__getitem__(index)

    def extra_repr(self) -> str:
        return "" if self.micro_batch is None else f"micro_batch={self.micro_batch!r}"

    def repack(self) -> None:
        """Pack the weights of all fused blocks again, into the tensors that hold them, after others were put in their
        place."""
        for part in self.parts:
            if hasattr(part, "repack"):
                part.repack()

    def group(self) -> None:
        """Find the stages, which happens by itself, but cannot within torch.compile."""
        parts: list[nn.Module] = []
        run: list[FusedBlock] = []
        for layer in [*self, None]:
            if isinstance(layer, FusedBlock):
                run.append(layer)
                continue
            if run:
                parts.append(
                    run[0] if len(run) == 1 and self.micro_batch is None else FusedStage(run, self.micro_batch)
                )
                run = []
            if layer is not None:
                parts.append(layer)
        self._parts, self._grouped = parts, list(self)
