"""SIGTERM and Ctrl-C as a request that the loop grants between two updates."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Within `with`, notes SIGTERM and SIGINT instead of dying from them.

    A second SIGINT interrupts at once, as Ctrl-C always did. In a run of several processes JAX's
    own service catches SIGTERM on any of them and finds an update that all can reach.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; a library user in another thread has their own.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stop_after(self, step: int) -> bool:
        """Returns whether the run is to stop after the update number `step`, on every process."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def _note(self, number: int, _) -> None:
        if self.signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
