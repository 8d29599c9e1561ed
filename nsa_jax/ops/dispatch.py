"""Which implementation runs a kernel operation, decided in this one place.

    "mosaic_gpu"  Pallas Mosaic GPU kernels, for NVIDIA Hopper
    "triton"      Triton kernels, for NVIDIA GPUs since Ampere
    "xla"         portable XLA code, on any device
    "reference"   the oracle: dense and slow, for tests and doubts
    "auto"        the first of mosaic_gpu, triton and xla that can run the call

The order, by speed on long sequences, is that of `pallas_kernels.KERNELS`. Whoever cannot
run a call says why in one sentence, its refusal. "auto" logs it, once and at level INFO, and goes
on to the next one; an explicit choice raises `UnsupportedError` with it and never falls back.
`recorded` says afterwards what was decided.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

import pallas_kernels
from nsa_jax.ops import xla

IMPLEMENTATIONS = ("auto", "mosaic_gpu", "triton", "xla", "reference")
#: Of training, and of a prompt's prefill; STEPS of one new token over a cache.
OPERATIONS = ("interval_attention", "select_blocks", "selected_attention")
STEPS = ("sparse_step", "dense_step")

_record: dict[str, dict] | None = None  # that of the innermost `recorded`


class UnsupportedError(NotImplementedError):
    """The implementation that was asked for by name cannot run this call; the message says why."""


def check_name(implementation: str) -> None:
    """Raises ValueError unless `implementation` is one of `IMPLEMENTATIONS`."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be one of {IMPLEMENTATIONS}")


def _candidates(operation: str) -> tuple[str, ...]:
    """What "auto" tries, in order."""
    return (*pallas_kernels.KERNELS[operation], "xla")


def _load(operation: str, implementation: str) -> pallas_kernels.Kernel | str:
    """The kernel, or the sentence that says why there is none."""
    if implementation not in pallas_kernels.KERNELS[operation]:
        return f"there is no {implementation} kernel for {operation} in this version of nsa_jax."
    try:
        return pallas_kernels.load(operation, implementation)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("pallas_kernels"):
            raise  # a mistake of ours is no missing package
        return (
            f"{implementation} needs a package that is not installed here ({error}); "
            "pip install 'nsa-jax[cuda13]' installs it."
        )


def refusal(operation: str, implementation: str, *args, **kwargs) -> str | None:
    """Why `implementation` cannot run `operation` on these arguments here, or None.

    Reads the shapes and dtypes of the arguments and the devices of the process, never values.
    """
    if implementation == "xla":
        return None
    kernel = _load(operation, implementation)
    return kernel if isinstance(kernel, str) else kernel.refusal(operation, *args, **kwargs)


def choose(operation: str, implementation: str, *args, **kwargs) -> str:
    """The name of the implementation that runs this call, logged and recorded.

    Args:
      operation: one of `OPERATIONS` or `STEPS`, or "gated_sum".
      implementation: one of `IMPLEMENTATIONS` but "reference", which has no kernel operations.
      *args: the operation's arguments, or anything with their shapes and dtypes.
      **kwargs: the operation's keywords.

    Raises:
      ValueError: if there is no implementation of that name.
      UnsupportedError: if an implementation asked for by name refuses.
    """
    check_name(implementation)
    refused = {}
    for name in _candidates(operation) if implementation == "auto" else (implementation,):
        reason = refusal(operation, name, *args, **kwargs)
        if reason is None:
            break
        if implementation != "auto":
            raise UnsupportedError(f"implementation={implementation!r}: {reason}")
        refused[name] = reason
    decided(operation, name, refused)
    return name


def resolve(operation: str, implementation: str, *args, **kwargs) -> tuple[str, Callable]:
    """What `choose` chooses, with its arguments and errors, and the function that runs it."""
    name = choose(operation, implementation, *args, **kwargs)
    function = getattr(xla, operation) if name == "xla" else _load(operation, name).function
    return name, function


@functools.cache
def _log_once(operation: str, name: str, reason: str) -> None:
    logging.getLogger(__name__).info("auto runs %s without %s: %s", operation, name, reason)


def decided(operation: str, chosen: str, refused: dict[str, str]) -> None:
    """Logs and records a decision.

    Args:
      operation: any name.
      chosen: the implementation that runs a call of it.
      refused: those that "auto" tried before, each with its refusal.
    """
    for name, reason in refused.items():
        _log_once(operation, name, reason)
    if _record is not None:
        entry = _record.setdefault(operation, {"chosen": chosen, "refused": {}})
        if chosen not in entry["chosen"].split(" and "):  # another call, of other shapes
            entry["chosen"] += f" and {chosen}"
        entry["refused"] |= refused


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, dict]]:
    """Within the context, what is decided for each call as it is traced: a record for run logs.

    Yields:
      A dictionary that fills: for each operation the implementation "chosen" and, for those that
      "auto" tried before it, the sentence of why each was "refused".
    """
    global _record
    before, _record = _record, {}
    try:
        yield _record
    finally:
        _record = before


def explain(implementation: str) -> dict[str, dict]:
    """What the devices of this process allow, before any shapes are known, as `recorded` has it.

    Raises:
      ValueError, UnsupportedError: as `choose`.
    """
    with recorded() as record:
        for operation in OPERATIONS:
            if implementation == "reference":
                decided(operation, "reference", {})
            else:
                choose(operation, implementation)
    return record


def run(operation: str, implementation: str, *args, **kwargs):
    """Runs a kernel operation through the implementation that `resolve` finds."""
    _, function = resolve(operation, implementation, *args, **kwargs)
    return function(*args, **kwargs)
