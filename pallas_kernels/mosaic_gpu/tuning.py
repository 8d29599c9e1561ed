"""Tile sizes of every kernel: a table, never a search at run time.

A search at run time would choose by the clock, and another choice is another order of additions:
two runs of one program would differ in their bits. What was measured is named in NOTES.md beside
this file. Tests hold every entry to the shared memory of the device, by compiling it.
"""

import contextlib
import dataclasses


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How one kernel is cut.

    Attributes:
      keys: keys a step; of kernels for dk and dv, keys a tile.
      stages: steps whose operands are in shared memory at a time.
      row_stages: tiles of rows that are there at a time, of those that a warpgroup walks with.
      tail: keys of a shorter step at the end of a walk, if it has one.
    """

    keys: int
    stages: int
    row_stages: int = 1
    tail: int = 0


# Of each kernel, (keys, stages, ...) by (head_dim, v_head_dim). Forward takes two stages or more: a
# step still reads the values of the one before. So do dk and dv: a step waits for the next one.
_INTERVAL_FORWARD = {
    (64, 64): (128, 4, 2),
    (64, 128): (128, 3, 2),
    (64, 256): (64, 3, 2),
    (128, 64): (128, 3, 2),
    (128, 128): (128, 2, 2),
    (128, 256): (64, 2),
    (192, 64): (128, 2),
    (192, 128): (128, 2),
    (192, 256): (64, 2),
    (256, 64): (64, 3),
    (256, 128): (64, 3),
    (256, 256): (64, 2),
}
# Where steps are long and few, the last one is half as long.
_INTERVAL_FORWARD_SHORT = _INTERVAL_FORWARD | {
    (64, 64): (128, 4, 2, 64),
    (64, 128): (128, 3, 2, 64),
    (128, 64): (128, 3, 2, 64),
    (128, 128): (128, 2, 2, 64),
    (192, 64): (128, 2, 1, 64),
    (192, 128): (128, 2, 1, 64),
}
# With three stages or more, a step has the last product of the one before in flight, for which 256
# features in q leave no registers.
_INTERVAL_DQ = {
    (64, 64): (64, 4, 2),
    (64, 128): (64, 4, 2),
    (64, 256): (64, 3),
    (128, 64): (64, 3, 2),
    (128, 128): (64, 3, 2),
    (128, 256): (64, 2),
    (192, 64): (64, 3),
    (192, 128): (64, 3),
    (192, 256): (64, 2),
    (256, 64): (64, 2),
    (256, 128): (64, 2),
    (256, 256): (64, 1),
}
_INTERVAL_DKV = {
    (64, 64): (128, 4),
    (64, 128): (128, 4),
    (64, 256): (64, 3),
    (128, 64): (128, 4),
    (128, 128): (128, 4),
    (128, 256): (64, 3),
    (192, 64): (128, 3),
    (192, 128): (64, 4),
    (192, 256): (64, 2),
    (256, 64): (64, 3),
    (256, 128): (64, 3),
    (256, 256): (64, 2),
}

#: (kernel, head_dim, v_head_dim) -> tuning. "_short" is for intervals of few keys, see
#: `walks.SHORT`.
TABLE: dict[tuple[str, int, int], Tuning] = {
    (kernel, *head_dims): Tuning(*cut)
    for kernel, cuts in {
        "interval_forward": _INTERVAL_FORWARD,
        "interval_forward_short": _INTERVAL_FORWARD_SHORT,
        "interval_dq": _INTERVAL_DQ,
        "interval_dq_short": _INTERVAL_DQ,
        "interval_dkv": _INTERVAL_DKV,
    }.items()
    for head_dims, cut in cuts.items()
}

#: Warpgroups that compute, beside one that copies, of kernels that walk selected blocks, up to 128
#: features. Three leave 160 registers a thread: enough for the state of the forward pass alone.
_COMPUTING = {"selected_forward": 3, "selected_dq": 2}

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


def lookup(kernel: str, head_dim: int, v_head_dim: int) -> Tuning:
    """The tuning of a kernel for these head sizes."""
    if kernel in _overrides:
        return _overrides[kernel]
    return TABLE[kernel, head_dim, v_head_dim]


def computing(kernel: str, head_dim: int, v_head_dim: int) -> int:
    """How many warpgroups of a kernel that walks selected blocks compute."""
    return _COMPUTING[kernel] if max(head_dim, v_head_dim) <= 128 else 2
