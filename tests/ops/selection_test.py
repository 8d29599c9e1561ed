"""Equation 9 against numbers worked out by hand, forced blocks, top n."""

import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.config import NSAConfig
from nsa_jax.ops import reference, selection
from nsa_jax.ops.branches import compressed_attention, select_blocks
from nsa_jax.ops.compression import num_compressed_blocks
from tests.arg_specs import SMALL, ArgSpec, random_inputs

IMPLEMENTATIONS = ("reference", "xla")

# (l, d, l'): for selection block j, the first compressed block that overlaps it, as (step, offset)
# in step * j + offset, and the weights from there on. Worked out on paper by counting tokens:
# for (6, 2, 10), block 1 holds tokens 10..19; compressed block 3 holds 6..11 and shares two tokens,
# a weight of 2 / d = 1; block 4 shares four, 2; blocks 5, 6, 7 lie inside, 3; then 2 and 1.
OVERLAPS = {
    (32, 16, 64): ((4, -1), [1, 2, 2, 2, 1]),
    (16, 16, 64): ((4, 0), [1, 1, 1, 1]),
    (32, 32, 32): ((1, 0), [1]),
    (8, 4, 16): ((4, -1), [1, 2, 2, 2, 1]),
    (6, 2, 10): ((5, -2), [1, 2, 3, 3, 3, 2, 1]),
}


def expected_overlap(geometry, num_compressed, num_select):
    (step, offset), weights = OVERLAPS[geometry]
    matrix = np.zeros((num_compressed, num_select), np.float32)
    for j in range(num_select):
        for i, weight in enumerate(weights, start=step * j + offset):
            if 0 <= i < num_compressed:
                matrix[i, j] = weight
    return matrix


@pytest.mark.parametrize("geometry", OVERLAPS)
@pytest.mark.parametrize("num_select", [1, 2, 5])
def test_equation_9_by_hand(geometry, num_select):
    l, d, l_select = geometry  # noqa: E741
    num_compressed = num_compressed_blocks(num_select * l_select, block_size=l, stride=d)
    expected = expected_overlap(geometry, num_compressed, num_select)
    sizes = {"compress_block_size": l, "compress_stride": d}
    each_block_alone = jnp.eye(num_compressed)
    actual = selection.importance(
        each_block_alone, num_blocks=num_select, select_block_size=l_select, **sizes
    )
    np.testing.assert_array_equal(actual, expected)
    oracle = reference.overlap_weights(
        num_compressed, num_select, select_block_size=l_select, **sizes
    )
    np.testing.assert_array_equal(oracle, expected)


def test_equation_9_on_probabilities_by_hand():
    # 32/16/64 over 160 tokens: 9 compressed blocks, 3 selection blocks.
    p = jnp.array([0.1, 0.0, 0.2, 0.1, 0.3, 0.0, 0.1, 0.15, 0.05])
    actual = selection.importance(
        p, num_blocks=3, compress_block_size=32, compress_stride=16, select_block_size=64
    )
    # block 0: 2*.1 + 2*0 + 2*.2 + .1; block 1: .1 + 2*.3 + 2*0 + 2*.1 + .15; block 2: .15 + 2*.05
    np.testing.assert_allclose(actual, [0.7, 1.05, 0.25], rtol=1e-6)


def test_equal_block_sizes_make_selection_scores_equal_to_compressed_probabilities():
    spec = SMALL["equal_blocks"]
    arrays = random_inputs(spec)
    q, (k, _) = arrays["q"], arrays["compressed"]
    num_compressed = k.shape[1]
    sizes = {"compress_block_size": 32, "compress_stride": 32}
    p_slc = reference.importance(q, k, num_select=num_compressed, select_block_size=32, **sizes)
    identity = jnp.broadcast_to(
        jnp.eye(num_compressed)[None, :, None, :],
        (1, num_compressed, spec.num_kv_heads, num_compressed),
    )
    p_cmp, _ = reference.compressed_attention(q, k, identity, **sizes)  # values that reveal p
    groups = p_cmp.reshape(*p_cmp.shape[:2], spec.num_kv_heads, -1, num_compressed)
    np.testing.assert_allclose(p_slc, groups.sum(axis=3), atol=1e-6)


@pytest.mark.parametrize(
    ("l", "d", "l_select", "num_tokens", "expected"),
    [
        # The blocks that could hold a token when C blocks are complete, i.e. up to C*d + l - 1.
        (32, 16, 64, 31, 1),
        (32, 16, 64, 64, 2),  # 3 complete at 64 tokens and still at 79
        (32, 16, 64, 128, 3),
        (4, 4, 4, 8, 3),
    ],
)
def test_number_of_selection_blocks(l, d, l_select, num_tokens, expected):  # noqa: E741
    num_compressed = num_compressed_blocks(num_tokens, block_size=l, stride=d)
    actual = selection.num_select_blocks(
        num_compressed, compress_block_size=l, compress_stride=d, select_block_size=l_select
    )
    assert actual == expected
    assert actual >= -(-num_tokens // l_select)


def test_forced_blocks_and_candidates():
    candidate, forced = selection.candidates_and_forced(
        8,
        jnp.array([0, 15, 16, 40, 127, 100]),
        jnp.array([0, 0, 0, 0, 0, 64]),
        select_block_size=16,
        num_initial_blocks=1,
        num_local_blocks=2,
    )
    np.testing.assert_array_equal(candidate.sum(axis=-1), [1, 1, 2, 3, 8, 3])
    rows = [np.flatnonzero(row).tolist() for row in forced]
    assert rows == [[0], [0], [0, 1], [0, 1, 2], [0, 6, 7], [4, 5, 6]]


def top(scores, n, candidate=None, forced=None):
    scores = jnp.array(scores)
    candidate = jnp.ones(scores.shape, bool) if candidate is None else jnp.array(candidate)
    forced = jnp.zeros(scores.shape, bool) if forced is None else jnp.array(forced)
    return selection.top_blocks(scores, candidate, forced, n).tolist()


def test_top_blocks():
    assert top([0.1, 0.5, 0.3, 0.4], 2) == [1, 3]
    assert top([0.2, 0.2, 0.2, 0.2], 2) == [0, 1], "ties go to the lower block"
    assert top([0.1, 0.4, 0.1, 0.1], 2) == [0, 1]
    assert top([0.9, 0.5, 0.0, 0.1], 2, forced=[False, False, True, False]) == [0, 2]
    assert top([0.9, 0.5, 0.8, 0.1], 3, candidate=[True, False, False, True]) == [0, 3, -1]
    assert top([0.0, 0.0], 4) == [0, 1, -1, -1], "a candidate without any score still counts"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_selection_by_hand(implementation):
    """One head over 24 tokens, l = d = 2, l' = 4: every score is a number chosen in the test."""
    nsa = NSAConfig(2, 2, 4, num_selected_blocks=3, num_initial_blocks=1, num_local_blocks=1)
    # A query of 1 and keys log(c) give compressed probabilities in proportion to c.
    weight = [1.0, 1.0, 5.0, 1.0, 2.0, 2.0, 3.0, 4.0, 9.0, 9.0, 1.0, 1.0]
    q = jnp.ones((1, 24, 1, 1))
    k = jnp.log(jnp.array(weight)).reshape(1, 12, 1, 1)
    where = {"config": nsa, "scale": 1.0, "implementation": implementation}
    _, lse = compressed_attention(q, k, k, **where)
    blocks = select_blocks(q, k, lse, **where)[0, :, 0].tolist()
    # Weights of the six selection blocks: 2, 6, 4, 7, 18, 2; only complete pairs count.
    assert blocks[0] == [0, -1, -1]
    assert blocks[7] == [0, 1, -1]
    assert blocks[11] == [0, 1, 2]
    assert blocks[12] == [0, 1, 3], "own block 3 forced; block 1 (6) beats block 2 (4)"
    assert blocks[15] == [0, 1, 3]
    assert blocks[16] == [0, 3, 4], "block 3 (7) beats block 1 (6)"
    assert blocks[20] == [0, 4, 5], "block 4 (18) beats all"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_exact_ties_go_to_the_lower_block(implementation):
    nsa = NSAConfig(4, 4, 8, num_selected_blocks=4, num_initial_blocks=0, num_local_blocks=1)
    q = jnp.ones((1, 64, 2, 4))
    k = jnp.zeros((1, 16, 1, 4))  # all keys alike: complete blocks have exactly equal scores
    where = {"config": nsa, "implementation": implementation}
    _, lse = compressed_attention(q, k, k, **where)
    blocks = select_blocks(q, k, lse, **where)
    assert blocks[0, 63, 0].tolist() == [0, 1, 2, 7]
    assert blocks[0, 40, 0].tolist() == [0, 1, 2, 5]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_selected_rows_are_well_formed(implementation):
    spec = SMALL["sixteen_heads_a_group"]
    arrays = random_inputs(spec, seed=3)
    q, (k, v), nsa = arrays["q"], arrays["compressed"], spec.nsa
    where = {"config": nsa, "implementation": implementation}
    _, lse = compressed_attention(q, k, v, **where)
    blocks = np.asarray(select_blocks(q, k, lse, **where))
    assert blocks.shape == (1, spec.length, 1, nsa.num_selected_blocks)
    assert blocks.dtype == np.int32
    for t in range(spec.length):
        own = t // nsa.select_block_size
        row = blocks[0, t, 0]
        chosen = row[row >= 0]
        assert len(chosen) == min(own + 1, nsa.num_selected_blocks)
        assert (np.diff(chosen) > 0).all(), "ascending and distinct"
        assert (row[len(chosen) :] == -1).all(), "padding at the end"
        assert chosen.max() <= own, "no block of the future"
        assert {0, own, max(own - 1, 0)} <= set(chosen.tolist()), "forced blocks"


def test_xla_selects_as_the_oracle_where_scores_are_apart():
    spec = ArgSpec(2, 301, 8, 2, 32, 32, SMALL["ragged"].nsa)
    arrays = random_inputs(spec, seed=5)
    q, (k, v), nsa = arrays["q"], arrays["compressed"], spec.nsa
    _, lse = compressed_attention(q, k, v, config=nsa, implementation="xla")
    actual = select_blocks(q, k, lse, config=nsa, implementation="xla")
    expected = select_blocks(q, k, lse, config=nsa, implementation="reference")
    num_select = -(-spec.length // nsa.select_block_size)
    score = reference.importance(
        q,
        k,
        num_select=num_select,
        compress_block_size=nsa.compress_block_size,
        compress_stride=nsa.compress_stride,
        select_block_size=nsa.select_block_size,
    )
    # Scores are sums of a group's probabilities: 1e-5 is a hundred float32 roundings of 1.
    gaps = jnp.diff(jnp.sort(score, axis=-1), axis=-1)
    apart = jnp.where(gaps > 0, gaps, jnp.inf).min(axis=-1) > 1e-5
    assert apart.mean() > 0.9
    same = (actual == expected).all(axis=-1)
    assert bool(jnp.where(apart, same, True).all())
