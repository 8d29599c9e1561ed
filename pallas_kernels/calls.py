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
      backward: from all of these and the gradients of out and lse to those of q, k and v, and
        out . d_out, the sums over the features, float32 [B, T, N], which it needs anyway. Of lse it
        reads exp(scores - lse), the probabilities, which are 0 where lse is infinite, of either
        sign.

    Returns:
      A function of a gate and the arguments of `forward`, with its results. The gate is None, or
      float32 [B, T, N] and at least 0, and multiplies out, which is float32 then and whose gradient
      is rounded to q's dtype. A negative gate gives NaN for gradients; one of 0, or below 2**-100,
      stops the gradient of lse too.
    """

    def results(gate, *arrays):
        out, lse = batched(forward)(*arrays)
        return _gated(out, gate), _mapped_with(gate, lse), out

    @jax.custom_vjp
    def attention(gate, *arrays):
        return results(gate, *arrays)[:2]

    def forward_rule(gate, *arrays):
        gated, lse, out = results(gate, *arrays)
        return (gated, lse), (gate, *arrays, out, lse)

    def backward_rule(residuals, gradients):
        gate, *arrays, out, lse = residuals
        d_gated, d_lse = gradients
        run = functools.partial(batched(backward), *arrays, out)
        if gate is None:
            *gradients, _ = run(lse, d_gated, d_lse)
            return None, *gradients, None, None
        if out.dtype == jnp.float16:  # in which probabilities times small gates are lost
            d_gate = (out.astype(gate.dtype) * d_gated).sum(axis=-1)
            *gradients, _ = run(lse, _gated(d_gated, gate).astype(out.dtype), d_lse)
        else:
            lse, d_lse = _gated_probabilities(lse, d_lse, gate)
            *gradients, d_gate = run(lse, d_gated.astype(out.dtype), d_lse)
        return d_gate, *gradients, None, None

    attention.defvjp(forward_rule, backward_rule)
    return attention


def _gated(out, gate):
    return out if gate is None else gate[..., None] * out.astype(gate.dtype)


def _mapped_with(gate, lse):
    """lse, which vmap maps wherever it maps the gate.

    A custom_vjp of which vmap maps some results alone gives their gradients, summed over the mapped
    axis, to the backward pass of each of its elements, and sums what comes from it once more.
    """
    return lse if gate is None else jnp.where(gate == gate, lse, lse)


def _gated_probabilities(lse, d_lse, gate):
    """lse, and its gradient, by which the backward pass without a gate makes that with one.

    A score's gradient is p (gate * dp - gate * delta + d_lse), and values take p * gate of d_out:
    that is the pass without a gate whose probabilities are p * gate = exp(score - (lse - log gate))
    and whose d_lse is d_lse / gate. So nothing of the size of d_out is ever multiplied by a gate.
    """
    shut = (gate >= 0) & (gate < 2.0**-100)  # below, d_lse / gate might overflow
    gate = jnp.where(shut, 1, gate)
    return jnp.where(shut, jnp.inf, lse - jnp.log(gate)), d_lse / gate


def nothing_attended(q, v, gate):
    """out and lse of an attention without keys."""
    out = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    return _gated(out, gate), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)


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
