"""A small decoder-only transformer whose attention is sparse (NSA) or dense."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from nsa_jax.config import NSAConfig, check_integer
from nsa_jax.modules import DenseAttention, NativeSparseAttention
from nsa_jax.ops import dense, dispatch
from nsa_jax.ops.cache import DenseCache, SparseCache
from nsa_jax.typing import Array, Float, Int

DTYPES = ("float32", "bfloat16")

AttentionLayer = NativeSparseAttention | DenseAttention
LayerCache = SparseCache | DenseCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The sizes and options of a `Transformer`.

    Attributes:
      vocab_size: token ids.
      num_layers: blocks of attention and MLP.
      model_dim: D, width of the residual stream.
      mlp_dim: hidden units of the SwiGLU MLP.
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; divides N.
      head_dim: H, of queries and keys; even.
      v_head_dim: V, of values; None means H.
      attention: "nsa" or "dense".
      nsa: the settings of NSA; unused by "dense".
      output_gate: a sigmoid gate on the output of "dense" attention; unused by "nsa".
      selector: a module that chooses the blocks of every attention layer, see
        `nsa_jax.modules`; None leaves the choice to NSA, and dense attention dense.
      rope_theta: base of the rotary embeddings' wavelengths.
      dropout: the share of each part's output that is dropped in training.
      tie_embeddings: one matrix embeds tokens and reads logits.
      remat: recompute each block in the backward pass instead of storing its intermediates.
      scan_layers: compile one block and scan over the layers' stacked parameters.
      dtype: of the computation, "float32" or "bfloat16"; logits and softmax are float32 always.
      param_dtype: of the parameters.
      implementation: for "nsa" see `nsa_jax.ops.dispatch`; for "dense" `nsa_jax.ops.dense`.

    Raises:
      ValueError: if a value is out of range; the message names it and what is allowed.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    attention: str = "nsa"
    nsa: NSAConfig = dataclasses.field(default_factory=NSAConfig)
    output_gate: bool = False
    selector: nn.Module | None = None
    rope_theta: float = 10_000.0
    dropout: float = 0.0
    tie_embeddings: bool = True
    remat: bool = False
    scan_layers: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    implementation: str = "auto"

    def __post_init__(self):
        sizes = ("vocab_size", "num_layers", "model_dim", "mlp_dim", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim"):
            check_integer(name, getattr(self, name), 1)
        if self.v_head_dim is not None:
            check_integer("v_head_dim", self.v_head_dim, 1)
        if not isinstance(self.nsa, NSAConfig):
            raise ValueError(f"nsa={self.nsa!r} must be an NSAConfig")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} must be positive")
        operations = dense if self.attention == "dense" else dispatch
        for name, allowed in {
            "attention": ("nsa", "dense"),
            "dtype": DTYPES,
            "param_dtype": DTYPES,
            "implementation": operations.IMPLEMENTATIONS,
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}")


class SwiGLU(nn.Module):
    """The gated MLP: silu(x W_gate) * (x W_up), projected back (arXiv 2002.05202)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the MLP to each position."""
        config = self.config

        def dense(features, name):
            return nn.Dense(
                features,
                use_bias=False,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                name=name,
            )

        hidden = nn.silu(dense(config.mlp_dim, "gate")(x)) * dense(config.mlp_dim, "up")(x)
        return dense(config.model_dim, "down")(hidden)


class Block(nn.Module):
    """Attention and MLP, each behind an RMSNorm and added to the residual stream."""

    config: TransformerConfig
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        document_starts: Int[Array, "B T"] | None,
        cache: LayerCache | None = None,
        counts: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the new residual stream, and the new cache or None: a pair, for `nn.scan`."""
        config = self.config
        dropout = nn.Dropout(config.dropout, deterministic=self.deterministic)
        h = _rms_norm(config, "attention_norm")(x)
        attended = attention_layer(config, name="attention")(
            h, document_starts=document_starts, cache=cache, counts=counts
        )
        if cache is not None:
            attended, cache = attended
        x += dropout(attended)
        h = _rms_norm(config, "mlp_norm")(x)
        x += dropout(SwiGLU(config, name="mlp")(h))
        return x, cache


@jax.custom_vjp
def _look_up(table: Float[Array, "vocab D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The rows of the tokens, with a gradient that is a matrix product.

    That of indexing adds rows to the table one by one: on a GPU by atomics, in an order that
    differs between runs, and one after another where the tokens are few and frequent, as bytes are.
    """
    return table[tokens]


def _look_up_forward(table, tokens):
    return table[tokens], (table, tokens)


def _look_up_backward(residuals, gradient):
    table, tokens = residuals
    chosen = jax.nn.one_hot(tokens, table.shape[0], dtype=gradient.dtype)
    return jnp.einsum("btv,btd->vd", chosen, gradient, precision="highest"), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


class Transformer(nn.Module):
    """A decoder-only language model; all sizes and options are in its config."""

    config: TransformerConfig

    def init_cache(self, batch_size: int, capacity: int) -> tuple[LayerCache, ...]:
        """An empty cache of each layer, for rows of up to `capacity` tokens.

        Raises:
          ValueError: if batch_size or capacity is no positive integer.
        """
        layer = attention_layer(self.config, parent=None)
        # A cache is donated to whoever appends to it: no two layers may share their zeros.
        return tuple(layer.init_cache(batch_size, capacity) for _ in range(self.config.num_layers))

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        document_starts: Int[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
        cache: tuple[LayerCache, ...] | None = None,
        counts: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T vocab"] | tuple[Float[Array, "B T vocab"], tuple[LayerCache, ...]]:
        """The logits of the next token at each position.

        Args:
          tokens: int32 ids below vocab_size.
          document_starts: int32, for rows that hold several documents, the position at which each
            token's document begins: a multiple of the selection block. 0 by default.
          deterministic: False applies dropout, with the "dropout" rng.
          cache: the tokens before these, from `init_cache` or an earlier call.
          counts: with a cache, int32, how many tokens of each row count, the first ones; T by
            default.

        Returns:
          float32 logits; with a cache, also the new cache.

        Raises:
          ValueError: if the tokens do not fit into the cache, or scan_layers is set with one.
        """
        config = self.config
        embed = nn.Embed(
            config.vocab_size,
            config.model_dim,
            embedding_init=nn.initializers.normal(config.model_dim**-0.5),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            name="embed",
        )
        x = _look_up(embed.embedding, tokens).astype(config.dtype)
        x, cache = self._layers(x, document_starts, deterministic, cache, counts)
        x = _rms_norm(config, "final_norm")(x)
        logits = self._logits(x, embed)
        return logits if cache is None else (logits, cache)

    def _layers(self, x, document_starts, deterministic, cache, counts):
        """All blocks, one after the other; the second result is the new cache or None."""
        config = self.config
        if cache is not None:
            if config.scan_layers:
                raise ValueError(
                    "scan_layers=True: a scan would copy the whole cache at each step; "
                    "nsa_jax.decoding.unrolled gives the model and its parameters layer by layer"
                )
            layers = []
            for index, layer in enumerate(cache):
                block = Block(config, deterministic, name=f"layers_{index}")
                x, layer = block(x, document_starts, layer, counts)
                layers.append(layer)
            return x, tuple(layers)
        block = nn.remat(Block, prevent_cse=not config.scan_layers) if config.remat else Block
        if config.scan_layers:
            stack = nn.scan(
                block,
                variable_axes={"params": 0, "intermediates": 0, "losses": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=config.num_layers,
            )
            return stack(config, deterministic, name="layers")(x, document_starts)
        for layer in range(config.num_layers):
            x, _ = block(config, deterministic, name=f"layers_{layer}")(x, document_starts)
        return x, None

    def _logits(self, x, embed):
        """Products in the compute dtype, summed and kept in float32."""
        config = self.config
        if config.tie_embeddings:
            table = embed.embedding.astype(x.dtype)
            return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
        logits = nn.Dense(
            config.vocab_size,
            use_bias=False,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
            name="logits",
        )
        return logits(x)


def _rms_norm(config, name):
    return nn.RMSNorm(dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def attention_layer(config: TransformerConfig, **keywords) -> AttentionLayer:
    """The attention of one block, with the keywords of every Flax module (name, parent)."""
    common = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "v_head_dim": config.v_head_dim,
        "selector": config.selector,
        "rope_theta": config.rope_theta,
        "implementation": config.implementation,
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        **keywords,
    }
    if config.attention == "dense":
        return DenseAttention(output_gate=config.output_gate, **common)
    return NativeSparseAttention(nsa=config.nsa, **common)


def layer_intermediates(intermediates: dict, name: str) -> Array:
    """What every attention layer sowed under `name`, stacked: [layers, ...].

    Args:
      intermediates: the "intermediates" collection that `Transformer.apply` returned.
      name: "block_indices", "gates", "queries" or "keys".

    Raises:
      KeyError: if no layer sowed such a thing, as in a dense model.
    """
    if "layers" in intermediates:
        return intermediates["layers"]["attention"][name][0]
    layers = sorted(
        (key for key in intermediates if key.startswith("layers_")),
        key=lambda key: int(key.removeprefix("layers_")),
    )
    return jnp.stack([intermediates[layer]["attention"][name][0] for layer in layers])
