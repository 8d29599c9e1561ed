"""Lists of blocks for tiles of queries.

Forward and for dq, the queries of a tile walk the union of the blocks that they selected, in
ascending order, each block with a bit mask of the queries that want it.

What a query selected becomes the bits of words, WORD blocks each, in which blocks are in order by
themselves. A place of the list then looks for its bit among those that any query of the tile has,
and asks every query whether it has it too. Nothing is sorted.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.lists import Unions
from pallas_kernels.mosaic_gpu import launch
from pallas_kernels.mosaic_gpu.common import divide, padded
from pallas_kernels.mosaic_gpu.warps import gather, strided
from pallas_kernels.mosaic_gpu.words import WORD, nth_bit, ones

THREADS = 128  # of a warpgroup
RESERVED = 1024  # bytes of shared memory for what Pallas itself takes


class Sizes(NamedTuple):
    """The sizes of lists, per tile.

    Attributes:
      tiles: that a program has; vectors of all of them are multiples of THREADS.
      queries: of a tile.
      selected: blocks a query.
      entries: blocks of all queries, padded.
      words: padded.
    """

    tiles: int
    queries: int
    selected: int
    entries: int
    words: int

    @classmethod
    def make(cls, queries, selected, num_blocks):
        """For so many queries, blocks of each, and blocks there are; the most tiles that fit."""

        def padded_to(unit):
            entries = padded(queries * selected, unit)
            words = padded(pl.cdiv(num_blocks, WORD), unit)
            tiles = THREADS // math.gcd(entries, words, THREADS)
            return cls(tiles, queries, selected, entries, words)

        sizes = [padded_to(unit) for unit in (WORD, 2 * WORD, THREADS)]
        return next((x for x in sizes if x.fits), sizes[-1])

    @property
    def memory(self):
        """How many numbers the vectors in shared memory have: `scratch` of `_find_unions`."""
        of_tile = self.entries, self.queries * self.words, self.words, self.words
        return [self.tiles * x for x in of_tile]

    @property
    def fits(self):
        """Whether shared memory has room for them."""
        return 4 * sum(self.memory) + RESERVED <= launch.SHARED_MEMORY


def split_tiles(x, queries, fill):
    """x [B, T, ...] as [B, tiles, queries, ...]; what is missing of the last tile is `fill`."""
    tiles = -(-x.shape[1] // queries)
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, tiles * queries - x.shape[1])
    x = jnp.pad(x, pad, constant_values=fill)
    return x.reshape(x.shape[0], tiles, queries, *x.shape[2:])


def _over_parts(length, body):
    """body(part, index) for parts of `length`, and the indices of their elements."""
    size = THREADS * next(n for n in (4, 3, 2, 1) if length % (n * THREADS) == 0)

    @pl.loop(0, length // size)
    def _(i):
        begin = pl.multiple_of(i * size, size)
        index = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=strided(size))
        body(pl.ds(begin, size), begin + index)


def _locate(place, words, ends, first, number):
    """The word, and the bit in it, of the place-th bit of each list's words.

    Args:
      place: counted from 0; beyond the last one, anything is found.
      words: of all lists.
      ends: how many bits those of a list have up to each of them.
      first: where the list's words begin.
      number: how many it has.
    """
    word = jnp.zeros_like(place)
    for step in (1 << i for i in reversed(range(number.bit_length()))):
        further = jnp.minimum(word + step, number)
        word = jnp.where(gather(ends, first + further - 1) <= place, further, word)
    word = jnp.minimum(word, number - 1)
    bits = gather(words, first + word)
    return word, nth_bit(bits, place - (gather(ends, first + word) - ones(bits)))


def _find_unions(entries, blocks, masks, unions, scratch, *, sizes):
    """The lists of a few tiles.

    Args:
      entries: [programs, tiles * entries], what the queries of each tile selected; -1 for none.
      blocks, masks: like them, the lists; beyond their ends, anything.
      unions: [programs, tiles * words], the bits of the blocks in each list.
      scratch: shared memory for what the tiles of a program have: their entries, the words of each
        query and of each tile, and how many bits the words of a tile have up to each of them.
      sizes: `Sizes`.
    """
    own, of_queries, of_tiles, ends = scratch
    program = jax.lax.axis_index("program")

    def read(part, _):
        layout = strided(part.size)
        own[part] = plgpu.load(entries.at[program, part], layout=layout, optimized=False)

    def make_words(part, index):
        query, word = divide(index, sizes.words)
        tile, query = divide(query, sizes.queries)
        first = tile * sizes.entries + query * sizes.selected

        def add(m, words):
            block = gather(own, first + m)
            bit = jax.lax.shift_left(jnp.full_like(block, 1), block & (WORD - 1))
            return words | jnp.where(block >> 5 == word, bit, 0)

        of_queries[part] = jax.lax.fori_loop(0, sizes.selected, add, jnp.zeros_like(index))

    def join_words(part, index):
        tile, word = divide(index, sizes.words)
        first = tile * sizes.queries * sizes.words + word

        def add(query, words):
            return words | gather(of_queries, first + query * sizes.words)

        words = jax.lax.fori_loop(0, sizes.queries, add, jnp.zeros_like(index))
        of_tiles[part] = words
        unions[program, part] = words
        ends[part] = ones(words)

    def add_earlier(distance):
        length = sizes.tiles * sizes.words
        index = plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=strided(length))
        _, word = divide(index, sizes.words)
        earlier = gather(ends, jnp.maximum(index - distance, 0))
        now = gather(ends, index) + jnp.where(word >= distance, earlier, 0)
        plgpu.commit_smem()  # all have read
        ends[...] = now
        plgpu.commit_smem()

    def fill(part, index):
        tile, place = divide(index, sizes.entries)
        word, bit = _locate(place, of_tiles, ends, tile * sizes.words, sizes.words)
        blocks[program, part] = word * WORD + bit

        def add(query, mask):
            words = gather(of_queries, (tile * sizes.queries + query) * sizes.words + word)
            has = jax.lax.shift_right_logical(words, bit) & 1
            return mask | jax.lax.shift_left(has, jnp.full_like(has, query))

        masks[program, part] = jax.lax.fori_loop(0, sizes.queries, add, jnp.zeros_like(index))

    for work, length in (
        (read, sizes.entries),
        (make_words, sizes.queries * sizes.words),
        (join_words, sizes.words),
    ):
        _over_parts(sizes.tiles * length, work)
        plgpu.commit_smem()
    for distance in (1 << i for i in range((sizes.words - 1).bit_length())):
        add_earlier(distance)
    _over_parts(sizes.tiles * sizes.entries, fill)


def unions(block_indices, q_positions, *, queries: int, block_size: int, num_keys: int) -> Unions:
    """The blocks that each tile of neighbouring queries needs.

    Args:
      block_indices: int32 [B, T, K, M], distinct within a row, -1 for none.
      q_positions: int32 [B, T].
      queries: of a tile, at most 31.
      block_size: l'.
      num_keys: S; blocks that begin beyond it are none.
    """
    num_blocks, selected = pl.cdiv(num_keys, block_size), block_indices.shape[3]
    sizes = Sizes.make(queries, selected, num_blocks)
    entries = jnp.where(block_indices < num_blocks, block_indices, -1)
    entries = jnp.moveaxis(split_tiles(entries, queries, -1), 3, 1)  # [B, K, tiles, q, M]
    shape = entries.shape[:3]
    programs = pl.cdiv(math.prod(shape), sizes.tiles)
    entries = entries.reshape(math.prod(shape), queries * selected)
    padding = (programs * sizes.tiles - entries.shape[0], sizes.entries - entries.shape[1])
    entries = jnp.pad(entries, [(0, x) for x in padding], constant_values=-1)
    listed = jax.ShapeDtypeStruct((programs, sizes.tiles * sizes.entries), jnp.int32)
    words = jax.ShapeDtypeStruct((programs, sizes.tiles * sizes.words), jnp.int32)
    found = launch.launch(
        functools.partial(_find_unions, sizes=sizes),
        entries.reshape(listed.shape),
        out_type=(listed, listed, words),
        programs=programs,
        warpgroups=1,
        scratch=tuple(plgpu.SMEM((length,), jnp.int32) for length in sizes.memory),
    )
    blocks, masks, words = (
        x.reshape(programs * sizes.tiles, -1)[: math.prod(shape)].reshape(*shape, -1) for x in found
    )
    return Unions(blocks, masks, _counts(words, q_positions, queries, block_size))


def _counts(words, q_positions, queries, block_size):
    """How many blocks there are, and how many that every query of the tile has passed."""
    smallest = split_tiles(q_positions, queries, jnp.iinfo(jnp.int32).max - 1).min(axis=2)
    passed = (smallest[:, None, :, None] + 1) // block_size
    passed = passed - jnp.arange(words.shape[-1], dtype=jnp.int32) * WORD
    before = jnp.left_shift(1, jnp.clip(passed, 0, WORD - 1)) - 1
    before = jnp.where(passed >= WORD, words, words & before)
    counts = (jax.lax.population_count(x).sum(axis=-1) for x in (words, before))
    return jnp.stack(list(counts), axis=-1)
