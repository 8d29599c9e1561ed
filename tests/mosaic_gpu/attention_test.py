"""native_sparse_attention through Mosaic GPU kernels alone, interpreted on a CPU."""

import chex
import jax
import jax.numpy as jnp
import pytest

from nsa_jax.config import NSAConfig
from nsa_jax.ops import branches
from nsa_jax.ops.attention import native_sparse_attention
from pallas_kernels.mosaic_gpu import launch, tuning
from tests.arg_specs import ArgSpec, random_inputs
from tests.mosaic_gpu.interpreter import interpreted

NSA = NSAConfig(
    compress_block_size=32,
    compress_stride=16,
    select_block_size=64,
    num_selected_blocks=3,
    num_initial_blocks=1,
    num_local_blocks=1,
    window_size=40,
)
SPEC = ArgSpec(1, 140, 8, 1, 64, 64, NSA)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(launch, "device", lambda: ("NVIDIA H100", 9.0))
    monkeypatch.setattr(launch, "num_cores", lambda: 2)


def attend(arrays, implementation):
    return native_sparse_attention(**arrays, config=NSA, implementation=implementation)


def test_agrees_with_xla_forward_and_backward():
    """The sum is in the window's kernel forward, which has no derivatives of its own.

    The second document begins where the second block does.
    """
    arrays = random_inputs(SPEC, dtype=jnp.float16)
    arrays["document_starts"] = jnp.where(jnp.arange(140) < 64, 0, 64)[None]

    def loss(q, implementation):
        return (attend(arrays | {"q": q}, implementation)[0].astype(jnp.float32) ** 2).sum()

    window = arrays["q"], *arrays["window"]
    assert branches.sums_in_one_kernel(*window, config=NSA, implementation="mosaic_gpu")
    expected, blocks = attend(arrays, "xla")
    d_q = jax.jit(jax.grad(loss), static_argnums=1)(arrays["q"], "xla")
    with interpreted(), tuning.override(interval_dkv=tuning.Tuning(64, 2)):
        actual, actual_blocks = jax.jit(attend, static_argnums=1)(arrays, "mosaic_gpu")
        actual_d_q = jax.jit(jax.grad(loss), static_argnums=1)(arrays["q"], "mosaic_gpu")
    assert actual.dtype == jnp.float16
    chex.assert_trees_all_equal(actual_blocks, blocks)
    # Probabilities, their gradients and the results are rounded to 11 bits.
    for x, y in ((actual, expected), (actual_d_q, d_q)):
        x, y = (z.astype(jnp.float32) for z in (x, y))
        chex.assert_trees_all_close(x, y, atol=4e-3 * float(jnp.abs(y).max()))


def test_compressed_queries_of_another_dtype():
    """Their branch's output comes in their dtype, and the kernel that sums takes one of q's."""
    arrays = random_inputs(SPEC, dtype=jnp.bfloat16)
    arrays["q_compressed"] = arrays["q"].astype(jnp.float32)
    arrays["compressed"] = [x.astype(jnp.float32) for x in arrays["compressed"]]
    lowered = jax.jit(attend, static_argnums=1).trace(arrays, "auto")
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "interval_forward" in text


@pytest.mark.parametrize(
    ("head_dims", "implementation", "expected"),
    [
        ((128, 128), "auto", True),
        ((128, 128), "mosaic_gpu", True),
        ((128, 128), "triton", False),
        ((192, 128), "auto", False),  # shared memory has no room
        ((80, 80), "auto", False),
    ],
)
def test_where_the_sum_is_one_kernel(head_dims, implementation, expected):
    head_dim, v_head_dim = head_dims
    q, k, v = (
        jax.ShapeDtypeStruct((1, 512, heads, features), jnp.bfloat16)
        for heads, features in ((16, head_dim), (1, head_dim), (1, v_head_dim))
    )
    how = {"config": NSA, "implementation": implementation}
    assert branches.sums_in_one_kernel(q, k, v, **how) is expected
