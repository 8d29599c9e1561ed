"""What stands at the end of a run: its measure beside the 3-gram's, a sample, the figures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from nsa_jax.model import Transformer
from nsa_jax.training import figures, metrics, ngram, sampling, seeds, steps
from nsa_jax.training.data import Pipeline
from nsa_jax.training.setup import Setup
from nsa_jax.training.steps import TrainState
from nsa_jax.training.workdir import Workdir

# Counting n-grams takes some 50 bytes of memory for each byte of text.
_NGRAM_BYTES = 64_000_000


def finish(
    setup: Setup,
    pipeline: Pipeline,
    state: TrainState,
    place: Workdir,
    log: metrics.MetricsLog,
    progress: metrics.Progress,
) -> dict[str, Any]:
    """Measures, samples and draws the finished model; returns what stands in run.json.

    Raises:
      NonFiniteError: if the validation loss is infinite or NaN.
    """
    run = setup.run
    progress.close()
    validation = steps.evaluate(setup.eval_step, state.params, pipeline.validation, setup.mesh)
    if not log.has(run.steps, "validation"):  # there already if a finished run is started again
        log.write(run.steps, "validation", validation)
    result = {
        "step": run.steps,
        "validation": validation,
        "ngram_bits_per_byte": None,
        "ngram_training_bytes": None,
        "perfect_bits": pipeline.perfect_bits,
        "sample": None,
    }
    place.record_result(result)  # what follows may take more memory than there is
    text = bool(pipeline.train_documents)
    if text:
        counted = _first_bytes(pipeline.train_documents, _NGRAM_BYTES)
        result["ngram_bits_per_byte"] = ngram.interpolated_ngram_bits_per_byte(
            counted, pipeline.validation_documents
        )
        if sum(map(len, pipeline.train_documents)) > _NGRAM_BYTES:
            result["ngram_training_bytes"] = _NGRAM_BYTES
    if text and run.sample.length:
        # Not every implementation that trains has a step of decoding.
        model = Transformer(dataclasses.replace(run.model, implementation="auto"))
        params = jax.device_get(state.params)  # one row on one device, whatever the mesh
        seed = seeds.stream_seed(run.seed, "sample")
        drawn = sampling.sample(model, params, run.sample, seed)
        result["sample"] = run.sample.prompt + drawn.decode(errors="replace")
    place.record_result(result)
    for line in summary(result):
        progress.say(line)
    if jax.process_index() == 0 and figures.missing() is None:
        _draw(setup, pipeline, state, place, result)
    progress.say(f"written to {place.path}")
    return result


def summary(result: Mapping[str, Any]) -> list[str]:
    """Returns the lines that end a run."""
    measured = result["validation"]["bits_per_byte"]
    lines = []
    if result["sample"] is not None:
        lines += [
            "a sample:",
            *(f"  | {line}" for line in sampling.shown(result["sample"]).splitlines()),
        ]
    if (ngram_bits := result["ngram_bits_per_byte"]) is not None:
        cut = result["ngram_training_bytes"]
        part = "" if cut is None else f", counted on the first {cut:,} bytes of the training text"
        lines.append(
            f"validation: {measured:.3f} bits per byte; an interpolated 3-gram model has "
            f"{ngram_bits:.3f} on the same split{part}"
        )
    else:
        lines.append(
            f"validation: {measured:.4f} bits a target; a perfect model has "
            f"{result['perfect_bits']:.4f}; {result['validation']['accuracy']:.2%} right"
        )
    return lines


def _first_bytes(documents: Sequence[bytes], limit: int) -> list[bytes]:
    """Returns the first documents, `limit` bytes together or less; the last one may be cut."""
    kept = []
    for document in documents:
        if limit <= 0:
            break
        kept.append(document[:limit])
        limit -= len(document)
    return kept


def _draw(setup, pipeline, state, place, result) -> None:
    rows = metrics.read_rows(place.path / "metrics.jsonl")
    figures.draw_loss(rows, result["ngram_bits_per_byte"], place.path / "loss.png")
    if setup.run.model.attention == "nsa":
        params = jax.device_get(state.params)  # one row on one device, whatever the mesh
        record = figures.attention_record(setup.model, params, pipeline.validation[0])
        block_size = setup.run.model.nsa.select_block_size
        figures.draw_selection(record, block_size, place.path / "selection.png")
