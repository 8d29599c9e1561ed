"""The transformer: options change cost, not results; what it refuses."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.model import Transformer, _look_up, layer_intermediates
from tests.tiny_model import CONFIG

TOKENS = jax.random.randint(jax.random.key(0), (2, 40), 0, 50)


@functools.partial(jax.jit, static_argnames="config")
def initialised(config):
    return Transformer(config).init(jax.random.key(1), TOKENS)["params"]


@functools.partial(jax.jit, static_argnames="config")
def logits_and_intermediates(config, params):
    return Transformer(config).apply({"params": params}, TOKENS, mutable=["intermediates"])


def stack_layers(params, num_layers):
    """Parameters of layers_0, layers_1, ... in the layout of a scanned model."""
    layers = [params[f"layers_{i}"] for i in range(num_layers)]
    rest = {k: v for k, v in params.items() if not k.startswith("layers_")}
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def loss_and_gradients(config, params):
    @jax.jit
    def run(params):
        def loss(params):
            logits = Transformer(config).apply({"params": params}, TOKENS)
            return (logits**2).mean()

        return jax.value_and_grad(loss)(params)

    return run(params)


def test_scan_and_remat_change_no_result():
    plain = initialised(CONFIG)
    stacked = stack_layers(plain, 2)
    expected, gradients = loss_and_gradients(CONFIG, plain)
    for options in ({"scan_layers": True}, {"scan_layers": True, "remat": True}):
        config = dataclasses.replace(CONFIG, **options)
        assert jax.tree.structure(initialised(config)) == jax.tree.structure(stacked)
        loss, stacked_gradients = loss_and_gradients(config, stacked)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        expected_gradients = stack_layers(gradients, 2)
        chex.assert_trees_all_close(stacked_gradients, expected_gradients, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_intermediates_of_all_layers(scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    _, state = logits_and_intermediates(config, initialised(config))
    blocks = layer_intermediates(state["intermediates"], "block_indices")
    gates = layer_intermediates(state["intermediates"], "gates")
    assert blocks.shape == (2, 2, 40, 1, 4)
    assert gates.shape == (2, 2, 40, 2, 3)
    assert not (blocks[0] == blocks[1]).all(), "layers choose for themselves"


def test_dense_and_sparse_models_are_called_alike():
    config = dataclasses.replace(CONFIG, attention="dense", implementation="auto")
    logits, state = logits_and_intermediates(config, initialised(config))
    assert logits.shape == (2, 40, 50)
    assert logits.dtype == jnp.float32
    shown = {name for layer in state["intermediates"].values() for name in layer["attention"]}
    assert shown == {"queries", "keys"}  # there are neither blocks nor gates


def test_tied_embeddings_share_one_matrix():
    tied = initialised(CONFIG)
    untied = initialised(dataclasses.replace(CONFIG, tie_embeddings=False))
    assert "logits" not in tied
    assert untied["logits"]["kernel"].shape == (24, 50)


def test_embeddings_are_differentiated_as_by_indexing():
    tokens = jax.random.randint(jax.random.key(0), (2, 50), 0, 3)  # few and frequent
    table = jax.random.normal(jax.random.key(1), (7, 5))
    weights = jax.random.normal(jax.random.key(2), (2, 50, 5))

    def gradient(look_up):
        return jax.grad(lambda table: jnp.sum(weights * look_up(table, tokens) ** 2))(table)

    ours = gradient(_look_up)
    # Sums of some thirty float32 terms in two orders.
    np.testing.assert_allclose(ours, gradient(lambda x, i: x[i]), rtol=1e-5, atol=1e-5)
    assert not ours[3:].any(), "tokens that are not there have no gradient"


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_no_gradient_adds_by_scattering(tie_embeddings):
    """On a GPU that would be atomics: sums in an order that differs between runs."""
    config = dataclasses.replace(CONFIG, tie_embeddings=tie_embeddings)
    params = jax.eval_shape(functools.partial(initialised, config))
    text = str(jax.make_jaxpr(functools.partial(loss_and_gradients, config))(params))
    assert "dot_general" in text
    assert "scatter-add" not in text


@pytest.mark.parametrize("scan_layers", [False, True])
def test_dropout_is_seeded_and_only_in_training(scan_layers):
    config = dataclasses.replace(CONFIG, dropout=0.5, scan_layers=scan_layers)
    model, params = Transformer(config), {"params": initialised(config)}

    @jax.jit
    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(params, TOKENS, deterministic=False, rngs=rngs)

    np.testing.assert_array_equal(train(0), train(0))
    assert bool((train(0) != train(1)).any())
    assert bool((train(0) != model.apply(params, TOKENS)).any())


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_bfloat16_model_has_float32_parameters_and_logits(tie_embeddings):
    base = dataclasses.replace(CONFIG, tie_embeddings=tie_embeddings)
    config = dataclasses.replace(base, dtype="bfloat16")
    params = initialised(config)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    logits, _ = logits_and_intermediates(config, params)
    assert logits.dtype == jnp.float32
    assert bool((logits != logits.astype(jnp.bfloat16)).any()), "rounded on the way"
    exact, _ = logits_and_intermediates(base, params)
    # Logits of order 1 after two layers in bf16; a few near-ties choose another block.
    assert jnp.median(jnp.abs(logits - exact)) < 3e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=2"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"num_layers": 2.5}, "num_layers=2.5 must be an integer"),
        ({"nsa": {}}, "nsa={} must be an NSAConfig"),
        ({"attention": "full"}, "attention='full' must be one of .*nsa.*dense"),
        ({"dtype": "float16"}, "dtype='float16' must be one of"),
        ({"implementation": "cuda"}, "implementation='cuda' must be one of"),
        ({"attention": "dense"}, "implementation='triton' must be one of .*cudnn"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"v_head_dim": 0}, "v_head_dim=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    if change == {"attention": "dense"}:
        change = {"attention": "dense", "implementation": "triton"}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
