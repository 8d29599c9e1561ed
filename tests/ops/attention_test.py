"""native_sparse_attention against the oracle, in limiting cases, and under JAX's transforms."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from nsa_jax import NSAConfig, native_sparse_attention, selected_attention, sliding_window_attention
from nsa_jax.ops import reference
from nsa_jax.ops.branches import compressed_attention
from tests.arg_specs import SMALL, ArgSpec, random_inputs

IMPLEMENTATIONS = ("reference", "xla")
RAGGED = SMALL["ragged"]

# float32 against float32: both sides sum a few hundred products of order 1 in different orders.
ATOL = 2e-5


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def attend(arrays, spec, implementation, **kwargs):
    return native_sparse_attention(
        **arrays, config=spec.nsa, implementation=implementation, **kwargs
    )


def value_and_gradients(arrays, spec, implementation, **kwargs):
    """The output, and the gradients of a random projection of it to every array."""

    @jax.jit
    def run(arrays):
        def project(arrays):
            out, _ = attend(arrays, spec, implementation, **kwargs)
            weights = jax.random.normal(jax.random.key(99), out.shape)
            return (out.astype(jnp.float32) * weights).sum(), out

        gradients, out = jax.grad(project, has_aux=True)(arrays)
        return out, gradients

    return run(arrays)


def assert_agrees_with_the_oracle(arrays, spec, **where):
    # The same blocks for both, so that a tie broken by the last bit is no disagreement.
    _, blocks = attend(arrays, spec, "reference", **where)
    actual = value_and_gradients(arrays, spec, "xla", block_indices=blocks, **where)
    expected = value_and_gradients(arrays, spec, "reference", block_indices=blocks, **where)
    assert actual[0].shape == (*arrays["q"].shape[:3], spec.v_head_dim)
    chex.assert_trees_all_close(actual, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", SMALL)
def test_xla_agrees_with_the_oracle(name):
    assert_agrees_with_the_oracle(random_inputs(SMALL[name]), SMALL[name])


def test_xla_agrees_with_the_oracle_on_packed_documents():
    token = jnp.arange(RAGGED.length)
    starts = jnp.stack([token // 48 * 48, jnp.where(token < 112, 0, 112)])  # other in each row
    assert_agrees_with_the_oracle(random_inputs(RAGGED), RAGGED, document_starts=starts)


def test_xla_agrees_with_the_oracle_on_queries_at_an_offset():
    arrays = random_inputs(RAGGED)
    chunk = {k: v[:, :45] if k in ("q", "gates") else v for k, v in arrays.items()}
    positions = jnp.array([[30], [151]]) + jnp.arange(45)  # other in each row
    starts = jnp.broadcast_to(jnp.array([[16], [64]]), (2, 45))
    where = {"q_positions": positions, "document_starts": starts}
    assert_agrees_with_the_oracle(chunk, RAGGED, **where)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_agrees_with_the_oracle_in_float32(dtype):
    arrays = random_inputs(RAGGED, dtype=dtype)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    _, blocks = attend(exact, RAGGED, "reference")
    actual = value_and_gradients(arrays, RAGGED, "xla", block_indices=blocks)
    expected = value_and_gradients(exact, RAGGED, "reference", block_indices=blocks)
    assert actual[0].dtype == dtype
    assert actual[1]["q"].dtype == dtype
    # Outputs of order 1 rounded to 8 (bf16) or 11 (f16) bits, gradients of order 10 likewise.
    unit = {jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11}[dtype]
    actual = jax.tree.map(lambda x: x.astype(jnp.float32), actual)
    chex.assert_trees_all_close(actual[0], expected[0], atol=4 * unit, rtol=0)
    chex.assert_trees_all_close(actual[1], expected[1], atol=16 * unit, rtol=0)


def test_the_oracle_agrees_with_finite_differences_in_float64():
    nsa = NSAConfig(4, 2, 4, 2, num_initial_blocks=0, num_local_blocks=1, window_size=3)
    spec = ArgSpec(1, 13, 4, 2, 4, 6, nsa)
    with jax.enable_x64(True):
        arrays = random_inputs(spec, seed=2, dtype=jnp.float64)

        def output(arrays):
            return attend(arrays, spec, "reference")[0]

        assert output(arrays).dtype == jnp.float64
        # Central differences in float64 with this step are good to about 1e-9.
        check_grads(output, (arrays,), 1, modes="rev", atol=1e-7, rtol=1e-7, eps=1e-5)


def test_xla_agrees_with_finite_differences_in_float64():
    spec = ArgSpec(1, 37, 4, 2, 4, 6, NSAConfig(4, 2, 4, 3, window_size=5))
    with jax.enable_x64(True):
        arrays = random_inputs(spec, seed=2, dtype=jnp.float64)
        run = jax.jit(lambda arrays: attend(arrays, spec, "xla")[0])
        check_grads(run, (arrays,), 1, modes="rev", atol=1e-7, rtol=1e-7, eps=1e-5)


def full_attention(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def only_branch(arrays, branch):
    gates = jnp.zeros_like(arrays["gates"]).at[..., branch].set(1.0)
    return arrays | {"gates": gates}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_local_blocks", [0, 2])
def test_selecting_every_block_is_full_attention(implementation, num_local_blocks):
    nsa = NSAConfig(8, 4, 16, 9, num_initial_blocks=0, num_local_blocks=num_local_blocks)
    spec = ArgSpec(2, 139, 6, 2, 16, 16, nsa)  # 9 * 16 >= 139
    arrays = random_inputs(spec)
    out, _ = attend(only_branch(arrays, 1), spec, implementation)
    np.testing.assert_allclose(out, full_attention(arrays["q"], *arrays["selected"]), atol=ATOL)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_window_over_everything_is_full_attention(implementation):
    spec = ArgSpec(2, 139, 6, 2, 16, 16, NSAConfig(8, 4, 16, window_size=139))
    arrays = random_inputs(spec)
    out, _ = attend(only_branch(arrays, 2), spec, implementation)
    np.testing.assert_allclose(out, full_attention(arrays["q"], *arrays["window"]), atol=ATOL)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_window_holds_exactly_w_keys(implementation):
    q = jnp.zeros((1, 9, 1, 2))  # equal scores: the output is the mean of the window's values
    v = jnp.arange(9.0).reshape(1, 9, 1, 1)
    config = NSAConfig(window_size=3)
    out, lse = sliding_window_attention(
        q, jnp.zeros((1, 9, 1, 2)), v, config=config, implementation=implementation
    )
    np.testing.assert_allclose(out[0, :, 0, 0], [0, 0.5, 1, 2, 3, 4, 5, 6, 7], atol=1e-6)
    np.testing.assert_allclose(np.exp(lse[0, :, 0]), [1, 2, 3, 3, 3, 3, 3, 3, 3], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_own_block_is_causal(implementation):
    q = jnp.zeros((1, 8, 1, 2))
    v = jnp.arange(8.0).reshape(1, 8, 1, 1)
    own = (jnp.arange(8) // 4)[None, :, None, None]
    out, _ = selected_attention(
        q,
        jnp.zeros((1, 8, 1, 2)),
        v,
        own,
        config=NSAConfig(2, 2, 4),
        implementation=implementation,
    )
    np.testing.assert_allclose(out[0, :, 0, 0], [0, 0.5, 1, 1.5, 4, 4.5, 5, 5.5], atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_minus_one_stands_for_no_block_in_any_place(implementation):
    arrays = random_inputs(RAGGED)
    q, (k, v) = arrays["q"], arrays["selected"]
    run = functools.partial(
        selected_attention, q, k, v, config=RAGGED.nsa, implementation=implementation
    )
    shape = (*q.shape[:2], RAGGED.num_kv_heads, 1)
    last = jnp.broadcast_to((jnp.arange(RAGGED.length) // 16)[None, :, None, None], shape)
    none = jnp.full(shape, -1)
    expected, _ = run(last)
    for row in ([last, none, none], [none, none, last], [none, last]):
        out, _ = run(jnp.concatenate(row, axis=-1))
        # Not to the bit: rows of another length are another program.
        np.testing.assert_allclose(out, expected, atol=1e-6)
    out, lse = run(jnp.concatenate([none, none], axis=-1))
    assert (out == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["ragged", "nothing_compressed"])
def test_before_the_first_block_the_compressed_output_is_zero(implementation, name):
    spec = SMALL[name]
    arrays = only_branch(random_inputs(spec), 0)
    out, gradients = value_and_gradients(arrays, spec, implementation)
    assert (out[:, : spec.nsa.compress_block_size - 1] == 0).all()
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradients))
    if name == "ragged":
        assert (jnp.abs(out[:, spec.nsa.compress_block_size - 1 :]).max(axis=-1) > 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_are_chosen_by_the_group_and_not_by_its_order(implementation):
    arrays = random_inputs(SMALL["three_heads_a_group"])
    spec = SMALL["three_heads_a_group"]
    _, blocks = attend(arrays, spec, implementation)
    shuffled = arrays | {"q": arrays["q"][:, :, jnp.array([2, 0, 1, 4, 5, 3])]}
    _, same = attend(shuffled, spec, implementation)
    assert blocks.shape[2] == spec.num_kv_heads, "one list for all heads of a group"
    np.testing.assert_array_equal(blocks, same)


def raw_attention(arrays, spec, implementation):
    """From tokens alone: the compressed keys and values are means of the window's."""

    def compress(x):
        l, d = spec.nsa.compress_block_size, spec.nsa.compress_stride  # noqa: E741
        return jnp.stack([x[:, i : i + l].mean(1) for i in range(0, x.shape[1] - l + 1, d)], axis=1)

    k, v = arrays["window"]
    compressed = (compress(k), compress(v))
    return attend(arrays | {"compressed": compressed}, spec, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cut", [5, 64, 100])
def test_no_output_depends_on_a_later_token(implementation, cut):
    """Whatever comes after `cut` changes: what came before stays, to the bit."""
    spec = SMALL["ragged"]
    arrays = {k: v for k, v in random_inputs(spec).items() if k != "compressed"}
    other = jax.tree.map(lambda x: x.at[:, cut:].set(10 * x[:, cut:] + 1), arrays)
    run = jax.jit(lambda arrays: raw_attention(arrays, spec, implementation))
    out, blocks = run(arrays)
    out_other, blocks_other = run(other)
    np.testing.assert_array_equal(out[:, :cut], out_other[:, :cut])
    np.testing.assert_array_equal(blocks[:, :cut], blocks_other[:, :cut])
    assert (out[:, cut] != out_other[:, cut]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("position", [3, 41, 127, 196])
def test_the_gradient_to_later_tokens_is_exactly_zero(implementation, position):
    spec = SMALL["ragged"]
    arrays = {k: v for k, v in random_inputs(spec).items() if k != "compressed"}

    @jax.jit
    def gradients(arrays):
        return jax.grad(
            lambda arrays: raw_attention(arrays, spec, implementation)[0][:, position].sum()
        )(arrays)

    for x in jax.tree.leaves(gradients(arrays)):
        assert (x[:, position + 1 :] == 0).all()
        assert (x[:, position] != 0).any()


def test_xla_reads_nothing_that_no_query_may_see():
    """NaN in keys after the last query and in other documents changes nothing."""
    spec = SMALL["ragged"]
    arrays = random_inputs(spec)
    first, last = 64, 101  # queries of a prefill chunk in a longer, partly filled cache
    starts = jnp.full((spec.batch, last - first), 48, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(first, last, dtype=jnp.int32), starts.shape)
    chunk = {k: v[:, first:last] if k in ("q", "gates") else v for k, v in arrays.items()}

    def poison(x, start, end):
        index = jnp.arange(x.shape[1])[:, None, None]
        return jnp.where((index >= start) & (index < end), x, jnp.nan)

    stride = spec.nsa.compress_stride
    poisoned = chunk | {
        name: jax.tree.map(lambda x, start=start, end=end: poison(x, start, end), chunk[name])
        for name, start, end in (
            ("compressed", 48 // stride, 24),
            ("selected", 48, last),
            ("window", 48, last),
        )
    }
    where = {"q_positions": positions, "document_starts": starts}
    clean_run = value_and_gradients(chunk, spec, "xla", **where)
    poisoned_run = value_and_gradients(poisoned, spec, "xla", **where)
    chex.assert_trees_all_equal(clean_run, poisoned_run)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_documents_equal_the_documents_alone(implementation):
    spec = ArgSpec(1, 170, 4, 2, 16, 16, SMALL["ragged"].nsa)
    lengths = (50, 7, 64, 23)  # documents begin at multiples of 16: 0, 64, 80, 144
    begins = (0, 64, 80, 144)
    documents = [random_inputs(ArgSpec(1, n, 4, 2, 16, 16, spec.nsa), seed=n) for n in lengths]
    packed = random_inputs(spec)  # what lies between the documents is random
    starts = jnp.zeros((1, spec.length), jnp.int32)
    stride = spec.nsa.compress_stride
    for begin, document in zip(begins, documents, strict=True):
        starts = starts.at[:, begin:].set(begin)
        packed = {
            name: jax.tree.map(
                lambda row, x, at=begin // stride if name == "compressed" else begin: (
                    jax.lax.dynamic_update_slice_in_dim(row, x, at, axis=1)
                ),
                packed[name],
                document[name],
            )
            for name in packed
        }
    out, blocks = attend(packed, spec, implementation, document_starts=starts)
    for begin, length, document in zip(begins, lengths, documents, strict=True):
        alone, alone_blocks = attend(document, spec, implementation)
        row = slice(begin, begin + length)
        np.testing.assert_allclose(out[:, row], alone, atol=ATOL)
        shifted = jnp.where(alone_blocks < 0, -1, alone_blocks + begin // 16)
        np.testing.assert_array_equal(blocks[:, row], shifted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chunks_of_queries_equal_the_whole(implementation):
    arrays = random_inputs(RAGGED)
    whole, whole_blocks = attend(arrays, RAGGED, implementation)
    run = jax.jit(
        lambda arrays, positions: attend(arrays, RAGGED, implementation, q_positions=positions)
    )
    for start, end in ((0, 1), (1, 60), (60, 61), (61, 130), (130, 197)):
        positions = jnp.broadcast_to(jnp.arange(start, end), (RAGGED.batch, end - start))
        chunk = {k: v[:, start:end] if k in ("q", "gates") else v for k, v in arrays.items()}
        out, blocks = run(chunk, positions)
        np.testing.assert_allclose(out, whole[:, start:end], atol=ATOL)
        np.testing.assert_array_equal(blocks, whole_blocks[:, start:end])


def test_transforms_change_nothing():
    spec = SMALL["even"]
    arrays = random_inputs(spec)
    expected, expected_gradients = value_and_gradients(arrays, spec, "xla")

    def run(arrays):
        return attend(arrays, spec, "xla")[0]

    one_by_one = jax.tree.map(lambda x: x[:, None], arrays)
    np.testing.assert_allclose(jax.vmap(run)(one_by_one)[:, 0], expected, atol=ATOL)

    _, scanned = jax.lax.scan(lambda _, arrays: (None, run(arrays)), None, one_by_one)
    np.testing.assert_allclose(scanned[:, 0], expected, atol=ATOL)

    weights = jax.random.normal(jax.random.key(99), expected.shape)
    remat = jax.jit(jax.grad(lambda arrays: (jax.checkpoint(run)(arrays) * weights).sum()))
    chex.assert_trees_all_close(remat(arrays), expected_gradients, atol=ATOL, rtol=0)

    per_example = jax.vmap(jax.grad(lambda arrays, w: (run(arrays) * w).sum()))
    gradients = per_example(one_by_one, weights[:, None])
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[:, 0], gradients), expected_gradients, atol=ATOL, rtol=0
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_give_the_same_bits(implementation):
    spec = SMALL["sixteen_heads_a_group"]
    arrays = random_inputs(spec)
    first = value_and_gradients(arrays, spec, implementation)
    second = value_and_gradients(arrays, spec, implementation)
    chex.assert_trees_all_equal(first, second)


def test_no_gradient_flows_through_the_choice_of_blocks():
    """Only the compressed output reaches compressed keys: with its gate shut, nothing does."""
    arrays = only_branch(random_inputs(RAGGED), 1)
    for implementation in IMPLEMENTATIONS:
        _, gradients = value_and_gradients(arrays, RAGGED, implementation)
        assert all((x == 0).all() for x in gradients["compressed"])
        assert (gradients["selected"].k != 0).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lse_is_differentiable(implementation):
    arrays = random_inputs(RAGGED)
    q, (k, v) = arrays["q"], arrays["compressed"]

    def total_lse(q, k):
        _, lse = compressed_attention(q, k, v, config=RAGGED.nsa, implementation=implementation)
        return jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

    dq, dk = jax.grad(total_lse, argnums=(0, 1))(q, k)
    # d lse / dq is the mean of the visible keys under the probabilities: attention with v = k.
    mean_key, _ = reference.compressed_attention(q, k, k, compress_block_size=8, compress_stride=4)
    np.testing.assert_allclose(dq, mean_key / 4, atol=ATOL)  # scale 1 / sqrt(16)
    assert bool(jnp.isfinite(dk).all())


def test_values_mapped_alone():
    """vmap over values, of which lse knows nothing, and the gradient through both outside of it."""
    arrays = random_inputs(RAGGED)
    q, (k, v), blocks = arrays["q"], arrays["selected"], attend(arrays, RAGGED, "xla")[1]
    many = jnp.stack([v, 2 * v])

    def losses(attention, q, k):
        def loss(v):
            out, lse = attention(q, k, v)
            return (out**2).sum() + lse.sum()

        return loss

    where = {"config": RAGGED.nsa, "implementation": "xla"}
    for attention in (
        functools.partial(sliding_window_attention, **where),
        lambda *x: selected_attention(*x, blocks, **where),
    ):
        mapped, one_by_one = (
            jax.grad(lambda q, k, every=every, f=attention: every(losses(f, q, k)).sum(), (0, 1))(
                q, k
            )
            for every in (
                lambda loss: jax.vmap(loss)(many),
                lambda loss: jnp.stack([loss(x) for x in many]),
            )
        )
        chex.assert_trees_all_close(mapped, one_by_one, atol=ATOL)


@pytest.mark.parametrize("gate", [0.5, jnp.ones((2, 197))])
def test_a_gate_of_another_shape_is_refused(gate):
    arrays = random_inputs(RAGGED)
    with pytest.raises(ValueError, match=r"gate \(.*\) must be \[B, T, N\] = \(2, 197, 4\)"):
        sliding_window_attention(arrays["q"], *arrays["window"], config=RAGGED.nsa, gate=gate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": jnp.ones((2, 197, 4, 2))}, r"gates \(2, 197, 4, 2\) must be"),
        ({"q": jnp.ones((2, 197, 3, 16))}, "must divide the 3"),
        ({"q": jnp.ones((2, 0, 4, 16))}, r"q \(2, 0, 4, 16\) must not be empty"),
        ({"q": jnp.ones((2, 197, 64))}, r"q \(2, 197, 64\) must have four dimensions"),
        ({"q": jnp.ones((2, 197, 4, 16), jnp.int32)}, "q is int32 and must be of a floating"),
        ({"q_compressed": jnp.ones((2, 196, 4, 16))}, "q_compressed .* must have the shape of q"),
        ({"compressed": (jnp.ones((2, 40, 2, 16)),) * 2}, "40 blocks, but 197 tokens make 48"),
        ({"compressed": (jnp.ones((2, 48, 1, 16)),) * 2}, "compressed has 1 heads .* agree"),
        (
            {"window": (jnp.ones((2, 197, 2, 16)), jnp.ones((2, 197, 2, 1)))},
            "values of 1 features, selected has 2 and 16",
        ),
        ({"window": (jnp.ones((2, 90, 2, 16)),) * 2}, "window has 90 tokens, selected has 197"),
        ({"block_indices": jnp.ones((2, 197, 2, 3))}, "block_indices float32.* must be integers"),
        ({"scale": jnp.float32(1.0)}, "scale must be a Python number"),
        (
            {"selected": (jnp.ones((2, 197, 2, 16)), jnp.ones((2, 190, 2, 16)))},
            r"k .* and v .* must agree",
        ),
        ({"window": (jnp.ones((2, 197, 2, 8)),) * 2}, "window: .* head dim"),
        (
            {"block_indices": jnp.ones((2, 197, 4, 3), jnp.int32)},
            r"block_indices .* \[B, T, K, M\]",
        ),
        ({"q_positions": jnp.ones((197,), jnp.int32)}, r"q_positions .* of shape \[B, T\]"),
        ({"document_starts": jnp.ones((2, 197))}, "document_starts float32.* must be integers"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    arrays = random_inputs(RAGGED) | change
    with pytest.raises(ValueError, match=message):
        native_sparse_attention(**arrays, config=RAGGED.nsa, implementation="xla")


def test_one_token():
    spec = ArgSpec(2, 1, 4, 2, 16, 16, RAGGED.nsa)
    assert_agrees_with_the_oracle(random_inputs(spec), spec)
