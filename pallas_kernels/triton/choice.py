"""What one query selects, from what the programs of its compressed branch left of their steps.

The sums of equations 9 and 10, over the entries of a block and over the heads of a group, commute.
So a program of the compressed branch, which holds the probabilities of a step of entries up to each
head's denominator, sums them by block before it forgets them: `block_sums`. A step is a number of
whole blocks; what its last entries give to the block behind it is its tail. With every denominator
known, `choose` multiplies each step's sums by what they lack, adds the heads, and ranks.
"""

import triton
import triton.language as tl

from pallas_kernels.triton.blocks import block_ranks
from pallas_kernels.triton.common import LARGEST_INT


@triton.jit
def overlaps(
    KEYS: tl.constexpr, BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr, COVERING: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Equation 9: how many strides of each entry lie in each block of its step: [KEYS, WIDTH].

    Column BLOCKS is the tail; those beyond it are 0.
    """
    entry, block = tl.arange(0, KEYS)[:, None], tl.arange(0, WIDTH)[None, :]
    begin = tl.maximum(entry, block * PER_BLOCK)
    end = tl.minimum(entry + COVERING, (block + 1) * PER_BLOCK)
    return tl.where(block <= BLOCKS, tl.maximum(end - begin, 0), 0).to(tl.float32)


@triton.jit
def store_block_sums(
    sums, tails, maxima, scores, maximum, weights, at, valid, c, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Stores a step's sums [heads, BLOCKS], its tails and the maxima that they lack.

    Args:
      sums: pointer to those of the step.
      tails: likewise.
      maxima: likewise.
      scores: [heads, KEYS], -inf where not seen.
      maximum: of the softmax with this step, in base 2.
      weights: of `overlaps`.
      at: of each head.
      valid: which heads there are.
      c: scale * log2(e).
      BLOCKS: whole blocks of a step.
      WIDTH: columns of `weights`.
    """
    # The same as in the softmax; the compiler computes it once.
    offset = tl.where(maximum == float("-inf"), 0.0, maximum)
    p = tl.exp2(scores * c - offset[:, None])
    # Weights are small integers, which tf32 holds: of p, two parts of 11 bits count, and of a step
    # in which all scores are equal, p being 1, every sum is exact.
    of_blocks = tl.dot(p, weights, input_precision="tf32x3")
    block = tl.arange(0, WIDTH)[None, :]
    valid_block, at_block = valid[:, None], at[:, None]
    tl.store(sums + at_block * BLOCKS + block, of_blocks, mask=valid_block & (block < BLOCKS))
    tl.store(tails + at_block + 0 * block, of_blocks, mask=valid_block & (block == BLOCKS))
    tl.store(maxima + at, maximum, mask=valid)


@triton.jit
def _denominators(
    lse, G: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, ALL: tl.constexpr
):
    """The log of each head's denominator in base 2, [HEADS]; +inf where no block is complete."""
    head, part = tl.arange(0, HEADS)[:, None], tl.arange(0, ALL)[None, :]
    there = (head < G) & (part < PARTS)
    parts = tl.load(lse + head * PARTS + part, mask=there, other=float("-inf"))
    maximum = tl.max(parts, 1)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp2(parts - maximum[:, None]), 1)
    return tl.where(total > 0, maximum + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))


@triton.jit
def _step_scores(
    sums, tails, maxima, lse2, start, steps, N: tl.constexpr, G: tl.constexpr,
    HEADS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The importance of the blocks of AT_ONCE steps from `start` on: [AT_ONCE, PADDED].

    Beyond the row's steps there are no sums, but its last tail lies there.
    """
    head, step = tl.arange(0, HEADS)[:, None], start + tl.arange(0, AT_ONCE)[None, :]
    at, column = step * N + head, tl.arange(0, PADDED)
    there = (head < G) & (step < steps)
    behind = (head < G) & (step > 0) & (step <= steps)
    own = tl.load(maxima + at, mask=there, other=float("-inf"))
    before = tl.load(maxima + at - N, mask=behind, other=float("-inf"))
    # A tail joins its block before the denominator divides both: blocks whose entries all weigh the
    # same stay equal to the last bit, wherever a step begins.
    maximum = tl.maximum(own, before)
    offset = tl.where(maximum == float("-inf"), 0.0, maximum)
    tail = tl.load(tails + at - N, mask=behind, other=0.0) * tl.exp2(before - offset)
    there = there[:, :, None] & (column < BLOCKS)[None, None, :]
    of_heads = tl.load(sums + at[:, :, None] * BLOCKS + column[None, None, :], mask=there, other=0)
    of_heads *= tl.exp2(own - offset)[:, :, None]
    of_heads += tl.where((column == 0)[None, None, :], tail[:, :, None], 0.0)
    return tl.sum(of_heads * tl.exp2(maximum - lse2[:, None])[:, :, None], 0)


@triton.jit
def _better(best, ranks):
    """The largest of `best` and `ranks`, all different, in any order: as many as `best` has.

    One by one. Of the first ranks as many come in as there is room for, of later ones ever fewer.
    """
    highest, least = tl.max(ranks, 0), tl.min(best, 0)
    while highest > least:
        best = tl.where(best == least, highest, best)
        ranks = tl.where(ranks == highest, 0, ranks)
        highest, least = tl.max(ranks, 0), tl.min(best, 0)
    return best


@triton.jit
def _ascending(best, NUM: tl.constexpr, BEST: tl.constexpr):
    """The blocks of NUM ranks in ascending order, then -1 where there is none."""
    place = tl.arange(0, BEST)
    block = best.to(tl.int32) ^ LARGEST_INT
    real = (best >= BEST) & (place < NUM)
    block = tl.where(real, block, LARGEST_INT)
    # All different: the place of each is how many are lower.
    lower = tl.sum((block[None, :] < block[:, None]).to(tl.int32), 1)
    there = (lower[:, None] == place[None, :]) & real[:, None]
    return tl.sum(tl.where(there, block[:, None] + 1, 0), 0) - 1


@triton.jit
def choose(
    sums, tails, maxima, lse, batch, group, position, steps, N: tl.constexpr, K: tl.constexpr,
    STEPS: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr, PARTS: tl.constexpr, ALL: tl.constexpr, SELECT: tl.constexpr,
    NUM: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BEST: tl.constexpr,
):  # fmt: skip
    """The NUM best blocks of a query for a group, ascending, then -1: [BEST].

    Args:
      sums: [B, STEPS, N, BLOCKS], of the first `steps` of each row.
      tails: [B, STEPS, N].
      maxima: likewise.
      lse: [B, N, PARTS], of the compressed branch.
      position: of the query.
    """
    G: tl.constexpr = N // K
    WIDTH: tl.constexpr = AT_ONCE * PADDED
    lse += (batch.to(tl.int64) * N + group * G) * PARTS
    lse2 = _denominators(lse, G, HEADS, PARTS, ALL)
    first_head = batch.to(tl.int64) * (STEPS * N) + group * G
    sums, tails, maxima = sums + first_head * BLOCKS, tails + first_head, maxima + first_head
    document = tl.zeros([1], tl.int32)
    own = document + position // SELECT
    column = tl.arange(0, PADDED)[None, :]
    # Places without a block, different from each other and below any candidate's rank.
    place = tl.arange(0, BEST).to(tl.int64)
    best = tl.where(place < NUM, place, (1 << 63) - 1)
    for start in range(0, tl.cdiv(position // SELECT + 1, BLOCKS), AT_ONCE):
        scores = _step_scores(
            sums, tails, maxima, lse2, start, steps, N, G, HEADS, AT_ONCE, BLOCKS, PADDED
        )
        block = (start + tl.arange(0, AT_ONCE))[:, None] * BLOCKS + column
        block = tl.where(column < BLOCKS, block, LARGEST_INT)
        scores, block = tl.reshape(scores, [1, WIDTH]), tl.reshape(block, [1, WIDTH])
        ranks = block_ranks(scores, block, own, document, NUM_BLOCKS, INITIAL, LOCAL)
        best = _better(best, tl.reshape(ranks, [WIDTH]))
    return _ascending(best, NUM, BEST)
