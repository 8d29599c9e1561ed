"""Work shared among processes, which end with the command and when one of them fails."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax

from nsa_jax.training.errors import RunError


def share(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> None:
    """Calls a function with each job in other processes, so many at a time.

    Args:
      function: of a module; what it raises is raised here, and ends the others.
      jobs: one argument each, which can be pickled.
      workers: how many processes, at most one a job.

    Raises:
      RunError: if a process was killed, or the device's memory did not suffice for all.
    """
    others = multiprocessing.active_children()
    spawn = multiprocessing.get_context("spawn")  # this process may hold a device already
    with ProcessPoolExecutor(min(workers, len(jobs)), spawn, initializer=_follow_parent) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        # The pool looks which processes there are before it begins one: without a further call it
        # would not see the last one die.
        pool.submit(int)
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                if process not in others:  # a pool lets what it has begun go on to its end
                    process.terminate()
            if reason := _want_of_memory(error):
                raise RunError(
                    f"{reason}; the same command, with fewer --workers if need be, does what is "
                    "not finished"
                ) from error
            raise


def _want_of_memory(error: BaseException) -> str | None:
    if isinstance(error, BrokenProcessPool):
        return "a worker was killed, perhaps for want of memory"
    said = str(error).replace("_", " ").lower()  # CUDA has names with underscores for it
    if isinstance(error, jax.errors.JaxRuntimeError) and "out of memory" in said:
        return f"a worker had not enough of the device's memory ({str(error).splitlines()[0]})"
    return None


def _follow_parent() -> None:
    """Leaves Ctrl-C to the process that started this one, and lets this one end when that does."""

    def end():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end, daemon=True).start()
