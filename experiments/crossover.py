r"""At which length does NSA's xla implementation overtake dense attention?

    python -m experiments.crossover --output=experiments/results/crossover_cpu

Times native_sparse_attention (gates included, projections not) at the paper's geometry against
full causal attention through jax.nn.dot_product_attention, both compiled by XLA, forward and
forward plus backward, on random data. Each number is the median of `--repeats` runs in a row after
one that is not counted. (Taken in turns, the gigabytes that dense attention takes from the system
and gives back make whatever runs after it up to three times slower.) Prints a table and writes it
as CSV, with the command, the hardware and the versions in a JSON file beside it.
"""

import json
from pathlib import Path

import jax
from absl import app, flags

from experiments.timing import hardware, median_ms, write_csv
from nsa_jax import NSAConfig, native_sparse_attention
from tests.arg_specs import ArgSpec, random_inputs

_LENGTHS = flags.DEFINE_list("lengths", ["256", "512", "1024", "2048", "4096", "8192"], "tokens")
_HEADS = flags.DEFINE_integer("heads", 16, "query heads")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 1, "key and value heads")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "features a head, of keys and of values")
_REPEATS = flags.DEFINE_integer("repeats", 5, "runs of each; the median counts")
_OUTPUT = flags.DEFINE_string("output", None, "where to write, without .csv and .json")

COLUMNS = (
    "length",
    "nsa_forward_ms",
    "dense_forward_ms",
    "forward_ratio",
    "nsa_both_ms",
    "dense_both_ms",
    "both_ratio",
)


def sparse(arrays, config):
    """The sum of NSA's outputs: a scalar to differentiate."""
    out, _ = native_sparse_attention(**arrays, config=config, implementation="xla")
    return out.sum()


def dense(arrays):
    """The sum of full attention's outputs on the same queries and the selected branch's keys."""
    q, (k, v) = arrays["q"], arrays["selected"]
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla").sum()


def measure(length, repeats):
    """One row of the table."""
    nsa = NSAConfig()
    heads = (_HEADS.value, _KV_HEADS.value, _HEAD_DIM.value, _HEAD_DIM.value)
    arrays = random_inputs(ArgSpec(1, length, *heads, nsa))

    def sparse_at(arrays):
        return sparse(arrays, nsa)

    functions = (sparse_at, dense, jax.grad(sparse_at), jax.grad(dense))
    nsa_forward, dense_forward, nsa_both, dense_both = (
        median_ms(jax.jit(function), arrays, repeats) for function in functions
    )
    values = (
        length,
        nsa_forward,
        dense_forward,
        dense_forward / nsa_forward,
        nsa_both,
        dense_both,
        dense_both / nsa_both,
    )
    return dict(zip(COLUMNS, values, strict=True))


def main(argv):
    """Measures, prints and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Flags are written --name=value.")
    rows = []
    print(" | ".join(COLUMNS))
    for length in map(int, _LENGTHS.value):
        rows.append(measure(length, _REPEATS.value))
        print(" | ".join(f"{value:.4g}" for value in rows[-1].values()), flush=True)
    if _OUTPUT.value:
        output = Path(_OUTPUT.value)
        rows = [{k: round(v, 3) for k, v in row.items()} for row in rows]
        write_csv(output.with_suffix(".csv"), COLUMNS, rows)
        output.with_suffix(".json").write_text(
            json.dumps(hardware("experiments.crossover"), indent=2) + "\n"
        )


if __name__ == "__main__":
    app.run(main)
