"""The cache by hand: what lies where, when a compressed entry appears, how much memory it takes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig
from nsa_jax.ops import cache as cache_lib
from nsa_jax.ops.compression import num_compressed_blocks
from nsa_jax.typing import KeyValue

NSA = NSAConfig(4, 2, 8, 4, window_size=5)
CAPACITY = 16


def empty(nsa=NSA, capacity=CAPACITY, dtype=jnp.float32):
    return cache_lib.sparse_cache(2, capacity, (1, 1, 1), dtype, nsa)


def numbers(x):
    """The one feature of a cache's keys, in the first row."""
    return np.asarray(x[0][0, :, 0, 0])


def tokens(start, size):
    """Tokens that hold their position + 1, so that 0 is what nobody has written."""
    values = np.arange(start, start + size, dtype=np.float32) + 1
    x = np.broadcast_to(values[:, None, None], (2, size, 1, 1))
    return KeyValue(x, -x)


def append(cache, size, counts, nsa=NSA):
    """Appends what stands at the first row's positions; an entry is the sum of its block."""
    now, positions = compiled_append(
        cache, tokens(int(cache.length[0]), size), jnp.array(counts), nsa
    )
    np.testing.assert_array_equal(np.diff(positions), 1)
    return now


@functools.partial(jax.jit, static_argnames="nsa")
def compiled_append(cache, new, counts, nsa):
    (k, v), positions = cache_lib.completing(cache, new, nsa)
    l, d = nsa.compress_block_size, nsa.compress_stride  # noqa: E741
    starts = range(0, k.shape[1] - l + 1, d)
    entries = KeyValue(
        *(jnp.stack([x[:, i : i + l].sum(axis=1) for i in starts], axis=1) for x in (k, v))
    )
    return cache_lib.append_sparse(cache, new, entries, new, new, counts, nsa), positions


def test_each_token_lies_where_its_branch_looks_for_it():
    cache = append(empty(), 7, [7, 0])
    np.testing.assert_array_equal(cache.length, [7, 0])
    np.testing.assert_array_equal(numbers(cache.selected), [1, 2, 3, 4, 5, 6, 7] + [0] * 9)
    np.testing.assert_array_equal(numbers(cache.window), [6, 7, 3, 4, 5])  # p + 1 at p % 5
    np.testing.assert_array_equal(numbers(cache.recent), [5, 6, 7, 4])
    np.testing.assert_array_equal(cache.window.v, -cache.window.k)
    for x in jax.tree.leaves(cache):
        assert not x[1].any(), "the second row has no tokens"
    cache = append(cache, 3, [2, 0])  # one more than count
    np.testing.assert_array_equal(numbers(cache.selected)[7:10], [8, 9, 0])
    np.testing.assert_array_equal(numbers(cache.window), [6, 7, 8, 9, 5])
    np.testing.assert_array_equal(numbers(cache.recent), [9, 6, 7, 8])


def test_no_place_is_written_twice(monkeypatch):
    """As unique_indices promises; on a CPU the last write would win, and no content tell."""
    original, written = cache_lib._put, []

    def put(x, rows, index, kept):
        written.append(
            [list(np.asarray(i)[np.asarray(k)]) for i, k in zip(index, kept, strict=True)]
        )
        return original(x, rows, index, kept)

    monkeypatch.setattr(cache_lib, "_put", put)
    window = tokens(0, 13)
    cache_lib._push(empty().window, window, jnp.array([0, 4]), jnp.array([13, 3]))
    assert written[0] == [[3, 4, 0, 1, 2], [4, 0, 1]]


@pytest.mark.parametrize("size", [1, 2, 3, 16])
@pytest.mark.parametrize(
    "nsa",
    [NSA, dataclasses.replace(NSA, compress_stride=4), dataclasses.replace(NSA, compress_stride=1)],
    ids=lambda nsa: f"stride_{nsa.compress_stride}",
)
def test_an_entry_appears_when_its_block_completes(nsa, size):
    stride, cache = nsa.compress_stride, empty(nsa)
    while (length := int(cache.length[0])) < CAPACITY:
        cache = append(cache, size, [min(size, CAPACITY - length)] * 2, nsa)
        blocks = num_compressed_blocks(int(cache.length[0]), block_size=4, stride=stride)
        first = stride * np.arange(blocks)
        expected = np.zeros(cache.compressed[0].shape[1])
        expected[:blocks] = 4 * first + 10  # (p + 1) + (p + 2) + (p + 3) + (p + 4)
        np.testing.assert_array_equal(numbers(cache.compressed), expected)
    assert blocks == len(expected)


def test_what_finds_no_place_is_lost():
    cache = empty()._replace(length=jnp.array([14, 3]))
    kept, lost = cache_lib.kept_and_lost(cache, jnp.array([3, 2]), 4)
    np.testing.assert_array_equal(kept, [2, 2])
    np.testing.assert_array_equal(lost, [[False, False, True, False], [False] * 4])
    full = cache._replace(length=jnp.array([16, 16]))
    kept, lost = cache_lib.kept_and_lost(full, jnp.array([2, 0]), 2)
    np.testing.assert_array_equal(kept, [0, 0])
    np.testing.assert_array_equal(lost, [[True, True], [False, False]])


def test_sizes_at_64k_are_little_more_than_those_of_a_grouped_query_cache():
    heads, capacity = (4, 192, 128), 65536  # the paper's

    def size(cache):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))

    sparse, dense = (
        size(jax.eval_shape(lambda: make(1, capacity, heads, jnp.bfloat16, *rest)))
        for make, *rest in ((cache_lib.sparse_cache, NSAConfig()), (cache_lib.dense_cache,))
    )
    token = 4 * (192 + 128) * 2
    assert dense == capacity * token + 4  # and the length
    assert sparse == (capacity + 4095 + 32 + 512) * token + 4
    assert round(sparse / dense, 2) == 1.07


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 8), "batch_size=0 must be at least 1"),
        ((1, 0), "capacity=0 must be at least 1"),
        ((1, 8.0), "capacity=8.0 must be an integer"),
    ],
)
def test_sizes_that_are_none_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        cache_lib.sparse_cache(*sizes, (1, 1, 1), jnp.float32, NSA)
    with pytest.raises(ValueError, match=message):
        cache_lib.dense_cache(*sizes, (1, 1, 1), jnp.float32)
