"""The attention modules: phi, gates, rotations, causality, and both kinds alike."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import DenseAttention, NativeSparseAttention, NSAConfig, UnsupportedError
from nsa_jax.modules import Compression, Gates
from nsa_jax.ops import reference
from nsa_jax.rotary import apply_rope

NSA = NSAConfig(8, 4, 16, 4, window_size=24)
SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 12}
LENGTH = 90

LAYERS = {
    "reference": NativeSparseAttention(**SIZES, nsa=NSA, implementation="reference"),
    "xla": NativeSparseAttention(**SIZES, nsa=NSA, implementation="xla"),
    "dense": DenseAttention(**SIZES),
    "dense_gated": DenseAttention(**SIZES, output_gate=True),
}


def inputs(length=LENGTH, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, length, 32))


@functools.partial(jax.jit, static_argnames=("layer", "mutable"))
def apply(layer, params, x, *, document_starts=None, mutable=False):
    return layer.apply({"params": params}, x, document_starts=document_starts, mutable=mutable)


def initialised(layer, x):
    """Parameters with every zero (biases) replaced, so that nothing is switched off."""
    params = jax.jit(layer.init)(jax.random.key(1), x)["params"]
    return jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )


@pytest.mark.parametrize("kind", ["mlp", "linear", "mean"])
def test_phi_maps_each_block_on_its_own(kind):
    x = jax.random.normal(jax.random.key(0), (2, 30, 3, 8))
    phi = Compression(kind, block_size=8, stride=4, width=16)
    params = jax.jit(phi.init)(jax.random.key(1), x)
    out = phi.apply(params, x)
    assert out.shape == (2, 6, 3, 8)
    alone = phi.apply(params, x[:, 12:20])  # the tokens of block 3
    np.testing.assert_allclose(out[:, 3:4], alone, atol=1e-6)
    if kind == "mean":
        assert not jax.tree.leaves(params)
        np.testing.assert_allclose(out[:, 3], x[:, 12:20].mean(axis=1), atol=1e-6)
    else:
        reverse = x.at[:, 12:20].set(x[:, 12:20][:, ::-1])
        assert jnp.abs(phi.apply(params, reverse)[:, 3] - out[:, 3]).max() > 1e-2, "no positions"
        swapped = phi.apply(params, x[:, :, ::-1])
        np.testing.assert_allclose(swapped[:, :, ::-1], out, atol=1e-6)  # heads share weights


def test_linear_phi_by_hand():
    phi = Compression("linear", block_size=2, stride=2, width=1)
    params = {
        "positions": jnp.array([[10.0], [20.0]]),
        "out": {"kernel": jnp.array([[3.0], [5.0]]), "bias": jnp.array([0.5])},
    }
    x = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]).reshape(1, 5, 1, 1)
    out = phi.apply({"params": params}, x)
    # 3 * (1 + 10) + 5 * (2 + 20) + .5, then with tokens 3 and 4; token 5 completes no block
    np.testing.assert_allclose(out.ravel(), [143.5, 159.5])


@pytest.mark.parametrize("width", [0, 7])
def test_gates_are_sigmoids_one_a_head_and_branch(width):
    x = inputs().astype(jnp.bfloat16)
    gates = Gates(num_heads=4, width=width)
    params = gates.init(jax.random.key(0), x)
    out = gates.apply(params, x)
    assert out.shape == (2, LENGTH, 4, 3)
    assert out.dtype == jnp.float32
    assert bool(((out > 0) & (out < 1)).all())
    assert bool((out.sum(axis=-1) != 1).all())
    assert ("hidden" in params["params"]) == bool(width)


def test_gates_of_another_activation():
    x = inputs()

    def gates(**options):
        layer = Gates(num_heads=4, width=0, **options)
        params = layer.init(jax.random.key(0), x)
        return params, layer.apply(params, x)

    params, usual = gates()
    logits = jax.scipy.special.logit(usual)
    same, softmax = gates(activation="softmax", branches=("compressed", "window"))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, same))
    expected = jax.nn.softmax(logits[..., jnp.array([0, 2])])
    # Through the inverse of the sigmoid: some bits are lost on the way.
    np.testing.assert_allclose(softmax[..., jnp.array([0, 2])], expected, rtol=1e-4)
    assert not softmax[..., 1].any()
    none, fixed = gates(activation="fixed", branches=("selected",))
    assert not none
    np.testing.assert_array_equal(fixed, jnp.broadcast_to(jnp.array([0.0, 1, 0]), fixed.shape))
    _, sigmoid = gates(branches=("selected", "window"))
    np.testing.assert_array_equal(sigmoid, usual.at[..., 0].set(0))


class Chosen(nn.Module):
    """A selector that always returns the blocks it was made with."""

    nsa: NSAConfig
    blocks: tuple[int, ...]

    @nn.compact
    def __call__(self, x, q, k, *, document_starts=None):
        self.sow("losses", "example", x.sum())
        blocks = jnp.array(self.blocks, jnp.int32)
        own = (jnp.arange(q.shape[1]) // self.nsa.select_block_size)[:, None]
        blocks = jnp.where(blocks <= own, blocks, -1)[None, :, None]
        return jnp.broadcast_to(blocks, (*q.shape[:2], k.shape[2], len(self.blocks)))


def test_a_selector_replaces_the_choice():
    x = inputs()
    sparse = LAYERS["xla"]
    params = initialised(sparse, x)
    layer = sparse.clone(selector=Chosen(NSA, (1, 3)))
    _, state = apply(layer, params, x, mutable=("intermediates", "losses"))
    state, losses = state["intermediates"], state["losses"]
    np.testing.assert_array_equal(state["block_indices"][0][0, 70, 0], [1, 3])
    np.testing.assert_array_equal(state["block_indices"][0][0, 40, 0], [1, -1])
    np.testing.assert_allclose(losses["selector"]["example"][0], x.sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["xla", "dense"])
def test_there_is_no_decoding_with_a_selector(kind):
    x = inputs()
    layer = LAYERS[kind]
    params, cache = initialised(layer, x), layer.init_cache(x.shape[0], x.shape[1])
    chosen = layer.clone(selector=Chosen(NSA, (0,)))
    for call in (
        lambda: chosen.init_cache(1, 64),
        lambda: chosen.apply(params, x, cache=cache),
    ):
        with pytest.raises(ValueError, match=r"selector=Chosen together with a cache: .* decode"):
            call()


def test_dense_attention_with_all_blocks_selected_is_dense_attention():
    x = inputs()
    params = initialised(LAYERS["dense"], x)
    every = Chosen(NSA, tuple(range(6)))
    out = apply(LAYERS["dense"].clone(selector=every), params, x)
    np.testing.assert_allclose(out, apply(LAYERS["dense"], params, x), atol=2e-5)
    few = apply(LAYERS["dense"].clone(selector=Chosen(NSA, (0,))), params, x)
    assert jnp.abs(few - out).max() > 1e-2


def test_the_module_is_the_operations_put_together():
    """The layer rebuilt from its parameters with the oracle and einsums."""
    layer, x = LAYERS["xla"], inputs()
    params = initialised(layer, x)
    t = jnp.arange(LENGTH)[None]

    def project(name):
        return jnp.einsum("btd,dnh->btnh", x, params[name]["kernel"])

    def phi(name, x):
        p = params[name]
        blocks = jnp.stack([x[:, i : i + 8] for i in range(0, LENGTH - 7, 4)], axis=1)
        blocks = jnp.moveaxis(blocks + p["positions"][:, None], 2, 3)
        flat = blocks.reshape(*blocks.shape[:3], -1)
        hidden = nn.gelu(flat @ p["hidden"]["kernel"] + p["hidden"]["bias"])
        return hidden @ p["out"]["kernel"] + p["out"]["bias"]

    def rope(x, positions=t):
        return apply_rope(x, positions, theta=10_000.0)

    k_compressed = phi("compress_keys", project("key_compressed"))
    k_compressed = rope(k_compressed, 4 * jnp.arange(k_compressed.shape[1])[None])
    logits = jnp.einsum("btd,dnc->btnc", x, params["gate"]["out"]["kernel"])
    out, blocks = reference.native_sparse_attention(
        rope(project("query")),
        (k_compressed, phi("compress_values", project("value_compressed"))),
        (rope(project("key_selected")), project("value_selected")),
        (rope(project("key_window")), project("value_window")),
        jax.nn.sigmoid(logits + params["gate"]["out"]["bias"]),
        compress_block_size=8,
        compress_stride=4,
        select_block_size=16,
        num_selected_blocks=4,
        num_initial_blocks=1,
        num_local_blocks=2,
        window_size=24,
    )
    expected = jnp.einsum("btnv,nvd->btd", out, params["output"]["kernel"])
    actual, state = apply(layer, params, x, mutable="intermediates")
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    np.testing.assert_array_equal(state["intermediates"]["block_indices"][0], blocks)
    np.testing.assert_allclose(
        state["intermediates"]["gates"][0],
        jax.nn.sigmoid(logits + params["gate"]["out"]["bias"]),
        atol=1e-6,
    )


@pytest.mark.parametrize("name", LAYERS)
def test_causality_by_gradient_and_by_perturbation(name):
    layer, x = LAYERS[name], inputs()
    params = {"params": initialised(layer, x)}
    position = 61

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: layer.apply(params, x)[:, position].sum())(x)

    dx = gradient(x)
    assert (dx[:, position + 1 :] == 0).all()
    assert (jnp.abs(dx[:, : position + 1]).max(axis=-1) > 0).all()

    run = jax.jit(lambda x: layer.apply(params, x))
    later = x.at[:, position + 1 :].multiply(-3.0)
    np.testing.assert_array_equal(run(x)[:, : position + 1], run(later)[:, : position + 1])


@pytest.mark.parametrize("name", LAYERS)
def test_packed_documents_equal_the_documents_alone(name):
    layer = LAYERS[name]
    x = inputs(112)
    params = initialised(layer, x)
    starts = jnp.broadcast_to(jnp.where(jnp.arange(112) < 48, 0, 48), (2, 112))
    packed = apply(layer, params, x, document_starts=starts)
    for row in (slice(0, 41), slice(48, 112)):  # the first document ends early, in padding
        alone = apply(layer, params, x[:, row])
        np.testing.assert_allclose(packed[:, row], alone, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "unrotated"),
    [({"compressed_rope": "none"}, True), ({}, False), ({"compressed_rope": "before"}, False)],
)
def test_where_the_compressed_branch_is_rotated(change, unrotated):
    """Without rotation, shuffled blocks are a shuffled set of keys: the output stays."""
    nsa = dataclasses.replace(NSA, key_compression="mean", value_compression="mean", **change)
    nsa = dataclasses.replace(nsa, compress_block_size=8, compress_stride=8)
    layer = NativeSparseAttention(**SIZES, nsa=nsa, implementation="xla")
    x = inputs(64)
    params = initialised(layer, x)
    # Shut all gates but the compressed branch's.
    params["gate"]["out"]["kernel"] *= 0.0
    params["gate"]["out"]["bias"] = jnp.broadcast_to(jnp.array([50.0, -500.0, -500.0]), (4, 3))
    blocks = x.reshape(2, 8, 8, 32)
    swapped = blocks[:, jnp.array([4, 1, 2, 3, 0, 5, 6, 7])].reshape(x.shape)
    out, out_swapped = (apply(layer, params, a)[:, -1] for a in (x, swapped))
    assert bool(jnp.allclose(out, out_swapped, atol=1e-5)) == unrotated


def test_shared_keys_and_values_are_fewer_projections():
    x = inputs()
    own = initialised(LAYERS["xla"], x)
    shared = LAYERS["xla"].clone(nsa=dataclasses.replace(NSA, share_kv=True))
    params = initialised(shared, x)
    assert {"key", "value"} <= set(params)
    assert {"key_compressed", "key_selected", "key_window", "value_window"} <= set(own)
    assert not set(params) & {"key_compressed", "key_selected", "key_window"}
    assert apply(shared, params, x).shape == x.shape


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_phi_learns_through_the_compressed_output_alone(branch):
    layer, x = LAYERS["xla"], inputs()
    params = initialised(layer, x)
    params["gate"]["out"]["kernel"] *= 0.0
    bias = jnp.full((4, 3), -500.0).at[:, branch].set(0.0)
    params["gate"]["out"]["bias"] = bias
    gradients = jax.jit(jax.grad(lambda p: apply(layer, p, x).sum()))(params)
    for name in ("compress_keys", "compress_values", "key_compressed", "value_compressed"):
        moved = any(bool((g != 0).any()) for g in jax.tree.leaves(gradients[name]))
        assert moved == (branch == 0), name


def test_dense_attention_by_hand():
    layer, x = DenseAttention(num_heads=1, num_kv_heads=1, head_dim=2), jnp.ones((1, 5, 4))
    x = x * jnp.arange(5.0)[:, None]
    params = layer.init(jax.random.key(0), x)["params"]
    params["query"]["kernel"] = jnp.zeros((4, 1, 2))  # equal scores: the mean of the past
    params["value"]["kernel"] = jnp.full((4, 1, 2), 0.25)
    params["output"]["kernel"] = jnp.full((1, 2, 4), 0.5)
    out = layer.apply({"params": params}, x)
    np.testing.assert_allclose(out[0, :, 0], [0, 0.5, 1, 1.5, 2], atol=1e-6)
    starts = jnp.array([[0, 0, 0, 3, 3]])
    out = layer.apply({"params": params}, x, document_starts=starts)
    np.testing.assert_allclose(out[0, :, 0], [0, 0.5, 1, 3, 3.5], atol=1e-6)


def test_bfloat16_compute_keeps_float32_parameters():
    layer = LAYERS["xla"].clone(dtype=jnp.bfloat16)
    x = inputs()
    params = initialised(layer, x)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    out = apply(layer, params, x)
    assert out.dtype == jnp.bfloat16
    exact = apply(LAYERS["xla"], params, x)
    # Output of order 1 through three bf16 projections; some near-ties choose another block.
    assert jnp.median(jnp.abs(out.astype(jnp.float32) - exact)) < 2e-2


def test_what_does_not_fit_is_refused():
    x = inputs()
    with pytest.raises(ValueError, match="num_kv_heads=3 must divide num_heads=4"):
        NativeSparseAttention(4, 3, 8).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="head_dim=7 must be even"):
        DenseAttention(4, 2, 7).init(jax.random.key(0), x)
    with pytest.raises(UnsupportedError, match="mosaic_gpu"):
        LAYERS["xla"].clone(implementation="mosaic_gpu").init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="implementation='cuda' must be one of"):
        LAYERS["xla"].clone(implementation="cuda").init(jax.random.key(0), x)
