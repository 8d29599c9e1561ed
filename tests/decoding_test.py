"""Drawing tokens by hand, and generation against the model run over everything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import decoding
from nsa_jax.decoding import Sampling
from nsa_jax.model import Transformer
from tests import tiny_model

CONFIG = dataclasses.replace(tiny_model.CONFIG, vocab_size=257, scan_layers=True)
MODEL = Transformer(CONFIG)
apply = jax.jit(MODEL.apply)
PROMPTS = [b"the quick brown fox jumps over the lazy dog", b"a", b"to be, or not to be"]


@pytest.fixture(scope="module")
def params():
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return jax.tree.map(lambda x: 3 * x, params)  # opinions strong enough to differ by position


def draws(logits, count=2000, temperature=1.0, top_k=0, top_p=1.0):
    """How often each token is drawn."""
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    keys = jax.random.split(jax.random.key(0), count)
    return np.bincount(decoding.draw(logits, keys, temperature, top_k, top_p), minlength=4) / count


def test_tokens_are_drawn_by_their_probability():
    p = np.array([0.1, 0.5, 0.15, 0.25])
    # Shares of 2000 draws: standard deviations of 0.011 at most.
    np.testing.assert_allclose(draws(np.log(p)), p, atol=0.04)
    np.testing.assert_allclose(draws(np.log(p), top_k=2), [0, 2 / 3, 0, 1 / 3], atol=0.04)
    np.testing.assert_allclose(draws(np.log(p), top_p=0.7), [0, 2 / 3, 0, 1 / 3], atol=0.04)
    np.testing.assert_allclose(draws(np.log(p), top_p=0.8)[[0, 2]], [0, 1 / 6], atol=0.04)
    # Of the two that top_k leaves, the first has 2/3.
    np.testing.assert_array_equal(draws(np.log(p), 50, top_k=2, top_p=0.6), [0, 1, 0, 0])
    np.testing.assert_array_equal(draws(np.log(p), 50, top_p=1e-6), [0, 1, 0, 0])
    sharp = p**2 / (p**2).sum()
    np.testing.assert_allclose(draws(np.log(p), temperature=0.5), sharp, atol=0.04)


def test_ties_go_to_the_lower_token():
    np.testing.assert_array_equal(draws([1, 3, 3, 0], 50, temperature=0.0), [0, 1, 0, 0])
    assert (draws([1, 3, 3, 3], 200, top_k=2) > 0).tolist() == [False, True, True, False]
    assert draws([-np.inf, 0, 0, -np.inf], 200)[[0, 3]].sum() == 0


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-38, 1e-20, 1e38, 1e39])
def test_no_temperature_is_too_far_out(temperature):
    shares = draws([0, 5, 2, -np.inf], 200, temperature)
    assert shares[3] == 0
    if temperature < 1:
        assert shares[1] == 1
    else:
        np.testing.assert_allclose(shares[:3], 1 / 3, atol=0.15)  # 4.5 standard deviations


def whole(params, sequences):
    """Logits of all positions at once, of the training forward pass."""
    tokens = np.zeros((len(sequences), 49), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = list(sequence)
    return np.asarray(apply({"params": params}, tokens))


def test_the_most_probable_tokens_are_those_of_the_whole_sequence(params):
    """Greedy, ragged, in chunks of another size than any prompt."""
    new = 6
    rows = decoding.generate(
        MODEL,
        params,
        PROMPTS,
        max_new_tokens=new,
        sampling=Sampling(temperature=0.0),
        chunk_size=16,
    )
    sequences = [[*prompt, *drawn] for prompt, drawn in zip(PROMPTS, rows, strict=True)]
    best = np.argmax(whole(params, sequences), axis=-1)
    for prompt, drawn, chosen in zip(PROMPTS, rows, best, strict=True):
        np.testing.assert_array_equal(drawn, chosen[len(prompt) - 1 : len(prompt) + new - 1])
    assert len(set(map(tuple, rows))) > 1


@pytest.mark.parametrize("chunk_size", [16, 1000])
def test_prefill_gives_the_last_logits_whatever_the_chunks(params, chunk_size):
    model, layers = decoding.unrolled(MODEL, params)
    cache = model.init_cache(3, 49)
    logits, cache = decoding.prefill(model, layers, PROMPTS, cache, chunk_size=chunk_size)
    lengths = [len(prompt) for prompt in PROMPTS]
    expected = whole(params, PROMPTS)[np.arange(3), np.array(lengths) - 1]
    np.testing.assert_allclose(logits, expected, atol=1e-4)  # of order 10
    np.testing.assert_array_equal(cache[1].length, lengths)
    with pytest.raises(ValueError, match="prompt 0 of 8 tokens and 43 before it do not fit into"):
        decoding.prefill(model, layers, [b"x" * 8, b"y", b"z"], cache)


def run(params, prompts=PROMPTS, **keywords):
    keywords = {"max_new_tokens": 6, "capacity": 49, "chunk_size": 16} | keywords
    return decoding.generate(MODEL, params, prompts, **keywords)


def test_what_is_drawn_is_a_function_of_the_seed(params):
    first, again, other = (run(params, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first == run(params, seed=5, sampling=Sampling(top_k=2**40)), "more than there are: all"
    assert first != other
    same = run(params, [b"a"] * 3, seed=5)
    assert len(set(map(tuple, same))) == 3, "rows of one prompt have streams of their own"
    # A row goes on where it was cut, with the same tokens.
    longer = [[*prompt, *row[:2]] for prompt, row in zip(PROMPTS, first, strict=True)]
    assert run(params, longer, seed=5, max_new_tokens=4) == [row[2:] for row in first]


def test_a_row_stops_by_itself(params):
    whole = run(params, seed=5)
    ending = whole[0][1:3]
    stopped = run(params, seed=5, stop=[ending])
    assert stopped[0] == whole[0][:3]
    for row, expected in zip(stopped[1:], whole[1:], strict=True):
        assert row == expected[: len(row)]
    steps = list(
        decoding.stream(
            MODEL,
            params,
            PROMPTS,
            max_new_tokens=6,
            capacity=49,
            chunk_size=16,
            seed=5,
            stop=[ending],
        )
    )
    assert [step[0] for step in steps] == [*stopped[0], *[None] * (len(steps) - 3)]
    assert len(steps) == max(map(len, stopped))


def test_forbidden_tokens_are_not_drawn(params):
    forbidden = [x for x in range(257) if x not in (65, 66)]
    assert set(np.ravel(run(params, forbidden=forbidden))) == {65, 66}


def test_nothing_new_is_nothing(params):
    assert run(params, max_new_tokens=0) == [[], [], []]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"prompts": []}, "there must be a prompt"),
        ({"prompts": [b"a", b""]}, "prompt 1 is empty"),
        ({"prompts": [[3, 257]]}, "prompt 0: token 257 must be an integer from 0 to 256"),
        ({"prompts": ["text"]}, "prompt 0: token 't' must be an integer"),
        ({"prompts": [[1.5]]}, "prompt 0: token 1.5 must be an integer"),
        (
            {"prompts": [b"a", b"x" * 59]},
            "prompt 1 of 59 tokens and 6 new ones do not fit into a cache of 64",
        ),
        ({"prompts": [b"x" * 65], "max_new_tokens": 0}, "of 65 tokens do not fit into a cache"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
        ({"seed": 0.5}, "seed=0.5 must be an integer"),
        ({"seed": 2**31}, "seed=2147483648 must be below"),
        ({"stop": [b""]}, "stop must not have an empty sequence"),
        ({"forbidden": [-1]}, "forbidden: token -1 must be an integer from 0"),
        ({"forbidden": range(257)}, "forbidden leaves no token"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"capacity": 0}, "capacity=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(keywords, message):
    params = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
    keywords = {"prompts": PROMPTS, "max_new_tokens": 6, "capacity": 64} | keywords
    with pytest.raises(ValueError, match=message):
        decoding.stream(MODEL, params, **keywords)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.5), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0)],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        Sampling(**{name: value})


def test_a_model_without_scan_is_decoded_as_it_is(params):
    model = Transformer(dataclasses.replace(CONFIG, scan_layers=False))
    assert decoding.unrolled(model, params) == (model, params)
