"""Pallas Mosaic GPU kernels for NVIDIA Hopper: TMA copies, wgmma, specialised warpgroups.

    interval.py   interval_attention: tiles of query rows walk the keys that they may see
    common.py     what the kernels share on the device
    launch.py     the one call of Pallas Mosaic GPU, its interpreter, and what is refused
    tuning.py     tile sizes and stages by kernel and head sizes

A row is one query head of one query. A tile has the rows of one key/value head's queries, 64 for
each warpgroup that computes.
"""
