"""Decoding layers and models: every position as in training, however the tokens are cut."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import DenseAttention, NativeSparseAttention, NSAConfig
from nsa_jax.model import Transformer
from nsa_jax.ops import dispatch, xla
from tests.tiny_model import CONFIG

NSA = NSAConfig(8, 4, 16, 4, window_size=24)
SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 12}
LENGTHS, LONGEST = np.array([90, 61, 7]), 90


def sparse(implementation="xla", **options):
    nsa = dataclasses.replace(NSA, **options)
    return NativeSparseAttention(**SIZES, nsa=nsa, implementation=implementation)


LAYERS = {
    "rotated_after": sparse(),
    "rotated_before_shared": sparse(
        compressed_rope="before", share_kv=True, gate_activation="softmax"
    ),
    "unrotated_no_overlap": sparse(
        compressed_rope="none",
        compress_stride=8,
        window_size=5,
        key_compression="mean",
        branches=("compressed", "selected"),
    ),
    "reference": sparse("reference"),
    "dense": DenseAttention(**SIZES, output_gate=True),
}


@functools.partial(jax.jit, static_argnames="layer")
def whole(layer, params, x):
    return layer.apply({"params": params}, x, mutable="intermediates")


@functools.partial(jax.jit, static_argnames="layer", donate_argnames="cache")
def extend(layer, params, x, cache, counts):
    apply = functools.partial(layer.apply, {"params": params}, mutable="intermediates")
    return apply(x, cache=cache, counts=counts)


def parameters(module, x):
    """Random ones, without compiling what would initialise them; none is zero."""
    random = np.random.default_rng(0)

    def draw(shape):
        x = 0.2 * random.standard_normal(shape.shape, np.float32)
        return x + (len(shape.shape) == 1)  # scales and biases

    return jax.tree.map(draw, jax.eval_shape(module.init, jax.random.key(0), x)["params"])


def in_chunks(layer, params, x, chunks):
    """Feeds the rows of x in chunks of so many tokens: pairs of a shape and of counts [B].

    Returns the outputs and the selected blocks at the positions of x; NaN and -9 past a row's end.
    """
    batch, capacity = x.shape[:2]
    cache = layer.init_cache(batch, capacity)
    outputs = np.full(x.shape, np.nan, np.float32)
    blocks = np.full((batch, capacity, 2, NSA.num_selected_blocks), -9)
    at = np.zeros(batch, int)
    for size, counts in chunks:
        counts = np.minimum(np.minimum(counts, size), LENGTHS - at)
        places = [(row, slice(at[row], at[row] + counts[row])) for row in range(batch)]
        chunk = np.full((batch, size, x.shape[2]), 3.0, np.float32)  # what does not count
        for row, place in places:
            chunk[row, : counts[row]] = x[row, place]
        (out, cache), state = extend(layer, params, chunk, cache, jnp.asarray(counts, jnp.int32))
        assert bool(jnp.isfinite(out).all())
        chosen = state.get("intermediates", {}).get("block_indices")
        for row, place in places:
            outputs[row, place] = out[row, : counts[row]]
            if chosen:
                blocks[row, place] = chosen[0][row, : counts[row]]
        at += counts
    np.testing.assert_array_equal(at, LENGTHS)
    np.testing.assert_array_equal(cache.length, LENGTHS)
    return outputs, blocks


def splits():
    """Ways to cut the rows: chunks at random, with single steps in between, steps alone."""
    random, rest = np.random.default_rng(0), [(19, LENGTHS)] * 5
    yield [(19, random.integers(0, 20, 3)) for _ in range(10)] + rest
    yield [(19, np.array([19, 3, 0])), *((1, random.integers(0, 2, 3)) for _ in range(40)), *rest]
    yield [(1, np.array([1, 1, 1]))] * LONGEST


@pytest.mark.parametrize("name", LAYERS)
def test_every_position_is_that_of_training(name):
    layer = LAYERS[name]
    x = np.asarray(jax.random.normal(jax.random.key(0), (3, LONGEST, 32)))
    params = parameters(layer, x)
    expected, state = whole(layer, params, x)
    at_once = [[(LONGEST, LENGTHS)]] if name in ("rotated_after", "dense") else []
    for chunks in [*at_once, *splits()]:
        out, blocks = in_chunks(layer, params, x, chunks)
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(out[row, :length], expected[row, :length], atol=1e-5)
            if name != "dense":
                chosen = state["intermediates"]["block_indices"][0]
                np.testing.assert_array_equal(blocks[row, :length], chosen[row, :length])


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_a_model_scans_over_steps(attention):
    """A chunk, then lax.scan over single tokens with the cache as its carry."""
    model = Transformer(dataclasses.replace(CONFIG, attention=attention))
    tokens = jax.random.randint(jax.random.key(0), (2, 30), 0, 50)
    params = {"params": parameters(model, tokens)}

    @jax.jit
    def decode(params, tokens):
        logits, cache = model.apply(params, tokens[:, :11], cache=model.init_cache(2, 30))

        def step(cache, token):
            logits, cache = model.apply(params, token[:, None], cache=cache)
            return cache, logits[:, 0]

        _, steps = jax.lax.scan(step, cache, tokens[:, 11:].T)
        return jnp.concatenate([logits, jnp.moveaxis(steps, 0, 1)], axis=1)

    expected = jax.jit(model.apply)(params, tokens)
    np.testing.assert_allclose(decode(params, tokens), expected, atol=1e-5)


def test_a_cache_of_the_computations_dtype():
    model = Transformer(dataclasses.replace(CONFIG, dtype="bfloat16"))
    cache = jax.eval_shape(lambda: model.init_cache(3, 20))
    assert len(cache) == 2
    assert {x.dtype.name for x in jax.tree.leaves(cache)} == {"bfloat16", "int32"}
    assert cache[0].selected.k.shape == (3, 20, 1, 8)


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_tokens_that_find_no_place_are_nan_and_harm_no_other(attention):
    model = Transformer(dataclasses.replace(CONFIG, attention=attention))
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 50)
    params = {"params": parameters(model, tokens)}
    apply = jax.jit(model.apply)
    cache = model.init_cache(2, 9)
    counts = [jnp.array([6, 5]), jnp.array([6, 1])]
    _, cache = apply(params, tokens[:, :6], cache=cache, counts=counts[0])
    np.testing.assert_array_equal(cache[1].length, [6, 5])
    logits, cache = apply(params, tokens[:, 6:], cache=cache, counts=counts[1])
    lost = np.isnan(logits).any(axis=-1)
    np.testing.assert_array_equal(lost, [[0, 0, 0, 1, 1, 1], [0] * 6])
    whole = apply(params, tokens)
    np.testing.assert_allclose(logits[0, :3], whole[0, 6:9], atol=1e-5)
    np.testing.assert_array_equal(cache[1].length, [9, 6])
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(cache))


def test_kernels_are_shown_no_query_behind_the_last_key(monkeypatch):
    """What does not count may lie beyond the cache, where a kernel would read other memory."""
    layer, x = sparse(), jnp.ones((2, 6, 32))
    params = parameters(layer, x)
    cache = layer.init_cache(2, 9)._replace(length=jnp.array([6, 5]))

    @jax.jit
    def largest(params, x, cache):
        found = []

        def run(operation, implementation, *arguments, **keywords):
            last = {"interval_attention": 4, "select_blocks": 3, "selected_attention": 4}[operation]
            found.append((arguments[1].shape[1], arguments[last].max()))
            return getattr(xla, operation)(*arguments, **keywords)

        monkeypatch.setattr(dispatch, "run", run)
        layer.apply({"params": params}, x, cache=cache, counts=jnp.array([3, 1]))
        return found

    (entries, hi), (_, position), (_, selected), (window, hi_window) = largest(params, x, cache)
    assert hi <= entries == 1
    assert position == selected == 8
    assert hi_window <= window


@pytest.mark.parametrize("name", ["rotated_after", "dense"])
def test_what_does_not_fit_is_refused(name):
    layer = LAYERS[name]
    x, cache = jnp.zeros((2, 9, 32)), layer.init_cache(2, 8)

    def attempt(x, **keywords):
        jax.eval_shape(lambda: layer.init(jax.random.key(0), x, **keywords))

    with pytest.raises(ValueError, match="a chunk of 9 tokens does not fit into a cache of 8"):
        attempt(x, cache=cache)
    with pytest.raises(ValueError, match="the cache is of 2 rows, the chunk of 1"):
        attempt(x[:1, :4], cache=cache)
    with pytest.raises(ValueError, match=r"counts float32\(2,\) must be integers of shape \[B\]"):
        attempt(x[:, :4], cache=cache, counts=jnp.ones(2))
    with pytest.raises(ValueError, match="packed documents are not decoded"):
        attempt(x[:, :4], cache=cache, document_starts=jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="there is no cache"):
        attempt(x[:, :4], counts=jnp.ones(2, jnp.int32))


def test_a_scanned_model_names_what_decodes_it():
    model = Transformer(dataclasses.replace(CONFIG, scan_layers=True))
    tokens = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"scan_layers=True: .* nsa_jax\.decoding\.unrolled"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, cache=model.init_cache(1, 8)))
