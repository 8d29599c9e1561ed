"""Each selector by hand, and none of them looking ahead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import selectors
from nsa_jax import NSAConfig

BLOCKS = NSAConfig(2, 1, 4, num_selected_blocks=4, window_size=4)  # l, d, l'
TOKENS = NSAConfig(1, 1, 1, num_selected_blocks=9, num_local_blocks=4)
OPTIONS = {"clusters": {"chunk": 8, "num_clusters": 3, "iterations": 3}}


def scores(name, q, k, nsa, x=None, **options):
    """The scores [T, blocks] of one row with one head."""
    q, k = jnp.array(q, jnp.float32)[None, :, None], jnp.array(k, jnp.float32)[None, :, None]
    selector = selectors.make(name, nsa, **options)
    starts = jnp.zeros(q.shape[:2], jnp.int32)
    x = q[:, :, 0] if x is None else jnp.array(x, jnp.float32)[None]
    out, _ = selector.init_with_output(jax.random.key(0), x, q, k, starts, method="scores")
    return np.asarray(out)[0, :, 0]


@pytest.mark.parametrize("name", selectors.SELECTORS)
def test_no_choice_looks_ahead(name):
    """Whatever changes after token t, the blocks of the queries up to t stay as they were."""
    nsa = TOKENS if name == "h2o" else BLOCKS
    selector = selectors.make(name, nsa, **OPTIONS.get(name, {}))
    batch, length, heads, groups, size = 2, 42, 4, 2, 8
    shapes = (batch, length, 16), (batch, length, heads, size), (batch, length, groups, size)
    keys = jax.random.split(jax.random.key(0), 6)
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys[:3], shapes, strict=True)]
    others = [jax.random.normal(key, x.shape) for key, x in zip(keys[3:], arrays, strict=True)]
    starts = jnp.zeros((batch, length), jnp.int32).at[1, 16:].set(16)
    params = selector.init(keys[0], *arrays, document_starts=starts)
    choose = jax.jit(lambda arrays: selector.apply(params, *arrays, document_starts=starts))
    chosen = np.asarray(choose(arrays))
    assert chosen.shape == (batch, length, groups, nsa.num_selected_blocks)
    for t in (17, 22, 31, 40):
        seen = (jnp.arange(length) <= t)[None, :]
        changed = [
            jnp.where(seen.reshape(1, length, *[1] * (x.ndim - 2)), x, other)
            for x, other in zip(arrays, others, strict=True)
        ]
        np.testing.assert_array_equal(np.asarray(choose(changed))[:, : t + 1], chosen[:, : t + 1])
    own = np.arange(length)[None, :, None, None] // nsa.select_block_size
    assert ((chosen <= own) & (chosen >= -1)).all()
    assert (chosen == own).any(-1).all()  # one's own block, always
    assert ((chosen[1, 16:] >= 16 // nsa.select_block_size) | (chosen[1, 16:] < 0)).all()
    full = (chosen >= 0).sum(-1)[0, :, 0]
    np.testing.assert_array_equal(full, np.minimum(own[0, :, 0, 0] + 1, nsa.num_selected_blocks))


def test_quest_by_hand():
    k = [[1, -2], [3, 0], [-1, 1], [0, 2]]
    np.testing.assert_array_equal(
        # Of the first block of 2 the extremes are 1..3 and -2..0, of the second -1..0 and 1..2.
        scores("quest", [[1, 1], [-1, 2], [0, 0], [-2, -1]], k, NSAConfig(1, 1, 2)),
        [[3, 2], [-1, 5], [0, 0], [0, 1]],
    )


def test_mean_keys_by_hand():
    k = [[1, -2], [3, 0], [-1, 1], [0, 2]]
    np.testing.assert_array_equal(
        scores("mean_keys", [[1, 1], [-1, 2], [0, 0], [-2, -1]], k, NSAConfig(1, 1, 2)),
        [[1, 1], [-4, 3.5], [0, 0], [-3, -0.5]],
    )


def test_heads_of_a_group_add_up():
    q = jnp.array([[[[1.0, 0], [0, 1], [1, 1], [2, 0]]]])  # one token of four heads in two groups
    k = jnp.array([[[[3.0, 5], [7, 11]]]])
    for name in ("quest", "mean_keys"):
        selector = selectors.make(name, NSAConfig(1, 1, 1))
        out = selector.scores(None, q, k, jnp.zeros((1, 1), jnp.int32))
        np.testing.assert_array_equal(out[0, 0], [[3 + 5], [18 + 14]])


def test_the_oracle_by_hand():
    # One feature, so that the scale is 1; exp(score) is 1, 2, 5 and 8.
    k = np.log([[1.0], [2], [5], [8]])
    np.testing.assert_allclose(
        scores("oracle", np.ones((4, 1)), k, NSAConfig(1, 1, 2)),
        [[1, 0], [1, 0], [3 / 8, 5 / 8], [3 / 16, 13 / 16]],
        rtol=1e-6,
    )


def test_static_takes_the_latest_and_random_draws_lots():
    q = k = np.random.default_rng(0).normal(size=(64, 4))
    nsa = NSAConfig(1, 1, 2)
    np.testing.assert_array_equal(scores("static", q, k, nsa), np.tile(np.arange(32), (64, 1)))
    lots = scores("random", q, k, nsa) / 2**24
    np.testing.assert_array_equal(lots * 2**24, scores("random", q, -k, nsa))  # no function of k
    # Mean and deviation of uniform lots, of 2048 of them: four of their standard errors.
    assert abs(lots.mean() - 0.5) < 4 * 12**-0.5 / 2048**0.5
    assert abs(lots.std() - 12**-0.5) < 4 * 0.13 / 2048**0.5
    correlations = np.corrcoef(lots)[np.triu_indices(64, 1)]
    assert abs(correlations.mean()) < 0.02


def test_clusters_by_hand():
    k = [[2, 0], [4, 0], [0, 1], [0, 3], [9, 9], [1, 1]]
    got = scores("clusters", [[1, 1]] * 6, k, TOKENS, chunk=4, num_clusters=2, iterations=2)
    # Before the second chunk two directions, with means (3, 0) and (0, 2). Later keys as they are.
    np.testing.assert_allclose(got[4] * 2**0.5, [3, 3, 2, 2, 18, 2], rtol=1e-6)
    np.testing.assert_allclose(got[3] * 2**0.5, [2, 4, 1, 3, 18, 2], rtol=1e-6)
    whole = scores(
        "clusters", [[1, 1]] * 6, k, NSAConfig(1, 1, 2), chunk=4, num_clusters=2, iterations=2
    )
    np.testing.assert_allclose(whole[4, 0], 3 / 2**0.5 + np.log(2), rtol=1e-6)


def test_infllm_by_hand():
    q = [[1], [2], [3], [4]]
    k = [[1], [-1], [2], [5]]
    # With one local block a key is seen by the queries of its own block from it on: mean products
    # 1.5 and -2 in the first block, 7 and 20 in the second; one key of each represents it.
    nsa = NSAConfig(1, 1, 2, num_local_blocks=1)
    got = scores("infllm", q, k, nsa, representatives=1)
    np.testing.assert_array_equal(got, [[1, 5], [2, 10], [3, 15], [4, 20]])
    # With two local blocks key 0 is seen by all, 2.5, and key 1 by three queries, -3.
    both = scores("infllm", q, k, NSAConfig(1, 1, 2), representatives=2)
    np.testing.assert_array_equal(both[:, 0], [0, 0, 0, 0])


def test_h2o_by_hand():
    # Three tokens are kept, the newest always; exp(score) is the key's weight for every query.
    k = np.log([[4.0], [1], [2], [1], [1]])
    nsa = NSAConfig(1, 1, 1, num_selected_blocks=3, num_initial_blocks=0, num_local_blocks=1)
    got = scores("h2o", np.ones((5, 1)), k, nsa)
    np.testing.assert_allclose(got[2, :3], [1 + 4 / 5 + 4 / 7, 1 / 5 + 1 / 7, 2 / 7], rtol=1e-6)
    # Token 3 pushes out token 2, which has 0.286, not token 1, which has 0.343.
    assert (got[3] > 0).tolist() == [True, True, False, True, False]
    # It has 1/6 itself when token 4 comes; token 2 does not come back.
    assert (got[4] > 0).tolist() == [True, True, False, False, True]


def test_the_auxiliary_loss_by_hand():
    nsa = NSAConfig(1, 1, 2, num_local_blocks=1)
    selector = selectors.make("auxiliary", nsa, weight=0.5, width=2)
    x = jnp.array([[[0.0], [2], [1], [3], [1], [1]]])
    k = jnp.log(jnp.array([1.0, 2, 5, 8, 1, 1]))[None, :, None, None]
    params = {"query": {"kernel": jnp.array([[[1.0, 0]]])}, "key": {"kernel": jnp.ones((1, 1, 2))}}
    _, sown = selector.apply({"params": params}, x, jnp.ones((1, 6, 1, 1)), k, mutable=["losses"])
    # Queries 2 and 3 have one block to choose, where nothing can be wrong. Queries 4 and 5 have
    # two, of masses 3 : 13; the blocks' mean inputs are 1 and 2, the scores 1 and 2 over sqrt(2).
    p, s = np.array([3, 13]) / 16, np.array([1, 2]) / 2**0.5
    kl = (p * np.log(p / (np.exp(s) / np.exp(s).sum()))).sum()
    np.testing.assert_allclose(
        sown["losses"]["selection"][0], 0.5 * (0 + 0 + kl + kl) / 4, rtol=1e-5
    )


@pytest.mark.parametrize("detached", [False, True])
def test_a_detached_loss_leaves_the_model_alone(detached):
    selector = selectors.make("auxiliary", BLOCKS, detached=detached)
    x, q, k = (jax.random.normal(jax.random.key(i), (1, 16, 1, 4)) for i in range(3))
    params = selector.init(jax.random.key(3), x[:, :, 0], q, k)["params"]

    def loss(params, x, q, k):
        _, sown = selector.apply({"params": params}, x[:, :, 0], q, k, mutable=["losses"])
        return sown["losses"]["selection"][0]

    own, *of_model = jax.grad(loss, argnums=(0, 1, 2, 3))(params, x, q, k)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(own))
    assert [bool(jnp.abs(leaf).max() > 0) for leaf in of_model] == [not detached, False, False]


def test_what_cannot_be_chosen_from_is_refused():
    q = jnp.zeros((1, 8, 1, 2))
    with pytest.raises(ValueError, match=r"selector='quests' must be one of .*'quest'"):
        selectors.make("quests", BLOCKS)
    with pytest.raises(ValueError, match="num_local_blocks=0 must be at least 1"):
        selectors.make("quest", NSAConfig(num_local_blocks=0)).apply({}, q[:, :, 0], q, q)
    with pytest.raises(ValueError, match="select_block_size=4 must be 1"):
        selectors.make("h2o", BLOCKS).apply({}, q[:, :, 0], q, q)
