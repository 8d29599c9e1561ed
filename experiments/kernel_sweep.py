r"""Which tile sizes, warps and stages make one Triton kernel fastest on this GPU?

    python -m experiments.kernel_sweep --kernel=interval_forward --shape=paper --length=65536 \
        --candidates="rows:64,128;keys:64,128;num_warps:4,8;num_stages:2,3"

Times the operation that launches the kernel with every combination of the candidates, and with what
pallas_kernels/triton/tuning.py has, and prints a sorted table and the best as a line of that file.
A kernel of the backward pass is timed within the whole backward pass, in which the other kernels
stay as they are. All of it in bfloat16 on random data, the median after a warm-up.
"""

import dataclasses
import itertools

import jax
from absl import app, flags

from experiments import timing
from nsa_jax.ops import dispatch
from tests.arg_specs import BENCHMARK

_KERNEL = flags.DEFINE_string(
    "kernel", None, "a name of pallas_kernels.triton.tuning.KERNELS, but none of a decoding step"
)
_KEYS = flags.DEFINE_enum(
    "keys", "dense", ["compressed", "window", "dense"], "what an interval kernel attends"
)
_SHAPE = flags.DEFINE_enum("shape", "paper", list(BENCHMARK), "of heads")
_LENGTH = flags.DEFINE_integer("length", 65536, "tokens", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 5, "of each; the median counts", lower_bound=1)
_CANDIDATES = flags.DEFINE_string(
    "candidates",
    "rows:64,128;keys:32,64,128;num_warps:4,8;num_stages:2,3",
    "values to combine, by field of tuning.Tuning",
)


def parse(text: str) -> list[dict[str, int]]:
    """All combinations of "field:value,value;field:value".

    Raises:
      ValueError: if a field is missing or unknown, or a value is no positive integer.
    """
    from pallas_kernels.triton import tuning

    fields = [field.name for field in dataclasses.fields(tuning.Tuning)]
    parts = dict(part.strip().partition(":")[::2] for part in text.split(";") if part.strip())
    if set(parts) != set(fields):
        raise ValueError(f"--candidates={text!r} must give values for each of {', '.join(fields)}")
    values = [parts[field].split(",") for field in fields]
    for value in itertools.chain(*values):
        if not value.strip().isdigit() or int(value) < 1:
            raise ValueError(f"--candidates={text!r}: {value!r} is no positive integer")
    return [
        dict(zip(fields, map(int, chosen), strict=True)) for chosen in itertools.product(*values)
    ]


def operation(kernel: str, keys: str) -> str:
    """The name among `timing.cases` of the operation that launches a kernel."""
    if kernel == "select_blocks":
        return kernel
    if kernel.startswith("selected"):
        return "selected"
    return "dense_triton" if keys == "dense" else keys


def check(kernel: str, keys: str) -> None:
    """Raises UsageError if the operation on such keys never launches the kernel."""
    from pallas_kernels.triton import tuning

    if kernel not in tuning.KERNELS:
        raise app.UsageError(f"--kernel={kernel!r} is none of {', '.join(tuning.KERNELS)}")
    if kernel.startswith("step"):
        raise app.UsageError(
            f"--kernel={kernel} is launched by a decoding step, and the operations that are swept "
            "are those of training"
        )
    has_short = f"{kernel.removesuffix('_short')}_short" in tuning.KERNELS
    if has_short and kernel.endswith("_short") != (keys == "window"):
        raise app.UsageError(
            f"--kernel={kernel} does not run on --keys={keys}: windows, and nothing else, take the "
            "tunings named _short"
        )


class Sweep:
    """One operation at one shape, of which one kernel is tuned."""

    def __init__(self, spec, kernel: str, keys: str):
        self.kernel = kernel
        self.case = timing.cases(spec, "triton")[operation(kernel, keys)]
        self.arrays = jax.jit(timing.inputs(spec, "triton", self.case.arguments))()
        self.arguments = tuple(self.arrays[name] for name in self.case.arguments)
        self.backward = kernel.removesuffix("_short").endswith(("dq", "dkv"))
        if self.backward:
            pull = timing.trace_pull(self.case, self.arguments)
            self.arguments = (pull.lower().compile()(*self.arguments), self.arrays["cotangent"])

    def trace(self, candidate):
        """Traces the operation with a candidate in the place of the table's entry."""
        from pallas_kernels.triton import tuning

        with tuning.override(**{self.kernel: candidate}):
            if self.backward:
                return timing.trace_backward(*self.arguments)
            return timing.trace_forward(self.case, self.arguments)

    def run(self, candidates, samples: int) -> list[tuple]:
        """Each candidate with its `timing.Timing`, or with why it has none; the fastest first."""
        # The override holds for the whole process, so tracing goes one by one. It reads the tuning;
        # lowering, which is what compiles a Triton kernel, need not.
        traced = {x: timing.attempt(lambda: self.trace(x)) for x in candidates}
        results = []
        for candidate, function in timing.compiled(traced).items():
            if not isinstance(function, str):
                function = timing.attempt(lambda: timing.measure(function, self.arguments, samples))
            results.append((candidate, function))
        return sorted(results, key=lambda x: (isinstance(x[1], str), x[1]))


def table_line(kernel: str, spec, candidate) -> str:
    """A candidate as an entry of the table of pallas_kernels/triton/tuning.py, for this GPU."""
    from pallas_kernels.triton import launch, tuning

    _, capability = launch.device()
    size = max(spec.head_dim, spec.v_head_dim)
    features = next(f for f in tuning.FEATURES if size <= f)
    key = (kernel, tuning.device_class(capability), features, 16)
    values = ", ".join(map(str, dataclasses.astuple(candidate)))
    return f'("{key[0]}", {", ".join(map(str, key[1:]))}): Tuning({values}),'


def _report(results, kernel, spec, current):
    """Prints the sorted table and the best line."""
    print(f"{'rows':>5} {'keys':>5} {'warps':>5} {'stages':>6} {'ms':>9} {'least':>9} {'most':>9}")
    for candidate, result in results:
        line = "{:>5} {:>5} {:>5} {:>6}".format(*dataclasses.astuple(candidate))
        if isinstance(result, str):
            line += f" {result[:150]}"
        else:
            line += f" {result.median:>9.3f} {result.least:>9.3f} {result.most:>9.3f}"
        print(line + ("  <- the table's" if candidate == current else ""))
    best, result = results[0]
    if isinstance(result, str):
        raise SystemExit("No candidate ran.")
    print(table_line(kernel, spec, best))


def main(argv):
    """Sweeps and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Flags are written --name=value.")
    try:
        dispatch.explain("triton")
    except dispatch.UnsupportedError as error:
        raise SystemExit(f"A sweep needs a GPU and the Triton kernels. {error}") from None
    from pallas_kernels.triton import tuning

    kernel = _KERNEL.value
    check(kernel, _KEYS.value)
    try:
        candidates = [tuning.Tuning(**fields) for fields in parse(_CANDIDATES.value)]
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    spec = dataclasses.replace(BENCHMARK[_SHAPE.value], length=_LENGTH.value)
    sweep = Sweep(spec, kernel, _KEYS.value)
    dims = {"head_dim": spec.head_dim, "v_head_dim": spec.v_head_dim}
    current = tuning.lookup(kernel, **dims, dtype=sweep.arrays["q"].dtype)
    results = sweep.run(dict.fromkeys([*candidates, current]), _SAMPLES.value)
    print(f"{kernel}, {operation(kernel, _KEYS.value)}, {_SHAPE.value}, {_LENGTH.value} tokens")
    _report(results, kernel, spec, current)


if __name__ == "__main__":
    app.run(main)
