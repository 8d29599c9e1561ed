"""The two pictures of a run: its loss, and what its sparse attention chose."""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nsa_jax import determinism
from nsa_jax.config import BRANCHES
from nsa_jax.model import Transformer, layer_intermediates


def missing() -> str | None:
    """Returns why no figures can be drawn, None if they can; said before a run, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        return (
            "matplotlib is not installed (pip install 'nsa-jax[plots]'): no figures will be drawn"
        )
    return None


def draw_loss(rows: list[dict[str, Any]], baseline: float | None, path: Path) -> None:
    """Draws bits per byte of training and validation over the updates.

    Args:
      rows: of metrics.jsonl.
      baseline: bits per byte of the 3-gram model, None if there is none.
      path: of the PNG file.
    """
    figure, (axes,) = _figure(7, 1)
    for kind, style in (("train", {"linewidth": 1}), ("validation", {"marker": "o"})):
        # A run that stopped at a loss that is not finite wrote its last rows late, and a null.
        points = sorted(
            (row["step"], row["bits_per_byte"])
            for row in rows
            if row["kind"] == kind and row["bits_per_byte"] is not None
        )
        if points:
            axes.plot(*zip(*points, strict=True), label=kind, **style)
    if baseline is not None:
        axes.axhline(baseline, color="0.4", linestyle="--", label="interpolated 3-gram")
    axes.set(xlabel="update", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path)


def attention_record(model: Transformer, params: Any, batch: dict) -> dict[str, np.ndarray]:
    """Runs the model over the first row of a batch and returns what its attention chose.

    Args:
      model: a model of attention "nsa".
      params: its parameters.
      batch: this process's share of a batch.

    Returns:
      block_indices: int32 [layers, T, K, n], -1 where there is no block.
      gates: float32 [layers, T, N, 3].
    """
    apply = determinism.jit(partial(model.apply, mutable=["intermediates"]))
    _, variables = apply(
        {"params": params}, batch["tokens"][:1], document_starts=batch["document_starts"][:1]
    )
    return {
        name: np.asarray(layer_intermediates(variables["intermediates"], name))[:, 0]
        for name in ("block_indices", "gates")
    }


def selection_share(block_indices: np.ndarray, block_size: int) -> np.ndarray:
    """Returns for each block of queries the share of its queries that selected each block.

    Args:
      block_indices: int32 [T, K, n], -1 where there is no block.
      block_size: l', of the blocks of queries too.

    Returns:
      float64 [query blocks, selection blocks], the mean over queries and groups.
    """
    length, groups, _ = block_indices.shape
    blocks = -(-length // block_size)
    query, group, place = np.nonzero(block_indices >= 0)
    counts = np.zeros((blocks, blocks))
    np.add.at(counts, (query // block_size, block_indices[query, group, place]), 1)
    queries = np.minimum(block_size, length - block_size * np.arange(blocks))
    return counts / (queries * groups)[:, None]


def draw_selection(record: dict[str, np.ndarray], block_size: int, path: Path) -> None:
    """Draws what the queries of the middle layer chose, beside the mean gates over depth.

    Args:
      record: from `attention_record`.
      block_size: l'.
      path: of the PNG file.
    """
    layers = record["gates"].shape[0]
    layer = layers // 2
    figure, (left, right) = _figure(11, 2)
    share = selection_share(record["block_indices"][layer], block_size)
    image = left.imshow(share, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=left, label="share of queries that selected it")
    left.set(
        title=f"layer {layer + 1} of {layers}, one row of the validation set",
        xlabel=f"selection block ({block_size} tokens)",
        ylabel=f"query block ({block_size} tokens)",
    )
    means = record["gates"].mean(axis=(1, 2))
    for branch, name in enumerate(BRANCHES):
        right.plot(np.arange(1, layers + 1), means[:, branch], marker="o", label=name)
    right.set(title="mean gates", xlabel="layer", ylabel="gate", ylim=(0, 1))
    right.set_xticks(np.arange(1, layers + 1))
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(path)


def _figure(width: float, columns: int):
    # Figure alone, without pyplot: draws to files only and leaves no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), dpi=150, layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]
