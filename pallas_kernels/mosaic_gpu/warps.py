"""What a warp or a thread does for itself, which Pallas has no words for.

The least unit of Pallas is a warpgroup. Every warp has WARP_ROWS rows of a tile in its registers.
These functions are written in Mosaic GPU itself. Interpreted, each is what its docstring says, for
the whole warpgroup: that proves the mathematics around it, and cross-lowering on a CPU that it
compiles; what a single warp does only a GPU shows.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, nvvm, vector

from pallas_kernels.mosaic_gpu import launch
from pallas_kernels.mosaic_gpu.common import OF_ROWS, ROWS, TILE

#: Rows of ROWS that a warp has.
WARP_ROWS = 16

_SCALAR = plgpu.ShapeDtypeStruct((), jnp.int32, layout=TILE)


def bits(first, each):
    """An int32 with the bits of the rows of this warp; interpreted, of this warpgroup.

    A branch that depends on it is taken by some warps and not by others: nothing in it may concern
    the whole warpgroup.

    Args:
      first: the bit of row 0 of the warpgroup.
      each: how many rows share a bit, a power of two.
    """
    if launch.is_interpreted():
        return jax.lax.shift_left(jnp.int32((1 << ROWS // each) - 1), first)

    @plgpu.inline_mgpu(return_type=_SCALAR)
    def number(ctx):
        del ctx
        return mgpu.FragmentedArray.splat(mgpu.utils.warp_idx(), (), is_signed=True)

    first_row = jax.lax.rem(number(), ROWS // WARP_ROWS) * WARP_ROWS
    count = max(WARP_ROWS // each, 1)
    return jax.lax.shift_left(jnp.int32((1 << count) - 1), first + jax.lax.div(first_row, each))


def any_above(x, limit):
    """Whether any row of this warp exceeds its limit somewhere; interpreted, of this warpgroup.

    Args:
      x: float32 [ROWS, N].
      limit: float32 [ROWS].
    """
    if launch.is_interpreted():
        return (x > limit[:, None]).any()

    @plgpu.inline_mgpu(arg_types=(TILE, OF_ROWS), return_type=_SCALAR)
    def vote(ctx, x, limit):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        # A thread has two rows, and of each two neighbours of every eight columns.
        rows = x.registers.reshape(-1, 2).T
        above = None
        for pairs, row_limit in zip(rows, limit.registers.flat, strict=True):
            largest = functools.reduce(arith.maxnumf, pairs)
            largest = arith.maxnumf(_element(largest, 0), _element(largest, 1))
            over = arith.cmpf(arith.CmpFPredicate.OGT, largest, _element(row_limit, 0))
            above = over if above is None else arith.ori(above, over)
        every = arith.constant(i32, -1)
        answer = arith.extui(i32, nvvm.vote_sync(every, above, "any"))
        return mgpu.FragmentedArray.splat(answer, (), is_signed=True)

    return vote(x, limit) != 0


def strided(length):
    """The layout of a vector whose elements go round the threads of a warpgroup."""
    return plgpu.Layout.WG_STRIDED((length,), vec_size=1)


def gather(ref, index):
    """ref[index], each element of its own place.

    Args:
      ref: int32 [any], in shared memory.
      index: int32 [length], `strided`, within its bounds.

    Returns:
      Like index.
    """
    if launch.is_interpreted():
        return ref[...][index]
    layout = strided(*index.shape)
    result = plgpu.ShapeDtypeStruct(index.shape, jnp.int32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=result)
    def read(ctx, ref, index):
        del ctx
        registers = np.empty_like(index.registers)
        for i, register in np.ndenumerate(index.registers):
            at = arith.index_cast(ir.IndexType.get(), _element(register, 0))
            registers[i] = vector.broadcast(register.type, memref.load(ref, [at]))
        return mgpu.FragmentedArray(_registers=registers, _layout=index.layout, _is_signed=True)

    return read(ref, index)


def _element(register, i):
    return vector.extract(register, dynamic_position=[], static_position=[i])
