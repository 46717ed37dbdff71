"""The end of a block in a graph: layer scale and residual."""

from dataclasses import dataclass

from torch import fx

from fusion.frontend.layers import Add
from fusion.frontend.walk import Affine, Walk


@dataclass(frozen=True)
class Branch:
    """A block from its projection on: what it takes, what it gives, and whether that is added."""

    project: Affine
    input: fx.Node
    output: fx.Node
    residual: bool


def take_residual(walk: Walk, project: Affine, x: fx.Node, may_add: bool) -> Branch:
    """Take a product with a constant for each channel after a projection, and the sum with the block's input `x`.

    A sum in which taking part is not safe stays outside of the block.
    """
    project = walk.scale(project)
    without = Branch(project, x, project.value, False)
    graph = walk.graph
    uses = graph.uses(project.value)
    if not may_add or len(uses) != 1 or not isinstance(layer := graph.layer(uses[0].node), Add):
        return without
    if graph.weight_shape(project.layer.weight)[0] != _channels_in(walk):
        return without
    branch = (project.value, *uses[0].aliases)
    skip = layer.other if layer.x is branch[-1] else layer.x
    if skip is branch[-1] or graph.origin(skip) is not graph.origin(x):
        return without
    aliases, taken = (), x
    if skip is not x:
        # The block takes what both are aliases of, and these with it, if they serve for nothing else.
        taken = graph.origin(x)
        aliases = tuple(each for each in (*graph.aliases(x), *graph.aliases(skip)) if each is not taken)
        inside = {*walk.parts, *aliases, uses[0].node}
        if any(user not in inside for each in aliases for user in each.users):
            return without
    if layer.in_place and layer.x is not branch[-1] and not _may_be_overwritten(walk, taken, uses[0].node, aliases):
        return without
    output = walk.take_use(project.value, "residual", uses[0])
    walk.take("input", *aliases)
    return Branch(project, taken, output, True)


def _channels_in(walk: Walk) -> int:
    """Of the block's first layer."""
    first = min(walk.affine_nodes, key=walk.graph.position.__getitem__)
    layer = walk.graph.layer(first)
    return walk.graph.weight_shape(layer.weight)[1] * layer.groups


def _may_be_overwritten(walk: Walk, x: fx.Node, add: fx.Node, aliases: tuple[fx.Node, ...]) -> bool:
    """Whether nothing else can see that a sum in place changes a block's input: it is no input of the model and no
    constant, and what shares its memory has no users after the sum."""
    graph = walk.graph
    for node in graph.memory.sharing(x, without=add):
        if node.op in ("placeholder", "get_attr"):
            return False
        users = [user for user in node.users if user is not add and user not in walk.parts and user not in aliases]
        if any(graph.position[user] > graph.position[add] for user in users):
            return False
    return True
