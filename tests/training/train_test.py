import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from matplotlib import image

from nsa_jax.training import checkpoint, figures, finish, metrics, parallel, steps, train
from nsa_jax.training.checkpoint import Checkpoints
from nsa_jax.training.errors import (
    CheckpointError,
    NonFiniteError,
    RunError,
    RunInterrupted,
    WorkdirError,
)
from nsa_jax.training.setup import prepare
from tests.training import tiny_run

FASTER = ("steps_per_second", "tokens_per_second")  # what differs from run to run in a row


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "text"
    tiny_run.write_text(folder)
    return folder


@pytest.fixture(scope="module")
def settings(text):
    """Everything that a resumed run could get wrong: dropout, microbatches, stacked layers."""

    def make(**changes):
        return tiny_run.settings(
            data__name="text",
            data__path=str(text),
            data__validation_fraction=0.2,
            model__dropout=0.1,
            model__num_layers=2,
            model__scan_layers=True,
            optimizer__accumulate=2,
            **changes,
        )

    return make


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory):
    """The workdir of a run that nothing disturbed, and its result."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    return workdir, train.train_and_evaluate(settings(), workdir)


@pytest.fixture
def workdir(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(figures, "missing", lambda: "not in this test")


def _state(workdir, settings, step):
    """The state in the checkpoint of `step`, read without the help of the trainer."""
    only = workdir.parent / "only"
    shutil.copytree(workdir / "checkpoints" / str(step), only / "checkpoints" / str(step))
    abstract = prepare(settings).abstract_state
    state = Checkpoints(only / "checkpoints", 1).restore(abstract, lambda identity: None).state
    shutil.rmtree(only)
    return state


def _rows(workdir):
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    return [{key: row[key] for key in row if key not in FASTER} for row in rows]


def _assert_same_run(workdir, other, settings):
    """Asserts that parameters, optimizer state and metrics are equal bit for bit."""
    ours, theirs = (_state(folder, settings, 6) for folder in (workdir, other))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert _rows(workdir) == _rows(other)


def test_a_whole_run_leaves_what_it_promises(uninterrupted):
    workdir, result = uninterrupted
    assert {path.name for path in workdir.iterdir()} == {
        "run.json",
        ".lock",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "loss.png",
        "selection.png",
    }
    run = json.loads((workdir / "run.json").read_text())
    (start,) = run["starts"]
    assert start["from_step"] == 0
    assert start["implementation"]["selected_attention"]["chosen"] == "xla"
    assert set(start["seeds"]) == {"seed", "parameters", "data", "dropout", "sample"}
    assert len(run["identity"]["corpus"]) == 64
    assert run["identity"]["config"]["optimizer"]["accumulate"] == 2
    recorded = {key: value for key, value in run["result"].items() if key != "time"}
    assert recorded == json.loads(json.dumps(result))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]
    for name in ("loss.png", "selection.png"):
        assert image.imread(workdir / name).std() > 0


def test_the_result_has_bits_the_ngrams_and_a_sample(uninterrupted):
    _, result = uninterrupted
    # Six updates of a tiny model: better than the uniform guess that it starts from, and no wonder.
    assert 2 < result["validation"]["bits_per_byte"] < 7.5
    assert 0 < result["ngram_bits_per_byte"] < 4
    assert result["sample"].startswith("a")
    assert result["perfect_bits"] is None


def test_rows_of_metrics(uninterrupted):
    rows = _rows(uninterrupted[0])
    train_rows = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train_rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [4, 6]
    assert train_rows[1]["learning_rate"] == pytest.approx(0.02)  # the peak, after two updates
    assert all(row["bits_per_byte"] == row["loss"] / np.log(2) for row in rows)


def test_after_a_truncated_newest_checkpoint_the_run_yields_the_same_bits(
    workdir, uninterrupted, settings, no_figures, capsys
):
    for path in (workdir / "checkpoints" / "6" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    train.train_and_evaluate(settings(sample__length=0), workdir)
    said = capsys.readouterr().out
    assert "checkpoints/6 is not usable" in said
    assert "going on from the checkpoint of step 4 of 6" in said
    assert (workdir / "checkpoints_set_aside" / "6").is_dir()
    _assert_same_run(workdir, uninterrupted[0], settings())
    superseded = metrics.read_rows(workdir / "metrics_superseded.jsonl")
    assert [row["step"] for row in superseded] == [5, 6, 6]


def test_sigterm_saves_and_the_run_goes_on_to_the_same_bits(no_figures, tmp_path, monkeypatch):
    tell = train._Loop._tell
    default = signal.getsignal(signal.SIGTERM)

    def tell_and_signal(self, step, dispatched):
        if step == 2:  # read while update 3 is on its way
            os.kill(os.getpid(), signal.SIGTERM)
        tell(self, step, dispatched)

    # Without checkpoints of its own, so that the one of step 3 can only be the signal's.
    rare = tiny_run.settings(
        model__attention="dense", model__dropout=0.1, checkpoint__every_steps=100
    )
    train.train_and_evaluate(rare, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        patch.setattr(train._Loop, "_tell", tell_and_signal)
        with pytest.raises(RunInterrupted, match=r"SIGTERM: stopped after step 3 of 6") as caught:
            train.train_and_evaluate(rare, tmp_path / "run")
    assert caught.value.status == 143
    assert signal.getsignal(signal.SIGTERM) is default
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
    train.train_and_evaluate(rare, tmp_path / "run")
    _assert_same_run(tmp_path / "run", tmp_path / "undisturbed", rare)


def test_a_finished_run_started_again_repeats_its_result_and_no_row(
    workdir, uninterrupted, settings, no_figures
):
    result = train.train_and_evaluate(settings(log_every=3), workdir)
    assert result == uninterrupted[1]
    assert _rows(workdir) == _rows(uninterrupted[0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizer__learning_rate": 0.5}, "optimizer.learning_rate: was 0.02, is 0.5"),
        ({"model__mlp_dim": 32}, r"shape of layers/mlp/up/kernel: was 'float32\[2, 16, 16\]'"),
        ({"steps": 7}, "steps counts because the learning rate"),
    ],
)
def test_another_run_is_refused(workdir, settings, changes, expected):
    before = sorted(workdir.rglob("*"))
    with pytest.raises(WorkdirError, match=expected):
        train.train_and_evaluate(settings(**changes), workdir)
    assert sorted(workdir.rglob("*")) == before


def test_another_corpus_is_refused(workdir, settings, text):
    with (text / "00.txt").open("a") as file:
        file.write("!")
    try:
        with pytest.raises(WorkdirError, match="corpus fingerprint: was"):
            train.train_and_evaluate(settings(), workdir)
    finally:
        shutil.rmtree(text)
        tiny_run.write_text(text)


def test_checkpoints_of_another_model_are_refused(workdir, settings, tmp_path):
    other = settings(model__mlp_dim=32)
    (tmp_path / "other").mkdir()
    shutil.move(workdir / "checkpoints", tmp_path / "other" / "checkpoints")
    found = prepare(other).abstract_state.params
    assert checkpoint.shapes(found)["layers/mlp/up/kernel"] == "float32[2, 16, 32]"
    # The folder's own record says that it is the other run's; its checkpoints know better.
    run = json.loads((workdir / "run.json").read_text())
    run["identity"]["config"] = json.loads(json.dumps(other.to_dict()))
    run["identity"]["parameters"] = checkpoint.shapes(found)
    (tmp_path / "other" / "run.json").write_text(json.dumps(run))
    with pytest.raises(WorkdirError, match=r"the checkpoint holds another run.*\n  model.mlp_dim"):
        train.train_and_evaluate(other, tmp_path / "other")


def test_without_a_usable_checkpoint_the_run_does_not_start_over(workdir, settings):
    for path in (workdir / "checkpoints").rglob("manifest.ocdbt"):
        path.write_bytes(b"")
    rows = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="none of the checkpoints is usable"):
        train.train_and_evaluate(settings(), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == rows


def test_when_the_checkpoints_are_gone_the_run_does_not_start_over(workdir, settings):
    shutil.rmtree(workdir / "checkpoints")
    before = sorted(workdir.rglob("*")), (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="the checkpoints are gone; restore them or choose"):
        train.train_and_evaluate(settings(), workdir)
    assert (sorted(workdir.rglob("*")), (workdir / "metrics.jsonl").read_bytes()) == before


def test_a_run_stopped_before_its_first_checkpoint_starts_from_the_beginning(
    no_figures, tmp_path, monkeypatch, capsys
):
    settings = tiny_run.settings(model__attention="dense", checkpoint__every_steps=5)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "evaluate", _nan_on_call(1, steps.evaluate))  # at step 4
        with pytest.raises(NonFiniteError, match="last good checkpoint: none was written yet"):
            train.train_and_evaluate(settings, tmp_path / "run")
    train.train_and_evaluate(settings, tmp_path / "run")
    said = capsys.readouterr().out
    assert "no checkpoint was written before: starting from the beginning" in said
    assert "bits a target" in said
    assert "bits per byte" not in said


def test_sigterm_during_the_last_save_still_stops(no_figures, tmp_path, monkeypatch):
    wait = Checkpoints.wait

    def wait_and_signal(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return wait(self)

    monkeypatch.setattr(Checkpoints, "wait", wait_and_signal)
    with pytest.raises(RunInterrupted, match=r"SIGTERM: stopped after step 6 of 6") as caught:
        train.train_and_evaluate(tiny_run.settings(model__attention="dense"), tmp_path / "run")
    assert caught.value.status == 143
    assert "result" not in json.loads((tmp_path / "run" / "run.json").read_text())


def test_a_workdir_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run cannot be written: .*Not a directory"):
        train.train_and_evaluate(tiny_run.settings(model__attention="dense"), tmp_path / "file/run")


def test_what_the_ngrams_may_break_is_on_record_before(
    workdir, settings, uninterrupted, no_figures, monkeypatch
):
    def too_much(*_):
        raise MemoryError

    (workdir / "run.json").write_text(
        json.dumps(json.loads((workdir / "run.json").read_text()) | {"result": None})
    )
    monkeypatch.setattr(finish.ngram, "interpolated_ngram_bits_per_byte", too_much)
    with pytest.raises(MemoryError):
        train.train_and_evaluate(settings(), workdir)
    result = json.loads((workdir / "run.json").read_text())["result"]
    assert result["validation"] == uninterrupted[1]["validation"]


def test_ngrams_are_counted_on_so_much_text(
    workdir, settings, uninterrupted, no_figures, monkeypatch, capsys
):
    monkeypatch.setattr(finish, "_NGRAM_BYTES", 1000)
    result = train.train_and_evaluate(settings(sample__length=0), workdir)
    assert result["ngram_bits_per_byte"] > uninterrupted[1]["ngram_bits_per_byte"]
    assert ", counted on the first 1,000 bytes of the training text" in capsys.readouterr().out
    assert finish._first_bytes([b"abc", b"defg", b"h"], 5) == [b"abc", b"de"]


def test_a_loss_that_is_not_finite_stops_the_run_with_what_to_look_at(
    no_figures, tmp_path, monkeypatch
):
    settings = tiny_run.settings(model__attention="dense", checkpoint__every_steps=1, eval_every=0)
    global_batch = parallel.global_batch
    made = []

    def poisoned(batch, mesh):
        made.append(batch)
        if len(made) == 4:  # that of update 4
            batch = batch | {"weights": np.full_like(batch["weights"], np.inf)}
        return global_batch(batch, mesh)

    monkeypatch.setattr(parallel, "global_batch", poisoned)
    with pytest.raises(NonFiniteError) as caught:
        train.train_and_evaluate(settings, tmp_path / "run")
    message = str(caught.value)
    assert "at update 4 the loss is nan" in message
    assert f"last good checkpoint: {tmp_path}/run/checkpoints/3 (step 3)" in message
    assert "optimizer.learning_rate" in message
    assert "pipeline.train[3]" in message
    written = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert written == {"1", "2", "3"}
    rows = _rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["loss"] is None
    assert rows[3]["learning_rate"] > 0


def _nan_on_call(number, evaluate):
    """Returns `evaluate` with a loss that is not finite on that call of it."""
    calls = []

    def poisoned(*arguments):
        calls.append(None)
        if len(calls) == number:
            raise NonFiniteError("the validation loss is nan")
        return evaluate(*arguments)

    return poisoned


@pytest.mark.parametrize(("call", "step", "good"), [(1, 4, 3), (2, 6, 6)])
def test_a_validation_loss_that_is_not_finite_stops_the_run_alike(
    no_figures, tmp_path, monkeypatch, call, step, good
):
    settings = tiny_run.settings(
        model__attention="dense", checkpoint__every_steps=3, log_every=2, eval_every=4
    )
    monkeypatch.setattr(steps, "evaluate", _nan_on_call(call, steps.evaluate))
    with pytest.raises(NonFiniteError) as caught:
        train.train_and_evaluate(settings, tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(f"after update {step} the validation loss is nan")
    assert f"last good checkpoint: {tmp_path}/run/checkpoints/{good} (step {good})" in message
    assert "optimizer.learning_rate" in message
    assert "the rows of pipeline.validation" in message
    # With the updates between those of log_every.
    written = {row["step"] for row in _rows(tmp_path / "run") if row["kind"] == "train"}
    assert written == set(range(1, step + 1))


def test_parameters_that_are_not_finite_stop_the_run_though_the_loss_is(
    no_figures, tmp_path, monkeypatch
):
    # A learning rate that overflows: loss and gradient of update 1 are finite, what follows is not.
    settings = tiny_run.settings(
        model__attention="dense", optimizer__learning_rate=1e38, optimizer__weight_decay=1e38
    )
    settings.checkpoint.every_steps = 1
    with pytest.raises(NonFiniteError, match=r"after step 1 is not finite in params/") as caught:
        train.train_and_evaluate(settings, tmp_path / "run")
    assert "last good checkpoint: none was written yet" in str(caught.value)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_data_that_is_not_there_is_a_sentence(tmp_path):
    settings = tiny_run.settings(data__name="text", data__path=str(tmp_path / "absent"))
    with pytest.raises(RunError, match=r"the data cannot be read: .*absent"):
        train.train_and_evaluate(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_end_of_a_task_compares_with_a_perfect_model():
    (line,) = finish.summary(
        {
            "validation": {"bits_per_byte": 1.5, "accuracy": 0.25},
            "ngram_bits_per_byte": None,
            "perfect_bits": 0.5,
            "sample": None,
        }
    )
    assert line == "validation: 1.5000 bits a target; a perfect model has 0.5000; 25.00% right"


def test_a_sample_cannot_steer_the_terminal():
    lines = finish.summary(
        {
            "validation": {"bits_per_byte": 1.5},
            "ngram_bits_per_byte": 2.5,
            "ngram_training_bytes": None,
            "sample": "a\tb\n\x1b[2J\r\x9bé\u2028\n",
        }
    )
    assert lines[1:3] == ["  | a\tb", r"  | \x1b[2J\r\x9bé\u2028"]
