"""The model that a workdir holds, for whoever wants to use it and changes nothing there."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from nsa_jax.model import Transformer
from nsa_jax.training import checkpoint, parallel, schema
from nsa_jax.training import workdir as workdir_lib
from nsa_jax.training.checkpoint import Checkpoints
from nsa_jax.training.config import ConfigError, RunConfig
from nsa_jax.training.errors import CheckpointError, WorkdirError
from nsa_jax.training.setup import prepare


class Trained(NamedTuple):
    """A trained model.

    Attributes:
      run: its configuration.
      model: the model.
      params: its parameters, on one device.
      step: updates that were made.
      notes: a line for each newer checkpoint that is not usable.
    """

    run: RunConfig
    model: Transformer
    params: Any
    step: int
    notes: list[str]


def load(workdir: str | os.PathLike) -> Trained:
    """Reads the newest usable checkpoint of a workdir, on one device.

    The model's implementation is "auto": the run's own may need a device that is not here.

    Args:
      workdir: the folder of a run, finished or not.

    Raises:
      WorkdirError: if there is no run there, its configuration cannot be run by this version, or
        the configuration, its parameters and the checkpoint do not match.
      CheckpointError: if no checkpoint is usable.
    """
    path = Path(workdir).expanduser().absolute()
    if not path.is_dir():
        raise WorkdirError(f"{path}: there is no such folder")
    record = workdir_lib.read_run(path)
    if record is None:
        raise WorkdirError(f"{path} holds no run: there is no run.json in it")
    identity = record["identity"]
    try:
        config = dict(identity["config"]) | {"implementation": "auto"}
        setup = prepare(config, parallel.local_mesh())
    except ConfigError as error:
        raise WorkdirError(f"{path / 'run.json'}: {error}") from error
    shapes = checkpoint.shapes(setup.abstract_state.params)
    if lines := schema.differences(identity["parameters"], shapes):
        listed = "".join(f"\n  shape of {line}" for line in lines[:8])
        raise WorkdirError(
            f"{path / 'run.json'}: the parameters of the run are not those of its configuration in "
            f"this version of nsa_jax, which differ in:{listed}"
        )

    def check(found: dict) -> None:
        workdir_lib.refuse_other_run(found, identity, "the checkpoint")

    checkpoints = Checkpoints(path / "checkpoints", setup.run.checkpoint.max_to_keep)
    restored, broken = checkpoints.read(setup.abstract_state, check)
    if restored is None:
        raise CheckpointError(
            f"{path} holds no checkpoint yet; the run writes the first one after update "
            f"{min(setup.run.checkpoint.every_steps, setup.run.steps)}"
        )
    notes = [f"{path} is not usable ({why})" for path, why in broken.items()]
    return Trained(setup.run, setup.model, restored.state.params, restored.step, notes)
