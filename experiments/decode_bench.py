r"""How fast is the attention of one decoding step, NSA against dense, and what does it load?

    python -m experiments.decode_bench --output=experiments/results/decode_h100

First counts the tokens that a step of NSA loads, beside the paper's Table 4. Then times the
attention of one step in bfloat16, over full caches of random data at every length and batch: "nsa"
(three branches, the choice of blocks, gates) and "nsa_xla", dense attention through cuDNN and XLA
by jax.nn.dot_product_attention, and "dense_own", the dense step of NSA's own implementation.
Projections and writes to the cache are no part of it. A time is that of one of 16 steps that run in
a row in one program, the median over samples of many such programs, after a warm-up; what XLA does
to the caches alone it may do once for all 16. Last, for `--model_batches`, a step of a whole model
of two wide layers, "model_nsa" and "model_dense": what the rest of a model leaves of the gain.

Beside each time stands the speed at which the bytes that the step must read were read, and that
speed over the bandwidth of a large copy, measured in the same run. Caches smaller than the GPU's L2
stay there from step to step. The JSON file also has the time of the smallest program, which a step
takes at least where each is called from Python, the least and the most of each time's samples, and
the reason of each empty cell, such as too little memory. Writes OUTPUT.csv and .json after each
row, and .png after each length.

The defaults are 24 caches of random data and two models. That is expected to take six minutes on an
H100, most of them for compilation; `--shapes=paper` takes half of that. `--seconds=240` begins no
other cache after so many.
"""

import importlib.util
import itertools
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import decode_cases, decode_model, timing
from nsa_jax.ops import dispatch
from tests.arg_specs import BENCHMARK

_OUTPUT = flags.DEFINE_string("output", None, "where to write, without .csv, .json and .png")
_IMPLEMENTATION = flags.DEFINE_enum(
    "implementation",
    "auto",
    [x for x in dispatch.IMPLEMENTATIONS if x != "reference"],
    "of nsa and dense_own",
)
_SHAPES = flags.DEFINE_list("shapes", ["paper", "paper_192"], f"among {', '.join(BENCHMARK)}")
_BATCHES = flags.DEFINE_list("batches", ["1", "16", "64", "128"], "rows")
_LENGTHS = flags.DEFINE_list("lengths", ["65536", "8192", "131072"], "tokens in the cache")
_MODEL_BATCHES = flags.DEFINE_list(
    "model_batches", ["1", "16"], "rows of whole models, at the first of --shapes and --lengths"
)
_SECONDS = flags.DEFINE_float(
    "seconds", None, "begin no other cache after so many; no limit by default", lower_bound=0.0
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "samples of each; the median counts", lower_bound=1)

COLUMNS = ("shape", "batch", "length", "operation", "ms", "tokens", "gb_s", "of_copy")


def write(output: Path, rows, record: dict) -> None:
    """Writes the table and the record."""
    rows = timing.rounded(rows)
    timing.write_csv(Path(f"{output}.csv"), COLUMNS, rows)
    faster = decode_cases.speedups(rows)
    everything = timing.rounded(record | {"nsa_faster_than_best_dense": faster}) | {"cases": rows}
    Path(f"{output}.json").write_text(json.dumps(everything, indent=2) + "\n")


def draw(rows, path: Path) -> None:
    """Draws for each shape times over length, at the largest batch, and NSA's gain at every one."""
    from matplotlib.figure import Figure

    faster = decode_cases.speedups(rows)
    if not faster:
        return
    figure = Figure(figsize=(11, 4 * len(faster)), dpi=150, layout="constrained")
    grid = figure.subplots(len(faster), 2, squeeze=False)
    for (shape, batches), (left, right) in zip(faster.items(), grid, strict=True):
        timed = [row for row in rows if row["shape"] == shape and "tokens" in row]
        largest = max(batches)
        for name in dict.fromkeys(row["operation"] for row in timed):
            points = sorted(
                (row["length"], row["ms"])
                for row in timed
                if (row["operation"], row["batch"]) == (name, largest)
            )
            if points:
                left.plot(*zip(*points, strict=True), marker="o", label=name)
        left.set(title=f"{shape}, batch {largest}: one step", ylabel="ms", yscale="log")
        for batch, ratios in sorted(batches.items()):
            right.plot(
                *zip(*sorted(ratios.items()), strict=True), marker="o", label=f"batch {batch}"
            )
        expected = {
            x["length"]: x["length"] / x["tokens"] for x in timed if x["operation"] == "nsa"
        }
        right.plot(
            *zip(*sorted(expected.items()), strict=True), "k--", label="tokens loaded, dense / NSA"
        )
        right.set(title=f"{shape}: best dense step over NSA's", ylabel="times as fast")
        for axes in (left, right):
            axes.set(xlabel="tokens in the cache", xscale="log")
            axes.set_xticks(list(expected), [_short(x) for x in expected])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.savefig(path)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _line(row) -> str:
    """One row as a line of the table on the screen."""
    head = f"{row['shape']:<10} {row['batch']:>5} {row['length']:>7} {row['operation']:<12}"
    if "ms" not in row:
        return f"{head} {row['reason']}"
    if "tokens" not in row:
        return f"{head} {row['ms']:>9.4f}"
    return (
        f"{head} {row['ms']:>9.4f} {row['tokens']:>8.0f} {row['gb_s']:>7.0f} {row['of_copy']:>7.2f}"
    )


def _check_flags(argv) -> None:
    """Raises UsageError for what no measurement could begin with."""
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Flags are written --name=value.")
    for name in _SHAPES.value:
        if name not in BENCHMARK:
            raise app.UsageError(f"--shapes: {name!r} is none of {', '.join(BENCHMARK)}")
    for flag, what in ((_BATCHES, "rows"), (_LENGTHS, "tokens"), (_MODEL_BATCHES, "rows")):
        for number in flag.value:
            if not number.isdigit() or int(number) < 1:
                raise app.UsageError(f"--{flag.name}: {number!r} is no number of {what}")


def _counted(implementation: str) -> list[dict]:
    """Table 4, printed."""
    table = decode_cases.table_4(implementation)
    print("tokens that a step loads, by the code's count (and by the paper's Table 4)")
    for row in table:
        print(
            f"{row['length']:>8}: {row['tokens']:>6.0f} ({row['paper_tokens']}), "
            f"{row['ratio']:.1f} ({row['paper_ratio']:.1f}) times fewer"
        )
    return table


def main(argv):
    """Measures, prints and writes."""
    # JAX reads it when the GPU is first used; its default, 0.75, is short for the largest caches.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    _check_flags(argv)
    implementation = _IMPLEMENTATION.value
    try:
        chosen, _ = dispatch.resolve("sparse_step", implementation)
    except dispatch.UnsupportedError as error:
        raise SystemExit(str(error)) from None
    limits = timing.ceilings(_REPEATS.value)
    smallest = timing.measure(jax.jit(lambda x: x + 1), (jnp.zeros(()),), _REPEATS.value)
    record = timing.hardware("experiments.decode_bench") | {
        "implementation": chosen,
        "dtype": "bfloat16",
        "ceilings": limits,
        "smallest_program_ms": smallest.median,
        "table_4": _counted(implementation),
    }
    head = f"{'shape':<10} {'batch':>5} {'length':>7} {'operation':<12}"
    print(f"{head} {'ms':>9} {'tokens':>8} {'GB/s':>7} {'/ copy':>7}", flush=True)
    rows = []
    for row in _measured(chosen, limits["copy_gb_s"]):
        rows.append(row)
        print(_line(row), flush=True)
        if _OUTPUT.value:
            write(Path(_OUTPUT.value), rows, record)
            ended = row["operation"] in ("dense_jax", "model_dense")
            if ended and importlib.util.find_spec("matplotlib"):
                draw(timing.rounded(rows), Path(f"{_OUTPUT.value}.png"))


def _measured(implementation: str, copy_gb_s: float):
    """The rows of the table, one after another, until they have taken too long."""
    start, repeats = time.monotonic(), _REPEATS.value
    lengths, batches = (tuple(map(int, flag.value)) for flag in (_LENGTHS, _BATCHES))
    attention = [("attention", *x) for x in itertools.product(_SHAPES.value, lengths, batches)]
    models = [("model", _SHAPES.value[0], lengths[0], int(x)) for x in _MODEL_BATCHES.value]
    for kind, shape, length, batch in attention + models:
        if _SECONDS.value is not None and time.monotonic() - start > _SECONDS.value:
            print(f"{shape:<10} {batch:>5} {length:>7} not begun: --seconds={_SECONDS.value:g}")
            continue
        spec = decode_cases.at(BENCHMARK[shape], batch, length)
        if kind == "model":
            rows = decode_model.measure(spec, implementation, repeats)
        else:
            rows = decode_cases.measure(spec, implementation, copy_gb_s, repeats)
        for row in rows:
            yield {"shape": shape, "batch": batch, "length": length} | row


if __name__ == "__main__":
    app.run(main)
