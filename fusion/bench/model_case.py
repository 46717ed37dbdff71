"""Any network to compile: a ConvFirstNet, one of timm's or the one of `fusion.bench.convfirst_uir`, by name.

A name may carry arguments of the constructor: "efficientnet_b0:group_size=8".
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import ModuleType

from fusion.bench.network_case import CONVFIRSTNETS, SHORT_NAMES, has_timm
from fusion.bench.paper_networks import PAPER_SIZE

UIR = "convfirst_uir"
"""The network of `fusion.bench.convfirst_uir`."""

Arguments = Mapping[str, object]


@dataclass(frozen=True)
class ModelCase:
    """A network, its full name with its arguments, and the batch of `size` x `size` images that it runs on."""

    model: str
    batch: int
    size: int
    dtype: str = "float16"

    @property
    def is_convfirstnet(self) -> bool:
        """Whether `fusion.fuse` can fuse it."""
        return split_model(self.model)[0] in CONVFIRSTNETS

    def __str__(self) -> str:
        return f"{self.model} at {self.size}, batch {self.batch}"


def split_model(text: str) -> tuple[str, Arguments]:
    """Full name and arguments of a network: "NAME" or "NAME:KEY=VALUE,...", values as Python writes them.

    "pico" is short for "convfirstnet_pico", and a value that is one word may go without quotes. Raises ValueError for
    arguments that are no such list.
    """
    name, colon, written = text.partition(":")
    name = SHORT_NAMES.get(name, name)
    if not colon:
        return name, {}
    try:
        call = ast.parse(f"call({written})", mode="eval").body
        if call.args or not call.keywords or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("an argument has no name")
        arguments = {keyword.arg: _value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(
            f"{text!r}: {written!r} is no list of arguments; write NAME:KEY=VALUE,..., as in "
            "efficientnet_b0:group_size=8"
        ) from None
    if "pretrained" in arguments:
        raise ValueError(
            f"{text!r}: networks are built with fresh weights, nothing is downloaded; leave out pretrained"
        )
    return name, arguments


def known_model(text: str) -> str:
    """A network's full name with its arguments, once it is sure that there is such a network.

    Raises ValueError if there is none, or if it is timm's and timm cannot be imported.
    """
    name, _ = split_model(text)
    if name in CONVFIRSTNETS:
        return name + text[text.index(":") :] if ":" in text else name
    own = [*SHORT_NAMES, UIR]
    if name == UIR or has_timm():
        timm = import_timm(name)
        if name == UIR or timm.is_model(name):
            return text
        known = [*own, *CONVFIRSTNETS, *timm.list_models()]
        others = "and timm has none of that name"
    else:
        known = [*own, *CONVFIRSTNETS]
        others = "and timm, whose networks can be compiled too, is not installed: pip install timm"
    close = get_close_matches(name, known)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(f"no network is named {name!r}: {hint}this project's are {', '.join(own)}, {others}")


def import_timm(wanted: str) -> ModuleType:
    """timm, for the network `wanted`. Raises ValueError if it is not installed, or cannot be imported."""
    if not has_timm():
        raise ValueError(f"{wanted} is made with timm, which is not installed: pip install timm")
    try:
        import timm
    except Exception as error:  # torchvision, which it imports, raises RuntimeError if it does not fit torch
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{wanted} needs timm, which cannot be imported ({reason})") from error
    return timm


def image_size(model: str, asked: int | None = None, preferred: int | None = None) -> int:
    """Height = width in pixels of a network's images: as `asked`, else `preferred` if the network takes it.

    Else it is the size that timm tests the network at, 256 for others. Raises ValueError if the network does not take
    the size that is asked for.
    """
    name, arguments = split_model(model)
    if name in CONVFIRSTNETS or name == UIR:
        return asked or preferred or PAPER_SIZE
    config = import_timm(name).get_pretrained_cfg(name)
    is_fixed = "img_size" in arguments or bool(config and config.fixed_input_size)
    own = arguments.get("img_size") or (config.input_size[-1] if config else 224)
    if not is_fixed and config and config.test_input_size:
        own = config.test_input_size[-1]
    least = config.min_input_size[-1] if config and config.min_input_size else 1
    if asked is None:
        return max(preferred, least) if preferred and not is_fixed else own
    if is_fixed and asked != own:
        raise ValueError(
            f"{model} takes images of {own} x {own} only, not {asked}: leave out --size for it, or try {name}:img_size="
            f"{asked}"
        )
    if asked < least:
        raise ValueError(f"{model} takes images from {least} x {least} up, not {asked}: use a larger --size")
    return asked


def _value(node: ast.expr) -> object:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
