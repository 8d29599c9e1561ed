"""sparse_step and dense_step in Triton's interpreter, against the XLA code and the oracle.

`interpreter_test.py` runs this file; alone: TRITON_INTERPRET=1 python -m pytest <this file>.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.config import NSAConfig
from nsa_jax.ops import branches, reference, xla
from nsa_jax.typing import KeyValue
from pallas_kernels.triton import launch, step, tuning
from tests.arg_specs import SMALL, TINY, ArgSpec, random_inputs
from tests.ops.decode_test import step_arguments
from tests.triton import interpreter

# Steps of 16 keys: short sequences have several steps a part and several parts.
interpreter.install(
    step=tuning.Tuning(16, 16, 4, 1),
    step_selected=tuning.Tuning(32, 16, 4, 1),
)

# Of outputs below 3: float32 sums of up to 300 products in another order; in float16 inputs,
# probabilities and results are rounded to 11 bits.
TOLERANCE = {jnp.float32: 5e-6, jnp.float16: 4e-3}


@pytest.fixture(autouse=True)
def few_parts_and_blocks_at_once(monkeypatch):
    """So that parts have several steps, rows several parts, and choosing takes several rounds."""
    monkeypatch.setattr(tuning, "ENOUGH_PARTS", 6)
    monkeypatch.setattr(tuning, "ENOUGH_CHOICES", 4)
    monkeypatch.setattr(tuning, "CHOSEN_AT_ONCE", 32)
    monkeypatch.setattr(tuning, "JOINED_AT_ONCE", 64)


def sparse(spec, scale=0.5):
    """The steps of both implementations as functions of arrays."""
    keywords = {"scale": scale, **branches.selection_sizes(spec.nsa)}
    return (jax.jit(functools.partial(x.sparse_step, **keywords)) for x in (step, xla))


@functools.partial(jax.jit, static_argnums=(0, 2))
def inputs(spec, positions, dtype=jnp.float32):
    """Whole sequences, and the arguments of a sparse step in them."""
    arrays = random_inputs(spec, dtype=dtype)
    return arrays, step_arguments(spec, arrays, positions)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def results(spec, positions, dtype, scale):
    """(out, blocks) and (out,) of sparse and dense steps, ours and the others'; one compilation."""
    arrays, arguments = inputs(spec, positions, dtype)
    rest = (arguments[0], *arrays["selected"], positions)
    dense = ((x.dense_step(*rest, scale=scale),) for x in (step, xla))
    return [run(*arguments) for run in sparse(spec, scale)], list(dense)


def assert_agrees(spec, positions, *, dtype=jnp.float32, scale=0.5):
    """Compares outputs and blocks of a sparse step, and outputs of a dense one."""
    both = results(spec, jnp.asarray(positions, jnp.int32), dtype, scale)
    for (out, *blocks), (expected, *expected_blocks) in both:
        assert out.dtype == dtype
        np.testing.assert_allclose(
            out.astype(jnp.float32), expected.astype(jnp.float32), atol=TOLERANCE[dtype], rtol=0
        )
        for x, y in zip(blocks, expected_blocks, strict=True):
            assert x.dtype == jnp.int32
            np.testing.assert_array_equal(x, y)
    return both[0][0][1]


# Groups of 2, 3, 4 and 16 heads, values wider and narrower than keys, every geometry. The others
# have what these have; one head a group is `test_negative_scale`.
OTHERS = {"even", "equal_blocks", "one_head_a_group"}


@pytest.mark.parametrize("name", sorted(SMALL.keys() - OTHERS))
def test_geometries(name):
    spec = SMALL[name]
    last = spec.length - 1
    assert_agrees(spec, (last, spec.length // 2)[: spec.batch])


def test_every_kind_of_position():
    """Of no complete block, the first one, fewer blocks than are wanted, a window that fills."""
    positions = (0, 6, 7, 10, 15, 16, 23, 24, 70, 80)
    spec = ArgSpec(len(positions), 90, 2, 1, 16, 16, TINY)
    blocks = assert_agrees(spec, positions)
    assert blocks[0, 0].tolist() == [0, -1, -1, -1, -1]
    assert blocks[-1, 0].tolist() == [0, *blocks[-1, 0, 1:3].tolist(), 4, 5]


def test_more_heads_than_a_program_takes():
    assert_agrees(ArgSpec(1, 70, 40, 1, 16, 16, TINY), [69])


# Three entries a block, of which a step takes five blocks; sixteen, a step of one block; five, and
# tokens of a block that are no multiple of a step.
@pytest.mark.parametrize(
    "geometry",
    [(8, 4, 12, 4, 1, 1), (6, 1, 16, 3, 1, 2), (8, 8, 40, 3, 2, 0)],
    ids=lambda geometry: "_".join(map(str, geometry)),
)
def test_entries_of_a_block_and_blocks_of_a_step(geometry):
    nsa = NSAConfig(*geometry, window_size=20)
    assert_agrees(ArgSpec(2, 155, 2, 1, 16, 16, nsa), [154, 93])


def test_float16():
    assert_agrees(SMALL["three_heads_a_group"], [138, 77], dtype=jnp.float16)


def test_negative_scale():
    assert_agrees(SMALL["one_head_a_group"], [150], scale=-0.5)


# Eight blocks a step without tails, and five with them, each of a sum of 6: of 25 entries, parts of
# it that are divided one by one add up to more than the whole.
@pytest.mark.parametrize(
    ("geometry", "length", "positions", "expected"),
    [
        ((4, 4, 8, 4, 0, 1), 64, [63, 40], [[0, 1, 2, 7], [0, 1, 2, 5]]),
        ((8, 4, 12, 4, 0, 1), 108, [103, 107], [[1, 2, 3, 8], [1, 2, 3, 8]]),
    ],
)
def test_exact_ties_go_to_the_lower_block(geometry, length, positions, expected):
    nsa = NSAConfig(*geometry, window_size=9)
    blocks = assert_agrees(ArgSpec(2, length, 2, 1, 16, 16, nsa), positions, scale=0.0)
    assert blocks[:, 0].tolist() == expected


def test_by_hand():
    """One head, one feature that tells keys apart: two thirds of its weight on one of two."""
    nsa = NSAConfig(
        2, 2, 2, num_selected_blocks=2, num_initial_blocks=0, num_local_blocks=1, window_size=1
    )
    log2 = float(np.log(2.0))
    q = jnp.ones((1, 1, 1))

    def key_value(keys, values):
        return KeyValue(*(jnp.array(x, jnp.float32).reshape(1, -1, 1, 1) for x in (keys, values)))

    out, blocks = step.sparse_step(
        q,
        q,
        key_value([0, log2, 9], [3, 6, 99]),  # blocks 0 and 1 are complete at position 4
        key_value([9, 9, 0, log2, 0, 9], [99, 99, 4, 8, 12, 99]),
        key_value([1], [7]),
        jnp.array([[[100.0, 10.0, 1.0]]]),
        jnp.array([4]),
        scale=1.0,
        **branches.selection_sizes(nsa),
    )
    assert blocks.tolist() == [[[1, 2]]]
    # (3 + 2 * 6) / 3, (4 + 2 * 8 + 12) / 4, and the window's one value.
    np.testing.assert_allclose(out, [[[500.0 + 80.0 + 7.0]]], rtol=1e-6)


def test_agrees_with_the_oracle():
    spec = dataclasses.replace(SMALL["paper_blocks"], batch=2)
    arrays, positions = random_inputs(spec), jnp.array([332, 117])
    sizes, row = branches.selection_sizes(spec.nsa), jnp.arange(2)
    expected, blocks = jax.jit(
        lambda arrays: reference.native_sparse_attention(
            **arrays, **sizes, window_size=spec.nsa.window_size
        )
    )(arrays)
    ours, _ = sparse(spec, spec.head_dim**-0.5)
    out, chosen = ours(*step_arguments(spec, arrays, positions))
    np.testing.assert_allclose(out, expected[row, positions], atol=TOLERANCE[jnp.float32])
    np.testing.assert_array_equal(chosen, blocks[row, positions])


def test_reads_nothing_behind_a_position():
    """NaN there changes no bit, nor does what another row holds."""
    spec, positions = SMALL["ragged"], jnp.array([70, 41])
    arguments = inputs(spec, positions)[1]
    ours, _ = sparse(spec)
    expected = ours(*arguments)

    def poison(x, end):
        hidden = jnp.arange(x.shape[1]) >= jnp.asarray(end)[:, None]
        return jnp.where(hidden[:, :, None, None], jnp.nan, x)

    q, q_compressed, compressed, selected, *rest = arguments
    complete = (positions - spec.nsa.compress_block_size + 1) // spec.nsa.compress_stride + 1
    compressed = KeyValue(*(poison(x, complete) for x in compressed))
    selected = KeyValue(*(poison(x, positions + 1) for x in selected))
    actual = ours(q, q_compressed, compressed, selected, *rest)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    dense = [step.dense_step(q, *x, positions, scale=0.5) for x in (arguments[3], selected)]
    np.testing.assert_array_equal(*dense)


def test_a_query_that_is_nan_harms_no_other_row():
    spec, positions = SMALL["even"], jnp.array([127, 90])
    arguments = inputs(spec, positions)[1]
    ours, _ = sparse(spec)
    expected, _ = ours(*arguments)
    poisoned = [x.at[0].set(jnp.nan) for x in arguments[:2]]
    out, _ = ours(*poisoned, *arguments[2:])
    assert np.isnan(out[0]).all()
    np.testing.assert_array_equal(out[1], expected[1])


def test_transforms_change_nothing():
    """Eagerly, under jit, in a scan over the batch and mapped over it; and the same bits twice."""
    nsa = dataclasses.replace(TINY, num_selected_blocks=3)
    spec, positions = ArgSpec(2, 60, 2, 1, 16, 16, nsa), jnp.array([59, 30])
    arguments = inputs(spec, positions)[1]
    run, _ = sparse(spec)
    expected, again = run(*arguments), jax.jit(run)(*arguments)
    jax.tree.map(np.testing.assert_array_equal, again, expected)
    rows = jax.tree.map(lambda x: x[:, None], arguments)
    _, scanned = jax.lax.scan(lambda _, row: (None, run(*row)), None, rows)
    for many in (jax.vmap(run)(*rows), scanned):
        np.testing.assert_allclose(many[0][:, 0], expected[0], atol=TOLERANCE[jnp.float32])
        np.testing.assert_array_equal(many[1][:, 0], expected[1])


def test_what_cannot_run_is_a_sentence(monkeypatch):
    spec = SMALL["even"]
    arguments = inputs(spec, jnp.array([5, 6]))[1]
    sizes = branches.selection_sizes(spec.nsa)

    def reason(arguments, **changed):
        return launch.refusal("sparse_step", *arguments, scale=0.5, **(sizes | changed))

    assert reason(arguments) is None
    assert "1 to 128 blocks, not 129" in reason(arguments, num_selected_blocks=129)
    # 16 entries of 4 tokens are a step here.
    assert reason(arguments, select_block_size=64) is None
    assert "up to 16 strides, and 68 tokens" in reason(arguments, select_block_size=68)
    half = KeyValue(*(x.astype(jnp.float16) for x in arguments[4]))
    assert "one dtype of" in reason((*arguments[:4], half, *arguments[5:]))
    wide = (jnp.zeros((2, 4, 257)), *arguments[1:])
    assert "up to 256 features a head, and q has 257" in reason(wide)
    q, k, v = jnp.zeros((1, 2, 8)), jnp.zeros((1, 5, 1, 8)), jnp.zeros((1, 5, 1, 300))
    assert "v has 300" in launch.refusal("dense_step", q, k, v, jnp.zeros(1, jnp.int32), scale=1.0)
