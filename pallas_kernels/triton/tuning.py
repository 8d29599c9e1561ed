"""Tile sizes, warps and stages of every kernel: a table, never a search at run time.

A search at run time would choose by the clock, and another choice is another order of additions:
two runs of one program would differ in their bits. `python -m experiments.kernel_sweep` measures
candidates and prints new lines for the table.

What was measured is named in NOTES.md beside this file. The other entries are the largest tiles
that neither spill registers nor exceed the shared memory of the device; tests hold every entry to
the latter.
"""

import contextlib
import dataclasses

from pallas_kernels.triton import launch


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How one kernel is cut and compiled.

    Attributes:
      rows: query rows (a query head of a query) a tile; of a step, the most heads a program.
      keys: keys a step; of the kernels for dk and dv, keys a tile.
      num_warps: warps a program.
      num_stages: depth of the software pipeline over the steps.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


#: "_short" is for intervals of few keys, see `interval.SHORT`.
KERNELS = (
    "interval_forward",
    "interval_forward_short",
    "interval_dq",
    "interval_dq_short",
    "interval_dkv",
    "selected_forward",
    "selected_dq",
    "selected_dkv",
    "select_blocks",
    "step",
    "step_selected",
)

#: Programs that a step cuts its rows into, if they have as many steps: two rounds of what a large
#: chip runs at a time. Of those that choose blocks fewer, since each of them does.
ENOUGH_PARTS = 528
ENOUGH_CHOICES = 264

#: Numbers that the programs that choose blocks, and those that join parts, hold at a time.
CHOSEN_AT_ONCE = 8192
JOINED_AT_ONCE = 8192

#: Shared memory that a program may have, bytes, by compute capability: the kinds of device that
#: the table tells apart.
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 100: 232448}

#: Head sizes that it tells apart: the larger one of head_dim and v_head_dim is rounded up.
FEATURES = (64, 128, 256)

# Of each kernel (rows, keys, num_warps, num_stages) for 64, 128 and 256 features of 16 bits.
_AMPERE = {
    "interval_forward": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2)),
    "interval_forward_short": ((64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 8, 2)),
    "interval_dq": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2)),
    "interval_dq_short": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2)),
    "interval_dkv": ((64, 64, 4, 3), (32, 64, 4, 2), (32, 64, 8, 2)),
    "selected_forward": ((64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 8, 2)),
    "selected_dq": ((32, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 2)),
    "selected_dkv": ((64, 64, 4, 2), (32, 64, 4, 2), (16, 64, 8, 1)),
    "select_blocks": ((128, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 2)),
    "step": ((32, 64, 4, 3), (32, 64, 4, 2), (32, 32, 4, 2)),
    "step_selected": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)),
}
_SMALL_AMPERE = _AMPERE | {
    "interval_dq": ((64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 2)),
    "interval_dq_short": ((64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 2)),
    "interval_dkv": ((64, 64, 4, 3), (32, 64, 4, 2), (32, 32, 8, 1)),
    "selected_dq": ((32, 64, 4, 3), (32, 64, 4, 2), (32, 32, 4, 2)),
    "select_blocks": ((128, 64, 4, 2), (128, 64, 4, 2), (64, 64, 4, 2)),
}
_HOPPER = {
    "interval_forward": ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    "interval_forward_short": ((64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 4, 2)),
    "interval_dq": ((64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "interval_dq_short": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2)),
    "interval_dkv": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2)),
    "selected_forward": ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    "selected_dq": ((32, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 2)),
    "selected_dkv": ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2)),
    "select_blocks": ((128, 64, 4, 2), (128, 64, 4, 2), (64, 64, 4, 2)),
    "step": ((32, 64, 4, 4), (32, 64, 4, 3), (32, 32, 4, 3)),
    "step_selected": ((64, 64, 4, 4), (64, 64, 4, 3), (64, 32, 4, 3)),
}
_BLACKWELL = _HOPPER | {
    "interval_dkv": ((64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 8, 2)),
    "selected_dkv": ((64, 64, 4, 3), (64, 64, 4, 3), (32, 64, 8, 2)),
}
# float32, for every device.
_FLOAT32 = {
    "interval_forward": ((32, 32, 4, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
    "interval_forward_short": ((32, 32, 4, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
    "interval_dq": ((32, 32, 4, 2), (16, 32, 8, 1), (16, 32, 8, 1)),
    "interval_dq_short": ((32, 32, 4, 2), (16, 32, 8, 1), (16, 32, 8, 1)),
    "interval_dkv": ((16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "selected_forward": ((32, 32, 4, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
    "selected_dq": ((16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "selected_dkv": ((16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "select_blocks": ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
    "step": ((16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 8, 2)),
    "step_selected": ((32, 32, 4, 2), (16, 32, 4, 2), (16, 16, 8, 2)),
}


def _table(kinds, bits):
    return {
        (kernel, capability, features, bits): Tuning(*cut)
        for capability, kernels in kinds.items()
        for kernel, cuts in kernels.items()
        for features, cut in zip(FEATURES, cuts, strict=True)
    }


#: (kernel, capability, features, bits of the dtype) -> tuning.
TABLE: dict[tuple[str, int, int, int], Tuning] = {
    **_table({80: _AMPERE, 86: _SMALL_AMPERE, 90: _HOPPER, 100: _BLACKWELL}, 16),
    **_table(dict.fromkeys(SHARED_MEMORY, _FLOAT32), 32),
}
del TABLE["select_blocks", 86, 256, 32]  # its queries alone exceed the shared memory

_overrides: dict[str, Tuning] = {}


@contextlib.contextmanager
def override(**tunings: Tuning):
    """Within the context, kernels traced anew take these tunings instead of the table's."""
    before = dict(_overrides)
    _overrides.update(tunings)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def device_class(capability: float) -> int:
    """The capability whose entries a device of this compute capability takes."""
    number = round(capability * 10)
    if number in SHARED_MEMORY:
        return number
    if number == 87:  # Orin has the shared memory of sm_80
        return 80
    return 86 if number < 90 or number >= 120 else 100


def lookup(kernel: str, *, head_dim: int, v_head_dim: int, dtype) -> Tuning:
    """The tuning of a kernel for these dims and dtype on this process' device.

    Raises:
      KeyError: if no tiles of that kernel fit the device.
    """
    if kernel in _overrides:
        return _overrides[kernel]
    _, capability = launch.device()
    size = max(head_dim, v_head_dim)
    features = next(f for f in FEATURES if size <= f)
    return TABLE[kernel, device_class(capability), features, 8 * dtype.itemsize]


def parts(steps: int, programs: int, enough: int) -> int:
    """How many parts the steps of each program are cut into, for there to be enough programs.

    It follows from static shapes: the same shapes give the same sums, whatever the rows hold.
    """
    return max(min(-(-enough // programs), steps), 1)
