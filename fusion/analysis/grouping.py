"""Calls as kernels, one for each layer, with the fusions that every compiler makes.

What computes element by element joins the kernel that made its operand, if that has all else it needs: bias, batch
norm, activation, layer scale, and the add of a residual, which reads the shortcut. So do Inductor's epilogues, and the
paper counts layer-wise execution that way (section 4.2). All else is a kernel of its own, between tensors in DRAM.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from fusion.analysis.aten_ops import LAYOUTS, is_elementwise, ops_of
from fusion.analysis.recorder import Call, Operand, Value
from fusion.planner.graph import ELEMENT_SIZE, Op, OpKind, Tensor
from fusion.planner.program import Kernel, Memory


@dataclass(frozen=True)
class LayerKernel:
    """A kernel, the index of the region that it runs (None for a layer), and its first operation's node in the graph
    (None if there is no graph)."""

    kernel: Kernel
    region: int | None
    node: fx.Node | None


@dataclass(eq=False)
class _Group:
    """Operations that become a kernel; `takes_more` says whether element-wise ones may join."""

    name: str
    node: fx.Node | None
    region: int | None = None
    order: int = 0
    takes_more: bool = True
    ops: list[Op] = field(default_factory=list)
    made: dict[Value, Tensor] = field(default_factory=dict)
    read: set[Value] = field(default_factory=set)


def layer_kernels(
    calls: Sequence[Call], results: Iterable[Value], dtype: str, regions: Sequence[Collection[fx.Node]] = ()
) -> list[LayerKernel]:
    """The kernels of a network's calls, in order; `results` are the values that it returns.

    What is in a region, a set of nodes, is one kernel at the place of its last call, and nothing else joins it.
    Elements have the size of `dtype`, whatever the network was traced in.
    """
    region_of = {node: index for index, region in enumerate(regions) for node in region}
    fused: dict[int, _Group] = {}
    groups: list[_Group] = []
    maker: dict[Value, _Group] = {}
    names: set[str] = set()
    for order, call in enumerate(calls):
        region = region_of.get(call.node)
        group = _joined(call, maker) if region is None else fused.get(region)
        if group is None:
            group = _Group(_unique(call, names), call.node, region, order)
            groups.append(group)
        if region is not None:
            fused[region] = group
            group.order = order
        _add(group, call)
        maker.update((operand.value, group) for operand in call.outputs)
    needed = {value for group in groups for value in group.read if value not in group.made} | set(results)
    groups.sort(key=lambda group: group.order)
    return [LayerKernel(_kernel(group, needed, ELEMENT_SIZE[dtype]), group.region, group.node) for group in groups]


def _joined(call: Call, maker: Mapping[Value, _Group]) -> _Group | None:
    """The group that an element-wise call may join: the latest that makes one of its operands, if it makes all of it,
    element for element."""
    if not is_elementwise(call):
        return None
    operands = [operand for operand in call.inputs if not operand.is_constant and operand.value in maker]
    latest = max((maker[operand.value] for operand in operands), key=lambda group: group.order, default=None)
    if latest is None or not latest.takes_more:
        return None
    made = latest.made
    inside = [operand for operand in operands if maker[operand.value] is latest]
    is_whole = all(operand.value in made and made[operand.value].size == operand.size for operand in inside)
    return latest if is_whole and any(operand.size == call.outputs[0].size for operand in inside) else None


def _add(group: _Group, call: Call) -> None:
    """Append a call to a group."""
    name = f"{group.name}.{call.name}{len(group.ops)}" if group.ops else group.name
    views: list[Op] = []
    outputs = {operand.value for operand in call.outputs}

    def tensor(operand: Operand, dims: tuple[str, ...] | None) -> Tensor:
        value = operand.value
        wanted = _tensor(operand, dims)
        if value in outputs:
            group.made[value] = wanted
            return wanted
        made = group.made.get(value)
        if made is None or made.dims == wanted.dims or (dims is None and made.size == wanted.size):
            return made or wanted
        view = Tensor(f"{name}.view{len(views)}", wanted.dims)
        views.append(Op(OpKind.ELEMENTWISE, view.name, (made,), view))
        return view

    ops = ops_of(call, tensor, name)
    group.ops += (*views, *ops)
    group.read.update(operand.value for operand in call.inputs)
    group.takes_more = group.region is None and all(op.kind is not OpKind.UNKNOWN for op in ops)


def _tensor(operand: Operand, dims: tuple[str, ...] | None) -> Tensor:
    shape = operand.shape or (1,)
    names = dims or LAYOUTS.get(len(shape)) or tuple(f"D{index}" for index in range(len(shape)))
    sizes = dict(zip(names, shape, strict=True))
    if "C" in sizes:  # channels_last
        sizes["C"] = sizes.pop("C")
    return Tensor(f"v{operand.value.storage:x}.{operand.value.version}", sizes)


def _unique(call: Call, names: set[str]) -> str:
    name = base = call.path or call.name
    if name in names:
        name = base = f"{name} ({call.name})"
    count = 1
    while name in names:
        count += 1
        name = f"{base} {count}"
    names.add(name)
    return name


def _kernel(group: _Group, needed: set[Value], element_size: int) -> Kernel:
    """The group as a kernel: what it makes is in DRAM if anything else needs it, or an unknown operator makes it."""
    kept = {tensor for value, tensor in group.made.items() if value in needed}
    kept |= {op.output for op in group.ops if op.kind is OpKind.UNKNOWN}
    local = {op.output for op in group.ops} - kept
    touched = dict.fromkeys(tensor for op in group.ops for tensor in (*op.inputs, *op.weights, op.output))
    placement = tuple((tensor, Memory.LOCAL if tensor in local else Memory.DRAM) for tensor in touched)
    return Kernel(group.name, tuple(group.ops), placement, element_size)
