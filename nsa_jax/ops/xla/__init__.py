"""The kernel operations in portable XLA code: any device, any sizes, linear memory.

    interval.py   interval_attention: tiles of queries walk tiles of keys
    selected.py   selected_attention: each key block meets the queries that selected it
    blocks.py     select_blocks: queries in chunks, their compressed probabilities recomputed
    step.py       sparse_step, dense_step: one query a row over a cache, for decoding

No operation scatters into one place twice in an unordered step, so all of them give the same bits
run after run.
"""

from nsa_jax.ops.xla.blocks import select_blocks
from nsa_jax.ops.xla.interval import interval_attention
from nsa_jax.ops.xla.selected import selected_attention
from nsa_jax.ops.xla.step import dense_step, sparse_step

__all__ = [
    "dense_step",
    "interval_attention",
    "select_blocks",
    "selected_attention",
    "sparse_step",
]
