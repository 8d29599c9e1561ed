"""The smallest transformer that is still a whole one: what tests of models share."""

from nsa_jax import NSAConfig
from nsa_jax.model import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=50,
    num_layers=2,
    model_dim=24,
    mlp_dim=40,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    nsa=NSAConfig(4, 2, 8, 4, window_size=8, compression_width=16),
    implementation="xla",
)
