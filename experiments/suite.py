"""What a suite of ablations is: data. `experiments.suites` lists them, `experiments.run` runs them.

A suite asks one question. Its variants are trained with every seed, measured alike, and compared;
its claims say which of two numbers ought to be better for the hypothesis to hold.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

SCALES = ("cpu", "gpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """What one model of a suite has of its own.

    Attributes:
      overrides: dotted keys of configs/default.py, on top of the scale's.
      selector: the name of one of `experiments.selectors`; None is the attention's own choice.
      options: of the selector.
      dense_share: the share of the updates, from the first on, in which every block is selected.
    """

    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    selector: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dense_share: float = 0.0

    def identity(self) -> dict[str, Any]:
        """What the variant changes beside the configuration, as JSON can hold it."""
        return {
            "selector": self.selector,
            "options": dict(self.options),
            "dense_share": self.dense_share,
        }


@dataclasses.dataclass(frozen=True)
class Scale:
    """A suite at one size.

    Attributes:
      base: dotted keys of configs/default.py with the values that all variants share.
      variants: by name, in the order of tables and figures.
      minutes: that three seeds take, with two workers on two quiet cores, or with four on one H100.
    """

    base: Mapping[str, Any]
    variants: Mapping[str, Variant]
    minutes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """That one number is better than another one.

    Attributes:
      better: "variant", or "variant:metric" for a metric other than the suite's.
      worse: likewise.
    """

    better: str
    worse: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """A question, the models that answer it, and how they are compared.

    Attributes:
      name: on the command line.
      hypothesis: what the paper says or implies, in a sentence.
      metric: the primary one, a name that a measure returns.
      larger_is_better: of every metric that the claims name.
      claims: the hypothesis holds if all of them do.
      measures: functions of a `experiments.training.Trained` that return numbers, and arrays for
        the figures, by name; see `experiments.measures`.
      figures: names of `experiments.draw.FIGURES`, beside the two that every suite has.
      scales: by name, of `SCALES`.
    """

    name: str
    hypothesis: str
    metric: str
    larger_is_better: bool
    claims: tuple[Claim, ...]
    measures: tuple[Callable, ...]
    figures: tuple[str, ...] = ()
    scales: Mapping[str, Scale]
