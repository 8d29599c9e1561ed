"""interval_attention's Mosaic GPU kernels: interpreted on a CPU, and lowered for a GPU."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.ops import reference
from pallas_kernels.mosaic_gpu import interval, interval_backward, launch, rows, tuning, walks
from pallas_kernels.mosaic_gpu.interval import gated_sum, interval_attention
from tests import gates
from tests.mosaic_gpu.interpreter import interpreted

# Steps of few keys, so that short sequences have many; dk and dv in the form that is not the
# table's for these head sizes.
SMALL_STEPS = {
    "interval_forward": tuning.Tuning(16, 2, row_stages=2, tail=8),
    "interval_dq": tuning.Tuning(16, 3, row_stages=2),
    "interval_dkv": tuning.Tuning(64, 2),
}


@pytest.fixture(autouse=True)
def few_cores(monkeypatch):
    """So that a program forward has several pairs of tiles, and not all as many."""
    monkeypatch.setattr(launch, "num_cores", lambda: 3)


def normal(seed, *shape, dtype=jnp.float16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def random_arrays(batch, queries, keys, groups, group, head_dim, v_head_dim):
    return (
        normal(1, batch, queries, groups * group, head_dim),
        normal(2, batch, keys, groups, head_dim),
        normal(3, batch, keys, groups, v_head_dim),
    )


def oracle(q, k, v, lo, hi, scale):
    """Dense attention in float32 under a mask."""
    index = jnp.arange(k.shape[1])
    mask = (index >= lo[..., None]) & (index < hi[..., None])
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return reference._masked_attention(q, k, v, mask[:, :, None], scale)


def value_and_gradients(attention, *arrays):
    """out, lse, dq, dk and dv, from random cotangents of both results."""

    @jax.jit
    def run(*arrays):
        (out, lse), pull = jax.vjp(attention, *arrays)
        d_out = normal(98, *out.shape).astype(out.dtype)
        return out, lse, *pull((d_out, normal(99, *lse.shape, dtype=jnp.float32)))

    return run(*arrays)


def interpret(arrays, lo, hi, scale=0.3, longest=None, **tunings):
    tunings = tunings or SMALL_STEPS
    short = {f"{kernel}_short": cut for kernel, cut in tunings.items()}
    attention = functools.partial(interval_attention, lo=lo, hi=hi, scale=scale, longest=longest)
    with tuning.override(**tunings, **short), interpreted():
        return jax.block_until_ready(value_and_gradients(attention, *arrays))


def assert_agrees(arrays, lo, hi, scale=0.3, longest=None, clean=None, **tunings):
    """Compares with the oracle, which takes `clean` arrays if those of the kernels hold NaN."""
    actual = interpret(arrays, lo, hi, scale, longest, **tunings)
    arrays = [x.astype(jnp.float32) for x in clean or arrays]
    expected = value_and_gradients(lambda *x: oracle(*x, lo, hi, scale), *arrays)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        x, y = (np.asarray(value, np.float32) for value in (x, y))
        largest = max(np.abs(y, where=np.isfinite(y), out=np.zeros_like(y)).max(), 1.0)
        # Probabilities, their gradients and the results are rounded to 11 bits.
        np.testing.assert_allclose(x, y, atol=4e-3 * largest, rtol=0, err_msg=name)


def rising_intervals(queries, keys, batch):
    """Rising bounds drawn apart from each other: some intervals are empty, some end beyond S."""
    bounds = np.sort(np.random.default_rng(0).integers(0, keys + 3, (2, batch, queries)), axis=-1)
    return jnp.asarray(bounds, jnp.int32)


# batch, queries, keys, groups, heads a group, head_dim, v_head_dim
SIZES = {
    "one_head_a_group": (1, 141, 70, 1, 1, 64, 64),
    "four_heads_a_group": (2, 37, 41, 1, 4, 64, 128),
    "sixteen_heads_a_group": (2, 9, 30, 1, 16, 128, 64),
    "sixty_four_heads_a_group": (1, 3, 19, 1, 64, 64, 64),
}


@pytest.mark.parametrize("size", SIZES)
def test_agrees_on_rising_intervals(size):
    batch, queries, keys, *_ = SIZES[size]
    lo, hi = rising_intervals(queries, keys, batch)
    assert bool((hi <= lo).any()), "no empty row was drawn"
    assert_agrees(random_arrays(*SIZES[size]), lo, hi)


@pytest.mark.parametrize("enough", [1, interval_backward.ENOUGH_PROGRAMS])
def test_agrees_with_the_tunings_of_the_table(enough, monkeypatch):
    """Causal, with whole steps; dk and dv of two warpgroups, from one program or from many."""
    monkeypatch.setattr(interval_backward, "ENOUGH_PROGRAMS", enough)
    assert (interval_backward._splits(2, 4) > 1) == (enough > 1)
    hi = jnp.arange(11, 11 + 30, dtype=jnp.int32)[None] * 4
    table = {kernel: tuning.lookup(kernel, 64, 64) for kernel in SMALL_STEPS}
    assert_agrees(random_arrays(1, 30, 160, 1, 8, 64, 64), jnp.zeros_like(hi), hi, -0.3, **table)


@pytest.mark.parametrize("longest", [None, 200])
def test_rows_that_see_the_keys_of_one_warpgroup(longest, monkeypatch):
    """A window: for dk and dv, a warpgroup has whole steps, others with a mask, and passes over."""
    monkeypatch.setattr(interval_backward, "ENOUGH_PROGRAMS", 1)  # walks go round the ring
    hi = jnp.arange(1, 41, dtype=jnp.int32)[None] * 8
    cuts = SMALL_STEPS | {"interval_dkv": tuning.Tuning(128, 2)}
    assert_agrees(random_arrays(1, 40, 320, 1, 16, 64, 64), hi - 200, hi, longest=longest, **cuts)


@pytest.mark.parametrize("longest", [None, 150])
def test_two_groups_of_two_sequences(longest, monkeypatch):
    """For dk and dv, programs take the groups in turn, and 16 of them are 6 waves to and fro."""
    monkeypatch.setattr(interval_backward, "ENOUGH_PROGRAMS", 1)  # walks go round the ring
    hi = rising_intervals(24, 200, 2)[1]
    assert_agrees(random_arrays(2, 24, 200, 2, 16, 64, 64), hi - 150, hi, longest=longest)


def test_walks_over_rows_by_hand():
    """20 tiles of 4 queries, of which query t sees the 150 keys before 4 (t + 1)."""
    hi = 4 * jnp.arange(1, 81, dtype=jnp.int32)[None]
    of_tiles, of_parts = walks.over_rows(hi - 150, hi, 126, 16, 20, 128, splits=1)
    tile, first, second = (walks.Walk(*x) for x in (*of_tiles[0, 0], *of_parts[0, 0]))

    def numbers(x):
        return tuple(map(int, x))

    # first, steps, head, whole. Keys 0 to 63: queries 0 to 52 see some, 15 to 36 see all. Keys 64
    # to 125: queries 16 to 67 see some, 31 to 52 see all. So tiles 0 to 16 see any, and tile 8 all.
    assert numbers(first) == (0, 14, 4, 5)
    assert numbers(second) == (4, 13, 4, 5)
    assert numbers(tile) == (0, 17, 8, 1)
    assert numbers(map(tile.at, range(17))) == (8, *range(8), *range(9, 17))
    # Tiles 0 to 7 and 9 to 13 see keys of the first half, 4 to 7 and 9 to 16 of the second one.
    assert numbers(tile.masked_of(first)) == (1, 14)
    assert numbers(tile.masked_of(second)) == (5, 17)


def test_walks_beside_each_other_by_hand():
    """Of a window of 10 tiles of rows, 2 and 3 of them masked, each walk 4 on from the last one."""
    walk = walks.Walk(*(jnp.int32(x) for x in (4, 10, 2, 5)))
    next_walk = walk._replace(first=jnp.int32(8))
    # Whole are tiles 6 to 10 and 10 to 14, of which one is in both.
    assert [int(walk.beside_others(n)) for n in range(10)] == [10, 6, 7, 8, 9, 4, 5, 11, 12, 13]
    assert [int(next_walk.beside_others(n)) for n in range(5)] == [10, 11, 12, 13, 14]
    assert int(walk._replace(whole=jnp.int32(0)).beside_others(3)) == 7


def test_walks_to_and_fro_by_hand():
    """Masked steps stay where they are."""
    walk = walks.Walk(*(jnp.int32(x) for x in (4, 6, 2, 3)))
    assert [int(walk.to_and_fro(n, jnp.bool(True))) for n in range(6)] == [6, 7, 8, 4, 5, 9]
    assert [int(walk.to_and_fro(n, jnp.bool(False))) for n in range(6)] == [8, 7, 6, 4, 5, 9]


@pytest.mark.parametrize("splits", [1, 3])
def test_walks_over_rows_miss_nobody(splits):
    """A warpgroup's steps include all tiles that see its keys; rows of whole ones see all keys."""
    batch, group, num_keys = 2, 8, 700
    lo, hi = rising_intervals(301, num_keys, batch)
    lo = lo - 250  # so that some are long
    tiles = rows.num_tiles(301, group, walks.COMPUTE)
    tables = walks.over_rows(lo, hi, num_keys, group, tiles, 128, splits)
    query, key = np.arange(tiles * 8), np.arange(num_keys)
    bounds = [np.pad(x, [(0, 0), (0, query.size - 301)])[..., None] for x in (lo, hi)]
    sees = ((key >= bounds[0]) & (key < bounds[1])).reshape(batch, tiles, 8, num_keys)
    some_are_whole = False
    for b, part in np.ndindex(batch, -(-num_keys // 64)):
        all_keys = sees[b, ..., part // 2 * 128 : (part // 2 + 1) * 128]
        met = []
        for table, own_table in zip(*tables, strict=True):
            walk, own = walks.Walk(*table[b, part // 2]), walks.Walk(*own_table[b, part])
            whole = [int(walk.beside_others(n)) for n in range(walk.whole)]
            for upwards in (False, True):
                others = [int(walk.to_and_fro(n, jnp.bool(upwards))) for n in range(walk.whole)]
                assert sorted(others) == sorted(whole)
            some_are_whole |= bool(whole)
            met += whole + [int(walk.at(n)) for n in range(*map(int, walk.masked_of(own)))]
            assert all_keys[whole].all()
        assert len(set(met)) == len(met)
        seen = sees[b, ..., part * 64 : (part + 1) * 64].any(axis=(1, 2))
        assert set(met) >= set(np.flatnonzero(seen))
    assert some_are_whole


def test_reads_nothing_that_no_query_may_see():
    """NaN before, after and between the intervals of two documents, where tiles do not end."""
    second = jnp.arange(34) >= 17
    lo = jnp.where(second, 29, 9)
    hi = jnp.where(second, lo, 7) + jnp.arange(34) % 17 + 1
    lo, hi = (x[None].astype(jnp.int32) for x in (lo, hi))
    q, k, v = random_arrays(1, 34, 60, 1, 4, 64, 64)
    index = jnp.arange(60)
    seen = ((index >= lo[..., None]) & (index < hi[..., None])).any(axis=1)[:, :, None, None]
    poisoned = (q, *(jnp.where(seen, x, jnp.nan) for x in (k, v)))
    assert_agrees(poisoned, lo, hi, clean=(q, k, v))


def test_tiles_that_see_nothing():
    """A program does not hang at its later tiles, empty as those before the first block are."""
    hi = jnp.maximum(jnp.arange(18, dtype=jnp.int32) - 12, 0)[None]
    assert_agrees(random_arrays(1, 18, 20, 1, 64, 64, 64), jnp.zeros_like(hi), hi)


def test_one_pair_of_tiles_at_a_time():
    """As where there is no room for the next rows beside these, nor, for dq, for a second step."""
    lo, hi = rising_intervals(20, 40, 2)
    cuts = {"interval_forward": tuning.Tuning(16, 2), "interval_dq": tuning.Tuning(16, 1)}
    assert_agrees(random_arrays(2, 20, 40, 1, 16, 128, 64), lo, hi, **SMALL_STEPS | cuts)


def test_vmap():
    lo, hi = rising_intervals(9, 18, 1)
    q, k, v = random_arrays(1, 9, 18, 1, 16, 64, 64)
    many = jnp.stack([q, -q])
    with interpreted():
        run = jax.jit(jax.vmap(lambda q: interval_attention(q, k, v, lo, hi, 0.3)[0]))
        out = jax.block_until_ready(run(many))
    expected = jax.vmap(lambda q: oracle(q, k, v, lo, hi, 0.3)[0])(many)
    np.testing.assert_allclose(out, expected, atol=4e-3, rtol=0)


def test_a_gate():
    """One that shuts some rows, others of which are empty, and some of which has no gradient."""
    lo, hi = rising_intervals(20, 40, 2)
    arrays = [x.astype(jnp.bfloat16) for x in random_arrays(2, 20, 40, 1, 16, 64, 64)]
    gate = gates.some_shut(arrays[0])
    argument, product = gates.both_ways(interval_attention, oracle, lo, hi, 0.3)
    with tuning.override(**SMALL_STEPS), interpreted():
        actual = jax.block_until_ready(value_and_gradients(argument, gate, *arrays))
        negative = jax.block_until_ready(value_and_gradients(argument, gate - 1, *arrays))
    expected = value_and_gradients(product, gate, *(x.astype(jnp.float32) for x in arrays))
    for x, y in zip(actual, expected, strict=True):
        x = np.asarray(x, np.float32)
        # Probabilities, their gradients and the results are rounded to 8 bits.
        np.testing.assert_allclose(x, y, atol=2e-2 * max(np.abs(y).max(), 1), rtol=0)
    assert (actual[3][:, ::3] == 0).all()
    for x, y in zip(negative[3:], expected[3:], strict=True):
        assert np.isnan(x[np.abs(y) > 0]).all()


@pytest.mark.parametrize(("group", "head_dims"), [(16, (64, 64)), (2, (128, 64)), (8, (64, 128))])
def test_gated_sum(group, head_dims):
    """Of three outputs; the last tile is not full, and a program has several."""
    batch, queries, keys = 2, 70, 90
    q, k, v = random_arrays(batch, queries, keys, 2, group, *head_dims)
    lo, hi = rising_intervals(queries, keys, batch)
    others = [normal(i, *q.shape[:3], v.shape[3]) for i in (7, 8)]
    weights = jax.random.uniform(jax.random.key(9), (*q.shape[:3], 3))
    with interpreted(), tuning.override(**SMALL_STEPS):
        actual = jax.jit(functools.partial(gated_sum, scale=0.3))(q, k, v, lo, hi, others, weights)
    outs = [x.astype(jnp.float32) for x in (*others, oracle(q, k, v, lo, hi, 0.3)[0])]
    expected = sum(weights[..., i, None] * out for i, out in enumerate(outs))
    assert actual.dtype == q.dtype
    # Probabilities and the sum are rounded to float16: 2**-11 each of numbers up to 4.
    chex.assert_trees_all_close(actual.astype(jnp.float32), expected, atol=4e-3)


def test_no_keys():
    q, k, v = random_arrays(2, 5, 0, 2, 2, 64, 128)
    zero = jnp.zeros((2, 5), jnp.int32)
    gate = jnp.ones((2, 5, 4))
    assert interval_attention(q, k, v, zero, zero, 1.0, gate=gate)[0].dtype == jnp.float32
    out, lse, *_ = value_and_gradients(lambda *x: interval_attention(*x, zero, zero, 1.0), q, k, v)
    assert out.shape == (2, 5, 4, 128)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("group", [1, 4, 16])
def test_rows_go_to_tiles_and_back(group):
    x = normal(0, 2, 13, 3 * group, dtype=jnp.float32)
    tiles = rows.num_tiles(13, group, 2)
    assert tiles % 2 == 0
    tiled = rows.from_heads(x, 3, tiles, jnp.nan)
    chex.assert_trees_all_equal(rows.to_heads(tiled, 13, group), x)
    # The number of a query is that of each of its heads.
    numbers = jnp.broadcast_to(jnp.arange(13.0)[None, :, None], x.shape)
    expected = rows.from_heads(numbers, 3, tiles, -1)[:, 0]
    chex.assert_trees_all_equal(rows.from_queries(numbers[:, :, 0], group, tiles, -1), expected)


def lowered(head_dim, v_head_dim, group, longest=None, dtype=jnp.bfloat16):
    """Compiles the kernels of the operation and its gradients as far as a CPU can.

    That infers layouts, writes the device's code and counts the shared memory.
    """
    q, k, v = (
        jax.ShapeDtypeStruct((2, length, heads, features), dtype)
        for length, heads, features in (
            (1001, 2 * group, head_dim), (1003, 2, head_dim), (1003, 2, v_head_dim)
        )
    )  # fmt: skip
    bound = jax.ShapeDtypeStruct((2, 1001), jnp.int32)

    def run(q, k, v, lo, hi):
        attention = functools.partial(interval_attention, scale=0.1, longest=longest)
        out, pull = jax.vjp(lambda *x: attention(*x, lo, hi), q, k, v)
        return pull(out)

    return jax.jit(run).trace(q, k, v, bound, bound).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("v_head_dim", launch.V_HEAD_DIMS)
@pytest.mark.parametrize("head_dim", launch.HEAD_DIMS)
def test_every_tuning_lowers(head_dim, v_head_dim):
    """Those of short intervals too, where they differ."""
    kernels = ("interval_forward", "interval_dq")
    short, others = (
        {tuning.lookup(f"{kernel}{suffix}", head_dim, v_head_dim) for kernel in kernels}
        for suffix in ("_short", "")
    )
    for longest in (None,) if short == others else (None, walks.SHORT):
        text = lowered(head_dim, v_head_dim, 16, longest)
        for name in ("forward", "dq", "dkv"):
            assert f"interval_{name}" in text


@pytest.mark.parametrize("v_head_dim", launch.V_HEAD_DIMS)
@pytest.mark.parametrize("head_dim", launch.HEAD_DIMS)
def test_gated_sum_lowers_where_it_is_not_refused(head_dim, v_head_dim, monkeypatch):
    monkeypatch.setattr(launch, "device", lambda: H100)
    q, k, v, out, gates = (
        jax.ShapeDtypeStruct((1, 1001, heads, features), dtype)
        for heads, features, dtype in (
            *((16, head_dim, jnp.bfloat16), (1, head_dim, jnp.bfloat16)),
            *((1, v_head_dim, jnp.bfloat16), (16, v_head_dim, jnp.bfloat16)),
            (16, 3, jnp.float32),
        )
    )
    bound = jax.ShapeDtypeStruct((1, 1001), jnp.int32)
    total = functools.partial(gated_sum, scale=0.1, longest=512)
    traced = jax.jit(total).trace(q, k, v, bound, bound, (out, out), gates)
    if interval.refusal("gated_sum", q, k, v, longest=512) is None:
        traced.lower(lowering_platforms=("cuda",))
    else:
        with pytest.raises(ValueError, match="exceeds available shared memory"):
            traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("group", [x for x in launch.GROUPS if x != 16])
def test_every_group_lowers(group):
    lowered(64, 64, group, dtype=jnp.float16)


def test_lowering_refuses_what_does_not_fit():
    """The tests above hold the table to the budget of shared memory."""
    too_much = tuning.override(interval_forward=tuning.Tuning(128, 4))
    with too_much, pytest.raises(ValueError, match="exceeds available shared memory"):
        lowered(128, 128, 16)


H100 = ("NVIDIA H100 80GB HBM3", 9.0)


@pytest.mark.parametrize(
    ("device", "sizes", "dtype", "reason"),
    [
        (H100, (16, 128, 128), "bfloat16", None),
        (H100, (1, 192, 64), "float16", None),
        (("NVIDIA A100", 8.0), (16, 128, 128), "bfloat16", "runs on NVIDIA A100"),
        (("NVIDIA B200", 10.0), (16, 128, 128), "bfloat16", "Hopper generation"),
        (H100, (16, 128, 128), "float32", "bfloat16, float16, not float32"),
        (H100, (12, 128, 128), "bfloat16", "query heads a key/value head, not 12"),
        (H100, (16, 96, 64), "bfloat16", "features a head of q and k, not 96"),
        (H100, (16, 128, 192), "bfloat16", "64, 128, 256 features a head of v, not 192"),
    ],
)
def test_refusals(device, sizes, dtype, reason, monkeypatch):
    monkeypatch.setattr(launch, "device", lambda: device)
    group, head_dim, v_head_dim = sizes
    shapes = ((1, 5, group, head_dim), (1, 5, 1, head_dim), (1, 5, 1, v_head_dim))
    arrays = (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes)
    refusal = launch.refusal("interval_attention", *arrays)
    assert refusal is None if reason is None else reason in refusal
