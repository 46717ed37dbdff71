"""Networks to measure: built, calibrated, fused, and taken apart again."""

import torch
from torch import Tensor, nn

from fusion.bench.calibrate import calibrate_batch_norm, centre_logits, image_batches, randomise_affine
from fusion.bench.network_case import NetworkCase
from fusion.fused_module import FusedModule
from fusion.fusing import fuse
from fusion.joined_stem import JoinedStem
from fusion.modules import FusedBlock
from models import ConvBnAct, ConvFirst, MBConv, create_model

CALIBRATION_BATCHES = 4
CALIBRATION_SEED = 1_000_000
"""Seeds from here on make calibration images; those from 0 on are for inputs."""
UNITS = (FusedBlock, JoinedStem, ConvBnAct, ConvFirst, MBConv, nn.Linear)
"""Modules that are parts of a ConvFirstNet, as `fusion.bench.network_limit` counts them, or two of them."""


def build_network(case: NetworkCase, device: str | torch.device, calibration_images: int = 32) -> nn.Module:
    """An untrained float32 network in eval mode on `device`, with calibrated batch norms and centred logits.

    Each of the few batches of calibration has `calibration_images` images. Raises what timm raises for a network that
    it does not know.
    """
    torch.manual_seed(0)
    if case.is_rival:
        import timm

        model = timm.create_model(case.model, pretrained=False)
    else:
        model = create_model(case.model)
        randomise_affine(model, seed=0)
    model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    count = CALIBRATION_BATCHES * calibration_images

    def images():
        return image_batches(count, calibration_images, case.size, CALIBRATION_SEED, device)

    calibrate_batch_norm(model, images())
    if not case.is_rival:
        centre_logits(model, model.classifier, images())
    return model


@torch.no_grad()
def count_ops(model: nn.Module, image: Tensor) -> int:
    """OPs of the convolutions and linear layers of a model on `image`: 2 x multiply-accumulates."""
    macs = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return 2 * macs


def network_units(module: nn.Module) -> list[nn.Module]:
    """The parts of a ConvFirstNet, fused or not, in execution order."""
    if isinstance(module, UNITS):
        return [module]
    return [unit for child in module.children() for unit in network_units(child)]


def fuse_network(model: nn.Module, x: Tensor, tune: bool) -> FusedModule:
    """The inference network of a ConvFirstNet for inputs like `x`, in its dtype and on its device.

    Plans are made at the first input: nothing runs here, least of all a convolution of cuDNN's.
    """
    return fuse(model, tune=tune, dtype=x.dtype, device=x.device)
