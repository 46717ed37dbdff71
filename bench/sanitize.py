"""Run the Hopper kernels on small blocks, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck --kernel-name kns=hopper python bench/sanitize.py
    compute-sanitizer --tool racecheck --kernel-name kns=hopper python bench/sanitize.py

One tile of each way to run: one and two partitions, weights that stay and weights that are streamed, every width of a
slab, images and bands side by side, hidden channels in shared memory and in a workspace, sweeps in pairs and one that
is divided, one window and several. Sizes leave tiles partly empty. Prints the error against float64 of each.
"""

import torch

from fusion import kernels
from fusion.bench.blocks import parse_block
from fusion.bench.random_blocks import random_block
from fusion.planner.families import Tile, family_of
from fusion.planner.ffn_tile import FfnTile
from fusion.planner.hopper_tile import HopperTile
from fusion.planner.mbconv_hopper_tile import MBConvHopperTile
from fusion.planner.mbconv_windows_hopper_tile import MBConvWindowsHopperTile
from fusion.reference import relative_error

RUNS = (
    ("24,2,9", HopperTile(64, 16, 2, 1, 2, 32, 0)),
    ("16,2,70", HopperTile(128, 16, 3, 1, 2, 16, 0)),
    ("64,2,13", HopperTile(64, 64, 2, 2, 1, 64, 0)),
    ("48,3,20", HopperTile(64, 32, 3, 2, 1, 16, 3)),
    ("ffn:24,4,9", FfnTile(2, 64, 2, 2, 2, 1)),
    ("ffn:64,8,9", FfnTile(2, 64, 2, 3, 3, 1)),
    ("mbconv:24,4,7", MBConvHopperTile(2, 4, 64, 4)),
    ("mbconv:40,4,8", MBConvHopperTile(1, 4, 32, 2)),
    ("mbconv:72,4,13", MBConvHopperTile(1, 1, 32, 3)),
    ("mbconv:144,2,14", MBConvHopperTile(1, 2, 64, 2)),
    ("mbconv:64,4,8", MBConvHopperTile(2, 4, 32, 3)),
    ("mbconv:48,4,16", MBConvHopperTile(1, 4, 32, 3)),
    ("mbconv:24,4,19", MBConvWindowsHopperTile(2, 8, 32, 3)),
    ("mbconv:72,4,36", MBConvWindowsHopperTile(4, 16, 64, 2)),
)
BATCH = 3


def check(block: str, tile: Tile) -> float:
    """Error of one launch against float64."""
    config = parse_block(block, types=("convfirst", "ffn", "mbconv"))
    module = random_block(config, seed=0)
    twin = module.fused()
    packed = kernels.pack(twin.weights, tile, torch.float16, "cuda")
    x = torch.randn(BATCH, config.channels, config.hw, config.hw, generator=torch.Generator().manual_seed(0))
    x = x.to(torch.float16, memory_format=torch.channels_last)
    expected = module.double()(x.double())
    out = torch.full_like(x, float("nan"), device="cuda")
    kernels.launch(x.cuda(), packed, out, tile, twin.weights, **twin.options)
    return relative_error(out.cpu(), expected)


def main() -> None:
    with torch.no_grad():
        for block, tile in RUNS:
            print(f"{family_of(tile).name} {block} {tile!r}: error {check(block, tile):.1e}", flush=True)


if __name__ == "__main__":
    main()
