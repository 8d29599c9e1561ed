"""native_sparse_attention and its operations through the kernels of a GPU."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import KeyValue, NSAConfig, native_sparse_attention
from nsa_jax.ops import dispatch, reference
from nsa_jax.ops.branches import compressed_attention, select_blocks
from tests.arg_specs import HOPPER, HOPPER_HEADS, SMALL, ArgSpec, random_inputs
from tests.gpu.agreement import TOLERANCE, assert_close, in_float32

pytestmark = pytest.mark.gpu

DTYPES = {
    "triton": (jnp.float32, jnp.float16, jnp.bfloat16),
    "mosaic_gpu": (jnp.float16, jnp.bfloat16),
}
KERNELS = tuple(DTYPES)
SPECS = SMALL | HOPPER
CASES = [("triton", name) for name in SPECS] + [("mosaic_gpu", name) for name in HOPPER]
PAPER = ArgSpec(1, 8192, 16, 1, 128, 128, NSAConfig())


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


def assert_agrees(arrays, spec, kernels):
    exact, dtype = in_float32(arrays), arrays["q"].dtype.type
    # The same blocks for both, so that a tie broken by the last bit is no disagreement.
    blocks = blocks_of_the_oracle(exact, spec)
    out, gradients = value_and_gradients(arrays, spec, kernels, block_indices=blocks)
    expected = value_and_gradients(exact, spec, "reference", block_indices=blocks)
    assert out.dtype == dtype
    assert all(x.dtype == dtype for x in jax.tree.leaves(gradients))
    assert_close(out, expected[0], TOLERANCE[dtype])
    assert_close(gradients, expected[1], 2 * TOLERANCE[dtype])


# All dtypes in one test: they share the compiled oracle.
@pytest.mark.parametrize(("kernels", "name"), CASES)
def test_kernels_agree_with_the_oracle(kernels, name):
    for dtype in DTYPES[kernels]:
        assert_agrees(random_inputs(SPECS[name], dtype=dtype), SPECS[name], kernels)


@pytest.mark.parametrize("name", HOPPER_HEADS)
def test_every_pair_of_head_sizes_agrees_with_the_oracle(name):
    spec = HOPPER_HEADS[name]
    assert_agrees(random_inputs(spec, dtype=jnp.bfloat16), spec, "mosaic_gpu")


@pytest.mark.parametrize("kernels", KERNELS)
def test_scores_that_grow_along_the_keys(kernels):
    """Largest scores so far rise all the time, by a little and by a lot."""
    spec = SPECS["paper_heads"]
    arrays = random_inputs(spec, dtype=jnp.float16)
    for branch in ("compressed", "selected", "window"):
        k, v = arrays[branch]
        growth = jnp.linspace(0, 6, k.shape[1], dtype=k.dtype)[:, None, None]
        arrays[branch] = KeyValue(k * growth, v)
    assert_agrees(arrays, spec, kernels)


@pytest.mark.parametrize(("kernels", "name"), CASES)
def test_kernels_select_as_the_oracle_where_scores_are_apart(kernels, name):
    spec = SPECS[name]
    # Groups of 64 heads of 128 float32 features have no room on the chip; in float16, exact scores
    # are those of the same 16 bits.
    dtype = jnp.float32 if name in SMALL else jnp.float16
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


@pytest.mark.parametrize(
    ("kernels", "name"), [(k, n) for k in KERNELS for n in ("one_head", "four_heads_a_group")]
)
def test_no_bit_depends_on_later_queries(kernels, name):
    """A tile, and a warp of it, has several queries of such groups."""
    spec = SPECS[name]
    end = spec.length // 2 + 1
    arrays = random_inputs(spec, dtype=jnp.bfloat16)
    others = arrays | {"q": arrays["q"].at[:, end:].multiply(8)}
    run = jax.jit(
        lambda arrays: native_sparse_attention(**arrays, config=spec.nsa, implementation=kernels)
    )
    before, after = (jax.tree.map(lambda x: x[:, :end], run(x)) for x in (arrays, others))
    chex.assert_trees_all_equal(before, after)


LONG = ArgSpec(1, 262144, 64, 4, 128, 128, NSAConfig())


@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_at_262144_tokens(kernels):
    """Offsets pass 2**31 here. What is of the last group's last keys and of some queries is exact.

    The last 64 keys, and compressed keys of nothing earlier, have their gradients from the last 64
    queries alone.
    """
    spec = LONG
    arrays = jax.jit(functools.partial(random_inputs, spec, dtype=jnp.bfloat16))()
    end, last = spec.length, spec.nsa.select_block_size
    some = jnp.array([0, 31, 32, end // 3, end // 2 - 1, end // 2, end - last - 1])
    sampled = jnp.concatenate([some, jnp.arange(end - last, end)])
    group = spec.num_heads // spec.num_kv_heads
    compressed = (last - spec.nsa.compress_block_size) // spec.nsa.compress_stride + 1
    last_keys = {"compressed": compressed, "selected": last, "window": last}

    def gradients_of_last_keys(gradients):
        return {
            branch: jax.tree.map(lambda x, n=n: x[:, -n:, -1:], gradients[branch])
            for branch, n in last_keys.items()
        }

    @jax.jit
    def run(arrays):
        attention = functools.partial(
            native_sparse_attention, config=spec.nsa, implementation=kernels
        )
        out, pull, blocks = jax.vjp(lambda arrays: attention(**arrays), arrays, has_aux=True)
        (gradients,) = pull(arrays["q"])  # any array of the output's shape will do
        finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(gradients)]
        rows = (out[:, sampled, -group:], gradients["q"][:, sampled, -group:])
        keys = gradients_of_last_keys(gradients)
        return (*rows, keys), blocks[:, sampled, -1:], jnp.stack(finite).all()

    @jax.jit
    def oracle(arrays, blocks):
        # One group and few queries: the dense oracle repeats the keys for every query head.
        rows = {k: arrays[k][:, sampled, -group:] for k in ("q", "gates")}
        rest = {k: v for k, v in arrays.items() if k not in rows}
        rest = jax.tree.map(lambda x: x[:, :, -1:], rest)
        rows, rest = in_float32((rows, rest))

        def attention(q, keys):
            return native_sparse_attention(
                q,
                **keys,
                gates=rows["gates"],
                config=spec.nsa,
                q_positions=sampled[None],
                block_indices=blocks,
                implementation="reference",
            )[0]

        out, pull = jax.vjp(attention, rows["q"], rest)
        d_q, gradients = pull(rows["q"])
        return out, d_q, gradients_of_last_keys(gradients)

    actual, blocks, finite = run(arrays)
    assert bool(finite)
    expected = oracle(arrays, blocks)
    assert_close(actual[0], expected[0], TOLERANCE[jnp.bfloat16])
    assert_close(actual[1:], expected[1:], 2 * TOLERANCE[jnp.bfloat16])


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
    expected = dict.fromkeys(dispatch.OPERATIONS, "mosaic_gpu" if hopper else "triton")
    record = dispatch.explain("auto")
    assert {operation: entry["chosen"] for operation, entry in record.items()} == expected
