"""The smallest run that is still a whole one: what the trainer's tests share."""

import random

from ml_collections import ConfigDict

from configs import default
from nsa_jax.training import checkpoint, workdir
from nsa_jax.training.checkpoint import Checkpoints
from nsa_jax.training.setup import prepare
from nsa_jax.training.steps import TrainState


def settings(**changes) -> ConfigDict:
    """Returns a configuration of rows of 32 bytes and a model of one layer.

    Args:
      **changes: by dotted key, with "__" for the dot: optimizer__accumulate=2.
    """
    config = default.get_config()
    small = {
        "steps": 6,
        "log_every": 1,
        "eval_every": 4,
        "eval_batches": 1,
        "model.num_layers": 1,
        "model.model_dim": 16,
        "model.mlp_dim": 16,
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "model.head_dim": 8,
        "nsa.compress_block_size": 4,
        "nsa.compress_stride": 2,
        "nsa.select_block_size": 8,
        "nsa.num_selected_blocks": 3,
        "nsa.window_size": 6,
        "nsa.compression_width": 4,
        "data.name": "copy",
        "data.seq_len": 32,
        "data.batch_size": 4,
        "data.task_validation_rows": 6,
        "optimizer.learning_rate": 0.02,
        "optimizer.warmup_steps": 2,
        "checkpoint.every_steps": 2,
        "checkpoint.max_to_keep": 3,
        "sample.prompt": "a",
        "sample.length": 8,
    }
    config.update_from_flattened_dict(small)
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def write_text(folder) -> None:
    """Writes forty documents of words, the same ones each time."""
    folder.mkdir()
    generator = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "(", ")", "\n"]
    for index in range(40):
        text = " ".join(generator.choices(words, k=30))
        (folder / f"{index:02}.txt").write_text(text)


def write_run(folder, steps, **changes) -> TrainState:
    """Writes a workdir with checkpoints of a model of text that has learned nothing.

    Args:
      folder: the workdir.
      steps: of the checkpoints, which all hold the same.
      **changes: as of `settings`.

    Returns:
      The state in the checkpoints.
    """
    config = settings(**{"data__name": "stdlib"} | changes)
    setup = prepare(config)
    state = setup.make_state()
    identity = workdir.identity(config.to_dict(), "0" * 64, checkpoint.shapes(state.params))
    place = workdir.Workdir(folder, identity)
    place.record_start({"from_step": 0})
    place.close()
    checkpoints = Checkpoints(folder / "checkpoints", len(steps))
    for step in steps:
        checkpoints.save(step, state, identity)
    checkpoints.close()
    return state
