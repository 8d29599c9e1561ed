"""select_blocks: the best blocks of each query, ranked on the chip that makes their scores.

Scores are transposed, [selected blocks, columns], and keys come by strides: a product takes the
n-th compressed key of each of 64 selected blocks. A column is one head of one query, and all
queries of a head lie beside each other. So equation 10 adds registers of one thread, and so does
equation 9, but for what a key gives to the block after its own.

The scores of a tile of queries stay in shared memory until the last key; see ranking.py.

The layouts of registers are named here and not inferred (hence the semantics of lanes): where
elements lie in threads is what the kernel is built on.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import launch, walks
from pallas_kernels.mosaic_gpu.common import (
    LOG2E,
    OF_COLUMNS,
    ROWS,
    TILE,
    TILE_ROWS,
    NoTurns,
    Turns,
    by_column,
    divide,
    full,
    padded,
    product_and,
    share_work,
    smem,
)
from pallas_kernels.mosaic_gpu.ranking import (
    LANES,
    OF_QUERIES,
    Scores,
    best,
    load,
    places,
    row_index,
    rows_a_pass,
)

COLUMNS = 128  # columns of one product, at most
LSE_COLUMNS = 32  # numbers that a copy moves, at least
RESERVED = 4096  # bytes of shared memory for barriers, alignment and what Pallas itself takes
MOST_STAGES = 4
MOST_KEYS = 16  # compressed keys that begin in a block, at most: the steps over them are unrolled


class Cut(NamedTuple):
    """How the queries of a group are cut.

    Attributes:
      warpgroups: warpgroups that compute, each with a tile of queries.
      queries: queries a tile, a multiple of 8.
      skew: unused scores after those of the queries of a block, so that the same query of many
        blocks lies in different banks; 0 where there is no room.
      stages: products whose keys are in shared memory at a time.
    """

    warpgroups: int
    queries: int
    skew: int
    stages: int


class Blocks(NamedTuple):
    """Sizes of compressed and selected blocks, and how many of the latter there are."""

    compress: int
    stride: int
    select: int
    number: int

    @property
    def keys(self):
        """Compressed keys that begin in a selected block."""
        return self.select // self.stride

    @property
    def covering(self):
        """Strides of tokens that a compressed key covers."""
        return self.compress // self.stride


def _scores_shape(cut, num_blocks):
    """Of a tile, and one row more for what the last keys give to the block after theirs."""
    rows = (padded(num_blocks, n) for n in (rows_a_pass(cut.queries, num_blocks), ROWS))
    return max(rows) + 1, cut.queries + cut.skew


def _columns_a_product(group, queries):
    """The most whole heads that COLUMNS hold, or one: a divisor of the group."""
    heads = next(n for n in range(group, 0, -1) if group % n == 0 and n * queries <= COLUMNS)
    return heads * queries


def _cut(group, head_dim, num_blocks, number):
    """The largest cut that fits shared memory beside `number` places a query, or None."""
    for warpgroups, queries, skew in itertools.product((2, 1), (32, 16, 8), (2, 0)):
        if queries > TILE_ROWS and queries * group > COLUMNS:
            continue
        cut = Cut(warpgroups, queries, skew, 0)
        scores = math.prod(_scores_shape(cut, num_blocks)) * 4
        columns = group * queries * head_dim * 2 + max(group * queries, LSE_COLUMNS) * 4
        places = (padded(number, LANES) + 1) * queries * 4
        room = launch.SHARED_MEMORY - RESERVED - warpgroups * (scores + columns + places)
        stages = room // (ROWS * head_dim * 2)
        if stages >= 2:
            return cut._replace(stages=min(stages, MOST_STAGES))
    return None


def _walks(numbers, programs, number):
    """The steps of 64 blocks that a program walks, the first and the end: [B, programs, 2]."""
    first, own = (x.reshape(x.shape[0], programs, -1) for x in (numbers[:, 2], numbers[:, 3]))
    begin = jnp.where(own < 0, number - 1, jnp.minimum(first, number - 1)).min(axis=2) // ROWS
    end = pl.cdiv(jnp.minimum(own.max(axis=2) + 1, number), ROWS)
    return jnp.stack([begin, end], axis=-1).astype(jnp.int32)


def _by_stride(k, blocks):
    """Compressed keys as [B, K, keys of a block, blocks, H], with zeros beyond the last."""
    batch, number, groups, head_dim = k.shape
    rows = padded(blocks.number, ROWS)
    k = jnp.pad(k, ((0, 0), (0, rows * blocks.keys - number), (0, 0), (0, 0)))
    k = k.reshape(batch, rows, blocks.keys, groups, head_dim)
    return k.transpose(0, 3, 2, 1, 4)


def _columns(lse, groups, tiles, queries):
    """lse [B, T, N] in base 2, as the columns of products: [B, K, tiles, products, columns]."""
    batch, length, heads = lse.shape
    columns = _columns_a_product(heads // groups, queries)
    lse = jnp.pad(lse * LOG2E, ((0, 0), (0, tiles * queries - length), (0, 0)))
    lse = lse.reshape(batch, tiles, queries, groups, heads // groups)
    lse = lse.transpose(0, 3, 1, 4, 2).reshape(batch, groups, tiles, -1, columns)
    return jnp.pad(lse, [(0, 0)] * 4 + [(0, max(LSE_COLUMNS - columns, 0))])


def _numbers(q_positions, document_starts, blocks, num_compressed, length):
    """Of each query up to `length`: its first and last key, first and own block: [B, 4, length]."""
    ends = q_positions + 1 - blocks.compress + blocks.stride
    numbers = (
        (pl.cdiv(document_starts, blocks.stride), 0),
        (jnp.minimum(ends // blocks.stride, num_compressed), 0),
        (document_starts // blocks.select, 0),
        (q_positions // blocks.select, -1),
    )
    padding = (0, 0), (0, length - q_positions.shape[1])
    return jnp.stack([jnp.pad(x, padding, constant_values=fill) for x, fill in numbers], axis=1)


def _load_tile(q, lse, where, tile, q_smem, lse_smem, there):
    """Begins to copy a tile of queries; G + 1 arrivals say that it is there."""
    batch, kv_head = where
    queries = q_smem.shape[0] // q.shape[3]
    source = batch, pl.ds(pl.multiple_of(tile * queries, queries), queries), kv_head
    for head in range(q.shape[3]):
        mine = q_smem.at[pl.ds(head * queries, queries)]
        plgpu.copy_gmem_to_smem(q.at[*source, head], mine, there)
    plgpu.copy_gmem_to_smem(lse.at[batch, kv_head, tile], lse_smem, there)


def _score(scores, probabilities, walk, interval, blocks, parts, columns):
    """Equations 9 and 10, for 64 blocks a step.

    Args:
      scores: a `Scores` to fill.
      probabilities: from the index of a product, and what to call while it is made, to the
        probabilities, float32 [64, columns], and what that returned.
      walk: the first step and the end.
      interval: the first and the last visible key of each query, int32 [queries].
      blocks: their sizes.
      parts: products of one key of each block with all columns of the tile.
      columns: columns of one product.
    """
    (begin, end), a_step = walk, blocks.keys * parts
    queries = scores.ref.shape[1]
    shape = ROWS, queries
    lo, hi = (plgpu.layout_cast(by_column(x, shape), TILE) for x in interval)
    zero = full(shape, 0.0)

    def add(index, p, own, following):
        """What the heads of each query give to one key of each block, and so to two blocks."""
        step, rest = divide(index, a_step)
        block, n = (begin + step) * ROWS, jax.lax.div(rest, parts)
        heads = [p[:, i : i + queries] for i in range(0, columns, queries)]
        key = (block + row_index(shape, TILE)) * blocks.keys + n
        p = jnp.where(walks.seen(key, lo, hi), functools.reduce(jnp.add, heads), 0.0)
        weight = jnp.minimum(blocks.keys - n, blocks.covering)
        own += p * weight.astype(jnp.float32)
        following += p * (blocks.covering - weight).astype(jnp.float32)

        def write(own, following):
            scores.add(pl.multiple_of(block, ROWS), own, following)
            return zero, zero

        last = (rest == a_step - 1) & (index >= 0)
        return jax.lax.cond(last, write, lambda *x: x, own, following)

    def product(index, state):
        # The sums of the product before, at first of none: exponentials wait for their own alone.
        p, sums = probabilities(index, lambda: add(index - 1, *state))
        return p, *sums

    scores.begin(begin * ROWS)
    total = (end - begin) * a_step
    nothing = full((ROWS, columns), 0.0), zero, zero
    add(total - 1, *jax.lax.fori_loop(0, total, product, nothing))


def _kernel(
    q, k, lse, numbers, table, out, scratch, *, cut, blocks, number, initial, local, c
):  # fmt: skip
    """Tiles of queries of one group, one of each warpgroup that computes.

    The warpgroups take turns on the tensor cores: while one waits for its product, the other one
    makes exponentials. Each program has several pairs of tiles, so that queries and keys of the
    next one come while the best blocks of this one are sought.
    """
    (q_smem, k_smem, lse_smem, scores_smem, flags, out_smem), barriers = scratch
    q_there, k_there, k_free, turn = barriers
    warpgroup, work = jax.lax.axis_index("warpgroup"), walks.Work(table, k.shape[1])
    q_tile, lse_tile, out_tile = (x.at[warpgroup] for x in (q_smem, lse_smem, out_smem))
    parts = lse.shape[3]
    columns = q_smem.shape[1] // parts
    turns = Turns(turn) if cut.warpgroups > 1 else NoTurns()

    def place(r):
        batch, kv_head, index = work.place(r)
        walk = table[batch, index, 0], table[batch, index, 1]
        return (batch, kv_head), index * cut.warpgroups + warpgroup, walk

    def load_queries(r):
        where, tile, _ = place(r)
        _load_tile(q, lse, where, tile, q_tile, lse_tile, q_there.at[warpgroup])

    def compute(r, before):
        where, tile, (begin, end) = place(r)
        mine = pl.ds(pl.multiple_of(tile * cut.queries, cut.queries), cut.queries)
        interval = [load(numbers.at[where[0], i, mine], OF_COLUMNS) for i in (0, 1)]
        first, own = (load(numbers.at[where[0], i, mine], OF_QUERIES) for i in (2, 3))
        scores = scores_smem.at[warpgroup, :, pl.ds(0, cut.queries)]
        scores = Scores(scores, blocks.number, begin, end)

        def probabilities(index, meanwhile):
            key, part = divide(index, parts)
            slot = jax.lax.rem(before + key, cut.stages)
            queries = q_tile.at[pl.ds(pl.multiple_of(part * columns, TILE_ROWS), columns)]
            pl.when(part == 0)(lambda: plgpu.barrier_wait(k_there.at[slot]))
            turns.take()
            x, result = product_and(k_smem.at[slot], queries.transpose((1, 0)), meanwhile)
            turns.give()
            pl.when(part == parts - 1)(lambda: plgpu.barrier_arrive(k_free.at[slot]))
            lse2 = by_column(load(lse_tile.at[part, pl.ds(0, columns)], OF_COLUMNS), x.shape)
            return jnp.exp2(x * c - plgpu.layout_cast(lse2, TILE)), result

        plgpu.barrier_wait(q_there.at[warpgroup])
        _score(scores, probabilities, (begin, end), interval, blocks, parts, columns)
        plgpu.commit_smem()  # every warp is done with the queries
        pl.when(r + 1 < work.rounds)(lambda: load_queries(r + 1))
        tops = scores.rank(first, own, initial=initial, local=local)
        candidates = jnp.minimum(own, blocks.number - 1) - first + 1
        mean = q.shape[3] * blocks.covering / jnp.maximum(candidates, 1).astype(jnp.float32)
        chosen = best(scores, tops, number, candidates, mean, flags.at[warpgroup])
        result = places(scores, chosen, number)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
        out_tile[...] = result
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile.at[pl.ds(0, number)], out.at[*where, :, mine])
        return before + (end - begin) * blocks.keys

    def copy(r, before):
        where, _, (begin, end) = place(r)

        def fill(n, slot):
            step, key = divide(n, blocks.keys)
            rows = pl.ds(pl.multiple_of((begin + step) * ROWS, ROWS), ROWS)
            plgpu.copy_gmem_to_smem(k.at[*where, key, rows], k_smem.at[slot], k_there.at[slot])

        keys = (end - begin) * blocks.keys
        walks.stream(keys, cut.stages, (k_free, fill), before=before)
        return before + keys

    def compute_all():
        turns.begin()
        load_queries(0)
        jax.lax.fori_loop(0, work.rounds, compute, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
        turns.end()

    def copy_all():
        # 0, but not for the compiler. Where there is one round it would unroll the copies, and
        # ptxas 13.0.88 sets the coordinates of the second one only when it has begun.
        zero = jnp.minimum(table[0, 0, 0], 0)
        keys = jax.lax.fori_loop(0, work.rounds, copy, zero)
        walks.drain(keys, cut.stages, k_free)

    share_work(cut.warpgroups, compute_all, copy_all)


def _select(q, k, lse, q_positions, document_starts, *, blocks, number, initial, local, scale):
    batch, num_queries, num_heads, head_dim = q.shape
    num_compressed, groups = k.shape[1:3]
    group = num_heads // groups
    cut = _cut(group, head_dim, blocks.number, number)
    programs = pl.cdiv(num_queries, cut.queries * cut.warpgroups)
    tiles = programs * cut.warpgroups
    numbers = _numbers(q_positions, document_starts, blocks, num_compressed, tiles * cut.queries)
    lse = _columns(lse, groups, tiles, cut.queries)
    # Copies move whole tiles of 8 queries.
    q = jnp.pad(q, ((0, 0), (0, -num_queries % TILE_ROWS), (0, 0), (0, 0)))
    kernel = functools.partial(
        _kernel, cut=cut, blocks=blocks, number=number, initial=initial, local=local,
        c=scale * LOG2E,
    )  # fmt: skip
    own = cut.warpgroups  # what each warpgroup that computes has for itself
    (out,) = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((batch, groups, number, tiles * cut.queries), jnp.int32)],
        scratch_types=[
            (
                (
                    smem(own, group * cut.queries, head_dim, dtype=q.dtype),
                    smem(cut.stages, ROWS, head_dim, dtype=q.dtype),
                    plgpu.SMEM((own, *lse.shape[3:]), jnp.float32),
                    plgpu.SMEM((own, *_scores_shape(cut, blocks.number)), jnp.float32),
                    plgpu.SMEM((own, cut.queries), jnp.int32),
                    plgpu.SMEM((own, padded(number, LANES), cut.queries), jnp.int32),
                ),
                (
                    plgpu.Barrier(num_arrivals=group + 1, num_barriers=own),
                    plgpu.Barrier(num_barriers=cut.stages),
                    plgpu.Barrier(num_arrivals=own, num_barriers=cut.stages),
                    plgpu.Barrier(num_barriers=own),
                ),
            )
        ],
        grid=(min(batch * groups * programs, launch.num_cores()),),
        grid_names=("program",),
        num_threads=own + 1,
        thread_name="warpgroup",
        kernel_name="select_blocks",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(
        q.reshape(*q.shape[:2], groups, group, head_dim),
        _by_stride(k, blocks),
        lse,
        numbers,
        _walks(numbers, programs, blocks.number),
    )
    return out[..., :num_queries].transpose(0, 3, 1, 2)


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
      q: queries [B, T, N, H], bfloat16 or float16; copied where T is no multiple of 8.
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
        blocks=_blocks(
            k_compressed.shape[1], compress_block_size, compress_stride, select_block_size
        ),
        number=num_selected_blocks,
        initial=num_initial_blocks,
        local=num_local_blocks,
        scale=scale,
    )
    return launch.batched(select)(q, k_compressed, lse, q_positions, document_starts)


def _blocks(num_compressed, compress, stride, select):
    number = launch.num_select_blocks(
        num_compressed,
        compress_block_size=compress,
        compress_stride=stride,
        select_block_size=select,
    )
    return Blocks(compress, stride, select, number)


def refusal(operation: str, *args, **kwargs) -> str | None:
    """Why Mosaic GPU cannot run such a call here, or None; see `pallas_kernels.KERNELS`."""
    reason = launch.refusal(operation, *args, **kwargs)
    if reason or not args:
        return reason
    q, k = args[:2]
    names = "compress_block_size", "compress_stride", "select_block_size"
    blocks = _blocks(k.shape[1], *(kwargs[name] for name in names))
    if blocks.keys > MOST_KEYS:
        return (
            f"mosaic_gpu's select_blocks takes up to {MOST_KEYS} compressed keys a selected block, "
            f"not {blocks.keys}."
        )
    group, head_dim = q.shape[2] // k.shape[2], q.shape[3]
    if _cut(group, head_dim, blocks.number, kwargs["num_selected_blocks"]) is None:
        return (
            f"mosaic_gpu's select_blocks has no room for {blocks.number} blocks beside "
            f"groups of {group} heads of {head_dim} features."
        )
    return None
