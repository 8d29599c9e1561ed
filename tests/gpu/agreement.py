"""How near a result must be."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

# Of the largest element of a tensor. float32 is summed in another order over a few hundred terms,
# and tf32, which would be off by 1e-3, is never used. In 16 bits the inputs are equal, but
# probabilities and each branch's result are rounded to 11 bits (float16; 2**-11 = 5e-4) or 8
# (bfloat16; 2**-8 = 4e-3). Gradients pass through two such products, the score's and its own.
TOLERANCE = {jnp.float32: 1e-5, jnp.float16: 2e-3, jnp.bfloat16: 1e-2}


def in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def assert_close(actual, expected, tolerance):
    """Compares trees leaf by leaf, each by the largest element of what is expected."""
    chex.assert_trees_all_equal_structs(actual, expected)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for x, (path, y) in zip(jax.tree.leaves(actual), paths, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        error, size = np.abs(x - y).max(initial=0), np.abs(y).max(initial=0)
        name = jax.tree_util.keystr(path)
        assert error <= tolerance * size, f"{name}: off by {error} where the largest is {size}"
