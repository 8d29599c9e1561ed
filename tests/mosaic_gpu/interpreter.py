"""Runs the Mosaic GPU kernels on a CPU: Pallas' interpreter, with its race detector.

Every warpgroup is a thread that calls compiled code and waits in callbacks, so that the CPU client
needs more threads than a small machine has cores, or all of them wait for each other for ever.
`tests/conftest.py` asks for them.
"""

import contextlib

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from pallas_kernels.mosaic_gpu import launch


@contextlib.contextmanager
def interpreted():
    """Within the context, kernels traced anew are interpreted; a race in one fails the test."""
    interpreter.reset_gpu_interpret_mode_state()  # an earlier test that failed may have left some
    with launch.interpreted():
        yield
    assert not interpreter.get_races().races_found, "a race, described in the captured output"
