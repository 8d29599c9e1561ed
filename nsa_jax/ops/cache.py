"""The cache of decoding: what one attention layer keeps of the tokens so far, in static shapes.

The selected branch keeps every token, at its position. The window branch keeps the last w, token p
at p % w. The compressed branch keeps one entry a compressed block, i.e. one every d tokens, and the
last l tokens before compression, token p at p % l. Rows of a batch may be of different lengths.

Every function returns a new cache. Under jit, with the old one donated, the new one takes its place
in memory and only what is new is written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax.config import NSAConfig, check_integer
from nsa_jax.ops import compression
from nsa_jax.typing import Array, Bool, Float, Int, KeyValue


class SparseCache(NamedTuple):
    """What a layer of Native Sparse Attention keeps.

    Attributes:
      length: int32 [B], the tokens of each row.
      compressed: keys [B, C, K, H] and values [B, C, K, V] of the complete blocks, rotated as the
        branch attends them.
      recent: [B, l, K, ...], the last tokens of the compressed branch, not yet rotated.
      selected: [B, S, K, ...], S the capacity; keys rotated.
      window: [B, w, K, ...], keys rotated.
    """

    length: Int[Array, " B"]
    compressed: KeyValue
    recent: KeyValue
    selected: KeyValue
    window: KeyValue

    @property
    def capacity(self) -> int:
        """S, the tokens that a row has room for."""
        return self.selected[0].shape[1]


class DenseCache(NamedTuple):
    """What a layer of dense attention keeps.

    Attributes:
      length: int32 [B], the tokens of each row.
      tokens: keys [B, S, K, H], rotated, and values [B, S, K, V]; S is the capacity.
    """

    length: Int[Array, " B"]
    tokens: KeyValue

    @property
    def capacity(self) -> int:
        """S, the tokens that a row has room for."""
        return self.tokens[0].shape[1]


def sparse_cache(
    batch_size: int, capacity: int, heads: tuple[int, int, int], dtype, config: NSAConfig
) -> SparseCache:
    """An empty cache for up to `capacity` tokens a row.

    Args:
      batch_size: B.
      capacity: S.
      heads: K, H and V.
      dtype: of keys and values.
      config: gives l, d and w.

    Raises:
      ValueError: if batch_size or capacity is no positive integer.
    """
    sizes = {"block_size": config.compress_block_size, "stride": config.compress_stride}
    _check_sizes(batch_size, capacity)

    def empty(length):
        return _empty(batch_size, length, heads, dtype)

    return SparseCache(
        length=jnp.zeros(batch_size, jnp.int32),
        compressed=empty(compression.num_compressed_blocks(capacity, **sizes)),
        recent=empty(config.compress_block_size),
        selected=empty(capacity),
        window=empty(config.window_size),
    )


def dense_cache(batch_size: int, capacity: int, heads: tuple[int, int, int], dtype) -> DenseCache:
    """As `sparse_cache`, for dense attention."""
    _check_sizes(batch_size, capacity)
    return DenseCache(jnp.zeros(batch_size, jnp.int32), _empty(batch_size, capacity, heads, dtype))


def _check_sizes(batch_size, capacity):
    check_integer("batch_size", batch_size, 1)
    check_integer("capacity", capacity, 1)


def _empty(batch_size, length, heads, dtype):
    num_kv_heads, *sizes = heads
    return KeyValue(*(jnp.zeros((batch_size, length, num_kv_heads, x), dtype) for x in sizes))


def check_chunk(
    x: Array, cache: SparseCache | DenseCache, counts: Array | None
) -> Int[Array, " B"]:
    """The number of tokens that count in each row of a chunk x [B, T, ...]: T by default.

    Raises:
      ValueError: if chunk, cache and counts do not fit each other.
    """
    batch, num_tokens = x.shape[:2]
    if cache.length.shape != (batch,):
        raise ValueError(f"the cache is of {cache.length.shape[0]} rows, the chunk of {batch}")
    if num_tokens > cache.capacity:
        raise ValueError(
            f"a chunk of {num_tokens} tokens does not fit into a cache of {cache.capacity}"
        )
    if counts is None:
        return jnp.full_like(cache.length, num_tokens)
    if counts.shape != (batch,) or not jnp.issubdtype(counts.dtype, jnp.integer):
        raise ValueError(
            f"counts {counts.dtype}{counts.shape} must be integers of shape [B] = {(batch,)}"
        )
    return counts.astype(jnp.int32)


def complete_blocks(length: Int[Array, "*rows"], config: NSAConfig) -> Int[Array, "*rows"]:
    """The compressed blocks that so many tokens complete."""
    return compression.complete_blocks(
        length, block_size=config.compress_block_size, stride=config.compress_stride
    )


def kept_and_lost(
    cache: SparseCache | DenseCache, counts: Int[Array, " B"], num_tokens: int
) -> tuple[Int[Array, " B"], Bool[Array, "B T"]]:
    """How many of the counted tokens of a chunk of T have a place, and which of them have none."""
    kept = jnp.minimum(counts, cache.capacity - cache.length)
    index = _range(num_tokens)
    return kept, (index >= kept[:, None]) & (index < counts[:, None])


def append_dense(cache: DenseCache, new: KeyValue, counts: Int[Array, " B"]) -> DenseCache:
    """The cache with the first counts[b] tokens of each row of `new`, for which there is room."""
    tokens = _append(cache.tokens, new, cache.length, counts)
    return DenseCache(cache.length + counts, tokens)


def append_sparse(
    cache: SparseCache,
    recent: KeyValue,
    entries: KeyValue,
    selected: KeyValue,
    window: KeyValue,
    counts: Int[Array, " B"],
    config: NSAConfig,
) -> SparseCache:
    """The cache with the first counts[b] tokens of each row of a chunk behind its own.

    Args:
      cache: the tokens so far.
      recent: the chunk's tokens for the compressed branch, [B, T, K, ...].
      entries: what `completing` made of them, compressed; those whose block the counted tokens do
        not complete are dropped.
      selected: the chunk's tokens for the selected branch.
      window: likewise for the window.
      counts: int32, at most T and what there is room for.
      config: gives l and d.
    """
    length = cache.length + counts
    index = complete_blocks(cache.length, config)[:, None] + _range(entries[0].shape[1])
    complete = index * config.compress_stride + config.compress_block_size <= length[:, None]
    return SparseCache(
        length=length,
        compressed=KeyValue(
            *(
                _put(x, rows, index, complete)
                for x, rows in zip(cache.compressed, entries, strict=True)
            )
        ),
        recent=_push(cache.recent, recent, cache.length, counts),
        selected=_append(cache.selected, selected, cache.length, counts),
        window=_push(cache.window, window, cache.length, counts),
    )


def completing(
    cache: SparseCache, recent: KeyValue, config: NSAConfig
) -> tuple[KeyValue, Int[Array, "B L"]]:
    """The tokens of the blocks that T more tokens may complete, and no older block's.

    Args:
      cache: the tokens so far.
      recent: the chunk's tokens for the compressed branch, [B, T, K, ...].
      config: gives l and d.

    Returns:
      Consecutive tokens [B, L, K, ...] that hold ceil(T / d) blocks of l tokens at stride d, the
      first of them the first block that is not complete yet, and their positions. Tokens that are
      not there yet are filled with others.
    """
    block_size, stride = config.compress_block_size, config.compress_stride
    num_tokens = recent[0].shape[1]
    first = complete_blocks(cache.length, config) * stride
    needed = _range((-(-num_tokens // stride) - 1) * stride + block_size)
    positions = first[:, None] + needed
    at = jnp.minimum(positions - (cache.length - block_size)[:, None], block_size + num_tokens - 1)
    tokens = follow(cache.recent, recent, cache.length)
    return KeyValue(*(_take(x, at) for x in tokens)), positions


def follow(ring: KeyValue, new: KeyValue, length: Int[Array, " B"]) -> KeyValue:
    """The tokens of a ring in their order, then the new ones: positions length - ring size on.

    Before the ring has filled, what stands for positions below 0 is no token.
    """
    size = ring[0].shape[1]
    slots = (length[:, None] + _range(size)) % size
    return KeyValue(
        *(
            jnp.concatenate([_take(old, slots), x.astype(old.dtype)], axis=1)
            for old, x in zip(ring, new, strict=True)
        )
    )


def _append(cache: KeyValue, new: KeyValue, length, counts) -> KeyValue:
    index = _range(new[0].shape[1])
    counted = index < counts[:, None]
    return KeyValue(
        *(
            _put(x, rows, length[:, None] + index, counted)
            for x, rows in zip(cache, new, strict=True)
        )
    )


def _push(ring: KeyValue, new: KeyValue, length, counts) -> KeyValue:
    size, index = ring[0].shape[1], _range(new[0].shape[1])
    # Of more tokens than the ring holds, the last ones: no slot is written twice.
    last = (index < counts[:, None]) & (index >= counts[:, None] - size)
    slots = (length[:, None] + index) % size
    return KeyValue(*(_put(x, rows, slots, last) for x, rows in zip(ring, new, strict=True)))


def _put(x: Float[Array, "B S K H"], rows: Float[Array, "B T K H"], index, kept) -> Array:
    """Writes the rows that are kept to their places index [B, T]."""
    # Out-of-range places are distinct as well, as unique_indices promises of them all.
    index = jnp.where(kept, index, x.shape[1] + _range(rows.shape[1]))
    write = jax.vmap(lambda x, i, rows: x.at[i].set(rows, mode="drop", unique_indices=True))
    return write(x, index, rows.astype(x.dtype))


def _take(x: Float[Array, "B S K H"], index: Int[Array, "B T"]) -> Float[Array, "B T K H"]:
    return jax.vmap(lambda x, i: x.at[i].get(mode="clip"))(x, index)


def _range(size: int) -> Int[Array, " size"]:
    return jnp.arange(size, dtype=jnp.int32)
