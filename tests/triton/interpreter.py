"""Runs the Triton kernels on a CPU: Triton's interpreter over NumPy arrays, called from JAX.

Triton reads TRITON_INTERPRET when a kernel is decorated, so whoever uses this module sets it before
importing a kernel, in a process of its own. The interpreter multiplies bfloat16 wrongly; float32
and float16 are right.
"""

import sys
import threading

import jax
import jax.numpy as jnp
import jax_triton
import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import ReduceOps, interpreter_semantic
from triton.tools.tensor_descriptor import TensorDescriptor

from pallas_kernels.triton import launch, tuning

# XLA calls back from several threads at a time, and the interpreter patches Triton's module.
_one_at_a_time = threading.Lock()


class _Dtype(str):
    """The name of a dtype, with what else Triton asks of one."""

    __slots__ = ()

    @property
    def itemsize(self):
        return np.dtype(str(self)).itemsize


class HostTensor:
    """As much of a torch tensor as Triton's interpreter asks for, over a NumPy array."""

    def __init__(self, array):
        self.array = array
        self.dtype = _Dtype(array.dtype.name)

    def data_ptr(self):
        return self.array.ctypes.data

    # The interpreter copies a tensor's storage to the host and back; here all three are one.
    def untyped_storage(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        return self

    def cpu(self):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def copy_(self, _):
        return self


def tensor_range(*bounds):
    """A `range` that yields tensors if a bound is one, as loops of compiled kernels do."""
    steps = range(*map(int, bounds))
    if any(isinstance(bound, tl.tensor) for bound in bounds):
        return map(interpreter_semantic.to_tensor, steps)
    return steps


def interpreted_launch(kernel, *operands, out_type, grid, num_warps, num_stages, **constants):
    """Takes the place of `launch.launch`. Outputs start as NaN, or as a large integer."""
    del num_warps, num_stages
    leaves, tree = jax.tree.flatten(out_type)
    for name, module in list(sys.modules.items()):  # a kernel's parts may lie in several
        if name.startswith("pallas_kernels.triton."):
            vars(module).setdefault("range", tensor_range)

    def operand(array, given):
        tensor = HostTensor(array)
        if not isinstance(given, jax_triton.TensorDescriptor):
            return tensor
        return TensorDescriptor(
            tensor, list(given.shape), list(given.strides), list(given.block_shape)
        )

    def run(*arrays):
        # NumPy aligns to 16 bytes, which descriptors want, whatever is not tiny.
        arrays = [np.array(x) for x in arrays]
        poison = {"f": np.nan, "i": 123456789}
        outputs = [np.full(x.shape, poison[np.dtype(x.dtype).kind], x.dtype) for x in leaves]
        inputs = [operand(*pair) for pair in zip(arrays, operands, strict=True)]
        with _one_at_a_time, np.errstate(all="ignore"):
            kernel[grid if isinstance(grid, tuple) else (grid,)](
                *inputs, *map(HostTensor, outputs), **constants
            )
        return tuple(outputs)

    outputs = jax.pure_callback(run, tuple(leaves), *jax.tree.leaves(operands))
    return jax.tree.unflatten(tree, outputs)


_slow_reduction = ReduceOps.apply_impl


def reduction(self, input):
    """A reduction, where it is xor by NumPy.

    Sorting in Triton is full of these, and the interpreter reduces element by element.
    """
    if self.combine_fn is not tl.standard._xor_combine:
        return _slow_reduction(self, input)
    data = np.bitwise_xor.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
    return self.to_tensor(data, input[0].dtype)


def install(capability: float = 9.0, **tunings: tuning.Tuning):
    """Makes every launch an interpreted one, as if on a GPU of this compute capability."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("start Python with TRITON_INTERPRET=1 in its environment")
    launch.launch = interpreted_launch
    launch.device = lambda: ("interpreter", capability)
    ReduceOps.apply_impl = reduction
    tuning._overrides.update(tunings)


def normal(seed, shape, dtype=jnp.float32):
    """Normal random numbers."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def random_arrays(queries, keys, groups, group, head_dim, v_head_dim, dtype=jnp.float32):
    """q, k and v of two rows with `group` query heads in each of `groups` groups."""
    return (
        normal(1, (2, queries, groups * group, head_dim), dtype),
        normal(2, (2, keys, groups, head_dim), dtype),
        normal(3, (2, keys, groups, v_head_dim), dtype),
    )


def value_and_gradients(attention, *arrays):
    """out, lse and the gradients of the arrays, of which v is the last, from random cotangents."""

    # One compilation is a fifth of the time that JAX would take operation by operation.
    @jax.jit
    def run(*arrays):
        (out, lse), pull = jax.vjp(attention, *arrays)
        # In v's dtype first, so that they are the same whatever dtype the function returns.
        d_out = normal(98, out.shape).astype(arrays[-1].dtype).astype(out.dtype)
        return out, lse, *pull((d_out, normal(99, lse.shape)))

    return run(*arrays)


def assert_close(actual, expected, dtype):
    """Compares what `value_and_gradients` returns with the same in float32, by each one's scale."""
    # Sums in another order; in float16 inputs, probabilities and results are rounded to 11 bits.
    tolerance = {jnp.float32: 1e-5, jnp.float16: 4e-3}[jnp.dtype(dtype).type]
    names = ("out", "lse", *(len(actual) - 5) * ("d_gate",), "dq", "dk", "dv")
    for name, x, y in zip(names, actual, expected, strict=True):
        x, y = (np.asarray(value, np.float32) for value in (x, y))
        scale = max(np.abs(y, where=np.isfinite(y), out=np.zeros_like(y)).max(initial=0.0), 1.0)
        np.testing.assert_allclose(x, y, atol=tolerance * scale, rtol=0, err_msg=name)
