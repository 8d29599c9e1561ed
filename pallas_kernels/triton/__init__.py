"""Triton kernels, launched through jax-triton, for NVIDIA GPUs since Ampere.

    interval.py   interval_attention: tiles of query rows walk the tiles of keys they may see
    selected.py   selected_attention: tiles of queries walk the union of the blocks they selected
    lists.py      those unions
    blocks.py     select_blocks: compressed probabilities made anew and ranked on chip
    step.py       sparse_step, dense_step: a decoding step in parts, joined in their order
    parts.py      those parts, on the device
    choice.py     the blocks that a step selects, from what its compressed parts leave
    common.py     what the kernels share on the device
    launch.py     the one call of jax-triton, and what is refused
    tuning.py     tile sizes, warps and stages by device, dims and dtype

A row is one query head of one query. The G heads of a group lie beside each other in memory, so
that the T * G rows of a group are walked as one axis: a tile holds whatever number of rows the
matrix units like, for any G, and none of them is padding.
"""
