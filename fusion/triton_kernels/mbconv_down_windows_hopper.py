"""Stride-2 MBConv without a blur-pool on Hopper for larger images: the kernel of `mbconv_windows_hopper`."""

from fusion.triton_kernels.mbconv_windows_hopper import launch

__all__ = ["launch"]
