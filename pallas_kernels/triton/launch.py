"""The one call of jax-triton, and what Triton refuses."""

import importlib.util

import jax
import jax.numpy as jnp

from pallas_kernels.calls import (  # noqa: F401 - kernels find here whatever a call needs
    batched,
    device,
    differentiable,
    num_select_blocks,
    positive_scale,
)

DTYPES = ("bfloat16", "float16", "float32")
OLDEST_CAPABILITY = 8.0  # Ampere
MOST_SELECTED = 128
LARGEST_GRID = 65535  # programs in the second dimension, by CUDA


def launch(kernel, *arrays, out_type, grid, num_warps, num_stages, **constants):
    """Runs a Triton kernel on arrays, then outputs, then compile-time constants by name.

    Args:
      kernel: a function decorated by `triton.jit`.
      *arrays: its first operands.
      out_type: a pytree of `jax.ShapeDtypeStruct`, its next operands.
      grid: how many programs to launch, in up to three dimensions.
      num_warps: warps a program.
      num_stages: depth of the software pipeline.
      **constants: its constexpr parameters.

    Returns:
      The outputs, arranged as `out_type`.
    """
    import jax_triton

    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_type=out_type,
        grid=grid,
        name=kernel.__name__,
        backend_options={
            "num_warps": num_warps,
            "num_stages": num_stages,
            # Fused multiply-adds, whatever the default of the installed Triton.
            "enable_fp_fusion": True,
        },
        **constants,
    )


def precision(dtype) -> str:
    """How `tl.dot` multiplies operands of a dtype.

    float32 is never rounded to tf32: three products of tf32 parts keep its accuracy, at a quarter
    of the time that the plain float32 units take.
    """
    return "tf32x3" if jnp.dtype(dtype) == jnp.float32 else "ieee"


def sizes(q, k, v, scale):
    """The constants that every attention kernel is compiled for."""
    from pallas_kernels.triton.common import padded

    return {
        "SCALE": scale,
        "T": q.shape[1],
        "S": k.shape[1],
        "N": q.shape[2],
        "K": k.shape[2],
        "H": q.shape[3],
        "V": v.shape[3],
        "HP": padded(q.shape[3]),
        "VP": padded(v.shape[3]),
        "PRECISION": precision(q.dtype),
    }


def like(q, features):
    """The types of an array [B, T, N, features] in q's dtype, and of one number a row of it."""
    return (
        jax.ShapeDtypeStruct((*q.shape[:3], features), q.dtype),
        jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
    )


def row_loader(x, size):
    """What a kernel loads tiles of `size` whole rows of x [B, S, K, H] from.

    On a GPU that has the tensor memory accelerator, since Hopper, its descriptor of x as
    [B * S, K * H], if a tile of one head is a box of it; else x. (A descriptor made on the device,
    which could end where a program's keys do, would need memory that jaxlib allocates at launch,
    and CUDA graphs, which XLA makes of whole programs, refuse that.)

    Returns:
      The operand, and whether it is a descriptor.
    """
    batch, length, heads, features = x.shape
    _, capability = device()
    is_box = features >= 16 and features & (features - 1) == 0 and x.dtype.itemsize == 2
    if capability < 9 or not is_box or x.size == 0:
        return x, False
    import jax_triton

    x = x.reshape(batch * length, heads * features)
    return jax_triton.TensorDescriptor.from_array(x, (size, features)), True


def refusal(operation: str, *args, **kwargs) -> str | None:
    """Why Triton cannot run such a call here, or None; see `pallas_kernels.KERNELS`."""
    kind, capability = device()
    if capability < OLDEST_CAPABILITY:
        return f"triton needs an NVIDIA GPU since Ampere, and JAX runs on {kind} here."
    if importlib.util.find_spec("jax_triton") is None:
        return "triton needs jax-triton; pip install 'nsa-jax[cuda13]' installs it."
    if not args:
        return None
    if operation == "select_blocks":
        q, k = args[:2]
        return (
            _arrays_refusal({"q": q, "k": k})
            or _count_refusal(kwargs["num_selected_blocks"])
            or _room_refusal(q, k, kind)
        )
    if operation == "sparse_step":
        q, q_compressed, *caches = args[:5]
        reasons = (
            _arrays_refusal({"q": q, "q_compressed": q_compressed, "k": k, "v": v})
            for k, v in caches
        )
        return (
            next(filter(None, reasons), None)
            or _count_refusal(kwargs["num_selected_blocks"])
            or _strides_refusal(q, caches[0][1], kwargs)
        )
    reason = _arrays_refusal(dict(zip(("q", "k", "v"), args, strict=False)))
    if reason is None and operation == "selected_attention":
        reason = _count_refusal(args[3].shape[-1])
    return reason


def _arrays_refusal(arrays):
    from pallas_kernels.triton import tuning

    dtypes = {x.dtype.name for x in arrays.values()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"triton takes one dtype of {', '.join(DTYPES)}, not {', '.join(sorted(dtypes))}."
    for name, x in arrays.items():
        if x.shape[-1] > tuning.FEATURES[-1]:
            return (
                f"triton takes up to {tuning.FEATURES[-1]} features a head, "
                f"and {name} has {x.shape[-1]}."
            )
    batch, _, heads, _ = arrays["k"].shape
    if batch * heads > LARGEST_GRID:
        return f"triton takes up to {LARGEST_GRID} rows times key/value heads, not {batch * heads}."
    return None


def _count_refusal(num_selected):
    if not 1 <= num_selected <= MOST_SELECTED:
        return f"triton selects 1 to {MOST_SELECTED} blocks, not {num_selected}."
    return None


def _strides_refusal(q, v, sizes):
    """A step over compressed entries takes whole selection blocks."""
    from pallas_kernels.triton import tuning

    dims = {"head_dim": q.shape[-1], "v_head_dim": v.shape[-1]}
    most = tuning.lookup("step", **dims, dtype=q.dtype).keys
    if sizes["select_block_size"] > most * sizes["compress_stride"]:
        return (
            f"triton's sparse_step takes selected blocks of up to {most} strides, and "
            f"{sizes['select_block_size']} tokens are more than {most} of "
            f"{sizes['compress_stride']}."
        )
    return None


def _room_refusal(q, k, kind):
    """select_blocks keeps four queries at least of a whole group in shared memory."""
    from pallas_kernels.triton import blocks, tuning

    group, features = q.shape[2] // k.shape[2], q.shape[3]
    limit = tuning.SHARED_MEMORY[tuning.device_class(device()[1])]
    if blocks.shared_memory(group, features, q.dtype) > limit:
        return (
            f"triton's select_blocks has no room on {kind} for groups of {group} heads of "
            f"{features} {q.dtype.name} features."
        )
    return None
