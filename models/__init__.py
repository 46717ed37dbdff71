"""ConvFirstNet and the blocks that it is made of, as plain PyTorch modules."""

from .blurpool import BlurPool
from .conv_bn_act import ConvBnAct
from .convfirst import ConvFirst
from .convfirstnet import ConvFirstNet, ConvFirstNetConfig
from .drop_path import DropPath
from .features import FeatureExtractor, FeatureInfo
from .ffn import Ffn
from .fused import fuse_blocks
from .mbconv import MBConv
from .pooled_head import PooledHead
from .registry import create_model, list_models, register_model
from .squeeze_excite import SqueezeExcite

__all__ = [
    "BlurPool",
    "ConvBnAct",
    "ConvFirst",
    "ConvFirstNet",
    "ConvFirstNetConfig",
    "DropPath",
    "FeatureExtractor",
    "FeatureInfo",
    "Ffn",
    "MBConv",
    "PooledHead",
    "SqueezeExcite",
    "create_model",
    "fuse_blocks",
    "list_models",
    "register_model",
]
