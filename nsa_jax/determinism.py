"""jax.jit for programs whose results repeat to the bit from one process to the next."""

import functools

import jax

#: On a GPU the compiler otherwise times several kernels for each product and keeps the one that was
#: fastest just then, and with it an order of summation; and it may add with atomics.
COMPILER_OPTIONS = {"xla_gpu_deterministic_ops": True}

#: jax.jit with those options. JAX takes options of the outermost program alone: what it returns is
#: not to be called under another jit, grad or scan.
jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
