"""Parts of a decoding step: one program's share of what one query attends in a cache.

A program takes a row of the batch, the heads of one group, or a tile of them where they are many,
and a part of the entries. The heads share each load. What a part leaves is an output and the log of
its denominator in base 2, which is -inf for a part that has no entry; nobody reads its output.
"""

import triton
import triton.language as tl

from pallas_kernels.triton.common import load_tile, store_tile, update_softmax


@triton.jit
def program(K: tl.constexpr, TILES: tl.constexpr):
    """The row, the group, the tile of heads and the part of a program.

    Groups are innermost: programs that run together read memory that lies together.
    """
    index = tl.program_id(0)
    return tl.program_id(1), index % K, index // K % TILES, index // (K * TILES)


@triton.jit
def steps_of(part, steps, PARTS: tl.constexpr):
    """The first step of a part, and the one after its last: parts are equal, the last ones less.

    The parts are as many whatever a row has; how long they are follows the row.
    """
    size = tl.cdiv(steps, PARTS)
    return part * size, tl.minimum((part + 1) * size, steps)


@triton.jit
def load_heads(
    q, batch, group, tile, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of the group's queries [ROWS, HP], zeros beyond the group's last."""
    G: tl.constexpr = N // K
    head = tile * ROWS + tl.arange(0, ROWS)
    q += (batch.to(tl.int64) * N + group * G) * H
    return load_tile(q, head * H, head < G, H, HP, G % ROWS > 0)


@triton.jit
def attend(
    state, q_tile, k, v, entry, seen, c, K: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    HP: tl.constexpr, VP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes the entries that are seen, others being zeros, into a running softmax.

    Returns:
      The softmax, and the scores, -inf where not seen.
    """
    k_tile = load_tile(k, entry * (K * H), seen, H, HP, True)
    v_tile = load_tile(v, entry * (K * V), seen, V, VP, True)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    return update_softmax(state, scores, v_tile, seen, c, False, PRECISION), scores


@triton.jit
def walk(
    state, q_tile, k, v, batch, group, first, last, end, c, S: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, V: tl.constexpr, HP: tl.constexpr, VP: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends the steps from `first` to before `last` of the first `end` entries of a cache."""
    k += (batch.to(tl.int64) * S * K + group) * H
    v += (batch.to(tl.int64) * S * K + group) * V
    at = tl.arange(0, KEYS)
    for i in range(first, last):
        start = (i * KEYS).to(tl.int64) * K
        seen = i * KEYS + at < end
        state, _ = attend(
            state, q_tile, k + start * H, v + start * V, at, seen, c, K, H, V, HP, VP, PRECISION
        )
    return state


@triton.jit
def store_part(
    out, lse, state, batch, group, tile, part, N: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Stores what a part found in [B, N, PARTS, V] and [B, N, PARTS]."""
    G: tl.constexpr = N // K
    out_tile, maximum, total = state
    lse_tile = maximum + tl.log2(total)
    head = tile * ROWS + tl.arange(0, ROWS)
    base = (batch.to(tl.int64) * N + group * G) * PARTS + part
    tl.store(lse + base + head * PARTS, lse_tile, mask=head < G)
    # A total that is NaN, of a query that is, goes on as it is.
    some = total != 0
    out_tile /= tl.where(some, total, 1.0)[:, None]
    store_tile(out + base * V, head * (PARTS * V), out_tile, (head < G) & some, V, VP)


@triton.jit
def joined(
    out, lse, row, FIRST: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr, AT_ONCE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """One head's output [VP] over COUNT parts from FIRST on, added in their order; 0 if empty.

    AT_ONCE parts are loaded together, and ALL, a power of two, is no less than COUNT.
    """
    lse += row.to(tl.int64) * PARTS + FIRST
    out += (row.to(tl.int64) * PARTS + FIRST) * V
    every, column = tl.arange(0, ALL), tl.arange(0, VP)
    lse_tile = tl.load(lse + every, mask=every < COUNT, other=float("-inf"))
    maximum = tl.max(lse_tile, 0)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp2(lse_tile - maximum), 0)
    x = tl.zeros([VP], tl.float32)
    for start in range(0, COUNT, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        weight = tl.load(lse + part, mask=part < COUNT, other=float("-inf"))
        weight = tl.exp2(weight - maximum)
        read = (weight != 0)[:, None] & (column < V)[None, :]
        tile = tl.load(out + part[:, None] * V + column[None, :], mask=read, other=0.0)
        x += tl.sum(weight[:, None] * tile, 0)
    return x / tl.where(total == 0, 1.0, total)
