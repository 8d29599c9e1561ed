"""Full causal attention with grouped queries, the baseline: jax.nn.dot_product_attention.

"cudnn"  cuDNN's FlashAttention, on NVIDIA GPUs since Ampere
"xla"    portable, with an array of T x T scores a head
"auto"   cudnn where it can run, else xla

Under vmap, JAX 0.11.2 cannot give cuDNN a mask ("cannot reshape array"): with documents, or with
positions of several queries, fold the mapped axis into the batch, or ask for "xla".
"""

import jax
import jax.numpy as jnp

from nsa_jax.ops.branches import check_shapes
from nsa_jax.ops.dispatch import UnsupportedError, decided
from nsa_jax.typing import Array, Float, Int

IMPLEMENTATIONS = ("auto", "cudnn", "xla")
_CUDNN_DTYPES = ("bfloat16", "float16")


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    q_positions: Int[Array, "B T"] | None = None,
    document_starts: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N V"]:
    """Attention of each query over all tokens of its document up to itself (equations 1 and 2).

    Args:
      q: queries.
      k: keys; K divides N.
      v: values.
      q_positions: int32, the position of each query among the keys; 0, 1, ... by default. Of more
        than one query a row it builds a [B, T, S] mask.
      document_starts: int32, for rows that hold several documents, the position at which each
        query's document begins; 0 by default. Builds a mask too.
      implementation: one of `IMPLEMENTATIONS`.

    Raises:
      ValueError: if shapes do not fit each other or there is no such implementation.
      UnsupportedError: if the implementation asked for by name cannot run this call.
    """
    check_shapes("dense_attention", q, k, v, q_positions, document_starts)
    # dot_product_attention wants equal sizes: zeros add nothing to a score or to a value.
    size, v_head_dim = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    visible = _visible(q, k, q_positions, document_starts)
    odd_mask = "mask" in visible and bool(q.shape[1] % 2 or k.shape[1] % 2)
    name = resolve(implementation, q.dtype, size, odd_mask=odd_mask)
    scale = q.shape[-1] ** -0.5
    q, k, v = (jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])]) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation=name, **visible)
    return out[..., :v_head_dim]


def _visible(q, k, q_positions, document_starts):
    """Which keys each query sees, as the keywords of dot_product_attention."""
    if q_positions is not None and document_starts is None and q.shape[1] == 1:
        return {"key_value_seq_lengths": jnp.minimum(q_positions[:, 0] + 1, k.shape[1])}
    keys, mask = jnp.arange(k.shape[1]), None
    if document_starts is not None:
        mask = keys >= document_starts[:, :, None]
    if q_positions is not None:
        past = keys <= q_positions[:, :, None]
        return {"mask": (past if mask is None else past & mask)[:, None]}
    return {"is_causal": True} | ({} if mask is None else {"mask": mask[:, None]})


def resolve(implementation: str, dtype, head_dim: int, *, odd_mask: bool = False) -> str:
    """The name of the implementation that runs such a call: "cudnn" or "xla".

    Args:
      implementation: one of `IMPLEMENTATIONS`.
      dtype: of the queries.
      head_dim: the larger one of queries and values.
      odd_mask: whether there is a mask over an odd number of queries or keys.

    Raises:
      ValueError: if there is no implementation of that name.
      UnsupportedError: if "cudnn" was asked for by name and cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be one of {IMPLEMENTATIONS}")
    chosen, refused = "xla", {}
    if implementation != "xla":
        refusal = cudnn_refusal(dtype, head_dim, odd_mask=odd_mask)
        if refusal is None:
            chosen = "cudnn"
        elif implementation == "auto":
            refused = {"cudnn": refusal}
        else:
            raise UnsupportedError(f"implementation='cudnn': {refusal}")
    decided("dense_attention", chosen, refused)
    return chosen


def cudnn_refusal(dtype, head_dim: int, *, odd_mask: bool = False) -> str | None:
    """Why cuDNN cannot run such a call here, forward and backward, or None."""
    device = jax.devices()[0]
    capability = float(getattr(device, "compute_capability", 0))
    if device.platform != "gpu" or capability < 8:
        return f"cuDNN needs an NVIDIA GPU since Ampere, and JAX runs on {device.device_kind} here."
    if jnp.dtype(dtype).name not in _CUDNN_DTYPES:
        return f"cuDNN takes {' and '.join(_CUDNN_DTYPES)}, not {jnp.dtype(dtype).name}."
    largest = 256 if capability >= 9 else 128
    if head_dim % 8 or head_dim > largest:
        return f"cuDNN takes multiples of 8 up to {largest} features a head, not {head_dim}."
    if odd_mask:
        return "cuDNN takes masks (of packed documents, or chunks of a prompt) of even sizes alone."
    return None
