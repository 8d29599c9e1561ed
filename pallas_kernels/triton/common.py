"""What the kernels share on the device, and the sizes that they are compiled for.

Softmax is in base 2, since exp2 is one instruction: scores are multiplied by scale * log2(e), and
only `lse` in memory is natural. Offsets are 32-bit inside a tile and 64-bit to its beginning.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST_INT = tl.constexpr(2147483647)


def padded(size: int) -> int:
    """The width of a tile for `size` features: a power of two that tl.dot takes."""
    return max(triton.next_power_of_2(size), 16)


@triton.jit
def load_tile(base, offset, mask, SIZE: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """Loads [len(offset), PADDED] elements, zeros beyond SIZE columns and, if MASKED, outside the
    row mask."""
    column = tl.arange(0, PADDED)
    pointer = base + offset[:, None] + column[None, :]
    if MASKED and SIZE < PADDED:
        return tl.load(pointer, mask=mask[:, None] & (column < SIZE)[None, :], other=0.0)
    elif MASKED:
        return tl.load(pointer, mask=mask[:, None], other=0.0)
    elif SIZE < PADDED:
        return tl.load(pointer, mask=(column < SIZE)[None, :], other=0.0)
    else:
        return tl.load(pointer)


@triton.jit
def load_rows(
    loader, base, first_row, start, group, K: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head of an array [B, S, K, SIZE] from `start` on, all of which exist.

    Args:
      loader: from `launch.row_loader`; a descriptor if TMA, else not used.
      base: pointer to the head at `first_row`.
      first_row: the row, counted over the batch, that start counts from.
      start: the first row to load.
      group: the head.
    """
    if TMA:
        return loader.load([first_row + start, group * SIZE])
    else:
        at = tl.arange(0, ROWS)
        base += start.to(tl.int64) * (K * SIZE)
        return load_tile(base, at * (K * SIZE), at, SIZE, PADDED, False)


@triton.jit
def store_tile(base, offset, x, mask, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Stores the first SIZE columns of the rows that the mask names."""
    column = tl.arange(0, PADDED)
    pointer = base + offset[:, None] + column[None, :]
    x = x.to(base.dtype.element_ty)
    tl.store(pointer, x, mask=mask[:, None] & (column < SIZE)[None, :])


@triton.jit
def start_softmax(ROWS: tl.constexpr, VP: tl.constexpr):
    """A running softmax before its first key: out, maximum and total, in base 2."""
    out = tl.zeros([ROWS, VP], tl.float32)
    return out, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def update_softmax(state, scores, v, chosen, c, CHOSEN: tl.constexpr, PRECISION: tl.constexpr):
    """Takes a tile of scores and their values into the running softmax of a tile of rows.

    Args:
      state: from `start_softmax` or this function.
      scores: [rows, keys], -inf where not seen.
      v: [keys, V].
      chosen: [rows], which rows see any of it; read if CHOSEN.
      c: scale * log2(e), above 0.
      CHOSEN: whether some rows may not.
      PRECISION: of the product.
    """
    out, maximum, total = state
    highest = tl.max(scores, 1) * c
    if CHOSEN:
        highest = tl.where(chosen, highest, float("-inf"))
    new_maximum = tl.maximum(maximum, highest)
    # A row that has seen nothing yet; -inf - -inf would be NaN.
    offset = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    decay = tl.exp2(maximum - offset)
    if CHOSEN:  # by row, which costs nothing an element: exp2 of -inf is 0
        offset = tl.where(chosen, offset, float("inf"))
    p = tl.exp2(scores * c - offset[:, None])
    total = total * decay + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * decay[:, None], input_precision=PRECISION)
    return out, new_maximum, total


@triton.jit
def finish_softmax(state):
    """The output, 0 on an empty row, and the natural lse, -inf there."""
    out, maximum, total = state
    some = total > 0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, (maximum + tl.log2(total)) * LN2, float("-inf"))
    return out / total[:, None], lse


@triton.jit
def dots_and_delta(out, d_out, d_lse, mask):
    """Of each row the output times its gradient, and that less the gradient of lse.

    The latter is what every score's gradient of the row has in common.

    Args:
      out: [rows, V].
      d_out: [rows, V].
      d_lse: pointers to the gradients of lse, which are there where `mask` is set.
      mask: [rows].
    """
    dots = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    return dots, dots - tl.load(d_lse, mask=mask, other=0.0)


@triton.jit
def load_lse2(lse, mask):
    """lse in base 2; +inf on an empty row, so that its probabilities are 0."""
    lse2 = tl.load(lse, mask=mask, other=0.0) * LOG2E
    return tl.where(lse2 == float("-inf"), float("inf"), lse2)
