"""Shared memory that the input has in the first phase of a Hopper kernel of the MBConv block, and in the second one the
output and the stages of the projection's weights."""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusion.planner.slabs import WIDEST
from fusion.triton_kernels.hopper_layouts import rows_layout
from fusion.triton_kernels.mbconv_hopper_spec import Spec

UNIT_ROWS = gl.constexpr(8)
UNIT_COLUMNS = gl.constexpr(WIDEST)
"""Of the pattern of the widest swizzle, a unit of the room: what everything in it starts at multiples of."""
UNIT_ELEMENTS = 8 * WIDEST


@dataclass(frozen=True)
class RoomSpec:
    """Constants of the two phases, `produced` of the first one and `projected` of the rest, and the room's size."""

    produced: Spec
    projected: Spec
    room_elements: int

    @property
    def room_units(self) -> int:
        return self.room_elements // UNIT_ELEMENTS

    def input_unit(self, slab: int) -> int:
        """Where a slab of the input starts, in the room's units."""
        return sum(self.produced.in_slabs[:slab]) * self.produced.pixels // UNIT_ELEMENTS

    def output_unit(self, slab: int) -> int:
        """Where a slab of the output starts; the one after the last is where weights start."""
        return sum(self.projected.out_slabs[:slab]) * self.projected.pixels // UNIT_ELEMENTS

    def weights_unit(self, product: int) -> int:
        """Where the stages of a product's weights start."""
        columns = sum(self.projected.products[:product])
        elements = self.projected.stages * self.projected.step * columns
        return self.output_unit(len(self.projected.out_slabs)) + elements // UNIT_ELEMENTS


@gluon.jit
def new_room(dtype: gl.constexpr, D: gl.constexpr):
    return gl.allocate_shared_memory(dtype, [D.room_units, UNIT_ROWS, UNIT_COLUMNS], rows_layout(UNIT_COLUMNS))


@gluon.jit
def placed(
    room, UNIT: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr
):
    """[count, rows, columns] from a unit of the room on."""
    return room.index(UNIT)._reinterpret(room.dtype, [COUNT, ROWS, COLUMNS], LAYOUT)


@gluon.jit
def inputs_of(room, D: gl.constexpr):
    """Slabs of the input, [pieces, pixels of a piece, slab] each."""
    S: gl.constexpr = D.produced
    xs = ()
    for s in gl.static_range(len(S.in_slabs)):
        slab = placed(room, D.input_unit(s), S.pieces, S.piece_pixels, S.in_slabs[s], rows_layout(S.in_slabs[s]))
        xs = xs + (slab,)
    return xs


@gluon.jit
def outputs_of(room, D: gl.constexpr):
    """Slabs of the output, [1, pixels, slab] each."""
    S: gl.constexpr = D.projected
    outs = ()
    for s in gl.static_range(len(S.out_slabs)):
        slab = placed(room, D.output_unit(s), 1, S.pixels, S.out_slabs[s], rows_layout(S.out_slabs[s]))
        outs = outs + (slab,)
    return outs


@gluon.jit
def weights_of(room, D: gl.constexpr):
    """Stages of the projection's weights, [stages, rows, 64] for each product."""
    S: gl.constexpr = D.projected
    vs = ()
    for s in gl.static_range(len(S.products)):
        stages = placed(room, D.weights_unit(s), S.stages, S.step * S.products[s] // 64, 64, rows_layout(64))
        vs = vs + (stages,)
    return vs
