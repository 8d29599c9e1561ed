"""The one call of Pallas Mosaic GPU, how it is interpreted on a CPU, and what it refuses."""

import contextlib
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.calls import (  # noqa: F401 - kernels find here whatever a call needs
    batched,
    device,
    differentiable,
    nothing_attended,
    num_select_blocks,
    positive_scale,
)

CAPABILITY = 9.0  # Hopper: later devices have no wgmma
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128, 192, 256)
V_HEAD_DIMS = (64, 128, 256)
GROUPS = (1, 2, 4, 8, 16, 32, 64)
BLOCK_SIZES = (64, 128)
MOST_SELECTED = 64
SHARED_MEMORY = 232448  # bytes a program

_interpreted = False


@contextlib.contextmanager
def interpreted(detect_races: bool = True):
    """Within the context, kernels traced anew run in Pallas' interpreter, on any device.

    Args:
      detect_races: whether races are looked for; one that is found is printed.
    """
    global _interpreted
    # A copy that nobody waited for looks like an earlier one by the same of these "threads".
    params = plgpu.InterpretGPUParams(detect_races=detect_races, num_tma_threads_per_device=256)
    with plgpu.force_gpu_interpret_mode(params):
        before, _interpreted = _interpreted, True
        try:
            yield
        finally:
            _interpreted = before


def is_interpreted() -> bool:
    """Whether kernels are being traced for the interpreter."""
    return _interpreted


def launch(kernel, *arrays, out_type, programs, warpgroups, scratch):
    """Runs a Mosaic GPU kernel.

    Args:
      kernel: takes references to the arrays, then to the outputs, then `scratch` as one argument;
        a function, or a `functools.partial` of one, whose name the kernel gets.
        `jax.lax.axis_index("program")` and `axis_index("warpgroup")` say where it runs.
      *arrays: its operands, in global memory.
      out_type: a tuple of `jax.ShapeDtypeStruct`.
      programs: how many programs to launch; low ones start first.
      warpgroups: warpgroups a program.
      scratch: a tree of shared memory and barriers that the warpgroups of a program share.

    Returns:
      The outputs, as a list.
    """
    return plgpu.kernel(
        kernel,
        out_type=list(out_type),
        scratch_types=[scratch],
        grid=(programs,),
        grid_names=("program",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=getattr(kernel, "func", kernel).__name__.strip("_"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*arrays)


@functools.cache
def num_cores() -> int:
    """Streaming multiprocessors of the process' first device; an H100's where it is no GPU."""
    return getattr(jax.devices()[0], "core_count", None) or 132


def refusal(operation: str, *args, **kwargs) -> str | None:
    """Why Mosaic GPU cannot run such a call here, or None; see `pallas_kernels.KERNELS`."""
    kind, capability = device()
    if capability != CAPABILITY:
        return f"mosaic_gpu needs an NVIDIA GPU of the Hopper generation, and JAX runs on {kind}."
    if not args:
        return None
    if operation == "select_blocks":
        q, k = args[:2]
        return (
            _arrays_refusal({"q": q, "k": k})
            or _not_among(HEAD_DIMS, "features a head of q and k", q.shape[3])
            or _not_among(BLOCK_SIZES, "tokens a selected block", kwargs["select_block_size"])
            or _count_refusal(kwargs["num_selected_blocks"])
        )
    q, k, v = args[:3]
    reason = (
        _arrays_refusal({"q": q, "k": k, "v": v})
        or _not_among(HEAD_DIMS, "features a head of q and k", q.shape[3])
        or _not_among(V_HEAD_DIMS, "features a head of v", v.shape[3])
    )
    if reason is None and operation == "selected_attention":
        block_size = kwargs["block_size"] if "block_size" in kwargs else args[5]
        return _not_among(BLOCK_SIZES, "tokens a selected block", block_size) or _count_refusal(
            args[3].shape[-1]
        )
    return reason


def _not_among(allowed, what, value):
    if value in allowed:
        return None
    return f"mosaic_gpu takes {', '.join(map(str, allowed))} {what}, not {value}."


def _arrays_refusal(arrays):
    dtypes = {x.dtype.name for x in arrays.values()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return (
            f"mosaic_gpu takes one dtype of {', '.join(DTYPES)}, not {', '.join(sorted(dtypes))}."
        )
    group = arrays["q"].shape[2] // arrays["k"].shape[2]
    return _not_among(GROUPS, "query heads a key/value head", group)


def _count_refusal(num_selected):
    if 1 <= num_selected <= MOST_SELECTED:
        return None
    return f"mosaic_gpu selects 1 to {MOST_SELECTED} blocks, not {num_selected}."
