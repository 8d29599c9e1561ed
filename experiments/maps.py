"""How attention clusters by blocks, as in the paper's Figure 8."""

import collections
from typing import Any

import jax
import numpy as np

from experiments import measures
from experiments.selectors.base import attention_probabilities
from experiments.training import Trained
from nsa_jax import NSAConfig, determinism
from nsa_jax.model import layer_intermediates
from nsa_jax.training import figures
from nsa_jax.training.data import Pipeline

# MagicPIG reports that the top 20 % of the keys hold 70 % of the attention.
_TOP_SHARE = 0.2
_SHUFFLES = 8
_ROWS = 2
_QUERIES = 128
_SHOWN = 256  # more than a figure resolves, and files stay small


def maps(trained: Trained) -> dict[str, Any]:
    """How attention clusters by blocks, on rows of the validation set that a document fills.

    Of a dense model, each head by itself, for queries spread over the last half of a row and the
    keys that NSA would have to choose from (neither in its initial nor in its local blocks):

    - block_share, block_share_shuffled: the attention that the best free blocks hold, as many as
      NSA may choose, and the same after the keys were put in a random order;
    - neighbours, neighbours_shuffled: the correlation of the scores of neighbouring keys;
    - top_share: the attention that the top 20 % of all keys hold.

    Scores of an untrained model are smooth already, by their rotations and their tokens:
    block_gain, block_share less block_share_shuffled, is measured before the training too. Beside
    the numbers stand maps of the middle layer; of an NSA model the blocks that it chose there.
    """
    batch = _whole_documents(trained.pipeline)
    nsa, layer = trained.run.model.nsa, trained.run.model.num_layers // 2
    if trained.run.model.attention == "nsa":
        sown = measures.intermediates(trained.model, trained.params, batch)
        chosen = np.asarray(layer_intermediates(sown, "block_indices")[layer, 0])
        return {"chosen_blocks": figures.selection_share(chosen, nsa.select_block_size)}
    p = _probabilities(trained, trained.params, batch)
    found = clustering(p, nsa)
    before = clustering(_probabilities(trained, trained.initial_params, batch), nsa)
    heads = len(p) // trained.run.model.num_layers
    shown = p[layer * heads :][: trained.run.model.num_heads].mean(axis=0)
    blocks = shown.reshape(len(shown), -1, nsa.select_block_size).sum(axis=-1)
    return found | {
        "block_gain_untrained": before["block_gain"],
        "attention_map": _reduced(shown).astype(np.float32),
        "attention_blocks": blocks.astype(np.float32),
    }


def _reduced(attention: np.ndarray) -> np.ndarray:
    """A map of about _SHOWN rows and columns: the mean over neighbouring queries, summed keys."""
    factor = max(len(attention) // _SHOWN, 1)
    cells = -(-len(attention) // factor)
    missing = cells * factor - len(attention)
    keys = np.pad(attention, [(0, 0), (0, missing)]).reshape(len(attention), cells, factor)
    rows = np.arange(0, len(attention), factor)
    return np.add.reduceat(keys.sum(axis=-1), rows) / np.diff([*rows, len(attention)])[:, None]


_attention = determinism.jit(jax.vmap(attention_probabilities))


def _probabilities(trained: Trained, params: Any, batch: dict) -> np.ndarray:
    """Attention maps [layers * rows * heads, T, T]."""
    sown = measures.intermediates(trained.model, params, batch)
    q, k = (layer_intermediates(sown, name) for name in ("queries", "keys"))
    p = np.asarray(_attention(q, k))
    p = np.moveaxis(p, 2, -2)  # [layers, B, K, G, T, S]
    return p.reshape(-1, *p.shape[-2:])


def _whole_documents(pipeline: Pipeline) -> dict[str, np.ndarray]:
    """The first rows of the validation set that one document fills, as a batch."""
    rows = []
    for batch in pipeline.validation:
        for row in np.flatnonzero(~batch["document_starts"].any(axis=1) & batch["weights"].any(1)):
            rows.append({name: x[row] for name, x in batch.items()})
        if len(rows) >= _ROWS:
            break
    return {name: np.stack([row[name] for row in rows[:_ROWS]]) for name in rows[0]}


def clustering(p: np.ndarray, nsa: NSAConfig) -> dict[str, float]:
    """The numbers of `maps` from attention maps [heads, T, T]."""
    rng = np.random.default_rng(0)
    size, length = nsa.select_block_size, p.shape[-1]
    free_blocks = nsa.num_selected_blocks - nsa.num_initial_blocks - nsa.num_local_blocks
    totals = collections.Counter()
    start = max(length // 2, nsa.num_selected_blocks * size)  # from there on there is a choice
    queries = range(start, length, max(length // (2 * _QUERIES), 1))
    for t in queries:
        first = nsa.num_initial_blocks * size
        free = p[:, t, first : (t // size + 1 - nsa.num_local_blocks) * size]
        mass = np.maximum(free.sum(axis=-1), 1e-30)

        def share(keys):
            blocks = keys.reshape(len(keys), -1, size).sum(axis=-1)
            best = np.sort(blocks)[:, blocks.shape[1] - free_blocks :]
            return (best.sum(axis=-1) / mass).mean()

        def near(keys):
            scores = np.log(keys + 1e-30)
            left, right = (x - x.mean(-1, keepdims=True) for x in (scores[:, :-1], scores[:, 1:]))
            norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
            return ((left * right).sum(axis=-1) / np.maximum(norms, 1e-30)).mean()

        shuffled = [free[:, rng.permutation(free.shape[1])] for _ in range(_SHUFFLES)]
        top = np.sort(p[:, t, : t + 1])[:, -max(round(_TOP_SHARE * (t + 1)), 1) :]
        totals["block_share"] += share(free)
        totals["block_share_shuffled"] += np.mean([share(keys) for keys in shuffled])
        totals["neighbours"] += near(free)
        totals["neighbours_shuffled"] += np.mean([near(keys) for keys in shuffled])
        totals["top_share"] += top.sum(axis=-1).mean()
    found = {name: float(total) / len(queries) for name, total in totals.items()}
    return found | {"block_gain": found["block_share"] - found["block_share_shuffled"]}
