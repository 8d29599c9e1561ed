"""sparse_step and dense_step: attention of one new token a row over what a cache holds.

A step reads far more than it computes, so that it is cut for the memory to be busy: each row and
group into parts of its entries, as many as fill the chip, whose results are joined in their order.
Three launches make a sparse step:

1. parts of the compressed branch, which also leave the sums of `choice.block_sums`;
2. parts of the selected branch, each of which chooses the blocks anew, since what they are chosen
   from is small, and parts of the window, which have their memory read while the others choose;
3. a program for each head, which joins the parts of the branches and adds these by their gates.

A dense step has the first and the last of them. How many parts there are follows from static shapes
alone, see `tuning.parts`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton import launch, tuning
from pallas_kernels.triton.choice import choose, overlaps, store_block_sums
from pallas_kernels.triton.common import LOG2E, padded, start_softmax
from pallas_kernels.triton.launch import refusal  # noqa: F401 - see pallas_kernels.KERNELS
from pallas_kernels.triton.parts import (
    attend,
    joined,
    load_heads,
    program,
    steps_of,
    store_part,
    walk,
)


@triton.jit
def _dense_kernel(
    q, k, v, positions, out, lse, SCALE: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, H: tl.constexpr, V: tl.constexpr, HP: tl.constexpr, VP: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of a row's tokens. Grid: groups, tiles of heads, parts; batch."""
    batch, group, tile, part = program(K, TILES)
    q_tile = load_heads(q, batch, group, tile, N, K, H, HP, ROWS)
    end = tl.minimum(tl.load(positions + batch) + 1, S)
    first, last = steps_of(part, tl.cdiv(end, KEYS), PARTS)
    state = walk(
        start_softmax(ROWS, VP), q_tile, k, v, batch, group, first, last, end, SCALE * LOG2E, S, K,
        H, V, HP, VP, KEYS, PRECISION,
    )  # fmt: skip
    store_part(out, lse, state, batch, group, tile, part, N, K, V, VP, ROWS, PARTS)


@triton.jit
def _complete(position, C: tl.constexpr, COMPRESS: tl.constexpr, STRIDE: tl.constexpr):
    """How many compressed blocks are complete at a position."""
    return tl.maximum(tl.minimum((position + 1 - COMPRESS + STRIDE) // STRIDE, C), 0)


@triton.jit
def _compressed_kernel(
    q, k, v, positions, out, lse, sums, tails, maxima, SCALE: tl.constexpr, C: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, V: tl.constexpr, HP: tl.constexpr,
    VP: tl.constexpr, COMPRESS: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr,
    STEPS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of a row's entries, in steps of BLOCKS selection blocks. Grid as above."""
    G: tl.constexpr = N // K
    c: tl.constexpr = SCALE * LOG2E
    PER_BLOCK: tl.constexpr = SELECT // STRIDE
    STEP: tl.constexpr = BLOCKS * PER_BLOCK
    batch, group, tile, part = program(K, TILES)
    q_tile = load_heads(q, batch, group, tile, N, K, H, HP, ROWS)
    end = _complete(tl.load(positions + batch), C, COMPRESS, STRIDE)
    first, last = steps_of(part, tl.cdiv(end, STEP), PARTS)
    k += (batch.to(tl.int64) * C * K + group) * H
    v += (batch.to(tl.int64) * C * K + group) * V
    head, at = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS)
    weights = overlaps(KEYS, BLOCKS, PER_BLOCK, COMPRESS // STRIDE, WIDTH)
    state = start_softmax(ROWS, VP)
    for i in range(first, last):
        start = (i * STEP).to(tl.int64) * K
        seen = (i * STEP + at < end) & (at < STEP)
        state, scores = attend(
            state, q_tile, k + start * H, v + start * V, at, seen, c, K, H, V, HP, VP, PRECISION
        )
        of_step = (batch * STEPS + i).to(tl.int64) * N + group * G
        store_block_sums(
            sums + of_step * BLOCKS, tails + of_step, maxima + of_step, scores, state[1], weights,
            head, head < G, c, BLOCKS, WIDTH,
        )  # fmt: skip
    store_part(out, lse, state, batch, group, tile, part, N, K, V, VP, ROWS, PARTS)


@triton.jit
def _walk_blocks(
    state, q_tile, k, v, batch, group, blocks, first, last, position, c, S: tl.constexpr,
    K: tl.constexpr, H: tl.constexpr, V: tl.constexpr, HP: tl.constexpr, VP: tl.constexpr,
    KEYS: tl.constexpr, SELECT: tl.constexpr, BEST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends the tokens of some blocks, [BEST] with -1 for none, as if they lay together."""
    k += (batch.to(tl.int64) * S * K + group) * H
    v += (batch.to(tl.int64) * S * K + group) * V
    slot = tl.arange(0, BEST)[None, :]
    for i in range(first, last):
        at = i * KEYS + tl.arange(0, KEYS)
        mine = slot == (at // SELECT)[:, None]
        block = tl.sum(tl.where(mine, blocks[None, :] + 1, 0), 1) - 1
        token = block * SELECT + at % SELECT
        seen = (block >= 0) & (token <= position)
        state, _ = attend(
            state, q_tile, k, v, token.to(tl.int64), seen, c, K, H, V, HP, VP, PRECISION
        )
    return state


@triton.jit
def _selected_kernel(
    q, k, v, k_window, v_window, positions, compressed_lse, sums, tails, maxima, out, lse,
    block_indices, SCALE: tl.constexpr, C: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, V: tl.constexpr, HP: tl.constexpr,
    VP: tl.constexpr, COMPRESS: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
    NUM: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr,
    STEPS: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr, AT_ONCE: tl.constexpr,
    BEST: tl.constexpr, COMPRESSED: tl.constexpr, ALL: tl.constexpr, SELECTED: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One of the SELECTED parts of a row's blocks, or of the WINDOW ones after them. Grid as above.

    COMPRESSED is how many parts `compressed_lse` has.
    """
    PARTS: tl.constexpr = SELECTED + WINDOW
    batch, group, tile, part = program(K, TILES)
    q_tile = load_heads(q, batch, group, tile, N, K, H, HP, ROWS)
    position = tl.load(positions + batch)
    state = start_softmax(ROWS, VP)
    if part < SELECTED:
        entries = _complete(position, C, COMPRESS, STRIDE)
        blocks = choose(
            sums, tails, maxima, compressed_lse, batch, group, position,
            tl.cdiv(entries, BLOCKS * (SELECT // STRIDE)), N, K, STEPS, BLOCKS, PADDED, HEADS,
            AT_ONCE, COMPRESSED, ALL, SELECT, NUM, INITIAL, LOCAL, NUM_BLOCKS, BEST,
        )  # fmt: skip
        place = tl.arange(0, BEST)
        stored = place < tl.where(part + tile == 0, NUM, 0)
        tl.store(block_indices + (batch * K + group) * NUM + place, blocks, mask=stored)
        tokens = tl.sum((blocks >= 0).to(tl.int32), 0) * SELECT
        first, last = steps_of(part, tl.cdiv(tokens, KEYS), SELECTED)
        state = _walk_blocks(
            state, q_tile, k, v, batch, group, blocks, first, last, position, SCALE * LOG2E, S, K,
            H, V, HP, VP, KEYS, SELECT, BEST, PRECISION,
        )  # fmt: skip
    else:
        end = tl.minimum(position + 1, W)
        first, last = steps_of(part - SELECTED, tl.cdiv(end, KEYS), WINDOW)
        state = walk(
            state, q_tile, k_window, v_window, batch, group, first, last, end, SCALE * LOG2E, W, K,
            H, V, HP, VP, KEYS, PRECISION,
        )  # fmt: skip
    store_part(out, lse, state, batch, group, tile, part, N, K, V, VP, ROWS, PARTS)


@triton.jit
def _join_kernel(
    parts, lse, out, V: tl.constexpr, VP: tl.constexpr, PARTS: tl.constexpr,
    AT_ONCE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The parts of one head, joined. Grid: batch * N."""
    row, column = tl.program_id(0), tl.arange(0, VP)
    x = joined(parts, lse, row, 0, PARTS, PARTS, V, VP, AT_ONCE, ALL)
    tl.store(out + row.to(tl.int64) * V + column, x.to(out.dtype.element_ty), mask=column < V)


@triton.jit
def _gate_kernel(
    compressed, compressed_lse, parts, lse, gates, out, V: tl.constexpr, VP: tl.constexpr,
    COMPRESSED: tl.constexpr, SELECTED: tl.constexpr, WINDOW: tl.constexpr,
    AT_ONCE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The parts of one head, joined by branch, and the branches by their gates. Grid: batch * N."""
    PARTS: tl.constexpr = SELECTED + WINDOW
    row, column = tl.program_id(0), tl.arange(0, VP)
    gates += row.to(tl.int64) * 3
    x = joined(compressed, compressed_lse, row, 0, COMPRESSED, COMPRESSED, V, VP, AT_ONCE, ALL)
    x *= tl.load(gates).to(tl.float32)
    y = joined(parts, lse, row, 0, SELECTED, PARTS, V, VP, AT_ONCE, ALL)
    x += y * tl.load(gates + 1).to(tl.float32)
    y = joined(parts, lse, row, SELECTED, WINDOW, PARTS, V, VP, AT_ONCE, ALL)
    x += y * tl.load(gates + 2).to(tl.float32)
    tl.store(out + row.to(tl.int64) * V + column, x.to(out.dtype.element_ty), mask=column < V)


class _Cut(NamedTuple):
    """How a step's kernels are cut: the keywords that they share, by name, and the launch's."""

    tuning: tuning.Tuning
    constants: dict
    programs: int


def _cut(name, q, k, v, scale):
    """The cut of parts of a cache k and v for one query a row."""
    (batch, heads, head_dim), (groups, v_head_dim) = q.shape, v.shape[2:]
    found = tuning.lookup(name, head_dim=head_dim, v_head_dim=v_head_dim, dtype=q.dtype)
    rows = min(found.rows, max(triton.next_power_of_2(heads // groups), 16))
    tiles = triton.cdiv(heads // groups, rows)
    constants = {
        "SCALE": scale,
        "N": heads,
        "K": groups,
        "H": head_dim,
        "V": v_head_dim,
        "HP": padded(head_dim),
        "VP": padded(v_head_dim),
        "ROWS": rows,
        "TILES": tiles,
        "PRECISION": launch.precision(q.dtype),
    }
    return _Cut(found, constants, batch * groups * tiles)


def _launch_parts(kernel, cut, parts, *arrays, out_type, **constants):
    """Launches `parts` programs for each row and tile of heads, and its results before others.

    Returns:
      The parts' outputs [B, N, parts, V] and lse [B, N, parts], float32, then those of out_type.
    """
    batch, heads, v_head_dim = arrays[0].shape[0], cut.constants["N"], cut.constants["V"]
    return launch.launch(
        kernel,
        *arrays,
        out_type=(
            jax.ShapeDtypeStruct((batch, heads, parts, v_head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, parts), jnp.float32),
            *out_type,
        ),
        grid=(cut.programs // batch * parts, batch),
        num_warps=cut.tuning.num_warps,
        num_stages=cut.tuning.num_stages,
        **cut.constants,
        **constants,
    )


def _launch_join(kernel, parts, *arrays, q, v_head_dim, largest, **constants):
    """Launches a program for each head, which loads as many parts at once as its registers hold."""
    batch, heads, _ = q.shape
    everything, features = triton.next_power_of_2(largest), padded(v_head_dim)
    at_once = min(everything, max(tuning.JOINED_AT_ONCE // features, 1))
    return launch.launch(
        kernel,
        *parts,
        *arrays,
        out_type=jax.ShapeDtypeStruct((batch, heads, v_head_dim), q.dtype),
        grid=(batch * heads,),
        num_warps=4 if at_once * features > 1024 else 1,
        num_stages=1,
        V=v_head_dim,
        VP=features,
        AT_ONCE=at_once,
        ALL=everything,
        **constants,
    )


def _dense(q, k, v, positions, *, scale):
    cut = _cut("step", q, k, v, scale)
    steps = triton.cdiv(k.shape[1], cut.tuning.keys)
    parts = tuning.parts(steps, cut.programs, tuning.ENOUGH_PARTS)
    found = _launch_parts(
        *(_dense_kernel, cut, parts, q, k, v, positions),
        out_type=(),
        S=k.shape[1],
        KEYS=cut.tuning.keys,
        PARTS=parts,
    )
    return _launch_join(_join_kernel, found, q=q, v_head_dim=v.shape[3], largest=parts, PARTS=parts)


def _compressed(q, k, v, positions, *, scale, geometry):
    """The first launch.

    Returns:
      The outputs of its parts and their lse; and for `choose` sums, tails and maxima.
    """
    cut = _cut("step", q, k, v, scale)
    per_block = geometry["SELECT"] // geometry["STRIDE"]
    blocks = cut.tuning.keys // per_block
    steps = triton.cdiv(k.shape[1], blocks * per_block)
    parts = tuning.parts(steps, cut.programs, tuning.ENOUGH_PARTS)
    a_step = (q.shape[0], steps, q.shape[1])
    return _launch_parts(
        *(_compressed_kernel, cut, parts, q, k, v, positions),
        out_type=tuple(
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((*a_step, blocks), a_step, a_step)
        ),
        C=k.shape[1],
        KEYS=cut.tuning.keys,
        BLOCKS=blocks,
        STEPS=steps,
        # More columns than heads: otherwise Triton has every warp of a program do the same.
        WIDTH=max(triton.next_power_of_2(blocks + 1), 2 * cut.constants["ROWS"]),
        PARTS=parts,
        **geometry,
    )


def _sparse(q, q_compressed, *arrays, scale, geometry, choice):
    k_compressed, v_compressed, k, v, k_window, v_window, gates, positions = arrays
    compressed, compressed_lse, *sums = _compressed(
        q_compressed, k_compressed, v_compressed, positions, scale=scale, geometry=geometry
    )
    cut = _cut("step_selected", q, k, v, scale)
    keys, window = cut.tuning.keys, k_window.shape[1]
    tokens = choice["NUM"] * geometry["SELECT"]
    selected_parts = tuning.parts(triton.cdiv(tokens, keys), cut.programs, tuning.ENOUGH_CHOICES)
    window_parts = tuning.parts(triton.cdiv(window, keys), cut.programs, tuning.ENOUGH_CHOICES)
    _, steps, heads, blocks = sums[0].shape
    group, width = triton.next_power_of_2(heads // k.shape[2]), triton.next_power_of_2(blocks)
    all_compressed = compressed.shape[2]
    parts, lse, block_indices = _launch_parts(
        *(_selected_kernel, cut, selected_parts + window_parts),
        *(q, k, v, k_window, v_window, positions, compressed_lse, *sums),
        out_type=(jax.ShapeDtypeStruct((k.shape[0], k.shape[2], choice["NUM"]), jnp.int32),),
        C=k_compressed.shape[1],
        S=k.shape[1],
        W=window,
        KEYS=keys,
        BLOCKS=blocks,
        STEPS=steps,
        PADDED=width,
        HEADS=group,
        AT_ONCE=min(
            max(tuning.CHOSEN_AT_ONCE // (group * width), 2), max(triton.next_power_of_2(steps), 2)
        ),
        BEST=max(triton.next_power_of_2(choice["NUM"]), 2),
        COMPRESSED=all_compressed,
        ALL=triton.next_power_of_2(all_compressed),
        SELECTED=selected_parts,
        WINDOW=window_parts,
        **geometry,
        **choice,
    )
    out = _launch_join(
        *(_gate_kernel, (compressed, compressed_lse, parts, lse), gates),
        q=q,
        v_head_dim=v.shape[3],
        largest=max(all_compressed, selected_parts, window_parts),
        COMPRESSED=all_compressed,
        SELECTED=selected_parts,
        WINDOW=window_parts,
    )
    return out, block_indices


def sparse_step(
    q,
    q_compressed,
    compressed,
    selected,
    window,
    gates,
    positions,
    *,
    compress_block_size,
    compress_stride,
    select_block_size,
    num_selected_blocks,
    num_initial_blocks,
    num_local_blocks,
    scale,
):
    """The gated sum of the three branches for one query a row. Not differentiable.

    Args:
      q: queries [B, N, H], bfloat16, float16 or float32.
      q_compressed: queries of the compressed branch [B, N, H].
      compressed: keys [B, C, K, H] and values [B, C, K, V]; K divides N. Entry i is compressed
        block i.
      selected: keys [B, S, K, H] and values [B, S, K, V]; entry p is the token at position p.
      window: keys [B, w, K, H] and values [B, w, K, V]; entry p % w is the token at position p, of
        the last w up to the query. No entry behind the query's token is read, in any branch.
      gates: of the branches, [B, N, 3], in the order compressed, selected, window.
      positions: int32 [B], of the queries: not negative, and below S.
      compress_block_size: l, a multiple of d.
      compress_stride: d.
      select_block_size: l', a multiple of d and at least l.
      num_selected_blocks: n.
      num_initial_blocks: forced first blocks.
      num_local_blocks: forced last blocks up to the query's own.
      scale: a Python number that multiplies the scores.

    Returns:
      The outputs [B, N, V] in q's dtype, and int32 [B, K, n]: the selected blocks in ascending
      order, then -1 where there is no further block.
    """
    num_blocks = launch.num_select_blocks(
        compressed[0].shape[1],
        compress_block_size=compress_block_size,
        compress_stride=compress_stride,
        select_block_size=select_block_size,
    )
    if compressed[0].shape[1] == 0:  # an entry that no position sees, for there to be memory
        compressed = tuple(jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)]) for x in compressed)
    q_compressed, _ = launch.positive_scale(q_compressed, scale)
    q, scale = launch.positive_scale(q, scale)
    run = functools.partial(
        _sparse,
        scale=scale,
        geometry={
            "COMPRESS": compress_block_size,
            "STRIDE": compress_stride,
            "SELECT": select_block_size,
        },
        choice={
            "NUM": num_selected_blocks,
            "INITIAL": num_initial_blocks,
            "LOCAL": num_local_blocks,
            "NUM_BLOCKS": num_blocks,
        },
    )
    return launch.batched(run)(q, q_compressed, *compressed, *selected, *window, gates, positions)


def dense_step(q, k, v, positions, *, scale):
    """Attention of one query a row over the tokens up to its own. Not differentiable.

    Args:
      q: queries [B, N, H], bfloat16, float16 or float32.
      k: keys [B, S, K, H]; entry p is the token at position p; K divides N.
      v: values [B, S, K, V]. No entry behind the query's token is read.
      positions: int32 [B], of the queries: not negative, and below S.
      scale: a Python number that multiplies the scores.

    Returns:
      The outputs [B, N, V] in q's dtype.
    """
    q, scale = launch.positive_scale(q, scale)
    return launch.batched(functools.partial(_dense, scale=scale))(q, k, v, positions)
