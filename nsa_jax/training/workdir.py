"""The folder of a run: whose it is, and the one file that says what the run was."""

import datetime
import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from nsa_jax.training import metrics, schema
from nsa_jax.training.errors import WorkdirError

# What a run may change when it goes on: nothing that the parameters depend on. `steps` is not here
# because the learning rate of every update depends on it; data.path is, because the fingerprint of
# the corpus guards what is read from there.
MAY_CHANGE = ("log_every", "eval_every", "eval_batches", "checkpoint", "sample", "data.path")

_RUN_FILE = "run.json"
_LOCK_FILE = ".lock"
_IDENTITY = {"config", "corpus", "parameters"}
_OURS = ("checkpoints", "metrics.jsonl", "tensorboard", "loss.png", "selection.png")


class Workdir:
    """The folder of one run; the process that writes in it holds a lock on it until `close`.

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
          WorkdirError: if another process runs in the folder, or it holds another run, or files
            that this one would write over.
          OSError: if the folder cannot be made.
        """
        self.path = Path(path).expanduser().absolute()
        self._writes = main_process
        if self.path.exists() and not self.path.is_dir():
            raise WorkdirError(f"{self.path} is a file; --workdir names a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path) if main_process else None
        try:
            self._run = self._claim(identity)
        except BaseException:
            self.close()
            raise
        config = schema.flatten(self._run["identity"]["config"])
        self._every_steps = config.get("checkpoint.every_steps", math.inf)  # of the last start
        self._run["identity"] = identity

    def _claim(self, identity: Mapping) -> dict:
        """Returns what run.json says, made sure that it is this run's."""
        run = read_run(self.path)
        if run is not None:
            refuse_other_run(run["identity"], identity, str(self.path))
            return run
        present = [name for name in _OURS if (self.path / name).exists()]
        if present:
            raise WorkdirError(
                f"{self.path} holds {', '.join(present)} but no {_RUN_FILE}, so it cannot be "
                "told whose they are; choose another workdir"
            )
        return {"identity": identity, "starts": []}

    @property
    def started_before(self) -> bool:
        """Whether an earlier start of this run is on record."""
        return bool(self._run["starts"])

    @property
    def finished(self) -> bool:
        """Whether the result of the run is on record."""
        return "result" in self._run

    @property
    def had_checkpoint(self) -> bool:
        """Whether an earlier start must have completed a checkpoint, as far as is on record."""
        if self.finished or any(start.get("from_step") for start in self._run["starts"]):
            return True
        rows = metrics.read_rows(self.path / "metrics.jsonl")
        last = max((row["step"] for row in rows), default=0)
        # A first save may have failed or been killed, which leaves the folder there. The second one
        # waits for the first.
        folder = self.path / "checkpoints"
        return last > (2 if folder.exists() else 1) * self._every_steps

    def close(self) -> None:
        """Lets another process run here."""
        if self._lock is not None:
            self._lock.close()

    def record_start(self, facts: Mapping[str, Any]) -> None:
        """Adds one start of the run to run.json: versions, devices and the like, and the time."""
        self._run["starts"].append({"time": _now(), **facts})
        self._write()

    def record_result(self, result: Mapping[str, Any]) -> None:
        """Writes the result of the finished run into run.json."""
        self._run["result"] = {"time": _now(), **result}
        self._write()

    def _write(self) -> None:
        if not self._writes:
            return
        # Replaced in one go, so that a crash leaves the old file or the new one.
        temporary = self.path / f"{_RUN_FILE}.tmp"
        temporary.write_text(json.dumps(self._run, indent=2) + "\n")
        os.replace(temporary, self.path / _RUN_FILE)


def read_run(folder: Path) -> dict | None:
    """Returns what run.json in a folder says, None if there is no such file.

    Raises:
      WorkdirError: if it cannot be read.
    """
    path = folder / _RUN_FILE
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text())
        if isinstance(run["starts"], list) and run["identity"].keys() >= _IDENTITY:
            return run
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise WorkdirError(
        f"{path} cannot be read, so it cannot be told which run this workdir holds; repair it or "
        "choose another workdir"
    )


def _lock(folder: Path) -> TextIO:
    """Returns the open lock file of a folder; closing it, or the end of the process, unlocks.

    Raises:
      WorkdirError: if another process holds the lock.
    """
    file = (folder / _LOCK_FILE).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        with file:
            pid = file.read().strip() or "unknown"
        raise WorkdirError(
            f"{folder}: another process (pid {pid}) is running in it; wait for its end, or choose "
            "another workdir"
        ) from None
    except OSError:
        pass  # a file system without locks: nothing to hold on to
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


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
