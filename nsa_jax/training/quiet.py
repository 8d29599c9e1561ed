"""Silences what the checkpoint storage prints about a broken checkpoint; ours is one line.

After a failed read, Orbax logs the file's content, and futures of TensorStore that nobody waits for
any more print from their threads, some of them long afterwards.
"""

import logging
import sys

_STORAGE = ("Event loop is closed", "reading array index")


def quiet_storage() -> None:
    """Filters the storage's own account out, for the rest of the process."""
    logging.getLogger("absl").addFilter(_not_from_orbax)
    logging.getLogger("asyncio").addFilter(_not_abandoned)
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


class _Hook:
    """Hands on every unraisable exception but the storage's."""

    def __init__(self, previous):
        self._previous = previous

    def __call__(self, unraisable):
        if not any(text in str(unraisable.exc_value) for text in _STORAGE):
            self._previous(unraisable)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _not_abandoned(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()
