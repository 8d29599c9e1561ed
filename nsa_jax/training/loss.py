"""Cross-entropy of the next byte, as sums that add up over microbatches, devices and batches."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import optax

from nsa_jax.typing import Array, Float, Int


class TokenSums(NamedTuple):
    """Weighted sums over tokens; two of them add up to those of both batches together."""

    nats: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]


def token_sums(
    logits: Float[Array, "B T vocab"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> TokenSums:
    """Sums the cross-entropy, the weight and the right guesses over a batch, in float32.

    Args:
      logits: any floating-point dtype; converted to float32 before the softmax.
      targets: int32 token ids.
      weights: float32, 0 where there is nothing to predict.

    Returns:
      nats: sum of weight * -log p(target).
      weight: sum of the weights.
      correct: sum of the weights where the most probable token is the target.
    """
    nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return TokenSums(
        nats=jnp.sum(nats * weights),
        weight=jnp.sum(weights),
        correct=jnp.sum(correct * weights),
    )


def bits(nats: float) -> float:
    """Converts nats to bits: nats a byte become bits per byte."""
    return nats / math.log(2)
