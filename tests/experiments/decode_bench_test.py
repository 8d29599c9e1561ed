"""The benchmark of a step end to end on a CPU at a tiny shape, and what it computes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import decode_cases, decode_model
from nsa_jax.config import NSAConfig
from tests.arg_specs import ArgSpec

ROOT = Path(__file__).resolve().parents[2]
SPEC = ArgSpec(2, 77, 6, 2, 24, 16, NSAConfig(8, 4, 16, num_selected_blocks=3, window_size=20))


def run(*arguments):
    # In a process of its own: its flags have the names of other benchmarks' flags.
    return subprocess.run(
        [sys.executable, "-m", "experiments.decode_bench", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_counts_measures_and_writes(tmp_path):
    output = tmp_path / "results" / "decode"
    where = ("--shapes=tiny", "--batches=1,2", "--lengths=64", "--model_batches=")
    done = run(*where, "--repeats=1", f"--output={output}")
    assert done.returncode == 0, done.stderr
    record = json.loads(Path(f"{output}.json").read_text())
    table = record["table_4"]
    assert [row["length"] for row in table] == [8192, 16384, 32768, 65536]
    # The last of the paper's s/d compressed entries is not complete.
    assert [row["tokens"] for row in table] == [2047, 2559, 3583, 5631]
    assert [row["paper_tokens"] for row in table] == [2048, 2560, 3584, 5632]
    assert [round(row["ratio"], 1) for row in table] == [4.0, 6.4, 9.1, 11.6]
    assert [round(row["paper_ratio"], 1) for row in table] == [4.0, 6.4, 9.1, 11.6]
    with open(f"{output}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4
    reasons = {x["operation"]: x.get("reason") for x in record["cases"]}
    for row in rows:
        if row["operation"] == "dense_cudnn":
            assert row["ms"] == ""
            assert "cuDNN needs an NVIDIA GPU" in reasons["dense_cudnn"]
        else:
            assert all(float(row[x]) > 0 for x in ("ms", "tokens", "gb_s", "of_copy"))
            assert reasons[row["operation"]] is None
    faster = record["nsa_faster_than_best_dense"]["tiny"]
    assert set(faster) == {"1", "2"}
    assert set(faster["1"]) == {"64"}
    timed = [x for x in record["cases"] if "ms" in x]
    assert all(x["least_ms"] <= x["ms"] <= x["most_ms"] for x in timed)
    assert record["smallest_program_ms"] > 0
    assert Path(f"{output}.png").exists()


def test_nothing_begins_too_late():
    where = ("--shapes=tiny", "--batches=1", "--lengths=64", "--model_batches=1")
    done = run(*where, "--repeats=1", "--seconds=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not begun: --seconds=0") == 2


def test_mistakes_are_sentences():
    done = run("--shapes=huge")
    assert "'huge' is none of paper" in done.stdout + done.stderr
    done = run("--batches=0")
    assert "--batches: '0' is no number of rows" in done.stdout + done.stderr
    done = run("--implementation=mosaic_gpu")
    assert done.returncode == 1
    assert "there is no mosaic_gpu kernel for sparse_step" in done.stderr


def test_the_dense_steps_are_the_same_attention():
    arrays = jax.jit(decode_cases.inputs(SPEC, jnp.float32))()
    steps = decode_cases.cases(SPEC, "xla")
    own, of_jax = (
        jax.jit(steps[name].function)(*(arrays[x] for x in steps[name].arguments))
        for name in ("dense_own", "dense_jax")
    )
    assert own.shape == (2, 6, 16)
    assert arrays["padded"].shape == (2, 77, 2, 24), "the keys are there once"
    np.testing.assert_allclose(own, of_jax, atol=1e-5)


def test_steps_in_a_row_do_what_one_does():
    arrays = jax.jit(decode_cases.inputs(SPEC, jnp.float32))()
    nsa = decode_cases.cases(SPEC, "xla")["nsa"]
    arguments = tuple(arrays[x] for x in nsa.arguments)
    run = jax.jit(decode_cases.in_a_row(nsa.function))
    out, blocks = run(*arguments)
    expected, expected_blocks = jax.jit(nsa.function)(*arguments)
    np.testing.assert_array_equal(blocks, expected_blocks)
    # Compiled in a loop, sums may be made in another order.
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_whole_models_step():
    sizes = {"num_layers": 1, "model_dim": 16, "mlp_dim": 8, "vocab_size": 11}
    found = list(decode_model.measure(SPEC, "xla", 1, sizes))
    assert [row["operation"] for row in found] == ["model_nsa", "model_dense"]
    assert all(row["ms"] > 0 for row in found)
    short = decode_cases.at(SPEC, 2, 32)
    for row in decode_model.measure(short, "xla", 1, sizes):
        assert row["reason"] == "a cache of 32 tokens has no room for 32 steps"


def test_another_implementation_is_timed_beside_xla():
    assert list(decode_cases.cases(SPEC, "auto"))[:2] == ["nsa", "nsa_xla"]


def test_what_a_step_must_read_by_hand():
    blocks = np.array([[[0, 3, 4], [0, 3, 4]], [[0, 4, -1], [3, 4, -1]]])
    # 18 complete blocks of 8 at stride 4 in 77 tokens, 20 of the window, 3 or 2 blocks of 16.
    assert decode_cases.loaded(SPEC, blocks) == 18 + 20 + (48 + 32) / 2
    # 2 rows, 2 groups of 78 tokens and 6 queries and outputs, of 24 + 16 features of 2 bytes.
    assert decode_cases.least_bytes(SPEC, 78, 2) == 2 * (2 * 78 + 6) * 40 * 2


def test_speedups_are_over_the_fastest_dense_step():
    def row(operation, batch=1, **result):
        return {"shape": "paper", "batch": batch, "length": 8, "operation": operation} | result

    rows = [
        *(row("nsa", ms=2.0), row("dense_own", ms=10.0), row("dense_jax", ms=6.0)),
        *(row("nsa_xla", ms=1.0), row("model_dense", ms=1.0)),
        *(row("dense_cudnn", reason="no"), row("nsa", 2, ms=1.0), row("dense_own", 2, reason="no")),
        *(row("nsa", 3, reason="no memory"), row("dense_own", 3, ms=1.0)),
    ]
    assert decode_cases.speedups(rows) == {"paper": {1: {8: 3.0}}}
