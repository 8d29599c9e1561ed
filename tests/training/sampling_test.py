import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from nsa_jax.training import sampling
from nsa_jax.training.data import BOS
from nsa_jax.training.sampling import SampleConfig


@dataclasses.dataclass(frozen=True)
class Alphabet:
    """A stand-in for a model: the next byte is one more, or BOS, which must not be drawn."""

    config: types.SimpleNamespace = dataclasses.field(
        default_factory=lambda: types.SimpleNamespace(
            nsa=types.SimpleNamespace(select_block_size=8)
        ),
        compare=False,
        hash=False,
    )

    def apply(self, variables, tokens):
        logits = jnp.where(jax.nn.one_hot(tokens + 1, 257) > 0, variables["params"], 0.0)
        return logits.at[..., BOS].set(2 * variables["params"])


def _sample(prompt="a", length=6, temperature=0.0, sharpness=50.0, seed=0):
    config = SampleConfig(prompt=prompt, length=length, temperature=temperature)
    return sampling.sample(Alphabet(), jnp.float32(sharpness), config, jax.random.key(seed))


def test_the_most_probable_bytes_follow_the_prompt():
    assert _sample() == b"bcdefg"
    assert _sample(prompt="xyza", length=20) == b"bcdefghijklmnopqrstu"


def test_a_sample_is_a_function_of_its_key():
    drawn = [_sample(temperature=1.0, sharpness=1.0, length=30, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 30


def test_temperature_flattens():
    # A logit of 10 over 255 zeros has p = 0.99; at a temperature of 100 it has hardly more than the
    # others.
    assert _sample(temperature=1.0, sharpness=40.0) == b"bcdefg"
    assert _sample(temperature=100.0, sharpness=40.0) != b"bcdefg"


@pytest.mark.parametrize(("name", "value"), [("length", -1), ("temperature", -0.5)])
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        SampleConfig(**{"prompt": "", "length": 1, "temperature": 1.0, name: value})
