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
pytest.importorskip("jax_triton", reason="The Triton kernels need jax-triton: not installed here.")

import jax_triton
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.triton import blocks, interval, launch, selected, step, tuning

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


def gradients(attention, features, dtype, *where, groups=GROUPS):
    """Launches the kernels of an attention and of its gradients."""
    q, k = (of_queries(heads, features, dtype=dtype) for heads in (HEADS, groups))

    def run(q, k, v, *where):
        out, pull = jax.vjp(lambda *x: attention(*x, *where), q, k, v)
        return pull(out)

    jax.eval_shape(run, q, k, k, *where)


def interval_attention(features, dtype):
    for longest in (None, interval.SHORT):
        attention = functools.partial(
            interval.interval_attention, scale=features**-0.5, longest=longest
        )
        gradients(attention, features, dtype, of_queries(), of_queries())


def selected_attention(features, dtype, block_size=64, groups=GROUPS):
    attention = functools.partial(
        selected.selected_attention, block_size=block_size, scale=features**-0.5
    )
    gradients(attention, features, dtype, of_queries(groups, 16), of_queries(), groups=groups)


def select_blocks(features, dtype):
    jax.eval_shape(
        functools.partial(blocks.select_blocks, scale=features**-0.5, **GEOMETRY),
        of_queries(HEADS, features, dtype=dtype),
        jax.ShapeDtypeStruct((1, LENGTH // 16 - 1, GROUPS, features), dtype),
        of_queries(HEADS, dtype=jnp.float32),
        of_queries(),
        of_queries(),
    )


def sparse_step(features, dtype, heads=HEADS, groups=GROUPS):
    def of_row(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((128, *shape), dtype)

    def cache(length):
        return (of_row(length, groups, features),) * 2

    q, gates = of_row(heads, features), of_row(heads, 3)
    caches = (cache(LENGTH // 16 - 1), cache(LENGTH), cache(512))
    run = functools.partial(step.sparse_step, scale=features**-0.5, **GEOMETRY)
    jax.eval_shape(run, q, q, *caches, gates, of_row(dtype=jnp.int32))


def dense_step(features, dtype, heads=HEADS, groups=GROUPS):
    q, k = (jax.ShapeDtypeStruct((1, *x, features), dtype) for x in ((heads,), (LENGTH, groups)))
    run = functools.partial(step.dense_step, scale=features**-0.5)
    jax.eval_shape(run, q, k, k, jax.ShapeDtypeStruct((1,), jnp.int32))


OPERATIONS = (interval_attention, selected_attention, select_blocks, sparse_step, dense_step)


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


def is_descriptor(operand):
    return isinstance(operand, jax_triton.TensorDescriptor)


def operand_type(operand):
    if is_descriptor(operand):
        rows, features = operand.block_shape
        return f"tensordesc<bf16[{rows},{features}]>"
    return POINTERS[operand.dtype.name]


def compile_launch(capability, kernel, arrays, options):
    """Compiles a launch as jax-triton does: all pointers are aligned to 16 bytes."""
    constants = dict(options)
    backend = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    operands = kernel.arg_names[: len(arrays)]
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {name: operand_type(x) for name, x in zip(operands, arrays, strict=True)}
    assert set(constants) == set(kernel.arg_names) - set(operands)
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, x in enumerate(arrays) if not is_descriptor(x)
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=backend | {"enable_fp_fusion": True},
    )


# Steps compile to the same instructions on all devices, so that equal tiles need the same room. For
# 128 features every device's are compiled all the same.
ONCE_IS_ENOUGH = {
    (operation, capability, features, bits)
    for operation in ("sparse_step", "dense_step")
    for features in (64, 256)
    for capability, bits in ((100, 16), (100, 32), (90, 32))
}

# Where no tiles fit; `launch.refusal` says so.
IMPOSSIBLE = {("select_blocks", 86, 256, 32)}


def test_steps_that_are_not_compiled_have_the_tiles_of_others():
    for _, capability, features, bits in ONCE_IS_ENOUGH:
        compiled = 90 if bits == 16 else 80
        for kernel in ("step", "step_selected"):
            tiles = tuning.TABLE[kernel, capability, features, bits]
            assert tiles == tuning.TABLE[kernel, compiled, features, bits]


def test_the_table_is_complete():
    keys = itertools.product(tuning.KERNELS, tuning.SHARED_MEMORY, tuning.FEATURES, DTYPES)
    assert set(tuning.TABLE) == set(keys) - IMPOSSIBLE


def test_the_operations_below_look_up_every_kernel():
    found = [launches_of(operation, 90, 128, 16)[1] for operation in OPERATIONS]
    assert set.union(*found) == set(tuning.KERNELS)


@pytest.mark.parametrize("bits", DTYPES)
@pytest.mark.parametrize("features", tuning.FEATURES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_kernels_fit_every_device(operation, features, bits):
    """sm_86 takes the matrix instructions of sm_80, so that what it needs is compiled for that."""
    shared = {}
    for capability in tuning.SHARED_MEMORY:
        if (operation.__name__, capability, features, bits) in IMPOSSIBLE | ONCE_IS_ENOUGH:
            continue
        target = 80 if capability == 86 else capability
        for kernel, arrays, options in launches_of(operation, capability, features, bits)[0]:
            key = (kernel, target, *options.items())
            if key not in shared:
                shared[key] = compile_launch(target, kernel, arrays, options).metadata.shared
            limit = tuning.SHARED_MEMORY[capability]
            assert shared[key] <= limit, f"{kernel.__name__} wants {shared[key]} bytes of {limit}"


def large_group_of_odd_blocks(features, dtype):
    selected_attention(features, dtype, block_size=48, groups=1)
    sparse_step(features, dtype, groups=1)


@pytest.mark.parametrize(("capability", "bits"), [(86, 16), (86, 32), (90, 16)])
def test_large_groups_and_odd_blocks_fit(capability, bits):
    """64 heads a group, and blocks whose size is no power of two, take no more room."""
    for kernel, *rest in launches_of(large_group_of_odd_blocks, capability, 256, bits)[0]:
        target = 80 if capability == 86 else capability
        shared = compile_launch(target, kernel, *rest).metadata.shared
        assert shared <= tuning.SHARED_MEMORY[capability], kernel.__name__


@pytest.mark.parametrize(
    ("group", "head_dim", "dtype", "capability", "refused"),
    [
        (16, 128, jnp.bfloat16, 86, False),
        (16, 256, jnp.float32, 80, False),
        (64, 128, jnp.float32, 90, True),
        (64, 256, jnp.bfloat16, 86, True),
        (16, 256, jnp.float32, 86, True),
    ],
)
def test_refuses_what_has_no_room(group, head_dim, dtype, capability, refused, monkeypatch):
    monkeypatch.setattr(launch, "device", lambda: ("a GPU", capability / 10))
    q, k = (jax.ShapeDtypeStruct((1, 64, n, head_dim), dtype) for n in (group, 1))
    reason = launch.refusal("select_blocks", q, k, num_selected_blocks=16)
    assert (reason is not None) == refused
    assert not refused or f"groups of {group} heads" in reason
