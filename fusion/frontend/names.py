"""Names of modules, from what a graph's nodes say about where they come from."""

import re
from collections.abc import Sequence

from torch import fx


def module_path(node: fx.Node) -> str:
    """Path of the module that a node comes from, such as "blocks.1.0.conv"; empty if it does not say."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path, *_ = next(reversed(stack.values()))
        return clean_path(path)
    return node.target if node.op == "call_module" else ""


def clean_path(path: str) -> str:
    """A path as `nn.Module.get_submodule` takes it, without what Dynamo writes around names."""
    while (match := re.fullmatch(r"getattr\((.*), ['\"](\w+)['\"]\)(.*)", path)) is not None:
        path = f"{match[1]}.{match[2]}{match[3]}"
    path = re.sub(r"\._modules\[['\"]([^'\"]*)['\"]\]", r".\1", path)
    path = re.sub(r"^[LG]\[['\"][^'\"]*['\"]\]", "", path)
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    return path.strip(".").removeprefix("_orig_mod.")


def block_name(layers: Sequence[fx.Node], others: Sequence[fx.Node], output: fx.Node) -> str:
    """The module that the convolutions and linear layers of a block are in; of a single layer, that which `others` are
    in as well, or else its own. The name of the output's node if there is none."""
    paths = [path for node in layers if (path := module_path(node))]
    if len(layers) == 1 and paths:
        return _common([*paths, *filter(None, map(module_path, others))]) or paths[0]
    return _common(paths) or output.name


def _common(paths: Sequence[str]) -> str:
    """The longest path that all of them begin with."""
    shared = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
