"""The tuner's worker process: compiles, checks and times one tile after the other.

`python -m fusion.tuner.worker DEVICE` reads requests from standard input, on each line a JSON object with the arguments
of `answer`, and replies with a JSON object on a line of standard output. It is a process of its own because a tile that
makes the compiler or the GPU fail takes its process with it. `DEVICE` has an index, as in cuda:0.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fusion import kernels
from fusion.kernels import Weights
from fusion.planner.families import Tile, family_named, family_of
from fusion.planner.match import BlockShape, HeadShape, options_of
from fusion.reference import ERROR_FACTOR, relative_error
from fusion.timing import STAGE_DEPTH, graph_us
from fusion.tuner.block_kinds import apply_reference, random_weights

CHECKED_IMAGES = 2


@dataclass
class Bench:
    """Random weights and inputs of a block, and what is measured on them."""

    shape: BlockShape
    device: torch.device

    @cached_property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.shape.dtype)

    @cached_property
    def weights(self) -> list[Weights]:
        generator = torch.Generator().manual_seed(0)
        return [random_weights(self.shape, generator) for _ in range(STAGE_DEPTH)]

    @cached_property
    def x(self) -> Tensor:
        """[N, C, H, W], channels_last."""
        shape = self.shape
        generator = torch.Generator(self.device).manual_seed(0)
        x = torch.randn(
            shape.batch, shape.height, shape.width, shape.in_channels, device=self.device, generator=generator
        )
        return x.to(self.dtype).permute(0, 3, 1, 2)

    @cached_property
    def checked(self) -> Tensor:
        """First and last images, where a kernel's edges are."""
        return torch.cat([self.x[: CHECKED_IMAGES // 2], self.x[-(CHECKED_IMAGES // 2) :]])

    @cached_property
    def expected(self) -> Tensor:
        return apply_reference(self.checked.double(), self.weights[0], self.shape)

    @cached_property
    def eager_error(self) -> float:
        return relative_error(apply_reference(self.checked, self.weights[0], self.shape), self.expected)

    def error(self, tile: Tile) -> float:
        """Relative error of the first and last images.

        Infinite if any element is not written, is not finite, or is another one in a second run: that is a race. Where
        a kernel sums in any order, two runs may differ, but by no more than eager PyTorch's error.
        """
        run = self._run(self.weights[0], tile)
        out, again = self._empty_output(), self._empty_output()
        run(self.x, out)
        run(self.x, again)
        if not (out.isfinite().all() and again.isfinite().all() and self._agree(out, again, tile)):
            return float("inf")
        checked = torch.cat([out[: CHECKED_IMAGES // 2], out[-(CHECKED_IMAGES // 2) :]])
        return relative_error(checked, self.expected)

    def _agree(self, out: Tensor, again: Tensor, tile: Tile) -> bool:
        if family_of(tile).is_repeatable:
            return torch.equal(out, again)
        # Image by image: a race in one must not drown in all.
        difference, size = (t.double().flatten(1).norm(dim=1) for t in (out - again, out))
        return bool((difference <= self.eager_error * size).all())

    def us(self, tile: Tile) -> float:
        """Microseconds a block of a stage of `STAGE_DEPTH` blocks."""
        runs = [self._run(weights, tile) for weights in self.weights]
        outs = [self._empty_output() for _ in range(2)]
        is_chain = outs[0].shape == self.x.shape

        def stage() -> None:
            x = self.x
            for i, run in enumerate(runs):
                run(x, outs[i % 2])
                x = outs[i % 2] if is_chain else self.x

        return graph_us(stage) / STAGE_DEPTH

    def _empty_output(self) -> Tensor:
        # NaN tells elements that the kernel does not write.
        shape = self.shape
        if isinstance(shape, HeadShape):
            return torch.full((shape.batch, shape.out_channels), float("nan"), dtype=self.dtype, device=self.device)
        size = shape.batch, shape.out_height, shape.out_width, shape.out_channels
        return torch.full(size, float("nan"), dtype=self.dtype, device=self.device).permute(0, 3, 1, 2)

    def _run(self, weights: Weights, tile: Tile) -> Callable[[Tensor, Tensor], None]:
        packed, options = kernels.pack(weights, tile, self.dtype, self.device), options_of(self.shape)
        return lambda x, out: kernels.launch(x, packed, out, tile, weights, **options)


def answer(shape: dict, kernel: str, tile: list[int], compile_only: bool, device: str) -> dict:
    """`{"us": ...}`, or `{"failed": reason}` when the result is wrong; `{}` when only a compilation was asked for."""
    family = family_named(kernel)
    config = family.tile_type(*tile)
    if compile_only:
        # The batch is no part of the compiled kernel: one image will do.
        bench_of(family.shape_type(**{**shape, "batch": 1}), device).error(config)
        return {}
    bench = bench_of(family.shape_type(**shape), device)
    error, limit = bench.error(config), ERROR_FACTOR * bench.eager_error
    if not error <= limit:
        return {"failed": f"wrong result: error {error:.1e}, eager PyTorch has {bench.eager_error:.1e}"}
    return {"us": bench.us(config)}


@lru_cache(maxsize=1)
def bench_of(shape: BlockShape, device: str) -> Bench:
    """The latest block, kept for its next tile."""
    return Bench(shape, torch.device(device))


def main(device: str) -> None:
    """Answer requests until standard input ends."""
    torch.cuda.set_device(device)
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            try:
                reply = answer(**request, device=device)
            except Exception as error:
                reason = str(error).strip().splitlines()[:1]
                # A CUDA error stays with its process, and there is no telling what else it spoilt.
                failed = ": ".join([type(error).__name__, *reason])
                print(json.dumps({"failed": failed, "exiting": True}), flush=True)
                sys.exit(1)
            print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
