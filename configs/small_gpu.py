"""An NSA language model at the paper's geometry, rows of 8192 bytes, on one GPU.

Command:
    nsa-train --config=configs/small_gpu.py --workdir=runs/small_gpu

l/d/l'/n/w = 32/16/64/16/512 with groups of 16 query heads, as in the paper. Compute is bfloat16
over float32 parameters; layers are scanned and recomputed in the backward pass. For anything but a
trial give it a larger corpus; the standard library is read a dozen times over:

    --config.data.name=text --config.data.path=FOLDER

Cost: one H100 80GB takes about 240,000 tokens a second, attention by Mosaic GPU kernels: 9 minutes
for the 131 million tokens of 2000 updates. 86.2 million parameters.
Expected: not run to the end yet. With --config.steps=150 --config.optimizer.warmup_steps=20, the
batch of update 90 had 2.86 bits per byte, and 3.19 in small_gpu_dense.py.

`--dry_run` prints parameters, cost of attention and memory. small_gpu_dense.py is the same run with
full attention.
"""

from configs import default


def get_config():
    """Returns the configuration."""
    config = default.get_config()
    config.steps = 2000
    config.eval_every = 500
    config.eval_batches = 16

    config.model.num_layers = 12
    config.model.model_dim = 768
    config.model.mlp_dim = 2048
    config.model.num_heads = 16
    config.model.num_kv_heads = 1
    config.model.head_dim = 64
    config.model.rope_theta = 100_000.0
    config.model.remat = True
    config.model.scan_layers = True
    config.model.dtype = "bfloat16"

    config.data.seq_len = 8192
    config.data.batch_size = 8

    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 100
    config.optimizer.accumulate = 2
    config.checkpoint.every_steps = 500
    config.sample.length = 400
    return config
