"""From an ml_collections ConfigDict to checked, typed settings; nothing runs before this passes.

The ConfigDict is for files and the command line. Behind this door the code sees frozen dataclasses
without defaults, so that every value has one place: configs/default.py.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from nsa_jax.config import NSAConfig
from nsa_jax.model import TransformerConfig
from nsa_jax.training import schema
from nsa_jax.training.checkpoint import CheckpointConfig
from nsa_jax.training.data import VOCAB_SIZE, DataConfig
from nsa_jax.training.optimizer import OptimizerConfig
from nsa_jax.training.sampling import SampleConfig

# Fields of TransformerConfig that are no keys of config.model: another key, the data or the caller
# decide them.
_DERIVED_MODEL_FIELDS = ("vocab_size", "implementation", "nsa", "selector")

# The data that a sample is drawn for; the rows of the synthetic tasks are no text.
SAMPLED = ("stdlib", "text")

_LEAST = {"steps": 1, "seed": 0, "log_every": 1, "eval_every": 0, "eval_batches": 0}


class ConfigError(ValueError):
    """The configuration is wrong.

    Attributes:
      problems: one sentence for each thing that is wrong, with the dotted key.
    """

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        count = "one problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        listed = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"the configuration has {count}:{listed}")

    def __reduce__(self):
        return type(self), (self.problems,)  # by default the text would be taken for the problems


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run, checked; configs/default.py explains each value."""

    seed: int
    steps: int
    log_every: int
    eval_every: int
    eval_batches: int
    model: TransformerConfig
    data: DataConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    sample: SampleConfig


def run_config(config: ConfigDict | Mapping) -> RunConfig:
    """Checks a configuration and turns it into dataclasses.

    Args:
      config: the keys of configs/default.py, all of them and no others.

    Raises:
      ConfigError: names every unknown key with the nearest right one, every missing key, every
        value of a wrong type, the first value of each section that is out of range, and values
        that do not fit each other.
    """
    scalars = {
        field.name: field.type
        for field in dataclasses.fields(RunConfig)
        if not dataclasses.is_dataclass(field.type)
    }
    plain = {
        "data": DataConfig,
        "optimizer": OptimizerConfig,
        "checkpoint": CheckpointConfig,
        "sample": SampleConfig,
    }
    reader = schema.Reader(
        as_dict(config),
        {
            **scalars,
            "implementation": str,
            "model": schema.field_types(TransformerConfig, without=_DERIVED_MODEL_FIELDS),
            "nsa": schema.field_types(NSAConfig),
            **{name: schema.field_types(kind) for name, kind in plain.items()},
        },
    )
    built = {name: reader.build(kind, name) for name, kind in plain.items()}
    nsa = reader.build(NSAConfig, "nsa")
    # A wrong nsa section has been noted; the model's own problems are looked for all the same.
    derived = {"vocab_size": VOCAB_SIZE, "nsa": nsa or NSAConfig(), "selector": None}
    if "implementation" in reader.values:
        derived["implementation"] = reader.values["implementation"]
    built["model"] = reader.build(TransformerConfig, "model", **derived)
    problems = reader.problems + _cross_check(reader.values, nsa=nsa, **built)
    if problems:
        raise ConfigError(problems)
    return RunConfig(**{name: reader.values[name] for name in scalars}, **built)


def as_dict(config: ConfigDict | Mapping) -> dict[str, Any]:
    """Returns a configuration as nested plain dictionaries."""
    return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def check_devices(run: RunConfig, device_count: int) -> None:
    """Checks that every device gets as many rows of every microbatch.

    Raises:
      ConfigError: if data.batch_size does not divide so.
    """
    shares = device_count * run.optimizer.accumulate
    if run.data.batch_size % shares:
        raise ConfigError(
            [
                f"data.batch_size={run.data.batch_size}: must be a multiple of {shares}, the "
                f"{device_count} devices times optimizer.accumulate={run.optimizer.accumulate}"
            ]
        )


def _cross_check(
    values: Mapping,
    *,
    nsa: NSAConfig | None,
    data: DataConfig | None,
    optimizer: OptimizerConfig | None,
    sample: SampleConfig | None,
    **_,
) -> list[str]:
    """Returns what does not fit across sections; a section that is None has its own problems."""
    problems = [
        f"{name}={values[name]}: must be at least {least}"
        for name, least in _LEAST.items()
        if name in values and values[name] < least
    ]
    steps = values.get("steps")
    if optimizer and steps is not None and optimizer.warmup_steps >= steps:
        problems.append(
            f"optimizer.warmup_steps={optimizer.warmup_steps}: must be below steps={steps}, or the "
            "learning rate would never come down"
        )
    if optimizer and data and data.batch_size % optimizer.accumulate:
        problems.append(
            f"optimizer.accumulate={optimizer.accumulate}: must divide "
            f"data.batch_size={data.batch_size}"
        )
    if data and nsa and data.seq_len % nsa.select_block_size:
        problems.append(
            f"data.seq_len={data.seq_len}: must be a multiple of "
            f"nsa.select_block_size={nsa.select_block_size}, to which documents are aligned"
        )
    if data and sample and data.name in SAMPLED:
        prompt = len(sample.prompt.encode())
        if 1 + prompt + sample.length > data.seq_len:
            problems.append(
                f"sample.length={sample.length}: the document start, the prompt of {prompt} bytes "
                f"and the sample must fit into data.seq_len={data.seq_len}"
            )
    return problems
