"""selected_attention: each query attends the key blocks that it selected.

Forward and for dq, a tile of neighbouring queries, all G heads of a group, walks the union of the
blocks that its queries selected; a bit mask says who selected which. For dk and dv, an item, which
is a block and some of the queries that selected it, gathers the rows of those queries; the items of
a block are added in order by a kernel of their own. No program adds to what another one wrote.

A step of the walk takes KEYS keys, of a part of a block or of several; a block of a size that is no
power of two leaves some of them unused. A NaN in memory that no query of a tile selected or has
reached changes nothing; one in a block that some query of the tile has passed and selected reaches
the others of that tile.
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.lists import inverted_index
from pallas_kernels.triton import launch, lists, tuning
from pallas_kernels.triton.common import (
    LARGEST_INT,
    LOG2E,
    dots_and_delta,
    finish_softmax,
    load_lse2,
    load_rows,
    load_tile,
    padded,
    start_softmax,
    store_tile,
    update_softmax,
)
from pallas_kernels.triton.launch import refusal  # noqa: F401 - see pallas_kernels.KERNELS

#: Queries of a block that one program takes for dk and dv.
ITEM_QUERIES = 1024

#: Keys whose items one program adds.
SUMMED_KEYS = 64


@triton.jit
def _query_tile(
    q_positions, tile, batch, group, T: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of rows: the head index it begins at, its offsets, which are real, whose they are."""
    row = tl.arange(0, ROWS)
    local = row // HEADS
    head = tl.program_id(2) * HEADS + row % HEADS
    first_query = tile * QUERIES
    valid = (local < QUERIES) & (first_query + local < T) & (head < G)
    head_index = (batch * T + first_query).to(tl.int64) * N + group * G
    position = tl.load(q_positions + batch * T + first_query + local, mask=valid, other=-1)
    return head_index, local * N + head, valid, local, position


@triton.jit
def _tile_lists(blocks, masks, counts, M: tl.constexpr, QUERIES: tl.constexpr):
    """This program's part of `lists.unions`: its blocks, its masks, and its two counts."""
    index = tl.program_id(1) * tl.num_programs(0) + tl.num_programs(0) - 1 - tl.program_id(0)
    start = index.to(tl.int64) * (QUERIES * M)
    return (
        blocks + start,
        masks + start,
        tl.load(counts + index * 2),
        tl.load(counts + 2 * index + 1),
    )


@triton.jit
def _masked_step(
    k, v, blocks, masks, i, count, local, position, K: tl.constexpr, H: tl.constexpr,
    V: tl.constexpr, HP: tl.constexpr, VP: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Step i, of a part of a block or of several: keys, values, and who sees which.

    A block takes PADDED places, of which BLOCK_SIZE are keys. Keys that no row sees are zeros: 0
    times what they may hold, a NaN say, is not 0.
    """
    slot = i * KEYS + tl.arange(0, KEYS)
    entry, within = slot // PADDED, slot % PADDED
    block = tl.load(blocks + entry, mask=entry < count, other=0)
    bits = tl.load(masks + entry, mask=entry < count, other=0)
    key = block * BLOCK_SIZE + within
    real = (entry < count) & (within < BLOCK_SIZE)
    chosen = ((bits[None, :] >> local[:, None]) & 1) != 0
    seen = chosen & (real[None, :] & (key[None, :] <= position[:, None]))
    by_some = tl.max(seen.to(tl.int32), 0) > 0
    at = key.to(tl.int64) * K
    k_tile = load_tile(k, at * H, by_some, H, HP, True)
    v_tile = load_tile(v, at * V, by_some, V, VP, True)
    return k_tile, v_tile, seen


@triton.jit
def _forward_kernel(
    q, k, v, k_rows, v_rows, q_positions, blocks, masks, counts, out, lse, SCALE: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    H: tl.constexpr, V: tl.constexpr, HP: tl.constexpr, VP: tl.constexpr, QUERIES: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PADDED: tl.constexpr, WHOLE: tl.constexpr, K_TMA: tl.constexpr, V_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries.

    Grid: tiles, fastest, so that one group's keys stay in cache; batch * K; parts of HEADS heads of
    a group that is larger than a tile. If WHOLE, blocks that every query of the tile has passed are
    walked by scalars, each of them or each part of it a step.
    """
    c: tl.constexpr = SCALE * LOG2E
    batch, group = tl.program_id(1) // K, tl.program_id(1) % K
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head_index, offset, valid, local, position = _query_tile(
        q_positions, tile, batch, group, T, N, N // K, QUERIES, HEADS, ROWS
    )
    blocks, masks, count, whole = _tile_lists(blocks, masks, counts, M, QUERIES)
    q_tile = load_tile(q + head_index * H, offset * H, valid, H, HP, True)
    k += ((batch * S).to(tl.int64) * K + group) * H
    v += ((batch * S).to(tl.int64) * K + group) * V
    state = start_softmax(ROWS, VP)
    whole_steps = whole * PADDED // KEYS if WHOLE else 0
    for i in range(0, whole_steps):
        entry = i * KEYS // PADDED
        start = tl.load(blocks + entry) * BLOCK_SIZE + i * KEYS % PADDED
        chosen = ((tl.load(masks + entry) >> local) & 1) != 0
        k_tile = load_rows(k_rows, k, batch * S, start, group, K, H, KEYS, HP, K_TMA)
        v_tile = load_rows(v_rows, v, batch * S, start, group, K, V, KEYS, VP, V_TMA)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        state = update_softmax(state, scores, v_tile, chosen, c, True, PRECISION)
    for i in range(whole_steps, tl.cdiv(count * PADDED, KEYS)):
        k_tile, v_tile, seen = _masked_step(
            k, v, blocks, masks, i, count, local, position, K, H, V, HP, VP, KEYS, BLOCK_SIZE,
            PADDED,
        )  # fmt: skip
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        scores = tl.where(seen, scores, float("-inf"))
        state = update_softmax(state, scores, v_tile, valid, c, False, PRECISION)
    out_tile, lse_tile = finish_softmax(state)
    store_tile(out + head_index * V, offset * V, out_tile, valid, V, VP)
    tl.store(lse + head_index + offset, lse_tile, mask=valid)


@triton.jit
def _dq_step(dq_tile, d_out_tile, lse2, delta, scores, k_tile, v_tile, c, PRECISION: tl.constexpr):
    """Adds what a tile of keys and values gives to dq [HP, rows]; scores are [keys, rows]."""
    p = tl.exp2(scores * c - lse2[None, :])
    dp = tl.dot(v_tile, d_out_tile, input_precision=PRECISION)
    ds = (p * (dp - delta[None, :])).to(k_tile.dtype)
    return tl.dot(tl.trans(k_tile), ds, dq_tile, input_precision=PRECISION)


@triton.jit
def _dq_kernel(
    q, k, v, k_rows, v_rows, q_positions, blocks, masks, counts, out, lse, d_out, d_lse, dq,
    dots, SCALE: tl.constexpr, T: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, H: tl.constexpr, V: tl.constexpr, HP: tl.constexpr,
    VP: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, PADDED: tl.constexpr, WHOLE: tl.constexpr,
    K_TMA: tl.constexpr, V_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and `dots` of one tile of queries. Grid as in `_forward_kernel`.

    Scores are transposed, [keys, rows]: the matrix units want many keys but take few rows, and the
    fewer queries a tile has, the less of the walk through their union is for others.
    """
    c: tl.constexpr = SCALE * LOG2E
    batch, group = tl.program_id(1) // K, tl.program_id(1) % K
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head_index, offset, valid, local, position = _query_tile(
        q_positions, tile, batch, group, T, N, N // K, QUERIES, HEADS, ROWS
    )
    blocks, masks, count, whole = _tile_lists(blocks, masks, counts, M, QUERIES)
    q_tile = load_tile(q + head_index * H, offset * H, valid, H, HP, True)
    d_out_tile = load_tile(d_out + head_index * V, offset * V, valid, V, VP, True)
    out_tile = load_tile(out + head_index * V, offset * V, valid, V, VP, True)
    dots_tile, row_delta = dots_and_delta(out_tile, d_out_tile, d_lse + head_index + offset, valid)
    tl.store(dots + head_index + offset, dots_tile, mask=valid)
    lse2 = load_lse2(lse + head_index + offset, valid)
    # Turned here, and not before each product, for them to lie in shared memory before the steps.
    q_tile, d_out_tile = tl.trans(q_tile), tl.trans(d_out_tile)
    k += ((batch * S).to(tl.int64) * K + group) * H
    v += ((batch * S).to(tl.int64) * K + group) * V
    dq_tile = tl.zeros([HP, ROWS], tl.float32)
    whole_steps = whole * PADDED // KEYS if WHOLE else 0
    for i in range(0, whole_steps):
        entry = i * KEYS // PADDED
        start = tl.load(blocks + entry) * BLOCK_SIZE + i * KEYS % PADDED
        chosen = ((tl.load(masks + entry) >> local) & 1) != 0
        k_tile = load_rows(k_rows, k, batch * S, start, group, K, H, KEYS, HP, K_TMA)
        v_tile = load_rows(v_rows, v, batch * S, start, group, K, V, KEYS, VP, V_TMA)
        scores = tl.dot(k_tile, q_tile, input_precision=PRECISION)
        chosen_lse2 = tl.where(chosen, lse2, float("inf"))
        dq_tile = _dq_step(
            dq_tile, d_out_tile, chosen_lse2, row_delta, scores, k_tile, v_tile, c, PRECISION
        )
    for i in range(whole_steps, tl.cdiv(count * PADDED, KEYS)):
        k_tile, v_tile, seen = _masked_step(
            k, v, blocks, masks, i, count, local, position, K, H, V, HP, VP, KEYS, BLOCK_SIZE,
            PADDED,
        )  # fmt: skip
        scores = tl.dot(k_tile, q_tile, input_precision=PRECISION)
        scores = tl.where(tl.trans(seen), scores, float("-inf"))
        dq_tile = _dq_step(
            dq_tile, d_out_tile, lse2, row_delta, scores, k_tile, v_tile, c, PRECISION
        )
    store_tile(dq + head_index * H, offset * H, tl.trans(dq_tile) * SCALE, valid, H, HP)


@triton.jit
def _dkv_kernel(
    q, k, v, q_positions, lse, d_out, delta, queries, items, dk, dv, SCALE: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    V: tl.constexpr, HP: tl.constexpr, VP: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one item gives to dk and dv of KEYS keys. Grid: items; batch * K; parts of a block."""
    G: tl.constexpr = N // K
    c: tl.constexpr = SCALE * LOG2E
    batch, group = tl.program_id(1) // K, tl.program_id(1) % K
    index = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    items += index * 3
    block, start, count = tl.load(items), tl.load(items + 1), tl.load(items + 2)
    if count == 0:
        return
    queries += start
    q_positions += batch * T
    # Positions rise with the queries: those that do not see the whole block come first.
    slot = tl.arange(0, SIZE)
    all_queries = tl.load(queries + slot, mask=slot < count, other=0)
    positions = tl.load(q_positions + all_queries, mask=slot < count, other=LARGEST_INT)
    some = tl.sum((positions < (block + 1) * BLOCK_SIZE - 1).to(tl.int32))

    within = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    at = block * BLOCK_SIZE + within
    real = (within < BLOCK_SIZE) & (at < S)
    first_head = (batch * S + block * BLOCK_SIZE).to(tl.int64) * K + group
    k_tile = load_tile(k + first_head * H, within * (K * H), real, H, HP, True)
    v_tile = load_tile(v + first_head * V, within * (K * V), real, V, VP, True)
    head_index = (batch * T).to(tl.int64) * N + group * G
    dk_tile, dv_tile = tl.zeros([KEYS, HP], tl.float32), tl.zeros([KEYS, VP], tl.float32)
    for i in range(0, tl.cdiv(count * G, ROWS)):
        row = i * ROWS + tl.arange(0, ROWS)
        valid = row < count * G
        query = tl.load(queries + row // G, mask=valid, other=0)
        head = head_index + query.to(tl.int64) * N + row % G
        q_tile = load_tile(q, head * H, valid, H, HP, True)
        d_out_tile = load_tile(d_out, head * V, valid, V, VP, True)
        lse2 = load_lse2(lse + head, valid)
        row_delta = tl.load(delta + head, mask=valid, other=0.0)
        masked = (i * ROWS < some * G) | (BLOCK_SIZE % KEYS > 0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        if masked:
            position = tl.load(q_positions + query, mask=valid, other=-1)
            seen = real[:, None] & (at[:, None] <= position[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores * c - lse2[None, :])
        dv_tile = tl.dot(p.to(q_tile.dtype), d_out_tile, dv_tile, input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(d_out_tile), input_precision=PRECISION)
        if masked:
            dp = tl.where(p > 0, dp, 0.0)  # of a key that nobody sees it may be NaN
        ds = p * (dp - row_delta[None, :])
        dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)
    stored = within < BLOCK_SIZE
    index *= BLOCK_SIZE
    store_tile(dk + index * H, within * H, dk_tile * SCALE, stored, H, HP)
    store_tile(dv + index * V, within * V, dv_tile, stored, V, VP)


@triton.jit
def _sum_items_kernel(
    partial, first_items, out, S: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, ITEMS: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Adds the items of one block in order. Grid: blocks; batch * K; parts of KEYS keys."""
    batch, group = tl.program_id(1) // K, tl.program_id(1) % K
    block = tl.program_id(0)
    first_items += tl.program_id(1) * (tl.num_programs(0) + 1) + block
    within = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    total = tl.zeros([KEYS, HP], tl.float32)
    for i in range(tl.load(first_items), tl.load(first_items + 1)):
        base = (tl.program_id(1) * ITEMS + i).to(tl.int64) * (BLOCK_SIZE * H)
        total += load_tile(partial + base, within * H, within < BLOCK_SIZE, H, HP, True)
    at = block * BLOCK_SIZE + within
    first_head = (batch * S + block * BLOCK_SIZE).to(tl.int64) * K + group
    exists = (within < BLOCK_SIZE) & (at < S)
    store_tile(out + first_head * H, within * (K * H), total, exists, H, HP)


def _tuning(kernel, q, v):
    return tuning.lookup(kernel, head_dim=q.shape[3], v_head_dim=v.shape[3], dtype=q.dtype)


def _launch_over_queries(kernel, name, q, k, v, block_indices, q_positions, rest, out_type, sizes):
    """Launches one program for each tile of queries."""
    cut = _tuning(name, q, v)
    group = q.shape[2] // k.shape[2]
    heads = min(group, cut.rows)
    queries = min(cut.rows // heads, lists.largest_tile(block_indices.shape[3]))
    block_size, whole = sizes["BLOCK_SIZE"], padded(sizes["BLOCK_SIZE"])
    unions = lists.unions(block_indices, q_positions, queries=queries, block_size=block_size)
    # Steps of one block, or of a part of it, take a scalar of each list.
    walks_whole = block_size == whole and cut.keys <= whole
    (k_rows, k_tma), (v_rows, v_tma) = (launch.row_loader(x, cut.keys) for x in (k, v))
    return launch.launch(
        kernel,
        *(q, k, v, k_rows, v_rows, q_positions, *unions, *rest),
        out_type=out_type,
        grid=(
            triton.cdiv(q.shape[1], queries),
            q.shape[0] * k.shape[2],
            triton.cdiv(group, heads),
        ),
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        M=block_indices.shape[3],
        QUERIES=queries,
        HEADS=heads,
        ROWS=padded(queries * heads),
        KEYS=cut.keys,
        PADDED=whole,
        WHOLE=walks_whole,
        K_TMA=k_tma,
        V_TMA=v_tma,
        **sizes,
    )


def _forward(q, k, v, block_indices, q_positions, *, block_size, scale):
    out_type = launch.like(q, v.shape[3])
    sizes = launch.sizes(q, k, v, scale) | {"BLOCK_SIZE": block_size}
    return _launch_over_queries(
        *(_forward_kernel, "selected_forward", q, k, v, block_indices, q_positions, ()),
        *(out_type, sizes),
    )


def _sum_items(partial, first_items, like, block_size):
    """The gradient in the shape and dtype of `like` [B, S, K, H] from its items."""
    _, num_keys, groups, size = like.shape
    keys = min(padded(block_size), SUMMED_KEYS)
    return launch.launch(
        _sum_items_kernel,
        partial,
        first_items,
        out_type=jax.ShapeDtypeStruct(like.shape, like.dtype),
        grid=(first_items.shape[2] - 1, like.shape[0] * groups, triton.cdiv(block_size, keys)),
        num_warps=8,
        num_stages=2,
        S=num_keys,
        K=groups,
        H=size,
        HP=padded(size),
        ITEMS=partial.shape[2],
        KEYS=keys,
        BLOCK_SIZE=block_size,
    )


def _key_gradients(q, k, v, block_indices, q_positions, lse, d_out, delta, sizes):
    block_size = sizes["BLOCK_SIZE"]
    if k.shape[1] == 0:
        return jnp.zeros_like(k), jnp.zeros_like(v)
    cut = _tuning("selected_dkv", q, v)
    keys = min(cut.keys, padded(block_size))
    queries, items, first_items, _ = inverted_index(
        *(block_indices, jnp.minimum(q_positions, k.shape[1] - 1)),
        num_keys=k.shape[1],
        block_size=block_size,
        size=ITEM_QUERIES,
    )
    shape = (*items.shape[:3], block_size)
    dk, dv = launch.launch(
        _dkv_kernel,
        *(q, k, v, q_positions, lse, d_out, delta, queries, items),
        out_type=tuple(jax.ShapeDtypeStruct((*shape, x.shape[3]), jnp.float32) for x in (k, v)),
        grid=(items.shape[2], q.shape[0] * k.shape[2], triton.cdiv(block_size, keys)),
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        ROWS=cut.rows,
        KEYS=keys,
        SIZE=ITEM_QUERIES,
        **sizes,
    )
    return _sum_items(dk, first_items, k, block_size), _sum_items(dv, first_items, v, block_size)


def _backward(q, k, v, block_indices, q_positions, out, lse, d_out, d_lse, *, block_size, scale):
    out_type = launch.like(q, q.shape[3])
    sizes = launch.sizes(q, k, v, scale) | {"BLOCK_SIZE": block_size}
    rest = (out, lse, d_out, d_lse)
    dq, dots = _launch_over_queries(
        _dq_kernel, "selected_dq", q, k, v, block_indices, q_positions, rest, out_type, sizes
    )
    delta = dots - d_lse
    gradients = _key_gradients(q, k, v, block_indices, q_positions, lse, d_out, delta, sizes)
    return dq, *gradients, dots


def selected_attention(q, k, v, block_indices, q_positions, block_size, scale, gate=None):
    """Attention of each query over the tokens of its blocks up to its own position (equation 12).

    Differentiable in q, k, v and the gate, through both results.

    Args:
      q: queries [B, T, N, H], bfloat16, float16 or float32.
      k: keys [B, S, K, H]; K divides N, and the G = N // K heads of a group share their blocks.
      v: values [B, S, K, V].
      block_indices: int32 [B, T, K, M], distinct within a row; -1 stands for no block.
      q_positions: int32 [B, T], the position of each query among the keys, rising along a row.
      block_size: l', tokens a block; the last block may be shorter.
      scale: a Python number that multiplies the scores.
      gate: None, or float32 [B, T, N], at least 0: multiplies out; see `calls.differentiable`.

    Returns:
      out [B, T, N, V] in the dtype of q, or of the gate, exactly 0 on an empty row, and lse
      [B, T, N] float32, the natural logarithm of the softmax's denominator, -inf on an empty row.
    """
    q, scale = launch.positive_scale(q, scale)
    # A query beyond the keys sees all of its blocks, of which the kernels read what exists.
    q_positions = jnp.minimum(q_positions, k.shape[1] - 1)
    passes = (
        functools.partial(run, block_size=block_size, scale=scale) for run in (_forward, _backward)
    )
    return launch.differentiable(*passes)(gate, q, k, v, block_indices, q_positions)
