"""GPU kernels for the operations of Native Sparse Attention.

This package knows arrays and integers, never nsa_jax. `KERNELS` says where each kernel lives;
nothing is imported before a call asks for it, so that neither Triton nor Mosaic GPU has to be
installed where they are not used.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

#: operation -> implementation -> "module:function", the one first that is the fastest on long
#: sequences: of those that can run a call, "auto" takes the first. The module also offers
#: `refusal(operation, *args, **kwargs) -> str | None`: the sentence that says why it cannot run a
#: call with these arguments here, or None. Without arguments it speaks of the device alone.
KERNELS: dict[str, dict[str, str]] = {
    "interval_attention": {
        "mosaic_gpu": "pallas_kernels.mosaic_gpu.interval:interval_attention",
        "triton": "pallas_kernels.triton.interval:interval_attention",
    },
    "gated_sum": {"mosaic_gpu": "pallas_kernels.mosaic_gpu.interval:gated_sum"},
    "select_blocks": {
        "mosaic_gpu": "pallas_kernels.mosaic_gpu.blocks:select_blocks",
        "triton": "pallas_kernels.triton.blocks:select_blocks",
    },
    "selected_attention": {
        "mosaic_gpu": "pallas_kernels.mosaic_gpu.selected:selected_attention",
        "triton": "pallas_kernels.triton.selected:selected_attention",
    },
    "sparse_step": {"triton": "pallas_kernels.triton.step:sparse_step"},
    "dense_step": {"triton": "pallas_kernels.triton.step:dense_step"},
}


class Kernel(NamedTuple):
    """A kernel, and the question whether it can run a given call."""

    function: Callable
    refusal: Callable[..., str | None]


def load(operation: str, implementation: str) -> Kernel:
    """Imports a kernel of the table.

    Raises:
      KeyError: if the table has no such entry.
      ModuleNotFoundError: if what the kernel is written in is not installed.
    """
    module_name, function_name = KERNELS[operation][implementation].split(":")
    module = importlib.import_module(module_name)
    return Kernel(getattr(module, function_name), module.refusal)
