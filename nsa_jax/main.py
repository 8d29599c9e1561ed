"""The command line: flags here, everything else in nsa_jax.training.

    nsa-train --config=configs/tiny_cpu.py --workdir=runs/tiny [--config.steps=50 ...]

`python -m nsa_jax.main` is the same. Exit status: 0 done, 1 the run could not start or go on,
2 the command line or the configuration is wrong, 130 or 143 stopped by Ctrl-C or SIGTERM with the
state saved.

A run of several processes has the same command on each of them, with JAX_COORDINATOR_ADDRESS
(host:port of the first) and, where no cluster manager tells JAX, JAX_NUM_PROCESSES and
JAX_PROCESS_ID in the environment, and one workdir that all of them see.
"""

import os
import re
import runpy
import sys
import traceback

from absl import flags
from ml_collections import ConfigDict, config_flags

from nsa_jax import command_line
from nsa_jax.command_line import UsageError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="a config file, for instance configs/tiny_cpu.py; any key of it can be given as "
    "well: --config.steps=50",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "the run's own folder; the same command in the same folder goes on with the run",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "print what the run would cost (parameters, attention, memory), and leave"
)


def run() -> None:
    """Runs the command line and exits: the console script `nsa-train`."""
    # As `python -m` does: config files import what they build on from the current folder.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    command_line.run("nsa-train", __doc__, (_CONFIG, _WORKDIR, _DRY_RUN), _parse, _main)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; every mistake becomes one sentence.

    Raises:
      UsageError: on a mistake.
    """
    try:
        argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        rest = flags.FLAGS(argv)
        command_line.check_no_words(rest)
        path = _config_path(argv)
        if path is None:
            raise UsageError(
                "--config is missing: name a config file, for instance --config=configs/tiny_cpu.py"
            )
        if not _WORKDIR.value and not _DRY_RUN.value:
            raise UsageError(
                "--workdir is missing: name the run's own folder, for instance --workdir=runs/tiny"
            )
        if _CONFIG.value is not None:
            _CONFIG.value.keys()  # a file that could not be opened raises on first use
        if not isinstance(_CONFIG.value, ConfigDict):
            raise UsageError(f"get_config() of {path} must return an ml_collections.ConfigDict")
    except (UsageError, SystemExit):
        raise
    except Exception as error:  # config files run any code, and ml_collections raises as it comes
        raise UsageError(_explain(error, argv)) from error
    return rest


def _explain(error: Exception, argv: list[str]) -> str:
    """Returns the sentence for what went wrong between the command line and the config file."""
    path = _config_path(argv)
    if path is not None and os.path.isdir(path):
        return f"--config={path}: it is a folder; name a config file in it"
    if path is not None and not os.path.isfile(path):
        return f"--config={path}: there is no such file"
    if path is not None and not isinstance(error, flags.Error):
        in_file = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if os.path.abspath(frame.filename) == os.path.abspath(path)
        ]
        if in_file or isinstance(error, SyntaxError):
            line = in_file[-1].lineno if in_file else error.lineno
            return f"{path}, line {line}: {type(error).__name__}: {error}"
    if path is not None and "Traceback" in str(error):  # put there by ml_collections
        lines = re.findall(rf'File "{re.escape(path)}", line (\d+)', str(error))
        return f"{path}, line {lines[-1] if lines else '?'}: {str(error).strip().splitlines()[-1]}"
    unknown = _unknown_overrides(argv, path)
    return "\n".join(unknown) if unknown else str(error)


def _unknown_overrides(argv: list[str], path: str | None) -> list[str]:
    """Returns a sentence for each --config.key on the command line that the file does not have."""
    given = [re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in argv]
    if path is None or not any(given):
        return []
    from nsa_jax.training import schema

    arguments = _config_value(argv).split(":", 1)[1:]
    config = runpy.run_path(path)["get_config"](*arguments)
    known = list(schema.flatten(config.to_dict()))
    sections = {key.rpartition(".")[0] for key in known}
    keys = [match.group(1) for match in given if match]
    return [
        schema.unknown_key(key, known, prefix="--config.")
        for key in keys
        if key not in known and key not in sections
    ]


def _config_value(argv: list[str]) -> str | None:
    value = None
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if match := re.match(r"--?config=(.*)", argument):
            value = match.group(1)
        elif re.fullmatch(r"--?config", argument):
            value = following
    return value  # the last one counts, as it does for absl


def _config_path(argv: list[str]) -> str | None:
    """Returns the file that --config names, without the argument after a colon."""
    value = _config_value(argv)
    return None if value is None else value.split(":", 1)[0]


def _main(_: list[str]) -> int | None:
    # Imported here, so that --help and mistakes on the command line answer at once.
    import jax

    from nsa_jax.ops.dispatch import UnsupportedError
    from nsa_jax.training import dry_run, train
    from nsa_jax.training.config import ConfigError
    from nsa_jax.training.errors import RunError, RunInterrupted

    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        # What is not given, JAX asks the cluster (Slurm, Open MPI, Kubernetes, TPU) for.
        jax.distributed.initialize(
            num_processes=_integer("JAX_NUM_PROCESSES"), process_id=_integer("JAX_PROCESS_ID")
        )
    try:
        if _DRY_RUN.value:
            print(dry_run.report(_CONFIG.value))
        else:
            train.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    except ConfigError as error:
        _leave(f"{config_flags.get_config_filename(flags.FLAGS['config'])}: {error}", 2)
    except (UnsupportedError, RunError) as error:
        _leave(str(error), 1)
    except RunInterrupted as error:
        _leave(str(error), error.status)


def _integer(variable: str) -> int | None:
    value = os.environ.get(variable)
    try:
        return None if value is None else int(value)
    except ValueError:
        raise UsageError(f"{variable}={value!r} in the environment must be an integer") from None


def _leave(message: str, status: int) -> None:
    command_line.leave("nsa-train", message, status)


if __name__ == "__main__":
    run()
