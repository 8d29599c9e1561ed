"""What decode_bench times and counts: the attention of one step over caches of random data.

Nothing here reads flags.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import timing
from nsa_jax import NSAConfig
from nsa_jax.ops import branches, decode, dense, dispatch
from nsa_jax.ops.compression import num_compressed_blocks
from nsa_jax.typing import KeyValue
from tests.arg_specs import ArgSpec

#: Table 4 of the paper: tokens loaded by a step of NSA at each length. Full attention loads all.
PAPER_TOKENS = {8192: 2048, 16384: 2560, 32768: 3584, 65536: 5632}

NSA = "nsa"
CACHES = ("compressed", "selected", "window")

RUNS = 16  # steps of a timed program, one after another


def in_a_row(step: Callable) -> Callable:
    """`RUNS` steps as one program, so that no step waits for Python; returns what the last did.

    The first argument is the query, and each step's depends on the output of the one before, so
    that no two of them can be made one or run side by side. What does not depend on the query, such
    as another layout of a cache for a product of XLA's, may be made once before the first.
    """

    def run(q, *rest):
        def body(_, result):
            out = jax.tree.leaves(result)[0]
            return step(q + 0 * out[..., :1], *rest)

        nothing = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, q, *rest)
        )
        return jax.lax.fori_loop(0, RUNS, body, nothing)

    return run


def cases(spec: ArgSpec, implementation: str) -> dict[str, timing.Case]:
    """The steps that are timed, by name; their arguments are those of `inputs`.

    nsa: the three branches, the choice of blocks and the gates; nsa_xla: the same in XLA, unless
    that is the implementation. dense_cudnn and dense_jax: full attention through
    jax.nn.dot_product_attention. dense_own: through the dense step of the implementation that nsa
    has.
    """
    scale = spec.head_dim**-0.5
    padded = ("padded",) if spec.v_head_dim < spec.head_dim else ()

    def nsa_of(name):
        def run(q, gates, positions, *caches):
            step = (q, q, *caches, gates, positions)
            sizes = branches.selection_sizes(spec.nsa)
            return dispatch.run("sparse_step", name, *step, scale=scale, **sizes)

        return run

    def dense_own(q, positions, key_value):
        return dispatch.run("dense_step", implementation, q, *key_value, positions, scale=scale)

    def of_jax(name):
        def run(q, positions, key_value, *padded):
            k, v = (key_value[0], *padded) if padded else key_value
            at = {"q_positions": positions[:, None], "implementation": name}
            return dense.dense_attention(q[:, None], k, v, **at)[:, 0, :, : spec.v_head_dim]

        return run

    def case(function, *caches):
        return timing.Case(function, ("q", *caches), 0)

    nsa = {NSA: case(nsa_of(implementation), "gates", "positions", *CACHES)}
    if implementation != "xla":
        nsa["nsa_xla"] = case(nsa_of("xla"), "gates", "positions", *CACHES)
    return nsa | {
        "dense_own": case(dense_own, "positions", "selected"),
        "dense_cudnn": case(of_jax("cudnn"), "positions", "selected", *padded),
        "dense_jax": case(of_jax("xla"), "positions", "selected", *padded),
    }


def inputs(spec: ArgSpec, dtype=jnp.bfloat16) -> Callable[[], dict[str, Any]]:
    """Returns a function, to be compiled, that makes a query at the end of full random caches.

    "padded" is there where values are narrower than keys: the values of "selected" as wide as its
    keys, which dot_product_attention wants.
    """
    nsa = spec.nsa
    sizes = {"block_size": nsa.compress_block_size, "stride": nsa.compress_stride}
    lengths = (num_compressed_blocks(spec.length, **sizes), spec.length, nsa.window_size)

    def make():
        keys = iter(jax.random.split(jax.random.key(0), 8))

        def normal(*shape):
            # Row by row: no single draw has more numbers than 32 bits can count.
            rows = jax.random.split(next(keys), spec.batch)
            return jax.lax.map(lambda key: jax.random.normal(key, shape, dtype), rows)

        def key_value(length):
            k = normal(length, spec.num_kv_heads, spec.head_dim)
            return KeyValue(k, normal(length, spec.num_kv_heads, spec.v_head_dim))

        arrays = dict(zip(CACHES, map(key_value, lengths), strict=True))
        wider = spec.head_dim - spec.v_head_dim
        if wider > 0:  # of the keys, a second output would be a second copy
            arrays["padded"] = jnp.pad(arrays["selected"][1], [(0, 0)] * 3 + [(0, wider)])
        return arrays | {
            "q": normal(spec.num_heads, spec.head_dim),
            "gates": jax.nn.sigmoid(normal(spec.num_heads, 3)),
            "positions": jnp.full(spec.batch, spec.length - 1, jnp.int32),
        }

    return make


def loaded(spec: ArgSpec, blocks) -> float:
    """The tokens that a step loads for a group, by what it selected, on average."""
    positions = np.full(np.asarray(blocks).shape[:-1], spec.length - 1)
    return float(np.mean(decode.tokens_loaded(np.asarray(blocks), positions, spec.nsa)))


def least_bytes(spec: ArgSpec, tokens: float, itemsize: int) -> float:
    """Keys and values of so many tokens a group, the queries and the outputs, each once."""
    features = spec.head_dim + spec.v_head_dim
    return spec.batch * (tokens * spec.num_kv_heads + spec.num_heads) * features * itemsize


def table_4(implementation: str, nsa: NSAConfig | None = None) -> list[dict]:
    """Runs a step at each length of the paper's Table 4 and counts what it loads.

    The count depends on the geometry alone, so that zeros in one narrow head will do.
    """
    rows, traced, given = [], {}, {}
    for length in PAPER_TOKENS:
        spec = ArgSpec(1, length, 1, 1, 16, 16, nsa or NSAConfig())
        step = cases(spec, implementation)[NSA]
        shapes = jax.eval_shape(inputs(spec))
        given[length] = spec, tuple(shapes[x] for x in step.arguments)
        traced[length] = timing.trace_forward(step, given[length][1])
    for length, function in timing.compiled(traced).items():
        if isinstance(function, str):
            raise RuntimeError(f"the step at {length} tokens: {function}")
        spec, shapes = given[length]
        # Of the arguments the positions alone are integers.
        last = {False: 0, True: length - 1}
        zeros = jax.tree.map(
            lambda x, last=last: jnp.full(x.shape, last[x.dtype == jnp.int32], x.dtype), shapes
        )
        tokens, paper = loaded(spec, function(*zeros)[1]), PAPER_TOKENS[length]
        rows.append(
            {
                "length": length,
                "tokens": tokens,
                "ratio": length / tokens,
                "paper_tokens": paper,
                "paper_ratio": length / paper,
            }
        )
    return rows


def measure(
    spec: ArgSpec, implementation: str, copy_gb_s: float, repeats: int
) -> Iterator[dict[str, Any]]:
    """Times each step of one shape, batch and length, `RUNS` of them in one program.

    Args:
      spec: its batch and length are those of the caches.
      implementation: of nsa and dense_own.
      copy_gb_s: from `timing.ceilings`.
      repeats: samples of each.

    Yields:
      Rows with "operation", and "ms" (the median; "least_ms" and "most_ms" beside it), "tokens"
      (loaded for a group), "gb_s" (of the bytes that must be read) and "of_copy" (the same over
      copy_gb_s), or the "reason" why there are none.
    """
    steps, make = cases(spec, implementation), inputs(spec)
    traced = {"inputs": timing.attempt(lambda: jax.jit(make).trace())}
    shapes = jax.eval_shape(make)
    for name, case in steps.items():
        given = tuple(shapes[x] for x in case.arguments)
        program = dataclasses.replace(case, function=in_a_row(case.function))
        traced[name] = timing.attempt(lambda: timing.trace_forward(program, given))
    functions = timing.compiled(traced)
    if isinstance(functions["inputs"], str):
        arrays = functions["inputs"]
    else:
        arrays = timing.attempt(lambda: jax.block_until_ready(functions["inputs"]()))
    for name, case in steps.items():
        result = _time(functions[name], case, arrays, repeats)
        if isinstance(result, str):
            yield {"operation": name, "reason": result}
            continue
        taken, out = result
        median, least, most = (x / RUNS for x in (taken.median, taken.least, taken.most))
        tokens = spec.length if name.startswith("dense") else loaded(spec, out[1])
        speed = least_bytes(spec, tokens, shapes["q"].dtype.itemsize) / median / 1e6
        yield {
            "operation": name,
            "ms": median,
            "least_ms": least,
            "most_ms": most,
            "tokens": tokens,
            "gb_s": speed,
            "of_copy": speed / copy_gb_s,
        }


def _time(function, case, arrays, repeats):
    """The timing of a compiled step and what it returned, or the sentence of why there is none."""
    for reason in (function, arrays):
        if isinstance(reason, str):
            return reason

    def run():
        arguments = tuple(arrays[x] for x in case.arguments)
        return timing.measure(function, arguments, repeats), function(*arguments)

    return timing.attempt(run)


def speedups(rows) -> dict[str, dict[int, dict[int, float]]]:
    """By shape, batch and length: the time of the fastest dense step over that of NSA."""
    found = {}
    for row in rows:
        if row["operation"] != NSA or "ms" not in row:
            continue
        where = ("shape", "batch", "length")
        beside = [
            x["ms"]
            for x in rows
            if x["operation"].startswith("dense")
            and "ms" in x
            and all(x[y] == row[y] for y in where)
        ]
        if beside:
            batches = found.setdefault(row["shape"], {}).setdefault(row["batch"], {})
            batches[row["length"]] = min(beside) / row["ms"]
    return found


def at(spec: ArgSpec, batch: int, length: int) -> ArgSpec:
    """The shape with another batch and length."""
    return dataclasses.replace(spec, batch=batch, length=length)
