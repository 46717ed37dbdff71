"""Autotuner: times valid tiles of blocks on the GPU at hand and remembers the fastest."""

from fusion.tuner.tune import tune_block, tune_blocks

__all__ = ["tune_block", "tune_blocks"]
