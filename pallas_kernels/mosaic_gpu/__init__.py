"""Pallas Mosaic GPU kernels for NVIDIA Hopper: TMA copies, wgmma, specialised warpgroups.

    interval.py   interval_attention: tiles of query rows walk the keys that they may see;
                  walks.py, which ones these are, and interval_backward.py
    rows.py       which rows a tile has, and their copies
    selected.py   selected_attention; selected_walk.py, how tiles walk the blocks of their queries,
                  selected_forward.py and selected_dq.py, what they do there;
                  selected_dkv.py, how blocks gather the queries that selected them
    lists.py      the unions of those blocks, by the bits of words.py
    blocks.py     select_blocks; ranking.py, its choice of the top n
    common.py     what the kernels share on the device
    warps.py      what a warp or a thread does for itself, which Pallas has no words for
    launch.py     the one call of Pallas Mosaic GPU, its interpreter, and what is refused
    tuning.py     tile sizes and stages by kernel and head sizes

A row is one query head of one query. A tile has the rows of one key/value head's queries, 64 for
each warpgroup that computes.
"""
