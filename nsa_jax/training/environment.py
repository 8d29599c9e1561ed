"""What a run depended on: versions, devices, the state of the source tree."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_PACKAGES = (
    "nsa-jax",
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu13",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "ml-collections",
    "numpy",
    "triton",
    "jax-triton",
)


def describe() -> dict[str, Any]:
    """Returns versions, devices and git state, as JSON can hold them."""
    return {
        "versions": versions(),
        "devices": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "git": git_state(),
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python, this package and what it computes with, if installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path | None = None) -> dict[str, Any]:
    """Returns the commit of the sources that run, and whether they differ from it.

    Files that git does not track count for nothing: the sources do without them, folders of data or
    results beside them change no run, and a run records its configuration, whosever file it is.

    Args:
      folder: a folder of the source tree; that of this package if None.

    Returns:
      {"commit": hex, "dirty": bool}, or {"commit": None, "reason": why it is not known}.
    """
    folder = folder or Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.strip()

    try:
        # Installed into an environment inside some other repository, the sources are not its own.
        if not git("ls-files", "--", str(folder)):
            return {"commit": None, "reason": "the sources are not tracked by git"}
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except FileNotFoundError:
        return {"commit": None, "reason": "git is not installed"}
    except subprocess.TimeoutExpired:
        return {"commit": None, "reason": "git did not answer"}
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["git failed"]
        return {"commit": None, "reason": lines[0]}
