"""An EfficientNet of timm whose blocks are the paper's: universal inverted residuals that begin with a grouped 3x3
convolution, which makes them ConvFirst blocks (section 5.3).
"""

from torch import nn

STAGES = (
    ("uir_r2_a3_k0_s1_e3_c32_gs8",),
    ("uir_r1_a3_k0_s2_e6_c64_gs8", "uir_r3_a3_k0_s1_e6_c64_gs8"),
    ("uir_r1_a3_k0_s2_e6_c96_gs8", "uir_r3_a3_k0_s1_e6_c96_gs8"),
    ("uir_r1_a3_k0_s2_e4_c128_gs8", "uir_r5_a3_k0_s1_e4_c128_gs8"),
    ("uir_r1_a3_k0_s2_e4_c192_gs8", "uir_r1_a3_k0_s1_e4_c192_gs8"),
)
"""In timm's notation: r repeats, a3 a convolution 3x3 first, k0 none in the middle, s stride, e expansion, c channels,
gs group width. The stem has stride 2, so the first stage of 256 x 256 images is 128 x 128."""
STEM_CHANNELS = 32


def convfirst_uir(**arguments: object) -> nn.Module:
    """The network, with fresh weights; `arguments` are further ones of `timm.models.efficientnet.EfficientNet`.

    Raises ImportError without timm.
    """
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    stages = decode_arch_def([list(stage) for stage in STAGES])
    return EfficientNet(block_args=stages, **{"stem_size": STEM_CHANNELS, **arguments})
