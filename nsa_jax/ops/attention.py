"""Native Sparse Attention: three branches, gated and summed (equation 5)."""

import functools

import jax
import jax.numpy as jnp

from nsa_jax.config import NSAConfig
from nsa_jax.ops import branches, compression
from nsa_jax.typing import Array, Float, Int, KeyValue


def native_sparse_attention(
    q: Float[Array, "B T N H"],
    compressed: KeyValue,
    selected: KeyValue,
    window: KeyValue,
    gates: Float[Array, "B T N 3"],
    *,
    config: NSAConfig,
    scale: float | None = None,
    q_compressed: Float[Array, "B T N H"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    document_starts: Int[Array, "B T"] | None = None,
    block_indices: Int[Array, "B T K M"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T N V"], Int[Array, "B T K M"]]:
    """Causal attention through compressed blocks, selected blocks and a sliding window.

    Args:
      q: queries.
      compressed: keys [B, C, K, H] and values [B, C, K, V] of the compressed blocks, block i of
        which stands for the tokens i*d to i*d + l - 1.
      selected: keys [B, S, K, H] and values [B, S, K, V] of the tokens, for the selected branch.
      window: likewise for the sliding window; the same arrays may serve both.
      gates: the weight of each branch in the order compressed, selected, window, at least 0: a
        negative one may give NaN for gradients. The paper's are sigmoids and need not sum to 1.
      config: the geometry.
      scale: multiplies the scores; 1 / sqrt(H) by default.
      q_compressed: queries for the compressed branch where they differ from q, as when only one of
        the two is rotated.
      q_positions: int32, the position of each query among the tokens, rising by one along a row;
        0, 1, ... by default.
      document_starts: int32, for rows that hold several documents, the position at which the
        query's document begins: a multiple of select_block_size. 0 by default.
      block_indices: the blocks to attend, int32, distinct within a row and -1 for none, in place
        of the ones that the compressed scores select.
      implementation: "auto", or one of `nsa_jax.ops.dispatch.IMPLEMENTATIONS` by name.

    Returns:
      The attention's output [B, T, N, V] in q's dtype, and the selected blocks [B, T, K, n], int32
      in ascending order, then -1 where there is no further block.
      On NVIDIA Hopper the output may differ by roundings between a call that is differentiated and
      one that is not, whose sum the window's kernel makes.

    Raises:
      ValueError: if shapes do not fit each other or there is no such implementation.
      UnsupportedError: if the implementation asked for by name cannot run this call.
    """
    q_compressed = q if q_compressed is None else q_compressed
    _check_branches(q, q_compressed, compressed, selected, window, gates, config)
    attend = functools.partial(_attend, config=config, scale=scale, implementation=implementation)
    if branches.sums_in_one_kernel(q, *window, config=config, implementation=implementation):
        attend = _with_derivatives_of(attend, functools.partial(attend, in_one_kernel=True))
    where = q_positions, document_starts
    return attend(q, q_compressed, compressed, selected, window, gates, *where, block_indices)


def _attend(
    q,
    q_compressed,
    compressed,
    selected,
    window,
    gates,
    q_positions,
    document_starts,
    block_indices,
    *,
    config,
    scale,
    implementation,
    in_one_kernel=False,
):
    """native_sparse_attention; `in_one_kernel`: the window and the sum, without derivatives."""
    where = {"config": config, "scale": scale, "q_positions": q_positions}
    documents = {"document_starts": document_starts}
    by = {"implementation": implementation}
    gate = (None,) * 3 if in_one_kernel else jnp.moveaxis(gates, -1, 0)

    out_compressed, lse = branches.compressed_attention(
        q_compressed, *compressed, gate=gate[0], **where, **documents, **by
    )
    if block_indices is None:
        block_indices = branches.select_blocks(
            q_compressed, compressed[0], lse, **where, **documents, **by
        )
    out_selected, _ = branches.selected_attention(
        q, *selected, block_indices, gate=gate[1], **where, **by
    )
    if in_one_kernel:
        others = out_compressed, out_selected
        out = branches.window_and_sum(q, *window, others, gates, **where, **documents)
        return out, block_indices
    out_window, _ = branches.sliding_window_attention(
        q, *window, gate=gate[2], **where, **documents, **by
    )
    return (out_compressed + out_selected + out_window).astype(q.dtype), block_indices


def _with_derivatives_of(function, quick):
    """`quick`, and where derivatives are wanted `function`, the same but for roundings."""
    quick = jax.custom_vjp(quick)
    quick.defvjp(lambda *args: jax.vjp(function, *args), lambda pull, gradients: pull(gradients))
    return quick


def _check_branches(q, q_compressed, compressed, selected, window, gates, config):
    """Raises ValueError unless the branches fit the queries, the gates and each other."""
    branches.check_shapes("native_sparse_attention", q, *selected)
    for name, (k, v) in {"compressed": compressed, "window": window}.items():
        branches.check_shapes(f"native_sparse_attention, {name}", q, k, v)
        sizes, expected = (k.shape[2], v.shape[3]), (selected[0].shape[2], selected[1].shape[3])
        if sizes != expected:
            raise ValueError(
                f"{name} has {sizes[0]} heads and values of {sizes[1]} features, selected has "
                f"{expected[0]} and {expected[1]}; they must agree"
            )
    if gates.shape != (*q.shape[:3], 3):
        raise ValueError(f"gates {gates.shape} must be [B, T, N, 3] = {(*q.shape[:3], 3)}")
    if q_compressed.shape != q.shape:
        raise ValueError(f"q_compressed {q_compressed.shape} must have the shape of q {q.shape}")
    num_tokens = selected[0].shape[1]
    if window[0].shape[1] != num_tokens:
        raise ValueError(
            f"window has {window[0].shape[1]} tokens, selected has {num_tokens}; they must agree"
        )
    l, d = config.compress_block_size, config.compress_stride  # noqa: E741
    expected = compression.num_compressed_blocks(num_tokens, block_size=l, stride=d)
    if compressed[0].shape[1] != expected:
        raise ValueError(
            f"compressed has {compressed[0].shape[1]} blocks, but {num_tokens} tokens make "
            f"{expected} complete blocks of {l} tokens at stride {d}"
        )
