"""Native Sparse Attention (arXiv 2502.11089) in JAX."""

import importlib
from typing import TYPE_CHECKING

from nsa_jax.config import NSAConfig
from nsa_jax.ops.attention import native_sparse_attention
from nsa_jax.ops.branches import (
    compressed_attention,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)
from nsa_jax.ops.dispatch import UnsupportedError
from nsa_jax.typing import KeyValue

if TYPE_CHECKING:
    from nsa_jax.modules import DenseAttention, NativeSparseAttention

__version__ = "0.1.0"

__all__ = [
    "DenseAttention",
    "KeyValue",
    "NSAConfig",
    "NativeSparseAttention",
    "UnsupportedError",
    "compressed_attention",
    "native_sparse_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]


def __getattr__(name):
    # The modules bring Flax, and with it absl, which users of the plain functions do not need.
    if name in ("DenseAttention", "NativeSparseAttention"):
        return getattr(importlib.import_module("nsa_jax.modules"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
