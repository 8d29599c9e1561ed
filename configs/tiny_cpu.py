"""A small NSA language model of Python sources, trained on a CPU: the main job.

Command:
    nsa-train --config=configs/tiny_cpu.py --workdir=runs/tiny_cpu

The geometry is the paper's, scaled down for rows of 512 bytes: l/d/l'/n/w = 8/4/16/6/32. A query
attends 175 keys on average over its three branches, where full attention has 256. The corpus is the
standard library of the Python that runs it. tiny_cpu_dense.py is the same run with full attention.

Cost: 3 min 21 s from start to end on two cores of an AMD EPYC, 1.01 million parameters.
Expected: 2.00 validation bits per byte with Python 3.12.1's library; the interpolated 3-gram model
that the run prints beside its own has 2.55 on the same split, tiny_cpu_dense.py 2.06.
"""

from configs import default


def get_config():
    """Returns the configuration."""
    config = default.get_config()
    config.steps = 400
    config.eval_every = 100
    config.eval_batches = 4

    config.model.num_layers = 4
    config.model.model_dim = 128
    config.model.mlp_dim = 384
    config.model.num_heads = 4
    config.model.num_kv_heads = 1
    config.model.head_dim = 32
    config.model.scan_layers = True

    config.nsa.compress_block_size = 8
    config.nsa.compress_stride = 4
    config.nsa.select_block_size = 16
    config.nsa.num_selected_blocks = 6
    config.nsa.window_size = 32
    config.nsa.compression_width = 64

    config.data.seq_len = 512
    config.data.batch_size = 8

    config.optimizer.learning_rate = 3e-3
    config.checkpoint.every_steps = 100
    return config
