"""The dense counterpart of small_gpu.py: full attention, everything else the same.

Command:
    nsa-train --config=configs/small_gpu_dense.py --workdir=runs/small_gpu_dense

NSA has three key and value projections, the compression MLPs and the gates on top of what dense
attention has. The MLP is widened from 2048 to 2384, so that both models have the same number
of parameters (within 0.1%). Data, order of rows and schedule are equal.

Expected: validation bits per byte to hold against those of small_gpu.py.
"""

from configs import small_gpu


def get_config():
    """Returns the configuration."""
    config = small_gpu.get_config()
    config.model.attention = "dense"
    config.model.mlp_dim = 2384
    return config
