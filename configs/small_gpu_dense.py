"""The dense counterpart of small_gpu.py: full attention, everything else the same.

Command:
    nsa-train --config=configs/small_gpu_dense.py --workdir=runs/small_gpu_dense

NSA has three key and value projections, the compression MLPs and the gates on top of what dense
attention has. The MLP is widened from 2048 to 2384, so that both models have the same number
of parameters (within 0.1%). Data, order of rows and schedule are equal.

Cost: on one H100 80GB about 139,000 tokens a second through cuDNN: 16 minutes for 2000 updates.
Expected: not run to the end yet; with --config.steps=150 --config.optimizer.warmup_steps=20 it
ended at 2.67 validation bits per byte (--config.data.validation_fraction=0.01).
"""

from configs import small_gpu


def get_config():
    """Returns the configuration."""
    config = small_gpu.get_config()
    config.model.attention = "dense"
    config.model.mlp_dim = 2384
    return config
