"""The XLA kernel operations beyond what the branches ask of them, and their memory."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig, native_sparse_attention
from nsa_jax.ops import xla
from nsa_jax.ops.xla.selected import _InvertedIndex
from tests.arg_specs import ArgSpec, random_inputs


def masked_attention(q, k, v, mask, scale):
    """softmax(q k) v with a mask [B, T, S], the plain way; empty rows give 0."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * scale
    weights = jnp.where(mask[:, None], jnp.exp(scores), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    p = weights / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bnts,bsnv->btnv", p, v, precision="highest")


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (5, 300), (300, 5), (257, 259)])
def test_interval_attention_on_any_intervals(num_queries, num_keys):
    """Random rising intervals, some of them empty, over lengths beside the tiles' multiples."""
    rng = np.random.default_rng(num_queries)
    bounds = np.sort(rng.integers(0, num_keys + 1, (2, 2, num_queries)), axis=-1)
    lo, hi = jnp.asarray(bounds, jnp.int32)  # independent: hi < lo happens, and is empty
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, num_queries, 6, 16))
    k = jax.random.normal(keys[1], (2, num_keys, 2, 16))
    v = jax.random.normal(keys[2], (2, num_keys, 2, 8))
    weights = jax.random.normal(keys[3], (2, num_queries, 6, 8))
    index = jnp.arange(num_keys)
    mask = (index >= lo[..., None]) & (index < hi[..., None])
    assert num_queries < 3 or bool((~mask.any(axis=-1)).any()), "no empty row was drawn"

    actual = jax.jit(lambda *x: jax.vjp(lambda *x: xla.interval_attention(*x, lo, hi, 0.3)[0], *x))
    out, pull = actual(q, k, v)
    expected, expected_pull = jax.vjp(lambda *x: masked_attention(*x, mask, 0.3), q, k, v)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    # Gradients sum up to 300 rows of order 1.
    for a, b in zip(pull(weights), expected_pull(weights), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_one_block_that_everyone_selects_and_one_that_nobody_does():
    """The inverted index: more than one tile of queries for block 0, none for block 2."""
    num_queries = 300
    own = np.arange(num_queries) // 64
    own[own == 2] = 1
    blocks = np.stack([np.zeros_like(own), np.where(own > 0, own, -1)], axis=-1)
    blocks = jnp.asarray(np.broadcast_to(blocks[None, :, None], (2, num_queries, 2, 2)), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, num_queries, 4, 16))
    k, v = jax.random.normal(keys[1], (2, 2, num_queries, 2, 16))
    weights = jax.random.normal(keys[2], q.shape)
    positions = jnp.broadcast_to(jnp.arange(num_queries), (2, num_queries))
    token = jnp.arange(num_queries)
    mask = (blocks[:, :, 0, :, None] == token // 64).any(axis=2) & (token <= positions[..., None])

    def run(q, k, v):
        return xla.selected_attention(q, k, v, blocks, positions, 64, 0.25)[0]

    out, pull = jax.vjp(jax.jit(run), q, k, v)
    expected, expected_pull = jax.vjp(lambda *x: masked_attention(*x, mask, 0.25), q, k, v)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    gradients = pull(weights)
    for a, b in zip(gradients, expected_pull(weights), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)
    assert (gradients[1][:, 128:192] == 0).all(), "nobody selected block 2"


def test_the_inverted_index_lists_queries_in_order():
    blocks = jnp.array([[0, 2], [0, -1], [2, 0], [1, 2]])[None, :, None, :]
    index = _InvertedIndex.build(blocks, 4)
    assert index.counts[:, 0, 0].tolist() == [3, 1, 3, 0]
    assert index.queries[0, 0].tolist() == [0, 1, 2, 3, 0, 2, 3, 1]
    tile = index.tile(index.starts[2], index.counts[2], 0, 2, 4)
    assert tile[0, 0].tolist() == [0, 2]
    tile = index.tile(index.starts[2], index.counts[2], 1, 2, 4)
    assert tile[0, 0, 0] == 3
    assert tile[0, 0, 1] >= 4, "beyond the count: out of range"


def temporary_bytes(length):
    """Temporaries of forward plus backward at the paper's geometry, by the compiler's analysis."""
    spec = ArgSpec(1, length, 16, 1, 64, 64, NSAConfig())
    arrays = jax.eval_shape(lambda: random_inputs(spec))

    def loss(arrays):
        out, _ = native_sparse_attention(**arrays, config=spec.nsa, implementation="xla")
        return out.sum()

    compiled = jax.jit(jax.grad(loss)).lower(arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_length():
    sizes = [temporary_bytes(length) for length in (8192, 16384, 32768)]
    for shorter, longer in itertools.pairwise(sizes):
        assert longer <= 2.2 * shorter, sizes
    # One [T, T] array of float32 for one of the 16 heads would be 4 GiB at the longest.
    assert sizes[-1] < 32768**2 * 4


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from nsa_jax import native_sparse_attention
from tests.arg_specs import SMALL, random_inputs

spec = SMALL["ragged"]
arrays = random_inputs(spec)

def gradients(arrays):
    def loss(arrays):
        out, _ = native_sparse_attention(**arrays, config=spec.nsa, implementation="xla")
        return (out**2).sum()
    return jax.grad(loss)(arrays)

mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
sharded = jax.shard_map(gradients, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
expected = jax.jit(gradients)(arrays)
placed = jax.device_put(arrays, jax.NamedSharding(mesh, P("batch")))
for run in (jax.jit(sharded), jax.jit(gradients)):
    for a, b in zip(jax.tree.leaves(run(placed)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
"""


def test_two_devices_agree_with_one():
    """A batch over two devices, by shard_map and by the compiler's own partitioning."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    assert done.returncode == 0, done.stderr
