"""Ways to choose the blocks that a query attends, by name; each in a file of its own."""

from experiments.selectors.auxiliary import Auxiliary
from experiments.selectors.base import Selector
from experiments.selectors.clusters import Clusters
from experiments.selectors.controls import Oracle, Random, Static
from experiments.selectors.h2o import HeavyHitters
from experiments.selectors.infllm import InfLLM
from experiments.selectors.mean_keys import MeanKeys
from experiments.selectors.quest import Quest
from nsa_jax import NSAConfig

SELECTORS: dict[str, type[Selector]] = {
    "auxiliary": Auxiliary,
    "clusters": Clusters,
    "h2o": HeavyHitters,
    "infllm": InfLLM,
    "mean_keys": MeanKeys,
    "oracle": Oracle,
    "quest": Quest,
    "random": Random,
    "static": Static,
}


def make(name: str, nsa: NSAConfig, **options) -> Selector:
    """Returns the selector of that name.

    Args:
      name: one of `SELECTORS`.
      nsa: the geometry.
      **options: its own attributes.

    Raises:
      ValueError: if there is no such selector.
    """
    if name not in SELECTORS:
        raise ValueError(f"selector={name!r} must be one of {tuple(SELECTORS)}")
    return SELECTORS[name](nsa=nsa, **options)
