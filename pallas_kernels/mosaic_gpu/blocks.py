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

from pallas_kernels.mosaic_gpu import launch
from pallas_kernels.mosaic_gpu.common import (
    LOG2E,
    OF_COLUMNS,
    ROWS,
    TILE,
    TILE_ROWS,
    by_column,
    full,
    product,
    share_work,
    smem,
)
from pallas_kernels.mosaic_gpu.ranking import (
    LANES,
    OF_QUERIES,
    Scores,
    best,
    load,
    padded,
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
    return padded(num_blocks, rows_a_pass(TILE_ROWS)) + 1, cut.queries + cut.skew


def _columns_a_product(group, queries):
    """The most whole heads that COLUMNS hold, or one: a divisor of the group."""
    heads = next(n for n in range(group, 0, -1) if group % n == 0 and n * queries <= COLUMNS)
    return heads * queries


def _cut(group, head_dim, num_blocks):
    """The largest cut that fits shared memory, or None."""
    for warpgroups, queries, skew in itertools.product((2, 1), (32, 16, 8), (2, 0)):
        if queries > TILE_ROWS and queries * group > COLUMNS:
            continue
        cut = Cut(warpgroups, queries, skew, 0)
        scores = math.prod(_scores_shape(cut, num_blocks)) * 4
        columns = group * queries * head_dim * 2 + max(group * queries, LSE_COLUMNS) * 4
        places = (launch.MOST_SELECTED + 1) * queries * 4
        room = launch.SHARED_MEMORY - RESERVED - warpgroups * (scores + columns + places)
        stages = room // (ROWS * head_dim * 2)
        if stages >= 2:
            return cut._replace(stages=min(stages, MOST_STAGES))
    return None


def _take_turn(turn):
    """Waits for the other warpgroup: their products alternate, and so their exponentials."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _probabilities(q_tile, keys, lse, c, queries, in_turn):
    """What the heads of each query give to one key of each block together: [64, queries]."""
    products = lse.shape[0]
    columns = q_tile.shape[0] // products
    total = None
    for i in range(products):
        part = q_tile.at[pl.ds(i * columns, columns)]
        scores = product(keys, part.transpose((1, 0)), in_turn)
        lse2 = by_column(load(lse.at[i, pl.ds(0, columns)], OF_COLUMNS), scores.shape)
        p = jnp.exp2(scores * c - plgpu.layout_cast(lse2, TILE))
        heads = [p[:, j : j + queries] for j in range(0, columns, queries)]
        total = functools.reduce(jnp.add, heads if total is None else [total, *heads])
        in_turn()
    return total


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


def _stream(k, where, walk, k_smem, filled, freed):
    """The memory warpgroup: keeps `stages` products' keys in shared memory."""
    (begin, end), keys, stages = walk, k.shape[2], k_smem.shape[0]
    products = (end - begin) * keys

    @pl.loop(0, products)
    def _(index):
        slot = jax.lax.rem(index, stages)
        block = pl.multiple_of((begin + jax.lax.div(index, keys)) * ROWS, ROWS)

        @pl.when(index >= stages)
        def _():
            plgpu.barrier_wait(freed.at[slot])

        source = k.at[*where, jax.lax.rem(index, keys), pl.ds(block, ROWS)]
        plgpu.copy_gmem_to_smem(source, k_smem.at[slot], filled.at[slot])

    # Every arrival is waited for, so that none comes when the program has ended.
    @pl.loop(jnp.maximum(products - stages, 0), products)
    def _(index):
        plgpu.barrier_wait(freed.at[jax.lax.rem(index, stages)])


def _score(scores, probabilities, walk, interval, blocks):
    """Equations 9 and 10, for 64 blocks a step.

    Args:
      scores: a `Scores` to fill.
      probabilities: from the index of a product to what the heads of each query give to its keys.
      walk: the first step and the end.
      interval: the first and the last visible key of each query, int32 [queries].
      blocks: their sizes.
    """
    begin, end = walk
    shape = ROWS, scores.ref.shape[1]
    scores.begin(begin * ROWS)

    @pl.loop(begin, end)
    def _(step):
        lo, hi = (plgpu.layout_cast(by_column(x, shape), TILE) for x in interval)
        own = following = full(shape, 0.0)
        first_key = (step * ROWS + row_index(shape, TILE)) * blocks.keys
        for n in range(blocks.keys):
            p = probabilities((step - begin) * blocks.keys + n)
            p = jnp.where((first_key + n >= lo) & (first_key + n < hi), p, 0.0)
            weight = min(blocks.keys - n, blocks.covering)
            own += p * float(weight)
            following += p * float(blocks.covering - weight)
        scores.add(pl.multiple_of(step * ROWS, ROWS), own, following)


def _kernel(
    q, k, lse, numbers, walks, out, scratch, *, cut, blocks, number, initial, local, c
):  # fmt: skip
    """Tiles of queries of one group, one of each warpgroup that computes."""
    (q_smem, k_smem, lse_smem, scores_smem, flags, out_smem), barriers = scratch
    q_there, k_there, k_free, turn = barriers
    warpgroup = jax.lax.axis_index("warpgroup")
    programs, (groups, group) = walks.shape[1], q.shape[2:4]
    index = jax.lax.axis_index("program")
    rest, index = jax.lax.div(index, programs), programs - 1 - jax.lax.rem(index, programs)
    where = jax.lax.div(rest, groups), jax.lax.rem(rest, groups)
    walk = walks[where[0], index, 0], walks[where[0], index, 1]

    def compute():
        tile = index * cut.warpgroups + warpgroup
        q_tile, lse_tile, there = (x.at[warpgroup] for x in (q_smem, lse_smem, q_there))
        _load_tile(q, lse, where, tile, q_tile, lse_tile, there)
        mine = pl.ds(pl.multiple_of(tile * cut.queries, cut.queries), cut.queries)
        interval = [load(numbers.at[where[0], i, mine], OF_COLUMNS) for i in (0, 1)]
        first, own = (load(numbers.at[where[0], i, mine], OF_QUERIES) for i in (2, 3))
        scores = Scores(scores_smem.at[warpgroup, :, pl.ds(0, cut.queries)], *walk)
        in_turn = functools.partial(_take_turn, turn) if cut.warpgroups > 1 else lambda: None

        def probabilities(n):
            slot = jax.lax.rem(n, cut.stages)
            plgpu.barrier_wait(k_there.at[slot])
            p = _probabilities(q_tile, k_smem.at[slot], lse_tile, c, cut.queries, in_turn)
            plgpu.barrier_arrive(k_free.at[slot])
            return p

        plgpu.barrier_wait(there)
        pl.when(warpgroup == 1)(in_turn)
        _score(scores, probabilities, walk, interval, blocks)
        pl.when(warpgroup == 0)(in_turn)
        scores.rank(first, own, number=blocks.number, initial=initial, local=local)
        candidates = jnp.minimum(own, blocks.number - 1) - first + 1
        mean = group * blocks.covering / jnp.maximum(candidates, 1).astype(jnp.float32)
        chosen = best(scores, number, candidates, mean, flags.at[warpgroup])
        out_smem.at[warpgroup][...] = places(scores, chosen, number)
        plgpu.commit_smem()
        result = out_smem.at[warpgroup, pl.ds(0, number)]
        plgpu.copy_smem_to_gmem(result, out.at[*where, :, mine])
        plgpu.wait_smem_to_gmem(0)

    def copy():
        _stream(k, where, walk, k_smem, k_there, k_free)

    share_work(cut.warpgroups, compute, copy)


def _select(q, k, lse, q_positions, document_starts, *, blocks, number, initial, local, scale):
    batch, num_queries, num_heads, head_dim = q.shape
    num_compressed, groups = k.shape[1:3]
    group = num_heads // groups
    cut = _cut(group, head_dim, blocks.number)
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
                    plgpu.Barrier(num_arrivals=own),
                ),
            )
        ],
        grid=(batch * groups * programs,),
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
    if _cut(group, head_dim, blocks.number) is None:
        return (
            f"mosaic_gpu's select_blocks has no room for {blocks.number} blocks beside "
            f"groups of {group} heads of {head_dim} features."
        )
    return None
