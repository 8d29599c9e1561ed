"""One step against the oracle, and what it costs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from nsa_jax import DenseAttention, NativeSparseAttention, NSAConfig, UnsupportedError
from nsa_jax.ops import branches, decode, dense, dispatch, reference, xla
from nsa_jax.typing import KeyValue
from tests.arg_specs import SMALL, random_inputs


def step_arguments(spec, arrays, positions):
    """Arguments of sparse_step for queries at `positions` [B] of whole sequences, as a cache."""
    row, w = jnp.arange(spec.batch), spec.nsa.window_size
    slot = jnp.arange(w)
    # Entry s holds the last position up to the query that is s modulo w.
    held = positions[:, None] - (positions[:, None] - slot) % w
    ring = KeyValue(*(x[row[:, None], held] for x in arrays["window"]))
    q, gates = (arrays[name][row, positions] for name in ("q", "gates"))
    return (q, q, arrays["compressed"], arrays["selected"], ring, gates, positions)


@pytest.mark.parametrize("name", ["ragged", "sixteen_heads_a_group", "nothing_compressed"])
def test_a_step_is_the_oracle_at_its_position(name):
    spec = SMALL[name]
    arrays, sizes = random_inputs(spec), branches.selection_sizes(spec.nsa)
    expected, blocks = jax.jit(
        lambda arrays: reference.native_sparse_attention(
            **arrays, **sizes, window_size=spec.nsa.window_size
        )
    )(arrays)
    scale = spec.head_dim**-0.5
    step = jax.jit(functools.partial(dispatch.run, "sparse_step", "xla", scale=scale, **sizes))
    dense = jax.jit(functools.partial(dispatch.run, "dense_step", "xla", scale=scale))
    expected_dense, _ = reference.sliding_window_attention(
        arrays["q"], *arrays["selected"], window_size=spec.length
    )
    for first in (0, 6, spec.length // 2 + 1, spec.length - 1):
        positions = jnp.maximum(first - 5 * jnp.arange(spec.batch), 0)  # rows of unequal lengths
        arguments = step_arguments(spec, arrays, positions)
        out, chosen = step(*arguments)
        row = jnp.arange(spec.batch)
        # float32 sums of up to 200 products of order 1.
        np.testing.assert_allclose(out, expected[row, positions], atol=1e-5)
        np.testing.assert_array_equal(chosen, blocks[row, positions])
        out = dense(arguments[0], *arrays["selected"], positions)
        np.testing.assert_allclose(out, expected_dense[row, positions], atol=1e-5)


def test_a_step_reads_nothing_behind_its_position():
    spec = SMALL["ragged"]
    arrays, sizes = random_inputs(spec), branches.selection_sizes(spec.nsa)
    positions = jnp.array([70, 41])
    run = jax.jit(functools.partial(dispatch.run, "sparse_step", "xla", scale=0.25, **sizes))
    expected = run(*step_arguments(spec, arrays, positions))

    def disturb(x, first_hidden):
        hidden = jnp.arange(x.shape[1]) >= first_hidden[:, None]
        return jnp.where(hidden[:, :, None, None], 7.0, x)

    complete = (positions - spec.nsa.compress_block_size + 1) // spec.nsa.compress_stride + 1
    later = arrays | {
        "selected": KeyValue(*(disturb(x, positions + 1) for x in arrays["selected"])),
        "compressed": KeyValue(*(disturb(x, complete) for x in arrays["compressed"])),
    }
    for a, b in zip(run(*step_arguments(spec, later, positions)), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def product_flop(jaxpr):
    """FLOP of all matrix products of a program, those of its parts included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = (equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * equation.outvars[0].aval.size * math.prod(sizes)
        total += sum(map(product_flop, jaxprs_in_params(equation.params)))
    return total


@pytest.mark.parametrize(
    ("length", "loaded"), [(8192, 2048), (16384, 2560), (32768, 3584), (65536, 5632)]
)
def test_a_step_multiplies_with_as_many_tokens_as_table_4_of_the_paper_says(length, loaded):
    spec, nsa = SMALL["ragged"], NSAConfig()

    def array(*shape):
        return jax.ShapeDtypeStruct((spec.batch, *shape), jnp.float32)

    def key_value(length):
        sizes = (spec.head_dim, spec.v_head_dim)
        return KeyValue(*(array(length, spec.num_kv_heads, size) for size in sizes))

    q, gates = array(spec.num_heads, spec.head_dim), array(spec.num_heads, 3)
    positions = jax.ShapeDtypeStruct((spec.batch,), jnp.int32)
    # s/d entries as in the table, of which the last l/d - 1 = 1 is not complete.
    caches = (key_value(length // 16 - 1), key_value(length), key_value(512))
    step = functools.partial(
        dispatch.run, "sparse_step", "xla", scale=1.0, **branches.selection_sizes(nsa)
    )
    program = jax.make_jaxpr(step)(q, q, *caches, gates, positions)
    a_token = 2 * spec.batch * spec.num_heads * (spec.head_dim + spec.v_head_dim)
    assert product_flop(program.jaxpr) == (loaded - 1) * a_token


def test_the_codes_own_count_is_the_papers():
    nsa = NSAConfig()
    lengths = np.array([8192, 16384, 32768, 65536])
    blocks = np.tile(np.arange(16), (4, 1))
    counted = decode.tokens_loaded(blocks, lengths - 1, nsa)
    np.testing.assert_array_equal(counted + 1, [2048, 2560, 3584, 5632])
    assert decode.tokens_loaded(np.array([0, 1, -1]), np.array(70), nsa) == 3 + 2 * 64 + 71


def test_the_compiled_step_grows_with_the_entries_alone():
    """Per further token: 1/d of an entry's products, and no copy of the selected branch's cache."""
    nsa = NSAConfig(16, 8, 32, 4, window_size=64)
    layer = NativeSparseAttention(8, 1, 32, nsa=nsa, implementation="xla")
    x = jnp.zeros((2, 1, 16))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)

    def step(params, x, cache):
        return layer.apply(params, x, cache=cache)

    flops, temporary = [], []
    for capacity in (2048, 4096):
        cache = jax.eval_shape(lambda: layer.init_cache(2, capacity))
        compiled = jax.jit(step, donate_argnums=2).lower(params, x, cache).compile()
        flops.append(compiled.cost_analysis()["flops"])
        memory = compiled.memory_analysis()
        temporary.append(memory.temp_size_in_bytes)
        kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        assert memory.alias_size_in_bytes == kept, "the new cache lies where the old one was"
    entries = 2048 // nsa.compress_stride
    of_products = 2 * 2 * 8 * (32 + 32) * entries  # for two rows of eight heads
    # Beside two products, an entry's score takes a dozen operations a head in softmax and ranking.
    assert of_products < flops[1] - flops[0] < 1.3 * of_products
    tokens = 2 * 2048 * (32 + 32) * 4  # bytes
    assert temporary[1] - temporary[0] < tokens / 4


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="Triton runs on GPUs.")
@pytest.mark.parametrize(
    ("implementation", "reason"),
    [
        ("triton", "'triton': triton needs an NVIDIA GPU since Ampere, and JAX runs on cpu here"),
        ("mosaic_gpu", "'mosaic_gpu': there is no mosaic_gpu kernel for sparse_step"),
    ],
)
def test_who_cannot_step_says_so(implementation, reason):
    spec = SMALL["ragged"]
    layer = NativeSparseAttention(4, 2, 8, nsa=spec.nsa, implementation=implementation)
    x = jnp.zeros((1, 1, 16))
    cache = layer.init_cache(1, 32)
    with pytest.raises(UnsupportedError, match=reason):
        jax.eval_shape(lambda: layer.init(jax.random.key(0), x, cache=cache))


@pytest.mark.parametrize("layer", [NativeSparseAttention, DenseAttention])
def test_auto_steps_through_what_dispatch_finds(layer, monkeypatch):
    """Whatever cuDNN could run: a step of a dense layer is an operation as well."""
    asked = []

    def run(operation, implementation, *arguments, **keywords):
        asked.append((operation, implementation))
        return getattr(xla, operation)(*arguments, **keywords)

    monkeypatch.setattr(dispatch, "run", run)
    monkeypatch.setattr(dense, "cudnn_refusal", lambda *_, **__: None)
    layer, x = layer(4, 2, 8), jnp.zeros((1, 1, 16))
    cache = layer.init_cache(1, 32)
    jax.eval_shape(lambda: layer.init(jax.random.key(0), x, cache=cache))
    assert asked in ([("sparse_step", "auto")], [("dense_step", "auto")])
    assert set(dispatch.explain("auto")) == set(dispatch.OPERATIONS), "steps are no training"
