r"""Runs a suite of ablations: every variant with every seed, then tables, verdict and figures.

    python -m experiments.run --list
    python -m experiments.run --suite=recall --scale=cpu --seeds=0,1,2 --workdir=runs/ablations

WORKDIR/SUITE_SCALE/ then holds, for each variant and seed, run.json (what ran, on what, and what
was measured) and metrics.jsonl; results/ gathers in few files the variants and seeds that the last
command asked for, see `experiments.report`.
What is finished is skipped, and what was killed is done again from its own start: a run depends on
its configuration and seed alone, so that the numbers are those of an uninterrupted command.

--workers=2 does two variants at a time, each in a process of its own, and changes no number.
--only=nsa,full runs a part of the variants. --overrides=steps=3,model.num_layers=1 changes keys of
configs/default.py for all variants: trials of a few steps. They are other runs and need a workdir
of their own.
"""

import os
import shlex
import sys
from pathlib import Path

from absl import flags

from experiments.runner import listing, parse_overrides, run_suite
from experiments.suite import SCALES
from experiments.suites import SUITES
from nsa_jax import command_line
from nsa_jax.command_line import UsageError
from nsa_jax.ops import dispatch
from nsa_jax.training.errors import RunError

_NAME = "experiments.run"

_SUITE = flags.DEFINE_enum("suite", None, list(SUITES), "which suite to run")
_SCALE = flags.DEFINE_enum("scale", "cpu", SCALES, "how large")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "of parameters and data")
_WORKDIR = flags.DEFINE_string("workdir", None, "where runs and results go")
_ONLY = flags.DEFINE_list("only", None, "names of variants; all of them if not given")
_OVERRIDES = flags.DEFINE_string("overrides", "", "dotted keys and values: steps=3,log_every=1")
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "processes among which the variants are shared", lower_bound=1
)
_LIST = flags.DEFINE_bool("list", False, "show the suites with what they ask and cost, and leave")
_FLAGS = (_SUITE, _SCALE, _SEEDS, _WORKDIR, _ONLY, _OVERRIDES, _WORKERS, _LIST)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags.

    Raises:
      UsageError: on a mistake.
    """
    rest = command_line.parse_flags(argv)
    if not _LIST.value and (_SUITE.value is None or _WORKDIR.value is None):
        raise UsageError("--suite and --workdir are needed; --list shows the suites")
    for seed in _SEEDS.value:
        if not seed.isdigit():
            raise UsageError(f"--seeds: {seed!r} must be an integer, at least 0")
    for flag in (_SEEDS, _ONLY):
        if flag.value == []:
            raise UsageError(f"--{flag.name} is empty")
    return rest


def _main(_: list[str]) -> None:
    if _LIST.value:
        print(listing())
        return
    if _WORKERS.value > 1:  # read when a GPU is first used; the first to come would take it all
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        run_suite(
            SUITES[_SUITE.value],
            _SCALE.value,
            [int(seed) for seed in _SEEDS.value],
            Path(_WORKDIR.value),
            only=_ONLY.value,
            overrides=parse_overrides(_OVERRIDES.value),
            command=shlex.join(["python", "-m", _NAME, *sys.argv[1:]]),
            workers=_WORKERS.value,
        )
    except ValueError as error:  # ConfigError is one
        raise UsageError(str(error)) from error
    except (RunError, dispatch.UnsupportedError, OSError) as error:
        command_line.leave(_NAME, str(error), 1)


if __name__ == "__main__":
    command_line.run(_NAME, __doc__, _FLAGS, _parse, _main)
