"""What a run tells while it goes: metrics.jsonl, TensorBoard, and a bar or lines for a person."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import tensorboardX
import tqdm


class MetricsLog:
    """Rows of metrics, appended to metrics.jsonl and to TensorBoard's events.

    Rows of steps that a resumed run does again were written by an earlier start and are moved to
    metrics_superseded.jsonl, so that a step stands in metrics.jsonl once and nothing is lost.
    """

    def __init__(self, folder: Path, resumed_step: int, *, main_process: bool = True):
        """Opens the files.

        Args:
          folder: the run's.
          resumed_step: updates made so far; rows of later steps are superseded.
          main_process: whether this process writes at all.
        """
        self.superseded = 0
        self._file = self._events = None
        self._written: set[tuple[int, str]] = set()
        if not main_process:
            return
        path = folder / "metrics.jsonl"
        self.superseded = _supersede(path, resumed_step)
        self._written = {(row["step"], row["kind"]) for row in read_rows(path)}
        self._file = path.open("a")
        self._events = tensorboardX.SummaryWriter(
            str(folder / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else None
        )

    def has(self, step: int, kind: str) -> bool:
        """Returns whether such a row has been written, by this start or an earlier one."""
        return (step, kind) in self._written

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Adds a row {"step", "kind", ...}, on disk when this returns.

        Args:
          step: updates made.
          kind: "train" or "validation".
          values: numbers by name; those that are not finite become null.
        """
        self._written.add((step, kind))
        if self._file is None:
            return
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **row}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None:
            self._file.close()
            self._events.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; what is no row, as after a crash, is left out."""
    return [row for _, row in _lines(path) if row is not None]


def _lines(path: Path) -> list[tuple[str, dict | None]]:
    parsed = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        whole = isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row
        parsed.append((line, row if whole else None))
    return parsed


def _supersede(path: Path, resumed_step: int) -> int:
    """Moves rows after `resumed_step`, and broken ones, to another file; returns how many."""
    lines = _lines(path)
    late = [line for line, row in lines if row is None or row["step"] > resumed_step]
    if not late:
        return 0
    with path.with_name("metrics_superseded.jsonl").open("a") as file:
        file.writelines(line if line.endswith("\n") else line + "\n" for line in late)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        "".join(line for line, row in lines if row is not None and row["step"] <= resumed_step)
    )
    temporary.replace(path)
    return len(late)


class Progress:
    """A bar on a terminal, plain lines elsewhere, nothing on processes other than the first.

    The bar goes to standard error, lines go to standard output.
    """

    def __init__(
        self,
        start: int,
        steps: int,
        *,
        unit: str = "bits per byte",
        main_process: bool = True,
    ):
        """Starts to count.

        Args:
          start: updates made so far.
          steps: updates of the whole run.
          unit: what the bits are called.
          main_process: whether this process shows anything.
        """
        self._steps = steps
        self._unit = unit
        self._shows = main_process
        self._bar = None
        if main_process and sys.stderr.isatty() and not _no_rows():
            self._bar = tqdm.tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def update(self, step: int, values: dict[str, float]) -> None:
        """Shows the metrics of one update, with the time left at the present speed.

        Args:
          step: updates made.
          values: loss, bits_per_byte and tokens_per_second; steps_per_second for the time left.
        """
        speed = values.get("steps_per_second") or math.nan
        shown = f"loss {values['loss']:.3f}, {values['bits_per_byte']:.3f} {self._unit}"
        if not math.isnan(speed):
            shown += f", {values['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._shows:
            left = duration((self._steps - step) / speed)
            self.say(f"step {step}/{self._steps}: {shown}, {left} left")

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._shows:
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the bar where it is; `say` goes on to work."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _no_rows() -> bool:
    """Whether the terminal says that it has no rows, as some do; tqdm would show nothing there."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).lines == 0
    except OSError:
        return False


class Clock:
    """The speed of the updates: the pauses in between, and the compilation, left out."""

    def __init__(self):
        self._since = None
        self._spent = 0.0
        self._updates = 0

    def pause(self) -> None:
        """Leaves out the time since the last update: to be called at the end of a pause."""
        if self._since is not None:
            self._since = time.perf_counter()

    def update(self) -> None:
        """Counts an update that has just finished; the first, which compiles, starts the clock."""
        now = time.perf_counter()
        if self._since is not None:
            self._spent += now - self._since
            self._updates += 1
        self._since = now

    def speed(self) -> float | None:
        """Returns updates a second since the last reading, None if none was counted."""
        if not self._updates:
            return None
        speed = self._updates / max(self._spent, 1e-9)
        self._spent, self._updates = 0.0, 0
        return speed


def duration(seconds: float) -> str:
    """Returns a time as people say it: "0:42", "3:05", "2:10:00"; "?" if it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
