"""Decoding steps through the kernels of a GPU."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from experiments import decode_cases
from nsa_jax import DenseAttention, NativeSparseAttention, NSAConfig
from nsa_jax.ops import dispatch, reference, selection
from nsa_jax.ops.branches import selection_sizes
from tests.arg_specs import SMALL, ArgSpec, random_inputs
from tests.gpu.agreement import TOLERANCE, assert_close, in_float32
from tests.ops.decode_test import step_arguments

pytestmark = pytest.mark.gpu


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def step_and_dense(arrays, positions, spec, implementation):
    """The outputs and blocks of a sparse step, and the outputs of a dense one."""
    arguments = step_arguments(spec, arrays, positions)
    scale, sizes = spec.head_dim**-0.5, selection_sizes(spec.nsa)
    out, blocks = dispatch.run("sparse_step", implementation, *arguments, scale=scale, **sizes)
    rest = (arguments[0], *arrays["selected"], positions)
    return out, dispatch.run("dense_step", implementation, *rest, scale=scale), blocks


STEPS = SMALL | {
    "paper": ArgSpec(3, 8192, 16, 1, 128, 128, NSAConfig()),
    "one_head": ArgSpec(3, 3000, 2, 2, 64, 64, NSAConfig()),
    "sixty_four_heads": ArgSpec(2, 3000, 64, 1, 192, 128, NSAConfig()),
    "256_features": ArgSpec(2, 3000, 32, 2, 256, 256, NSAConfig(16, 16, 64)),
}


@functools.partial(jax.jit, static_argnames="spec")
def apart(q, k, positions, spec):
    """Where the last block that a step selects is clearly better than the next one: [B, K]."""
    sizes, starts = selection_sizes(spec.nsa), jnp.zeros_like(positions)
    num_blocks, n = -(-spec.length // spec.nsa.select_block_size), sizes.pop("num_selected_blocks")
    forcing = {x: sizes.pop(x) for x in ("num_initial_blocks", "num_local_blocks")}
    score = reference.importance(
        *in_float32((q[:, None], k)), num_select=num_blocks, q_positions=positions[:, None], **sizes
    )
    candidate, forced = selection.candidates_and_forced(
        num_blocks, positions, starts, select_block_size=sizes["select_block_size"], **forcing
    )
    score = jnp.where(forced[:, None], jnp.inf, score[:, 0])
    ranked = -jnp.sort(jnp.where(candidate[:, None], -score, jnp.inf), axis=-1)
    ranked = jnp.pad(ranked, [(0, 0), (0, 0), (0, n)], constant_values=-jnp.inf)
    # 1e-5 is a hundred roundings of float32; of blocks that are equal the lower one comes first.
    last, following = ranked[..., n - 1], ranked[..., n]
    return (last == following) | (following < (1 - 1e-5) * last)


def assert_steps_agree(actual, expected, apart, tolerance):
    """Compares what `step_and_dense` returns: blocks where they must be equal, and outputs.

    Where two blocks are as good as equal either may win, and the outputs of that group differ.
    """
    (*actual, blocks), (*expected, expected_blocks) = actual, expected
    same = (blocks == expected_blocks).all(axis=-1)
    assert bool((same | ~apart).all()), f"{blocks} {expected_blocks}"
    heads = jnp.repeat(same, actual[0].shape[1] // same.shape[1], axis=1)[..., None]
    actual[0] = jnp.where(heads, actual[0], expected[0])
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("name", STEPS)
def test_steps_agree_with_xla(name):
    """At the end, in the middle and at the first tokens, in every dtype; the same bits twice."""
    spec, clear = STEPS[name], []
    for dtype in TOLERANCE:
        arrays = jax.jit(functools.partial(random_inputs, spec, dtype=dtype))()
        for first in (spec.length - 1, spec.length // 2, 5):
            positions = jnp.maximum(first - 7 * jnp.arange(spec.batch), 0)
            actual = step_and_dense(arrays, positions, spec, "triton")
            expected = step_and_dense(in_float32(arrays), positions, spec, "xla")
            assert all(x.dtype == dtype for x in actual[:2])
            q = arrays["q"][jnp.arange(spec.batch), positions]
            clear.append(apart(q, arrays["compressed"][0], positions, spec))
            assert_steps_agree(actual, expected, clear[-1], TOLERANCE[dtype])
            chex.assert_trees_all_equal(step_and_dense(arrays, positions, spec, "triton"), actual)
    assert jnp.stack(clear).mean() > 0.8


def test_steps_where_offsets_pass_2_to_the_31():
    """The last of 36 rows, in keys and values of 2.4e9 numbers each, 10 GB in all."""
    spec = ArgSpec(36, 131072, 16, 4, 128, 128, NSAConfig())
    make = decode_cases.inputs(spec)
    arrays, scale, sizes = jax.jit(make)(), spec.head_dim**-0.5, selection_sizes(spec.nsa)

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(arrays, implementation):
        q, positions = arrays["q"], arrays["positions"]
        caches = (arrays[name] for name in decode_cases.CACHES)
        step = (q, q, *caches, arrays["gates"], positions)
        out, blocks = dispatch.run("sparse_step", implementation, *step, scale=scale, **sizes)
        rest = (q, *arrays["selected"], positions)
        return out, dispatch.run("dense_step", implementation, *rest, scale=scale), blocks

    def last_row(tree):
        return jax.tree.map(lambda x: x[-1:], tree)

    of_row = last_row(arrays)
    exact = in_float32(of_row) | {"positions": of_row["positions"]}
    clear = apart(of_row["q"], of_row["compressed"][0], of_row["positions"], spec)
    actual, expected = last_row(run(arrays, "triton")), run(exact, "xla")
    assert_steps_agree(actual, expected, clear, TOLERANCE[jnp.bfloat16])


def test_steps_read_nothing_of_the_future():
    spec, positions = STEPS["paper"], jnp.array([8000, 4095, 20])
    q, q_compressed, compressed, selected, *rest = step_arguments(
        spec, random_inputs(spec, dtype=jnp.bfloat16), positions
    )
    scale, sizes = spec.head_dim**-0.5, selection_sizes(spec.nsa)

    @jax.jit
    def run(compressed, selected):
        step = (q, q_compressed, compressed, selected, *rest)
        dense = dispatch.run("dense_step", "triton", q, *selected, positions, scale=scale)
        return dispatch.run("sparse_step", "triton", *step, scale=scale, **sizes), dense

    def poison(x, end):
        hidden = jnp.arange(x.shape[1]) >= end[:, None]
        return jnp.where(hidden[:, :, None, None], jnp.nan, x)

    complete = jnp.maximum((positions - 31) // 16 + 1, 0)
    poisoned = (
        jax.tree.map(lambda x: poison(x, complete), compressed),
        jax.tree.map(lambda x: poison(x, positions + 1), selected),
    )
    chex.assert_trees_all_equal(run(*poisoned), run(compressed, selected))


@pytest.mark.parametrize("layer", [NativeSparseAttention, DenseAttention])
def test_chunks_and_scanned_steps_are_the_forward_pass_of_training(layer):
    """Two chunks of a prompt, then steps in lax.scan: outputs, and where there are any, blocks.

    Of 11 blocks 6 are selected.
    """
    implementation = {} if layer is DenseAttention else {"implementation": "triton"}
    options = {} if layer is DenseAttention else {"nsa": NSAConfig(num_selected_blocks=6)}
    layer = layer(16, 1, 64, **options, **implementation)
    x = jax.random.normal(jax.random.key(0), (2, 700, 128))
    params = {"params": layer.init(jax.random.key(1), x[:, :40])["params"]}
    apply = functools.partial(layer.apply, params, mutable="intermediates")

    def chosen(state):
        return state.get("intermediates", {}).get("block_indices")

    @jax.jit
    def decode(x):
        cache, found = layer.init_cache(2, 768), []
        for chunk in (x[:, :300], x[:, 300:600]):
            (out, cache), state = apply(chunk, cache=cache)
            found.append((out, chosen(state)))

        def step(cache, token):
            (out, cache), state = apply(token[:, None], cache=cache)
            return cache, jax.tree.map(lambda x: x[:, 0], (out, chosen(state)))

        _, steps = jax.lax.scan(step, cache, jnp.moveaxis(x[:, 600:], 1, 0))
        found.append(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), steps))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *found)

    out, blocks = decode(x)
    chex.assert_trees_all_equal(decode(x), (out, blocks))
    expected, state = jax.jit(apply)(x)
    chex.assert_trees_all_equal_structs(blocks, chosen(state))
    # Two ways to sum: where two blocks are as good as equal, either may win.
    same = jax.tree.map(lambda a, b: (a == b).all(axis=(2, 3)), blocks, chosen(state))
    for x in jax.tree.leaves(same):
        assert float(x.mean()) > 0.999
        out = jnp.where(x[..., None], out, expected)
    assert_close(out, expected, TOLERANCE[jnp.float32])


def test_auto_takes_the_kernels_of_steps():
    spec = STEPS["paper"]
    arrays = jax.eval_shape(functools.partial(random_inputs, spec, dtype=jnp.bfloat16))
    positions = jax.ShapeDtypeStruct((spec.batch,), jnp.int32)
    arguments = jax.eval_shape(functools.partial(step_arguments, spec), arrays, positions)
    sizes = selection_sizes(spec.nsa)
    assert dispatch.resolve("sparse_step", "auto", *arguments, scale=0.1, **sizes)[0] == "triton"
    dense = (arguments[0], *arguments[3], positions)
    assert dispatch.resolve("dense_step", "auto", *dense, scale=0.1)[0] == "triton"
