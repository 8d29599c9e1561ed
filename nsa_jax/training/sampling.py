"""Text from a model, by running it again over the whole prefix for each new byte."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax.model import Transformer
from nsa_jax.training.data import BOS
from nsa_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The sample at the end of a run; configs/default.py explains each value.

    Raises:
      ValueError: if a value is out of range.
    """

    prompt: str
    length: int
    temperature: float

    def __post_init__(self):
        if self.length < 0:
            raise ValueError(f"length={self.length} must be 0 (no sample) or more")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (most probable) or more")
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt={self.prompt!r} cannot be encoded as UTF-8") from error


def sample(model: Transformer, params: Any, config: SampleConfig, key: Array) -> bytes:
    """Continues the prompt as the start of a document.

    The buffer has one fixed shape, the prompt and the sample rounded up to whole selection blocks,
    so that one compilation serves every position. Each byte costs a forward pass over it.

    Args:
      model: the model.
      params: its parameters.
      config: the prompt, how many bytes to add, and the temperature.
      key: random key; the same key gives the same bytes.

    Returns:
      The new bytes, without the prompt.
    """
    start = [BOS, *config.prompt.encode()]
    block = model.config.nsa.select_block_size
    tokens = np.zeros((1, -(-(len(start) + config.length) // block) * block), np.int32)
    tokens[0, : len(start)] = start
    end = len(start) + config.length
    filled = _fill(model, params, tokens, len(start), end, config.temperature, key)
    return bytes(np.asarray(filled)[0, len(start) : end].astype(np.uint8))


@partial(jax.jit, static_argnums=0)
def _fill(
    model: Transformer, params: Any, tokens: Array, start: int, end: int, temperature: float, key
) -> Array:
    """Returns int32 [1, T] with the positions from start to end drawn one after the other."""

    def draw(position: Array, tokens: Array) -> Array:
        logits = model.apply({"params": params}, tokens)[0, position - 1]
        logits = logits.at[BOS].set(-jnp.inf)  # a sample is one document
        scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
        drawn = jax.random.categorical(jax.random.fold_in(key, position), scaled)
        chosen = jnp.where(temperature > 0, drawn, jnp.argmax(logits))
        return tokens.at[0, position].set(chosen.astype(tokens.dtype))

    return jax.lax.fori_loop(start, end, draw, tokens)
