"""interval_attention's kernels in Triton's interpreter, against dense masked attention.

`interpreter_test.py` runs this file; alone: TRITON_INTERPRET=1 python -m pytest <this file>.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.ops import reference
from pallas_kernels.triton import interval, launch, tuning
from pallas_kernels.triton.interval import interval_attention
from tests import gates
from tests.triton import interpreter
from tests.triton.interpreter import assert_close, random_arrays, value_and_gradients

# Small tiles, so that short sequences have many; dk and dv with others.
TILE = tuning.Tuning(32, 16, 4, 1)
interpreter.install(
    interval_forward=TILE, interval_dq=TILE, interval_dkv=tuning.Tuning(32, 32, 4, 1)
)


def oracle(q, k, v, lo, hi, scale):
    """Dense attention in float32 under a mask."""
    index = jnp.arange(k.shape[1])
    mask = (index >= lo[..., None]) & (index < hi[..., None])
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return reference._masked_attention(q, k, v, mask[:, :, None], scale)


def rising_intervals(num_queries, num_keys, batch=2):
    """Rising bounds drawn apart from each other: some intervals are empty, some end beyond S."""
    rng = np.random.default_rng(num_queries)
    bounds = np.sort(rng.integers(0, num_keys + 3, (2, batch, num_queries)), axis=-1)
    return jnp.asarray(bounds, jnp.int32)


def causal_intervals(num_queries, num_keys, batch=2):
    """All keys up to the query's own, the last of which is the last query's."""
    hi = jnp.arange(num_queries, dtype=jnp.int32) + 1 + num_keys - num_queries
    hi = jnp.broadcast_to(hi, (batch, num_queries))
    return jnp.zeros_like(hi), hi


def assert_agrees(q, k, v, lo, hi, scale=0.3):
    actual = value_and_gradients(lambda *x: interval_attention(*x, lo, hi, scale), q, k, v)
    expected = value_and_gradients(lambda *x: oracle(*x, lo, hi, scale), q, k, v)
    assert_close(actual, expected, q.dtype)


# queries, keys, groups, heads a group, head_dim, v_head_dim; dtype
SIZES = {
    "one": ((1, 1, 2, 1, 8, 16), jnp.float32),
    "one_head_a_group": ((33, 31, 2, 1, 40, 8), jnp.float16),
    "three_heads_a_group": ((47, 49, 2, 3, 24, 40), jnp.float32),
    "four_heads_a_group": ((5, 65, 1, 4, 16, 24), jnp.float16),
    "sixteen_heads_a_group": ((17, 7, 1, 16, 12, 20), jnp.float32),
}


@pytest.mark.parametrize("size", SIZES)
def test_agrees_on_rising_intervals(size):
    sizes, dtype = SIZES[size]
    lo, hi = rising_intervals(*sizes[:2])
    assert size == "one" or bool((hi <= lo).any()), "no empty row was drawn"
    assert_agrees(*random_arrays(*sizes, dtype), lo, hi)


def test_agrees_where_whole_tiles_come_by_descriptors():
    """Two rows, whose keys a descriptor holds as one; heads whose sizes are powers of two."""
    q, k, v = random_arrays(40, 45, 2, 3, 16, 32, jnp.float16)
    assert all(launch.row_loader(x, 16)[1] for x in (k, v))
    assert_agrees(q, k, v, *causal_intervals(40, 45))


@pytest.mark.parametrize("enough", [1, interval.ENOUGH_PROGRAMS])
def test_agrees_on_causal_intervals(enough, monkeypatch):
    """Most steps are whole, and dk and dv come from one program or from two."""
    monkeypatch.setattr(interval, "ENOUGH_PROGRAMS", enough)
    splits = interval._splits(2 * 3, 67)
    assert splits == (1 if enough == 1 else 2)
    assert_agrees(*random_arrays(67, 70, 1, 2, 16, 24), *causal_intervals(67, 70))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_any_scale(scale):
    lo, hi = rising_intervals(19, 21)
    assert_agrees(*random_arrays(19, 21, 2, 2, 16, 16), lo, hi, scale)


def test_no_keys():
    q, k, v = random_arrays(5, 0, 2, 2, 16, 24)
    zero = jnp.zeros((2, 5), jnp.int32)
    out, lse, dq, dk, dv = value_and_gradients(
        lambda *x: interval_attention(*x, zero, zero, 0.3), q, k, v
    )
    assert (out == 0).all()
    assert np.isneginf(lse).all()
    assert (dq == 0).all()
    assert dk.shape == k.shape
    assert dv.shape == v.shape


def poisoned(x, lo, hi):
    """NaN in the keys or values that no query sees."""
    index = jnp.arange(x.shape[1])
    seen = ((index >= lo[..., None]) & (index < hi[..., None])).any(axis=1)
    assert not bool(seen.all())
    return jnp.where(seen[:, :, None, None], x, jnp.nan)


@pytest.mark.parametrize("gap", [0, 5])
def test_reads_nothing_that_no_query_may_see(gap):
    """NaN before, after and between the intervals changes no bit.

    The gap lies between two documents, where the compressed blocks are that belong to neither.
    """
    q, k, v = random_arrays(34, 60, 1, 4, 16, 24)
    second = jnp.arange(34) >= 17
    lo = jnp.where(second, 24 + gap, 9)
    hi = jnp.where(second, lo, 7) + jnp.arange(34) % 17 + 1
    lo, hi = (jnp.broadcast_to(x, (2, 34)).astype(jnp.int32) for x in (lo, hi))

    def run(k, v):
        return value_and_gradients(lambda *x: interval_attention(*x, lo, hi, 0.3), q, k, v)

    chex.assert_trees_all_equal(run(k, v), run(poisoned(k, lo, hi), poisoned(v, lo, hi)))


def test_a_gate():
    """One that shuts some queries."""
    q, k, v = random_arrays(33, 31, 2, 3, 16, 24)
    where = (*rising_intervals(33, 31), 0.3)
    arrays = gates.some_shut(q), q, k, v
    actual, expected = (
        value_and_gradients(f, *arrays) for f in gates.both_ways(interval_attention, oracle, *where)
    )
    assert_close(actual, expected, q.dtype)
    assert (actual[3][:, ::3] == 0).all()


@pytest.mark.parametrize("mapped", ["all", "q"])
def test_vmap(mapped):
    lo, hi = rising_intervals(9, 18)
    q, k, v = random_arrays(9, 18, 2, 2, 16, 24)
    if mapped == "all":
        many, axes = tuple(jnp.stack([x, 2 * x]) for x in (q, k, v)), 0
    else:
        many, axes = (jnp.stack([q, 2 * q]), k, v), (0, None, None)

    def run(q, k, v):
        return value_and_gradients(lambda *x: interval_attention(*x, lo, hi, 0.3), q, k, v)

    actual = jax.vmap(run, in_axes=axes)(*many)
    for i, factor in enumerate((1, 2)):
        others = (factor * k, factor * v) if mapped == "all" else (k, v)
        expected = run(factor * q, *others)
        chex.assert_trees_all_close([x[i] for x in actual], list(expected), atol=1e-6, rtol=0)


def test_transforms_change_nothing():
    """jit, remat, and a scan over the batch."""
    lo, hi = rising_intervals(9, 18)
    q, k, v = random_arrays(9, 18, 2, 2, 16, 24)

    def run(*x, lo=lo, hi=hi):
        return interval_attention(*x, lo, hi, 0.3)

    expected = value_and_gradients(run, q, k, v)
    remat = jax.jit(lambda *x: value_and_gradients(jax.checkpoint(run), *x))
    chex.assert_trees_all_close(remat(q, k, v), expected, atol=1e-6, rtol=0)

    rows = jax.tree.map(lambda x: x[:, None], (q, k, v, lo, hi))
    step = jax.jit(lambda _, row: (None, run(*row[:3], lo=row[3], hi=row[4])))
    _, scanned = jax.lax.scan(step, None, rows)
    chex.assert_trees_all_close([x[:, 0] for x in scanned], list(expected[:2]), atol=1e-6, rtol=0)


def test_two_runs_give_the_same_bits():
    lo, hi = rising_intervals(9, 18)
    q, k, v = random_arrays(9, 18, 2, 2, 16, 24)

    def run():
        return value_and_gradients(lambda *x: interval_attention(*x, lo, hi, 0.3), q, k, v)

    chex.assert_trees_all_equal(run(), run())
