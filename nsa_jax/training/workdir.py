"""The folder of a run: whose it is, and the one file that says what the run was."""

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa_jax.training import schema
from nsa_jax.training.errors import WorkdirError

# What a run may change when it goes on: nothing that the parameters depend on. `steps` is not here
# because the learning rate of every update depends on it.
MAY_CHANGE = ("log_every", "eval_every", "eval_batches", "checkpoint", "sample")

_RUN_FILE = "run.json"
_OURS = ("checkpoints", "metrics.jsonl", "tensorboard", "loss.png", "selection.png")


class Workdir:
    """The folder of one run.

    Attributes:
      path: the folder, made when it is not there.
    """

    def __init__(self, path: str | os.PathLike, identity: Mapping, *, main_process: bool = True):
        """Opens the folder and makes sure that it is this run's.

        Args:
          path: the folder.
          identity: the run's configuration, corpus fingerprint and parameter shapes, as JSON can
            hold them: `identity`.
          main_process: whether this process writes; the others only read.

        Raises:
          WorkdirError: if the folder holds another run, or files that this one would write over.
        """
        self.path = Path(path).expanduser().absolute()
        self._writes = main_process
        if self.path.exists() and not self.path.is_dir():
            raise WorkdirError(f"{self.path} is a file; --workdir names a folder")
        self._run = self._read()
        if self._run is not None:
            refuse_other_run(self._run["identity"], identity, str(self.path))
        else:
            present = [name for name in _OURS if (self.path / name).exists()]
            if present:
                raise WorkdirError(
                    f"{self.path} holds {', '.join(present)} but no {_RUN_FILE}, so it cannot be "
                    "told whose they are; choose another workdir"
                )
            self._run = {"identity": identity, "starts": []}
        self._run["identity"] = identity
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    def started_before(self) -> bool:
        """Whether an earlier start of this run is on record."""
        return bool(self._run["starts"])

    def record_start(self, facts: Mapping[str, Any]) -> None:
        """Adds one start of the run to run.json: versions, devices and the like, and the time."""
        self._run["starts"].append({"time": _now(), **facts})
        self._write()

    def record_result(self, result: Mapping[str, Any]) -> None:
        """Writes the result of the finished run into run.json."""
        self._run["result"] = {"time": _now(), **result}
        self._write()

    def _read(self) -> dict | None:
        path = self.path / _RUN_FILE
        if not path.exists():
            return None
        try:
            run = json.loads(path.read_text())
            if {"identity", "starts"} <= set(run):
                return run
        except (ValueError, TypeError):
            pass
        raise WorkdirError(
            f"{path} cannot be read, so it cannot be told which run this workdir holds; repair it "
            "or choose another workdir"
        )

    def _write(self) -> None:
        if not self._writes:
            return
        # Replaced in one go, so that a crash leaves the old file or the new one.
        temporary = self.path / f"{_RUN_FILE}.tmp"
        temporary.write_text(json.dumps(self._run, indent=2) + "\n")
        os.replace(temporary, self.path / _RUN_FILE)


def identity(config: Mapping, fingerprint: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    """Returns what makes a run this run, as JSON gives it back (tuples become lists).

    Args:
      config: the configuration, nested.
      fingerprint: of the corpus.
      parameters: dtype and shape of each parameter by name.
    """
    whole = {"config": config, "corpus": fingerprint, "parameters": parameters}
    return json.loads(json.dumps(whole))


def refuse_other_run(found: Mapping, ours: Mapping, place: str) -> None:
    """Compares two identities.

    Raises:
      WorkdirError: if they differ in more than `MAY_CHANGE`; names every difference.
    """
    lines = schema.differences(found["config"], ours["config"], ignore=MAY_CHANGE)
    if found["corpus"] != ours["corpus"]:
        lines.append(
            f"corpus fingerprint: was {found['corpus'][:16]}, is {ours['corpus'][:16]}: the text "
            "is not the same any more"
        )
    shapes = schema.differences(found["parameters"], ours["parameters"])
    lines += [f"shape of {line}" for line in shapes[:8]]
    if len(shapes) > 8:
        lines.append(f"and {len(shapes) - 8} more parameters")
    if not lines:
        return
    listed = "".join(f"\n  {line}" for line in lines)
    hint = ""
    if any(line.startswith("steps:") for line in lines):
        hint = "; steps counts because the learning rate of every update depends on it"
    raise WorkdirError(
        f"{place} holds another run, which differs in:{listed}\n"
        f"Choose another --workdir, or the settings of that run{hint}."
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
