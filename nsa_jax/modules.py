"""Attention layers as Flax Linen modules: they own parameters and names, `nsa_jax.ops` the maths.

`NativeSparseAttention` and `DenseAttention` are called alike, so that a model swaps one for the
other. Given a cache, both decode: they attend from new tokens to those of the cache, and return the
new cache beside their output.
"""

import flax.linen as nn
import jax.numpy as jnp

from nsa_jax.config import BRANCHES, NSAConfig
from nsa_jax.ops import compression
from nsa_jax.ops.attention import native_sparse_attention
from nsa_jax.ops.branches import check_positions, selected_attention
from nsa_jax.ops.cache import DenseCache, SparseCache, check_chunk, dense_cache, sparse_cache
from nsa_jax.ops.decode import dense_attention_cached, sparse_attention_cached
from nsa_jax.ops.dense import dense_attention
from nsa_jax.rotary import apply_rope
from nsa_jax.typing import Array, Float, Int


class Compression(nn.Module):
    """phi: one vector for each block of tokens (equation 7), its weights shared by the heads.

    Attributes:
      kind: "mlp", a hidden layer over the block's tokens, each with a learned intra-block position
        added; "linear", the same without the hidden layer; "mean".
      block_size: l.
      stride: d.
      width: hidden units of "mlp".
      dtype: of the computation; by default what inputs and parameters promote to.
      param_dtype: of the parameters.
    """

    kind: str
    block_size: int
    stride: int
    width: int
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B S K H"]) -> Float[Array, "B C K H"]:
        """Compresses keys or values [B, S, K, H] to [B, C, K, H], C their complete blocks."""
        blocks = compression.split_into_blocks(x, block_size=self.block_size, stride=self.stride)
        if self.kind == "mean":
            return blocks.mean(axis=2)
        head_dim = x.shape[-1]
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (self.block_size, head_dim), self.param_dtype
        )
        blocks = jnp.moveaxis(blocks + positions[:, None, :].astype(blocks.dtype), 3, 2)
        flat = blocks.reshape(*blocks.shape[:3], self.block_size * head_dim)
        if self.kind == "mlp":
            flat = nn.gelu(self._dense(self.width, "hidden")(flat))
        return self._dense(head_dim, "out")(flat)

    def _dense(self, features, name):
        return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, name=name)


class Gates(nn.Module):
    """The weight of each branch for each head: by default sigmoids of an MLP of the layer's input.

    Attributes:
      num_heads: N.
      width: hidden units; 0 makes it one linear layer.
      activation: "sigmoid"; "softmax" over the branches; "fixed", which is 1 and has no parameters.
      branches: those that count; the gate of another is 0.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    num_heads: int
    width: int
    activation: str = "sigmoid"
    branches: tuple[str, ...] = BRANCHES
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N 3"]:
        """The gates of the layer's input, float32, in the order compressed, selected, window."""
        counts = jnp.array([name in self.branches for name in BRANCHES])
        if self.activation == "fixed":
            return jnp.broadcast_to(counts.astype(jnp.float32), (*x.shape[:2], self.num_heads, 3))
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.width:
            x = nn.gelu(nn.Dense(self.width, name="hidden", **dtypes)(x))
        logits = nn.DenseGeneral((self.num_heads, 3), name="out", **dtypes)(x)
        logits = logits.astype(jnp.float32)
        if self.activation == "softmax":
            return nn.softmax(logits, where=counts)
        gates = nn.sigmoid(logits)
        return gates if set(self.branches) == set(BRANCHES) else jnp.where(counts, gates, 0.0)


class NativeSparseAttention(nn.Module):
    """Causal self-attention through compressed blocks, selected blocks and a sliding window.

    For whoever asks with `mutable=["intermediates"]`, each call sows "block_indices", int32
    [B, T, K, n], "gates", float32 [B, T, N, 3], and the selected branch's rotated "queries"
    [B, T, N, H] and "keys" [B, T, K, H].

    Attributes:
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; divides N.
      head_dim: H, of queries and keys; even.
      v_head_dim: V, of values; by default H.
      nsa: the geometry and what the paper leaves open.
      selector: chooses the blocks of the selected branch in place of the compressed scores: a
        module that is called with the layer's input, those rotated queries and keys, and
        `document_starts`, and returns block indices as `native_sparse_attention` takes them. It
        sees whole sequences, so that there is no decoding with it.
      rope_theta: base of the rotary embeddings' wavelengths.
      implementation: see `nsa_jax.ops.dispatch`.
      dtype: of the computation; by default what inputs and parameters promote to.
      param_dtype: of the parameters.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    nsa: NSAConfig = NSAConfig()
    selector: nn.Module | None = None
    rope_theta: float = 10_000.0
    implementation: str = "auto"
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    def init_cache(self, batch_size: int, capacity: int) -> SparseCache:
        """An empty cache for rows of up to `capacity` tokens, to decode with.

        Raises:
          ValueError: if batch_size or capacity is no positive integer, or there is a selector.
        """
        return sparse_cache(batch_size, capacity, *_cached_heads(self), self.nsa)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        document_starts: Int[Array, "B T"] | None = None,
        cache: SparseCache | None = None,
        counts: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], SparseCache]:
        """Attends over the tokens before and at each position.

        Args:
          x: the layer's input.
          document_starts: int32, for rows that hold several documents, the position at which each
            token's document begins: a multiple of select_block_size. 0 by default.
          cache: the tokens before these; from `init_cache` before the first ones. T is any number
            up to its capacity: a chunk of a prompt, or 1.
          counts: with a cache, int32, how many tokens of each row count, the first ones; T by
            default. The output of the others means nothing.

        Returns:
          The layer's output, [B, T, D]; with a cache, also the new cache. A token that it has no
          room for is not kept, and its output is NaN.

        Raises:
          ValueError: if the sizes of the heads do not fit, the tokens do not fit into the cache, or
            there are a cache and a selector.
          UnsupportedError: if the implementation asked for by name cannot run here.
        """
        nsa, heads = self.nsa, _Heads(self)
        positions = _positions(self, x, document_starts, cache, counts)
        q = heads.project("query", self.num_heads, self.head_dim)(x)
        rotated_q = apply_rope(q, positions, theta=self.rope_theta)

        def key_value(branch):
            k = heads.project(f"key{branch}", self.num_kv_heads, self.head_dim)(x)
            v = heads.project(f"value{branch}", self.num_kv_heads, heads.v_head_dim)(x)
            return k, v

        if nsa.share_kv:
            compressed = selected = window = key_value("")
        else:
            compressed, selected, window = map(key_value, ("_compressed", "_selected", "_window"))
        gate = {"activation": nsa.gate_activation, "branches": nsa.branches, "name": "gate"}
        gates = Gates(self.num_heads, nsa.gate_width, **gate, **heads.dtypes)(x)

        def rotate_keys(branch):
            k, v = branch
            return apply_rope(k, positions, theta=self.rope_theta), v

        selected = rotate_keys(selected)
        branches = (selected, rotate_keys(window), gates)
        options = {
            "config": nsa,
            "q_compressed": q if nsa.compressed_rope == "none" else rotated_q,
            "implementation": self.implementation,
        }
        if cache is None:
            where, block_indices = {"document_starts": document_starts}, None
            if self.selector is not None:
                block_indices = self.selector(x, rotated_q, selected[0], **where)
            compressed = self._compress(*compressed, positions)
            out, block_indices = native_sparse_attention(
                rotated_q, compressed, *branches, block_indices=block_indices, **where, **options
            )
        else:
            out, block_indices, cache = sparse_attention_cached(
                rotated_q, compressed, *branches, cache, counts, compress=self._compress, **options
            )
        self.sow("intermediates", "block_indices", block_indices)
        self.sow("intermediates", "gates", gates)
        self.sow("intermediates", "queries", rotated_q)
        self.sow("intermediates", "keys", selected[0])
        out = heads.output(x.shape[-1])(out)
        return out if cache is None else (out, cache)

    def _compress(self, k, v, positions):
        """phi of keys and of values, with the keys rotated as `compressed_rope` says."""
        nsa = self.nsa
        sizes = {"block_size": nsa.compress_block_size, "stride": nsa.compress_stride}
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def phi(kind, name):
            return Compression(kind, width=nsa.compression_width, name=name, **sizes, **dtypes)

        if nsa.compressed_rope == "before":
            k = apply_rope(k, positions, theta=self.rope_theta)
        k = phi(nsa.key_compression, "compress_keys")(k)
        v = phi(nsa.value_compression, "compress_values")(v)
        if nsa.compressed_rope == "after":
            starts = compression.block_starts(k.shape[1], stride=nsa.compress_stride)
            k = apply_rope(k, positions[:, starts], theta=self.rope_theta)
        return k, v


class DenseAttention(nn.Module):
    """Full causal self-attention with grouped queries, the baseline.

    For whoever asks with `mutable=["intermediates"]`, each call sows the rotated "queries"
    [B, T, N, H] and "keys" [B, T, K, H].

    Attributes:
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; divides N.
      head_dim: H, of queries and keys; even.
      v_head_dim: V, of values; by default H.
      output_gate: multiplies each head's output by a sigmoid of the layer's input, as a control
        for the gates of `NativeSparseAttention`.
      selector: makes a finished dense layer sparse: as that of `NativeSparseAttention`, for blocks
        of its own `nsa.select_block_size`. The query attends the blocks that it returns and nothing
        else.
      rope_theta: base of the rotary embeddings' wavelengths.
      implementation: see `nsa_jax.ops.dense`; with a selector "cudnn" is as "auto".
      dtype: of the computation; by default what inputs and parameters promote to.
      param_dtype: of the parameters.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    output_gate: bool = False
    selector: nn.Module | None = None
    rope_theta: float = 10_000.0
    implementation: str = "auto"
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    def init_cache(self, batch_size: int, capacity: int) -> DenseCache:
        """As `NativeSparseAttention.init_cache`."""
        return dense_cache(batch_size, capacity, *_cached_heads(self))

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        document_starts: Int[Array, "B T"] | None = None,
        cache: DenseCache | None = None,
        counts: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], DenseCache]:
        """As `NativeSparseAttention.__call__`; documents may begin at any position."""
        heads = _Heads(self)
        positions = _positions(self, x, document_starts, cache, counts)
        q = heads.project("query", self.num_heads, self.head_dim)(x)
        k = heads.project("key", self.num_kv_heads, self.head_dim)(x)
        v = heads.project("value", self.num_kv_heads, heads.v_head_dim)(x)
        q, k = (apply_rope(a, positions, theta=self.rope_theta) for a in (q, k))
        self.sow("intermediates", "queries", q)
        self.sow("intermediates", "keys", k)
        where = {"document_starts": document_starts}
        if cache is not None:
            out, cache = dense_attention_cached(
                q, (k, v), cache, counts, implementation=self.implementation
            )
        elif self.selector is None:
            out = dense_attention(q, k, v, implementation=self.implementation, **where)
        else:
            chosen = self.selector(x, q, k, **where)
            name = "auto" if self.implementation == "cudnn" else self.implementation
            options = {"config": self.selector.nsa, "implementation": name}
            out, _ = selected_attention(q, k, v, chosen, **options)
        if self.output_gate:
            gate = nn.DenseGeneral(self.num_heads, name="output_gate", **heads.dtypes)(x)
            out = out * nn.sigmoid(gate.astype(jnp.float32))[..., None].astype(out.dtype)
        out = heads.output(x.shape[-1])(out)
        return out if cache is None else (out, cache)


class _Heads:
    """The projections into and out of heads, as both attention modules make them."""

    def __init__(self, module):
        n, k = module.num_heads, module.num_kv_heads
        if k < 1 or n % k:
            raise ValueError(f"num_kv_heads={k} must divide num_heads={n}")
        self.v_head_dim = module.head_dim if module.v_head_dim is None else module.v_head_dim
        self.dtypes = {"dtype": module.dtype, "param_dtype": module.param_dtype}

    def project(self, name, num_heads, head_dim):
        return nn.DenseGeneral((num_heads, head_dim), use_bias=False, name=name, **self.dtypes)

    def output(self, features):
        return nn.DenseGeneral(
            features, axis=(-2, -1), use_bias=False, name="output", **self.dtypes
        )


def _cached_heads(module):
    """Sizes and dtype of what a cache keeps of a token."""
    _refuse_selector(module)
    dtype = module.param_dtype if module.dtype is None else module.dtype
    return (module.num_kv_heads, module.head_dim, _Heads(module).v_head_dim), dtype


def _refuse_selector(module):
    if module.selector is not None:
        raise ValueError(
            f"selector={type(module.selector).__name__} together with a cache: a selector sees "
            "whole sequences; decode with selector=None, or run the layer over the whole sequence "
            "without a cache"
        )


def _positions(module, x, document_starts, cache, counts):
    """Positions within each document, so that packed documents are rotated as they are alone."""
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    if cache is not None:
        if document_starts is not None:
            raise ValueError(
                "document_starts together with a cache: packed documents are not decoded, a row of "
                "a cache holds one sequence"
            )
        _refuse_selector(module)
        check_chunk(x, cache, counts)
        return cache.length[:, None] + positions
    if counts is not None:
        raise ValueError("counts says how many tokens go into a cache, and there is no cache")
    if document_starts is None:
        return positions
    check_positions("attention", "document_starts", document_starts, x.shape[:2])
    return positions - document_starts
