"""One variant of a suite with all its seeds: the same compiled update for each of them.

The seeds are trained one after another. A seed's numbers are then those of its own run to the bit,
whichever others are still to be done. Together, by vmap, an update of three took 1.1 to 1.6 times
as long as three updates on two CPU cores, and 0.7 (recall) to 0.9 times (text) on an H100 that had
nothing else to do. --workers share a device among the variants instead, and change no number.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from configs import default
from experiments import selectors
from experiments.suite import Variant
from nsa_jax import determinism
from nsa_jax.model import Transformer
from nsa_jax.training import checkpoint, optimizer, parallel, schema, seeds, steps
from nsa_jax.training import config as config_lib
from nsa_jax.training.config import ConfigError, RunConfig
from nsa_jax.training.data import DataConfig, Pipeline, make_pipeline
from nsa_jax.training.errors import NonFiniteError
from nsa_jax.training.setup import explain_attention


class Trained(NamedTuple):
    """A finished model, as measures see it.

    Attributes:
      run: its configuration.
      model: the model.
      params: its parameters.
      initial_params: those before the first update.
      pipeline: its data.
    """

    run: RunConfig
    model: Transformer
    params: Any
    initial_params: Any
    pipeline: Pipeline


def settings(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of configs/default.py, nested, with the values of `layers` put over them.

    Raises:
      ConfigError: if a key is unknown.
    """
    flat = schema.flatten(default.get_config().to_dict())
    unknown = [
        schema.unknown_key(key, flat) for layer in layers for key in layer if key not in flat
    ]
    if unknown:
        raise ConfigError(unknown)
    nested: dict[str, Any] = {}
    for key, value in collections.ChainMap(*reversed(layers), flat).items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


class Plan:
    """A variant, checked, with its updates ready to be compiled.

    Attributes:
      run: the configuration; the seed in it counts for nothing.
      model: as it is after the last update.
      parameters: dtype and shape of each parameter by name, as text.
      parameter_count: how many numbers they are.
    """

    def __init__(self, config: Mapping[str, Any], variant: Variant, alignment: int | None = None):
        """Checks and traces; compiles nothing.

        Args:
          config: the keys of configs/default.py, nested.
          variant: what it changes beside them.
          alignment: documents start at multiples of it; by default of the variant's own blocks.

        Raises:
          ConfigError: if the configuration is wrong.
          ValueError: if there is no such selector.
        """
        self.run = run = config_lib.run_config(config)
        self._mesh = parallel.data_mesh()
        config_lib.check_devices(run, self._mesh.size)
        model_config = run.model
        if variant.selector is not None:
            selector = selectors.make(variant.selector, run.model.nsa, **variant.options)
            model_config = dataclasses.replace(run.model, selector=selector)
        self.model = Transformer(model_config)
        self._alignment = alignment or run.model.nsa.select_block_size
        self._warm_up_steps = round(variant.dense_share * run.steps)
        self._optimizer = optimizer.make_optimizer(run.optimizer, run.steps)
        new_state = functools.partial(steps.new_state, self.model, self._optimizer)
        self._init = determinism.jit(new_state)
        abstract = jax.eval_shape(new_state, jax.random.key(0)).params
        self.parameters = checkpoint.shapes(abstract)
        self.parameter_count = sum(leaf.size for leaf in jax.tree.leaves(abstract))

    @functools.cached_property
    def warm_up_model(self) -> Transformer:
        """The model while every block is selected, with the same parameters."""
        nsa = self.run.model.nsa
        whole = dataclasses.replace(
            nsa, num_selected_blocks=self.run.data.seq_len // nsa.select_block_size
        )
        config = dataclasses.replace(
            self.model.config, nsa=whole, selector=selectors.make("static", whole)
        )
        return Transformer(config)

    @functools.cached_property
    def implementation(self) -> dict[str, dict]:
        """What runs the attention of `model` here, and why, as run.json has it."""
        return explain_attention(self.model.config, self.run.data.seq_len)

    @functools.cached_property
    def updates(self) -> tuple[Callable, Callable]:
        """The compiled update of `warm_up_model`, and that of `model`."""
        schedule = optimizer.learning_rate_schedule(self.run.optimizer, self.run.steps)
        return tuple(
            steps.make_train_step(
                model,
                self._optimizer,
                schedule,
                accumulate=self.run.optimizer.accumulate,
                dropout_key=seeds.stream_key(self.run.seed, "dropout"),
                mesh=self._mesh,
            )
            for model in (self.warm_up_model, self.model)
        )

    def pipeline(self, seed: int) -> Pipeline:
        """The data of a seed."""
        return _pipeline(self.run.data, self._alignment, seeds.stream_seed(seed, "data"))

    def untrained(self, seed: int) -> Trained:
        """The model as it is before the first update."""
        params = self._init(seeds.stream_key(seed, "parameters")).params
        run = dataclasses.replace(self.run, seed=seed)
        return Trained(run, self.model, params, params, self.pipeline(seed))

    def train(self, seed: int, tell: Callable[[int, dict], None]) -> Trained:
        """Trains from the start to the end.

        Args:
          seed: of parameters and data.
          tell: called with the updates made and the metrics of the last one, every log_every.

        Raises:
          NonFiniteError: if the loss is infinite or NaN.
        """
        run, start = self.run, self.untrained(seed)
        state = jax.device_put(
            self._init(seeds.stream_key(seed, "parameters")), parallel.replicated(self._mesh)
        )
        warm_up, update = self.updates
        for step in range(1, run.steps + 1):
            batch = parallel.global_batch(start.pipeline.train[step - 1], self._mesh)
            state, metrics = (warm_up if step <= self._warm_up_steps else update)(state, batch)
            if step % run.log_every == 0 or step == run.steps:
                tell(step, _row(step, jax.device_get(metrics)))
        return start._replace(params=state.params)


@functools.lru_cache(maxsize=8)
def _pipeline(data: DataConfig, alignment: int, seed: int) -> Pipeline:
    return make_pipeline(data, alignment=alignment, seed=seed)


def _row(step: int, metrics: steps.StepMetrics) -> dict[str, float]:
    mean = float(metrics.sums.nats) / float(metrics.sums.weight)
    if not math.isfinite(mean):
        raise NonFiniteError(f"at update {step} the loss is {mean}")
    return {
        "loss": mean,
        "accuracy": float(metrics.sums.correct) / float(metrics.sums.weight),
        "gradient_norm": float(metrics.gradient_norm),
        "learning_rate": float(metrics.learning_rate),
    }
