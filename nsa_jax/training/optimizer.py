"""AdamW with warm-up, cosine decay, clipping, and weight decay on matrices alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

# The parameters of a Flax layer that are matrices by name. Everything else (norm scales, biases,
# learned positions) is left undecayed. Names decide and not the number of dimensions: stacked by
# a scan over layers, a norm scale has two dimensions and a bias of a head-wise projection three.
DECAYED = ("kernel", "embedding")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; configs/default.py explains each value.

    Raises:
      ValueError: if a value is out of range.
    """

    learning_rate: float
    final_fraction: float
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    clip_norm: float
    accumulate: int

    def __post_init__(self):
        ranges = {
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "final_fraction": (0 <= self.final_fraction <= 1, "between 0 and 1"),
            "warmup_steps": (self.warmup_steps >= 0, "0 or more"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "beta1": (0 <= self.beta1 < 1, "at least 0 and below 1"),
            "beta2": (0 <= self.beta2 < 1, "at least 0 and below 1"),
            "epsilon": (self.epsilon > 0, "above 0"),
            "clip_norm": (self.clip_norm >= 0, "0 (no clipping) or more"),
            "accumulate": (self.accumulate >= 1, "at least 1"),
        }
        for name, (fits, allowed) in ranges.items():
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)} must be {allowed}")


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """Returns the learning rate as a function of the updates already made.

    Update number u (counted from 1) of `steps` has the rate peak * u / warmup_steps up to
    u = warmup_steps, then half a cosine down to peak * final_fraction at u = steps. No update is
    spent at a rate of 0.
    """
    peak = config.learning_rate
    decay = optax.cosine_decay_schedule(
        peak, max(steps - config.warmup_steps, 1), alpha=config.final_fraction
    )
    if config.warmup_steps == 0:
        return lambda updates: decay(updates + 1)
    rise = optax.linear_schedule(0.0, peak, config.warmup_steps)
    joined = optax.join_schedules([rise, decay], [config.warmup_steps])
    return lambda updates: joined(updates + 1)


def decay_mask(params: Any) -> Any:
    """Returns a tree of booleans like `params`: True where weight decay applies."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _leaf_name(path) in DECAYED, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns the Optax transformation: global-norm clipping, then AdamW.

    Gradient accumulation is the train step's work (`steps.make_train_step`): what arrives here is
    the gradient of the whole batch.
    """
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def _leaf_name(path: tuple) -> str:
    return str(getattr(path[-1], "key", path[-1]))
