"""The shapes that tests and benchmarks share, one name each."""

import dataclasses

from nsa_jax.config import NSAConfig

TINY = NSAConfig(
    compress_block_size=8,
    compress_stride=4,
    select_block_size=16,
    num_selected_blocks=5,
    window_size=24,
)


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One call of native_sparse_attention."""

    batch: int
    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    nsa: NSAConfig = TINY


#: Small enough for the oracle on a CPU: lengths that are multiples of nothing, group sizes 1, 3, 4
#: and 16, values narrower and wider than keys, geometries with l < l', l = l' and no overlap.
SMALL = {
    "even": ArgSpec(2, 128, 4, 1, 16, 16),
    "ragged": ArgSpec(2, 197, 4, 2, 16, 16),
    "one_head_a_group": ArgSpec(1, 151, 2, 2, 8, 8),
    "three_heads_a_group": ArgSpec(2, 139, 6, 2, 16, 24),
    "sixteen_heads_a_group": ArgSpec(1, 173, 16, 1, 24, 16),
    "paper_blocks": ArgSpec(1, 333, 4, 1, 16, 16, NSAConfig(num_selected_blocks=4, window_size=70)),
    "no_overlap": ArgSpec(
        1, 211, 4, 2, 16, 16, NSAConfig(16, 16, 64, num_selected_blocks=3, window_size=20)
    ),
    "equal_blocks": ArgSpec(
        1, 163, 4, 2, 16, 16, NSAConfig(32, 32, 32, num_selected_blocks=3, window_size=33)
    ),
    "not_powers_of_two": ArgSpec(
        1, 150, 3, 1, 16, 16, NSAConfig(6, 3, 12, num_selected_blocks=6, window_size=17)
    ),
    "nothing_compressed": ArgSpec(2, 7, 4, 2, 16, 16),
}
