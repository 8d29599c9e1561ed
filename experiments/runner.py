"""One suite at one scale: its runs, each of a variant and a seed, and then the results."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import draw, processes, report, training
from experiments.suite import Scale, Suite, Variant
from experiments.suites import SUITES
from nsa_jax.training import environment, seeds
from nsa_jax.training import workdir as workdir_lib
from nsa_jax.training.workdir import Workdir

_HARDWARE = {
    "cpu": "two quiet cores and --workers=2",
    "gpu": "one H100 and --workers=4 (estimates, but for selection_text)",
}


def run_suite(
    suite: Suite,
    scale: str,
    run_seeds: list[int],
    workdir: Path,
    *,
    only: list[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    command: str = "",
    workers: int = 1,
) -> dict[str, Any]:
    """Trains and measures what is not finished yet, and writes the results.

    Args:
      suite: what to run.
      scale: one of the suite's.
      run_seeds: seeds of parameters and data.
      workdir: holds a folder for each suite and scale.
      only: names of variants; all if None.
      overrides: dotted keys of configs/default.py, put over all variants.
      command: told in the results.
      workers: processes among which the variants are shared; with 1 this one does them all.

    Returns:
      The verdicts, see `report.summarise`.

    Raises:
      ConfigError: if a configuration is wrong.
      ValueError: if there is no such variant.
      RunError: if a folder is in use or holds another run, a loss is not finite, a worker was
        killed, or the device's memory did not suffice for all workers.
    """
    at: Scale = suite.scales[scale]
    names = list(at.variants) if only is None else only
    for name in names:
        if name not in at.variants:
            raise ValueError(f"variant={name!r} must be one of {', '.join(at.variants)}")
    folder = Path(workdir).expanduser() / f"{suite.name}_{scale}"
    configs = {
        name: training.settings(at.base, variant.overrides, overrides or {})
        for name, variant in at.variants.items()
    }
    # Whatever its blocks, each variant sees the same rows.
    alignment = math.lcm(*(config["nsa"]["select_block_size"] for config in configs.values()))
    jobs = [
        _Job(suite, at.variants[name], configs[name], alignment, run_seeds, folder / name)
        for name in names
    ]
    plans = [job.plan() for job in jobs]  # whatever is wrong is known before any work starts
    if workers == 1:
        for job, plan in zip(jobs, plans, strict=True):
            _do(job, plan)
    else:
        processes.share(_do, jobs, workers)
    asked = {
        "name": suite.name,
        "scale": scale,
        "hypothesis": suite.hypothesis,
        "metric": suite.metric,
        "larger_is_better": suite.larger_is_better,
        "claims": [{"better": claim.better, "worse": claim.worse} for claim in suite.claims],
        "figures": list(suite.figures),
        "variants": names,
        "seeds": run_seeds,
        "command": command,
    }
    results = report.collect(folder, asked)
    verdicts = report.summarise(results)
    draw.all_figures(results)
    print(f"{suite.name}: {verdicts['verdict']}; written to {results}", flush=True)
    return verdicts


class _Job(NamedTuple):
    """A variant with its seeds, and the folder of their runs."""

    suite: Suite
    variant: Variant
    config: Mapping[str, Any]
    alignment: int
    seeds: list[int]
    folder: Path

    def plan(self) -> training.Plan:
        return training.Plan(self.config, self.variant, self.alignment)


def _do(job: _Job, plan: training.Plan | None = None) -> None:
    plan = plan or job.plan()
    for seed in job.seeds:
        config = {**job.config, "seed": seed, "variant": job.variant.identity()}
        config |= {"alignment": job.alignment}
        _run(job.suite, plan, config, seed, job.folder / f"seed_{seed}")


def _run(suite: Suite, plan: training.Plan, config: Mapping, seed: int, folder: Path) -> None:
    """Does one run of one seed, unless it is finished."""
    fingerprint = plan.pipeline(seed).fingerprint
    place = Workdir(folder, workdir_lib.identity(config, fingerprint, plan.parameters))
    try:
        if place.finished:
            return
        place.record_start(_facts(plan, seed))
        rows = []
        started = time.perf_counter()
        trained = plan.train(seed, lambda step, row: rows.append({"step": step, **row}))
        trained_at = time.perf_counter()
        found = {}
        for measure in suite.measures:
            found |= measure(trained)
        arrays = {name: x for name, x in found.items() if isinstance(x, np.ndarray)}
        measured = {name: x for name, x in found.items() if name not in arrays}
        if arrays:
            np.savez_compressed(folder / "arrays.npz", **arrays)
        lines = (json.dumps({"kind": "train", **row}) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text("".join(lines))
        seconds = {
            "training": round(trained_at - started, 1),  # with the compilation, in the first one
            "measuring": round(time.perf_counter() - trained_at, 1),
        }
        place.record_result({"measured": measured, "seconds": seconds})
        value = measured.get(suite.metric)
        print(
            f"{folder.parent.name}, seed {seed}: {suite.metric} "
            f"{'-' if value is None else f'{value:.4f}'}, {sum(seconds.values()):.0f} s",
            flush=True,
        )
    finally:
        place.close()


def _facts(plan: training.Plan, seed: int) -> dict[str, Any]:
    return {
        **environment.describe(),
        "implementation": plan.implementation,
        "seeds": {name: seeds.stream_seed(seed, name) for name in ("parameters", "data")},
        "parameter_count": plan.parameter_count,
    }


def listing() -> str:
    """What --list prints."""
    lines = []
    for suite in SUITES.values():
        lines.append(f"{suite.name}: {suite.hypothesis}")
        for name, scale in suite.scales.items():
            cost = f"{scale.minutes} min with three seeds on {_HARDWARE[name]}"
            lines.append(f"  {name}: {cost}, {len(scale.variants)} variants")
            lines.append(f"       {', '.join(scale.variants)}")
    return "\n".join(lines)


def parse_overrides(text: str) -> dict[str, Any]:
    """Reads "steps=3,data.name=copy": integers, numbers, true, false, and else words.

    Raises:
      ValueError: if a part has no "=".
    """
    found = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--overrides: {part!r} must be key=value")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
