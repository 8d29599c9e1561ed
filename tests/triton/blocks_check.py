"""select_blocks in Triton's interpreter, against the XLA code, index by index.

`interpreter_test.py` runs this file; alone: TRITON_INTERPRET=1 python -m pytest <this file>.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.config import NSAConfig
from nsa_jax.ops import compression, xla
from pallas_kernels.triton import blocks, tuning
from tests.arg_specs import SMALL, TINY, ArgSpec, random_inputs
from tests.triton import interpreter

interpreter.install()

SIZES = (
    "compress_block_size",
    "compress_stride",
    "select_block_size",
    "num_selected_blocks",
    "num_initial_blocks",
    "num_local_blocks",
)


@pytest.fixture(autouse=True)
def few_programs_of_several_steps():
    """The interpreter takes its time over each step of each program."""
    with tuning.override(select_blocks=tuning.Tuning(512, 32, 4, 1)):
        yield


def visible(positions, documents, nsa):
    return compression.visible_blocks(
        positions, documents, block_size=nsa.compress_block_size, stride=nsa.compress_stride
    )


def arguments(spec, *, dtype=jnp.float32, scale=0.5, queries=slice(None), documents=(0,)):
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
    keywords = {name: getattr(spec.nsa, name) for name in SIZES}
    return (q, k, lse, *where), {"scale": scale, **keywords}


def assert_agrees(arrays, keywords):
    actual, expected = (
        jax.jit(functools.partial(module.select_blocks, **keywords))(*arrays)
        for module in (blocks, xla)
    )
    assert actual.dtype == jnp.int32
    np.testing.assert_array_equal(actual, expected)
    return actual


@pytest.mark.parametrize("name", SMALL)
def test_geometries(name):
    assert_agrees(*arguments(SMALL[name]))


# Three keys a block and four slots; more keys a block than a step takes at once; one key a block;
# more blocks wanted than a step has, and than there are.
@pytest.mark.parametrize(
    "geometry",
    [(8, 4, 12, 4, 1, 1), (6, 1, 24, 3, 0, 1), (16, 16, 16, 3, 1, 1), (4, 4, 16, 21, 1, 1)],
    ids=lambda geometry: "_".join(map(str, geometry)),
)
def test_keys_of_a_block_and_blocks_of_a_step(geometry):
    nsa = NSAConfig(**dict(zip(SIZES, geometry, strict=True)))
    assert_agrees(*arguments(ArgSpec(1, 155, 4, 1, 16, 16, nsa)))


@pytest.mark.parametrize("num_initial", [0, 2])
@pytest.mark.parametrize("num_local", [0, 2])
def test_forced_blocks(num_initial, num_local):
    nsa = dataclasses.replace(TINY, num_initial_blocks=num_initial, num_local_blocks=num_local)
    spec = ArgSpec(1, 140, 2, 1, 16, 16, nsa)
    assert_agrees(*arguments(spec, documents=(0, 48)))


def test_documents_and_an_offset():
    """The tiles hold queries of several documents, one of them shorter than a compressed block."""
    spec = dataclasses.replace(SMALL["ragged"], batch=1)
    assert_agrees(*arguments(spec, queries=slice(21, None), documents=(0, 32, 48, 112)))


def test_float16():
    assert_agrees(*arguments(SMALL["one_head_a_group"], dtype=jnp.float16))


def test_negative_scale():
    assert_agrees(*arguments(SMALL["one_head_a_group"], scale=-0.5))


def test_exact_ties_go_to_the_lower_block():
    nsa = NSAConfig(4, 4, 8, num_selected_blocks=4, num_initial_blocks=0, num_local_blocks=1)
    actual = assert_agrees(*arguments(ArgSpec(1, 64, 2, 1, 16, 16, nsa), scale=0.0))
    assert actual[0, 63, 0].tolist() == [0, 1, 2, 7]
    assert actual[0, 40, 0].tolist() == [0, 1, 2, 5]


def test_reads_nothing_that_no_query_may_see():
    """NaN in keys after the last query, and in those that two documents share, changes nothing."""
    spec = ArgSpec(1, 150, 4, 1, 16, 16, TINY)
    (q, k, *rest), keywords = arguments(spec, queries=slice(90), documents=(0, 48))
    lo, hi = visible(*rest[1:], spec.nsa)
    key = jnp.arange(k.shape[1])[:, None]
    seen = ((key >= lo[0]) & (key < hi[0])).any(axis=1)
    assert int(seen.sum()) == int(key[seen].max()) < k.shape[1] - 1, "the keys are not as meant"
    poisoned = jnp.where(seen[:, None, None], k, jnp.nan)
    np.testing.assert_array_equal(
        blocks.select_blocks(q, poisoned, *rest, **keywords),
        xla.select_blocks(q, k, *rest, **keywords),
    )


@pytest.mark.parametrize("mapped", ["all", "q"])
def test_vmap(mapped):
    spec = ArgSpec(1, 100, 2, 1, 16, 16, dataclasses.replace(TINY, num_selected_blocks=4))
    first, keywords = arguments(spec)
    _, _, lse, *_ = arguments(spec, scale=-0.5)[0]
    others = -first[0], first[1], lse, *first[3:]
    axes = (0,) * 5 if mapped == "all" else (0, None, 0, None, None)
    many = [
        x if axis is None else jnp.stack([x, y])
        for x, y, axis in zip(first, others, axes, strict=True)
    ]
    actual = jax.vmap(lambda *x: blocks.select_blocks(*x, **keywords), in_axes=axes)(*many)
    for x, arrays in zip(actual, (first, others), strict=True):
        np.testing.assert_array_equal(x, xla.select_blocks(*arrays, **keywords))
    assert (actual[0] != actual[1]).any()
