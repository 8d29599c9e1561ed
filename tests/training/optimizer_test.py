import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nsa_jax.training import optimizer
from nsa_jax.training.setup import prepare
from tests.training import tiny_run

CONFIG = optimizer.OptimizerConfig(
    learning_rate=1.0,
    final_fraction=0.2,
    warmup_steps=4,
    weight_decay=0.5,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    clip_norm=1.0,
    accumulate=1,
)


def test_schedule_by_hand():
    schedule = optimizer.learning_rate_schedule(CONFIG, 12)
    rates = [float(schedule(updates)) for updates in range(12)]
    # Updates 1 to 4 rise by a quarter each; 5 to 12 fall by half a cosine of 8 steps from 1 to 0.2.
    fall = [0.2 + 0.8 * (1 + np.cos(np.pi * u / 8)) / 2 for u in range(1, 9)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1.0, *fall], rtol=1e-6)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[7] == pytest.approx(0.6)  # half way down, at a quarter of a turn


def test_schedule_without_warm_up_starts_at_once():
    schedule = optimizer.learning_rate_schedule(dataclasses.replace(CONFIG, warmup_steps=0), 2)
    np.testing.assert_allclose([float(schedule(u)) for u in range(2)], [0.6, 0.2], rtol=1e-6)


def _decayed(**changes):
    params = prepare(tiny_run.settings(**changes)).abstract_state.params
    mask = optimizer.decay_mask(params)
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): value for path, value in leaves}


@pytest.mark.parametrize("scan_layers", [False, True])
def test_only_matrices_decay_also_when_layers_are_stacked(scan_layers):
    decayed = _decayed(model__num_layers=2, model__scan_layers=scan_layers, nsa__gate_width=4)
    layer = "layers" if scan_layers else "layers_0"
    assert decayed["embed/embedding"]
    assert decayed[f"{layer}/attention/query/kernel"]
    assert decayed[f"{layer}/attention/compress_keys/hidden/kernel"]
    assert decayed[f"{layer}/mlp/up/kernel"]
    assert not decayed["final_norm/scale"]
    assert not decayed[f"{layer}/attention_norm/scale"]  # of shape [layers, D] when stacked
    assert not decayed[f"{layer}/attention/compress_keys/positions"]
    assert not decayed[f"{layer}/attention/gate/out/bias"]  # of shape [layers, N, 3] when stacked
    kinds = {name.rpartition("/")[2]: value for name, value in decayed.items()}
    # A parameter of another name has to be put on one side or the other.
    assert set(kinds) == {"kernel", "embedding", "scale", "bias", "positions"}


def test_decay_shrinks_matrices_and_nothing_else():
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones((2, 2))}
    transformation = optimizer.make_optimizer(CONFIG, 12)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transformation.update(zeros, transformation.init(params), params)
    # AdamW: -learning rate * decay * parameter, with the first rate 0.25.
    np.testing.assert_allclose(updates["kernel"], -0.25 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["scale"], 0)


def test_clipping_scales_the_whole_gradient():
    params = {"kernel": jnp.zeros(2), "scale": jnp.zeros(1)}
    gradient = {"kernel": jnp.array([3.0, 0.0]), "scale": jnp.array([4.0])}  # of norm 5
    transformation = optimizer.make_optimizer(CONFIG, 12)
    _, (_, clipped) = transformation.update(gradient, transformation.init(params), params)
    mean = optax.tree.get(clipped, "mu")
    np.testing.assert_allclose(mean["kernel"], [0.1 * 3 / 5, 0], rtol=1e-6)
    np.testing.assert_allclose(mean["scale"], [0.1 * 4 / 5], rtol=1e-6)


def test_clip_norm_zero_does_not_clip():
    params = {"kernel": jnp.zeros(1)}
    transformation = optimizer.make_optimizer(dataclasses.replace(CONFIG, clip_norm=0.0), 12)
    _, state = transformation.update(
        {"kernel": jnp.array([50.0])}, transformation.init(params), params
    )
    np.testing.assert_allclose(optax.tree.get(state, "mu")["kernel"], [5.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.0), ("final_fraction", 1.1), ("beta2", 1.0), ("accumulate", 0)],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        dataclasses.replace(CONFIG, **{name: value})
