"""What a finished model writes, and how text of a model is shown."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from nsa_jax import decoding
from nsa_jax.decoding import Sampling
from nsa_jax.model import Transformer
from nsa_jax.training.data import BOS


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


def stream(
    model: Transformer,
    params: Any,
    prompt: bytes,
    length: int,
    *,
    sampling: Sampling,
    seed: int,
    stop: Sequence[bytes] = (),
    capacity: int | None = None,
) -> Iterator[bytes]:
    """Continues a prompt as the start of a document, byte by byte.

    Args:
      model: of bytes.
      params: its parameters.
      prompt: may be empty.
      length: bytes to add at most.
      sampling: how bytes are drawn.
      seed: the same seed gives the same bytes.
      stop: what ends the text; part of it.
      capacity: see `nsa_jax.decoding.stream`.

    Raises:
      ValueError: as `nsa_jax.decoding.stream`.
    """
    steps = decoding.stream(
        model,
        params,
        [[BOS, *prompt]],
        max_new_tokens=length,
        sampling=sampling,
        stop=stop,
        forbidden=[BOS],  # it is one document
        seed=seed,
        capacity=capacity,
    )
    return (bytes(step) for step in steps)


def sample(model: Transformer, params: Any, config: SampleConfig, seed: int) -> bytes:
    """The new bytes of a sample, without the prompt."""
    sampling = Sampling(temperature=config.temperature)
    prompt = config.prompt.encode()
    return b"".join(stream(model, params, prompt, config.length, sampling=sampling, seed=seed))


def shown(text: str) -> str:
    """Returns a model's text with escapes for what a terminal might obey instead of showing."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
