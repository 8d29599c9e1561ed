"""What only an NVIDIA GPU can show; run with `pytest -m gpu --require-gpu tests/gpu_test.py -n 8`.

Beside these, the whole suite runs on a GPU where there is one: JAX puts every test there.
"""

import functools
import os

# Several test processes share the GPU, so that none of them may take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import decode_cases
from nsa_jax import DenseAttention, NativeSparseAttention, NSAConfig, native_sparse_attention
from nsa_jax.ops import dispatch, reference, selection
from nsa_jax.ops.branches import compressed_attention, select_blocks, selection_sizes
from nsa_jax.training import parallel
from nsa_jax.training.setup import prepare
from tests.arg_specs import HOPPER, SMALL, ArgSpec, random_inputs
from tests.ops.decode_test import step_arguments
from tests.training import tiny_run

pytestmark = pytest.mark.gpu

DTYPES = {
    "triton": (jnp.float32, jnp.float16, jnp.bfloat16),
    "mosaic_gpu": (jnp.float16, jnp.bfloat16),
}
KERNELS = tuple(DTYPES)
SPECS = SMALL | HOPPER
CASES = [("triton", name) for name in SPECS] + [("mosaic_gpu", name) for name in HOPPER]
PAPER = ArgSpec(1, 8192, 16, 1, 128, 128, NSAConfig())

# Of the largest element of a tensor. float32 is summed in another order over a few hundred terms,
# and tf32, which would be off by 1e-3, is never used. In 16 bits the inputs are equal, but
# probabilities and each branch's result are rounded to 11 bits (float16; 2**-11 = 5e-4) or 8
# (bfloat16; 2**-8 = 4e-3). Gradients pass through two such products, the score's and its own.
TOLERANCE = {jnp.float32: 1e-5, jnp.float16: 2e-3, jnp.bfloat16: 1e-2}


def in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def assert_close(actual, expected, tolerance):
    """Compares trees leaf by leaf, each by the largest element of what is expected."""
    chex.assert_trees_all_equal_structs(actual, expected)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for x, (path, y) in zip(jax.tree.leaves(actual), paths, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        error, size = np.abs(x - y).max(initial=0), np.abs(y).max(initial=0)
        name = jax.tree_util.keystr(path)
        assert error <= tolerance * size, f"{name}: off by {error} where the largest is {size}"


def projection(shape):
    """Normal random float32, of as few bits as bfloat16 has, so that every dtype can hold them."""
    x = jax.random.normal(jax.random.key(99), shape)
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def value_and_gradients(arrays, spec, implementation, **where):
    """The output, and the gradients of a random projection of it to every array."""

    def project(arrays):
        out, _ = native_sparse_attention(
            **arrays, config=spec.nsa, implementation=implementation, **where
        )
        return (out.astype(jnp.float32) * projection(out.shape)).sum(), out

    gradients, out = jax.grad(project, has_aux=True)(arrays)
    return out, gradients


@functools.partial(jax.jit, static_argnames="spec")
def blocks_of_the_oracle(arrays, spec):
    return native_sparse_attention(**arrays, config=spec.nsa, implementation="reference")[1]


# All dtypes in one test: they share the compiled oracle.
@pytest.mark.parametrize(("kernels", "name"), CASES)
def test_kernels_agree_with_the_oracle(kernels, name):
    spec = SPECS[name]
    for dtype in DTYPES[kernels]:
        arrays = random_inputs(spec, dtype=dtype)
        exact = in_float32(arrays)
        # The same blocks for both, so that a tie broken by the last bit is no disagreement.
        blocks = blocks_of_the_oracle(exact, spec)
        out, gradients = value_and_gradients(arrays, spec, kernels, block_indices=blocks)
        expected = value_and_gradients(exact, spec, "reference", block_indices=blocks)
        assert out.dtype == dtype
        assert all(x.dtype == dtype for x in jax.tree.leaves(gradients))
        assert_close(out, expected[0], TOLERANCE[dtype])
        assert_close(gradients, expected[1], 2 * TOLERANCE[dtype])


@pytest.mark.parametrize(("kernels", "name"), CASES)
def test_kernels_select_as_the_oracle_where_scores_are_apart(kernels, name):
    spec = SPECS[name]
    # In float32, or in float16 for both.
    dtype = DTYPES[kernels][0]
    arrays, nsa = random_inputs(spec, dtype=dtype), spec.nsa
    q, (k, v) = arrays["q"], arrays["compressed"]

    def select(implementation, q, k, v):
        where = {"config": nsa, "implementation": implementation}
        return select_blocks(q, k, compressed_attention(q, k, v, **where)[1], **where)

    exact = in_float32((q, k, v))

    score = reference.importance(
        *exact[:2],
        num_select=-(-spec.length // nsa.select_block_size),
        compress_block_size=nsa.compress_block_size,
        compress_stride=nsa.compress_stride,
        select_block_size=nsa.select_block_size,
    )
    # Scores are sums of a group's probabilities: 1e-5 is a hundred float32 roundings of 1.
    gaps = jnp.diff(jnp.sort(score, axis=-1), axis=-1)
    apart = jnp.where(gaps > 0, gaps, jnp.inf).min(axis=-1, initial=jnp.inf) > 1e-5
    assert apart.mean() > 0.9
    same = (select(kernels, q, k, v) == select("reference", *exact)).all(axis=-1)
    assert bool(jnp.where(apart, same, True).all())


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        *((name, dtype) for name in ("xla", "triton") for dtype in (jnp.float32, jnp.bfloat16)),
        ("mosaic_gpu", jnp.bfloat16),
    ],
)
def test_agrees_with_the_oracle_at_the_paper_geometry(implementation, dtype):
    """The last 64 queries of 8192, for which the dense oracle is affordable."""
    arrays = random_inputs(PAPER, dtype=dtype)
    run = jax.jit(
        lambda arrays: native_sparse_attention(
            **arrays, config=PAPER.nsa, implementation=implementation
        )
    )
    with jax.default_matmul_precision("default"):  # what users have; not what the tests set
        out, blocks = run(arrays)
    last = slice(PAPER.length - 64, None)
    exact = in_float32(arrays)
    chunk = {k: v[:, last] if k in ("q", "gates") else v for k, v in exact.items()}
    expected, _ = native_sparse_attention(
        **chunk,
        config=PAPER.nsa,
        q_positions=jnp.arange(PAPER.length)[None, last],
        block_indices=blocks[:, last],
        implementation="reference",
    )
    # float32 must be float32 (tf32 would be off by 1e-3); bfloat16 rounds outputs below 1.
    atol = {jnp.float32: 2e-5, jnp.bfloat16: 1e-2}[dtype]
    np.testing.assert_allclose(out[:, last].astype(jnp.float32), expected, atol=atol)


@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
def test_two_runs_give_the_same_bits_at_the_paper_geometry(implementation):
    arrays = random_inputs(PAPER, dtype=jnp.bfloat16)
    first, second = (value_and_gradients(arrays, PAPER, implementation) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize(
    ("kernels", "spec", "end"),
    [
        ("triton", SMALL["ragged"], 101),
        ("mosaic_gpu", HOPPER["one_head"], 301),
        *((kernels, PAPER, 5000) for kernels in KERNELS),
    ],
)
def test_kernels_read_nothing_of_the_future(kernels, spec, end):
    """Queries up to `end` over a cache that holds NaN behind it: the same bits, gradients too."""
    arrays = random_inputs(spec, dtype=jnp.bfloat16)
    chunk = {k: v[:, :end] if k in ("q", "gates") else v for k, v in arrays.items()}
    complete = (end - spec.nsa.compress_block_size) // spec.nsa.compress_stride + 1
    ends = {"compressed": complete, "selected": end, "window": end}
    poisoned = chunk | {
        name: jax.tree.map(lambda x, end=end: x.at[:, end:].set(jnp.nan), chunk[name])
        for name, end in ends.items()
    }
    clean_run = value_and_gradients(chunk, spec, kernels)
    chex.assert_trees_all_equal(clean_run, value_and_gradients(poisoned, spec, kernels))


LONG = ArgSpec(1, 262144, 64, 4, 128, 128, NSAConfig())


@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_at_262144_tokens(kernels):
    """Offsets pass 2**31 here. A few queries of the last group, and their dq, meet the oracle."""
    spec = LONG
    arrays = jax.jit(functools.partial(random_inputs, spec, dtype=jnp.bfloat16))()
    end = spec.length
    sampled = jnp.array([0, 31, 32, end // 3, end // 2 - 1, end // 2, end - 65, end - 1])
    group = spec.num_heads // spec.num_kv_heads

    @jax.jit
    def run(arrays):
        attention = functools.partial(
            native_sparse_attention, config=spec.nsa, implementation=kernels
        )
        out, pull, blocks = jax.vjp(lambda arrays: attention(**arrays), arrays, has_aux=True)
        (gradients,) = pull(arrays["q"])  # any array of the output's shape will do
        finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(gradients)]
        rows = (out[:, sampled, -group:], gradients["q"][:, sampled, -group:])
        return rows, blocks[:, sampled, -1:], jnp.stack(finite).all()

    @jax.jit
    def oracle(arrays, blocks):
        # One group and few queries: the dense oracle repeats the keys for every query head.
        rows = {k: arrays[k][:, sampled, -group:] for k in ("q", "gates")}
        rest = {k: v for k, v in arrays.items() if k not in rows}
        rest = jax.tree.map(lambda x: x[:, :, -1:], rest)
        rows, rest = in_float32((rows, rest))

        def attention(q):
            return native_sparse_attention(
                q,
                **rest,
                gates=rows["gates"],
                config=spec.nsa,
                q_positions=sampled[None],
                block_indices=blocks,
                implementation="reference",
            )[0]

        out, pull = jax.vjp(attention, rows["q"])
        return out, *pull(rows["q"])

    actual, blocks, finite = run(arrays)
    assert bool(finite)
    expected = oracle(arrays, blocks)
    assert_close(actual[0], expected[0], TOLERANCE[jnp.bfloat16])
    assert_close(actual[1], expected[1], 2 * TOLERANCE[jnp.bfloat16])


@pytest.mark.parametrize(
    ("kernels", "spec", "dtype"),
    [
        ("triton", SMALL["even"], jnp.float32),
        ("mosaic_gpu", HOPPER["four_heads_a_group"], jnp.float16),
    ],
)
def test_transforms_change_nothing(kernels, spec, dtype):
    """vmap, scan and remat of the kernels."""
    arrays = random_inputs(spec, dtype=dtype)
    expected, gradients = value_and_gradients(arrays, spec, kernels)

    def run(arrays):
        return native_sparse_attention(**arrays, config=spec.nsa, implementation=kernels)[0]

    one_by_one = jax.tree.map(lambda x: x[:, None], arrays)
    mapped = jax.jit(jax.vmap(run))(one_by_one)
    _, scanned = jax.lax.scan(lambda _, arrays: (None, run(arrays)), None, one_by_one)
    for out in (mapped, scanned):
        assert_close(out[:, 0], expected, TOLERANCE[dtype])

    weights = projection(expected.shape)
    remat = jax.jit(jax.grad(lambda arrays: (jax.checkpoint(run)(arrays) * weights).sum()))
    assert_close(remat(arrays), gradients, 2 * TOLERANCE[dtype])

    per_example = jax.jit(jax.vmap(jax.grad(lambda arrays, w: (run(arrays) * w).sum())))
    actual = jax.tree.map(lambda x: x[:, 0], per_example(one_by_one, weights[:, None]))
    assert_close(actual, gradients, 2 * TOLERANCE[dtype])


def test_auto_takes_the_kernels_of_this_device():
    hopper = float(jax.devices()[0].compute_capability) == 9
    attention = "mosaic_gpu" if hopper else "triton"
    assert {
        operation: entry["chosen"] for operation, entry in dispatch.explain("auto").items()
    } == {
        "interval_attention": attention,
        "select_blocks": "triton",
        "selected_attention": attention,
    }


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
    for dtype in DTYPES["triton"]:
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


def train(implementation, dtype="bfloat16"):
    """Makes 20 updates on one batch; returns the nats a token of each, and the state after it."""
    config = tiny_run.settings(
        steps=20, implementation=implementation, model__dtype=dtype, model__head_dim=16
    )
    setup = prepare(config)
    tokens = np.random.default_rng(0).integers(0, 257, (4, 33), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((4, 32), np.float32),
        "document_starts": np.zeros((4, 32), np.int32),
    }
    batch = parallel.global_batch(batch, setup.mesh)
    state, losses = setup.make_state(), []
    for _ in range(config.steps):
        state, metrics = setup.train_step(state, batch)
        losses.append(float(metrics.sums.nats / metrics.sums.weight))
    return losses, state


def test_twenty_updates_agree_with_xla():
    (actual, _), (expected, _) = train("triton"), train("xla")
    assert expected[-1] < 0.8 * expected[0], "nothing was learned"
    # bfloat16 activations have 8 bits, and a selected block may change with the last of them.
    np.testing.assert_allclose(actual, expected, rtol=2e-2)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_twenty_updates_give_the_same_bits_twice(implementation):
    chex.assert_trees_all_equal(train(implementation), train(implementation))


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
