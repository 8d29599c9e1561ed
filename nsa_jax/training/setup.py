"""From a configuration to the compiled parts of a run; nothing is computed yet."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nsa_jax.model import Transformer, TransformerConfig
from nsa_jax.ops import dispatch
from nsa_jax.training import config as config_lib
from nsa_jax.training import optimizer, parallel, seeds, steps
from nsa_jax.training.config import RunConfig


class Setup(NamedTuple):
    """The parts of a run.

    Attributes:
      run: the checked configuration.
      mesh: the devices.
      model: the model.
      make_state: returns the state of step 0, with its random initialisation.
      abstract_state: its shapes, dtypes and shardings.
      train_step: from `steps.make_train_step`.
      eval_step: from `steps.make_eval_step`.
    """

    run: RunConfig
    mesh: Mesh
    model: Transformer
    make_state: Callable[[], steps.TrainState]
    abstract_state: steps.TrainState
    train_step: Callable
    eval_step: Callable


def prepare(config: ConfigDict | Mapping, mesh: Mesh | None = None) -> Setup:
    """Checks a configuration and makes the parts of its run.

    Args:
      config: the keys of configs/default.py.
      mesh: of one axis, `parallel.AXIS`; all devices by default.

    Raises:
      ConfigError: if the configuration is wrong.
      UnsupportedError: if the implementation that it names cannot run here.
    """
    run = config_lib.run_config(config)
    mesh = parallel.data_mesh() if mesh is None else mesh
    config_lib.check_devices(run, mesh.size)
    model = Transformer(run.model)
    transformation = optimizer.make_optimizer(run.optimizer, run.steps)
    make_state, abstract_state = steps.init_state(
        model, transformation, seeds.stream_key(run.seed, "parameters"), mesh
    )
    train_step = steps.make_train_step(
        model,
        transformation,
        optimizer.learning_rate_schedule(run.optimizer, run.steps),
        accumulate=run.optimizer.accumulate,
        dropout_key=seeds.stream_key(run.seed, "dropout"),
        mesh=mesh,
    )
    eval_step = steps.make_eval_step(model, mesh)
    return Setup(run, mesh, model, make_state, abstract_state, train_step, eval_step)


def explain_attention(model: TransformerConfig, seq_len: int) -> dict[str, dict]:
    """What runs each attention operation of a model here, and why, as run.json has it.

    Args:
      model: its configuration.
      seq_len: tokens of a sequence.

    Returns:
      See `dispatch.recorded`.

    Raises:
      UnsupportedError: if the implementation that it names cannot run here.
    """
    if model.implementation == "reference":
        return dispatch.explain("reference")
    layer = Transformer(dataclasses.replace(model, num_layers=1))
    tokens = document_starts = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
    params = jax.eval_shape(layer.init, jax.random.key(0), tokens)
    with dispatch.recorded() as record:
        jax.eval_shape(layer.apply, params, tokens, document_starts)
    return record


def parameter_count(params: Any) -> int:
    """Returns the number of parameters of a tree of arrays or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
