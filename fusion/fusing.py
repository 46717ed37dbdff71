"""`fusion.fuse`: a network whose blocks run as fused kernels."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from fusion.cuda_graphs import MAX_GRAPHS
from fusion.fused_module import FusedModule, call_arguments
from fusion.fused_sequential import FusedSequential
from fusion.joined_stem import JoinedStem
from fusion.launch_record import InputKind
from fusion.modules import FusedBlock, Tuner, processor_of_device
from fusion.op_checks import GPU_DTYPES, any_of
from fusion.planner.families import families_of
from fusion.planner.graph import BlockGraph
from fusion.planner.plan import Plan, PlanError, block_shape, plan_block
from fusion.planner.processor import Processor
from fusion.stage import MicroBatch, check_micro_batch
from fusion.stem_convfirst_module import join_stem

logger = logging.getLogger(__name__)

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def fuse(
    module: nn.Module,
    example_input: Tensor | tuple | dict | None = None,
    *,
    tune: bool = False,
    portable: bool = False,
    micro_batch: MicroBatch = None,
    cuda_graphs: bool = False,
    max_graphs: int = MAX_GRAPHS,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> FusedModule:
    """A copy of a network for inference in which every block that has a kernel runs fused.

    A block is a submodule with a method `fused(tuner)`, as those of `models/` have, that returns its twin, a
    `FusedBlock`; the network may be such a block itself. Twins that follow each other in an `nn.Sequential` run as a
    stage (`FusedSequential`). Everything else stays as it is, and a block without a kernel does so with a reason and a
    warning that is logged (`FusedModule.left_eager`, `explain()`). The copy keeps no link to the original, which is
    left untouched: fuse again after training it further or loading other weights.

    Args:
        module: the network, in eval mode. Batch norm is folded in float64 and rounded once, from the weights as they
            are: fuse before converting to 16 bits (`dtype`), not after.
        example_input: an input, a tuple of positional arguments, or a dict of keyword arguments. With it, all plans for
            inputs of its shape are made, kernels compiled and weights packed before this function returns; it has the
            dtype and device that the result runs in. Blocks that no kernel runs at that shape stay as they are.
            Without it that happens at the first input of each shape, where a block that no kernel runs is an error.
        tune: choose tiles by measurement on the GPU, once for each shape: results are kept in ~/.cache/fusion
            (`fusion.tuner`). Otherwise from shapes, in moments.
        portable: use kernels in plain Triton only, for programs that run without this package (`fusion.package`). On
            Hopper GPUs they are slower than the kernels that are made for them.
        micro_batch: run stages so many images at a time (see `fusion.stage.FusedStage`).
        cuda_graphs: run calls on GPUs as CUDA graphs, up to `max_graphs` of them (see `fusion.cuda_graphs`).
        dtype: floating dtype to convert what is not fused to: fp16 or bf16 on GPUs, any on CPUs.
        device: where to move what is not fused. Fused blocks follow their input.
        progress: show the tuner's progress bar.

    Raises:
        TypeError: the module is none; or, with an `example_input`, blocks on a GPU are given another dtype than fp16 or
            bf16.
        ValueError: the module is fused already, has no weights (meta device), or an option is not supported.
        RuntimeError: part of the module is in training mode; or `tune` without a CUDA GPU.
    """
    _check(module, tune, micro_batch)
    network = copy.deepcopy(module).requires_grad_(False)
    left_eager: dict[str, str] = {}
    twins: dict[nn.Module, Twin] = {}
    _fold(network, "", lazy_tuner(tune, portable), twins, left_eager)
    if portable:
        _leave_opaque_eager(twins, left_eager)
    network.to(device=device, dtype=dtype)
    if example_input is not None:
        args, kwargs = call_arguments(example_input)
        inputs = _block_inputs(network, twins, args, kwargs)
        _plan(twins, inputs, left_eager, tune, portable, progress, adopt=micro_batch is None)
    network = _replaced(network, twins, micro_batch, {} if portable else _joined(network, twins))
    fused = FusedModule(
        network,
        left_eager=left_eager,
        tune=tune,
        portable=portable,
        cuda_graphs=cuda_graphs,
        max_graphs=max_graphs,
    )
    if example_input is not None:
        fused.trace(*args, **kwargs)
    if left_eager:
        logger.warning(
            "%d blocks are fused, %d stay eager: %s (reasons in left_eager and explain())",
            len(twins),
            len(left_eager),
            ", ".join(left_eager),
        )
    return fused


@dataclass(frozen=True)
class Twin:
    """The fused block for a block of this name."""

    name: str
    block: FusedBlock


@cache
def _plan_once(graph: BlockGraph, processor: str | Processor, portable: bool = False) -> Plan:
    """`plan_block`, once for the equal blocks of a network."""
    return plan_block(graph, processor, portable=portable)


@cache
def _tune_once(graph: BlockGraph, processor: str | Processor, portable: bool = False) -> Plan:
    """`tune_block`, once for the equal blocks of a network."""
    from fusion.tuner import tune_block

    return tune_block(graph, processor, portable=portable)


def lazy_tuner(tune: bool, portable: bool = False) -> Tuner:
    """What makes plans of fused networks at inputs of new shapes."""
    tuner = _tune_once if tune else _plan_once
    return partial(tuner, portable=True) if portable else tuner


def _check(module: nn.Module, tune: bool, micro_batch: MicroBatch) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"fusion.fuse takes an nn.Module, got a {type(module).__name__}")
    if isinstance(module, FusedModule):
        raise ValueError("the module is fused already; fuse the original again to change how it runs")
    for name, part in module.named_modules():
        if part.training:
            what = f"its submodule {name!r} is" if name else "it is"
            raise RuntimeError(
                f"the module cannot be fused, for {what} in training mode, whose results depend on the batch; call "
                "eval() on the whole module first"
            )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"the module cannot be fused, for {name!r} is on the meta device and has no values; call "
                "to_empty(device=...) and load weights first"
            )
    check_micro_batch(micro_batch)
    if tune and not torch.cuda.is_available():
        raise RuntimeError(
            "tune=True measures kernels on a CUDA GPU and none is available; leave it out, and tiles are chosen from "
            "shapes"
        )


def _fold(module: nn.Module, name: str, tuner: Tuner, twins: dict[nn.Module, Twin], left_eager: dict[str, str]) -> None:
    """Fill in the twins of all blocks of a module and the reasons why others have none."""
    if module in twins or isinstance(module, FusedBlock | FusedModule):
        return
    if callable(getattr(type(module), "fused", None)):
        reason = why_not_twin(module)
        if reason is None:
            try:
                twins[module] = Twin(name, _twin(module, tuner))
                return
            except (ValueError, AttributeError, TypeError) as error:
                # PlanError is a ValueError; the others come of layers that are not those of the block's class.
                reason = str(error)
        left_eager[name] = reason
    for child_name, child in module.named_children():
        _fold(child, f"{name}.{child_name}" if name else child_name, tuner, twins, left_eager)


def why_not_twin(block: nn.Module) -> str | None:
    """Why a block is not what its class says, and so cannot be replaced by the twin; None if it can."""
    owner = type(block)
    if "forward" in vars(block):
        return "its forward is replaced by another; call fuse() ahead of that"
    mro = owner.__mro__
    definer = {method: next(i for i, cls in enumerate(mro) if method in vars(cls)) for method in ("fused", "forward")}
    if definer["forward"] < definer["fused"]:
        return (
            f"{owner.__name__} overrides the forward of {mro[definer['fused']].__name__}, but not fused(), which gives "
            "the twin of the latter; override it as well"
        )
    packages = {cls.__module__.split(".")[0] for cls in mro} | {"torch"}
    for name, part in block.named_modules():
        what = f"its submodule {name!r}" if name else "it"
        if any(getattr(part, hooks) for hooks in HOOKS):
            return f"{what} has hooks, which a fused kernel would not run; remove them before fusing"
        is_parametrization = "parametrizations" in name.split(".")  # of a weight, which is what is folded
        if type(part).__module__.split(".")[0] not in packages and not is_parametrization:
            return f"{what} is a {type(part).__name__}, which {owner.__name__} does not have by itself"
    return None


def _leave_opaque_eager(twins: dict[nn.Module, Twin], left_eager: dict[str, str]) -> None:
    """Drop the twins of blocks of a kind that no portable kernel runs."""
    for original, twin in list(twins.items()):
        try:
            # Any size will do: which kernels there are depends on the kind of block.
            shape = block_shape(twin.block.graph(1, 32, 32, twin.block.weights.in_channels, torch.half))
        except PlanError as error:
            left_eager[twin.name] = str(error)
            del twins[original]
            continue
        families = families_of(shape)
        if not any(family.is_portable for family in families):
            kernels = any_of(family.name for family in families)
            left_eager[twin.name] = f"it runs on no portable kernel, only on {kernels}; leave out portable to use that"
            del twins[original]


def _twin(block: nn.Module, tuner: Tuner) -> FusedBlock:
    twin = block.fused(tuner)
    if not isinstance(twin, FusedBlock):
        raise TypeError(
            f"fused() of {type(block).__name__} returns a {type(twin).__name__}; it must return a "
            "fusion.modules.FusedBlock"
        )
    # Folded weights are for packing only: float64 would take more of a GPU's memory than all that is packed.
    weights = twin.weights
    on_cpu = {field.name: getattr(weights, field.name) for field in fields(weights)}
    on_cpu = {name: value.cpu() for name, value in on_cpu.items() if isinstance(value, Tensor)}
    twin.weights = replace(weights, **on_cpu)
    return twin.eval()


def _block_inputs(
    network: nn.Module, twins: dict[nn.Module, Twin], args: tuple, kwargs: dict
) -> dict[nn.Module, list[InputKind]]:
    """What each block is called with when the network, not fused yet, runs."""
    inputs: dict[nn.Module, list[InputKind]] = {block: [] for block in twins}

    def note(block: nn.Module, args: tuple, kwargs: dict) -> None:
        x = next(iter((*args, *kwargs.values())), None)
        if isinstance(x, Tensor):
            inputs[block].append(InputKind.of(x))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in twins]
    try:
        FusedModule(network).trace(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _plan(
    twins: dict[nn.Module, Twin],
    inputs: dict[nn.Module, list[InputKind]],
    left_eager: dict[str, str],
    tune: bool,
    portable: bool,
    progress: bool,
    adopt: bool,
) -> None:
    """Make the plans of all twins, and drop those that no kernel runs at their inputs."""
    wanted: list[tuple[FusedBlock, torch.device, BlockGraph]] = []
    for original, block_inputs in inputs.items():
        twin = twins[original]
        try:
            graphs = [(x.device, _planned_graph(twin, x, portable)) for x in dict.fromkeys(block_inputs)]
        except PlanError as error:
            left_eager[twin.name] = str(error)
            del twins[original]
            continue
        wanted += [(twin.block, device, graph) for device, graph in graphs]
    if not adopt:
        return
    plans: dict[tuple[torch.device, BlockGraph], Plan] = {}
    for device in dict.fromkeys(device for _, device, _ in wanted):
        graphs = list(dict.fromkeys(graph for _, where, graph in wanted if where == device))
        made = _plans(graphs, device, tune, portable, progress)
        plans.update(zip(((device, graph) for graph in graphs), made, strict=True))
    for block, device, graph in wanted:
        block.adopt_plan(device, plans[device, graph])


def _planned_graph(twin: Twin, x: InputKind, portable: bool) -> BlockGraph:
    if x.device.type == "cuda" and x.dtype not in GPU_DTYPES:
        raise TypeError(
            f"block {twin.name!r} gets {x.dtype} on {x.device}; fused kernels take {any_of(GPU_DTYPES)}: pass such an "
            "example_input, and dtype=torch.half or torch.bfloat16"
        )
    if len(x.shape) != 4:
        raise PlanError(f"its input must be [N, C, H, W], got {list(x.shape)}")
    batch, channels, height, width = x.shape
    graph = twin.block.graph(max(batch, 1), height, width, channels, x.dtype)
    _plan_once(graph, processor_of_device(x.device), portable)
    return graph


def _plans(
    graphs: Sequence[BlockGraph], device: torch.device, tune: bool, portable: bool, progress: bool
) -> list[Plan]:
    processor = processor_of_device(device)
    if tune:
        from fusion.tuner import tune_blocks

        return tune_blocks(graphs, processor, device=device, progress=progress, portable=portable)
    return [_plan_once(graph, processor, portable) for graph in graphs]


def _joined(network: nn.Module, twins: dict[nn.Module, Twin]) -> dict[nn.Module, nn.Module]:
    """What stands for the stem and the block of networks that name such a pair (`JOINED`), where both have twins."""
    joined: dict[nn.Module, nn.Module] = {}
    for module in network.modules():
        pair = [module.get_submodule(name) for name in getattr(type(module), "JOINED", ())]
        if len(pair) == 2 and all(part in twins for part in pair):
            stem, block = (twins[part].block for part in pair)
            together = join_stem(stem, block)
            if together is not None:
                joined |= zip(pair, (nn.Identity(), JoinedStem(stem, block, together)), strict=True)
    return joined


def _replaced(
    module: nn.Module, twins: dict[nn.Module, Twin], micro_batch: MicroBatch, done: dict[nn.Module, nn.Module]
) -> nn.Module:
    """The module with blocks replaced wherever they stand; one that stands in two places has one twin."""
    if module in done:
        return done[module]
    if module in twins:
        done[module] = twins[module].block
        return done[module]
    done[module] = module
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = _replaced(child, twins, micro_batch, done)
    if type(module) is nn.Sequential and any(isinstance(layer, FusedBlock) for layer in module):
        chain = FusedSequential(module._modules, micro_batch)
        # What else the chain has, hooks for example.
        vars(chain).update({name: value for name, value in vars(module).items() if name != "_modules"})
        done[module] = chain
    return done[module]
