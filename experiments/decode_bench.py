r"""How fast is the attention of one decoding step, NSA against dense, and what does it load?

    python -m experiments.decode_bench --output=experiments/results/decode_h100

First counts the tokens that a step of NSA loads, beside the paper's Table 4. Then times the
attention of one step in bfloat16, over full caches of random data at every batch and length: "nsa"
(three branches, the choice of blocks, gates), dense attention through cuDNN and XLA by
jax.nn.dot_product_attention, and "dense_own", the dense step of NSA's own implementation.
Projections and writes to the cache are no part of it. A time is a median over samples of many runs
in a row, after a warm-up.

Beside each time stands the speed at which the bytes that the step must read were read, and that
speed over the bandwidth of a large copy, measured in the same run. The JSON file also has the time
of the smallest program, by which short steps are bound, and the reason of each empty cell. Writes
OUTPUT.csv, .json and .png after each length.
"""

import csv
import importlib.util
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import decode_cases, timing
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
_BATCHES = flags.DEFINE_list("batches", ["1", "4", "16", "64"], "rows")
_LENGTHS = flags.DEFINE_list("lengths", [str(2**i) for i in range(13, 18)], "tokens in the cache")
_REPEATS = flags.DEFINE_integer("repeats", 5, "samples of each; the median counts", lower_bound=1)

COLUMNS = ("shape", "batch", "length", "operation", "ms", "tokens", "gb_s", "of_copy")


def write(output: Path, rows, record: dict) -> None:
    """Writes the table, the record and, with matplotlib, the figure."""
    rows = timing.rounded(rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{output}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    faster = decode_cases.speedups(rows)
    everything = timing.rounded(record | {"nsa_faster_than_best_dense": faster}) | {"cases": rows}
    Path(f"{output}.json").write_text(json.dumps(everything, indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") and faster:
        draw(rows, Path(f"{output}.png"))


def draw(rows, path: Path) -> None:
    """Draws for each shape times over length, at the largest batch, and NSA's gain at every one."""
    from matplotlib.figure import Figure

    faster = decode_cases.speedups(rows)
    figure = Figure(figsize=(11, 4 * len(faster)), dpi=150, layout="constrained")
    grid = figure.subplots(len(faster), 2, squeeze=False)
    for (shape, batches), (left, right) in zip(faster.items(), grid, strict=True):
        timed = [row for row in rows if row["shape"] == shape and "ms" in row]
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
    for flag, what in ((_BATCHES, "rows"), (_LENGTHS, "tokens")):
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
    for shape in _SHAPES.value:
        for length in map(int, _LENGTHS.value):
            for batch in map(int, _BATCHES.value):
                spec = decode_cases.at(BENCHMARK[shape], batch, length)
                where = {"shape": shape, "batch": batch, "length": length}
                for row in decode_cases.measure(
                    spec, implementation, limits["copy_gb_s"], _REPEATS.value
                ):
                    rows.append(where | row)
                    print(_line(rows[-1]), flush=True)
            if _OUTPUT.value:
                write(Path(_OUTPUT.value), rows, record)


if __name__ == "__main__":
    app.run(main)
