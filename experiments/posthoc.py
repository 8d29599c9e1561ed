"""A dense model made sparse after its training, as in the paper's Table 2."""

import dataclasses

from experiments import measures, selectors
from experiments.training import Trained
from nsa_jax import NSAConfig
from nsa_jax.model import Transformer

# Table 2 gives every method 2560 tokens, the first 128 and the last 512 among them.
_POSTHOC_INITIAL, _POSTHOC_LOCAL = 128 / 2560, 512 / 2560
# By the name of the method: the selector, and whether it chooses blocks (else single tokens).
POSTHOC = {
    "h2o": ("h2o", False),
    "static": ("static", False),
    "infllm": ("infllm", True),
    "quest": ("quest", True),
    "clusters": ("clusters", False),
    "exact_top": ("oracle", False),
}


def token_budget(nsa: NSAConfig) -> int:
    """The tokens that a query of NSA attends one by one, n l' + w.

    The paper's 2560 count its compressed keys too. At the lengths of these suites they are nearly
    as many as the tokens, and would leave nothing to choose.
    """
    return nsa.num_selected_blocks * nsa.select_block_size + nsa.window_size


def posthoc(trained: Trained) -> dict[str, float]:
    """Accuracy and loss of a dense model made sparse after its training, by each of `POSTHOC`.

    Each query attends `token_budget` tokens, in whole blocks of NSA's l' where the method chooses
    blocks. Shares of initial and local tokens are those of the paper's Table 2.
    """
    nsa = trained.run.model.nsa
    if trained.run.model.attention != "dense":
        return {}
    budget = token_budget(nsa)
    found: dict[str, float] = {"token_budget": budget}
    for method, (name, in_blocks) in POSTHOC.items():
        size = nsa.select_block_size if in_blocks else 1
        tokens = max(budget // size, 3)
        geometry = NSAConfig(
            compress_block_size=size,
            compress_stride=size,
            select_block_size=size,
            num_selected_blocks=tokens,
            num_initial_blocks=max(round(tokens * _POSTHOC_INITIAL), 1),
            num_local_blocks=max(round(tokens * _POSTHOC_LOCAL), 1),
        )
        selector = selectors.make(name, geometry)
        # Kernels are made for blocks of many tokens, and few of them.
        config = dataclasses.replace(trained.model.config, selector=selector, implementation="xla")
        sparse = Transformer(config)
        measured = measures.validation(trained._replace(model=sparse))
        found |= {f"{metric}_{method}": measured[metric] for metric in ("accuracy", "loss")}
    return found
