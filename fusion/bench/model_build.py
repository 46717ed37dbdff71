"""Networks to compile, built with fresh weights that behave like trained ones."""

import torch
from torch import nn

from fusion.bench.calibrate import calibrate_batch_norm, centre_logits, image_batches, randomise_affine
from fusion.bench.convfirst_uir import convfirst_uir
from fusion.bench.model_case import UIR, ModelCase, split_model
from fusion.bench.network_build import CALIBRATION_BATCHES, CALIBRATION_SEED
from fusion.bench.network_case import CONVFIRSTNETS
from models import create_model

SPREAD = 0.1
"""Standard deviation of what is added to parameters that start with one value everywhere."""


def build_model(
    case: ModelCase,
    device: str | torch.device,
    calibration_images: int = 32,
    calibration_batches: int = CALIBRATION_BATCHES,
) -> nn.Module:
    """A float32 network in eval mode on `device`, channels_last, whatever it was built with.

    Batch norms are calibrated on some batches of `calibration_images` synthetic images, and the logits centred where
    the last layer has a bias. Raises what building and running the network raises.
    """
    torch.manual_seed(0)
    model = bare_model(case.model)
    randomise_affine(model, seed=0)
    randomise_constants(model, seed=0)
    model = channels_last(model.eval().requires_grad_(False).to(device))

    def images():
        count = calibration_batches * calibration_images
        return image_batches(count, calibration_images, case.size, CALIBRATION_SEED, device)

    calibrate_batch_norm(model, images())
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else getattr(model, "classifier", None)
    if isinstance(getattr(classifier, "bias", None), nn.Parameter):
        centre_logits(model, classifier, images())
    return model


def bare_model(model: str) -> nn.Module:
    """A network as its constructor makes it, by its name with arguments (`fusion.bench.model_case`)."""
    name, arguments = split_model(model)
    if name in CONVFIRSTNETS:
        return create_model(name, **arguments)
    if name == UIR:
        return convfirst_uir(**arguments)
    import timm

    return timm.create_model(name, pretrained=False, **arguments)


def channels_last(model: nn.Module) -> nn.Module:
    """The network itself, its two-dimensional convolutions in channels_last; `Module.to` fails if there are others."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return model


@torch.no_grad()
def randomise_constants(model: nn.Module, seed: int) -> None:
    """Add normal values to every parameter that has one value throughout: scales of layers, gates, biases.

    Many begin at zero or so close to it that what they scale would not show in the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and (parameter == parameter.flatten()[0]).all():
            parameter += SPREAD * torch.randn(parameter.shape, generator=generator)
