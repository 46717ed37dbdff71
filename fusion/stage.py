"""A stage of fused blocks: several in one launch where a kernel can, and a micro-batch of images at a time."""

from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fusion import kernels
from fusion.identity import Identified
from fusion.launch_record import InputKind, record_launch
from fusion.mbconv_hopper_weights import PackedMBConvHopper
from fusion.modules import FusedBlock, FusedMBConv, copy_packed, processor_of_device
from fusion.planner.families import MBCONV_HOPPER, MBCONV_WINDOWS_HOPPER
from fusion.planner.micro_batch import micro_batch_images
from fusion.planner.processor import get_processor
from fusion.real_tensors import make_for_all
from fusion.relaunch import Relaunch, RelaunchChain, Relaunches, launch_key

MicroBatch = int | Literal["auto"] | None


class FusedStage(Identified):
    """Consecutive fused blocks (section 5.5.2): `[N, C, H, W] -> [N, K, H, W]`, or what the last one gives.

    `micro_batch` is the number of images that run through all blocks before the next ones, so that activations and
    weights stay in the L2 cache; None stands for the whole batch, and with "auto" the planner chooses for every shape
    of the input. The micro-batches' outputs are joined at the cost of a copy. Blocks are planned for the size of a
    micro-batch. Programs that torch.export makes always run the whole batch.

    MBConv blocks of equal sizes with residuals that follow each other, and run on the Hopper kernel, run in one launch
    with `one_launch`: a processor takes an image through all of them, and only the first one's input and the last one's
    output are in global memory. The result is the same to the bit, and the stage keeps a copy of their weights. A block
    with forward hooks runs alone.

    Raises ValueError for another `micro_batch` or no blocks, TypeError for blocks that are not fused, and (in
    `forward`) what the blocks raise.
    """

    def __init__(self, blocks: Iterable[FusedBlock], micro_batch: MicroBatch = None, one_launch: bool = True):
        super().__init__()
        blocks = list(blocks)
        if not blocks:
            raise ValueError("a stage needs at least one block")
        for block in blocks:
            if not isinstance(block, FusedBlock):
                raise TypeError(f"a stage takes fused blocks, got a {type(block).__name__}; call its fused() first")
        check_micro_batch(micro_batch)
        self.blocks = nn.ModuleList(blocks)
        self.micro_batch = micro_batch
        self.one_launch = one_launch
        self._stacked: dict[tuple, PackedMBConvHopper] = {}
        self._chosen: dict[tuple, int] = {}
        self._relaunches = Relaunches()

    @torch.compiler.assume_constant_result
    def images(self, x: Tensor) -> int:
        """Images of a micro-batch for inputs like `x`."""
        kind = InputKind.of(x)
        batch = max(kind.shape[0], 1)
        if self.micro_batch is None:
            return batch
        if self.micro_batch != "auto":
            return min(self.micro_batch, batch)
        key = self.blocks[0].adopted, kind
        if key not in self._chosen:
            self._chosen[key] = self._choose(batch, x)
        return self._chosen[key]

    def _choose(self, batch: int, x: Tensor) -> int:
        graphs, (channels, height, width) = [], x.shape[1:]
        for block in self.blocks:
            graph = block.graph(batch, height, width, channels, x.dtype)
            (out,) = graph.outputs
            if out.layout != "NHWC":  # a head, which pools
                break
            graphs.append(graph)
            height, width, channels = out["H"], out["W"], out["C"]
        if not graphs:
            return batch
        whole_images = self.blocks[0].plan(x).kernel in (MBCONV_HOPPER.name, MBCONV_WINDOWS_HOPPER.name)
        return micro_batch_images(graphs, get_processor(processor_of_device(x.device)), whole_images)

    def forward(self, x: Tensor) -> Tensor:
        self.guard_identity()
        if self._takes_whole_batch():
            return self._run(x)
        self._check(x)
        outs = [self._run(part) for part in x.split(self.images(x))]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def extra_repr(self) -> str:
        return f"micro_batch={self.micro_batch!r}, one_launch={self.one_launch}"

    @torch.compiler.assume_constant_result
    def _takes_whole_batch(self) -> bool:
        """An exported program does: it cannot have more parts for a larger batch.

        Asked as a constant, for within torch.compile torch 2.11 always says that it is exporting.
        """
        return self.micro_batch is None or torch.compiler.is_exporting()

    @torch.compiler.assume_constant_result
    def _together(self, first: int, x: Tensor) -> int:
        """How many blocks from `first` on run in one launch for an input like `x`: one, or more."""
        block = self.blocks[first]
        batch, *_ = InputKind.of(x).shape
        if not (self.one_launch and _can_join(block) and block.residual) or batch == 0:
            return 1
        plan = block.plan(x)
        if plan.kernel != MBCONV_HOPPER.name:
            return 1
        count = 1
        for other in self.blocks[first + 1 :]:
            if not (_can_join(other) and other.sizes == block.sizes and other.plan(x).tile == plan.tile):
                break
            count += 1
        return count

    @property
    def layouts(self) -> dict[tuple, PackedMBConvHopper]:
        """Weights of blocks that run in one launch, by the first's place, their number, device, dtype and layout."""
        return self._stacked

    def repack(self) -> None:
        """Pack the blocks' weights again, into the tensors that hold them, after others were put in their place."""
        for block in self.blocks:
            block.repack()
        for (first, count, device, dtype, *layout), packed in self._stacked.items():
            blocks = self.blocks[first : first + count]
            tiles = {kernels.packing(plan.tile): plan.tile for _, plan in blocks[0].plans}
            weights = [block.weights for block in blocks]
            copy_packed(packed, kernels.pack_stage(weights, tiles[tuple(layout)], dtype, device))

    def _run(self, x: Tensor) -> Tensor:
        """All blocks on a micro-batch; from the second one of a kind on, by the launches that the first one came to."""
        key = self._key(x)
        relaunches = None if key is None else self._relaunches.get(key)
        if relaunches is not None:
            return relaunches(x)
        self._check(x)
        first, chain = 0, []
        while first < len(self.blocks):
            count = self._together(first, x)
            run = self.blocks[first] if count == 1 else partial(self._run_together, first, count)
            out = run(x)
            if key is not None:
                chain.append(self._relaunch(first, count, x) or run)
            x = out
            first += count
        if key is not None:
            self._relaunches.keep(key, RelaunchChain(chain))
        return x

    def _check(self, x: Tensor) -> None:
        channels = self.blocks[0].weights.in_channels
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"FusedStage: the input must be [N, {channels}, H, W], got {list(x.shape)}")

    def _run_together(self, first: int, count: int, x: Tensor) -> Tensor:
        kernel, tile, packed = self._layout(first, count, x)
        run = partial(self.blocks[first].run, x, kernel, tile, packed)
        key = self._key(x, first, count)
        return run() if key is None else self._relaunches.record(key, x, packed, run)

    def _relaunch(self, first: int, count: int, x: Tensor) -> Relaunch | None:
        if count == 1:
            return self.blocks[first].relaunch(x)
        key = self._key(x, first, count)
        return None if key is None else self._relaunches.get(key)

    def _key(self, x: Tensor, *place: int) -> tuple | None:
        """What the launches of consecutive blocks depend on; None if each is to be called."""
        key = launch_key(x)
        if key is None or any(map(_has_hooks, self.blocks)):
            return None
        return *place, sum([block.adopted for block in self.blocks]), *key

    @torch.compiler.assume_constant_result
    def _layout(self, first: int, count: int, x: Tensor) -> tuple[str, list[int], tuple[Tensor, ...]]:
        """Kernel, tile and weights of blocks that run in one launch (see `FusedBlock`)."""
        blocks = self.blocks[first : first + count]
        plan = blocks[0].plan(x)
        record_launch(blocks, plan, x)
        key = (first, count, x.device, x.dtype, *kernels.packing(plan.tile))
        if key not in self._stacked:
            weights, tile, dtype, device = [block.weights for block in blocks], plan.tile, x.dtype, x.device
            self._stacked[key] = make_for_all(lambda: kernels.pack_stage(weights, tile, dtype, device), device)
        return plan.kernel, plan.tile.to_ints(), self._stacked[key].tensors()


def check_micro_batch(micro_batch: MicroBatch) -> None:
    """Raises ValueError for what is neither a number of images, nor "auto", nor None."""
    is_count = isinstance(micro_batch, int) and not isinstance(micro_batch, bool) and micro_batch > 0
    if not (micro_batch is None or micro_batch == "auto" or is_count):
        raise ValueError(f"micro_batch={micro_batch!r} is not supported, use a number of images, 'auto' or None")


def _can_join(block: FusedBlock) -> bool:
    return isinstance(block, FusedMBConv) and not _has_hooks(block)


def _has_hooks(block: FusedBlock) -> bool:
    return bool(block._forward_hooks or block._forward_pre_hooks)
