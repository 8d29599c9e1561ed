"""selected_attention's kernels in Triton's interpreter, against the oracle.

`interpreter_test.py` runs this file; alone: TRITON_INTERPRET=1 python -m pytest <this file>.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.ops import reference
from pallas_kernels.triton import selected, tuning
from pallas_kernels.triton.selected import selected_attention
from tests import gates
from tests.triton import interpreter
from tests.triton.interpreter import assert_close, random_arrays, value_and_gradients

KERNELS = ("selected_forward", "selected_dq", "selected_dkv")
# The smallest tiles that tl.dot takes, and items of few queries: short sequences have many of both.
interpreter.install(**dict.fromkeys(KERNELS, tuning.Tuning(32, 16, 4, 1)))


@pytest.fixture(autouse=True)
def small_items(monkeypatch):
    monkeypatch.setattr(selected, "ITEM_QUERIES", 8)


def oracle(q, k, v, blocks, positions, block_size, scale):
    """The reference in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return reference.selected_attention(
        q, k, v, blocks, select_block_size=block_size, scale=scale, q_positions=positions
    )


def positions_from(start, num_queries):
    return jnp.broadcast_to(start + jnp.arange(num_queries, dtype=jnp.int32), (2, num_queries))


def random_blocks(num_queries, groups, num_blocks, num_selected=3):
    """Distinct blocks in any order, later ones than the query's own among them, and some -1.

    Query 1 has no block.
    """
    rng = np.random.default_rng(num_queries)
    order = rng.random((2, num_queries, groups, max(num_blocks, num_selected))).argsort(axis=-1)
    blocks = order[..., :num_selected]
    dropped = (blocks >= num_blocks) | (rng.random(blocks.shape) < 0.3)
    return jnp.asarray(np.where(dropped, -1, blocks), jnp.int32).at[:, 1].set(-1)


def assert_agrees(q, k, v, blocks, positions, block_size, scale=0.3):
    where = (blocks, positions, block_size, scale)
    actual = value_and_gradients(lambda *x: selected_attention(*x, *where), q, k, v)
    expected = value_and_gradients(lambda *x: oracle(*x, *where), q, k, v)
    assert_close(actual, expected, q.dtype)
    return actual


# queries, keys, groups, heads a group, head_dim, v_head_dim; then l', the first position and dtype
SIZES = {
    "one_head_a_group": ((17, 33, 2, 1, 40, 8), 16, 16, jnp.float16),
    "three_heads_a_group": ((16, 45, 2, 3, 24, 40), 12, 26, jnp.float32),
    "four_heads_a_group": ((15, 15, 1, 4, 16, 24), 6, 0, jnp.float16),
    "sixteen_heads_a_group": ((5, 90, 1, 16, 12, 20), 32, 66, jnp.float32),
    "more_heads_than_rows": ((4, 40, 1, 40, 16, 16), 16, 30, jnp.float32),
    "odd_blocks_in_parts": ((6, 110, 1, 2, 16, 16), 48, 90, jnp.float32),
    "positions_beyond_the_keys": ((9, 20, 2, 3, 16, 16), 16, 30, jnp.float32),
    "whole_tiles_by_descriptors": ((14, 50, 2, 3, 16, 32), 16, 36, jnp.float16),
}


@pytest.mark.parametrize("size", SIZES)
def test_agrees_on_random_blocks(size):
    arrays, block_size, start, dtype = SIZES[size]
    queries, keys, groups = arrays[:3]
    blocks = random_blocks(queries, groups, -(-keys // block_size))
    positions = positions_from(start, queries)
    assert_agrees(*random_arrays(*arrays, dtype), blocks, positions, block_size)


@pytest.mark.parametrize("block_size", [16, 12])
def test_several_blocks_a_step(block_size):
    blocks = random_blocks(13, 1, -(-29 // block_size))
    with tuning.override(**dict.fromkeys(KERNELS, tuning.Tuning(32, 32, 4, 1))):
        assert_agrees(
            *random_arrays(13, 29, 1, 4, 16, 16), blocks, positions_from(15, 13), block_size
        )


@pytest.mark.parametrize("scale", [-0.5])
def test_any_scale(scale):
    blocks = random_blocks(9, 1, 2)
    assert_agrees(*random_arrays(9, 20, 1, 2, 16, 16), blocks, positions_from(8, 9), 16, scale)


def test_one_block_that_everyone_selects_and_one_that_nobody_does():
    """Block 0 has more queries than one item takes, block 1 has none."""
    own = jnp.where(jnp.arange(36) >= 32, 2, -1)
    blocks = jnp.stack([jnp.zeros_like(own), own], axis=-1)
    blocks = jnp.broadcast_to(blocks[:, None], (2, 36, 1, 2)).at[:, 5].set(-1)
    _, _, _, dk, dv = assert_agrees(
        *random_arrays(36, 36, 1, 2, 16, 24), blocks, positions_from(0, 36), 16
    )
    assert (dk[:, 16:32] == 0).all()
    assert (dv[:, 16:32] == 0).all()


@pytest.mark.parametrize("num_keys", [0, 16])
def test_nothing_selected(num_keys):
    q, k, v = random_arrays(5, num_keys, 2, 2, 16, 24)
    blocks = jnp.full((2, 5, 2, 3), -1, jnp.int32)
    out, lse, *gradients = value_and_gradients(
        lambda *x: selected_attention(*x, blocks, positions_from(0, 5), 16, 0.3), q, k, v
    )
    assert np.isneginf(lse).all()
    for x in (out, *gradients):
        assert (x == 0).all()


def test_reads_nothing_that_no_query_may_see():
    """NaN in blocks that nobody selects, and after the last query, changes no bit."""
    q, k, v = random_arrays(12, 80, 1, 4, 16, 24)
    positions = positions_from(45, 12)
    rng = np.random.default_rng(0)
    blocks = jnp.asarray(rng.choice([[0, 3, -1], [1, -1, 3]], (2, 12, 1)), jnp.int32)

    def poisoned(x):
        index = jnp.arange(x.shape[1])[:, None, None]
        return jnp.where((index // 16 == 2) | (index > 56), jnp.nan, x)

    def run(k, v):
        return value_and_gradients(
            lambda *x: selected_attention(*x, blocks, positions, 16, 0.3), q, k, v
        )

    chex.assert_trees_all_equal(run(k, v), run(poisoned(k), poisoned(v)))


def test_a_gate():
    """One that shuts some queries."""
    q, k, v = random_arrays(15, 45, 2, 3, 24, 40)
    where = (random_blocks(15, 2, 4), positions_from(26, 15), 12, 0.3)
    arrays = gates.some_shut(q), q, k, v
    actual, expected = (
        value_and_gradients(f, *arrays) for f in gates.both_ways(selected_attention, oracle, *where)
    )
    assert_close(actual, expected, q.dtype)
    assert (actual[3][:, ::3] == 0).all()


@pytest.mark.parametrize("mapped", ["all", "q"])
def test_vmap(mapped):
    q, k, v = random_arrays(5, 40, 1, 2, 16, 24)
    blocks, positions = random_blocks(5, 1, 3), positions_from(33, 5)
    if mapped == "all":
        many, axes = tuple(jnp.stack([x, 2 * x]) for x in (q, k, v)), 0
    else:
        many, axes = (jnp.stack([q, 2 * q]), k, v), (0, None, None)

    def run(*x):
        return value_and_gradients(
            lambda *x: selected_attention(*x, blocks, positions, 16, 0.3), *x
        )

    actual = jax.vmap(run, in_axes=axes)(*many)
    for i, factor in enumerate((1, 2)):
        others = (factor * k, factor * v) if mapped == "all" else (k, v)
        expected = run(factor * q, *others)
        chex.assert_trees_all_close([x[i] for x in actual], list(expected), atol=1e-6, rtol=0)


def test_transforms_change_nothing():
    """jit, remat, and a scan over the batch; and the same bits twice."""
    q, k, v = random_arrays(5, 40, 1, 2, 16, 24)
    blocks, positions = random_blocks(5, 1, 3), positions_from(33, 5)

    def run(*x, blocks=blocks, positions=positions):
        return selected_attention(*x, blocks, positions, 16, 0.3)

    expected = value_and_gradients(run, q, k, v)
    chex.assert_trees_all_equal(value_and_gradients(run, q, k, v), expected)
    remat = jax.jit(lambda *x: value_and_gradients(jax.checkpoint(run), *x))
    chex.assert_trees_all_close(remat(q, k, v), expected, atol=1e-6, rtol=0)

    rows = jax.tree.map(lambda x: x[:, None], (q, k, v, blocks, positions))
    step = jax.jit(lambda _, row: (None, run(*row[:3], blocks=row[3], positions=row[4])))
    _, scanned = jax.lax.scan(step, None, rows)
    chex.assert_trees_all_close([x[:, 0] for x in scanned], list(expected[:2]), atol=1e-6, rtol=0)
