"""The training run: start or go on, update, tell, save, and what stands at the end."""

import collections
import contextlib
import math
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
from ml_collections import ConfigDict

from nsa_jax.training import (
    checkpoint,
    environment,
    figures,
    loss,
    metrics,
    parallel,
    seeds,
    steps,
)
from nsa_jax.training import config as config_lib
from nsa_jax.training import workdir as workdir_lib
from nsa_jax.training.checkpoint import Checkpoints
from nsa_jax.training.data import Pipeline, make_pipeline
from nsa_jax.training.errors import CheckpointError, NonFiniteError, RunError, RunInterrupted
from nsa_jax.training.finish import finish
from nsa_jax.training.setup import Setup, explain_attention, parameter_count, prepare
from nsa_jax.training.signals import StopRequest
from nsa_jax.training.steps import StepMetrics, TrainState
from nsa_jax.training.workdir import Workdir

_STREAMS = ("parameters", "data", "dropout", "sample")

# Rows of updates between those of `log_every` that are kept in mind, to be written when a run stops
# because something is not finite.
_ROWS_IN_MIND = 20


def train_and_evaluate(config: ConfigDict | Mapping, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains a model to the end, from the start or from where its workdir stands.

    The workdir then holds run.json (what ran and what came out), metrics.jsonl, tensorboard/,
    checkpoints/, loss.png, and for NSA selection.png. Started again in the same workdir, a run goes
    on from its newest usable checkpoint, and on a CPU yields bit for bit what it would have yielded
    without the interruption.

    Args:
      config: the keys of configs/default.py.
      workdir: this run's own folder.

    Returns:
      The result, as in run.json: "step", "validation" (loss, bits_per_byte, accuracy over the whole
      validation set), "ngram_bits_per_byte" (None for tasks), "ngram_training_bytes" (counted for
      it; None for all), "perfect_bits" (None for texts), "sample" (text or None).

    Raises:
      ConfigError: if the configuration is wrong.
      UnsupportedError: if the implementation that it names cannot run here.
      RunError: if the data cannot be read, the workdir cannot be written, holds another run or is
        in use by another process, no checkpoint is usable or the loss is not finite; the text says
        what to do.
      RunInterrupted: after SIGTERM or Ctrl-C, once the state is saved.
    """
    setup = prepare(config)
    pipeline = _read_data(setup)
    identity = workdir_lib.identity(
        config_lib.as_dict(config),
        pipeline.fingerprint,
        checkpoint.shapes(setup.abstract_state.params),
    )
    try:
        with contextlib.ExitStack() as opened:
            return _run_in(workdir, setup, pipeline, identity, opened)
    except OSError as error:
        raise RunError(f"{workdir} cannot be written: {error}") from error


def _run_in(
    workdir: str | os.PathLike,
    setup: Setup,
    pipeline: Pipeline,
    identity: dict,
    opened: contextlib.ExitStack,
) -> dict[str, Any]:
    """Runs, and leaves what it opens for `opened` to close."""
    main_process = jax.process_index() == 0
    place = Workdir(workdir, identity, main_process=main_process)
    opened.callback(place.close)
    checkpoints = Checkpoints(place.path / "checkpoints", setup.run.checkpoint.max_to_keep)
    opened.callback(checkpoints.close)
    state, start, notes = _start_or_go_on(setup, checkpoints, identity, place)
    place.record_start(_facts(setup, pipeline, start))
    log = metrics.MetricsLog(place.path, start, main_process=main_process)
    opened.callback(log.close)
    progress = metrics.Progress(
        start, setup.run.steps, unit=_unit(pipeline), main_process=main_process
    )
    opened.callback(progress.close)
    notes += _introduction(setup, pipeline)
    if log.superseded:
        notes.append(
            f"{log.superseded} rows of metrics.jsonl after step {start} moved to "
            "metrics_superseded.jsonl"
        )
    for note in notes:
        progress.say(note)
    loop = _Loop(setup, pipeline, checkpoints, identity, log, progress)
    with StopRequest() as stop:
        state = loop.run(state, start, stop)
        checkpoints.wait()
        if stop.signal is not None:  # it came during the last save
            loop.leave(setup.run.steps, stop)
    # From here on a signal may kill the process: the same command repeats what follows.
    try:
        return finish(setup, pipeline, state, place, log, progress)
    except NonFiniteError as error:
        loop.stop_in_validation(error, setup.run.steps)


def _unit(pipeline: Pipeline) -> str:
    return "bits per byte" if pipeline.train_documents else "bits a target"


def _read_data(setup: Setup) -> Pipeline:
    try:
        return make_pipeline(
            setup.run.data,
            alignment=setup.run.model.nsa.select_block_size,
            seed=seeds.stream_seed(setup.run.seed, "data"),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    except (ValueError, OSError) as error:
        raise RunError(f"the data cannot be read: {error}") from error


def _start_or_go_on(
    setup: Setup, checkpoints: Checkpoints, identity: dict, place: Workdir
) -> tuple[TrainState, int, list[str]]:
    """Returns the state, its step, and what there is to tell about it.

    Raises:
      CheckpointError: if no checkpoint is usable, or all are gone.
      WorkdirError: if a checkpoint is another run's.
    """

    def check(found: dict) -> None:
        workdir_lib.refuse_other_run(found, identity, "the checkpoint")

    restored = checkpoints.restore(setup.abstract_state, check)
    notes = list(checkpoints.set_aside)
    if restored is None:
        if place.had_checkpoint:
            raise CheckpointError(
                f"{place.path}: the checkpoints are gone; restore them or choose another workdir"
            )
        if place.started_before:
            notes.append("no checkpoint was written before: starting from the beginning")
        return setup.make_state(), 0, notes
    notes.append(f"going on from the checkpoint of step {restored.step} of {setup.run.steps}")
    return restored.state, restored.step, notes


def _facts(setup: Setup, pipeline: Pipeline, start: int) -> dict[str, Any]:
    """Returns what run.json says about one start of the run."""
    run = setup.run
    return {
        "from_step": start,
        **environment.describe(),
        "implementation": explain_attention(run.model, run.data.seq_len),
        "seeds": {
            "seed": run.seed,
            **{name: seeds.stream_seed(run.seed, name) for name in _STREAMS},
        },
        "data": pipeline.description,
        "parameter_count": parameter_count(setup.abstract_state.params),
    }


def _introduction(setup: Setup, pipeline: Pipeline) -> list[str]:
    run = setup.run
    size = parameter_count(setup.abstract_state.params)
    devices = f"{setup.mesh.size} x {jax.devices()[0].device_kind}"
    lines = [
        f"data: {pipeline.description}",
        f"model: {size:,} parameters, {run.model.attention} attention, on {devices}",
    ]
    if (reason := figures.missing()) is not None:
        lines.append(reason)
    return lines


class _Loop:
    """The updates of one start of a run, with what is told and saved in between."""

    def __init__(self, setup, pipeline, checkpoints, identity, log, progress):
        self._setup = setup
        self._run = setup.run
        self._pipeline = pipeline
        self._checkpoints = checkpoints
        self._identity = identity
        self._log = log
        self._progress = progress
        self._clock = metrics.Clock()
        self._unlogged = collections.deque(maxlen=_ROWS_IN_MIND)
        self._tokens = setup.run.data.batch_size * setup.run.data.seq_len

    def run(self, state: TrainState, start: int, stop: StopRequest) -> TrainState:
        """Makes the updates after `start`; returns the last state.

        Raises:
          NonFiniteError, CheckpointError, RunInterrupted: see `train_and_evaluate`.
        """
        run, pending = self._run, None
        for step in range(start + 1, run.steps + 1):
            batch = parallel.global_batch(self._pipeline.train[step - 1], self._setup.mesh)
            state, dispatched = self._setup.train_step(state, batch)
            # The metrics of the update before are read only now, with this one on its way, so that
            # the device does not wait for the host.
            if pending is not None:
                self._tell(*pending)
            pending = step, dispatched
            stopping = stop.stop_after(step)
            evaluating = run.eval_every and step % run.eval_every == 0 and step < run.steps
            saving = stopping or step == run.steps or step % run.checkpoint.every_steps == 0
            if evaluating or saving:
                self._tell(*pending)  # before saving: what is not finite must not be saved
                pending = None
            if evaluating:
                self._validate(state, step)
            if saving:
                self._save(state, step)
            if stopping:
                self.leave(step, stop)
        return state

    def _tell(self, step: int, dispatched: StepMetrics) -> None:
        """Waits for the metrics of an update, checks them, and shows them when it is time."""
        read = jax.device_get(dispatched)
        mean = float(read.sums.nats) / float(read.sums.weight or math.nan)
        self._clock.update()
        row = {
            "loss": mean,
            "bits_per_byte": loss.bits(mean),
            "accuracy": float(read.sums.correct) / float(read.sums.weight or math.nan),
            "gradient_norm": float(read.gradient_norm),
            "update_norm": float(read.update_norm),
            "learning_rate": float(read.learning_rate),
        }
        finite = math.isfinite(mean) and math.isfinite(read.gradient_norm)
        logged = step % self._run.log_every == 0 or step == self._run.steps
        if not (finite and logged):
            self._unlogged.append((step, row))
        if not finite:
            self._stop_in_training(
                f"at update {step} the loss is {mean:.4g} and the norm of the gradient "
                f"{row['gradient_norm']:.4g}, with learning rate {row['learning_rate']:.3g}",
                step,
            )
        if not logged:
            return
        if (speed := self._clock.speed()) is not None:
            row |= {"steps_per_second": speed, "tokens_per_second": speed * self._tokens}
        self._log.write(step, "train", row)
        self._progress.update(step, row)

    def _validate(self, state: TrainState, step: int) -> None:
        batches = self._pipeline.validation
        count = min(self._run.eval_batches or len(batches), len(batches))
        try:
            values = steps.evaluate(
                self._setup.eval_step,
                state.params,
                (batches[index] for index in range(count)),
                self._setup.mesh,
            )
        except NonFiniteError as error:
            self.stop_in_validation(error, step)
        self._log.write(step, "validation", values)
        part = "" if count == len(batches) else f" on {count} of {len(batches)} batches"
        self._progress.say(
            f"step {step}: validation {values['bits_per_byte']:.3f} {_unit(self._pipeline)}{part}"
        )
        self._clock.pause()

    def _save(self, state: TrainState, step: int) -> None:
        try:
            self._checkpoints.save(step, state, self._identity)
        except NonFiniteError as error:
            self._stop_in_training(str(error), step)
        self._clock.pause()

    def leave(self, step: int, stop: StopRequest) -> None:
        """Raises RunInterrupted, once the state of `step` is saved."""
        self._checkpoints.wait()
        raise RunInterrupted(
            f"{stop.signal.name}: stopped after step {step} of {self._run.steps} and saved "
            f"{self._checkpoints.path(step)}. The same command goes on from there.",
            status=128 + stop.signal,
        )

    def stop_in_validation(self, error: NonFiniteError, step: int) -> NoReturn:
        """Raises NonFiniteError with what to look at when the validation's is all there was."""
        self._stop_non_finite(f"after update {step} {error}", "the rows of pipeline.validation")

    def _stop_in_training(self, what: str, step: int) -> NoReturn:
        self._stop_non_finite(what, f"the batch itself, which is pipeline.train[{step - 1}]")

    def _stop_non_finite(self, what: str, data: str) -> NoReturn:
        for step, row in self._unlogged:
            self._log.write(step, "train", row)
        last = self._checkpoints.wait()
        good = "none was written yet"
        if last is not None:
            good = f"{self._checkpoints.path(last)} (step {last})"
        raise NonFiniteError(
            f"{what}.\n  last good checkpoint: {good}\n  what to look at: the last rows of "
            "metrics.jsonl (does gradient_norm grow before it?); a lower optimizer.learning_rate, "
            "more optimizer.warmup_steps or a smaller optimizer.clip_norm, in another workdir; "
            "model.dtype='float32', to see whether precision is the cause; "
            f"{data}. The same command would meet the same numbers again."
        )
