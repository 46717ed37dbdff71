"""Blocks with random weights and batch norm statistics."""

import torch
from torch import nn

from fusion.bench.blocks import BlockConfig
from models import ConvFirst, Ffn, MBConv

MODULES = {"convfirst": ConvFirst, "ffn": Ffn, "mbconv": MBConv}


def random_block(config: BlockConfig, seed: int) -> ConvFirst | Ffn | MBConv:
    """A block in eval mode, fp32 on the CPU, whose output has about the scale of its input."""
    generator = torch.Generator().manual_seed(seed)
    block = MODULES[config.block](config.channels, config.channels, expansion=config.alpha).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                _randomise(module, generator)
    return block


def _randomise(bn: nn.BatchNorm2d, generator: torch.Generator) -> None:
    size = bn.num_features
    bn.running_mean.copy_(0.1 * torch.randn(size, generator=generator))
    bn.running_var.copy_(0.5 + torch.rand(size, generator=generator))
    bn.weight.copy_(0.5 + torch.rand(size, generator=generator))
    bn.bias.copy_(0.1 * torch.randn(size, generator=generator))
