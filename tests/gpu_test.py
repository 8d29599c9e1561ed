"""What only an NVIDIA GPU can show; run with `pytest -m gpu --require-gpu`.

Beside these, the whole suite runs on a GPU where there is one: JAX puts every test there.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import DenseAttention, NSAConfig, native_sparse_attention
from tests.arg_specs import ArgSpec, random_inputs

pytestmark = pytest.mark.gpu

PAPER = ArgSpec(1, 8192, 16, 1, 128, 128, NSAConfig())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_xla_agrees_with_the_oracle_at_the_paper_geometry(dtype):
    """The last 64 queries of 8192, for which the dense oracle is affordable."""
    arrays = random_inputs(PAPER, dtype=dtype)
    run = jax.jit(
        lambda arrays: native_sparse_attention(**arrays, config=PAPER.nsa, implementation="xla")
    )
    with jax.default_matmul_precision("default"):  # what users have; not what the tests set
        out, blocks = run(arrays)
    last = slice(PAPER.length - 64, None)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    chunk = {k: v[:, last] if k in ("q", "gates") else v for k, v in exact.items()}
    expected, _ = native_sparse_attention(
        **chunk,
        config=PAPER.nsa,
        q_positions=jnp.arange(PAPER.length)[None, last],
        block_indices=blocks[:, last],
        implementation="reference",
    )
    # float32 must be float32 (tf32 would be off by 1e-3); bfloat16 rounds outputs below 1.
    atol = {jnp.float32: 2e-5, jnp.bfloat16: 1e-2}[dtype]
    np.testing.assert_allclose(out[:, last].astype(jnp.float32), expected, atol=atol)


def test_two_runs_give_the_same_bits_at_the_paper_geometry():
    arrays = random_inputs(PAPER, dtype=jnp.bfloat16)

    @jax.jit
    def gradients(arrays):
        def loss(arrays):
            out, _ = native_sparse_attention(**arrays, config=PAPER.nsa, implementation="xla")
            return (out.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss)(arrays)

    chex.assert_trees_all_equal(gradients(arrays), gradients(arrays))


@pytest.mark.parametrize("v_head_dim", [64, 48])
@pytest.mark.parametrize("packed", [False, True])
def test_dense_attention_through_cudnn_agrees_with_xla(v_head_dim, packed):
    layer = DenseAttention(8, 2, 64, v_head_dim, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 512, 256), jnp.bfloat16)
    starts = jnp.broadcast_to(jnp.where(jnp.arange(512) < 192, 0, 192), (2, 512))
    starts = starts if packed else None
    params = layer.init(jax.random.key(1), x)

    def run(implementation):
        @jax.jit
        def gradient(params):
            def loss(params):
                out = layer.clone(implementation=implementation).apply(
                    params, x, document_starts=starts
                )
                return (out.astype(jnp.float32) ** 2).mean(), out

            return jax.grad(loss, has_aux=True)(params)

        return gradient(params)

    for a, b in zip(*map(jax.tree.leaves, (run("cudnn"), run("xla"))), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert jnp.linalg.norm(a - b) < 1e-2 * jnp.linalg.norm(b)
    np.testing.assert_array_equal(*(run(name)[1] for name in ("auto", "cudnn")))
