"""Fused kernels for convolutional networks: whole residual blocks as one kernel, for PyTorch inference."""

__version__ = "0.1.0"
