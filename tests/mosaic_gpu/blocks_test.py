"""select_blocks' Mosaic GPU kernel: interpreted on a CPU, and lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.config import NSAConfig
from nsa_jax.ops import compression, xla
from pallas_kernels.mosaic_gpu import blocks, launch, ranking
from pallas_kernels.mosaic_gpu.blocks import Cut
from tests.arg_specs import ArgSpec, random_inputs
from tests.mosaic_gpu.interpreter import interpreted

SIZES = (
    "compress_block_size",
    "compress_stride",
    "select_block_size",
    "num_selected_blocks",
    "num_initial_blocks",
    "num_local_blocks",
)


def geometry(*sizes):
    return NSAConfig(**dict(zip(SIZES, sizes, strict=True)))


def visible(positions, documents, nsa):
    return compression.visible_blocks(
        positions, documents, block_size=nsa.compress_block_size, stride=nsa.compress_stride
    )


def arguments(spec, *, dtype=jnp.float16, scale=0.5, queries=slice(None), documents=(0,)):
    """The operands and keywords of one call; `documents` are the positions where they begin."""
    inputs = random_inputs(spec, dtype=dtype)
    q, (k, v) = inputs["q"][:, queries], inputs["compressed"]
    position = np.arange(spec.length)[queries]
    begin = np.array(documents)[np.searchsorted(documents, position, side="right") - 1]
    where = [
        jnp.broadcast_to(jnp.asarray(x, jnp.int32), (spec.batch, len(x))) for x in (position, begin)
    ]
    attend = jax.jit(xla.interval_attention, static_argnums=5)
    _, lse = attend(q, k, v, *visible(*where, spec.nsa), scale)
    return (q, k, lse, *where), {"scale": scale, **{x: getattr(spec.nsa, x) for x in SIZES}}


def run(module, arrays, keywords):
    return np.asarray(jax.jit(functools.partial(module.select_blocks, **keywords))(*arrays))


def assert_agrees(arrays, keywords):
    expected = run(xla, arrays, keywords)
    with interpreted():
        actual = run(blocks, arrays, keywords)
    assert actual.dtype == np.int32
    np.testing.assert_array_equal(actual, expected)
    return actual


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(blocks, "_cut", lambda *_: Cut(2, 8, 2, 3))


def test_documents_and_an_offset():
    """The tiles hold queries of several documents; the last one is not full."""
    spec = ArgSpec(1, 112, 4, 1, 64, 64, geometry(8, 4, 16, 5, 1, 2))
    assert_agrees(*arguments(spec, queries=slice(21, 51), documents=(0, 32, 48)))


def test_several_steps_and_passes():
    """163 blocks: three steps of 64, two passes of 128, and sixteen heads a group."""
    spec = ArgSpec(1, 1300, 16, 1, 64, 64, geometry(8, 4, 8, 6, 1, 2))
    assert_agrees(*arguments(spec, dtype=jnp.bfloat16, queries=slice(1284, 1299)))


def test_one_warpgroup_no_skew_and_more_blocks_than_lanes(monkeypatch):
    monkeypatch.setattr(blocks, "_cut", lambda *_: Cut(1, 8, 0, 2))
    spec = ArgSpec(1, 400, 2, 1, 64, 64, geometry(2, 2, 4, 40, 1, 1))
    actual = assert_agrees(*arguments(spec, queries=slice(388, 399)))
    assert (actual >= 0).all(), "there are enough blocks"


def test_one_head_a_group_and_wider_tiles(monkeypatch):
    """Sixteen queries a tile; nothing is forced, and the scale is negative."""
    monkeypatch.setattr(blocks, "_cut", lambda *_: Cut(2, 16, 2, 2))
    spec = ArgSpec(1, 27, 2, 2, 64, 64, geometry(6, 3, 12, 2, 0, 0))
    assert_agrees(*arguments(spec, scale=-0.5))


def test_several_products_of_many_heads():
    spec = ArgSpec(2, 13, 32, 1, 64, 64, geometry(4, 4, 4, 2, 0, 1))
    assert_agrees(*arguments(spec))


@pytest.mark.parametrize("cores", [1, 3])
def test_programs_take_several_tiles(monkeypatch, cores):
    """Eight pairs of tiles, of two rows and groups: queries and keys of the next come early."""
    monkeypatch.setattr(launch, "num_cores", lambda: cores)
    spec = ArgSpec(2, 30, 4, 2, 64, 64, geometry(4, 2, 4, 3, 1, 1))
    assert_agrees(*arguments(spec))


def test_more_of_the_best_in_one_lane_than_are_counted_first():
    """Blocks 32 apart are of one lane: eight of them are far better than all others."""
    spec = ArgSpec(1, 1024, 2, 1, 64, 64, geometry(4, 4, 4, 10, 1, 1))
    (q, k, _, *where), keywords = arguments(spec, queries=slice(1016, 1024))
    q = jnp.abs(q)
    best = np.arange(3, 256, 32)
    k = (0.01 * k).at[:, best].set(1.0)
    _, lse = xla.interval_attention(q, k, k, *visible(*where, spec.nsa), 0.5)
    actual = assert_agrees((q, k, lse, *where), keywords)
    assert len(best) > ranking.TOPS
    assert actual[0, -1, 0].tolist() == [0, *best, 255]


def test_nothing_compressed():
    spec = ArgSpec(1, 7, 2, 1, 64, 64, geometry(8, 4, 16, 5, 1, 2))
    assert assert_agrees(*arguments(spec)).tolist() == [[[[0, -1, -1, -1, -1]]] * 7]


def test_exact_ties_go_to_the_lower_block():
    spec = ArgSpec(1, 64, 2, 1, 64, 64, geometry(4, 4, 8, 4, 0, 1))
    actual = assert_agrees(*arguments(spec, scale=0.0, queries=slice(40, 64)))
    assert actual[0, 23, 0].tolist() == [0, 1, 2, 7]
    assert actual[0, 0, 0].tolist() == [0, 1, 2, 5]


def test_reads_nothing_that_no_query_may_see():
    """NaN in keys after the last query, and in those that two documents share, changes nothing."""
    spec = ArgSpec(1, 150, 4, 1, 64, 64, geometry(8, 4, 16, 5, 1, 2))
    (q, k, *rest), keywords = arguments(spec, queries=slice(40, 56), documents=(0, 48))
    lo, hi = visible(*rest[1:], spec.nsa)
    key = jnp.arange(k.shape[1])[:, None]
    seen = ((key >= lo[0]) & (key < hi[0])).any(axis=1)
    assert int(seen.sum()) <= int(key[seen].max()) < k.shape[1] - 1, "the keys are not as meant"
    poisoned = jnp.where(seen[:, None, None], k, jnp.nan)
    with interpreted():
        actual = run(blocks, (q, poisoned, *rest), keywords)
    np.testing.assert_array_equal(actual, run(xla, (q, k, *rest), keywords))


# Every group, every head size, and the largest selections, blocks and lengths.
LOWERED = [
    *((65536, group, 128, (32, 16, 64, 16)) for group in launch.GROUPS),
    *((65536, 16, head_dim, (32, 16, 64, 16)) for head_dim in (64, 192, 256)),
    (65536, 16, 128, (32, 16, 128, 64)),
    (8192, 16, 128, (32, 8, 128, 16)),
    (262144, 16, 128, (32, 16, 64, 16)),
    (1001, 4, 64, (64, 64, 64, 16)),
]


@pytest.mark.parametrize(("length", "group", "head_dim", "sizes"), LOWERED)
def test_compiles_and_fits_shared_memory(monkeypatch, length, group, head_dim, sizes):
    monkeypatch.undo()
    nsa = geometry(*sizes, 1, 2)
    num_compressed = (length - nsa.compress_block_size) // nsa.compress_stride + 1
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, length, 2 * group, head_dim), jnp.bfloat16),
            ((1, num_compressed, 2, head_dim), jnp.bfloat16),
            ((1, length, 2 * group), jnp.float32),
            ((1, length), jnp.int32),
            ((1, length), jnp.int32),
        )
    ]
    keywords = {"scale": 0.1, **{x: getattr(nsa, x) for x in SIZES}}
    select = jax.jit(functools.partial(blocks.select_blocks, **keywords))
    select.trace(*arrays).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("length", "stride", "reason"),
    [
        (65536, 16, None),
        (1024, 2, "up to 16 compressed keys a selected block, not 32"),
        (2**20, 16, "no room for 16385 blocks beside groups of 16 heads of 128 features"),
    ],
)
def test_refusals(monkeypatch, length, stride, reason):
    monkeypatch.undo()
    monkeypatch.setattr(launch, "device", lambda: ("NVIDIA H100", 9.0))
    q = jax.ShapeDtypeStruct((1, length, 16, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct(((1, (length - 32) // stride + 1, 1, 128)), jnp.bfloat16)
    nsa = geometry(32, stride, 64, 16, 1, 2)
    keywords = {name: getattr(nsa, name) for name in SIZES}
    actual = blocks.refusal("select_blocks", q, k, None, None, None, **keywords)
    assert actual is None if reason is None else reason in actual
