"""The shapes that tests and benchmarks share, one name each, and random arrays of those shapes."""

import dataclasses

import jax
import jax.numpy as jnp

from nsa_jax.config import NSAConfig
from nsa_jax.ops.compression import num_compressed_blocks
from nsa_jax.typing import KeyValue

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

#: Shapes that the kernels for Hopper take as well: groups of 1, 4, 8, 16 and 64 heads.
HOPPER = {
    "paper_heads": ArgSpec(1, 1000, 16, 1, 128, 128, NSAConfig(num_selected_blocks=6)),
    "paper_192": ArgSpec(2, 717, 32, 2, 192, 128, NSAConfig(num_selected_blocks=5)),
    "four_heads_a_group": ArgSpec(2, 648, 8, 2, 64, 64, NSAConfig(window_size=100)),
    "one_head": ArgSpec(1, 523, 2, 2, 64, 128, NSAConfig(num_selected_blocks=4, window_size=64)),
    "eight_heads_a_group": ArgSpec(1, 700, 16, 2, 256, 256, NSAConfig(num_selected_blocks=4)),
    "large_blocks": ArgSpec(
        1, 1030, 64, 1, 128, 64, NSAConfig(32, 16, 128, num_selected_blocks=5, window_size=200)
    ),
}

#: The rest of the head sizes that they take, and groups of 2 and of 32 heads.
HOPPER_HEADS = {
    "64_256": ArgSpec(2, 331, 4, 2, 64, 256, NSAConfig(num_selected_blocks=4)),
    "128_256": ArgSpec(1, 413, 32, 1, 128, 256, NSAConfig(num_selected_blocks=4)),
    "192_64": ArgSpec(1, 397, 4, 2, 192, 64, NSAConfig(num_selected_blocks=4)),
    "192_256": ArgSpec(1, 350, 16, 1, 192, 256, NSAConfig(num_selected_blocks=4)),
    "256_64": ArgSpec(1, 329, 32, 1, 256, 64, NSAConfig(num_selected_blocks=4)),
    "256_128": ArgSpec(1, 409, 8, 1, 256, 128, NSAConfig(num_selected_blocks=4)),
}

#: What the benchmarks time, at lengths of their own. The paper's model has 64 query heads on 4
#: groups, with values narrower than keys (section 4.1): 192 and 128.
BENCHMARK = {
    "paper": ArgSpec(1, 65536, 64, 4, 128, 128, NSAConfig()),
    "paper_192": ArgSpec(1, 65536, 64, 4, 192, 128, NSAConfig()),
    "gqa": ArgSpec(1, 65536, 32, 8, 128, 128, NSAConfig()),
    "tiny": ArgSpec(1, 128, 4, 2, 16, 16),
}


def random_inputs(spec: ArgSpec, seed: int = 0, dtype=jnp.float32) -> dict:
    """Arguments of native_sparse_attention by name: normal q, k and v, and sigmoid gates."""
    nsa = spec.nsa
    num_compressed = num_compressed_blocks(
        spec.length, block_size=nsa.compress_block_size, stride=nsa.compress_stride
    )
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(length, heads, size):
        return jax.random.normal(next(keys), (spec.batch, length, heads, size), dtype)

    def key_value(length):
        k = normal(length, spec.num_kv_heads, spec.head_dim)
        return KeyValue(k, normal(length, spec.num_kv_heads, spec.v_head_dim))

    return {
        "q": normal(spec.length, spec.num_heads, spec.head_dim),
        "compressed": key_value(num_compressed),
        "selected": key_value(spec.length),
        "window": key_value(spec.length),
        "gates": jax.nn.sigmoid(normal(spec.length, spec.num_heads, 3)),
    }
