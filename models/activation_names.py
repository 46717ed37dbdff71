"""Activations that fused kernels have."""

from collections.abc import Mapping

from torch import nn

from fusion.planner.plan import PlanError

ACTIVATION_NAMES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.ReLU6: "relu6", nn.GELU: "gelu", nn.Hardswish: "hardswish"}
SQUEEZE_ACTIVATION_NAMES = {nn.ReLU: "relu", nn.SiLU: "silu"}
"""Inside of squeeze-and-excitation."""
EDGE_ACTIVATION_NAMES = {**ACTIVATION_NAMES, nn.Identity: "none"}
"""Of a network's first and last convolution."""


def fusible_activation(
    block: str, activation: nn.Module, names: Mapping[type[nn.Module], str] = ACTIVATION_NAMES
) -> str:
    """The name that kernels have for the activation of a block; `block` is what messages call it.

    Raises PlanError for an activation that no kernel has, an approximate GELU among them.
    """
    is_exact = getattr(activation, "approximate", "none") == "none"
    if type(activation) not in names or not is_exact:
        supported = " or ".join(kind.__name__ for kind in names)
        raise PlanError(
            f"no fused kernel runs {block} with {activation!r}; supported are {supported}, of GELU the exact one: run "
            "the block in eager mode"
        )
    return names[type(activation)]
