"""Untrained networks with activations like those of trained ones: random affine parameters, calibrated batch norm."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synthetic_images(count: int, size: int, seed: int = 0, device: str | torch.device = "cpu") -> Tensor:
    """`[count, 3, size, size]` float32 images with the statistics of normalised photographs.

    Their amplitudes fall with the spatial frequency as 1/f does, their colours are correlated, each has a brightness
    and contrast of its own, and over all of them a channel has about mean 0 and variance 1.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    frequency = torch.hypot(
        torch.fft.fftfreq(size, 1 / size, device=device)[:, None], torch.fft.rfftfreq(size, 1 / size, device=device)
    )
    amplitude = 1 / frequency.clamp(min=1)
    amplitude[0, 0] = 0  # brightness is added below
    spectrum = torch.fft.rfft2(normal(count, 4, size, size)) * amplitude
    fields = torch.fft.irfft2(spectrum, s=(size, size))
    fields = fields / fields.std((2, 3), keepdim=True).clamp(min=1e-6)
    detail = 0.9 * fields[:, :1] + 0.44 * fields[:, 1:]  # what the colours share, and what each has alone
    contrast = 0.4 + 0.8 * torch.rand(count, 1, 1, 1, device=device, generator=generator)
    brightness = 0.5 * normal(count, 1, 1, 1) + 0.15 * normal(count, 3, 1, 1)
    return contrast * detail + brightness


@torch.no_grad()
def calibrate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set the running statistics of every batch norm in `model` to their averages over `batches` of its inputs.

    Only batch norms run as in training: dropout and drop-path stay off. The model ends in eval mode, and is returned.
    A model without batch norms is left as it is, but for the mode. Raises ValueError if there are no batches.
    """
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches
        norm.train()
    count = 0
    for images in batches:
        model(images)
        count += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    if not count:
        raise ValueError("calibrating batch norm needs at least one batch of images")
    return model


@torch.no_grad()
def randomise_affine(model: nn.Module, seed: int) -> None:
    """Give every batch norm a random scale, between 0.5 and 1.5, and a small random bias, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.affine:
            norm.weight.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
            norm.bias.copy_(0.1 * torch.randn(norm.num_features, generator=generator))


@torch.no_grad()
def centre_logits(model: nn.Module, classifier: nn.Linear, batches: Iterable[Tensor]) -> None:
    """Take the mean logits over `batches` from the classifier's bias.

    The logits of an untrained network are nearly the same for all images: without this, so is the first of them, and
    agreement on it would say nothing.
    """
    mean = torch.cat([model(images) for images in batches]).mean(0)
    classifier.bias -= mean.to(classifier.bias)


def image_batches(
    count: int, batch: int, size: int, seed: int = 0, device: str | torch.device = "cpu"
) -> Iterator[Tensor]:
    """`count` synthetic images in batches of `batch`, all of that length, the last one filled up with further images.

    So every batch has the shape that a network is planned for. Each batch has its own seed, from `seed` on.
    """
    for index in range(-(-count // batch)):
        images = synthetic_images(batch, size, seed + index, device)
        yield images.contiguous(memory_format=torch.channels_last)
