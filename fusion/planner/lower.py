"""Lowering: from a block's graph to candidate tensor-machine programs, by structure alone."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from fusion.planner.graph import BlockGraph, Op, OpKind, Tensor
from fusion.planner.program import Kernel, Loop, Memory, Program


def layerwise(graph: BlockGraph) -> Program:
    """One kernel per op that costs OPs, every tensor between kernels in DRAM (figures 7a and 10).

    Free ops join the kernel of the costed op before them. For blur-pool and concatenation that makes the program a
    bound: an engine that runs them as kernels of their own moves more.
    """
    groups: list[list[Op]] = []
    for op in graph.ops:
        if not groups or (op.ops_count and any(earlier.ops_count for earlier in groups[-1])):
            groups.append([])
        groups[-1].append(op)
    kernels = []
    for group in groups:
        placement = _placement(graph, group)
        output = group[-1].output
        dims = "NHW" if output.layout == "NHWC" else output.layout
        partition = Loop(output.name, tuple((dim, None) for dim in dims), _streams(placement, group))
        name = next((op.name for op in group if op.ops_count), group[0].name)
        kernels.append(Kernel(name, tuple(group), tuple(placement.items()), graph.element_size, partition))
    return Program("layerwise", graph, tuple(kernels))


def block_fused(
    graph: BlockGraph, pixel_tile: tuple[int, int] | None = None, hidden_tile: int | None = None
) -> Program:
    """The whole block as one kernel; only its inputs, weights and outputs are in DRAM.

    The hidden channels are those that the last channels-mode product contracts and an earlier dense op made.

    - When no op works across the pixels of the hidden channels (FFN, ConvFirst: figure 7b), processors divide the
      output's pixels in tiles of ``pixel_tile`` = (height, width), and each loops over the hidden channels,
      ``hidden_tile`` at a time.
    - Otherwise (MBConv: figure 11) processors divide the hidden channels in groups of ``hidden_tile``, each at full
      height and width. Whatever is summed over all hidden channels, like the squeeze vector, is summed in global
      memory.

    Tile sizes left out stay open in the program. OPs that a kernel has to repeat where the pixel tiles overlap (only a
    block that looks across pixels more than once has any, such as ConvFirst of stride 2) are not counted. Raises
    ValueError when the block cannot be divided that way.
    """
    hidden = _hidden_ops(graph)
    if any(_works_across_pixels(op) for op in hidden):
        if pixel_tile is not None:
            raise ValueError(
                f"{graph.name!r} was given pixel_tile={pixel_tile}, but its processors take hidden channels at full "
                "height and width; give hidden_tile only"
            )
        return _fused_over_channels(graph, hidden, hidden_tile)
    if any(op.kind is OpKind.GLOBAL_AVERAGE_POOL for op in graph.ops):
        raise ValueError(
            f"{graph.name!r} pools over pixels outside of hidden channels; use the layerwise program, or pool_fused"
        )
    if not hidden and hidden_tile is not None:
        raise ValueError(f"{graph.name!r} was given hidden_tile={hidden_tile}, but has no hidden channels; omit it")
    return _fused_over_pixels(graph, hidden, pixel_tile, hidden_tile)


def scaled(
    graph: BlockGraph, processors: int = 2, pixel_tile: tuple[int, int] | None = None, hidden_tile: int | None = None
) -> Program:
    """The whole block as one kernel, for more channels than one processor can hold (figure 7c).

    Processors divide the output's pixels as in `block_fused`, but each tile is that of ``processors`` of them, which
    divide its input and its output channels. From its input channels each makes partial sums of the hidden channels,
    ``hidden_tile`` at a time; they are added in global memory, from where each takes the sums of all, and projects them
    onto its output channels.

    Raises ValueError for a block without hidden channels, for one whose hidden channels depend on each other across
    pixels (MBConv), and for channels or groups that do not divide evenly.
    """
    if not isinstance(processors, int) or processors < 2:
        raise ValueError(f"cannot divide the channels of {graph.name!r} over processors={processors!r}; use 2, 4, ...")
    hidden = _hidden_ops(graph)
    if not hidden:
        raise ValueError(f"{graph.name!r} has no hidden channels that processors could add up; use the fused program")
    ahead = graph.ops[: graph.ops.index(hidden[0])]
    if any(_works_across_pixels(op) for op in hidden) or any(op.is_dense for op in ahead):
        raise ValueError(
            f"{graph.name!r} needs whole sums elsewhere than between its input and its hidden channels, such as those "
            "of squeeze-and-excitation; use the fused program"
        )
    if any(op.kind is OpKind.GLOBAL_AVERAGE_POOL for op in graph.ops):
        raise ValueError(f"{graph.name!r} pools over pixels outside of hidden channels; use the layerwise program")
    for tensor in (*graph.inputs, *graph.outputs):
        if tensor["C"] % processors:
            raise ValueError(
                f"{graph.name!r}: the channels of {tensor} do not divide over {processors} processors; use another "
                "number of processors"
            )
    for op in ahead:
        if op.kind is OpKind.CONV and op.inputs[0]["C"] // processors % op.group_width:
            raise ValueError(
                f"{graph.name!r}: {processors} processors split a group of {op.name!r}, whose group width is "
                f"{op.group_width}; use fewer processors"
            )
    (kernel,) = _fused_over_pixels(graph, hidden, pixel_tile, hidden_tile).kernels
    placement = {**dict(kernel.placement), hidden[0].output: Memory.GLOBAL}
    share = ("C", graph.outputs[0]["C"] // processors)
    partition = replace(kernel.partition, dims=(*kernel.partition.dims, share))
    return _single_kernel(graph, placement, partition, kernel.loops, "scaled")


def two_pass(graph: BlockGraph, pixel_tile: tuple[int, int] | None = None, hidden_tile: int | None = None) -> Program:
    """The block as two kernels that meet where something is summed over all hidden channels, like a squeeze vector.

    The first kernel runs all ops up to that sum: processors divide pixels, in tiles of ``pixel_tile`` = (height,
    width), and hidden channels, ``hidden_tile`` at a time. The second one runs the rest: processors divide pixels, and
    each loops over all hidden channels. Tensors between the two are in global memory: only the block's inputs, weights
    and outputs are in DRAM, but what both kernels read, such as the input of a residual, is read twice.

    Tile sizes left out stay open, and OPs that are repeated where pixel tiles overlap are not counted, as in
    `block_fused`. Raises ValueError for a block that sums nothing over its hidden channels before the last product.
    """
    first, second, y = _phases(graph, hidden_tile)
    weights = tuple(weight.name for op in second for weight in op.weights)
    height, width = pixel_tile or (None, None)
    produced = (("N", 1), ("H", height), ("W", width), ("C", hidden_tile))
    projected = (("N", 1), ("H", None), ("W", None))
    walk = Loop(y.name, (("C", None),), weights)
    kernels = (
        _pass(graph, "produce", first, Loop(y.name, produced), ()),
        _pass(graph, "project", second, Loop(graph.outputs[0].name, projected), (walk,)),
    )
    return Program("two-pass", graph, kernels)


def image_fused(graph: BlockGraph, hidden_tile: int | None = None, in_local_memory: bool = False) -> Program:
    """The block as one kernel whose processors divide the images, each with all hidden channels of its own.

    So what is summed over all hidden channels, like a squeeze vector, stays in local memory. A processor walks over the
    hidden channels, ``hidden_tile`` at a time, and leaves them in global memory, or ``in_local_memory``, from where it
    takes them again when that sum is complete. Only the block's inputs, weights and outputs are in DRAM. How many
    images a processor has stays open.

    Raises ValueError for a block that sums nothing over its hidden channels before the last product.
    """
    _, _, y = _phases(graph, hidden_tile)
    hidden = _hidden_ops(graph)
    placement = {**_placement(graph, graph.ops), y: Memory.LOCAL if in_local_memory else Memory.GLOBAL}
    walk = Loop(
        hidden[0].output.name, (("C", hidden_tile),), tuple(weight.name for op in hidden for weight in op.weights)
    )
    streams = tuple(name for name in _streams(placement, graph.ops) if name not in walk.streams)
    return _single_kernel(graph, placement, Loop(graph.outputs[0].name, (("N", None),), streams), (walk,))


def pool_fused(graph: BlockGraph, images: int | None = None, channel_tile: int | None = None) -> Program:
    """A block that ends in a global average pool as one kernel; what it pools is in local memory only.

    Processors divide images, in groups of ``images``, and output channels, ``channel_tile`` at a time. Each walks over
    its images' pixels. Tile sizes left out stay open. Raises ValueError for a block that does not end in a pool, or
    looks across pixels before.
    """
    *ops, pool = graph.ops
    if pool.kind is not OpKind.GLOBAL_AVERAGE_POOL or not ops:
        raise ValueError(f"{graph.name!r} does not end in a global average pool; use the fused program")
    if any(op.is_spatial_conv or op.kind in (OpKind.BLURPOOL, OpKind.GLOBAL_AVERAGE_POOL) for op in ops):
        raise ValueError(f"{graph.name!r} looks across pixels ahead of its pool; use the layerwise program")
    placement = _placement(graph, graph.ops)
    streams = _streams(placement, graph.ops)
    pixels = tuple(name for name in streams if name in {tensor.name for tensor in graph.inputs})
    weights = tuple(name for name in streams if name not in pixels)
    partition = Loop(pool.output.name, (("N", images), ("C", channel_tile)), weights)
    walk = Loop(pool.inputs[0].name, (("N", 1), ("H", None), ("W", None)), pixels)
    return _single_kernel(graph, placement, partition, (walk,))


def _phases(graph: BlockGraph, hidden_tile: int | None) -> tuple[tuple[Op, ...], tuple[Op, ...], Tensor]:
    """The ops up to the first sum over all hidden channels, those after it, and the hidden tensor that both need."""
    hidden = _hidden_ops(graph)
    split = next((op for op in _channel_sums(hidden) if op is not hidden[-1]), None)
    if split is None:
        raise ValueError(
            f"{graph.name!r} sums nothing over its hidden channels before the last product; use the fused program"
        )
    if hidden_tile is not None:
        _check_groups(hidden, hidden_tile)
    position = graph.ops.index(split) + 1
    first, second = graph.ops[:position], graph.ops[position:]
    y = next(tensor for op in second for tensor in op.inputs if tensor.layout == "NHWC" and tensor not in graph.inputs)
    return first, second, y


def _pass(graph: BlockGraph, name: str, ops: tuple[Op, ...], partition: Loop, loops: tuple[Loop, ...]) -> Kernel:
    """One of several kernels that leave each other tensors in global memory."""
    placement = _placement(graph, ops)
    for tensor, memory in placement.items():
        is_between = graph.producer(tensor) is not None and tensor not in graph.outputs
        if memory is Memory.DRAM and is_between:
            placement[tensor] = Memory.GLOBAL
    in_loops = {stream for loop in loops for stream in loop.streams}
    streams = tuple(stream for stream in _streams(placement, ops) if stream not in in_loops)
    partition = replace(partition, streams=streams)
    return Kernel(name, ops, tuple(placement.items()), graph.element_size, partition, loops)


def _fused_over_pixels(
    graph: BlockGraph, hidden: tuple[Op, ...], pixel_tile: tuple[int, int] | None, hidden_tile: int | None
) -> Program:
    placement = _placement(graph, graph.ops)
    loops = ()
    if hidden:
        weights = tuple(weight.name for op in hidden for weight in op.weights)
        loops = (Loop(hidden[0].output.name, (("C", hidden_tile),), weights),)
    in_loops = {name for loop in loops for name in loop.streams}
    streams = tuple(name for name in _streams(placement, graph.ops) if name not in in_loops)
    height, width = pixel_tile or (None, None)
    partition = Loop(graph.outputs[0].name, (("N", 1), ("H", height), ("W", width)), streams)
    return _single_kernel(graph, placement, partition, loops)


def _fused_over_channels(graph: BlockGraph, hidden: tuple[Op, ...], hidden_tile: int | None) -> Program:
    placement = _placement(graph, graph.ops)
    for op in _channel_sums(hidden):
        if placement[op.output] is Memory.LOCAL:
            placement[op.output] = Memory.GLOBAL
    if hidden_tile is not None:
        _check_groups(hidden, hidden_tile)
    partition = Loop(hidden[0].output.name, (("N", 1), ("C", hidden_tile)), _streams(placement, graph.ops))
    return _single_kernel(graph, placement, partition, ())


def _channel_sums(hidden: tuple[Op, ...]) -> list[Op]:
    """The hidden ops that leave partial sums where processors divide the hidden channels.

    Channel groups travel through the block as columns and rows of a matrix product do: a dense op that reads whole
    tensors leaves its output divided, one that reads divided tensors leaves partial sums of the whole.
    """
    divided: set[Tensor] = set()
    sums = []
    for op in hidden:
        reads_divided = not divided.isdisjoint(op.inputs)
        if op.is_dense and reads_divided:
            sums.append(op)
        elif op.is_dense or reads_divided:
            divided.add(op.output)
    return sums


def _check_groups(hidden: tuple[Op, ...], hidden_tile: int) -> None:
    for op in hidden:
        if op.kind is OpKind.CONV and not op.is_dense and hidden_tile % op.group_width:
            raise ValueError(
                f"hidden_tile={hidden_tile} splits a group of {op.name!r}; use a multiple of {op.group_width}"
            )


def _single_kernel(
    graph: BlockGraph,
    placement: Mapping[Tensor, Memory],
    partition: Loop,
    loops: tuple[Loop, ...],
    name: str = "fused",
) -> Program:
    kernel = Kernel(graph.name, graph.ops, tuple(placement.items()), graph.element_size, partition, loops)
    return Program(name, graph, (kernel,))


def _placement(graph: BlockGraph, ops: Iterable[Op]) -> dict[Tensor, Memory]:
    """Home of each tensor that a kernel running ``ops`` touches: LOCAL if nothing outside needs it, else DRAM."""
    ops = tuple(ops)
    made_here = {op.output for op in ops}
    placement = {}
    for tensor in dict.fromkeys(t for op in ops for t in (*op.inputs, *op.weights, op.output)):
        needed_elsewhere = tensor in graph.outputs or any(op not in ops for op in graph.consumers(tensor))
        is_local = tensor in made_here and not needed_elsewhere
        placement[tensor] = Memory.LOCAL if is_local else Memory.DRAM
    return placement


def _streams(placement: Mapping[Tensor, Memory], ops: Iterable[Op]) -> tuple[str, ...]:
    made_here = {op.output for op in ops}
    return tuple(t.name for t, memory in placement.items() if memory is Memory.DRAM and t not in made_here)


def _hidden_ops(graph: BlockGraph) -> tuple[Op, ...]:
    """The ops from the one that makes the hidden channels to the one that contracts them; empty if there are none."""
    project = next((op for op in reversed(graph.ops) if op.is_pointwise), None)
    if project is None:
        return ()
    op = graph.producer(project.inputs[0])
    while op is not None and not op.is_dense:
        op = graph.producer(op.inputs[0])
    if op is None:
        return ()
    return graph.ops[graph.ops.index(op) : graph.ops.index(project) + 1]


def _works_across_pixels(op: Op) -> bool:
    # The op that makes the hidden channels may look at a neighbourhood of the block's input: it is dense.
    across = op.is_spatial_conv or op.kind in (OpKind.BLURPOOL, OpKind.GLOBAL_AVERAGE_POOL)
    return across and not op.is_dense
