"""What the kernels share on the device.

Softmax is in base 2, since exp2 is one instruction: scores are multiplied by scale * log2(e), and
only `lse` in memory is natural.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import launch

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

#: Rows of one matrix product of a warpgroup.
ROWS = 64

#: Pallas moves tiles of 8 rows of 128 bytes between global and shared memory: the first row of
#: every copy and the length of that dimension in global memory are multiples of 8.
TILE_ROWS = 8

#: Registers of a thread that computes and of one that copies, by how many warpgroups compute. With
#: one, both begin with more.
REGISTERS = {2: (232, 40), 3: (160, 24)}

#: 16-bit columns that the swizzle of shared memory leaves together.
TILE_COLUMNS = 64

#: How shared memory is laid out for the tensor cores: those tiles, swizzled.
TRANSFORMS = (plgpu.TilingTransform((TILE_ROWS, TILE_COLUMNS)), plgpu.SwizzleTransform(128))
#: The same for float32, which no product takes.
FLOAT_TRANSFORMS = (plgpu.TilingTransform((TILE_ROWS, 32)), plgpu.SwizzleTransform(128))

#: One element a register: the layout of an accumulator, and of vectors of its rows and columns.
TILE = plgpu.Layout.WGMMA
OF_ROWS, OF_COLUMNS = TILE.reduce(1), TILE.reduce(0)


def padded_keys(x):
    """[B, S, ...], S a multiple of 8, as the copies want it."""
    padding = -x.shape[1] % TILE_ROWS
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x


def share_work(computing, compute, copy):
    """Gives the warpgroups of a program their work, and the registers for it.

    Args:
      computing: how many of them compute; the one after them copies.
      compute: a function without arguments.
      copy: likewise.
    """
    warpgroup = jax.lax.axis_index("warpgroup")
    many, few = REGISTERS.get(computing, (None, None))

    @pl.when(warpgroup < computing)
    def _():
        if many is not None:
            plgpu.set_max_registers(many, action="increase")
        compute()

    @pl.when(warpgroup == computing)
    def _():
        if few is not None:
            plgpu.set_max_registers(few, action="decrease")
        copy()


class Turns:
    """Two warpgroups that take turns, the first one first, as often as each other."""

    def __init__(self, barriers):
        """Takes a barrier for each, of one arrival."""
        self._barriers = barriers
        self._warpgroup = jax.lax.axis_index("warpgroup")

    def take(self):
        """Waits for the turn of this warpgroup."""
        plgpu.barrier_wait(self._barriers.at[self._warpgroup])

    def give(self):
        """Gives the turn to the other one."""
        plgpu.barrier_arrive(self._barriers.at[1 - self._warpgroup])

    def begin(self):
        """Before the first turn."""
        pl.when(self._warpgroup == 1)(self.give)

    def end(self):
        """After the last turn: takes the one that the other one gave in vain."""
        pl.when(self._warpgroup == 0)(self.take)


class NoTurns:
    """The turns of a warpgroup that is alone."""

    def take(self):
        """Does nothing, like the others."""

    give = begin = end = take


def smem(*shape, dtype):
    """Shared memory for matrices [..., rows, columns] of a 16-bit dtype, laid out for products."""
    return plgpu.SMEM(shape, dtype, transforms=TRANSFORMS)


def full(shape, value, layout=TILE):
    """A float32 array of one value in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def padded(number, multiple):
    """A number rounded up to a multiple."""
    return pl.cdiv(number, multiple) * multiple


def divide(x, by):
    """The quotient and the remainder of int32 x."""
    return jax.lax.div(x, by), jax.lax.rem(x, by)


def by_row(x, shape):
    """A vector of rows as a matrix."""
    return jax.lax.broadcast_in_dim(x, shape, (0,))


def by_column(x, shape):
    """A vector of columns as a matrix."""
    return jax.lax.broadcast_in_dim(x, shape, (1,))


def in_registers(ref):
    """A left operand of products that is not to be read from shared memory each time.

    Interpreted, it is; see `accumulate`.
    """
    return ref if launch.is_interpreted() else plgpu.load(ref, layout=TILE)


def tiles_of_columns(ref):
    """A 16-bit matrix in shared memory as parts of TILE_COLUMNS columns."""
    return tuple(ref.at[:, pl.ds(i, TILE_COLUMNS)] for i in range(0, ref.shape[1], TILE_COLUMNS))


def product(a, b, meanwhile=lambda: None):
    """a [M, K] times b [K, N], both in shared memory (`ref.transpose((1, 0))` costs nothing).

    Args:
      a: the left matrix, or a tuple of its parts along K.
      b: the right matrix, or a tuple of its parts along K.
      meanwhile: called once the product has begun; what it does overlaps with the product.

    Returns:
      [M, N] float32 in registers.
    """
    return product_and(a, b, meanwhile)[0]


def product_and(a, b, meanwhile):
    """The product as `product` makes it, and what `meanwhile` returns."""

    def run(acc):
        _begin(acc, a, b)
        result = meanwhile()
        return acc[...], result

    return pl.run_scoped(run, _accumulator(a, b))


def _parts(a, b):
    """Pairs of matrices whose products add up to that of a and b."""
    return tuple(zip(a, b, strict=True)) if isinstance(a, tuple) else ((a, b),)


def _begin(acc, a, b):
    """Begins to add a @ b."""
    for left, right in _parts(a, b):
        plgpu.wgmma(acc, left, right)


def _accumulator(a, b):
    """One that a product fits."""
    left, right = _parts(a, b)[0]
    return plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32)


def products(operands, between):
    """Products as `product` makes them, with work on the first while the others go on.

    Args:
      operands: pairs of matrices, each as `product` takes them.
      between: a function of the first product.

    Returns:
      What `between` returns, and the other products.
    """

    def run(first, *others):
        for acc, (a, b) in zip((first, *others), operands, strict=True):
            _begin(acc, a, b)
        result = between(plgpu.wgmma_accumulator_load(first, wait_n=len(others)))
        return result, *(acc[...] for acc in others)

    return pl.run_scoped(run, *(_accumulator(a, b) for a, b in operands))


def accumulate(acc, p, v):
    """acc + p @ v, where acc and p are in registers.

    Here, in `accumulate_and`, `products_and_sum`, `in_registers` and warps.py, and nowhere else,
    the interpreter runs another program than the device: it has no products of register operands
    and no accumulators that begin with a value. On a device p is an operand from registers and the
    product begins with acc, which cross-lowering on a CPU compiles and the tests on a GPU run.
    Interpreted, v is read and the product taken outside of the tensor cores, and what overlaps with
    it comes before or after, which proves the barriers and the mathematics around it.

    Args:
      acc: [M, V] float32.
      p: [M, K] in v's dtype.
      v: [K, V] in shared memory.

    Returns:
      [M, V] float32 in registers.
    """
    if launch.is_interpreted():
        total = acc + jnp.dot(p, v[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # what was read like this may be overwritten by a copy
        return total
    return pl.run_state(lambda acc: plgpu.wgmma(acc, p, v))(plgpu.ACC.init(acc))


def accumulate_and(acc, p, v, meanwhile):
    """The sum as `accumulate` makes it, and what `meanwhile` returns, which overlaps with it."""
    if launch.is_interpreted():
        return accumulate(acc, p, v), meanwhile()

    def run(ref):
        ref[...] = acc
        plgpu.wgmma(ref, p, v)
        result = meanwhile()
        return ref[...], result

    return pl.run_scoped(run, plgpu.ACC(acc.shape, jnp.float32))


def products_and_sum(operands, acc, p, v, between, meanwhile=lambda: None):
    """Products and, right behind them, acc + p @ v, with work on the first while the rest goes on.

    Interpreted, one comes after the other; see `accumulate`.

    Args:
      operands, between: as `products` takes them.
      acc, p, v: as `accumulate` takes them.
      meanwhile: called once everything has begun.

    Returns:
      What `between` returns, the other products, and the sum.
    """
    if launch.is_interpreted():
        first, *others = (product(a, b) for a, b in operands)
        meanwhile()
        return between(first), *others, accumulate(acc, p, v)

    def run(first, *others):
        others[-1][...] = acc
        for ref, (a, b) in zip((first, *others[:-1]), operands, strict=True):
            _begin(ref, a, b)
        plgpu.wgmma(others[-1], p, v)
        meanwhile()
        result = between(plgpu.wgmma_accumulator_load(first, wait_n=len(others)))
        return result, *(ref[...] for ref in others)

    accs = *(_accumulator(a, b) for a, b in operands), plgpu.ACC(acc.shape, jnp.float32)
    return pl.run_scoped(run, *accs)
