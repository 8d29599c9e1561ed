"""selected_attention's Mosaic GPU kernels: interpreted on a CPU, and lowered for a GPU."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu.launch_context import LaunchContext

from nsa_jax.ops import reference
from pallas_kernels.mosaic_gpu import launch, lists, selected, selected_dkv
from pallas_kernels.mosaic_gpu.selected import selected_attention
from tests import gates
from tests.arg_specs import BENCHMARK, random_inputs
from tests.mosaic_gpu.interpreter import interpreted


@pytest.fixture(autouse=True)
def small_items_and_few_cores(monkeypatch):
    """So that a block has several items, and a program several tiles."""
    monkeypatch.setattr(selected, "ITEM_QUERIES", 8)
    monkeypatch.setattr(launch, "num_cores", lambda: 2)


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def random_arrays(batch, queries, keys, groups, group, head_dim, v_head_dim, dtype=jnp.float16):
    return (
        normal(1, (batch, queries, groups * group, head_dim), dtype),
        normal(2, (batch, keys, groups, head_dim), dtype),
        normal(3, (batch, keys, groups, v_head_dim), dtype),
    )


def positions_from(start, batch, num_queries):
    return jnp.broadcast_to(start + jnp.arange(num_queries, dtype=jnp.int32), (batch, num_queries))


def random_blocks(batch, num_queries, groups, num_blocks, num_selected=3):
    """Distinct blocks, also later ones than the query's own, and some -1; query 1 has none."""
    rng = np.random.default_rng(num_queries)
    order = rng.random((batch, num_queries, groups, max(num_blocks, num_selected))).argsort(axis=-1)
    blocks = np.sort(order[..., :num_selected], axis=-1)
    dropped = (blocks >= num_blocks) | (rng.random(blocks.shape) < 0.3)
    return jnp.asarray(np.where(dropped, -1, blocks), jnp.int32).at[:, 1].set(-1)


def value_and_gradients(attention, *arrays):
    """out, lse and the gradients of the arrays, of which v is the last, from random cotangents."""

    @jax.jit
    def run(*arrays):
        (out, lse), pull = jax.vjp(attention, *arrays)
        d_out = normal(98, out.shape).astype(arrays[-1].dtype).astype(out.dtype)
        return out, lse, *pull((d_out, normal(99, lse.shape)))

    return jax.block_until_ready(run(*arrays))


def assert_close(actual, expected, dtype):
    """Compares with the same in float32, by each one's scale."""
    # Inputs, probabilities and results are rounded to 11 bits of float16 or 8 of bfloat16.
    tolerance = {jnp.float16: 4e-3, jnp.bfloat16: 3e-2}[jnp.dtype(dtype).type]
    names = ("out", "lse", *(len(actual) - 5) * ("d_gate",), "dq", "dk", "dv")
    for name, x, y in zip(names, actual, expected, strict=False):
        x, y = (np.asarray(value, np.float32) for value in (x, y))
        scale = max(np.abs(y, where=np.isfinite(y), out=np.zeros_like(y)).max(initial=0.0), 1.0)
        np.testing.assert_allclose(x, y, atol=tolerance * scale, rtol=0, err_msg=name)


def oracle(q, k, v, blocks, positions, block_size, scale):
    return reference.selected_attention(
        q, k, v, blocks, select_block_size=block_size, scale=scale, q_positions=positions
    )


def assert_agrees(where, *arrays):
    """Compares value and gradients with the oracle's, where no key is to be left unread."""
    with interpreted():
        actual = value_and_gradients(lambda *x: selected_attention(*x, *where), *arrays)
    wide = (x.astype(jnp.float32) for x in arrays)
    expected = value_and_gradients(lambda *x: oracle(*x, *where), *wide)
    assert_close(actual, expected, arrays[0].dtype)


# batch, queries, keys, groups, heads a group, head_dim, v_head_dim; then l', first position, dtype
SIZES = {
    "sixteen_heads_a_group": ((1, 9, 200, 1, 16, 64, 64), 64, 130, jnp.float16),
    "eight_heads_and_large_blocks": ((2, 9, 256, 1, 8, 128, 64), 128, 100, jnp.bfloat16),
    "two_groups_of_one_head": ((1, 17, 131, 2, 1, 64, 128), 64, 112, jnp.float16),
}


def poisoned(x, blocks, positions, block_size):
    """x [B, S, K, ...] with NaN where no query of its row and group may look."""
    key = np.arange(x.shape[1])
    wanted = (np.asarray(blocks)[..., None] == key // block_size).any(axis=3)  # [B, T, K, S]
    reached = key <= np.asarray(positions)[..., None]
    seen = (wanted & reached[:, :, None]).any(axis=1).transpose(0, 2, 1)
    return jnp.where(seen[..., None], x, jnp.nan)


@pytest.mark.parametrize("size", SIZES)
def test_agrees_on_random_blocks_and_reads_nothing_else(size):
    arrays, block_size, start, dtype = SIZES[size]
    batch, queries, keys, groups = arrays[:4]
    blocks = random_blocks(batch, queries, groups, -(-keys // block_size))
    positions = positions_from(start, batch, queries)
    q, k, v = random_arrays(*arrays, dtype)
    nan_k, nan_v = (poisoned(x, blocks, positions, block_size) for x in (k, v))
    assert jnp.isnan(nan_k).any()
    with interpreted():
        actual = value_and_gradients(
            lambda *x: selected_attention(*x, blocks, positions, block_size, 0.3), q, nan_k, nan_v
        )
    assert np.isneginf(actual[1][:, 1]).all()
    assert (actual[0][:, 1] == 0).all()
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    positions = jnp.minimum(positions, keys - 1)
    expected = value_and_gradients(lambda *x: oracle(*x, blocks, positions, block_size, 0.3), *wide)
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_items_of_more_steps_than_there_are_stages(head_dim, monkeypatch):
    """A step gives its memory back only when the product of the next one is under way."""
    monkeypatch.setattr(selected, "ITEM_QUERIES", 64)
    steps = selected_dkv.stages(head_dim, head_dim) + 2
    queries, start = 4 * steps - 1, 60  # queries 4 on have passed the first block
    q, k, v = random_arrays(1, queries, 128, 1, 16, head_dim, head_dim)
    blocks = jnp.zeros((1, queries, 1, 1), jnp.int32)
    where = (blocks, positions_from(start, 1, queries), 64, 0.3)
    assert_agrees(where, q, k, v)


def test_a_step_may_keep_the_rows_of_the_one_before():
    for head_dim in launch.HEAD_DIMS:
        for v_head_dim in launch.V_HEAD_DIMS:
            assert selected_dkv.stages(head_dim, v_head_dim) >= 2


def test_a_query_that_has_passed_what_only_earlier_ones_selected():
    """The two after query 0 share its tile, and have passed keys that it has not reached."""
    q, k, v = random_arrays(1, 3, 128, 1, 16, 64, 64)
    blocks = jnp.asarray([[0, 1], [0, -1], [0, -1]], jnp.int32)[None, :, None]
    where = (blocks, positions_from(70, 1, 3), 64, 0.3)
    nan_k, nan_v = (x.at[:, 71:].set(jnp.nan) for x in (k, v))
    with interpreted():
        actual = selected_attention(q, nan_k, nan_v, *where)
    assert_close(actual, oracle(*(x.astype(jnp.float32) for x in (q, k, v)), *where), q.dtype)


def test_scores_that_grow_from_block_to_block():
    """By less and by more than exponents may exceed what they are relative to, and down again."""
    q, k, v = random_arrays(1, 5, 320, 1, 16, 64, 64)
    k *= jnp.repeat(jnp.array([0.1, 1, 3, 2, 9], k.dtype), 64)[:, None, None]
    blocks = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (1, 5, 1, 5)).at[:, 3].set(2)
    blocks = blocks.at[:, 3, :, 1:].set(-1)
    where = (blocks, positions_from(315, 1, 5), 64, 0.3)
    assert_agrees(where, q, k, v)


def test_no_bit_depends_on_a_later_query():
    """Two queries of one warp, of which the second one's scores grow by more than the margin."""
    q, k, v = random_arrays(1, 2, 192, 1, 8, 64, 64)
    k = k.at[:, :64].multiply(0.1)
    blocks = jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32), (1, 2, 1, 3))
    where = (blocks, positions_from(180, 1, 2), 64, 0.3)
    with interpreted():
        run = jax.jit(lambda q: selected_attention(q, k, v, *where))
        first, second = (
            jax.block_until_ready(run(q.at[:, 1].multiply(factor))) for factor in (1, 8)
        )
    for x, y in zip(first, second, strict=True):
        assert (x[:, 1] != y[:, 1]).any()
        np.testing.assert_array_equal(x[:, 0], y[:, 0])


def test_huge_scores_that_grow_by_a_few_roundings():
    """By more than float16 probabilities may exceed 1, by less than a limit of them is exact."""
    row = jnp.arange(64, dtype=jnp.float16).reshape(1, 4, 16)
    q = jnp.zeros((1, 4, 16, 64), jnp.float16)
    q = q.at[..., :3].set(jnp.stack([0 * row + 1024, 0 * row + 1 / 8, row / 8], axis=-1))
    k = jnp.zeros((1, 128, 1, 64), jnp.float16).at[..., 0].set(1024).at[..., 2].set(1024)
    k = k.at[:, 64:, :, 1].set(2)  # scores of 2**20 and more, then two eighths more
    v = normal(3, k.shape, k.dtype)
    blocks = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (1, 4, 1, 2))
    with interpreted():
        # With this scale, the roundings of some rows' limits add up.
        where = (blocks, positions_from(127, 1, 4), 64, 125.00227123437045)
        run = jax.jit(lambda *x: selected_attention(*x, *where))
        out, _ = jax.block_until_ready(run(q, k, v))
    # How the keys of both blocks share the weight is a matter of rounding; that it is 1 is not.
    assert jnp.isfinite(out).all()
    assert (jnp.abs(out) <= jnp.abs(v).max()).all()


def test_a_gate():
    """One that shuts some queries."""
    q, k, v = random_arrays(1, 9, 200, 1, 8, 64, 64, jnp.bfloat16)
    where = (random_blocks(1, 9, 1, 4), positions_from(130, 1, 9), 64, 0.3)
    argument, product = gates.both_ways(selected_attention, oracle, *where)
    gate = gates.some_shut(q)
    with interpreted():
        actual = value_and_gradients(argument, gate, q, k, v)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    assert_close(actual, value_and_gradients(product, gate, *wide), q.dtype)
    assert (actual[3][:, ::3] == 0).all()


def test_no_keys():
    q, k, v = random_arrays(1, 3, 0, 1, 8, 64, 128)
    blocks = jnp.full((1, 3, 1, 2), -1, jnp.int32)
    where, gate = (blocks, positions_from(0, 1, 3), 64, 0.3), jnp.ones((1, 3, 8))
    assert selected_attention(q, k, v, *where, gate=gate)[0].dtype == jnp.float32
    out, lse, *gradients = value_and_gradients(
        lambda *x: selected_attention(*x, blocks, positions_from(0, 1, 3), 64, 0.3), q, k, v
    )
    assert np.isneginf(lse).all()
    for x in (out, *gradients):
        assert (x == 0).all()


def test_vmap_a_negative_scale_and_one_query_a_warpgroup():
    q, k, v = random_arrays(1, 3, 128, 1, 64, 64, 64)
    where = (random_blocks(1, 3, 1, 2), positions_from(120, 1, 3))
    q = jnp.stack([q, 2 * q])
    with interpreted():
        actual = jax.vmap(lambda q: selected_attention(q, k, v, *where, 64, -0.3))(q)
    expected = jax.vmap(
        lambda q: oracle(
            *(x.astype(jnp.float32) for x in (q, k, v)),
            where[0],
            jnp.minimum(where[1], 127),
            64,
            -0.3,
        )
    )(q)
    assert_close(actual, expected, q.dtype)


def test_positions_before_all_keys():
    """Down to the least of them, such queries have empty rows."""
    q, k, v = random_arrays(1, 4, 128, 1, 16, 64, 64)
    blocks = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (1, 4, 1, 2))
    least = jnp.iinfo(jnp.int32).min
    where = blocks, jnp.array([[least, least + 1, -7, 100]], jnp.int32), 64, 0.3
    assert_agrees(where, q, k, v)


def unions_of(*args, **sizes):
    with interpreted():
        return jax.jit(functools.partial(lists.unions, **sizes))(*args)


def test_unions_by_hand():
    """Two tiles of two queries, the last one with one query: blocks, who wants them, counts."""
    blocks = jnp.array([[0, 2], [2, 3], [1, 9]], jnp.int32)[None, :, None]
    positions = jnp.array([[191, 200, 210]], jnp.int32)
    unions = unions_of(blocks, positions, queries=2, block_size=64, num_keys=256)
    # Block 9 does not exist; block 2 ends at key 191, which both queries of the tile have reached.
    np.testing.assert_array_equal(unions.counts[0, 0], [[3, 2], [1, 1]])
    np.testing.assert_array_equal(unions.blocks[0, 0, 0, :3], [0, 2, 3])
    np.testing.assert_array_equal(unions.masks[0, 0, 0, :3], [0b01, 0b11, 0b10])
    np.testing.assert_array_equal(unions.blocks[0, 0, 1, :1], [1])
    np.testing.assert_array_equal(unions.masks[0, 0, 1, :1], [0b01])


@pytest.mark.parametrize(
    ("queries", "selected", "block_size", "keys", "start"),
    [
        (8, 3, 64, 200, 0),
        (24, 1, 128, 131, 5),
        (12, 16, 64, 4000, 100),
        (31, 16, 64, 64 * 33, 0),
        (12, 16, 64, 70_000, 3),  # more than 1024 blocks
        (12, 16, 64, 70_000, 64 * 40),  # passed blocks in two words
        (8, 16, 64, 64 * 100, 64 * 32 - 20),  # tiles that have passed 31, 32 and 33 blocks
        (24, 16, 64, 64 * 4096, 3),  # one tile a program
        (3, 2, 64, 64 * 4100, 3),
    ],
)
def test_unions_are_those_of_sets(queries, selected, block_size, keys, start):
    """What lies beyond the keys is no block; a tile may lack queries, and have no block at all."""
    length, groups, num_blocks = 4 * queries + 1, 3, -(-keys // block_size)
    rng = np.random.default_rng(keys)
    blocks = np.stack(
        [
            rng.choice(max(num_blocks + 2, selected), selected, replace=False)
            for _ in range(2 * length * groups)
        ]
    ).reshape(2, length, groups, selected)
    blocks = np.where(rng.random(blocks.shape) < 0.2, -1, blocks)
    blocks[1, :queries] = -1
    positions = np.array(positions_from(start, 2, length))
    sizes = {"queries": queries, "block_size": block_size, "num_keys": keys}
    found = unions_of(jnp.asarray(blocks, jnp.int32), jnp.asarray(positions), **sizes)
    assert found.blocks.shape[:3] == (2, groups, 5)
    for batch, group, tile in np.ndindex(2, groups, 5):
        mine = slice(tile * queries, (tile + 1) * queries)
        wanted = [set(x) & set(range(num_blocks)) for x in blocks[batch, mine, group].tolist()]
        union = sorted(set().union(*wanted))
        passed = [x for x in union if (x + 1) * block_size - 1 <= positions[batch, mine].min()]
        masks = [sum(1 << i for i, x in enumerate(wanted) if block in x) for block in union]
        at = batch, group, tile
        assert found.counts[at].tolist() == [len(union), len(passed)]
        assert found.blocks[at][: len(union)].tolist() == union
        assert found.masks[at][: len(union)].tolist() == masks


def test_lists_that_shared_memory_has_no_room_for_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "device", lambda: ("NVIDIA H100", 9.0))

    def refusal(keys):
        shapes = (1, 64, 16, 64), (1, keys, 1, 64), (1, keys, 1, 64), (1, 64, 1, 16), (1, 64)
        arrays = (jax.ShapeDtypeStruct(shape, jnp.float16) for shape in shapes)
        return selected.refusal("selected_attention", *arrays, 64, 0.1)

    assert refusal(2**21 + 1) is None  # as many words as fit for fewer tiles at a time
    assert refusal(2**23) is None
    assert "no room for lists of 262144 blocks for 12 queries" in refusal(2**24)


def lower(q, k, v, blocks, positions, block_size):
    """Both passes of shapes and dtypes, for a GPU."""

    def run(q, k, v, *where):
        out, pull = jax.vjp(lambda *x: selected_attention(*x, *where, block_size, 0.1), q, k, v)
        return out, pull(out)

    jax.jit(run).trace(q, k, v, blocks, positions).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("v_head_dim", launch.V_HEAD_DIMS)
@pytest.mark.parametrize("head_dim", launch.HEAD_DIMS)
def test_lowers_for_a_gpu_within_its_shared_memory(head_dim, v_head_dim, monkeypatch):
    """Layouts are found and shared memory suffices, for each pair of sizes and some group sizes."""
    cases = [(d, e) for d in launch.HEAD_DIMS for e in launch.V_HEAD_DIMS]
    index = cases.index((head_dim, v_head_dim))
    group = launch.GROUPS[index % len(launch.GROUPS)]
    block_size = launch.BLOCK_SIZES[index % 2]
    dtype = (jnp.bfloat16, jnp.float16)[index % 3 == 0]
    shapes = [(1, 101, 2 * group, head_dim), (1, 301, 2, head_dim), (1, 301, 2, v_head_dim)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    where = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 101, 2, 16), (1, 101))]
    boxes, describe = [], LaunchContext._get_tma_desc

    def recorded(self, ref, transform, peer, box, *rest):
        boxes.append(math.prod(box) * (4 if "32" in str(ref.type.element_type) else 2))
        return describe(self, ref, transform, peer, box, *rest)

    monkeypatch.setattr(LaunchContext, "_get_tma_desc", recorded)
    lower(*arrays, *where, block_size)
    # Such copies begin at multiples of 128 bytes in shared memory, where others may lie before.
    assert boxes
    assert all(size % 128 == 0 for size in boxes)


@pytest.mark.parametrize("name", ["paper", "paper_192", "gqa"])
def test_lowers_as_the_benchmark_has_it(name, monkeypatch):
    monkeypatch.undo()  # items and cores as they are
    spec = BENCHMARK[name]
    arrays = jax.eval_shape(lambda: random_inputs(spec, dtype=jnp.bfloat16))
    where = (
        jax.ShapeDtypeStruct((1, spec.length, *shape), jnp.int32)
        for shape in ((spec.num_kv_heads, spec.nsa.num_selected_blocks), ())
    )
    lower(arrays["q"], *arrays["selected"], *where, spec.nsa.select_block_size)


def test_one_block_lowers():
    """Indices of which there is only one are numbers that Pallas knows while it traces."""
    q, k = (jax.ShapeDtypeStruct((1, 64, heads, 64), jnp.bfloat16) for heads in (16, 1))
    where = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 64, 1, 1), (1, 64))]
    lower(q, k, k, *where, 64)
