import jax
import numpy as np

from nsa_jax.training import seeds


def test_streams_differ_by_name_and_by_seed_and_stay_as_they_are():
    # Literal values: a change of the derivation would change every recorded run.
    assert seeds.stream_seed(0, "parameters") == 787213711
    assert seeds.stream_seed(0, "data") == 171566453
    drawn = {seeds.stream_seed(seed, name) for seed in range(50) for name in ("data", "dropout")}
    assert len(drawn) == 100
    assert all(0 <= seed < 2**31 for seed in drawn)


def test_a_key_is_that_of_the_streams_seed():
    key = seeds.stream_key(3, "dropout")
    np.testing.assert_array_equal(
        jax.random.key_data(key),
        jax.random.key_data(jax.random.key(seeds.stream_seed(3, "dropout"))),
    )
