import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from nsa_jax.training import parallel, steps
from nsa_jax.training.errors import NonFiniteError
from nsa_jax.training.setup import prepare
from tests.training import tiny_run

ROOT = Path(__file__).resolve().parents[2]


def _batch(rows=4, length=32, seed=0):
    """Rows of which each has another share of weights, so that microbatches weigh differently."""
    rng = np.random.default_rng(seed)
    weights = (rng.random((rows, length)) < np.linspace(0.1, 1, rows)[:, None]).astype(np.float32)
    return {
        "tokens": rng.integers(0, 257, (rows, length), np.int32),
        "targets": rng.integers(0, 257, (rows, length), np.int32),
        "weights": weights,
        "document_starts": np.zeros((rows, length), np.int32),
    }


def _dense(**changes):
    return prepare(tiny_run.settings(model__attention="dense", optimizer__clip_norm=0.0, **changes))


@pytest.fixture(scope="module")
def dense():
    return _dense()


def _updated(setup):
    batch = parallel.global_batch(_batch(), setup.mesh)
    state, metrics = setup.train_step(setup.make_state(), batch)
    return jax.device_get((state, metrics))


def test_accumulation_equals_the_large_batch(dense):
    whole, whole_metrics = _updated(dense)
    cut, cut_metrics = _updated(_dense(optimizer__accumulate=4))
    # Tolerances: the same sums in another order; float32 has 6e-8 an addition.
    np.testing.assert_allclose(cut_metrics.sums.nats, whole_metrics.sums.nats, rtol=1e-6)
    assert cut_metrics.sums.weight == whole_metrics.sums.weight
    np.testing.assert_allclose(cut_metrics.gradient_norm, whole_metrics.gradient_norm, rtol=1e-5)
    first_moment = [jax.tree.leaves(state.opt_state) for state in (whole, cut)]
    for a, b in zip(*first_moment, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_the_gradient_is_of_the_mean_over_weights(dense):
    state, batch = dense.make_state(), _batch()

    def mean_nats(params):
        logits = dense.model.apply({"params": params}, batch["tokens"])
        chosen = np.eye(257, dtype=np.float32)[batch["targets"]]
        nats = -(jax.nn.log_softmax(logits) * chosen).sum(-1)
        return (nats * batch["weights"]).sum() / batch["weights"].sum()

    expected = jax.grad(mean_nats)(state.params)["embed"]["embedding"]
    after, _ = dense.train_step(state, parallel.global_batch(batch, dense.mesh))
    mean = after.opt_state[0].mu["embed"]["embedding"]
    # AdamW's first average is 0.1 times the gradient. Tolerance: float32 through one layer.
    np.testing.assert_allclose(mean, 0.1 * expected, rtol=1e-4, atol=1e-8)


def test_the_state_is_donated(dense):
    state = dense.make_state()
    dense.train_step(state, parallel.global_batch(_batch(), dense.mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_dropout_is_a_function_of_the_step():
    setup = _dense(model__dropout=0.5)
    batch = parallel.global_batch(_batch(), setup.mesh)

    def nats(step):
        state = setup.make_state()._replace(step=np.int32(step))
        return float(setup.train_step(state, batch)[1].sums.nats)

    assert nats(3) == nats(3)
    assert nats(3) != nats(4)


def test_evaluation_adds_up_over_batches_of_unequal_weight(dense):
    params = dense.make_state().params
    batches = [_batch(seed=1), _batch(seed=2)]
    batches[1]["weights"][2:] = 0  # as the last batch of a set is filled up
    values = steps.evaluate(dense.eval_step, params, batches, dense.mesh)
    together = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    whole = steps.evaluate(dense.eval_step, params, [together], dense.mesh)
    assert values == pytest.approx(whole, rel=1e-6)
    assert values["bits_per_byte"] == pytest.approx(values["loss"] / np.log(2))


_ON_ONE_AND_ON_FOUR = """
import jax
import numpy as np
from jax.sharding import Mesh

from nsa_jax.training import parallel, setup
from tests.training import tiny_run
from tests.training.steps_test import _batch

assert jax.device_count() == 4
for count in (1, 4):
    parallel.data_mesh = lambda: Mesh(np.array(jax.devices()[:count]), (parallel.AXIS,))
    parts = setup.prepare(tiny_run.settings(data__batch_size=8))
    state = parts.make_state()
    for step in range(3):
        batch = parallel.global_batch(_batch(rows=8, seed=step), parts.mesh)
        state, metrics = parts.train_step(state, batch)
        print(count, float(metrics.sums.nats / metrics.sums.weight), float(metrics.gradient_norm))
"""


def test_four_devices_agree_with_one():
    done = subprocess.run(
        [sys.executable, "-c", _ON_ONE_AND_ON_FOUR],
        env=os.environ
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = np.array([line.split() for line in done.stdout.splitlines()], float)
    one, four = (rows[rows[:, 0] == count, 1:] for count in (1, 4))
    assert len(one) == len(four) == 3
    # Tolerance: float32 sums in another order, through three updates.
    np.testing.assert_allclose(four, one, rtol=2e-5)


def test_a_validation_loss_that_is_not_finite_is_an_error(dense):
    params = jax.tree.map(lambda leaf: leaf * np.nan, dense.make_state().params)
    with pytest.raises(NonFiniteError, match="validation loss is nan"):
        steps.evaluate(dense.eval_step, params, [_batch()], dense.mesh)
