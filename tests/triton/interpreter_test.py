"""Runs every `*_check.py` beside this file in a process of its own, under Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
MISSING = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"The Triton kernels need {' and '.join(MISSING)}: not installed here."
)


@pytest.mark.parametrize("check", sorted(path.name for path in FOLDER.glob("*_check.py")))
def test_kernels_in_the_interpreter(check):
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(FOLDER / check)],
        capture_output=True,
        text=True,
        cwd=FOLDER.parents[1],
        # Read when a kernel is decorated, so that one process has all of them or none.
        env=os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
