"""The dense baseline: against the oracle, and what is said where cuDNN cannot run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import UnsupportedError
from nsa_jax.ops import dense, dispatch, reference


@pytest.mark.parametrize("v_head_dim", [8, 16, 24])
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_a_window_over_everything(v_head_dim, packed):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 37, 6, 16))
    k = jax.random.normal(keys[1], (2, 37, 2, 16))
    v = jax.random.normal(keys[2], (2, 37, 2, v_head_dim))
    starts = jnp.broadcast_to(jnp.arange(37) // 10 * 10, (2, 37)) if packed else None
    out = dense.dense_attention(q, k, v, document_starts=starts, implementation="xla")
    expected, _ = reference.sliding_window_attention(
        q, k, v, window_size=37, document_starts=starts
    )
    # float32 sums of up to 37 products of order 1.
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("queries", [1, 5])
def test_queries_may_stand_at_other_positions(queries, packed):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, queries, 6, 16))
    k, v = jax.random.normal(keys[1], (2, 2, 37, 2, 16))
    at = {"q_positions": jnp.array([[30], [11]]) + jnp.arange(queries)}
    at |= {"document_starts": at["q_positions"] // 10 * 10} if packed else {}
    out = dense.dense_attention(q, k, v, **at, implementation="xla")
    expected, _ = reference.sliding_window_attention(q, k, v, window_size=37, **at)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN can run on a GPU")
def test_cudnn_is_refused_without_a_gpu():
    x = jnp.ones((1, 8, 2, 8), jnp.bfloat16)
    with pytest.raises(UnsupportedError, match=r"'cudnn': cuDNN needs an NVIDIA GPU .* cpu here"):
        dense.dense_attention(x, x, x, implementation="cudnn")
    assert dense.dense_attention(x, x, x, implementation="auto").dtype == jnp.bfloat16
    with dispatch.recorded() as record:
        dense.dense_attention(x, x, x, implementation="auto")
    assert record["dense_attention"]["chosen"] == "xla"
    assert "NVIDIA GPU" in record["dense_attention"]["refused"]["cudnn"]
    with dispatch.recorded() as record:
        dense.dense_attention(x, x, x, implementation="xla")
    assert record == {"dense_attention": {"chosen": "xla", "refused": {}}}


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "odd_mask", "refusal"),
    [
        ("9.0", "bfloat16", 256, False, None),
        ("8.0", "float16", 128, False, None),
        ("8.0", "bfloat16", 192, False, "multiples of 8 up to 128 features a head, not 192"),
        ("9.0", "bfloat16", 20, False, "not 20"),
        ("9.0", "float32", 64, False, "bfloat16 and float16, not float32"),
        ("7.5", "float16", 64, False, "since Ampere"),
        ("9.0", "bfloat16", 64, True, "of even sizes alone"),
    ],
)
def test_what_cudnn_takes(monkeypatch, capability, dtype, head_dim, odd_mask, refusal):
    class Device:
        platform = "gpu"
        device_kind = "a GPU"
        compute_capability = capability

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    said = dense.cudnn_refusal(dtype, head_dim, odd_mask=odd_mask)
    assert said is None if refusal is None else refusal in said
    assert dense.resolve("auto", dtype, head_dim, odd_mask=odd_mask) == (
        "cudnn" if refusal is None else "xla"
    )


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'triton' must be one of .*cudnn"):
        dense.resolve("triton", "bfloat16", 64)
