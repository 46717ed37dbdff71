"""Launch the one-kernel MBConv operator thousands of times at random shapes while another stream is busy.

    python bench/soak.py --launches 10000

Each shape's result is computed once alone and checked against float64. Every later launch of it, on either of two
streams, must give the same bits. Prints how many differed, and fails if any did.
"""

import argparse
import random
import sys
from contextlib import suppress

import torch
from torch import Tensor

from fusion.bench.blocks import BlockConfig
from fusion.bench.random_blocks import random_block
from fusion.modules import FusedMBConv
from fusion.planner.families import MBCONV_HOPPER
from fusion.planner.plan import PlanError, plan_block
from fusion.progress import progress_bar
from fusion.reference import ERROR_FACTOR, relative_error

SHAPES = 40
CHECKED_EVERY = 100
"""Launches between two comparisons, which wait for both streams."""


def random_case(draw: random.Random) -> tuple[FusedMBConv, Tensor, Tensor]:
    """A block, an input and the block's output for it, checked against float64.

    Raises PlanError if the block has no tile, and RuntimeError for a wrong result.
    """
    config = BlockConfig("mbconv", 8 * draw.randint(1, 24), draw.randint(1, 4), 16)
    height, width, batch = draw.randint(1, 16), draw.randint(1, 16), draw.randint(1, 300)
    block = random_block(config, seed=draw.randrange(2**31))
    twin = block.fused(lambda graph, processor: plan_block(graph, processor, kernel=MBCONV_HOPPER.name))
    x = torch.randn(batch, config.channels, height, width, device="cuda", dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last)
    expected = block.to("cuda", torch.float64)(x.double())
    eager_error = relative_error(block.half()(x), expected)
    out = twin(x)
    error = relative_error(out, expected)
    if not error <= ERROR_FACTOR * eager_error:
        raise RuntimeError(f"{config} at {list(x.shape)}: error {error:.1e}, eager PyTorch has {eager_error:.1e}")
    return twin, x, out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=10000, metavar="N", help="default: 10000")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    torch.manual_seed(args.seed)
    streams = [torch.cuda.Stream() for _ in range(2)]
    noise = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    wrong = 0
    with torch.inference_mode(), progress_bar("launches", args.launches) as bar:
        cases = []
        while len(cases) < SHAPES:
            with suppress(PlanError):  # too many channels for so many pixels
                cases.append(random_case(draw))
        torch.cuda.synchronize()
        for first in range(0, args.launches, CHECKED_EVERY):
            results = []
            for _ in range(min(CHECKED_EVERY, args.launches - first)):
                twin, x, expected = draw.choice(cases)
                with torch.cuda.stream(draw.choice(streams)):
                    if draw.random() < 0.1:
                        torch.mm(noise, noise)  # keeps the processors busy between launches
                    results.append((twin(x), expected))
                bar.advance()
            torch.cuda.synchronize()
            wrong += sum(not torch.equal(out, expected) for out, expected in results)
    print(f"{args.launches} launches of {SHAPES} shapes on two streams: {wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
