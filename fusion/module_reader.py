"""Modules made of the data of a `fusion.module_writer.ModuleWriter`."""

from collections.abc import Sequence
from dataclasses import is_dataclass

import torch
from torch import Tensor, nn

from fusion.file_classes import CONSTRUCTED, find_classes
from fusion.module_writer import Data
from fusion.modules import FusedBlock, Tuner


class ModuleReader:
    """Makes modules of data, in eval mode, with parameters and buffers on a device.

    Tensors in dataclasses, such as folded weights, are left where they are. `tuner` makes the plans of fused blocks.

    Raises ValueError: in the constructor for classes that are not found (see `fusion.file_classes`), later for data
    that do not fit together.
    """

    def __init__(
        self,
        modules: Sequence[dict],
        tensors: Sequence[Tensor],
        classes: Sequence[str],
        device: torch.device,
        tuner: Tuner,
    ):
        self._entries = modules
        self._tensors = tensors
        self._classes = find_classes(classes)
        self._device = device
        self._tuner = tuner
        self._modules: dict[int, nn.Module] = {}
        self._made: dict[tuple, Tensor] = {}

    def module(self, place: int) -> nn.Module:
        """The module at a place of the table."""
        if place in self._modules:
            return self._modules[place]
        entry = self._entries[place]
        cls = self._class(entry["class"], nn.Module)
        if issubclass(cls, CONSTRUCTED) != ("arguments" in entry):
            raise ValueError(f"the data of a {cls.__name__} are those of another kind of module")
        if "arguments" in entry:
            arguments = {key: self.value(value) for key, value in entry["arguments"].items()}
            if issubclass(cls, FusedBlock):
                arguments["tuner"] = self._tuner
            self._modules[place] = cls(**arguments).eval()
            return self._modules[place]
        module = self._modules[place] = cls.__new__(cls)
        nn.Module.__init__(module)
        module.training = False
        vars(module).update({key: self.value(value, self._device) for key, value in entry["attributes"].items()})
        for key, tensor in entry["parameters"].items():
            module._parameters[key] = None if tensor is None else self._parameter(tensor)
        for key, tensor in entry["buffers"].items():
            module._buffers[key] = None if tensor is None else self._tensor(tensor, self._device)
        module._non_persistent_buffers_set = set(entry["not_persistent"])
        for key, child in entry["children"].items():
            module._modules[key] = None if child is None else self.module(child)
        return module

    def value(self, data: Data, device: torch.device | None = None) -> object:
        """A value, its tensors on a device, by default where they are."""
        if not isinstance(data, list):
            return data
        kind, *parts = data
        if kind == "parameter":
            return self._parameter(*parts)
        if kind == "tensor":
            return self._tensor(*parts, device)
        if kind == "module":
            return self.module(*parts)
        if kind == "torch":
            value = getattr(torch, *parts)
            if not isinstance(value, torch.dtype | torch.memory_format):
                raise ValueError(f"torch.{parts[0]} is neither a dtype nor a memory format")
            return value
        if kind == "device":
            return torch.device(*parts)
        if kind == "class":
            return self._class(*parts, nn.Module)
        if kind in ("set", "frozenset"):
            values = [self.value(value, device) for value in parts[0]]
            return set(values) if kind == "set" else frozenset(values)
        return self._structure(kind, *parts, device)

    def _structure(self, kind: str, cls: int, parts: list | dict, device: torch.device | None) -> object:
        if kind == "dataclass":
            made = object.__new__(self._class(cls, object))
            if not is_dataclass(made):
                raise ValueError(f"{type(made).__name__} is no dataclass")
            for key, part in parts.items():
                object.__setattr__(made, key, self.value(part))
            return made
        if kind == "dict":
            cls = self._class(cls, dict)
            made = cls.__new__(cls)
            for key, part in parts:
                made[self.value(key)] = self.value(part, device)
            return made
        values = [self.value(part, device) for part in parts]
        if kind == "list":
            cls = self._class(cls, list)
            made = cls.__new__(cls)
            list.extend(made, values)
            return made
        if kind == "tuple":
            cls = self._class(cls, tuple)
            return torch.Size(values) if cls is torch.Size else tuple.__new__(cls, values)
        raise ValueError(f"{kind!r} is no kind of data")

    def _parameter(self, place: int) -> nn.Parameter:
        key = (place, "parameter")
        if key not in self._made:
            self._made[key] = nn.Parameter(self._tensors[place].to(self._device), requires_grad=False)
        return self._made[key]

    def _tensor(self, place: int, device: torch.device | None) -> Tensor:
        key = (place, device)
        if key not in self._made:
            tensor = self._tensors[place]
            self._made[key] = tensor if device is None else tensor.to(device)
        return self._made[key]

    def _class(self, place: int, base: type) -> type:
        cls = self._classes[place]
        if not issubclass(cls, base):
            raise ValueError(f"{cls.__qualname__} stands where a {base.__name__} should")
        return cls
