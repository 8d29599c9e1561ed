import json
import os
import sys

import pytest

from nsa_jax.training import metrics
from nsa_jax.training.metrics import Clock, MetricsLog, Progress


def _write(folder, steps, resumed=0):
    log = MetricsLog(folder, resumed)
    for step in steps:
        log.write(step, "train", {"loss": step / 2})
    log.close()
    return log


def test_rows_are_appended_and_read_back(tmp_path):
    _write(tmp_path, [1, 2])
    _write(tmp_path, [3], resumed=2)
    rows = metrics.read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2] == {"step": 3, "kind": "train", "loss": 1.5}
    assert list((tmp_path / "tensorboard").glob("events.out.*"))


def test_rows_after_the_restored_step_move_to_another_file(tmp_path):
    _write(tmp_path, [1, 2, 3, 4])
    log = _write(tmp_path, [3], resumed=2)
    assert log.superseded == 2
    rows = [row["step"] for row in metrics.read_rows(tmp_path / "metrics.jsonl")]
    assert rows == [1, 2, 3]
    moved = [row["step"] for row in metrics.read_rows(tmp_path / "metrics_superseded.jsonl")]
    assert moved == [3, 4]


def test_a_line_cut_off_by_a_crash_moves_too(tmp_path):
    _write(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ki')
    _write(tmp_path, [2], resumed=1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert '{"step": 2, "ki\n' in (tmp_path / "metrics_superseded.jsonl").read_text()


@pytest.mark.parametrize("line", ["3", "[]", '{"kind": "train"}', '{"step": "3", "kind": "train"}'])
def test_a_line_that_is_no_row_moves_too(tmp_path, line):
    _write(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert [row["step"] for row in metrics.read_rows(tmp_path / "metrics.jsonl")] == [1]
    assert _write(tmp_path, [2], resumed=1).superseded == 1
    assert (tmp_path / "metrics_superseded.jsonl").read_text() == line + "\n"


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    log = MetricsLog(tmp_path, 0)
    log.write(1, "train", {"loss": float("nan"), "gradient_norm": float("inf"), "accuracy": 0.5})
    log.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row["loss"] is row["gradient_norm"] is None
    assert row["accuracy"] == 0.5


def test_a_log_knows_what_earlier_starts_wrote(tmp_path):
    _write(tmp_path, [1])
    log = MetricsLog(tmp_path, 1)
    assert log.has(1, "train")
    assert not log.has(1, "validation")
    log.close()


def test_other_processes_write_nothing(tmp_path):
    log = MetricsLog(tmp_path, 0, main_process=False)
    log.write(1, "train", {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


ROW = {"loss": 1.0, "bits_per_byte": 1.443, "tokens_per_second": 2048.0, "steps_per_second": 2.0}


def test_plain_lines_where_there_is_no_terminal(capsys):
    progress = Progress(0, 100)
    progress.update(40, ROW)
    progress.close()
    assert capsys.readouterr().out == (
        "step 40/100: loss 1.000, 1.443 bits per byte, 2,048 tokens/s, 0:30 left\n"
    )


def test_plain_lines_on_a_terminal_without_rows(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
    monkeypatch.setattr(metrics.os, "get_terminal_size", lambda _: os.terminal_size((80, 0)))
    progress = Progress(0, 100, unit="bits a target")
    progress.update(40, ROW)
    progress.close()
    captured = capsys.readouterr()
    assert captured.out.startswith("step 40/100: loss 1.000, 1.443 bits a target, ")
    assert captured.err == ""


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress(10, 100)
    progress.update(40, ROW)
    progress.say("a line")
    progress.close()
    progress.say("after")
    captured = capsys.readouterr()
    assert captured.out == "a line\nafter\n"
    assert "40/100" in captured.err
    assert "1.443 bits per byte, 2,048 tokens/s" in captured.err


def test_the_clock_leaves_out_pauses_and_the_first_update(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = Clock()
    now[0] = 50.0  # compilation
    clock.update()
    assert clock.speed() is None
    for _ in range(4):
        now[0] += 0.5
        clock.update()
    assert clock.speed() == pytest.approx(2.0)
    for _ in range(2):  # a pause after every update: each is measured from the end of the pause
        now[0] += 100.0
        clock.pause()
        now[0] += 0.25
        clock.update()
        assert clock.speed() == pytest.approx(4.0)
    assert clock.speed() is None
    now[0] += 1.0  # and one in the middle of a reading
    clock.update()
    now[0] += 100.0
    clock.pause()
    now[0] += 2.0
    clock.update()
    assert clock.speed() == pytest.approx(2 / 3.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (185, "3:05"), (7800, "2:10:00"), (float("nan"), "?"), (float("inf"), "?")],
)
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text
