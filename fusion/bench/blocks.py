"""The blocks that the paper measures and analyses, and what it measured (bench/paper has the same as CSV)."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from fusion.planner import blocks
from fusion.planner.graph import BlockGraph

BLOCK_TYPES = {"convfirst": blocks.convfirst, "ffn": blocks.ffn, "mbconv": blocks.mbconv}


class BlockSyntaxError(argparse.ArgumentTypeError, ValueError):
    """A block was written in another form than `parse_block` reads."""


@dataclass(frozen=True)
class BlockConfig:
    """A block of stride 1: its type, input channels C, expansion ratio alpha, and height = width in pixels."""

    block: str
    channels: int
    alpha: int
    hw: int

    @property
    def label(self) -> str:
        """C, alpha and image size, short enough for an axis."""
        return f"{self.channels}, α {self.alpha}, {self.hw}²"

    def graph(self, batch: int, dtype: str = "float16") -> BlockGraph:
        """The block as a graph. Raises ValueError for sizes that do not fit together."""
        constructor = BLOCK_TYPES[self.block]
        return constructor(batch, self.hw, self.hw, self.channels, self.alpha, dtype=dtype)

    def __str__(self) -> str:
        return f"{self.block}:{self.channels},{self.alpha},{self.hw}"


@dataclass(frozen=True)
class PaperResult:
    """The paper's measurement of a block at batch 128 in fp16 on an RTX A5000 of 76.7 TFLOP/s and 480 GB/s.

    `speedup` is Inductor's time over that of the fused kernel.
    """

    inductor_tflops: float
    inductor_pct_peak: float
    fused_tflops: float
    fused_pct_peak: float
    speedup: float


PAPER_TABLE1: dict[BlockConfig, PaperResult] = {
    BlockConfig("convfirst", 16, 3, 128): PaperResult(1.9, 2.5, 26.9, 35.1, 14.2),
    BlockConfig("convfirst", 32, 3, 128): PaperResult(3.6, 4.7, 35.7, 46.6, 9.9),
    BlockConfig("convfirst", 32, 6, 64): PaperResult(3.9, 5.1, 51.3, 66.9, 13.2),
    BlockConfig("convfirst", 48, 6, 64): PaperResult(6.4, 8.4, 54.9, 71.6, 8.6),
    BlockConfig("convfirst", 64, 6, 64): PaperResult(8.3, 10.9, 58.4, 76.2, 7.0),
    BlockConfig("convfirst", 48, 6, 32): PaperResult(6.1, 8.0, 51.3, 67.0, 8.4),
    BlockConfig("convfirst", 64, 6, 32): PaperResult(8.3, 10.8, 56.7, 74.0, 6.8),
    BlockConfig("convfirst", 96, 6, 32): PaperResult(11.8, 15.4, 52.6, 68.7, 4.5),
}

PAPER_TABLE2: dict[BlockConfig, PaperResult] = {
    BlockConfig("mbconv", 128, 4, 16): PaperResult(7.7, 10.0, 35.4, 46.2, 4.6),
    BlockConfig("mbconv", 144, 4, 16): PaperResult(8.1, 10.6, 34.0, 44.4, 4.2),
    BlockConfig("mbconv", 160, 4, 16): PaperResult(8.9, 11.6, 32.1, 41.9, 3.6),
    BlockConfig("mbconv", 192, 4, 16): PaperResult(10.3, 13.5, 34.1, 44.4, 3.3),
    BlockConfig("mbconv", 256, 4, 16): PaperResult(12.9, 16.8, 39.1, 51.0, 3.0),
    BlockConfig("mbconv", 128, 4, 8): PaperResult(6.4, 8.4, 34.5, 45.0, 5.4),
    BlockConfig("mbconv", 144, 4, 8): PaperResult(6.7, 8.8, 25.0, 32.5, 3.7),
    BlockConfig("mbconv", 160, 4, 8): PaperResult(7.5, 9.8, 24.0, 31.3, 3.2),
    BlockConfig("mbconv", 192, 4, 8): PaperResult(8.9, 11.6, 33.1, 43.1, 3.7),
    BlockConfig("mbconv", 256, 4, 8): PaperResult(10.4, 13.5, 39.4, 51.4, 3.8),
}

TABLE1: tuple[BlockConfig, ...] = tuple(PAPER_TABLE1)
"""The ConvFirst blocks that the paper times (table 1, figure 13)."""

FIGURE8: tuple[BlockConfig, ...] = (TABLE1[0], BlockConfig("convfirst", 24, 3, 128), *TABLE1[1:])
"""The ConvFirst blocks of the paper's waterline analysis."""

FFN_BLOCKS: tuple[BlockConfig, ...] = (
    BlockConfig("ffn", 64, 4, 64),
    BlockConfig("ffn", 64, 6, 64),
    BlockConfig("ffn", 128, 4, 32),
    BlockConfig("ffn", 256, 4, 16),
)
"""FFN blocks, not the paper's: from resident weights to more weights than a processor holds."""

TABLE2: tuple[BlockConfig, ...] = tuple(PAPER_TABLE2)
"""The MBConv blocks, with squeeze-and-excitation, that the paper times (table 2, figure 14)."""

FIGURE12: tuple[BlockConfig, ...] = TABLE2
"""The MBConv blocks of the paper's waterline analysis."""


def parse_block(text: str, types: Sequence[str] = ("convfirst",)) -> BlockConfig:
    """Read a block written `[TYPE:]C,ALPHA,HW`, where TYPE is one of `types` and defaults to the first.

    Raises BlockSyntaxError, a ValueError whose message argparse shows when this is the `type` of an argument.
    """
    name, colon, sizes = text.rpartition(":")
    name = name.strip() if colon else types[0]
    if name not in types:
        raise BlockSyntaxError(f"block {text!r} is of type {name!r}; supported here: {', '.join(types)}")
    numbers = [size.strip() for size in sizes.split(",")]
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
        raise BlockSyntaxError(
            f"block {text!r} is not C,ALPHA,HW: give channels, expansion ratio and height = width as three positive "
            "integers, for example 64,6,32"
        )
    return BlockConfig(name, *map(int, numbers))
