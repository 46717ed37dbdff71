"""Modules as plain data: numbers, strings, lists, dicts and tensors, which name classes but hold no code."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from fusion.file_classes import CONSTRUCTED, class_path

PLAIN = (type(None), bool, int, float, str, bytes)
OMITTED = ("tuner",)
"""Constructor arguments that are code; whoever reads the data provides them."""
BASE = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

Data = object
"""A plain value, or a list of its kind and what it is made of."""


class ModuleWriter:
    """Turns modules into data; what occurs twice is written once.

    `modules`, `tensors` (on the CPU) and `classes` (paths, see `fusion.file_classes`) are tables that the data refer to
    by position. An ordinary module is written as its attributes, parameters, buffers and children; one of
    `CONSTRUCTED` as the arguments of its constructor.
    """

    def __init__(self):
        self.modules: list[dict] = []
        self.tensors: list[Tensor] = []
        self.classes: list[str] = []
        self._places: dict[int, int] = {}
        self._kept: list[object] = []  # no id is given to another object meanwhile

    def module(self, module: nn.Module, name: str = "") -> int:
        """Place of a module in the table. Raises ValueError, naming the part, for what is not data."""
        if id(module) in self._places:
            return self._places[id(module)]
        place = self._remember(module, len(self.modules))
        entry: dict = {"class": self._class(type(module), name)}
        self.modules.append(entry)
        _refuse_hooks(module, name)
        if isinstance(module, CONSTRUCTED):
            arguments = [key for key in inspect.signature(type(module)).parameters if key not in OMITTED]
            entry["arguments"] = {key: self.value(getattr(module, key), _join(name, key)) for key in arguments}
            return place
        _refuse_other_ways(module, name)
        derived = getattr(type(module), "DERIVED", ())
        attributes = {key: value for key, value in vars(module).items() if key not in BASE and key not in derived}
        entry["attributes"] = {key: self.value(value, _join(name, key)) for key, value in attributes.items()}
        entry["parameters"] = self._members(self._tensor, module._parameters, name)
        entry["buffers"] = self._members(self._tensor, module._buffers, name)
        entry["not_persistent"] = sorted(module._non_persistent_buffers_set)
        entry["children"] = self._members(self.module, module._modules, name)
        return place

    def value(self, value: object, name: str) -> Data:
        """Any value. Raises ValueError, naming the part, for what is not data."""
        if type(value) in PLAIN:
            return value
        if isinstance(value, Tensor):
            return ["parameter" if isinstance(value, nn.Parameter) else "tensor", self._tensor(value, name)]
        if isinstance(value, nn.Module):
            return ["module", self.module(value, name)]
        if isinstance(value, torch.dtype | torch.memory_format):
            return ["torch", str(value).removeprefix("torch.")]
        if isinstance(value, torch.device):
            return ["device", str(value)]
        if isinstance(value, type) and issubclass(value, nn.Module):
            return ["class", self._class(value, name)]
        if type(value) in (set, frozenset):
            return [type(value).__name__, self._values(value, name)]
        if is_dataclass(value) and not isinstance(value, type):
            parts = {field.name: getattr(value, field.name) for field in fields(value)}
            parts = {key: self.value(part, _join(name, key)) for key, part in parts.items()}
            return ["dataclass", self._class(type(value), name), parts]
        if isinstance(value, dict):
            items = [[self.value(key, name), self.value(item, _join(name, str(key)))] for key, item in value.items()]
            return ["dict", self._class(type(value), name), items]
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return [kind, self._class(type(value), name), self._values(value, name)]
        raise ValueError(
            f"{name} is a {type(value).__name__}, which cannot be written as data; supported are numbers, strings, "
            "tensors, modules, dataclasses, and containers of them: remove it, or save the state_dict of the original "
            "and fuse again after loading that"
        )

    def _values(self, values: Iterable[object], name: str) -> list[Data]:
        return [self.value(value, f"{name}[{i}]") for i, value in enumerate(values)]

    def _members(self, write: Callable[[object, str], int], members: dict, name: str) -> dict[str, int | None]:
        return {key: None if value is None else write(value, _join(name, key)) for key, value in members.items()}

    def _tensor(self, tensor: Tensor, name: str) -> int:
        if id(tensor) in self._places:
            return self._places[id(tensor)]
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(
                f"{name} is a {type(tensor).__name__} of layout {tensor.layout} on {tensor.device}, which cannot be "
                "written as data"
            )
        place = self._remember(tensor, len(self.tensors))
        plain = tensor.detach().cpu()
        if plain.untyped_storage().nbytes() > plain.numel() * plain.element_size():
            plain = plain.clone()  # a part of something larger, all of which would be written
        self.tensors.append(plain)
        return place

    def _remember(self, value: object, place: int) -> int:
        self._places[id(value)] = place
        self._kept.append(value)
        return place

    def _class(self, cls: type, name: str) -> int:
        path = class_path(cls)
        if path is None:
            raise ValueError(
                f"{_title(name)} is of class {cls.__qualname__}, which {cls.__module__} does not have under that name, "
                "so that it could not be found again; parametrizations can be removed with "
                "torch.nn.utils.parametrize.remove_parametrizations, and classes moved out of functions"
            )
        if path not in self.classes:
            self.classes.append(path)
        return self.classes.index(path)


def _refuse_hooks(module: nn.Module, name: str) -> None:
    if any(value for key, value in vars(module).items() if key in BASE and "hooks" in key):
        raise ValueError(f"{_title(name)} has hooks, which are code and cannot be written; remove them first")


def _refuse_other_ways(module: nn.Module, name: str) -> None:
    for method in ("__reduce__", "__reduce_ex__", "__getstate__"):
        if getattr(type(module), method, None) is not getattr(nn.Module, method, None):
            raise ValueError(
                f"{_title(name)} is a {type(module).__name__}, which has its own way of being copied ({method}) and "
                "cannot be written as data"
            )


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _title(name: str) -> str:
    return name or "the network"
