"""Training on a GPU, and dense attention through cuDNN."""

import hashlib
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import DenseAttention
from nsa_jax.training import parallel
from nsa_jax.training.setup import prepare
from tests.training import tiny_run

pytestmark = pytest.mark.gpu


def train(**changes):
    """Makes 20 updates on one batch; returns the nats a token of each, and the state after it."""
    config = tiny_run.settings(
        **{"steps": 20, "model__dtype": "bfloat16", "model__head_dim": 16} | changes
    )
    setup, length = prepare(config), config.data.seq_len
    tokens = np.random.default_rng(0).integers(0, 257, (4, length + 1), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((4, length), np.float32),
        "document_starts": np.zeros((4, length), np.int32),
    }
    batch = parallel.global_batch(batch, setup.mesh)
    state, losses = setup.make_state(), []
    for _ in range(config.steps):
        state, metrics = setup.train_step(state, batch)
        losses.append(float(metrics.sums.nats / metrics.sums.weight))
    return losses, state


#: Sizes that the kernels for Hopper take.
HOPPER = {
    "model__head_dim": 64,
    "nsa__compress_block_size": 32,
    "nsa__compress_stride": 16,
    "nsa__select_block_size": 64,
    "nsa__num_selected_blocks": 3,
    "nsa__window_size": 64,
    "data__seq_len": 256,
}


@pytest.mark.parametrize(("kernels", "sizes"), [("triton", {}), ("mosaic_gpu", HOPPER)])
def test_twenty_updates_agree_with_xla(kernels, sizes):
    (actual, _), (expected, _) = (train(implementation=x, **sizes) for x in (kernels, "xla"))
    assert expected[-1] < 0.8 * expected[0], "nothing was learned"
    # bfloat16 activations have 8 bits, and a selected block may change with the last of them.
    np.testing.assert_allclose(actual, expected, rtol=2e-2)


@pytest.mark.parametrize(
    ("implementation", "sizes"), [("xla", {}), ("triton", {}), ("mosaic_gpu", HOPPER)]
)
def test_twenty_updates_give_the_same_bits_twice(implementation, sizes):
    first, second = (train(implementation=implementation, **sizes) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


def print_digest(attention):
    """Of the parameters after 20 updates of a model wide enough for a choice of products."""
    _, state = train(
        model__attention=attention,
        model__model_dim=1024,
        model__mlp_dim=2048,
        model__head_dim=64,
        data__seq_len=1024,
    )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state.params):
        digest.update(np.asarray(leaf).tobytes())
    print("digest", digest.hexdigest())


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_two_processes_train_the_same_bits(attention):
    """Each compiles for itself, with the compiler's own flags, and at the same time as the other.

    By default the compiler keeps of several products the one that was fastest while it tried.
    """
    code = f"from tests.gpu.training_test import print_digest; print_digest({attention!r})"
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    first, second = (process.communicate()[0].decode() for process in processes)
    assert "digest" in first
    assert first == second


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
