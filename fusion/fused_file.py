"""Fused networks on disk: `FusedModule.save` writes them, `fusion.load` reads them.

A file holds plain data only, a dict written by `torch.save` and read by `torch.load(weights_only=True)`: the network's
layers (`fusion.module_writer`), folded weights in float64, weights packed for the kernels, and plans as integers.
Nothing in a file is executed and nothing is imported for it (`fusion.file_classes`).

Loading folds, tunes and packs nothing again where it can be avoided: on the processor that the plans are for. On
another one, or with another version of the kernels, plans and packed weights are made anew from the folded weights,
which serve any device and dtype.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from fusion import __version__, kernels
from fusion.fused_module import FusedModule
from fusion.fused_sequential import FusedSequential
from fusion.fusing import lazy_tuner
from fusion.kernels import Packed
from fusion.module_reader import ModuleReader
from fusion.module_writer import Data, ModuleWriter
from fusion.modules import FusedBlock, kernel_dtype, processor_of_device
from fusion.planner.families import family_named
from fusion.planner.plan import Plan, PlanError, plan_block
from fusion.planner.processor import Processor, get_processor
from fusion.stage import FusedStage

MAGIC = "fusion.FusedModule"
FORMAT = 1


def save(fused: FusedModule, path: str | os.PathLike[str]) -> None:
    """Write a fused module to a file. Raises ValueError for a network that holds what is not data, and OSError."""
    writer = ModuleWriter()
    root = writer.module(fused)
    caches = [
        {"module": writer.module(module), "stage": stage, **_written_caches(holder, writer)}
        for module, stage, holder in _cache_holders(fused)
    ]
    devices = {tensor.device.type for tensor in (*fused.parameters(), *fused.buffers())}
    devices |= {device.type for block in _blocks(fused) for device, _ in block.plans}
    content = {
        "magic": MAGIC,
        "format": FORMAT,
        "fusion": __version__,
        "kernels": _kernels_hash(),
        "device": "cuda" if "cuda" in devices else "cpu",
        "classes": writer.classes,
        "modules": writer.modules,
        "tensors": writer.tensors,
        "root": root,
        "caches": caches,
        "tune": fused.tune,
        "portable": fused.portable,
    }
    part = Path(f"{os.fspath(path)}.part")
    try:
        torch.save(content, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], device: torch.device | str | None = None) -> FusedModule:
    """Read a fused module that `FusedModule.save` wrote.

    The file is data and not trusted with more: nothing in it runs or is imported. So classes of the network's own
    modules, of `models` for example, have to be imported before. `device` is where the layers go that are not fused,
    and where inputs are expected to be (default: a GPU if the module was saved from one).

    Raises:
        ValueError: the file is none of `save`, or of another format, or needs classes that are not imported.
        RuntimeError: the module was saved from a GPU, there is none, and no `device` is given.
        OSError: the file cannot be read.
    """
    content = _read(path)
    device = _device(content["device"], device)
    try:
        return _made(content, device)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _made(content: dict, device: torch.device) -> FusedModule:
    tuner = lazy_tuner(content["tune"], content.get("portable", False))
    reader = ModuleReader(content["modules"], content["tensors"], content["classes"], device, tuner)
    fused = reader.module(content["root"])
    for module in fused.modules():
        if isinstance(module, FusedSequential):
            module.group()
    if content["kernels"] == _kernels_hash():
        holders = [_holder(reader.module(caches["module"]), caches["stage"]) for caches in content["caches"]]
        for restore in (_restore_plans, _restore_layouts):  # a stage's layouts are those of its blocks' plans
            for holder, caches in zip(holders, content["caches"], strict=True):
                restore(holder, caches, reader, device)
    return fused


def _read(path: str | os.PathLike[str]) -> dict:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # which it is depends on the bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is no file of FusedModule.save, or is damaged: {reason}") from error
    if not isinstance(content, dict) or content.get("magic") != MAGIC:
        raise ValueError(
            f"{path} is no file of FusedModule.save; load a state_dict into the original module, and fuse that with "
            "fusion.fuse"
        )
    if content["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {content['format']} (fusion {content['fusion']}), this version of fusion "
            f"({__version__}) reads {FORMAT}; fuse the original and save again"
        )
    return content


def _device(saved: str, device: torch.device | str | None) -> torch.device:
    if device is None and saved == "cuda" and not torch.cuda.is_available():
        raise RuntimeError('the module was saved from a GPU, and there is none; load it with device="cpu"')
    device = torch.device(device or saved)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _cache_holders(network: nn.Module) -> Iterator[tuple[nn.Module, int | None, FusedBlock | FusedStage]]:
    """Modules that hold plans or packed weights: which module of the network, which of its stages, and the holder."""
    for module in network.modules():
        if isinstance(module, FusedBlock | FusedStage):
            yield module, None, module
        elif isinstance(module, FusedSequential):
            for index, part in enumerate(module.parts):
                if isinstance(part, FusedStage):
                    yield module, index, part


def _blocks(network: nn.Module) -> Iterator[FusedBlock]:
    return (module for module in network.modules() if isinstance(module, FusedBlock))


def _written_caches(holder: FusedBlock | FusedStage, writer: ModuleWriter) -> dict[str, list[Data]]:
    plans = holder.plans if isinstance(holder, FusedBlock) else []
    return {
        "plans": [_written_plan(device, plan) for device, plan in plans],
        "layouts": [_written_layout(key, packed, writer) for key, packed in holder.layouts.items()],
    }


def _written_layout(key: tuple, packed: Packed, writer: ModuleWriter) -> dict[str, Data]:
    at = next(i for i, part in enumerate(key) if isinstance(part, torch.device))
    return {
        "place": list(key[:at]),
        "dtype": str(key[at + 1]).removeprefix("torch."),
        "packing": list(key[at + 2 :]),
        "packed": writer.value(packed, "packed weights"),
    }


def _written_plan(device: torch.device, plan: Plan) -> dict[str, Data]:
    shape = plan.shape
    return {
        "device": device.type,
        "processor": _processor_key(plan.processor),
        "sizes": [shape.batch, shape.height, shape.width, shape.in_channels],
        "dtype": shape.dtype,
        "kernel": plan.kernel,
        "tile": plan.tile.to_ints(),
        "why": plan.why,
        "measured_us": plan.measured_us,
    }


def _holder(module: nn.Module, stage: int | None) -> FusedBlock | FusedStage:
    return module if stage is None else module.parts[stage]


def _restore_plans(holder: FusedBlock | FusedStage, caches: dict, reader: ModuleReader, device: torch.device) -> None:
    processor = get_processor(processor_of_device(device))
    # Plans made on this kind of device come last: they win.
    for written in sorted(caches["plans"], key=lambda plan: plan["device"] == device.type):
        plan = _restored_plan(holder, written, processor)
        if plan is not None:
            holder.adopt_plan(device, plan)


def _restore_layouts(holder: FusedBlock | FusedStage, caches: dict, reader: ModuleReader, device: torch.device) -> None:
    blocks = [holder] if isinstance(holder, FusedBlock) else holder.blocks
    wanted = {(plan.shape.dtype, *kernels.packing(plan.tile)) for block in blocks for _, plan in block.plans}
    for layout in caches["layouts"]:
        dtype = getattr(torch, layout["dtype"])
        if (kernel_dtype(dtype), *layout["packing"]) in wanted:
            packed = reader.value(layout["packed"])
            packed = replace(packed, **{name: tensor.to(device) for name, tensor in vars(packed).items()})
            holder.layouts[(*layout["place"], device, dtype, *layout["packing"])] = packed


def _restored_plan(block: FusedBlock, written: dict, processor: Processor) -> Plan | None:
    """The plan, if it is for this processor and its tile is valid."""
    if written["processor"] != _processor_key(processor):
        return None
    graph = block.graph(*written["sizes"], getattr(torch, written["dtype"]))
    try:
        tile = family_named(written["kernel"]).tile_type(*written["tile"])
        plan = plan_block(graph, processor, tile)
    except PlanError:
        return None
    return replace(plan, why=written["why"], measured_us=written["measured_us"])


def _processor_key(processor: Processor) -> list[Data]:
    """What plans are made for; measured ceilings differ from time to time."""
    return [processor.name, list(processor.compute_capability), processor.processors, processor.local_memory_bytes]


@cache
def _kernels_hash() -> str:
    """Of the sources that decide on what tiles and packed weights mean."""
    folder = Path(__file__).parent
    sources = sorted((*folder.glob("planner/*.py"), *folder.glob("triton_kernels/*.py"), *folder.glob("*weights.py")))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
