"""Models by name."""

from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

import fusion

EntryPoint = Callable[..., nn.Module]

_ENTRY_POINTS: dict[str, EntryPoint] = {}


def register_model(entry_point: EntryPoint) -> EntryPoint:
    """Make a function that builds a model available to `create_model` under the function's own name.

    Raises:
        ValueError: the name is taken.
    """
    name = entry_point.__name__
    if name in _ENTRY_POINTS:
        raise ValueError(f"a model named {name!r} is registered already; give the new entry point another name")
    _ENTRY_POINTS[name] = entry_point
    return entry_point


def list_models(filter: str = "") -> list[str]:
    """Sorted names of the registered models; `filter` is a shell pattern such as `"convfirstnet_*"`, empty for all."""
    return sorted(name for name in _ENTRY_POINTS if fnmatchcase(name, filter or "*"))


def create_model(name: str, *, num_classes: int = 1000, in_chans: int = 3, fused: bool = False, **kwargs) -> nn.Module:
    """Build a registered model with fresh weights.

    Args:
        name: one of `list_models()`.
        num_classes: width of the logits; 0 leaves the classifier out.
        in_chans: channels of the input image.
        fused: build the inference network, a `FusedModule` whose blocks run fused (`fusion.fuse`). Blocks that have no
            kernel stay eager; a logged warning and the attribute `left_eager` say which.
        **kwargs: passed on to the entry point, for example `features_only=True` or `drop_rate=0.1`.

    Raises:
        ValueError: there is no model of that name.
    """
    if name not in _ENTRY_POINTS:
        close = get_close_matches(name, _ENTRY_POINTS)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"no model is named {name!r}.{hint} Registered models: {', '.join(list_models())}")
    model = _ENTRY_POINTS[name](num_classes=num_classes, in_chans=in_chans, **kwargs)
    return fusion.fuse(model.eval()) if fused else model
