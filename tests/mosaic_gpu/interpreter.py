"""Runs the Mosaic GPU kernels on a CPU: Pallas' interpreter, with its race detector.

Every warpgroup is a thread that calls compiled code and waits in callbacks, so that the CPU client
needs more threads than a small machine has cores, or all of them wait for each other for ever.
`tests/conftest.py` asks for them.
"""

import contextlib
from unittest import mock

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels.mosaic_gpu import launch


@contextlib.contextmanager
def interpreted():
    """Within the context, kernels traced anew are interpreted; a race in any fails the test."""
    gpu_callbacks.reset_gpu_interpret_mode_state()  # a test that failed may have left some
    states, make = [], gpu_callbacks.GPURaceDetectionState

    def remembered(**kwargs):  # the interpreter forgets one kernel's races at the next kernel
        states.append(make(**kwargs))
        return states[-1]

    remember = mock.patch.object(gpu_callbacks, "GPURaceDetectionState", remembered)
    with remember, launch.interpreted():
        yield
    assert states, "no kernel was interpreted"
    assert not any(x.races_found for x in states), "a race, described in the captured output"
