r"""The figures of a suite, drawn from its folder of results alone; see `experiments.report`.

    python -m experiments.draw --results=FOLDER

writes the summary, the verdict and the figures of such a folder again.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app, flags

from experiments import report

_RESULTS = flags.DEFINE_string("results", None, "folder of results to summarise and draw again")
_DPI = 130


def all_figures(results: Path) -> None:
    """Draws what every suite has, and what suite.json names beside, into the same folder."""
    asked = json.loads((results / "suite.json").read_text())
    for name in ("bars", "curves", *asked["figures"]):
        figure = FIGURES[name](results, asked)
        if figure is not None:
            figure.savefig(results / f"{name}.png")


def bars(results: Path, asked: dict):
    """Mean, standard deviation, and a dot for each seed.

    Of the primary metric of each variant, and then of the other metrics that claims compare, which
    are called as in the claim, "variant:metric".
    """
    found = report.read(results)
    claimed = (claim[side] for claim in asked["claims"] for side in ("better", "worse"))
    wanted = dict.fromkeys(report.number(name, asked) for name in (*asked["variants"], *claimed))
    values = {
        variant if metric == asked["metric"] else f"{variant}:{metric}": list(seeds.values())
        for variant, metric in wanted
        if (seeds := found.get((variant, metric)))
    }
    if not values:
        return None
    figure, axes = _figure(7, 1 + 0.3 * len(values))
    for row, seeds in enumerate(values.values()):
        mean, std = report.mean_and_std(seeds)
        error = None if np.isnan(std) else std
        axes.barh(row, mean, xerr=error, color="#9bb8d3", capsize=3)
        axes.plot(seeds, [row] * len(seeds), "k.", markersize=4)
    axes.set_yticks(range(len(values)), values)
    axes.invert_yaxis()
    if "loss" in asked["metric"]:  # the differences are small beside the loss
        every = [x for seeds in values.values() for x in seeds]
        margin = 0.2 * (max(every) - min(every)) or 0.1
        axes.set_xlim(min(every) - margin, max(every) + margin)
    axes.set(xlabel=asked["metric"], title=f"{asked['name']} ({asked['scale']})")
    axes.grid(alpha=0.3, axis="x")
    return figure


def curves(results: Path, asked: dict):
    """The training loss over the updates, in the mean over seeds."""
    points: dict[str, dict[int, list[float]]] = {}
    with (results / "curves.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            steps = points.setdefault(row["variant"], {})
            steps.setdefault(int(row["step"]), []).append(float(row["loss"]))
    if not points:
        return None
    figure, axes = _figure(7, 4.5)
    for index, (name, steps) in enumerate(points.items()):
        means = [np.mean(steps[step]) for step in sorted(steps)]
        style = ("-", "--", ":")[index // 10 % 3]  # after ten colours they come again
        axes.plot(sorted(steps), means, style, label=name, linewidth=1.2)
    axes.set(xlabel="update", ylabel="training loss (nats)", title=asked["name"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def needle(results: Path, asked: dict):
    """The share of needles found by length and depth, as the paper's Figure 5: a map a variant."""
    arrays = _arrays(results)
    shown = [
        name for name in asked["variants"] if f"{name}/{asked['seeds'][0]}/needle_grid" in arrays
    ]
    if not shown:
        return None
    figure, panels = _figure(4.2 * len(shown), 3.6, len(shown))
    for axes, name in zip(np.atleast_1d(panels), shown, strict=True):
        own = {key: x for key, x in arrays.items() if key.startswith(f"{name}/")}
        grids = [x for key, x in own.items() if key.endswith("/needle_grid")]
        lengths, depths = (
            next(x for key, x in own.items() if key.endswith(f"/needle_{what}"))
            for what in ("lengths", "depths")
        )
        image = axes.imshow(np.mean(grids, 0).T, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), lengths, rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(title=name, xlabel="tokens", ylabel="depth")
    figure.colorbar(image, ax=panels, label="needles found")
    return figure


def maps(results: Path, asked: dict):
    """Attention of the full model over blocks, and beside it the blocks that NSA chose."""
    arrays = _arrays(results)
    seed = asked["seeds"][0]
    shown = {
        f"full attention: {what}": arrays.get(f"full/{seed}/{key}")
        for what, key in (("probability", "attention_map"), ("mass of a block", "attention_blocks"))
    } | {"NSA: share of queries that chose a block": arrays.get(f"nsa/{seed}/chosen_blocks")}
    shown = {title: x for title, x in shown.items() if x is not None}
    if not shown:
        return None
    figure, panels = _figure(5 * len(shown), 4.4, len(shown))
    for axes, (title, x) in zip(np.atleast_1d(panels), shown.items(), strict=True):
        # Logarithms: most of the attention lies on few keys.
        image = axes.imshow(np.log10(x + 1e-4), aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes, label="log10", shrink=0.8)
        axes.set(title=title, xlabel="key", ylabel="query")
    return figure


def _arrays(results: Path) -> dict[str, np.ndarray]:
    path = results / "arrays.npz"
    if not path.exists():
        return {}
    with np.load(path) as found:
        return {name: found[name] for name in found.files}


def _figure(width: float, height: float, columns: int = 1):
    # Figure alone, without pyplot: draws to files only and leaves no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    return figure, figure.subplots(1, columns)


FIGURES: dict[str, Callable] = {"bars": bars, "curves": curves, "needle": needle, "maps": maps}


def main(argv):
    """Summarises and draws a folder of results."""
    if len(argv) > 1 or not _RESULTS.value:
        raise app.UsageError("name a folder of results: --results=experiments/results/recall_cpu")
    results = Path(_RESULTS.value)
    if not (results / "suite.json").exists():
        raise app.UsageError(f"--results={results}: there is no suite.json in it")
    print(report.summarise(results)["verdict"])
    all_figures(results)


if __name__ == "__main__":
    app.run(main)
