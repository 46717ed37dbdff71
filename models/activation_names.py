"""Activations that fused kernels have."""

from torch import nn

ACTIVATION_NAMES = {nn.ReLU: "relu", nn.SiLU: "silu"}
EDGE_ACTIVATION_NAMES = {**ACTIVATION_NAMES, nn.Identity: "none"}
"""Of a network's first and last convolution."""
