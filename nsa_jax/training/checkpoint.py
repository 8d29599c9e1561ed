"""Asynchronous Orbax checkpoints that know whose they are and whether they are whole.

Each holds the state (parameters, optimizer, step) and a JSON item `meta`: the run's identity
(configuration, corpus fingerprint, parameter shapes) and a digest of every array. The step is the
position in the data too, because a batch is a function of the step. The storage notices truncated
files by itself, but hands back flipped or zeroed bytes without a word; the digests notice those.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from nsa_jax.training.errors import CheckpointError, NonFiniteError
from nsa_jax.training.quiet import quiet_storage

# Orbax's own name for a checkpoint while it is being written.
_UNFINISHED = "*.orbax-checkpoint-tmp*"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often and how many; configs/default.py explains each value.

    Raises:
      ValueError: if a value is out of range.
    """

    every_steps: int
    max_to_keep: int

    def __post_init__(self):
        for name in ("every_steps", "max_to_keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class Restored(NamedTuple):
    """What `Checkpoints.restore` found.

    Attributes:
      step: updates made before the checkpoint was written.
      state: like the abstract state that was asked for.
    """

    step: int
    state: Any


class Checkpoints:
    """The checkpoints of one run, in one folder, named by their step.

    Attributes:
      set_aside: a line for each thing that `restore` moved out of the way, with its new place.
    """

    def __init__(self, directory: Path, max_to_keep: int):
        """Opens the folder, made when it is not there.

        Args:
          directory: holds the checkpoints and nothing else.
          max_to_keep: older ones are deleted once more are complete.
        """
        self._directory = directory.absolute()
        self._max_to_keep = max_to_keep
        self._manager: ocp.CheckpointManager | None = None
        self.set_aside: list[str] = []
        quiet_storage()

    def restore(self, abstract_state: Any, check: Callable[[dict], None]) -> Restored | None:
        """Reads the newest usable checkpoint; newer ones are moved aside, never deleted.

        Args:
          abstract_state: tree of jax.ShapeDtypeStruct with shardings.
          check: called with the identity found in a checkpoint; raises to refuse it.

        Returns:
          None if the folder holds no checkpoint at all.

        Raises:
          CheckpointError: if there are checkpoints and none is usable; all are left in place.
        """
        found, broken = self.read(abstract_state, check)
        unfinished = list(self._directory.glob(_UNFINISHED))
        _all_processes("checkpoints looked at")
        moved = {path: f"is not usable ({why})" for path, why in broken.items()}
        moved |= dict.fromkeys(unfinished, "was never finished")
        self.set_aside = [_set_aside(path, why) for path, why in moved.items()]
        _all_processes("checkpoints set aside")
        return found

    def read(
        self, abstract_state: Any, check: Callable[[dict], None]
    ) -> tuple[Restored | None, dict[Path, str]]:
        """As `restore`, but changes nothing; also returns the newer ones, and why they are not it.

        Raises:
          CheckpointError: if there are checkpoints and none is usable.
        """
        broken: dict[Path, str] = {}
        found = None
        steps = sorted(
            (path for path in self._directory.glob("*") if path.name.isdecimal()),
            key=lambda path: int(path.name),
            reverse=True,
        )
        for path in steps:
            try:
                meta = _read_meta(path)
            except Exception as error:  # Orbax, JSON and the file system raise what they like
                broken[path] = _first_line(error)
                continue
            check(meta["identity"])
            try:
                found = Restored(int(path.name), _read_state(path, abstract_state, meta))
                break
            except Exception as error:
                broken[path] = _first_line(error)
        if found is None and broken:
            listed = "".join(f"\n  {path}: {reason}" for path, reason in broken.items())
            raise CheckpointError(
                f"none of the checkpoints is usable:{listed}\nNothing was changed. Restore one "
                "from a copy, or start again from the beginning in another workdir."
            )
        return found, broken

    def save(self, step: int, state: Any, identity: dict) -> None:
        """Starts to write a checkpoint; returns when `state` may be donated.

        Raises:
          NonFiniteError: if the state holds an infinity or NaN; nothing is written.
          CheckpointError: if an earlier write failed.
        """
        report = jax.device_get(_examine(state))
        bad = [name for name, leaf in report.items() if not leaf["finite"]]
        if bad:
            raise NonFiniteError(
                f"the state after step {step} is not finite in {', '.join(bad[:5])}"
                f"{' and more' if len(bad) > 5 else ''}; no checkpoint of it was written"
            )
        digests = {name: int(leaf["digest"]) for name, leaf in report.items()}
        try:
            self._open().save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    meta=ocp.args.JsonSave({"identity": identity, "digests": digests}),
                ),
                force=True,  # without it, Orbax skips a save while another is being written
            )
        except Exception as error:
            raise CheckpointError(f"writing a checkpoint failed: {_first_line(error)}") from error

    def wait(self) -> int | None:
        """Waits for what is being written; returns the newest complete step, None if there is none.

        Raises:
          CheckpointError: if the write failed.
        """
        try:
            self._open().wait_until_finished()
        except Exception as error:
            raise CheckpointError(f"writing a checkpoint failed: {_first_line(error)}") from error
        return self._open().latest_step()

    def path(self, step: int) -> Path:
        """Returns the folder of the checkpoint of `step`."""
        return self._directory / str(step)

    def close(self) -> None:
        """Waits for what is being written and lets go of the folder."""
        if self._manager is not None:
            self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        # Opened on first use: the manager caches the list of steps, so broken ones go first.
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(max_to_keep=self._max_to_keep),
                item_names=("state", "meta"),
            )
        return self._manager


def state_names(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by name: "params/embed/embedding"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def shapes(params: Any) -> dict[str, str]:
    """Returns the dtype and shape of each parameter by name, as text: "float32[257, 64]"."""
    return {
        name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for name, leaf in state_names(params).items()
    }


@jax.jit
def _examine(state: Any) -> dict[str, dict[str, jax.Array]]:
    """Returns for each leaf whether it is finite, and a digest that any flipped bit changes.

    The digest is a sum of the leaf's words times odd numbers, modulo 2**32: the same on every
    device and in every order of summation.
    """
    report = {}
    for name, leaf in state_names(state).items():
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32).reshape(-1)
        odd = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
        report[name] = {
            "finite": jnp.all(jnp.isfinite(leaf)),
            "digest": jnp.sum(words * odd, dtype=jnp.uint32),
        }
    return report


def _read_meta(path: Path) -> dict:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        meta = reader.restore(path / "meta")
    if not isinstance(meta, dict) or not {"identity", "digests"} <= set(meta):
        raise ValueError("its meta item lacks the identity or the digests")
    return meta


def _read_state(path: Path, abstract_state: Any, meta: dict) -> Any:
    """Returns the state with its digests checked.

    Raises:
      Exception: whatever the storage raises, and ValueError on another digest.
    """
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(path / "state", abstract_state)
    report = jax.device_get(_examine(state))
    changed = [
        name for name, leaf in report.items() if meta["digests"].get(name) != int(leaf["digest"])
    ]
    if changed:
        raise ValueError(f"the bytes of {', '.join(changed[:5])} are not those that were saved")
    return state


def _all_processes(reached: str) -> None:
    """Waits until every process of the run has come here; at once if there is one."""
    multihost_utils.sync_global_devices(reached)


def _set_aside(path: Path, why: str) -> str:
    """Moves a checkpoint out of the way, under a name that nothing has yet."""
    folder = path.parent.with_name("checkpoints_set_aside")
    target = folder / path.name
    count = 1
    while target.exists():
        count += 1
        target = folder / f"{path.name}_{count}"
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
        shutil.move(path, target)
    return f"{path} {why}; moved to {target}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__
