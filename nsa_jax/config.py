"""The settings of Native Sparse Attention, checked when they are made.

Imports no JAX, so that a configuration can be read, checked and explained anywhere.
"""

import dataclasses
import numbers

COMPRESSIONS = ("mlp", "linear", "mean")
COMPRESSED_ROPES = ("after", "before", "none")
GATE_ACTIVATIONS = ("sigmoid", "softmax", "fixed")
BRANCHES = ("compressed", "selected", "window")


def check_integer(name: str, value: int, minimum: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `minimum`; names both."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be an integer")
    if value < minimum:
        raise ValueError(f"{name}={value} must be at least {minimum}")


@dataclasses.dataclass(frozen=True)
class NSAConfig:
    """What defines one Native Sparse Attention layer, beside the sizes of its heads.

    The geometry is the paper's (section 4.1), in tokens or blocks; the operations of `nsa_jax.ops`
    read nothing else. The choices below it are the ones that the paper leaves open; only the Flax
    module reads them.

    Attributes:
      compress_block_size: l, the tokens that one compressed key summarises.
      compress_stride: d, the tokens between the starts of two compressed blocks. Divides l and l'.
      select_block_size: l', the tokens of a selection block. At least l.
      num_selected_blocks: n, the blocks a query attends in the selected branch, forced ones
        included.
      num_initial_blocks: the first blocks of a document, which every query selects.
      num_local_blocks: the last blocks up to the query's own, which every query selects.
      window_size: w, the keys of the sliding window, the query's own included.
      key_compression: phi for keys: "mlp" (with learned intra-block positions), "linear" (with
        them too) or "mean" (no parameters).
      value_compression: phi for values, likewise.
      compression_width: hidden units of the "mlp" phi.
      compressed_rope: "after" compresses the unrotated keys and rotates each compressed key at its
        block's first position; "before" compresses rotated keys; "none" uses unrotated queries and
        keys in the compressed branch.
      gate_width: hidden units of the gates' MLP; 0 makes the gates one linear layer.
      gate_activation: "sigmoid"; "softmax" over the branches; "fixed" makes every gate 1.
      branches: those whose outputs count. The gate of another is 0, so that nothing reaches its
        parameters; blocks are selected by compressed scores all the same.
      share_kv: one key and one value projection for the three branches instead of one each.

    Raises:
      ValueError: if a value is out of range or two do not fit each other; the message names both
        and says what is allowed.
    """

    compress_block_size: int = 32
    compress_stride: int = 16
    select_block_size: int = 64
    num_selected_blocks: int = 16
    num_initial_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512

    key_compression: str = "mlp"
    value_compression: str = "mlp"
    compression_width: int = 128
    compressed_rope: str = "after"
    gate_width: int = 0
    gate_activation: str = "sigmoid"
    branches: tuple[str, ...] = BRANCHES
    share_kv: bool = False

    def __post_init__(self):
        least = {
            "compress_block_size": 1,
            "compress_stride": 1,
            "select_block_size": 1,
            "num_selected_blocks": 1,
            "num_initial_blocks": 0,
            "num_local_blocks": 0,
            "window_size": 1,
            "compression_width": 1,
            "gate_width": 0,
        }
        for name, minimum in least.items():
            check_integer(name, getattr(self, name), minimum)
        for name, allowed in {
            "key_compression": COMPRESSIONS,
            "value_compression": COMPRESSIONS,
            "compressed_rope": COMPRESSED_ROPES,
            "gate_activation": GATE_ACTIVATIONS,
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}")
        if not self.branches or set(self.branches) - set(BRANCHES):
            raise ValueError(f"branches={self.branches!r} must be one or more of {BRANCHES}")

        l, d, l_sel = self.compress_block_size, self.compress_stride, self.select_block_size  # noqa: E741
        if l % d:
            raise ValueError(f"compress_stride={d} must divide compress_block_size={l}")
        if l_sel % d:
            raise ValueError(f"compress_stride={d} must divide select_block_size={l_sel}")
        if l > l_sel:
            raise ValueError(
                f"compress_block_size={l} must be at most select_block_size={l_sel}: equation 9 "
                "maps compressed blocks onto selection blocks that are no smaller"
            )
        forced = self.num_initial_blocks + self.num_local_blocks
        if forced > self.num_selected_blocks:
            raise ValueError(
                f"num_initial_blocks={self.num_initial_blocks} and "
                f"num_local_blocks={self.num_local_blocks} force {forced} blocks, but "
                f"num_selected_blocks={self.num_selected_blocks} counts them in"
            )
