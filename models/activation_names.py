"""Activations that fused kernels have."""

from torch import nn

ACTIVATION_NAMES = {nn.ReLU: "relu", nn.SiLU: "silu"}
