"""What the benchmarks share: operations as cases, compiled side by side, timed, and the hardware.

Nothing here reads flags, so that every benchmark has its own.
"""

import csv
import dataclasses
import functools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax import native_sparse_attention
from nsa_jax.ops import branches, dense, dispatch
from nsa_jax.training import environment
from tests.arg_specs import ArgSpec, random_inputs

#: A sample is as many runs in a row as take this long: one alone pays for its launch and the wait.
SAMPLE_SECONDS = 0.1
ENOUGH_SECONDS = 2.0  # of samples; fewer than asked for are taken once they took as much
LEAST_SAMPLES = 3


class Timing(NamedTuple):
    """How long one run takes, in milliseconds, over the samples."""

    median: float
    least: float
    most: float
    samples: int
    runs_a_sample: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation that is timed.

    Attributes:
      function: from arrays, or pairs of them, to its output.
      arguments: their names among the inputs.
      differentiated: how many of them, from the first on, have a gradient; 0 for no backward.
    """

    function: Callable
    arguments: tuple[str, ...]
    differentiated: int


def median_ms(function, argument, repeats: int) -> float:
    """The median time of a function in milliseconds, after one run that is not counted."""
    jax.block_until_ready(function(argument))
    return statistics.median(1e3 * _seconds(function, (argument,), 1) for _ in range(repeats))


def measure(function, arguments: tuple, repeats: int, wait=jax.block_until_ready) -> Timing:
    """Times a compiled function after a warm-up, many runs in a row without waiting between them.

    On a CPU, which would run them side by side, one by one.

    Args:
      function: compiled; what it returns is dropped before the next run.
      arguments: its arguments.
      repeats: samples to take at most.
      wait: returns once what `function` returned is there.
    """
    wait(function(*arguments))
    runs, seconds = 1, _seconds(function, arguments, 1, wait)
    while seconds < SAMPLE_SECONDS and jax.default_backend() != "cpu":
        # A first run alone takes longer than each of many; so the number grows step by step.
        runs = math.ceil(runs * min(1.2 * SAMPLE_SECONDS / seconds, 20))
        seconds = _seconds(function, arguments, runs, wait)
    samples, spent = [seconds / runs], seconds
    while len(samples) < repeats and (len(samples) < LEAST_SAMPLES or spent < ENOUGH_SECONDS):
        seconds = _seconds(function, arguments, runs, wait)
        samples.append(seconds / runs)
        spent += seconds
    values = (statistics.median(samples), min(samples), max(samples))
    return Timing(*(1e3 * x for x in values), len(samples), runs)


def _seconds(function, arguments, runs, wait=jax.block_until_ready):
    start, out = time.perf_counter(), None
    for _ in range(runs):
        out = None  # its memory is free for the next run
        out = function(*arguments)
    wait(out)
    return time.perf_counter() - start


def ceilings(repeats: int) -> dict[str, float]:
    """The rate of a large matrix product and the bandwidth of a large copy, both measured."""
    size = 8192 if jax.default_backend() == "gpu" else 512
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    product = measure(jax.jit(jnp.matmul), (a, b), repeats)
    x = jax.random.bits(jax.random.key(0), (size, size, 4), jnp.uint32)
    copy = measure(jax.jit(jnp.copy), (x,), repeats)
    return {
        "matmul_tflops": 2 * size**3 / product.median / 1e9,
        "copy_gb_s": 2 * x.nbytes / copy.median / 1e6,
    }


def rounded(value: Any) -> Any:
    """Floats to five digits, those in dicts and lists too; anything else as it is."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict]) -> None:
    """Writes those columns of a table, in a folder that is made if need be; gaps stay empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def compiled(traced: dict[Any, Any]) -> dict[Any, Any]:
    """Lowers and compiles traced functions side by side.

    Args:
      traced: what `jax.jit(...).trace(...)` returned, or the sentence of why there is none, by any
        name.

    Returns:
      By the same names, the compiled function or the sentence.
    """

    def one(traced):
        if isinstance(traced, str):
            return traced
        return attempt(lambda: traced.lower().compile())

    # Triton and XLA leave Python's lock to others while they compile.
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 16)) as pool:
        return dict(zip(traced, pool.map(one, traced.values()), strict=True))


def attempt(function) -> Any:
    """What `function()` returns, or why it raised, as one sentence.

    Whatever one case of many may meet (a refusal, a launch that fails, no memory) is a finding
    about that case and no end of the run.
    """
    try:
        return function()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0][:300]


def trace_forward(case: Case, shapes: tuple):
    """Traces the operation anew, whatever jax.jit remembers of it; `shapes` of its arguments."""
    return jax.jit(lambda *arguments: case.function(*arguments)).trace(*shapes)


def trace_pull(case: Case, shapes: tuple):
    """Traces the operation up to the pull of jax.vjp, a pytree that holds the residuals."""

    def run(*arguments):
        variables, rest = arguments[: case.differentiated], arguments[case.differentiated :]
        return jax.vjp(lambda *variables: case.function(*variables, *rest), *variables)[1]

    return jax.jit(run).trace(*shapes)


def trace_backward(pull, cotangent):
    """Traces the backward pass alone, from the shapes of `trace_pull`'s result and the output."""
    return jax.jit(lambda pull, cotangent: pull(cotangent)).trace(pull, cotangent)


def cases(spec: ArgSpec, implementation: str) -> dict[str, Case]:
    """The operations of NSA and the baselines, by name.

    Their arguments are those of `inputs`. dense_{implementation} is full causal attention through
    the implementation's own interval_attention, which is what the paper compares with.
    """
    where = {"config": spec.nsa, "implementation": implementation}

    def out_of(operation):
        return lambda q, key_value, *rest: operation(q, *key_value, *rest, **where)[0]

    def select_blocks(q, compressed, lse):
        return branches.select_blocks(q, compressed[0], lse, **where)

    def nsa(q, compressed, selected, window, gates):
        return native_sparse_attention(q, compressed, selected, window, gates, **where)[0]

    def dense_cudnn(q, key_value):
        return dense.dense_attention(q, *key_value, implementation="cudnn")

    def dense_own(q, key_value):
        return interval_dense(q, key_value, implementation)

    def window_cudnn(q, key_value):
        return cudnn_window(q, key_value, spec.nsa.window_size)

    everything = ("q", "compressed", "selected", "window", "gates")
    return {
        "compressed": Case(out_of(branches.compressed_attention), ("q", "compressed"), 2),
        "select_blocks": Case(select_blocks, ("q", "compressed", "lse"), 0),
        "selected": Case(out_of(branches.selected_attention), ("q", "selected", "blocks"), 2),
        "selected_overlap": Case(
            out_of(branches.selected_attention), ("q", "selected", "overlapping"), 2
        ),
        "window": Case(out_of(branches.sliding_window_attention), ("q", "window"), 2),
        "nsa": Case(nsa, everything, 5),
        "dense_cudnn": Case(dense_cudnn, ("q", "selected"), 2),
        f"dense_{implementation}": Case(dense_own, ("q", "selected"), 2),
        "window_cudnn": Case(window_cudnn, ("q", "window"), 2),
    }


def interval_dense(q, key_value, implementation: str):
    """Full causal attention as intervals that begin at 0."""
    hi = jnp.broadcast_to(jnp.arange(1, q.shape[1] + 1, dtype=jnp.int32), q.shape[:2])
    lo, scale = jnp.zeros_like(hi), q.shape[-1] ** -0.5
    run = functools.partial(dispatch.run, "interval_attention", implementation)
    return run(q, *key_value, lo, hi, scale=scale)[0]


def cudnn_window(q, key_value, window_size: int):
    """A sliding window through cuDNN, with zeros where it wants equal sizes of keys and values."""
    size, v_head_dim = max(q.shape[-1], key_value[1].shape[-1]), key_value[1].shape[-1]
    dense.resolve("cudnn", q.dtype, size)  # raises where cuDNN cannot run
    scale = q.shape[-1] ** -0.5
    padded = (jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])]) for x in (q, *key_value))
    out = jax.nn.dot_product_attention(
        *padded,
        scale=scale,
        is_causal=True,
        local_window_size=(window_size - 1, 0),
        implementation="cudnn",
    )
    return out[..., :v_head_dim]


def inputs(spec: ArgSpec, implementation: str, names) -> Callable[[], dict]:
    """Returns a function, to be compiled, that makes the inputs of cases.

    Those of native_sparse_attention in bfloat16; a "cotangent" of the outputs; and, if `names` has
    them, "lse" of the compressed branch, "blocks", what select_blocks chooses of the same data, and
    "overlapping", blocks of which neighbouring queries share most.
    """
    where = {"config": spec.nsa, "implementation": implementation}

    def make():
        arrays = random_inputs(spec, dtype=jnp.bfloat16)
        q, (k, v) = arrays["q"], arrays["compressed"]
        shape = (*q.shape[:3], v.shape[-1])
        arrays["cotangent"] = jax.random.normal(jax.random.key(1), shape, q.dtype)
        if "lse" in names or "blocks" in names:
            arrays["lse"] = branches.compressed_attention(q, k, v, **where)[1]
        if "blocks" in names:
            arrays["blocks"] = branches.select_blocks(q, k, arrays["lse"], **where)
        if "overlapping" in names:
            arrays["overlapping"] = overlapping_blocks(spec)
        return arrays

    return make


def overlapping_blocks(spec: ArgSpec, changed: float = 0.2):
    """Random selected blocks, of which those of neighbouring queries overlap.

    Of each query, the forced blocks and, from as many equal parts of those between them as blocks
    are left, one each. Each of these is drawn anew every few queries, not all of them at once.

    Args:
      spec: the shapes.
      changed: about which part of the selected blocks is not that of the query before.

    Returns:
      int32 [B, T, K, n], -1 for none.
    """
    nsa, shape = spec.nsa, (spec.batch, spec.length, spec.num_kv_heads)
    forced = nsa.num_initial_blocks + nsa.num_local_blocks
    drawn = nsa.num_selected_blocks - forced
    period = max(round(drawn / (changed * nsa.num_selected_blocks)), 1)  # queries
    query = jnp.arange(spec.length)[:, None]
    own, slot = query // nsa.select_block_size, jnp.arange(drawn)

    draws = (spec.length + drawn) // period + 1
    numbers = jax.random.uniform(jax.random.key(2), (spec.batch, draws, spec.num_kv_heads, drawn))
    number = numbers[:, (query + slot) // period, :, slot]  # [T, drawn, B, K]
    between = jnp.maximum(own + 1 - forced, 0)
    begin, end = (nsa.num_initial_blocks + (slot + i) * between // drawn for i in (0, 1))
    width = (end - begin)[..., None, None]
    random = begin[..., None, None] + jnp.minimum((number * width).astype(int), width - 1)
    random = jnp.moveaxis(jnp.where(width > 0, random, -1), (0, 1), (1, 3))

    first = jnp.arange(nsa.num_initial_blocks)
    local = own - jnp.arange(nsa.num_local_blocks)
    first = jnp.where(first <= own, first, -1)
    local = jnp.where(local >= nsa.num_initial_blocks, local, -1)
    always = jnp.concatenate([first, local], axis=1)[None, :, None]
    always = jnp.broadcast_to(always, (*shape, forced))
    return jnp.concatenate([random, always], axis=-1).astype(jnp.int32)


def hardware(module: str) -> dict:
    """What the numbers of a benchmark were measured with.

    Args:
      module: its name, for the command.
    """
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), model)
    return {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "device": jax.devices()[0].device_kind,
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
    } | environment.versions()
