"""select_blocks: the best blocks of each query, ranked on the chip that makes their scores.

A program takes a tile of queries, with the G heads of one group, and walks the compressed keys of
their documents, some selection blocks a step. Each step ranks its blocks and merges them into the
best ones so far.

Scores are transposed, [keys, columns], where a column is one head of one query and `_columns` puts
all heads of a query into one thread of the matrix units: equation 10 is a sum within threads. All
heads of a query see the same keys, so that the mask can wait until after that sum; it also drops
whatever memory that nobody sees may hold.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton import launch, tuning
from pallas_kernels.triton.common import LARGEST_INT, LOG2E, load_tile, padded
from pallas_kernels.triton.launch import refusal  # noqa: F401 - see pallas_kernels.KERNELS


@triton.jit
def _columns(QUERIES: tl.constexpr, HEADS: tl.constexpr):
    """The query in its tile, and the head in its group, of each column.

    One thread holds the columns 8 * j + 2 * t and 8 * j + 2 * t + 1 of a product, for its own t
    below 4 and every j. So two heads are innermost, then the queries, then the other heads.
    """
    PAIR: tl.constexpr = 2 if HEADS > 1 else 1
    column = tl.arange(0, QUERIES * HEADS)
    query = column // PAIR % QUERIES
    head = column // (PAIR * QUERIES) * PAIR + column % PAIR
    return query, head


@triton.jit
def _sum_heads(p, KEYS: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr):
    """From [keys, columns] to [keys, queries]."""
    PAIR: tl.constexpr = 2 if HEADS > 1 else 1
    p = tl.reshape(p, [KEYS, HEADS // PAIR, QUERIES, PAIR])
    return tl.sum(tl.sum(p, 3), 1)


@triton.jit
def _block_sums(
    k, q_tile, lse2, lo, hi, start, c, C: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr, PER_BLOCK: tl.constexpr, COVERING: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What BLOCKS blocks, from compressed key `start` on, get from the keys that begin in them.

    A compressed key covers COVERING strides of tokens. Those that lie beyond its own block are in
    the next one. SLOTS of the PER_BLOCK keys of each block are taken at a time.

    Returns:
      Two arrays [queries, BLOCKS]: what the keys give to their own block, and to the next one.
    """
    row = tl.arange(0, BLOCKS * SLOTS)
    own = tl.zeros([QUERIES, BLOCKS], tl.float32)
    following = tl.zeros([QUERIES, BLOCKS], tl.float32)
    for chunk in range(0, PER_BLOCK, SLOTS):
        slot = chunk + row % SLOTS
        key = start + row // SLOTS * PER_BLOCK + slot
        offset = (tl.minimum(key, C - 1) - start) * (K * H)
        k_tile = load_tile(k + start.to(tl.int64) * (K * H), offset, row, H, HP, False)
        scores = tl.dot(k_tile, q_tile, input_precision=PRECISION)
        p = _sum_heads(tl.exp2(scores * c - lse2[None, :]), BLOCKS * SLOTS, QUERIES, HEADS)
        seen = (key[:, None] >= lo[None, :]) & (key[:, None] < hi[None, :])
        p = tl.where(seen & (slot < PER_BLOCK)[:, None], p, 0.0)
        weight = tl.minimum(PER_BLOCK - slot, COVERING)
        own += _sum_slots(p * weight[:, None], BLOCKS, SLOTS, QUERIES)
        if COVERING > 1:
            following += _sum_slots(p * (COVERING - weight)[:, None], BLOCKS, SLOTS, QUERIES)
    return own, following


@triton.jit
def _sum_slots(p, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, QUERIES: tl.constexpr):
    """From [keys, queries] to [queries, blocks]."""
    return tl.trans(tl.sum(tl.reshape(p, [BLOCKS, SLOTS, QUERIES]), 1))


@triton.jit
def block_ranks(
    scores, block, own, first, NUM_BLOCKS: tl.constexpr, INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
):  # fmt: skip
    """Integers that order as equation 11 does: int64 [queries, blocks], 0 where no candidate is.

    A score is not negative, so that its bits order as it does. Below them lies the block's index,
    turned around, for the lower of two equal blocks to win.
    """
    own, first = own[:, None], first[:, None]
    forced = (block < first + INITIAL) | (block > own - LOCAL)
    scores = tl.where(forced, float("inf"), scores)
    rank = scores.to(tl.int32, bitcast=True).to(tl.int64) << 32
    rank |= (block ^ LARGEST_INT).to(tl.int64)
    candidate = (block >= first) & (block <= own) & (block < NUM_BLOCKS)
    return tl.where(candidate, rank, 0)


@triton.jit
def _merged(best, ranks, BEST: tl.constexpr, QUERIES: tl.constexpr, BLOCKS: tl.constexpr):
    """The BEST largest of `best`, which ascends, and of a step's ranks; ascending again."""
    KEPT: tl.constexpr = min(BEST, BLOCKS)
    ranks = tl.topk(ranks, KEPT)
    if KEPT < BEST:
        column = tl.arange(0, BEST)[None, :]
        source = tl.broadcast_to(tl.minimum(column, KEPT - 1), [QUERIES, BEST])
        ranks = tl.where(column < KEPT, tl.gather(ranks, source, 1), 0)
    # Of an ascending and a descending sequence, the larger ones place by place are the largest of
    # both together, and bitonic.
    return tl.bitonic_merge(tl.maximum(best, ranks))


@triton.jit
def _queries(
    q, lse, batch, group, tile, T: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """q as [HP, columns] and lse in base 2; a head beyond the group has probability 0."""
    G: tl.constexpr = N // K
    query, head = _columns(QUERIES, HEADS)
    base = (batch * T + tile * QUERIES).to(tl.int64) * N + group * G
    offset = tl.minimum(query, T - 1 - tile * QUERIES) * N + head
    q_tile = load_tile(q + base * H, offset * H, head < G, H, HP, HEADS > G)
    lse2 = tl.load(lse + base + offset, mask=head < G, other=float("inf")) * LOG2E
    # Turned here, and not before the product, for it to lie in shared memory before the steps.
    return tl.trans(q_tile), lse2


@triton.jit
def _store_blocks(
    out, best, batch, group, tile, T: tl.constexpr, K: tl.constexpr, NUM: tl.constexpr,
    BEST: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Stores the NUM best blocks of each query in ascending order, then -1."""
    query, column = tl.arange(0, QUERIES)[:, None], tl.arange(0, BEST)[None, :]
    block = best.to(tl.int32) ^ LARGEST_INT
    block = tl.where((best > 0) & (column >= BEST - NUM), block, LARGEST_INT)
    block = tl.sort(block)
    block = tl.where(block < LARGEST_INT, block, -1)
    out += ((batch * T + tile * QUERIES).to(tl.int64) * K + group) * NUM
    stored = (query < T - tile * QUERIES) & (column < NUM)
    tl.store(out + query * (K * NUM) + column, block, mask=stored)


@triton.jit
def _kernel(
    q, k, lse, q_positions, document_starts, out, SCALE: tl.constexpr, T: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    COMPRESS: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, NUM: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, NUM_BLOCKS: tl.constexpr, BEST: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one group. Grid: tiles, the latest first; batch * K."""
    PER_BLOCK: tl.constexpr = SELECT // STRIDE
    batch, group = tl.program_id(1) // K, tl.program_id(1) % K
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    # Beyond the last query it is repeated, so that only the store needs a mask.
    query = batch * T + tl.minimum(tile * QUERIES + tl.arange(0, QUERIES), T - 1)
    position, document = tl.load(q_positions + query), tl.load(document_starts + query)
    own = position // SELECT
    end = tl.minimum(tl.max(own) + 1, NUM_BLOCKS)
    first = document // SELECT
    lo = tl.cdiv(document, STRIDE)
    hi = tl.minimum((position + 1 - COMPRESS + STRIDE) // STRIDE, C)
    q_tile, lse2 = _queries(q, lse, batch, group, tile, T, N, K, H, HP, QUERIES, HEADS)
    k += (batch * C).to(tl.int64) * (K * H) + group * H
    best = tl.zeros([QUERIES, BEST], tl.int64)
    carried = tl.zeros([QUERIES, BLOCKS], tl.float32)
    column = tl.arange(0, BLOCKS)[None, :]
    before = tl.broadcast_to((column + BLOCKS - 1) % BLOCKS, [QUERIES, BLOCKS])
    for start in range(tl.min(first), end, BLOCKS):
        if C > 0:
            scores, following = _block_sums(
                k, q_tile, lse2, lo, hi, start * PER_BLOCK, SCALE * LOG2E, C, K, H, HP, QUERIES,
                HEADS, BLOCKS, SLOTS, PER_BLOCK, COMPRESS // STRIDE, PRECISION,
            )  # fmt: skip
            following = tl.gather(following, before, 1)
            scores += tl.where(column > 0, following, carried)
            carried = following  # what its column 0 holds is for the next step's
        else:
            scores = carried
        ranks = block_ranks(scores, start + column, own, first, NUM_BLOCKS, INITIAL, LOCAL)
        best = _merged(best, ranks, BEST, QUERIES, BLOCKS)
    _store_blocks(out, best, batch, group, tile, T, K, NUM, BEST, QUERIES)


def _tile_queries(cut, heads, ranked):
    """How many queries a tile has: a power of two.

    A thread gets four of the `ranked` places of its queries at most, where that leaves the 4
    queries that `_columns` wants, and the 16 columns that tl.dot wants.
    """
    queries = min(cut.rows // heads, 4 * 32 * cut.num_warps // ranked)
    return max(queries, 4, 16 // heads)


def shared_memory(group: int, head_dim: int, dtype) -> int:
    """An upper bound on the bytes of shared memory that a program takes, for groups of that size.

    The queries, and the tiles of keys of each stage; float32 lies there in two parts.
    """
    try:
        cut = tuning.lookup("select_blocks", head_dim=head_dim, v_head_dim=head_dim, dtype=dtype)
    except KeyError:
        return sys.maxsize
    columns = max(cut.rows, 4 * triton.next_power_of_2(group))
    parts = 2 if dtype.itemsize == 4 else 1
    tiles = columns * parts + cut.keys * cut.num_stages
    return tiles * padded(head_dim) * dtype.itemsize + 2048


def _select(q, k, lse, q_positions, document_starts, *, num_blocks, scale, **geometry):
    batch, num_queries, heads, head_dim = q.shape
    num_compressed, groups = k.shape[1:3]
    num_selected = geometry["NUM"]
    cut = tuning.lookup("select_blocks", head_dim=head_dim, v_head_dim=head_dim, dtype=q.dtype)
    group_heads = triton.next_power_of_2(heads // groups)
    slots = min(triton.next_power_of_2(geometry["SELECT"] // geometry["STRIDE"]), cut.keys // 2)
    num_best = max(triton.next_power_of_2(num_selected), 2)
    queries = _tile_queries(cut, group_heads, max(cut.keys // slots, num_best))
    return launch.launch(
        _kernel,
        q,
        k,
        lse,
        q_positions,
        document_starts,
        out_type=jax.ShapeDtypeStruct((batch, num_queries, groups, num_selected), jnp.int32),
        grid=(triton.cdiv(num_queries, queries), batch * groups),
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        SCALE=scale,
        T=num_queries,
        C=num_compressed,
        N=heads,
        K=groups,
        H=head_dim,
        HP=padded(head_dim),
        **geometry,
        NUM_BLOCKS=num_blocks,
        BEST=num_best,
        QUERIES=queries,
        HEADS=group_heads,
        BLOCKS=cut.keys // slots,
        SLOTS=slots,
        PRECISION=launch.precision(q.dtype),
    )


def select_blocks(
    q,
    k_compressed,
    lse,
    q_positions,
    document_starts,
    *,
    compress_block_size,
    compress_stride,
    select_block_size,
    num_selected_blocks,
    num_initial_blocks,
    num_local_blocks,
    scale,
):
    """Chooses n blocks for each query and group (equations 8 to 11). Not differentiable.

    Args:
      q: queries [B, T, N, H], bfloat16, float16 or float32.
      k_compressed: compressed keys [B, C, K, H]; K divides N.
      lse: float32 [B, T, N], the natural logarithm of the compressed branch's denominators; -inf on
        an empty row.
      q_positions: int32 [B, T], not negative.
      document_starts: int32 [B, T], the first position of each query's document, a multiple of l'.
      compress_block_size: l, a multiple of d.
      compress_stride: d.
      select_block_size: l', a multiple of d and at least l.
      num_selected_blocks: n.
      num_initial_blocks: forced first blocks of the document.
      num_local_blocks: forced last blocks up to the query's own.
      scale: a Python number that multiplies the scores.

    Returns:
      int32 [B, T, K, n]: ascending block indices, then -1 where there is no further candidate.
    """
    q, scale = launch.positive_scale(q, scale)
    select = functools.partial(
        _select,
        scale=scale,
        num_blocks=launch.num_select_blocks(
            k_compressed.shape[1],
            compress_block_size=compress_block_size,
            compress_stride=compress_stride,
            select_block_size=select_block_size,
        ),
        COMPRESS=compress_block_size,
        STRIDE=compress_stride,
        SELECT=select_block_size,
        NUM=num_selected_blocks,
        INITIAL=num_initial_blocks,
        LOCAL=num_local_blocks,
    )
    return launch.batched(select)(q, k_compressed, lse, q_positions, document_starts)
