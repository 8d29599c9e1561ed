"""What a call of any kernel needs, whatever the kernel is written in."""

import functools

import jax
import jax.numpy as jnp


def batched(function):
    """Makes vmap fold the mapped axis into the batch, which leads every argument and result."""
    function = jax.custom_batching.custom_vmap(function)

    @function.def_vmap
    def rule(axis_size, in_batched, *args):
        def fold(x, is_batched):
            if not is_batched:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        def unfold(x):
            return x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:])

        results = jax.tree.map(unfold, function(*map(fold, args, in_batched)))
        return results, jax.tree.map(lambda _: True, results)

    return function


def differentiable(forward, backward):
    """Joins the two passes of an attention to one function that vmaps and differentiates.

    Args:
      forward: from q, k, v and two integer arrays, which say what is attended, to (out, lse).
      backward: from all of these and the gradients of out and lse to those of q, k and v.

    Returns:
      A function as `forward`.
    """

    @jax.custom_vjp
    def attention(*arrays):
        return batched(forward)(*arrays)

    def forward_rule(*arrays):
        results = attention(*arrays)
        return results, (*arrays, *results)

    def backward_rule(residuals, gradients):
        return *batched(backward)(*residuals, *gradients), None, None

    attention.defvjp(forward_rule, backward_rule)
    return attention


def positive_scale(q, scale):
    """Moves the sign of the scale, or its being 0, into q: the kernels want a scale above 0."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (0 * q, 1.0)


def num_select_blocks(
    num_compressed: int, *, compress_block_size: int, compress_stride: int, select_block_size: int
) -> int:
    """As many blocks as begin among the tokens that could have made C compressed keys, no more."""
    tokens = num_compressed * compress_stride + compress_block_size - 1
    return max(-(-tokens // select_block_size), 1)


@functools.cache
def device() -> tuple[str, float]:
    """The kind of the process' first device, and its compute capability; 0 if it has none."""
    first = jax.devices()[0]
    capability = getattr(first, "compute_capability", 0) if first.platform == "gpu" else 0
    return first.device_kind, float(capability)
