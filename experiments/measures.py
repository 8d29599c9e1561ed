"""What is measured on a finished model; each function returns numbers, and arrays for figures.

A measure takes a `Trained` and returns a dictionary. Numbers go into run.json and the tables, NumPy
arrays into arrays.npz. Losses are in nats a target, everything else is a share from 0 to 1.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.selectors.base import full_attention_mass
from experiments.training import Trained
from nsa_jax import determinism
from nsa_jax.config import BRANCHES
from nsa_jax.model import Transformer, layer_intermediates
from nsa_jax.training import tasks


class Guesses(NamedTuple):
    """A batch and what the model made of each of its positions.

    Attributes:
      batch: tokens, targets, weights, document_starts [B, T].
      nats: -log p(target), float32 [B, T].
      right: whether the most probable token was the target, bool [B, T].
    """

    batch: dict[str, np.ndarray]
    nats: np.ndarray
    right: np.ndarray


def guesses(model: Transformer, params: Any, batches) -> Iterator[Guesses]:
    """Yields the model's guesses, batch by batch."""
    for batch in batches:
        nats, right = _guess(model, params, batch)
        yield Guesses(batch, np.asarray(nats, np.float64), np.asarray(right))


@functools.partial(determinism.jit, static_argnums=0)
def _guess(model, params, batch):
    logits = model.apply(
        {"params": params}, batch["tokens"], document_starts=batch["document_starts"]
    )
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return nats, jnp.argmax(logits, axis=-1) == batch["targets"]


def validation(trained: Trained) -> dict[str, float]:
    """Loss and accuracy on the whole validation set, and the loss late in the documents.

    loss_last_quarter counts the positions from 3/4 seq_len on in their document alone, which have
    the longest past; it is left out where no document is that long.
    """
    late = 3 * trained.run.data.seq_len // 4
    totals = np.zeros(5)
    for batch, nats, right in guesses(trained.model, trained.params, trained.pipeline.validation):
        weights = batch["weights"]
        position = np.arange(weights.shape[1]) - batch["document_starts"]
        tail = weights * (position >= late)
        totals += [
            (weights * nats).sum(),
            (weights * right).sum(),
            weights.sum(),
            (tail * nats).sum(),
            tail.sum(),
        ]
    nats, right, count, tail_nats, tail_count = totals.tolist()
    found = {"loss": nats / count, "accuracy": right / count}
    if tail_count:
        found["loss_last_quarter"] = tail_nats / tail_count
    return found


def answers(tokens: np.ndarray, weights: np.ndarray, pair_tokens: int) -> np.ndarray:
    """Where the value stands that each query of a "recall" row asks for.

    Args:
      tokens: one row, [T].
      weights: 1 at the last token of each query, [T].
      pair_tokens: tokens in a pair.

    Returns:
      int64 [T], the position; -1 where nothing is asked.
    """
    found = np.full(len(tokens), -1)
    for query in np.flatnonzero(weights):
        if pair_tokens == 1:
            key = tokens[query] - tasks.FUSED_QUERIES.start
            context = tokens[: np.flatnonzero(weights)[0]]
            found[query] = np.flatnonzero(context // tasks.FUSED_VALUES == key)[0]
            continue
        width = pair_tokens - 1
        windows = np.lib.stride_tricks.sliding_window_view(tokens, width)
        key = tokens[query - width + 1 : query + 1]
        found[query] = np.flatnonzero((windows == key).all(axis=1))[0] + width
    return found


def selection(trained: Trained) -> dict[str, float]:
    """How good the choice of blocks is, of a model with a selected branch, on "recall" rows.

    hit_rate: the share of queries whose chosen blocks, in a group's mean, hold the value that is
    asked for; of the layer where it is highest. mass: the share of what full attention with the
    same queries and keys would give to all tokens that the chosen blocks hold, in the mean over
    queries, groups and layers. Both count queries for a value alone.
    """
    model = trained.run.model
    if model.attention != "nsa" or "selected" not in model.nsa.branches:
        return {}
    size = model.nsa.select_block_size
    hits, masses, count = 0.0, 0.0, 0.0
    for batch in trained.pipeline.validation:
        chosen, mass = _chosen(trained.model, trained.params, batch)
        weights, pair_tokens = batch["weights"], trained.run.data.task_pair_tokens
        rows = zip(batch["tokens"], weights, strict=True)
        block = np.stack([answers(*row, pair_tokens) for row in rows]) // size
        hit = (np.asarray(chosen) == block[None, :, :, None, None]).any(axis=-1).mean(axis=-1)
        hits += (hit * weights).sum(axis=(1, 2))
        masses += (np.asarray(mass) * weights).sum(axis=(1, 2))
        count += weights.sum()
    layers = {f"hit_rate_layer_{i + 1}": rate for i, rate in enumerate((hits / count).tolist())}
    return {
        "hit_rate": float((hits / count).max()),
        "mass": float((masses / count).mean()),
        **(layers if len(layers) > 1 else {}),
    }


@functools.partial(determinism.jit, static_argnums=0)
def _chosen(model, params, batch):
    """The chosen blocks [layers, B, T, K, n], and the mass in them [layers, B, T]."""
    sown = _sown(model, params, batch)
    size = model.config.nsa.select_block_size

    def mass_in(layer):
        chosen, q, k = layer
        mass = full_attention_mass(q, k, batch["document_starts"], size)
        share = mass / (q.shape[2] // k.shape[2])
        inside = jnp.take_along_axis(share, jnp.maximum(chosen, 0), axis=-1)
        return jnp.where(chosen >= 0, inside, 0.0).sum(axis=-1).mean(axis=-1)

    chosen = layer_intermediates(sown, "block_indices")
    q, k = (layer_intermediates(sown, name) for name in ("queries", "keys"))
    return chosen, jax.lax.map(mass_in, (chosen, q, k))


def _sown(model: Transformer, params: Any, batch: dict) -> dict:
    """Everything that the layers sow for a batch; see `nsa_jax.model.layer_intermediates`."""
    _, variables = model.apply(
        {"params": params},
        batch["tokens"],
        document_starts=batch["document_starts"],
        mutable=["intermediates"],
    )
    return variables["intermediates"]


intermediates = determinism.jit(_sown, static_argnums=0)


def gates(trained: Trained) -> dict[str, float]:
    """The mean gate of each branch over layers, heads and the first validation batch."""
    if trained.run.model.attention != "nsa":
        return {}
    means = _mean_gates(trained.model, trained.params, trained.pipeline.validation[0])
    return {f"gate_{name}": float(x) for name, x in zip(BRANCHES, means, strict=True)}


@functools.partial(determinism.jit, static_argnums=0)
def _mean_gates(model, params, batch):
    sown = _sown(model, params, batch)
    return layer_intermediates(sown, "gates").mean(axis=(0, 1, 2, 3))


# The depths of the paper's Figure 5, 0, 11, ..., 100 %.
NEEDLE_DEPTHS = tuple(i / 9 for i in range(10))
NEEDLE_LENGTHS = (1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2)  # of the trained length
NEEDLE_ROWS = 32  # of a cell


def needle(trained: Trained) -> dict[str, Any]:
    """The share of needles found by depth and length, up to twice the trained length.

    accuracy is the mean over the grid up to the trained length, accuracy_beyond the mean over the
    longer rows. The grid is one array [lengths, depths].
    """
    trained_length, size = trained.run.data.seq_len, trained.run.model.nsa.select_block_size
    lengths = [max(round(f * trained_length / size), 1) * size for f in NEEDLE_LENGTHS]
    grid = np.zeros((len(lengths), len(NEEDLE_DEPTHS)))
    for i, length in enumerate(lengths):
        for j, depth in enumerate(NEEDLE_DEPTHS):
            stream = 3 + i * len(NEEDLE_DEPTHS) + j  # those before it are the pipeline's
            rows = [
                tasks.needle_row(
                    np.random.default_rng([trained.run.seed, stream, row]), length, depth=depth
                )
                for row in range(NEEDLE_ROWS)
            ]
            batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
            _, right = _guess(trained.model, trained.params, batch)
            grid[i, j] = np.asarray(right)[:, -1].mean()
    known = np.array(lengths) <= trained_length
    return {
        "accuracy": float(grid[known].mean()),
        "accuracy_worst_cell": float(grid[known].min()),
        "accuracy_beyond": float(grid[~known].mean()),
        "needle_grid": grid,
        "needle_lengths": np.array(lengths),
        "needle_depths": np.array(NEEDLE_DEPTHS),
    }
