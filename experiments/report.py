"""From the files of a suite's runs to tables and verdicts; nothing is computed anew.

A folder of results has

    suite.json     what was asked: hypothesis, claims, the variants' order, the command
    made_by.json   versions, devices and commits; each variant's parameters and the runs' seconds
    runs.csv       variant, seed, metric, value: every number that was measured
    curves.csv     variant, seed, step, loss: of the updates
    arrays.npz     what figures need beside, as variant/seed/name
    summary.csv    variant, metric, mean, std, seeds
    verdict.json   of each claim and of the hypothesis
    summary.md     the table of the primary metric, and the verdict
"""

import csv
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nsa_jax.training.workdir import read_run

HOLDS, FAILS, OPEN = "holds", "does not hold", "not resolved"


def collect(folder: Path, asked: Mapping[str, Any]) -> Path:
    """Gathers the finished runs of a suite's folder in few files; returns the folder of results.

    Args:
      folder: holds VARIANT/seed_SEED/run.json, metrics.jsonl and perhaps arrays.npz.
      asked: becomes suite.json.
    """
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    runs, curves, arrays, records = [], [], {}, {}
    for variant in asked["variants"]:
        for seed in asked["seeds"]:
            run = folder / variant / f"seed_{seed}"
            record = read_run(run)
            if record is None or "result" not in record:
                continue
            records.setdefault(variant, []).append(record)
            measured = record["result"]["measured"]
            runs += [(variant, seed, name, value) for name, value in measured.items()]
            rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            curves += [(variant, seed, row["step"], row["loss"]) for row in rows]
            if (run / "arrays.npz").exists():
                with np.load(run / "arrays.npz") as found:
                    arrays |= {f"{variant}/{seed}/{name}": found[name] for name in found.files}
    (results / "suite.json").write_text(json.dumps(asked, indent=2) + "\n")
    (results / "made_by.json").write_text(json.dumps(_made_by(records), indent=2) + "\n")
    _write_csv(results / "runs.csv", ("variant", "seed", "metric", "value"), runs)
    _write_csv(results / "curves.csv", ("variant", "seed", "step", "loss"), curves)
    if arrays:
        np.savez_compressed(results / "arrays.npz", **arrays)
    return results


def _made_by(records: Mapping[str, list[dict]]) -> dict[str, Any]:
    """What made the numbers, once where runs agree; of a run, the start that finished it."""
    starts = [record["starts"][-1] for variant in records.values() for record in variant]
    environments = []
    for start in starts:
        found = {name: start[name] for name in ("versions", "devices", "git")}
        if found not in environments:
            environments.append(found)
    variants = {}
    for variant, finished in records.items():
        seconds = [record["result"]["seconds"] for record in finished]
        start = finished[-1]["starts"][-1]
        variants[variant] = {
            "parameter_count": start["parameter_count"],
            "implementation": {name: x["chosen"] for name, x in start["implementation"].items()},
            "seconds": [round(sum(parts.values()), 1) for parts in seconds],
        }
    return {"environments": environments, "variants": variants}


def read(results: Path) -> dict[tuple[str, str], dict[int, float]]:
    """Returns runs.csv: (variant, metric) -> seed -> value."""
    values = {}
    with (results / "runs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["variant"], row["metric"]
            values.setdefault(key, {})[int(row["seed"])] = float(row["value"])
    return values


def number(name: str, asked: Mapping[str, Any]) -> tuple[str, str]:
    """The variant and the metric that a claim means by "variant" or "variant:metric"."""
    variant, _, metric = name.partition(":")
    return variant, metric or asked["metric"]


def mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """The mean and the standard deviation of a sample (n - 1); NaN for the latter of one value."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def judge(better: Iterable[float], worse: Iterable[float], larger_is_better: bool) -> dict:
    """Whether one number is better than another, beyond what seeds do.

    The gap of the means must exceed twice the larger one of the two standard deviations over seeds;
    a gap that does so the other way round refutes the claim. One seed resolves nothing.

    Returns:
      verdict: `HOLDS`, `FAILS` or `OPEN`; gap: of the means, positive if the claim points the right
      way; std: the larger one, None with one seed.
    """
    (mean_better, std_better), (mean_worse, std_worse) = map(mean_and_std, (better, worse))
    gap = (mean_better - mean_worse) * (1 if larger_is_better else -1)
    if math.isnan(std_better) or math.isnan(std_worse):
        return {"verdict": OPEN, "gap": gap, "std": None}
    std = max(std_better, std_worse)
    verdict = OPEN if abs(gap) <= 2 * std else HOLDS if gap > 0 else FAILS
    return {"verdict": verdict, "gap": gap, "std": std}


def verdicts(values: Mapping, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Judges the claims of a suite, and by them its hypothesis.

    It holds if all claims do, does not if one is refuted, and else is not resolved; a claim of
    which a number is missing is not resolved.
    """
    claims = []
    for claim in asked["claims"]:
        sides = [
            values.get(number(claim[side], asked), {}).values() for side in ("better", "worse")
        ]
        judged = {"verdict": OPEN, "gap": None, "std": None}
        if all(sides):
            judged = judge(*sides, asked["larger_is_better"])
        claims.append(claim | judged)
    found = {claim["verdict"] for claim in claims}
    verdict = FAILS if FAILS in found else HOLDS if found == {HOLDS} else OPEN
    return {"hypothesis": asked["hypothesis"], "verdict": verdict, "claims": claims}


def summarise(results: Path) -> dict[str, Any]:
    """Writes summary.csv, verdict.json and summary.md from suite.json and runs.csv.

    Returns:
      What verdict.json says.
    """
    asked = json.loads((results / "suite.json").read_text())
    values = read(results)
    rows = [
        (variant, metric, *mean_and_std(seeds.values()), len(seeds))
        for (variant, metric), seeds in values.items()
    ]
    _write_csv(results / "summary.csv", ("variant", "metric", "mean", "std", "seeds"), rows)
    judged = verdicts(values, asked)
    (results / "verdict.json").write_text(json.dumps(judged, indent=2) + "\n")
    (results / "summary.md").write_text("\n".join(_markdown(asked, values, judged)) + "\n")
    return judged


def _markdown(asked, values, judged) -> list[str]:
    """The lines of summary.md: a table with a row a variant and a column a metric."""
    metrics = list(dict.fromkeys(metric for _, metric in values))
    metrics.sort(key=lambda metric: metric != asked["metric"])
    lines = [
        f"# {asked['name']} at scale {asked['scale']}",
        "",
        asked["hypothesis"],
        "",
        f"Seeds {', '.join(map(str, asked['seeds']))}; mean ± standard deviation. "
        f"Primary metric: {asked['metric']}. Command: `{asked['command']}`.",
        "",
        f"| variant | {' | '.join(metrics)} |",
        "|---|" + "--:|" * len(metrics),
    ]
    for variant in asked["variants"]:
        cells = [_cell(values.get((variant, metric), {})) for metric in metrics]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    if missing := _missing(asked, values):
        lines += ["", f"Not run: {'; '.join(missing)}."]
    lines += ["", f"Hypothesis: **{judged['verdict']}**.", ""]
    for claim in judged["claims"]:
        gap = "" if claim["gap"] is None else f", gap {claim['gap']:+.4f}"
        std = "" if claim["std"] is None else f", standard deviation {claim['std']:.4f}"
        lines.append(
            f"- {claim['better']} better than {claim['worse']}: {claim['verdict']}{gap}{std}"
        )
    return lines


def _missing(asked, values) -> list[str]:
    """What of variants and seeds has no number."""
    found = {(variant, seed) for (variant, _), seeds in values.items() for seed in seeds}
    absent = {}
    for variant in asked["variants"]:
        for seed in asked["seeds"]:
            if (variant, seed) not in found:
                absent.setdefault(variant, []).append(str(seed))
    return [f"{variant} with seed {', '.join(seeds)}" for variant, seeds in absent.items()]


def _cell(seeds: Mapping[int, float]) -> str:
    if not seeds:
        return ""
    mean, std = mean_and_std(seeds.values())
    return f"{mean:.4f}" if math.isnan(std) else f"{mean:.4f} ± {std:.4f}"


def _write_csv(path: Path, header, rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
