"""The three branches and the selection between them, as functions of arrays.

Each branch says which keys a query may see, an interval or a list of blocks, and hands that to one
kernel operation. Every function here but `window_and_sum` takes:

    scale             a Python number that multiplies the scores; 1 / sqrt(H) by default
    gate              [B, T, N], at least 0, which multiplies a branch's outputs; they are float32
                      then, ready to be summed, whatever q's dtype. The gradients cost less than
                      those of a product outside. A kernel may give NaN gradients for a negative
                      gate, and no gradient by way of lse where the gate is 0, and rounds the
                      gradient of the outputs to q's dtype. None, the default, is no gate.
    q_positions       int32 [B, T], the position of each query among the keys; 0, 1, ... by default,
                      which is right where queries and keys are of the same tokens. They do not
                      decrease along a row, and none is behind the last token; a chunk of queries
                      over the keys of all tokens so far starts at its offset.
    document_starts   int32 [B, T], for rows that hold several documents: the position at which the
                      query's document begins, a multiple of select_block_size; 0 by default
    implementation    see `nsa_jax.ops.dispatch`

and raises ValueError if shapes do not fit, UnsupportedError if the implementation asked for by name
cannot run the call. All of them work under jit, vmap, remat and scan, and all but `window_and_sum`
under grad (reverse mode). What is returned as float32 is float64 for float64 inputs.
"""

import math
import numbers

import jax
import jax.numpy as jnp

from nsa_jax.config import NSAConfig
from nsa_jax.ops import compression, dispatch, reference
from nsa_jax.ops.xla.common import accumulation_dtype, gated
from nsa_jax.typing import Array, Float, Int


def compressed_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    v: Float[Array, "B C K V"],
    *,
    config: NSAConfig,
    gate: Float[Array, "B T N"] | None = None,
    scale: float | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    document_starts: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention over the compressed keys and values that are complete at the query (eq. 5, 7).

    Args:
      q: queries.
      k: compressed keys; block i stands for the tokens i*d to i*d + l - 1.
      v: compressed values.
      config: gives l and d.
      gate: see the module's docstring, as for the arguments below.
      scale: the scores'.
      q_positions: positions.
      document_starts: documents.
      implementation: by name, or "auto".

    Returns:
      The outputs in q's dtype, or gated in float32, exactly 0 where no block is complete,
      and the natural logarithm of the softmax's denominators in float32, -inf there.
    """
    check_shapes("compressed_attention", q, k, v, q_positions, document_starts)
    gate = _gate("compressed_attention", q, gate)
    sizes = _compressed_sizes(config)
    if implementation == "reference":
        where = {"q_positions": q_positions, "document_starts": document_starts}
        out, lse = reference.compressed_attention(q, k, v, scale=scale, **sizes, **where)
        return gated(out, gate), lse
    q_positions, document_starts = _positions(q, q_positions, document_starts)
    lo, hi = compression.visible_blocks(
        q_positions,
        document_starts,
        block_size=config.compress_block_size,
        stride=config.compress_stride,
    )
    return dispatch.run(
        "interval_attention",
        implementation,
        *(q, k, v, lo, hi),
        scale=_scale(q, scale),
        gate=gate,
    )


def select_blocks(
    q: Float[Array, "B T N H"],
    k_compressed: Float[Array, "B C K H"],
    lse: Float[Array, "B T N"],
    *,
    config: NSAConfig,
    scale: float | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    document_starts: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
) -> Int[Array, "B T K M"]:
    """The blocks that each query attends in the selected branch (equations 8 to 11).

    The probabilities of the compressed branch, mapped onto selection blocks by token overlap and
    summed over the heads of a group, rank the blocks of the query's document that begin at or
    before it. The forced blocks come first and count within n; ties go to the lower block. No
    gradient flows through the choice.

    Args:
      q: the queries of the compressed branch.
      k_compressed: its keys.
      lse: its denominators, from `compressed_attention`.
      config: gives the geometry.
      scale: see the module's docstring, as for the arguments below.
      q_positions: positions.
      document_starts: documents.
      implementation: by name, or "auto".

    Returns:
      int32 [B, T, K, n]: block indices in ascending order, then -1 where there is no further block.
    """
    check_shapes("select_blocks", q, k_compressed, None, q_positions, document_starts)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"select_blocks: lse {lse.shape} must be [B, T, N] = {q.shape[:3]}")
    q, k_compressed, lse = jax.lax.stop_gradient((q, k_compressed, lse))
    sizes = selection_sizes(config)
    if implementation == "reference":
        where = {"q_positions": q_positions, "document_starts": document_starts}
        return reference.select_blocks(q, k_compressed, scale=scale, **sizes, **where)
    q_positions, document_starts = _positions(q, q_positions, document_starts)
    return dispatch.run(
        "select_blocks",
        implementation,
        q,
        k_compressed,
        lse,
        q_positions,
        document_starts,
        scale=_scale(q, scale),
        **sizes,
    )


def selected_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    block_indices: Int[Array, "B T K M"],
    *,
    config: NSAConfig,
    gate: Float[Array, "B T N"] | None = None,
    scale: float | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention over the tokens of the selected blocks up to the query itself (equation 12).

    Args:
      q: queries.
      k: keys.
      v: values.
      block_indices: int32, distinct within a row, in any order; -1 stands for no block.
      config: gives l'.
      gate: see the module's docstring, as for the arguments below.
      scale: the scores'.
      q_positions: positions.
      implementation: by name, or "auto".

    Returns:
      The outputs in q's dtype, or gated in float32, exactly 0 where no token may be seen,
      and the natural logarithm of the softmax's denominators in float32, -inf there.
    """
    check_shapes("selected_attention", q, k, v, q_positions)
    gate = _gate("selected_attention", q, gate)
    rows, dtype = (*q.shape[:2], k.shape[2]), block_indices.dtype
    if block_indices.shape[:-1] != rows or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"selected_attention: block_indices {dtype}{block_indices.shape} must be integers of "
            f"shape [B, T, K, M] with B, T, K = {rows}"
        )
    block_size = config.select_block_size
    if implementation == "reference":
        where = {"select_block_size": block_size, "q_positions": q_positions}
        out, lse = reference.selected_attention(q, k, v, block_indices, scale=scale, **where)
        return gated(out, gate), lse
    q_positions, _ = _positions(q, q_positions, None)
    return dispatch.run(
        "selected_attention",
        implementation,
        q,
        k,
        v,
        block_indices.astype(jnp.int32),
        q_positions,
        block_size=block_size,
        scale=_scale(q, scale),
        gate=gate,
    )


def sliding_window_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    config: NSAConfig,
    gate: Float[Array, "B T N"] | None = None,
    scale: float | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    document_starts: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention over the last w tokens of the document, the query's own included (section 3.3.3).

    Args:
      q: queries.
      k: keys.
      v: values.
      config: gives w.
      gate: see the module's docstring, as for the arguments below.
      scale: the scores'.
      q_positions: positions.
      document_starts: documents.
      implementation: by name, or "auto".

    Returns:
      The outputs in q's dtype, or gated in float32, and the natural logarithm of the softmax's
      denominators in float32.
    """
    check_shapes("sliding_window_attention", q, k, v, q_positions, document_starts)
    gate = _gate("sliding_window_attention", q, gate)
    if implementation == "reference":
        where = {"q_positions": q_positions, "document_starts": document_starts}
        where |= {"window_size": config.window_size}
        out, lse = reference.sliding_window_attention(q, k, v, scale=scale, **where)
        return gated(out, gate), lse
    return dispatch.run(
        "interval_attention",
        implementation,
        *(q, k, v, *_window(q, config, q_positions, document_starts)),
        scale=_scale(q, scale),
        longest=config.window_size,
        gate=gate,
    )


def window_and_sum(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    others: tuple[Float[Array, "B T N V"], Float[Array, "B T N V"]],
    gates: Float[Array, "B T N 3"],
    *,
    config: NSAConfig,
    scale: float | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    document_starts: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N V"]:
    """The sliding window's outputs and those of the other branches, gated and summed (equation 5).

    One kernel, which spares the window's outputs a way through memory and the sum one of its two
    over the others'. It has no derivatives, and runs where `sums_in_one_kernel` says so.

    Args:
      q, k, v: as of `sliding_window_attention`.
      others: the outputs of the compressed and of the selected branch, without a gate.
      gates: of the branches in the order compressed, selected, window.
      config: gives w.
      scale, q_positions, document_starts: see the module's docstring.

    Returns:
      The sum, in q's dtype.
    """
    return dispatch.run(
        "gated_sum",
        "mosaic_gpu",
        *(q, k, v, *_window(q, config, q_positions, document_starts)),
        others=tuple(x.astype(q.dtype) for x in others),
        gates=gates.astype(jnp.float32),
        scale=_scale(q, scale),
        longest=config.window_size,
    )


def sums_in_one_kernel(q, k, v, *, config: NSAConfig, implementation: str) -> bool:
    """Whether `window_and_sum` can run a call that an implementation was asked for."""
    if implementation not in ("auto", "mosaic_gpu"):
        return False
    longest = config.window_size
    return dispatch.choose("gated_sum", "auto", q, k, v, longest=longest) == "mosaic_gpu"


def _window(q, config, q_positions, document_starts):
    """The first key that each query sees through the window, and the end."""
    q_positions, document_starts = _positions(q, q_positions, document_starts)
    return jnp.maximum(q_positions - config.window_size + 1, document_starts), q_positions + 1


def check_shapes(operation, q, k, v=None, q_positions=None, document_starts=None) -> None:
    """Raises ValueError unless the arrays of one branch fit each other."""

    def refuse(problem):
        raise ValueError(f"{operation}: {problem}")

    arrays = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, x in arrays.items():
        if x.ndim != 4:
            refuse(f"{name} {x.shape} must have four dimensions: batch, position, head, feature")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            refuse(f"{name} is {x.dtype} and must be of a floating-point dtype")
    if 0 in q.shape:
        refuse(f"q {q.shape} must not be empty")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        refuse(f"q {q.shape} and k {k.shape} must agree in batch and head dimension")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        refuse(f"the {k.shape[2]} key/value heads of k must divide the {q.shape[2]} heads of q")
    if v is not None and v.shape[:3] != k.shape[:3]:
        refuse(f"k {k.shape} and v {v.shape} must agree in all but the last dimension")
    for name, x in (("q_positions", q_positions), ("document_starts", document_starts)):
        if x is not None:
            check_positions(operation, name, x, q.shape[:2])


def check_positions(operation, name, x, shape) -> None:
    """Raises ValueError unless x holds integers of shape [B, T]."""
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"{operation}: {name} {x.dtype}{x.shape} must be integers of shape [B, T] = {shape}"
        )


def _positions(q, q_positions, document_starts):
    shape = q.shape[:2]
    if q_positions is None:
        q_positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if document_starts is None:
        document_starts = jnp.zeros(shape, jnp.int32)
    return q_positions.astype(jnp.int32), document_starts.astype(jnp.int32)


def _gate(operation, q, gate):
    if gate is None:
        return None
    if jnp.shape(gate) != q.shape[:3]:
        raise ValueError(f"{operation}: gate {jnp.shape(gate)} must be [B, T, N] = {q.shape[:3]}")
    return gate.astype(accumulation_dtype(q))


def _scale(q, scale):
    if scale is None:
        return q.shape[-1] ** -0.5
    if not isinstance(scale, numbers.Real):
        raise ValueError(
            f"scale must be a Python number, not {type(scale).__name__}: kernels are compiled for "
            "it. To learn one, multiply q by it"
        )
    if not math.isfinite(scale):
        raise ValueError(f"{scale=} must be finite")
    return float(scale)


def _compressed_sizes(config):
    return {
        "compress_block_size": config.compress_block_size,
        "compress_stride": config.compress_stride,
    }


def selection_sizes(config: NSAConfig) -> dict[str, int]:
    """The geometry as the keywords of the kernel operations that select."""
    return _compressed_sizes(config) | {
        "select_block_size": config.select_block_size,
        "num_selected_blocks": config.num_selected_blocks,
        "num_initial_blocks": config.num_initial_blocks,
        "num_local_blocks": config.num_local_blocks,
    }
