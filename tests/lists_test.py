"""The lists that kernels of selected blocks walk, by hand and against plain Python."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lists import inverted_index


def test_inverted_index_by_hand():
    """Five queries, keys in three blocks of four, spans of six positions, items of two queries."""
    positions = jnp.array([[1, 4, 5, 6, 11]], jnp.int32)
    # Query 0 has not reached block 1, and query 3 selected only one block.
    blocks = jnp.array([[0, 1], [0, 1], [1, 0], [1, -1], [2, 0]], jnp.int32)[None, :, None]
    index = inverted_index(blocks, positions, num_keys=12, block_size=4, size=2, span=6)
    assert index.queries[:8].tolist() == [0, 1, 2, 4, 1, 2, 3, 4]
    # Block 0: queries 0, 1 and 2 of the first span, query 4 of the second; block 1: queries 1, 2,
    # and 3; block 2: query 4. Then none.
    items = [[0, 0, 2], [0, 2, 1], [0, 3, 1], [1, 4, 2], [1, 6, 1], [2, 7, 1]]
    assert index.items[0, 0, :6].tolist() == items
    # 10 entries of 2 queries; two blocks are reached in the first span and three in the second.
    assert index.items.shape == (1, 1, 10, 3)
    assert (index.items[0, 0, 6:, 2] == 0).all()
    assert index.first_items[0, 0].tolist() == [0, 3, 5, 6]
    assert index.order[0, 0].tolist() == [0, 1, 3, 2, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("num_keys", "cuts"),
    [(100, [(1, None), (3, 7), (50, 32), (200, 100), (8, 1)]), (90_000, [(3, 6300)])],
    ids=["16_bits", "32_bits"],
)
def test_inverted_index_lists_every_entry_once(num_keys, cuts):
    """Of random blocks, some ahead of the query, sorted by numbers of 16 bits or of 32."""
    batch, num_queries, groups, block_size = 2, 50, 3, 8
    rng = np.random.default_rng(0)
    blocks = rng.random((batch, num_queries, groups, 13)).argsort(axis=-1)[..., :4]
    blocks = np.where(rng.random(blocks.shape) < 0.2, -1, blocks * (num_keys // 100))
    positions = np.sort(rng.choice(num_keys, (batch, num_queries)), axis=1)
    expected = {
        (b, g, blocks[b, t, g, m], t)
        for b, t, g, m in np.ndindex(*blocks.shape)
        if blocks[b, t, g, m] >= 0 and blocks[b, t, g, m] * block_size <= positions[b, t]
    }
    blocks, positions = (jnp.asarray(x, jnp.int32) for x in (blocks, positions))
    for size, span in cuts:
        index = inverted_index(
            blocks, positions, num_keys=num_keys, block_size=block_size, size=size, span=span
        )
        found = []
        for b, g in np.ndindex(batch, groups):
            items, first_items = np.asarray(index.items[b, g]), np.asarray(index.first_items[b, g])
            assert sorted(index.order[b, g].tolist()) == list(range(len(items)))
            spans = []
            for item in index.order[b, g].tolist():
                block, start, count = items[item]
                if count == 0:
                    continue
                queries = np.asarray(index.queries[start : start + count])
                assert count <= size
                assert (np.diff(queries) > 0).all()
                assert first_items[block] <= item < first_items[block + 1]
                of_queries = {int(positions[b, t]) // (span or num_keys) for t in queries}
                assert len(of_queries) == 1
                spans += of_queries
                found += [(b, g, int(block), int(t)) for t in queries]
            assert spans == sorted(spans)
        assert len(found) == len(expected)
        assert set(found) == expected
