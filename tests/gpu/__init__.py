"""What only an NVIDIA GPU can show; run with `pytest -m gpu --require-gpu tests/gpu -n 8`.

Beside these, the whole suite runs on a GPU where there is one: JAX puts every test there.
"""

import os

# Several test processes share the GPU, so that none of them may take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
