"""Blocks by the layers that they are made of: a table of patterns, and what is built of each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import fx

from fusion import reference
from fusion.down_modules import FusedConvFirstDown, FusedMBConvDown
from fusion.edge_modules import FusedHead, FusedStem
from fusion.edge_weights import HeadWeights, StemWeights
from fusion.ffn_weights import FfnWeights
from fusion.frontend.layer_graph import LayerGraph
from fusion.frontend.layers import Activation, BatchNorm, Concat, Conv, GlobalPool, Multiply, Pad, Reshape
from fusion.frontend.residual import take_residual
from fusion.frontend.squeeze_excite import Gate, Vector, VectorWalk, take_gate
from fusion.frontend.walk import Affine, Walk
from fusion.mbconv_weights import MBConvWeights
from fusion.modules import FusedBlock, FusedConvFirst, FusedFfn, FusedMBConv, Tuner
from fusion.planner.mbconv_down_tile import why_kernel_unsupported
from fusion.planner.mbconv_tile import why_kernel_size_unsupported
from fusion.planner.stem_tile import MAX_IN_CHANNELS
from fusion.weights import ConvFirstWeights

KERNEL_SIZE = 3
"""Of the spatial convolutions of stems and ConvFirst blocks."""
NO_GATE = "it has no squeeze-and-excitation (mean, two linear layers or 1x1 convolutions, gate) that is supported"
OTHER_BLUR = (
    "what is padded in it is not the blur-pool that is supported: [1, 2, 1] / 4 in each direction, stride 2, "
    "reflection padding 1"
)


@dataclass(frozen=True)
class Candidate:
    """Nodes with the structure of a block: `build` makes its twin, if nothing in the walk's problems is against it."""

    kind: str
    walk: Walk
    input: fx.Node
    output: fx.Node
    build: Callable[[Tuner], FusedBlock]


def convfirst(graph: LayerGraph, anchor: fx.Node) -> Candidate | None:
    """Spatial convolution, expand, activation, project, maybe a residual (section 5.3); with stride 2 the convolution's
    input and output are concatenated and blur-pooled, or the convolution itself has the stride.

    A dense convolution is a block of one group; such layers are common, so none is reported as left alone.
    """
    if not _is_spatial(graph, anchor):
        return None
    walk = Walk(graph)
    conv = _spatial(walk, anchor)
    _check_kernel(walk, conv, _why_not_three)
    _check_groups(walk, conv)
    x = conv.layer.x
    value, concat = conv.value, walk.follow(conv.value, "concatenation", Concat)
    if concat is not None:
        if not _is_concat_of(graph, concat, x, conv.value):
            return None
        value = _blur(walk, concat)
        if value is None and not _is_dense(graph, conv) and _other_blur(walk, concat):
            walk.problems.append(OTHER_BLUR)
            return Candidate("ConvFirst", walk, x, concat, _refuse)
        if value is None:
            return None
        if conv.layer.stride != (1, 1):
            walk.problems.append("its convolution has a stride, and a blur-pool follows; supported is one of the two")
    expand = walk.pointwise(value, "expansion")
    act = None if expand is None else walk.follow(expand.value, "expansion", Activation)
    project = None if act is None else walk.pointwise(act, "projection", alone=True)
    if project is None or (_is_dense(graph, conv) and walk.problems):
        return None
    activation = walk.activation(act, "expansion", reference.ACTIVATIONS)
    may_add = concat is None and conv.layer.stride == (1, 1)
    branch = take_residual(walk, project, x, may_add)

    def build(tuner: Tuner) -> FusedBlock:
        weights = ConvFirstWeights.of(walk.fold(conv), walk.fold(expand), walk.fold(branch.project))
        if concat is not None:
            return FusedConvFirstDown(weights, activation=activation, tuner=tuner)
        options = {"activation": activation, "residual": branch.residual, "stride": conv.layer.stride[0]}
        return FusedConvFirst(weights, **options, tuner=tuner)

    return Candidate("ConvFirst", walk, branch.input, branch.output, build)


def mbconv(graph: LayerGraph, anchor: fx.Node) -> Candidate | None:
    """Expand, activation, spatial convolution, activation, maybe a blur-pool, squeeze-and-excitation, project, maybe a
    residual (section 5.4).

    Of a grouped convolution with some of these layers around it what is missing is a problem, from expansion and
    activation on or from squeeze-and-excitation on.
    """
    if not _is_spatial(graph, anchor):
        return None
    walk = Walk(graph)
    conv = _spatial(walk, anchor)
    _check_groups(walk, conv)
    act = walk.follow(conv.value, "spatial convolution", Activation)
    if act is None:
        return None
    expansion = _expansion(walk, conv)
    hidden = graph.weight_shape(conv.layer.weight)[0]
    value = _blur(walk, act, optional=True)
    has_blur, stride = value is not act, conv.layer.stride[0]
    _check_kernel(walk, conv, partial(why_kernel_unsupported, blur=True) if has_blur else why_kernel_size_unsupported)
    gate = take_gate(walk, value, hidden)
    project = walk.pointwise(value if gate is None else gate.product, "projection", alone=True)
    is_whole = None not in (expansion, gate, project)
    if (gate is None and expansion is None) or (_is_dense(graph, conv) and (walk.problems or not is_whole)):
        return None
    x = conv.layer.x if expansion is None else expansion.affine.layer.x
    _note_missing(walk, value, expansion, gate, project)
    if not is_whole:
        return Candidate("MBConv", walk, x, value if project is None else project.value, _refuse)
    activation = walk.activation(act, "spatial convolution", reference.ACTIVATIONS)
    _check_activations(walk, activation, expansion, gate)
    if has_blur and stride != 1:
        walk.problems.append("its convolution has a stride, and a blur-pool follows; supported is one of the two")
    branch = take_residual(walk, project, x, may_add=not has_blur and conv.layer.stride == (1, 1))

    def build(tuner: Tuner) -> FusedBlock:
        layers = expansion.affine, conv, gate.squeeze, gate.excite, branch.project
        weights = MBConvWeights.of(*map(walk.fold, layers))
        options = {"activation": activation, "squeeze_activation": graph.layer(gate.squeeze_activation).name}
        if has_blur or stride == 2:
            return FusedMBConvDown(weights, **options, blur=has_blur, tuner=tuner)
        return FusedMBConv(weights, **options, residual=branch.residual, tuner=tuner)

    return Candidate("MBConv", walk, branch.input, branch.output, build)


def ffn(graph: LayerGraph, anchor: fx.Node) -> Candidate | None:
    """1x1 convolution to more channels, activation, 1x1 convolution to fewer, maybe a residual (section 5.2)."""
    if not graph.is_pointwise(anchor):
        return None
    walk = Walk(graph)
    expand = walk.pointwise_at(anchor, "expansion")
    act = walk.follow(expand.value, "expansion", Activation)
    project = None if act is None else walk.pointwise(act, "projection", alone=True)
    if project is None or isinstance(graph.layer(graph.origin(expand.layer.x)), GlobalPool | Reshape):
        return None
    hidden, channels = graph.weight_shape(expand.layer.weight)[:2]
    if hidden <= max(channels, graph.weight_shape(project.layer.weight)[0]):
        return None
    activation = walk.activation(act, "expansion", reference.ACTIVATIONS)
    branch = take_residual(walk, project, expand.layer.x, may_add=True)

    def build(tuner: Tuner) -> FusedBlock:
        weights = FfnWeights.of(walk.fold(expand), walk.fold(branch.project))
        return FusedFfn(weights, activation=activation, residual=branch.residual, tuner=tuner)

    return Candidate("FFN", walk, branch.input, branch.output, build)


def stem(graph: LayerGraph, anchor: fx.Node) -> Candidate | None:
    """Dense 3x3 convolution of stride 2 of an image of few channels, maybe an activation."""
    conv = graph.layer(anchor)
    if not isinstance(conv, Conv) or (conv.groups, conv.stride) != (1, (2, 2)):
        return None
    shape = graph.weight_shape(conv.weight)
    if shape is None or shape[2:] != (KERNEL_SIZE, KERNEL_SIZE) or shape[1] > MAX_IN_CHANNELS:
        return None
    walk = Walk(graph)
    conv = _spatial(walk, anchor, alone=True)
    act = walk.follow(conv.value, "convolution", Activation, alone=True)
    activation = "none" if act is None else walk.activation(act, "convolution", reference.EDGE_ACTIVATIONS)

    def build(tuner: Tuner) -> FusedBlock:
        return FusedStem(StemWeights.of(walk.fold(conv)), activation=activation, tuner=tuner)

    return Candidate("stem", walk, conv.layer.x, act or conv.value, build)


def head(graph: LayerGraph, anchor: fx.Node) -> Candidate | None:
    """1x1 convolution, maybe an activation, global average pool to `[N, K]`."""
    if not graph.is_pointwise(anchor):
        return None
    walk = Walk(graph)
    conv = walk.pointwise_at(anchor, "convolution")
    act = walk.follow(conv.value, "convolution", Activation)
    value = act or conv.value
    pool = walk.follow(value, "pool", GlobalPool)
    # A gate's map is no head's.
    if pool is None or any(isinstance(graph.layer(use.node), Multiply) for use in graph.uses(value)):
        return None
    activation = "none" if act is None else walk.activation(act, "convolution", reference.EDGE_ACTIVATIONS)
    output = pool
    if graph.layer(pool).keepdim:
        pooled = Vector(pool, graph.weight_shape(conv.layer.weight)[0], 2)
        flat = VectorWalk(walk, value, pooled.channels).flattened(pooled)
        if flat is None:
            walk.problems.append("its pooled channels stay [N, K, 1, 1]; supported is [N, K], flatten them")
        else:
            output = flat.node

    def build(tuner: Tuner) -> FusedBlock:
        return FusedHead(HeadWeights.of(walk.fold(conv)), activation=activation, tuner=tuner)

    return Candidate("head", walk, conv.layer.x, output, build)


Pattern = Callable[[LayerGraph, fx.Node], Candidate | None]

PATTERNS: tuple[tuple[Pattern, ...], ...] = ((convfirst, mbconv), (ffn,), (stem,), (head,))
"""Each is given every convolution. What one of a row has claimed is not looked at by the rows after it."""


@dataclass(frozen=True)
class Expansion:
    """The 1x1 convolution ahead of a spatial one, and its activation."""

    affine: Affine
    activation: fx.Node


def _is_spatial(graph: LayerGraph, node: fx.Node) -> bool:
    conv = graph.layer(node)
    if not isinstance(conv, Conv) or graph.is_blur(node):
        return False
    shape = graph.weight_shape(conv.weight)
    return shape is not None and len(shape) == 4 and shape[2:] != (1, 1)


def _is_dense(graph: LayerGraph, conv: Affine) -> bool:
    return conv.layer.groups == 1 and graph.weight_shape(conv.layer.weight)[1] > 1


def _spatial(walk: Walk, node: fx.Node, alone: bool = False) -> Affine:
    """Take a convolution and its batch norm, and note what is not supported about it."""
    affine = walk.affine(node, "spatial convolution", alone)
    conv, problems = affine.layer, walk.problems
    kernel = walk.graph.weight_shape(conv.weight)[2:]
    if conv.dilation != (1, 1):
        problems.append(f"its spatial convolution has dilation {conv.dilation}, supported is 1")
    if conv.stride not in ((1, 1), (2, 2)):
        problems.append(f"its spatial convolution has stride {conv.stride}, supported are 1 and 2")
    if isinstance(pad := walk.graph.layer(walk.graph.origin(conv.x)), Pad):
        problems.append(
            f"its spatial convolution is padded by a layer ahead of it ({pad.mode}), supported is zero padding"
        )
    elif conv.padding_mode != "zeros":
        problems.append(f"its spatial convolution has padding mode {conv.padding_mode!r}, supported is 'zeros'")
    elif conv.padding != tuple(size // 2 for size in kernel):
        problems.append(
            f"its spatial convolution has padding {conv.padding}, supported is half the kernel size, "
            f"{tuple(size // 2 for size in kernel)}"
        )
    return affine


def _check_kernel(walk: Walk, conv: Affine, why_unsupported: Callable[[int], str | None]) -> None:
    """Note if a convolution's kernel is no square of a size that is supported."""
    rows, columns = walk.graph.weight_shape(conv.layer.weight)[2:]
    reason = (
        f"kernel size {rows}x{columns} is not supported, use a square one" if rows != columns else why_unsupported(rows)
    )
    if reason is not None:
        walk.problems.append(reason)


def _why_not_three(kernel_size: int) -> str | None:
    return None if kernel_size == KERNEL_SIZE else f"kernel size {kernel_size} is not supported, use {KERNEL_SIZE}"


def _check_groups(walk: Walk, conv: Affine) -> None:
    """Note if a convolution's groups have more or fewer channels out than in."""
    out_channels, group_width = walk.graph.weight_shape(conv.layer.weight)[:2]
    out_width = out_channels // conv.layer.groups
    if out_width != group_width:
        walk.problems.append(
            f"the groups of its spatial convolution have {group_width} channels in and {out_width} out, supported are "
            "as many out as in"
        )


def _blur(walk: Walk, value: fx.Node, optional: bool = False) -> fx.Node | None:
    """Take a blur-pool: its output, or `value` if there is none and it is optional, else None."""
    graph = walk.graph
    for use in graph.uses(value):
        if isinstance(graph.layer(use.node), Pad):
            conv = next((each.node for each in graph.uses(use.node) if graph.is_blur(each.node)), None)
            if conv is not None:
                pad = walk.take_use(value, "blur-pool", use)
                conv = walk.follow(pad, "blur-pool", Conv)
                walk.take("blur-pool", *graph.derivation(graph.layer(conv).weight))
                return conv
    return value if optional else None


def _other_blur(walk: Walk, value: fx.Node) -> bool:
    """Whether a value is padded, as for a blur-pool of another kind, which is taken then."""
    pad = walk.follow(value, "blur-pool", Pad)
    if pad is not None:
        walk.follow(pad, "blur-pool", Conv)
    return pad is not None


def _is_concat_of(graph: LayerGraph, concat: fx.Node, x: fx.Node, y: fx.Node) -> bool:
    """Whether a node concatenates the channels of `x` and then those of `y`."""
    layer = graph.layer(concat)
    return len(layer.tensors) == 2 and layer.x is x and graph.origin(layer.tensors[1]) is y and layer.dim in (1, -3)


def _expansion(walk: Walk, conv: Affine) -> Expansion | None:
    """Take the activation and the 1x1 convolution, with its batch norm, ahead of a spatial convolution."""
    graph = walk.graph
    node = graph.origin(conv.layer.x)
    padded = isinstance(graph.layer(node), Pad)
    if padded:
        pad, node = node, graph.origin(graph.layer(node).x)
    if not isinstance(act := graph.layer(node), Activation):
        return None
    chain = graph.aliases(act.x)
    if isinstance(norm := graph.layer(chain[-1]), BatchNorm):
        chain = (*chain, *graph.aliases(norm.x))
    if not graph.is_pointwise(chain[-1]):
        return None
    expand = walk.pointwise_at(chain[-1], "expansion")
    walk.take("expansion", *chain, node, *graph.aliases(conv.layer.x))
    if padded:
        walk.take("padding", pad, *graph.aliases(graph.layer(pad).x))
    return Expansion(expand, node)


def _note_missing(
    walk: Walk, value: fx.Node, expansion: Expansion | None, gate: Gate | None, project: Affine | None
) -> None:
    """What there is not around the spatial convolution, `value` being its activation, or a blur-pool's result.

    Ahead of other problems, for it cannot be helped by another choice of sizes."""
    missing = []
    if expansion is None:
        missing.append("it has no expansion (1x1 convolution and activation) ahead of its spatial convolution")
    if gate is None:
        missing.append(OTHER_BLUR if _other_blur(walk, value) else NO_GATE)
    elif project is None:
        missing.append("it has no projection, a 1x1 convolution of what is gated")
    walk.problems[:0] = missing


def _check_activations(walk: Walk, activation: str, expansion: Expansion, gate: Gate) -> None:
    graph = walk.graph
    first = graph.layer(expansion.activation).name
    if first != activation:
        walk.problems.append(
            f"it has two different activations, {first!r} after its expansion and {activation!r} after its spatial "
            "convolution; supported is one"
        )
    walk.activation(gate.squeeze_activation, "squeeze layer", reference.SQUEEZE_ACTIVATIONS)
    walk.activation(gate.gate_activation, "excitation layer", ("sigmoid",))


def _refuse(tuner: Tuner) -> FusedBlock:
    raise AssertionError("a block of which something is missing has no twin")
