"""What all tests share: full float32 products, what hypothesis draws, and the `gpu` marker."""

import os

import hypothesis
import jax
import pytest

# The threads of JAX's CPU client, which is made at the first use of a device. Interpreted kernels
# need a few that wait for each other, on however small a machine.
os.environ.setdefault("NPROC", "16")

# On GPUs JAX multiplies float32 matrices in tf32 by default, Flax's projections and the dense
# baseline among them: too coarse to compare with.
jax.config.update("jax_default_matmul_precision", "highest")

# No test asserts a time, and all runs draw the same, which keeps a failure where it was found.
hypothesis.settings.register_profile("repeats", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeats")


def pytest_addoption(parser):
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail, rather than skip, the tests marked gpu where there is no NVIDIA GPU",
    )


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        if item.config.getoption("--require-gpu"):
            pytest.fail(f"--require-gpu: JAX sees {jax.devices()} and no NVIDIA GPU")
        pytest.skip("needs an NVIDIA GPU")
