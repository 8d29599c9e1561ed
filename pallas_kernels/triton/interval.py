"""interval_attention: each query attends one interval of keys.

The T * G rows of a group (see the package) are cut into tiles. Forward and for dq, a tile of rows
walks the keys from its smallest lo to its largest hi. For dk and dv, a tile of keys walks the rows
that may see it, which lie together because lo and hi do not decrease. Steps that every row of the
tile sees whole skip the mask. No program adds to what another one wrote.
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.lists import search
from pallas_kernels.triton import launch, tuning
from pallas_kernels.triton.common import (
    LOG2E,
    dots_and_delta,
    finish_softmax,
    load_lse2,
    load_rows,
    load_tile,
    start_softmax,
    store_tile,
    update_softmax,
)
from pallas_kernels.triton.launch import refusal  # noqa: F401 - see pallas_kernels.KERNELS

#: Programs that keep the largest chips busy to the end. Fewer tiles of keys than that have their
#: queries split among several programs, whose sums are added in order.
ENOUGH_PROGRAMS = 2048
LARGEST_SPLIT = 32

#: Keys up to which an interval counts as short: its programs begin and end more than they walk.
SHORT = 1024


@triton.jit
def _steps(first, end, whole_first, whole_end, SIZE: tl.constexpr):
    """Cuts [first, end) into steps of SIZE, of which `whole` from `head` on lie in the whole range.

    Returns:
      The number of steps, head, and whole.
    """
    steps = tl.cdiv(tl.maximum(end - first, 0), SIZE)
    head = tl.minimum(tl.cdiv(tl.maximum(whole_first - first, 0), SIZE), steps)
    whole = tl.maximum(tl.minimum(whole_end, end) - first, 0) // SIZE - head
    return steps, head, tl.maximum(whole, 0)


@triton.jit
def _query_tile(
    lo, hi, tile, batch, group, T: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    G: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of rows, and the keys that it walks.

    lo and hi do not decrease: the first and the last query bound what any and what all rows see.

    Returns:
      The index of its first head; the offsets of its heads from there; which rows are real; their
      lo and hi; the first key and the one after the last; and `_steps` of them.
    """
    row = tile * ROWS + tl.arange(0, ROWS)
    query = row // G
    valid = query < T
    first_query = tile * ROWS // G
    last_query = tl.minimum((tile * ROWS + ROWS - 1) // G, T - 1)
    head_index = (batch * T + first_query).to(tl.int64) * N + group * G
    offset = (query - first_query) * N + row % G
    lo += batch * T
    hi += batch * T
    first = tl.maximum(tl.load(lo + first_query), 0)
    end = tl.minimum(tl.load(hi + last_query), S)
    whole_first, whole_end = tl.load(lo + last_query), tl.load(hi + first_query)
    steps, head, whole = _steps(first, end, whole_first, whole_end, KEYS)
    row_lo = tl.load(lo + query, mask=valid, other=0)
    row_hi = tl.load(hi + query, mask=valid, other=0)
    return head_index, offset, valid, row_lo, row_hi, first, end, steps, head, whole


@triton.jit
def _masked_keys(
    k, v, first, i, end, row_lo, row_hi, K: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    HP: tl.constexpr, VP: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Step i of keys and values, zeros where no row sees them, and who sees which.

    They must be zeros: a probability of 0 times what memory that nobody sees may hold, a NaN say,
    is not 0.
    """
    key = first + i * KEYS + tl.arange(0, KEYS)
    seen = (key[None, :] >= row_lo[:, None]) & (key[None, :] < row_hi[:, None])
    by_some = (tl.max(seen.to(tl.int32), 0) > 0) & (key < end)
    at = tl.arange(0, KEYS) * K
    start = (i * KEYS).to(tl.int64) * K
    k_tile = load_tile(k + start * H, at * H, by_some, H, HP, True)
    v_tile = load_tile(v + start * V, at * V, by_some, V, VP, True)
    return k_tile, v_tile, seen & by_some[None, :]


@triton.jit
def _forward_kernel(
    q, k, v, k_rows, v_rows, lo, hi, out, lse, SCALE: tl.constexpr, T: tl.constexpr,
    S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    HP: tl.constexpr, VP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    K_TMA: tl.constexpr, V_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows. Grid: tiles, the longest rows first; batch * K."""
    c: tl.constexpr = SCALE * LOG2E
    batch, group = tl.program_id(1) // K, tl.program_id(1) % K
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head_index, offset, valid, row_lo, row_hi, first, end, steps, head, whole = _query_tile(
        lo, hi, tile, batch, group, T, S, N, N // K, ROWS, KEYS
    )
    q_tile = load_tile(q + head_index * H, offset * H, valid, H, HP, True)
    first_row = batch * S + first
    k += (first_row.to(tl.int64) * K + group) * H
    v += (first_row.to(tl.int64) * K + group) * V
    state = start_softmax(ROWS, VP)
    for i in range(head, head + whole):
        k_tile = load_rows(k_rows, k, first_row, i * KEYS, group, K, H, KEYS, HP, K_TMA)
        v_tile = load_rows(v_rows, v, first_row, i * KEYS, group, K, V, KEYS, VP, V_TMA)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        state = update_softmax(state, scores, v_tile, valid, c, False, PRECISION)
    for j in range(0, steps - whole):
        i = tl.where(j < head, j, j + whole)
        k_tile, v_tile, seen = _masked_keys(
            k, v, first, i, end, row_lo, row_hi, K, H, V, HP, VP, KEYS
        )
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        scores = tl.where(seen, scores, float("-inf"))
        state = update_softmax(state, scores, v_tile, valid, c, False, PRECISION)
    out_tile, lse_tile = finish_softmax(state)
    store_tile(out + head_index * V, offset * V, out_tile, valid, V, VP)
    tl.store(lse + head_index + offset, lse_tile, mask=valid)


@triton.jit
def _dq_step(dq_tile, d_out_tile, lse2, delta, scores, k_tile, v_tile, c, PRECISION: tl.constexpr):
    """Adds what a tile of keys and values gives to the gradient of a tile of rows, unscaled."""
    p = tl.exp2(scores * c - lse2[:, None])
    dp = tl.dot(d_out_tile, tl.trans(v_tile), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision=PRECISION)


@triton.jit
def _dq_kernel(
    q, k, v, k_rows, v_rows, lo, hi, out, lse, d_out, d_lse, dq, dots, SCALE: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    V: tl.constexpr, HP: tl.constexpr, VP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    K_TMA: tl.constexpr, V_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and `dots` of one tile of rows. Grid as in `_forward_kernel`."""
    c: tl.constexpr = SCALE * LOG2E
    batch, group = tl.program_id(1) // K, tl.program_id(1) % K
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head_index, offset, valid, row_lo, row_hi, first, end, steps, head, whole = _query_tile(
        lo, hi, tile, batch, group, T, S, N, N // K, ROWS, KEYS
    )
    q_tile = load_tile(q + head_index * H, offset * H, valid, H, HP, True)
    d_out_tile = load_tile(d_out + head_index * V, offset * V, valid, V, VP, True)
    out_tile = load_tile(out + head_index * V, offset * V, valid, V, VP, True)
    dots_tile, row_delta = dots_and_delta(out_tile, d_out_tile, d_lse + head_index + offset, valid)
    tl.store(dots + head_index + offset, dots_tile, mask=valid)
    lse2 = load_lse2(lse + head_index + offset, valid)
    first_row = batch * S + first
    k += (first_row.to(tl.int64) * K + group) * H
    v += (first_row.to(tl.int64) * K + group) * V
    dq_tile = tl.zeros([ROWS, HP], tl.float32)
    for i in range(head, head + whole):
        k_tile = load_rows(k_rows, k, first_row, i * KEYS, group, K, H, KEYS, HP, K_TMA)
        v_tile = load_rows(v_rows, v, first_row, i * KEYS, group, K, V, KEYS, VP, V_TMA)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        dq_tile = _dq_step(
            dq_tile, d_out_tile, lse2, row_delta, scores, k_tile, v_tile, c, PRECISION
        )
    for j in range(0, steps - whole):
        i = tl.where(j < head, j, j + whole)
        k_tile, v_tile, seen = _masked_keys(
            k, v, first, i, end, row_lo, row_hi, K, H, V, HP, VP, KEYS
        )
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        scores = tl.where(seen, scores, float("-inf"))
        dq_tile = _dq_step(
            dq_tile, d_out_tile, lse2, row_delta, scores, k_tile, v_tile, c, PRECISION
        )
    store_tile(dq + head_index * H, offset * H, dq_tile * SCALE, valid, H, HP)


@triton.jit
def _dkv_kernel(
    q, k, v, lo, hi, lse, d_out, delta, bounds, dk, dv, SCALE: tl.constexpr, B: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    V: tl.constexpr, HP: tl.constexpr, VP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys from one of SPLITS chunks of the queries.

    Grid: tiles of keys, fastest, so that programs that run together read the same queries, times
    chunks; batch * K.
    """
    G: tl.constexpr = N // K
    c: tl.constexpr = SCALE * LOG2E
    CHUNK: tl.constexpr = (T + SPLITS - 1) // SPLITS
    TILES: tl.constexpr = (S + KEYS - 1) // KEYS
    batch, group = tl.program_id(1) // K, tl.program_id(1) % K
    tile, split = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    bounds += (batch * TILES + tile) * 4
    first = tl.maximum(tl.load(bounds), split * CHUNK)
    end = tl.minimum(tl.load(bounds + 1), (split + 1) * CHUNK)
    whole_first, whole_end = tl.load(bounds + 2), tl.load(bounds + 3)
    steps, head, whole = _steps(first * G, end * G, whole_first * G, whole_end * G, ROWS)

    at = tile * KEYS + tl.arange(0, KEYS)
    first_head = (batch * S + tile * KEYS).to(tl.int64) * K + group
    k_offset = tl.arange(0, KEYS) * K
    k_tile = load_tile(k + first_head * H, k_offset * H, at < S, H, HP, True)
    v_tile = load_tile(v + first_head * V, k_offset * V, at < S, V, VP, True)
    dk_tile, dv_tile = tl.zeros([KEYS, HP], tl.float32), tl.zeros([KEYS, VP], tl.float32)
    for i in range(0, steps):
        start = first * G + i * ROWS
        row = start + tl.arange(0, ROWS)
        query = row // G
        valid = query < end
        head_index = (batch * T + start // G).to(tl.int64) * N + group * G
        offset = (query - start // G) * N + row % G
        q_tile = load_tile(q + head_index * H, offset * H, valid, H, HP, True)
        d_out_tile = load_tile(d_out + head_index * V, offset * V, valid, V, VP, True)
        lse2 = load_lse2(lse + head_index + offset, valid)
        row_delta = tl.load(delta + head_index + offset, mask=valid, other=0.0)
        masked = (i < head) | (i >= head + whole)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        if masked:
            row_lo = tl.load(lo + batch * T + query, mask=valid, other=0)
            row_hi = tl.load(hi + batch * T + query, mask=valid, other=0)
            seen = (at[:, None] >= row_lo[None, :]) & (at[:, None] < row_hi[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores * c - lse2[None, :])
        dv_tile = tl.dot(p.to(q_tile.dtype), d_out_tile, dv_tile, input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(d_out_tile), input_precision=PRECISION)
        if masked:
            dp = tl.where(p > 0, dp, 0.0)  # of a key that nobody sees it may be NaN
        ds = p * (dp - row_delta[None, :])
        dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)
    first_head += (split * B * S).to(tl.int64) * K
    store_tile(dk + first_head * H, k_offset * H, dk_tile * SCALE, at < S, H, HP)
    store_tile(dv + first_head * V, k_offset * V, dv_tile, at < S, V, VP)


def _tuning(kernel, q, v, longest=None):
    if longest is not None and longest <= SHORT:
        kernel = f"{kernel}_short"
    return tuning.lookup(kernel, head_dim=q.shape[3], v_head_dim=v.shape[3], dtype=q.dtype)


def _launch_over_rows(kernel, cut, q, k, v, rest, out_type, scale):
    """Launches one program for each tile of rows."""
    rows = q.shape[1] * q.shape[2] // k.shape[2]
    (k_rows, k_tma), (v_rows, v_tma) = (launch.row_loader(x, cut.keys) for x in (k, v))
    return launch.launch(
        kernel,
        *(q, k, v, k_rows, v_rows, *rest),
        out_type=out_type,
        grid=(triton.cdiv(rows, cut.rows), q.shape[0] * k.shape[2]),
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        ROWS=cut.rows,
        KEYS=cut.keys,
        K_TMA=k_tma,
        V_TMA=v_tma,
        **launch.sizes(q, k, v, scale),
    )


def _forward(q, k, v, lo, hi, *, scale, longest):
    out_type = launch.like(q, v.shape[3])
    cut = _tuning("interval_forward", q, v, longest)
    return _launch_over_rows(_forward_kernel, cut, q, k, v, (lo, hi), out_type, scale)


def _row_bounds(lo, hi, num_keys, size):
    """For each tile of keys, the queries that see some of it and those that see all of it.

    Returns:
      int32 [B, tiles, 4]: the first of the former and the one after their last, then likewise.
    """
    start = jnp.arange(0, num_keys, size, dtype=jnp.int32)
    end = jnp.minimum(start + size, num_keys)

    def one_row(lo, hi):
        hi = jnp.minimum(hi, num_keys)
        bounds = (
            search(hi, start, side="right"),
            search(lo, end, side="left"),
            search(hi, start + size, side="left"),
            search(lo, start, side="right"),
        )
        return jnp.stack(bounds, axis=-1).astype(jnp.int32)

    return jax.vmap(one_row)(lo, hi)


def _splits(programs, num_queries):
    """How many chunks the queries are split into, so that there are enough programs."""
    return max(min(ENOUGH_PROGRAMS // programs, LARGEST_SPLIT, triton.cdiv(num_queries, 64)), 1)


def _key_gradients(q, k, v, lo, hi, lse, d_out, delta, cut, scale):
    if k.shape[1] == 0:
        return jnp.zeros_like(k), jnp.zeros_like(v)
    batch, num_queries = q.shape[:2]
    tiles = triton.cdiv(k.shape[1], cut.keys)
    splits = _splits(tiles * batch * k.shape[2], num_queries)
    partial = k.dtype if splits == 1 else jnp.float32
    dk, dv = launch.launch(
        _dkv_kernel,
        *(q, k, v, lo, hi, lse, d_out, delta, _row_bounds(lo, hi, k.shape[1], cut.keys)),
        out_type=tuple(jax.ShapeDtypeStruct((splits, *x.shape), partial) for x in (k, v)),
        grid=(tiles * splits, batch * k.shape[2]),
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        B=batch,
        ROWS=cut.rows,
        KEYS=cut.keys,
        SPLITS=splits,
        **launch.sizes(q, k, v, scale),
    )
    return tuple(sum(x[i] for i in range(splits)).astype(k.dtype) for x in (dk, dv))


def _backward(q, k, v, lo, hi, out, lse, d_out, d_lse, *, scale, longest):
    out_type = launch.like(q, q.shape[3])
    rest = (lo, hi, out, lse, d_out, d_lse)
    cut = _tuning("interval_dq", q, v, longest)
    dq, dots = _launch_over_rows(_dq_kernel, cut, q, k, v, rest, out_type, scale)
    cut = _tuning("interval_dkv", q, v)
    return dq, *_key_gradients(q, k, v, lo, hi, lse, d_out, dots - d_lse, cut, scale), dots


def interval_attention(q, k, v, lo, hi, scale, longest=None, gate=None):
    """Attention of query t over the keys j with lo[b, t] <= j < hi[b, t].

    Differentiable in q, k, v and the gate, through both results. FlashAttention's forward (arXiv
    2307.08691); backward, one kernel for dq and one for dk and dv, without atomics. Keys before the
    first lo and from the last hi of a tile of queries on are never read, whatever they hold.

    Args:
      q: queries [B, T, N, H], bfloat16, float16 or float32.
      k: keys [B, S, K, H]; K divides N.
      v: values [B, S, K, V].
      lo: int32 [B, T], at least 0, not decreasing along t.
      hi: int32 [B, T], not decreasing along t; a row with hi <= lo is empty.
      scale: a Python number that multiplies the scores.
      longest: a bound on hi - lo, if one is known; short intervals are tuned apart.
      gate: None, or float32 [B, T, N], at least 0: multiplies out; see `calls.differentiable`.

    Returns:
      out [B, T, N, V] in the dtype of q, or of the gate, exactly 0 on an empty row, and lse
      [B, T, N] float32, the natural logarithm of the softmax's denominator, -inf on an empty row.
    """
    q, scale = launch.positive_scale(q, scale)
    passes = (functools.partial(run, scale=scale, longest=longest) for run in (_forward, _backward))
    return launch.differentiable(*passes)(gate, q, k, v, lo, hi)
