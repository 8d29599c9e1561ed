"""The runner end to end on the smallest suite, its verdicts, and the registered suites as data."""

import csv
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from matplotlib import image

from experiments import draw, measures, report, runner, training
from experiments.suite import SCALES, Claim, Scale, Suite, Variant
from experiments.suites import SUITES
from nsa_jax.training import config as config_lib
from nsa_jax.training.config import ConfigError
from nsa_jax.training.errors import RunError, WorkdirError
from nsa_jax.training.schema import flatten
from tests.training import tiny_run

TINY = flatten(tiny_run.settings(steps=3, model__attention="dense").to_dict()) | {
    "data.name": "recall",
    "data.task_pair_tokens": 1,
    "data.task_pairs": 12,
    "data.task_queries": 8,
}
TINY_CONFIG = training.settings(TINY)
SUITE = Suite(
    name="smallest",
    hypothesis="A gate helps.",
    metric="accuracy",
    larger_is_better=True,
    claims=(Claim(better="gated", worse="full"), Claim(better="gated:loss", worse="nowhere")),
    measures=(measures.validation, measures.selection),
    scales={
        "cpu": Scale(
            TINY,
            {
                "full": Variant(),
                "gated": Variant(overrides={"model.output_gate": True}),
            },
            1,
        )
    },
)


def run_smallest(workdir, seeds=(0, 1), **changes):
    return runner.run_suite(SUITE, "cpu", list(seeds), workdir, command="none", **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("suites")
    return workdir, run_smallest(workdir)


def files(workdir):
    results = workdir / "smallest_cpu" / "results"
    return {
        name: (results / name).read_text()
        for name in ("runs.csv", "curves.csv", "summary.csv", "verdict.json", "suite.json")
    }


def test_a_suite_from_end_to_end(finished):
    workdir, verdicts = finished
    folder = workdir / "smallest_cpu"
    recorded = json.loads((folder / "gated" / "seed_1" / "run.json").read_text())
    config = recorded["identity"]["config"]
    assert config["seed"] == 1
    assert config["model"]["output_gate"]
    assert config["variant"] == {"selector": None, "options": {}, "dense_share": 0}
    assert config["alignment"] == 8
    rows = (folder / "gated" / "seed_1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]
    with (folder / "results" / "summary.csv").open() as file:
        summary = {(row["variant"], row["metric"]): row for row in csv.DictReader(file)}
    made_by = json.loads((folder / "results" / "made_by.json").read_text())
    assert [made["devices"]["platform"] for made in made_by["environments"]] == ["cpu"]
    assert made_by["variants"]["gated"]["implementation"] == {"dense_attention": "xla"}
    assert len(made_by["variants"]["gated"]["seconds"]) == 2
    values = [
        json.loads((folder / "full" / f"seed_{seed}" / "run.json").read_text())["result"]
        for seed in (0, 1)
    ]
    losses = [value["measured"]["loss"] for value in values]
    assert float(summary["full", "loss"]["mean"]) == pytest.approx(np.mean(losses), rel=1e-12)
    assert float(summary["full", "loss"]["std"]) == pytest.approx(np.std(losses, ddof=1), rel=1e-9)
    assert verdicts["claims"][1]["verdict"] == report.OPEN  # there is no such variant
    assert "| gated |" in (folder / "results" / "summary.md").read_text()
    for name in ("bars", "curves"):
        assert image.imread(folder / "results" / f"{name}.png").std() > 0


def test_blocks_of_any_size_see_the_same_rows(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x" * 90)
    (tmp_path / "b.txt").write_text("y" * 45)
    made = []

    def recorded(suite, plan, config, seed, folder):
        made.append(plan.pipeline(seed))

    blocks = {str(size): Variant(overrides={"nsa.select_block_size": size}) for size in (8, 16)}
    text = TINY | {"data.name": "text", "data.path": str(tmp_path), "sample.length": 0}
    scale = Scale(text | {"data.validation_fraction": 0.5}, blocks, 1)
    monkeypatch.setattr(runner, "_run", recorded)
    suite = dataclasses.replace(SUITE, scales={"cpu": scale})
    runner.run_suite(suite, "cpu", [0], tmp_path / "runs")
    runner.run_suite(suite, "cpu", [0], tmp_path / "runs", only=["8"])
    for part in ("train", "validation"):
        rows = [getattr(pipeline, part)[0]["document_starts"] for pipeline in made]
        assert len(rows) == 3
        assert not (rows[0] % 16).any()
        np.testing.assert_array_equal(rows, [rows[0]] * 3)


def test_the_warm_up_attends_every_block():
    nsa = {"model.attention": "nsa"}
    plan = training.Plan(training.settings(TINY, nsa), Variant(selector="quest", dense_share=0.34))
    every = training.Plan(training.settings(TINY, nsa, {"nsa.num_selected_blocks": 4}), Variant())
    start = plan.untrained(0)
    tokens = start.pipeline.train[0]["tokens"]
    warm_up, whole, later = (
        jax.jit(model.apply)({"params": start.params}, tokens)
        for model in (plan.warm_up_model, every.model, plan.model)
    )
    np.testing.assert_array_equal(warm_up, whole)
    assert np.abs(warm_up - later).max() > 1e-4


def test_the_warm_up_takes_its_share_of_the_updates():
    plan = training.Plan(TINY_CONFIG, Variant(dense_share=0.34))
    update, made = plan.updates[1], []

    def counted(name):
        def run(state, batch):
            made.append(name)
            return update(state, batch)

        return run

    plan.updates = counted("warm-up"), counted("own")
    plan.train(0, lambda step, row: None)
    assert made == ["warm-up", "own", "own"]


def test_what_was_killed_goes_on_to_the_same_numbers(finished, tmp_path, monkeypatch):
    train = training.Plan.train
    calls = []

    def killed(plan, seed, tell):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(plan, seed, tell)

    monkeypatch.setattr(training.Plan, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run_smallest(tmp_path)
    run_smallest(tmp_path)
    assert calls == [0, 1, 0, 0, 1]  # what was finished is not done again
    assert files(tmp_path) == files(finished[0])  # and everything repeats to the bit


def test_workers_change_no_number(finished, tmp_path):
    run_smallest(tmp_path, workers=2)
    assert files(tmp_path) == files(finished[0])


def dies(trained):
    """A measure that one variant does not live to see the end of, and the other waits in."""
    if trained.run.model.output_gate:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return {}


def test_a_worker_that_was_killed_ends_the_others_with_a_sentence(tmp_path):
    suite = dataclasses.replace(SUITE, measures=(dies,))
    with pytest.raises(RunError, match="a worker was killed"):
        runner.run_suite(suite, "cpu", [0], tmp_path, workers=2)
    assert not multiprocessing.active_children()


def wants_too_much(trained):
    """A measure for which one variant finds no memory."""
    if trained.run.model.output_gate:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    return {"loss": 0.0}


def test_a_worker_without_memory_ends_the_others_with_a_sentence(tmp_path):
    suite = dataclasses.replace(SUITE, measures=(wants_too_much,))
    with pytest.raises(RunError, match=r"Out of memory.*fewer --workers"):
        runner.run_suite(suite, "cpu", [0], tmp_path, workers=2)


def test_another_run_in_the_same_folder_is_refused(finished):
    with pytest.raises(WorkdirError, match=r"steps: was 3, is 2"):
        run_smallest(finished[0], overrides={"steps": 2, "optimizer.warmup_steps": 1})


def test_a_summary_needs_the_files_alone(finished, tmp_path):
    results = shutil.copytree(finished[0] / "smallest_cpu" / "results", tmp_path / "copied")
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    for name in ("summary.csv", "verdict.json", "summary.md", "bars.png", "curves.png"):
        (results / name).unlink()
    with flagsaver.flagsaver():
        draw.main(flags.FLAGS(["draw", f"--results={results}"]))
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


def test_a_summary_says_what_was_not_run(finished, tmp_path):
    results = shutil.copytree(finished[0] / "smallest_cpu" / "results", tmp_path / "copied")
    asked = json.loads((results / "suite.json").read_text())
    asked |= {"seeds": [0, 1, 2, 3], "variants": ["full", "gated", "wide"]}
    (results / "suite.json").write_text(json.dumps(asked))
    report.summarise(results)
    text = (results / "summary.md").read_text()
    expected = "full with seed 2, 3; gated with seed 2, 3; wide with seed 0, 1, 2, 3"
    assert f"Not run: {expected}." in text


def test_bars_show_every_variant_and_every_number_of_a_claim(tmp_path):
    rows = ["a,0,loss,1", "a,1,loss,3", "b,0,loss,4", "b,0,loss_late,7", "b,1,loss_late,8"]
    rows += ["b,0,accuracy,0.5"]  # which no claim names
    (tmp_path / "runs.csv").write_text("\n".join(["variant,seed,metric,value", *rows]) + "\n")
    claims = [("a:loss_late", "b:loss_late"), ("b:loss_late", "a:loss")]
    claims = [{"better": better, "worse": worse} for better, worse in claims]
    asked = {"name": "", "scale": "", "metric": "loss", "variants": ["a", "b"], "claims": claims}
    (axes,) = draw.bars(tmp_path, asked).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["a", "b", "b:loss_late"]  # of a:loss_late there is no number
    assert [bar.get_width() for bar in axes.patches] == [2, 4, 7.5]
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "."]
    assert [list(seeds) for seeds in dots] == [[1, 3], [4], [7, 8]]


def test_a_command_without_a_suite_says_what_it_needs():
    # Apart from this process, whose flags other commands define as well.
    command = [sys.executable, "-m", "experiments.run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "experiments.run: --suite and --workdir are needed; --list shows the suites\n"
    )


def test_mistakes_are_sentences(tmp_path):
    with pytest.raises(ValueError, match=r"variant='gate' must be one of full, gated"):
        run_smallest(tmp_path, only=["gate"])
    with pytest.raises(ConfigError, match=r"model.num_layer: .* nearest is model.num_layers"):
        run_smallest(tmp_path, overrides={"model.num_layer": 1})
    with pytest.raises(ValueError, match="'steps' must be key=value"):
        runner.parse_overrides("steps")
    assert runner.parse_overrides("steps=3,data.name=copy,nsa.share_kv=true") == {
        "steps": 3,
        "data.name": "copy",
        "nsa.share_kv": True,
    }


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([3, 4, 5], [0, 1, 2], report.HOLDS),  # 3 apart, standard deviation 1
        ([3, 4, 5], [1, 2, 3], report.OPEN),  # twice the deviation, but not more
        ([0, 1, 2], [3, 4, 5], report.FAILS),
        ([4, 4, 4], [0, 2, 4], report.OPEN),  # the larger deviation counts
        ([9], [1], report.OPEN),
    ],
)
def test_a_verdict_needs_twice_the_deviation(better, worse, verdict):
    assert report.judge(better, worse, larger_is_better=True)["verdict"] == verdict
    assert report.judge(worse, better, larger_is_better=False)["verdict"] == verdict


def test_one_refuted_claim_refutes_the_hypothesis():
    values = {
        ("a", "loss"): {0: 1.0, 1: 1.1},
        ("b", "loss"): {0: 2.0, 1: 2.1},
        ("c", "loss"): {0: 0.0, 1: 3.0},
    }
    asked = {"hypothesis": "", "metric": "loss", "larger_is_better": False}

    def verdict(*claims):
        claims = [{"better": better, "worse": worse} for better, worse in claims]
        return report.verdicts(values, asked | {"claims": claims})["verdict"]

    assert verdict(("a", "b")) == report.HOLDS
    assert verdict(("a", "b"), ("a", "c")) == report.OPEN
    assert verdict(("b", "a"), ("a", "c")) == report.FAILS
    assert verdict(("a", "b:accuracy")) == report.OPEN


@pytest.mark.parametrize("name", SUITES)
def test_a_registered_suite_is_whole(name):
    suite = SUITES[name]
    assert suite.name == name
    assert tuple(suite.scales) == SCALES
    for scale in suite.scales.values():
        for claim in suite.claims:
            for side in (claim.better, claim.worse):
                assert side.partition(":")[0] in scale.variants
        for variant in scale.variants.values():
            config_lib.run_config(training.settings(scale.base, variant.overrides))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SUITES)
def test_sparse_and_dense_have_as_many_parameters(name, scale):
    at = SUITES[name].scales[scale]
    counts = {
        variant: training.Plan(
            training.settings(at.base, at.variants[variant].overrides), at.variants[variant]
        ).parameter_count
        for variant in at.variants
        if variant in ("nsa", "full", "full_gated")
    }
    for count in counts.values():
        assert count == pytest.approx(counts["nsa"], rel=0.0015)


def test_the_listing_names_every_suite():
    listing = runner.listing()
    assert all(f"{name}: {suite.hypothesis}" in listing for name, suite in SUITES.items())
