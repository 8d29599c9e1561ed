"""Properties that hold for every geometry, on geometries that hypothesis draws."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax import NSAConfig, native_sparse_attention
from nsa_jax.ops import reference, selection
from tests.arg_specs import ArgSpec, random_inputs

FEW = hypothesis.settings(max_examples=5)
MANY = hypothesis.settings(max_examples=60)


@st.composite
def geometries(draw):
    d = draw(st.integers(1, 6))
    per_block = draw(st.integers(1, 4))
    per_select = draw(st.integers(per_block, 6))
    initial, local = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    return NSAConfig(
        compress_block_size=d * per_block,
        compress_stride=d,
        select_block_size=d * per_select,
        num_selected_blocks=max(initial + local, 1) + draw(st.integers(0, 3)),
        num_initial_blocks=initial,
        num_local_blocks=local,
        window_size=draw(st.integers(1, 40)),
    )


@MANY
@hypothesis.given(geometries(), st.integers(0, 40))
def test_equation_9_counts_tokens(nsa, num_compressed):
    l, d, l_select = nsa.compress_block_size, nsa.compress_stride, nsa.select_block_size  # noqa: E741
    sizes = {"compress_block_size": l, "compress_stride": d, "select_block_size": l_select}
    num_blocks = selection.num_select_blocks(num_compressed, **sizes)
    actual = selection.importance(np.eye(num_compressed), num_blocks=num_blocks, **sizes)
    actual = np.asarray(actual)
    for i in range(num_compressed):
        for j in range(num_blocks):
            tokens = set(range(i * d, i * d + l)) & set(range(j * l_select, (j + 1) * l_select))
            assert actual[i, j] == len(tokens) / d


@MANY
@hypothesis.given(geometries(), st.integers(1, 300), st.integers(0, 3), st.randoms())
def test_chosen_blocks_obey_the_rules(nsa, position, first, random):
    num_blocks = position // nsa.select_block_size + 3
    first = min(first, position // nsa.select_block_size)
    scores = jnp.array([random.choice([0.0, 0.5, random.random()]) for _ in range(num_blocks)])
    candidate, forced = selection.candidates_and_forced(
        num_blocks,
        jnp.array(position),
        jnp.array(first * nsa.select_block_size),
        select_block_size=nsa.select_block_size,
        num_initial_blocks=nsa.num_initial_blocks,
        num_local_blocks=nsa.num_local_blocks,
    )
    blocks = selection.top_blocks(scores, candidate, forced, nsa.num_selected_blocks).tolist()
    own = position // nsa.select_block_size
    allowed = list(range(first, own + 1))
    must = set(allowed[: nsa.num_initial_blocks])
    must |= set(allowed[-nsa.num_local_blocks :] if nsa.num_local_blocks else [])
    rest = sorted(set(allowed) - must, key=lambda j: (-float(scores[j]), j))
    count = min(nsa.num_selected_blocks, len(allowed))
    expected = sorted(must | set(rest[: count - len(must)]))
    assert blocks == expected + [-1] * (nsa.num_selected_blocks - count)


@FEW
@hypothesis.given(geometries(), st.integers(1, 90), st.sampled_from([(1, 1), (3, 1), (4, 2)]))
def test_xla_agrees_with_the_oracle_and_reads_no_future(nsa, length, heads):
    spec = ArgSpec(1, length, *heads, 8, 4, nsa)
    arrays = random_inputs(spec, seed=length)
    sizes = {
        name: getattr(nsa, name)
        for name in (
            "compress_block_size",
            "compress_stride",
            "select_block_size",
            "num_selected_blocks",
            "num_initial_blocks",
            "num_local_blocks",
            "window_size",
        )
    }
    expected, blocks = reference.native_sparse_attention(**arrays, **sizes)
    run = jax.jit(
        lambda arrays: native_sparse_attention(
            **arrays, config=nsa, block_indices=blocks, implementation="xla"
        )[0]
    )
    out = run(arrays)
    np.testing.assert_allclose(out, expected, atol=1e-5)

    cut = length // 2
    changed = arrays | {
        name: jax.tree.map(lambda x: x.at[:, cut:].add(1.0), arrays[name])
        for name in ("selected", "window")
    }
    np.testing.assert_array_equal(run(changed)[:, :cut], out[:, :cut])
