"""What is special of bytes: a document's start before the prompt, and one document alone."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from nsa_jax.decoding import Sampling
from nsa_jax.ops.cache import dense_cache
from nsa_jax.training import sampling
from nsa_jax.training.data import BOS
from nsa_jax.training.sampling import SampleConfig


@dataclasses.dataclass(frozen=True)
class Alphabet:
    """A stand-in for a model: the next byte is one more, after BOS an a, and BOS is likelier."""

    config: types.SimpleNamespace = dataclasses.field(
        default_factory=lambda: types.SimpleNamespace(vocab_size=257, scan_layers=False),
        compare=False,
        hash=False,
    )

    def init_cache(self, batch_size, capacity):
        return (dense_cache(batch_size, capacity, (1, 1, 1), jnp.float32),)

    def apply(self, variables, tokens, cache, counts):
        following = jnp.where(tokens == BOS, ord("a"), tokens + 1)
        logits = jnp.where(jax.nn.one_hot(following, 257) > 0, variables["params"], 0.0)
        now = cache[0]._replace(length=cache[0].length + counts)
        return logits.at[..., BOS].set(2 * variables["params"]), (now,)


def _sample(prompt="a", length=6, temperature=0.0, sharpness=50.0, seed=0):
    config = SampleConfig(prompt=prompt, length=length, temperature=temperature)
    return sampling.sample(Alphabet(), jnp.float32(sharpness), config, seed)


def test_the_most_probable_bytes_follow_the_prompt():
    assert _sample() == b"bcdefg"
    assert _sample(prompt="xyza", length=20) == b"bcdefghijklmnopqrstu"
    assert _sample(prompt="") == b"abcdef"  # a document begins, and no second one


def test_a_sample_is_a_function_of_its_seed():
    drawn = [_sample(temperature=1.0, sharpness=1.0, length=30, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 30


def test_temperature_flattens():
    # A logit of 10 over 255 zeros has p = 0.99; at a temperature of 100 it has hardly more than the
    # others.
    assert _sample(temperature=1.0, sharpness=40.0) == b"bcdefg"
    assert _sample(temperature=100.0, sharpness=40.0) != b"bcdefg"


def test_a_stream_ends_with_what_stops_it():
    steps = sampling.stream(
        Alphabet(),
        jnp.float32(50.0),
        b"xyz",
        200,
        sampling=Sampling(temperature=0.0),
        seed=0,
        stop=[b"zz", b"\x80\x81"],
    )
    assert [next(steps) for _ in range(3)] == [b"{", b"|", b"}"]
    assert b"".join(steps) == b"~\x7f\x80\x81"


@pytest.mark.parametrize(("name", "value"), [("length", -1), ("temperature", -0.5)])
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        SampleConfig(**{"prompt": "", "length": 1, "temperature": 1.0, name: value})
