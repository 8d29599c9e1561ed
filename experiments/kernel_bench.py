r"""How fast are the kernels, and from which length on does NSA beat dense attention on a GPU?

    python -m experiments.kernel_bench --output=experiments/results/kernels_h100

Times each operation, forward and backward apart, at batch 1 in bfloat16 on random data: the three
branches, the choice of blocks, the selected branch where neighbouring queries share four fifths of
their blocks ("selected_overlap"), "nsa" (the whole native_sparse_attention: gates included,
projections not), and as baselines dense attention through cuDNN, dense attention through the same
implementation's own interval_attention (what the paper compares with) and cuDNN's sliding window.
With --peers, public PyTorch implementations of NSA as well, on the same arrays (peers.py says
which, and where to get them). A time is a median over samples of many runs in a row, after a
warm-up.

Beside each time stand the useful FLOP a second, visible pairs of query and key alone, and the
floor: the longer one of useful FLOP at the rate of a large matrix product and of each input read
once and each output written once at the bandwidth of a large copy, both measured in the same run.
What cannot run has an empty cell, and its reason is in the JSON file. Writes OUTPUT.csv, .json and
.png after each length.
"""

import dataclasses
import importlib.util
import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import peers, timing
from nsa_jax.ops import compression, dispatch
from tests.arg_specs import BENCHMARK, ArgSpec

_OUTPUT = flags.DEFINE_string("output", None, "where to write, without .csv, .json and .png")
_IMPLEMENTATION = flags.DEFINE_enum(
    "implementation", "triton", [x for x in dispatch.IMPLEMENTATIONS if x != "reference"], "whose"
)
_LENGTHS = flags.DEFINE_list(
    "lengths",
    [str(2**i) for i in range(10, 18)],
    "tokens; below 4096 only nsa and dense_cudnn are timed, unless --only names more",
)
_SHAPES = flags.DEFINE_list(
    "shapes", ["paper", "paper_192", "gqa"], f"of heads, among {', '.join(BENCHMARK)}"
)
_ONLY = flags.DEFINE_list("only", None, "names of operations; all of them if not given")
_PEERS = flags.DEFINE_list("peers", [], f"public implementations, among {', '.join(peers.PEERS)}")
_REPEATS = flags.DEFINE_integer("repeats", 5, "samples of each; the median counts", lower_bound=1)

BRANCHES = ("compressed", "select_blocks", "selected", "window")
BREAK_EVEN = ("nsa", "dense_cudnn")
SHORT = 4096  # tokens; below, the parts of NSA are of no interest
COLUMNS = ("shape", "length", "operation", "pass", "ms", "tflops", "floor_ms", "over_floor")
#: Which blocks the operations attend.
SELECTIONS = {"selected": "blocks", "selected_overlap": "overlapping"}
INPUTS, MEMORY = ("inputs", "inputs"), ("nsa", "memory")


def visible_pairs(spec: ArgSpec, selections: dict) -> dict[str, int]:
    """Counts the pairs of a query head's query and a key that it sees, by branch and for dense.

    Args:
      spec: the shapes.
      selections: by operation, the selected blocks [B, T, K, n], -1 for none.
    """
    nsa, query = spec.nsa, np.arange(spec.length, dtype=np.int64)
    complete = compression.complete_blocks(
        query + 1, block_size=nsa.compress_block_size, stride=nsa.compress_stride
    )
    a_query = {
        "compressed": int(np.asarray(complete, np.int64).sum()),
        "window": int(np.minimum(query + 1, nsa.window_size).sum()),
        "dense": int((query + 1).sum()),
    }
    pairs = {name: spec.batch * spec.num_heads * count for name, count in a_query.items()}
    for operation, blocks in selections.items():
        blocks, size = np.asarray(blocks, np.int64), nsa.select_block_size
        tokens = np.clip(query[:, None, None] + 1 - blocks * size, 0, size) * (blocks >= 0)
        pairs[operation] = int(tokens.sum()) * spec.num_heads // spec.num_kv_heads
    return pairs


def useful_flop(operation: str, spec: ArgSpec, pairs: dict[str, int]) -> dict[str, int]:
    """The FLOP of the products alone, by pass: two of them forward, five backward."""
    scores, values = 2 * spec.head_dim, 2 * spec.v_head_dim
    forward, backward = scores + values, 3 * scores + 2 * values
    if operation == "select_blocks":
        return {"forward": pairs["compressed"] * scores}
    if operation == "nsa":
        seen = pairs["compressed"] + pairs["selected"] + pairs["window"]
        return {
            "forward": seen * forward + pairs["compressed"] * scores,
            "backward": seen * backward,
        }
    seen = pairs[operation if operation in pairs else operation.split("_")[0]]
    return {"forward": seen * forward, "backward": seen * backward}


def least_bytes(case: timing.Case, shapes: tuple, out) -> dict[str, int]:
    """Each input read once and each output written once, by pass."""

    def size(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    forward = size(shapes) + size(out)
    # Backward reads them and the output's gradient, and writes those of what has one.
    return {
        "forward": forward,
        "backward": forward + size(out) + size(shapes[: case.differentiated]),
    }


class Plan(NamedTuple):
    """One shape at one length: its cases, the shapes of their arguments, and all of it traced."""

    spec: ArgSpec
    cases: dict[str, timing.Case]
    shapes: dict
    traced: dict


def plan(spec: ArgSpec, implementation: str, names) -> Plan:
    """Traces the inputs, every pass of every operation in `names`, and what takes NSA's memory.

    What cannot be traced has the sentence of why in its place.
    """
    cases = {k: v for k, v in timing.cases(spec, implementation).items() if k in names}
    needed = {x for case in cases.values() for x in case.arguments}
    needed |= {"blocks"} if "nsa" in cases else set()  # to count what it sees
    inputs = jax.jit(timing.inputs(spec, implementation, needed)).trace()
    shapes, traced = inputs.out_info, {INPUTS: inputs}
    for name, case in cases.items():
        given = tuple(shapes[x] for x in case.arguments)
        run = traced[name, "forward"] = timing.attempt(lambda: timing.trace_forward(case, given))
        if isinstance(run, str) or not case.differentiated:
            continue
        pull = traced[name, "pull"] = timing.attempt(lambda: timing.trace_pull(case, given))
        if isinstance(pull, str):
            continue
        traced[name, "backward"] = timing.attempt(
            lambda: timing.trace_backward(pull.out_info, run.out_info)
        )
        if name == "nsa":
            traced[MEMORY] = timing.attempt(lambda: _gradient(case).trace(*given))
    return Plan(spec, cases, shapes, traced)


def compile_plans(plans: list[Plan]) -> list[dict]:
    """Compiles what several plans traced side by side; the functions, named as in each plan.

    In three waves: what comes later finds most of its Triton kernels compiled.
    """

    def wave(operation, which):
        return 2 if which in ("pull", "memory") else int(operation not in BRANCHES)

    traced = {(i, *key): x for i, plan in enumerate(plans) for key, x in plan.traced.items()}
    functions = {}
    for number in range(3):
        functions |= timing.compiled({k: v for k, v in traced.items() if wave(*k[1:]) == number})
    return [{key: functions[i, *key] for key in plan.traced} for i, plan in enumerate(plans)]


def _gradient(case):
    def loss(variables):
        return case.function(*variables).astype(jnp.float32).sum()

    return jax.jit(lambda *variables: jax.value_and_grad(loss)(variables))


def _time(case, name, functions, arrays, repeats):
    """Yields each pass of a case with its `timing.Timing`, or the sentence of why it has none."""
    arguments = tuple(arrays[x] for x in case.arguments)

    def run(function, *arguments):
        if isinstance(function, str):
            return function
        return timing.attempt(lambda: timing.measure(function, arguments, repeats))

    yield "forward", run(functions[name, "forward"], *arguments)
    if not case.differentiated:
        return
    make = functions.get((name, "pull"), functions[name, "forward"])
    pull = make if isinstance(make, str) else timing.attempt(lambda: make(*arguments))
    if isinstance(pull, str):
        yield "backward", pull
    else:
        yield "backward", run(functions[name, "backward"], pull, arrays["cotangent"])


def measure(plan: Plan, functions: dict, limits: dict, repeats: int, public=()):
    """Times one shape at one length.

    Args:
      plan: what to time.
      functions: of the plan, from `compile_plans`.
      limits: from `timing.ceilings`.
      repeats: samples of each.
      public: names of peers to time as well.

    Yields:
      Rows: dicts of the columns, without shape and length, that also hold the spread or the
      "reason" of an empty cell. A row of the pass "memory" holds "temporary_mib", one of a peer's
      forward pass the largest "difference" from our output.
    """
    make = functions[INPUTS]
    arrays = (
        make if isinstance(make, str) else timing.attempt(lambda: jax.block_until_ready(make()))
    )
    if isinstance(arrays, str):
        for name in plan.cases:
            yield {"operation": name, "pass": "forward", "reason": arrays}
        return
    selections = {x: arrays[y] for x, y in SELECTIONS.items() if y in arrays}
    pairs, least = visible_pairs(plan.spec, selections), {}
    for name, case in plan.cases.items():
        flop = useful_flop(name, plan.spec, pairs)
        given = tuple(plan.shapes[x] for x in case.arguments)
        # What could not be traced has no output, but no time to compare with its bytes either.
        moved = least_bytes(case, given, getattr(plan.traced[name, "forward"], "out_info", ()))
        for which, result in _time(case, name, functions, arrays, repeats):
            least[name, which] = (flop[which], moved[which])
            yield {"operation": name, "pass": which} | _columns(result, limits, least[name, which])
    if MEMORY in functions:
        yield _memory(functions[MEMORY])
    for peer in public:
        yield from _measure_peer(peer, plan, functions, arrays, limits, least, repeats)


def _measure_peer(peer, plan, functions, arrays, limits, least, repeats):
    """Yields the rows of a public implementation."""
    wanted = [x for x in peers.PEERS[peer].operations if set(x.split("_and_")) <= set(plan.cases)]
    ours = {}
    for name in wanted:
        function = functions.get((name, "forward"), "not one of ours")
        if not isinstance(function, str):
            arguments = [arrays[x] for x in plan.cases[name].arguments]
            out = timing.attempt(lambda f=function, arguments=arguments: f(*arguments))
            ours |= {} if isinstance(out, str) else {name: out}
    for row in peers.measure(peer, wanted, plan.spec, arrays, ours, repeats):
        columns = _columns(row.pop("result"), limits, least.get((row["operation"], row["pass"])))
        yield row | {"operation": f"{row['operation']}_{peer}"} | columns


def _memory(gradient) -> dict:
    """The row of NSA's temporary memory, forward and backward together."""
    row = dict(zip(("operation", "pass"), MEMORY, strict=True))
    if isinstance(gradient, str):
        return row | {"reason": gradient}
    return row | {"temporary_mib": gradient.memory_analysis().temp_size_in_bytes / 2**20}


def _columns(result: timing.Timing | str, limits, least):
    """The numbers of a row, or why there are none; `least` are its FLOP and bytes, if known."""
    if isinstance(result, str):
        return {"reason": result}
    columns = {"ms": result.median}
    if least is not None:
        flop, moved = least
        floor = max(flop / limits["matmul_tflops"] / 1e9, moved / limits["copy_gb_s"] / 1e6)
        columns |= {
            "tflops": flop / result.median / 1e9,
            "floor_ms": floor,
            "over_floor": result.median / floor,
        }
    return columns | {
        "least_ms": result.least,
        "most_ms": result.most,
        "samples": result.samples,
        "runs_a_sample": result.runs_a_sample,
    }


def break_even(sparse: dict[int, float], dense: dict[int, float]) -> int | str:
    """The length from which on NSA is faster, between measured lengths on a double log scale.

    Args:
      sparse: milliseconds by length.
      dense: likewise.

    Returns:
      Tokens, or a sentence where the two do not cross between the measured lengths.
    """
    lengths = sorted(set(sparse) & set(dense))
    if not lengths:
        return "not measured"
    gain = {length: math.log(dense[length] / sparse[length]) for length in lengths}
    slower = [length for length in lengths if gain[length] < 0]
    if not slower:
        return f"below {lengths[0]}"
    if slower[-1] == lengths[-1]:
        return "not reached"
    a, b = slower[-1], lengths[lengths.index(slower[-1]) + 1]
    share = gain[a] / (gain[a] - gain[b])
    return round(a * (b / a) ** share)


def times(rows, shape: str, operation: str, which: str) -> dict[int, float]:
    """Milliseconds by length of what was measured; of "both" passes, where both were."""
    if which == "both":
        forward, backward = (times(rows, shape, operation, x) for x in ("forward", "backward"))
        return {x: forward[x] + backward[x] for x in forward if x in backward}
    wanted = (shape, operation, which)
    return {
        row["length"]: row["ms"]
        for row in rows
        if (row["shape"], row["operation"], row["pass"]) == wanted and "ms" in row
    }


def summary(rows) -> dict:
    """What the JSON file says beside the single rows."""
    shapes = dict.fromkeys(row["shape"] for row in rows)
    return {
        "nsa_overtakes_dense_cudnn_at": {
            shape: {
                name: break_even(*(times(rows, shape, x, which) for x in BREAK_EVEN))
                for name, which in {"forward": "forward", "forward_and_backward": "both"}.items()
            }
            for shape in shapes
        },
        "nsa_forward_and_backward_temporary_mib": {
            shape: {
                row["length"]: timing.rounded(row.get("temporary_mib", row.get("reason")))
                for row in rows
                if row["shape"] == shape and row["pass"] == "memory"
            }
            for shape in shapes
        },
    }


def write(output: Path, rows, record: dict, implementation: str) -> None:
    """Writes the table, the record and, with matplotlib, the figure."""
    cases = timing.rounded([row for row in rows if row["pass"] != "memory"])
    timing.write_csv(Path(f"{output}.csv"), COLUMNS, cases)
    everything = record | summary(rows) | {"cases": cases}
    Path(f"{output}.json").write_text(json.dumps(everything, indent=2) + "\n")
    if importlib.util.find_spec("matplotlib"):
        draw(cases, implementation, Path(f"{output}.png"))


def draw(rows, implementation: str, path: Path) -> None:
    """Draws the paper's figure 6 for each shape: times over length, forward and backward.

    NSA's bar is the whole operation, cut into its selected branch, the choice of blocks included,
    and the rest. The number above a bar of dense attention is its time over NSA's.
    """
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(11, 4 * len(shapes)), dpi=150, layout="constrained")
    grid = figure.subplots(len(shapes), 2, squeeze=False)
    for shape, panels in zip(shapes, grid, strict=True):
        for which, axes in zip(("forward", "backward"), panels, strict=True):
            _draw_panel(axes, rows, shape, which, implementation)
            axes.set(title=f"{shape}, {which}", xlabel="tokens", ylabel="ms")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    title = "numbers: time over NSA's"
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), title=title)
    figure.savefig(path)


def _draw_panel(axes, rows, shape, which, implementation):
    """The bars of one shape and pass, at the lengths where NSA and its parts were timed."""
    nsa = times(rows, shape, "nsa", which)
    selected = times(rows, shape, "selected", which)
    ranked = times(rows, shape, "select_blocks", which)  # there is none backward
    lengths = sorted(set(nsa) & set(selected))
    places = np.arange(len(lengths))
    width, left = 0.27, places - 0.27
    for name, color in ((f"dense_{implementation}", "0.75"), ("dense_cudnn", "0.5")):
        dense = times(rows, shape, name, which)
        bars = axes.bar(left, [dense.get(x, 0) for x in lengths], width, color=color, label=name)
        factors = [f"{dense[x] / nsa[x]:.1f}×" if x in dense else "" for x in lengths]
        axes.bar_label(bars, factors, fontsize=7, rotation=90, padding=3)
        left = left + width
    kernel = [selected[x] + ranked.get(x, 0) for x in lengths]
    rest = [max(nsa[x] - y, 0) for x, y in zip(lengths, kernel, strict=True)]
    axes.bar(left, kernel, width, color="C3", label="NSA: sparse attention kernel")
    axes.bar(left, rest, width, bottom=kernel, color="C1", label="NSA: compression and window")
    axes.set_xticks(places, [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in lengths])
    axes.margins(y=0.15)  # room for the numbers


def _line(row):
    """One row as a line of the table on the screen."""
    head = f"{row['shape']:<10} {row['length']:>7} {row['operation']:<17} {row['pass']:<9}"
    if "ms" not in row:
        return f"{head} {row.get('reason') or format(row['temporary_mib'], '9.1f') + ' MiB'}"
    if "tflops" not in row:
        return f"{head} {row['ms']:>9.3f}"
    return f"{head} {row['ms']:>9.3f} {row['tflops']:>8.1f} {row['over_floor']:>7.2f}"


def _plan(shape: str, length: int) -> Plan:
    """What the flags want of one shape at one length."""
    spec = dataclasses.replace(BENCHMARK[shape], length=length)
    names = _ONLY.value
    if names is None:
        names = BREAK_EVEN if length < SHORT else timing.cases(spec, _IMPLEMENTATION.value)
    return plan(spec, _IMPLEMENTATION.value, names)


def _check_flags(argv) -> None:
    """Raises UsageError for what no measurement could begin with."""
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Flags are written --name=value.")
    operations = timing.cases(BENCHMARK["tiny"], _IMPLEMENTATION.value)
    known = {
        "--shapes": (_SHAPES.value, BENCHMARK),
        "--only": (_ONLY.value or [], operations),
        "--peers": (_PEERS.value, peers.PEERS),
    }
    for flag, (given, allowed) in known.items():
        for name in given:
            if name not in allowed:
                raise app.UsageError(f"{flag}: {name!r} is none of {', '.join(allowed)}")
    for length in _LENGTHS.value:
        if not length.isdigit() or int(length) < 1:
            raise app.UsageError(f"--lengths: {length!r} is no number of tokens")


def main(argv):
    """Measures, prints and writes."""
    _check_flags(argv)
    # JAX reads these when the GPU is first used; its default, 0.75, is short for the longest
    # lengths, and PyTorch needs what JAX leaves.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if _PEERS.value:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    absent = [reason for reason in map(peers.missing, _PEERS.value) if reason]
    if absent:
        raise SystemExit("\n".join(absent))
    implementation = _IMPLEMENTATION.value
    try:
        dispatch.explain(implementation)
    except dispatch.UnsupportedError as error:
        raise SystemExit(str(error)) from None
    if _OUTPUT.value and importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed (pip install 'nsa-jax[plots]'): no figure will be drawn")
    limits = timing.ceilings(_REPEATS.value)
    record = timing.hardware("experiments.kernel_bench")
    record |= {"implementation": implementation, "dtype": "bfloat16"}
    if _PEERS.value:
        record["peers"] = peers.versions(_PEERS.value)
    record["ceilings"] = timing.rounded(limits)
    print(", ".join(f"{name} {value:.0f}" for name, value in limits.items()))
    head = f"{'shape':<10} {'length':>7} {'operation':<17} {'pass':<9}"
    print(f"{head} {'ms':>9} {'TFLOP/s':>8} {'/ floor':>7}", flush=True)
    rows = []
    for shape in _SHAPES.value:
        start = time.perf_counter()
        plans = [_plan(shape, int(length)) for length in _LENGTHS.value]
        functions = compile_plans(plans)
        print(f"{shape}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
        for one, compiled in zip(plans, functions, strict=True):
            for row in measure(one, compiled, limits, _REPEATS.value, _PEERS.value):
                rows.append({"shape": shape, "length": one.spec.length} | row)
                print(_line(rows[-1]), flush=True)
            if _OUTPUT.value:
                write(Path(_OUTPUT.value), rows, record, implementation)
    print(json.dumps(summary(rows), indent=2))


if __name__ == "__main__":
    app.run(main)
