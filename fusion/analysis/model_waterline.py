"""`fusion.waterline`: where the time of any network goes, and what fusing its blocks would win."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fusion.analysis.capture import Captured, capture
from fusion.analysis.grouping import LayerKernel, layer_kernels
from fusion.analysis.network_waterline import BlockGain, LeftLayers, NetworkWaterline
from fusion.frontend.find import FoundBlock
from fusion.fused_module import FusedModule, call_arguments
from fusion.fusing import lazy_tuner
from fusion.planner.graph import ELEMENT_SIZE, OpKind
from fusion.planner.plan import Plan, PlanError
from fusion.planner.processor import Processor, get_processor
from fusion.planner.program import Kernel
from fusion.planner.waterline import analyze
from fusion.progress import progress_bar


def waterline(
    model: nn.Module,
    example_input: Tensor | tuple | dict,
    processor: str | Processor = "h200",
    *,
    dtype: str = "float16",
    name: str | None = None,
    progress: bool = True,
) -> NetworkWaterline:
    """How fast a network can be on a processor: every layer as a kernel, then with its blocks fused (section 4).

    The network is traced by shape only. It needs neither a GPU nor weights: it may be on the meta device, and its input
    too. It stays as it is.

    Layer by layer, every convolution, linear layer, product, pool, norm, gate and copy is a kernel that reads its input
    and weights once and writes its output once. What computes element by element (bias, batch norm, activation, layer
    scale) is free in the kernel that makes its operand, and so is the add of a residual, which reads the shortcut once
    more. Padding is free, too, and what depends on no input of the network. Attention by PyTorch's
    `scaled_dot_product_attention` is one kernel. Operators that are none of these are counted by bytes and listed.

    Blocks are those that `torch.compile(model, backend="fusion")` finds; each is fused as the planner would on this
    processor. Blocks that have no kernel there stay layer by layer in `fused`, and are fused in `all_fused`.

    Args:
        model: a network in eval mode, on any device.
        example_input: an input, a tuple of positional arguments, or a dict of keyword arguments; its shapes count.
        processor: a name of `fusion.planner.processor.PROCESSORS`, or a `Processor`.
        dtype: of activations and weights: float16, bfloat16 or float32. Processors tell the peak of 16 bits.
        name: what to call the network; its class by default.
        progress: show a bar while blocks are planned.

    Raises:
        TypeError: the model is fused already.
        ValueError: the model is in training mode, or computes nothing of its input, or the processor or dtype is
            unknown.
        What the model itself raises, on the meta device: one that looks at values cannot be traced.
    """
    if isinstance(model, FusedModule):
        raise TypeError("fusion.waterline takes the original network; this one is fused: call its explain()")
    if any(module.training for module in model.modules()):
        raise ValueError("the network is in training mode, or a part of it is: call eval() first")
    if dtype not in ELEMENT_SIZE:
        raise ValueError(f"dtype {dtype!r} is not supported, use {', '.join(ELEMENT_SIZE)}")
    processor = get_processor(processor)
    model = getattr(model, "_orig_mod", model)  # one that is compiled already
    captured = capture(model, *call_arguments(example_input))
    if not captured.calls:
        raise ValueError("the network computes nothing of its input that is a tensor")
    found: list[_FusedBlock] = []
    blocks = captured.findings.found
    with progress_bar("planning blocks", len(blocks), show=progress and bool(blocks)) as bar:
        for block in blocks:
            found.append(_fused_block(block, dtype, processor))
            bar.advance()
    planned = [block for block in found if block.kernels is not None]
    layers = layer_kernels(captured.calls, captured.results, dtype)
    whole = analyze(Kernels.of(layers), processor)
    everything = _with_fused(captured, dtype, found)
    all_fused = analyze(everything, processor)

    def gain(block: _FusedBlock) -> BlockGain:
        nodes, block_name = set(block.found.nodes), block.found.name
        before = sum(
            bound.min_latency for layer, bound in zip(layers, whole.kernels, strict=True) if layer.node in nodes
        )
        after = sum(
            bound.min_latency
            for owner, bound in zip(everything.blocks, all_fused.kernels, strict=True)
            if owner == block_name
        )
        kernel, predicted = (block.plan.kernel, block.plan.predicted_us / 1e6) if block.plan else (None, None)
        return BlockGain(
            block_name, block.found.kind, kernel, block.reason, before, after, whole.min_latency, predicted
        )

    return NetworkWaterline(
        name or type(model).__name__,
        processor,
        dtype,
        whole,
        analyze(_with_fused(captured, dtype, planned), processor),
        all_fused,
        tuple(map(gain, found)),
        tuple(LeftLayers(left.name, left.kind, left.reason) for left in captured.findings.left),
        tuple(dict.fromkeys(_unknown(layers))),
        captured.why_no_blocks,
    )


@dataclass(frozen=True)
class Kernels:
    """Kernels that run one after another, each with the block that it belongs to, or None."""

    kernels: tuple[Kernel, ...]
    blocks: tuple[str | None, ...]

    @classmethod
    def of(cls, layers: Sequence[LayerKernel]) -> "Kernels":
        return cls(tuple(layer.kernel for layer in layers), (None,) * len(layers))


@dataclass(frozen=True)
class _FusedBlock:
    """A block that was found, the kernels that the planner runs it with, and its plan; None if it has none, for a
    reason."""

    found: FoundBlock
    kernels: tuple[Kernel, ...] | None
    plan: Plan | None = None
    reason: str = ""


def _fused_block(found: FoundBlock, dtype: str, processor: Processor) -> _FusedBlock:
    value = found.input.meta["example_value"]
    batch, channels, height, width = value.shape
    try:
        graph = replace(found.block.graph(batch, height, width, channels, value.dtype), dtype=dtype)
        plan = lazy_tuner(False)(graph, processor)
    except PlanError as error:
        return _FusedBlock(found, None, reason=str(error))
    kernels = plan.program.kernels
    suffixes = [""] if len(kernels) == 1 else [f" ({kernel.name})" for kernel in kernels]
    named = tuple(replace(kernel, name=found.name + suffix) for kernel, suffix in zip(kernels, suffixes, strict=True))
    return _FusedBlock(found, named, plan)


def _with_fused(captured: Captured, dtype: str, blocks: Sequence[_FusedBlock]) -> Kernels:
    """The network with these blocks fused: by their plan, or else as one kernel."""
    kernels: list[Kernel] = []
    names: list[str | None] = []
    regions = [set(block.found.nodes) for block in blocks]
    for layer in layer_kernels(captured.calls, captured.results, dtype, regions):
        block = None if layer.region is None else blocks[layer.region]
        if block is None:
            run = (layer.kernel,)
        elif block.kernels is not None:
            run = block.kernels
        else:
            run = (replace(layer.kernel, name=block.found.name),)
        kernels += run
        names += [block and block.found.name] * len(run)
    return Kernels(tuple(kernels), tuple(names))


def _unknown(layers: Sequence[LayerKernel]) -> Iterator[str]:
    """Names of kernels whose operators are unknown."""
    for layer in layers:
        if any(op.kind is OpKind.UNKNOWN for op in layer.kernel.ops):
            yield layer.kernel.name
