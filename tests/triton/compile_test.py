"""Every kernel compiles for every device of the tuning table and fits its shared memory. No GPU.

The operations are traced with a recorder in the place of `launch.launch`, so that operands,
constants and tunings are those of real calls; Triton compiles what was recorded ahead of time.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton", reason="The Triton kernels need triton: not installed here.")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.triton import blocks, interval, launch, selected, tuning

FEATURES = (64, 128, 256)
DTYPES = {16: jnp.bfloat16, 32: jnp.float32}
POINTERS = {"bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32"}

# The paper's geometry (section 4.1), at a length where offsets into q pass 2^31.
LENGTH, HEADS, GROUPS = 262144, 64, 4
GEOMETRY = {
    "compress_block_size": 32,
    "compress_stride": 16,
    "select_block_size": 64,
    "num_selected_blocks": 16,
    "num_initial_blocks": 1,
    "num_local_blocks": 2,
}


def of_queries(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct((1, LENGTH, *shape), dtype)


def gradients(attention, features, dtype, *where):
    """Launches the kernels of an attention and of its gradients."""
    q, k = (of_queries(heads, features, dtype=dtype) for heads in (HEADS, GROUPS))

    def run(q, k, v, *where):
        out, pull = jax.vjp(lambda *x: attention(*x, *where), q, k, v)
        return pull(out)

    jax.eval_shape(run, q, k, k, *where)


def interval_attention(features, dtype):
    attention = functools.partial(interval.interval_attention, scale=features**-0.5)
    gradients(attention, features, dtype, of_queries(), of_queries())


def selected_attention(features, dtype):
    attention = functools.partial(selected.selected_attention, block_size=64, scale=features**-0.5)
    gradients(attention, features, dtype, of_queries(GROUPS, 16), of_queries())


def select_blocks(features, dtype):
    jax.eval_shape(
        functools.partial(blocks.select_blocks, scale=features**-0.5, **GEOMETRY),
        of_queries(HEADS, features, dtype=dtype),
        jax.ShapeDtypeStruct((1, LENGTH // 16 - 1, GROUPS, features), dtype),
        of_queries(HEADS, dtype=jnp.float32),
        of_queries(),
        of_queries(),
    )


OPERATIONS = (interval_attention, selected_attention, select_blocks)


def launches_of(operation, capability, features, bits):
    """The kernels that an operation and its gradients launch.

    Returns:
      (kernel, operands and outputs, options) of each launch, and the names of the tunings that were
      looked up.
    """
    launches, looked_up = [], set()
    lookup = tuning.lookup

    def record(kernel, *arrays, out_type, grid, **options):
        launches.append((kernel, [*arrays, *jax.tree.leaves(out_type)], options))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_type)

    def record_lookup(kernel, **where):
        looked_up.add(kernel)
        return lookup(kernel, **where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "launch", record)
        patch.setattr(launch, "device", lambda: ("compiled for", capability / 10))
        patch.setattr(tuning, "lookup", record_lookup)
        operation(features, DTYPES[bits])
    return launches, looked_up


def compile_launch(capability, kernel, arrays, options):
    """Compiles a launch as jax-triton does: all pointers are aligned to 16 bytes."""
    constants = dict(options)
    backend = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    pointers = kernel.arg_names[: len(arrays)]
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {name: POINTERS[x.dtype.name] for name, x in zip(pointers, arrays, strict=True)}
    assert set(constants) == set(kernel.arg_names) - set(pointers)
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=backend | {"enable_fp_fusion": True},
    )


def test_the_table_is_complete():
    keys = itertools.product(tuning.KERNELS, tuning.SHARED_MEMORY, FEATURES, DTYPES)
    assert set(tuning.TABLE) == set(keys)


def test_the_operations_below_look_up_every_kernel():
    found = [launches_of(operation, 90, 128, 16)[1] for operation in OPERATIONS]
    assert set.union(*found) == set(tuning.KERNELS)


# Products of 16 bits are made in another way on each device. Those of float32 are plain fused
# multiply-adds everywhere, slow to compile and of one shared memory: one compilation stands for all
# devices that have the same tuning.
CASES = [(16, (capability,)) for capability in tuning.SHARED_MEMORY]
CASES += [(32, tuple(tuning.SHARED_MEMORY))]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("bits", "capabilities"), CASES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_compile_and_fit(operation, bits, capabilities, features):
    used = {}
    for capability in capabilities:
        for kernel, arrays, options in launches_of(operation, capability, features, bits)[0]:
            key = (kernel, *options.items())
            if key not in used:
                used[key] = compile_launch(capability, kernel, arrays, options).metadata.shared
            limit = tuning.SHARED_MEMORY[capability]
            assert used[key] <= limit, f"{kernel.__name__} wants {used[key]} bytes of {limit}"
