import json

import pytest

from nsa_jax.training import workdir
from nsa_jax.training.errors import WorkdirError
from nsa_jax.training.workdir import Workdir

CONFIG = {"steps": 10, "log_every": 1, "checkpoint": {"every_steps": 5}, "model": {"dims": (1, 2)}}


def _identity(corpus="a" * 64, parameters=None, **changes):
    return workdir.identity(CONFIG | changes, corpus, parameters or {"kernel": "float32[2, 3]"})


def _started(path):
    Workdir(path, _identity()).record_start({"device": "cpu"})
    return path


def test_the_same_run_may_go_on_and_every_start_is_on_record(tmp_path):
    first = Workdir(tmp_path / "run", _identity())
    assert not first.started_before
    first.record_start({"device": "cpu"})
    second = Workdir(tmp_path / "run", _identity())
    assert second.started_before
    second.record_start({"device": "gpu"})
    second.record_result({"loss": 1.5})
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [start["device"] for start in run["starts"]] == ["cpu", "gpu"]
    assert run["result"]["loss"] == 1.5
    assert run["identity"]["config"]["model"]["dims"] == [1, 2]


def test_keys_that_change_no_parameter_may_change_and_the_new_value_is_kept(tmp_path):
    _started(tmp_path)
    changed = _identity(log_every=7, checkpoint={"every_steps": 1})
    Workdir(tmp_path, changed).record_start({})
    assert json.loads((tmp_path / "run.json").read_text())["identity"]["config"]["log_every"] == 7


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (_identity(steps=20), "steps: was 10, is 20"),
        (_identity(model={"dims": [1, 3]}), r"model\.dims: was \[1, 2\], is \[1, 3\]"),
        (_identity(corpus="b" * 64), "corpus fingerprint: was aaaaaaaaaaaaaaaa, is bbbb"),
        (
            _identity(parameters={"kernel": "float32[2, 4]"}),
            r"shape of kernel: was 'float32\[2, 3\]', is 'float32\[2, 4\]'",
        ),
    ],
)
def test_another_run_is_refused_with_the_difference_named(tmp_path, changed, expected):
    before = (_started(tmp_path) / "run.json").read_bytes()
    with pytest.raises(WorkdirError, match=expected):
        Workdir(tmp_path, changed)
    assert (tmp_path / "run.json").read_bytes() == before


def test_the_last_files_of_somebody_else_are_not_written_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("theirs")
    with pytest.raises(WorkdirError, match=r"holds metrics.jsonl but no run.json"):
        Workdir(tmp_path, _identity())


@pytest.mark.parametrize("content", ["", "[1]", '{"identity": {}}', '{"identity"'])
def test_a_run_file_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(WorkdirError, match=r"run.json cannot be read"):
        Workdir(tmp_path, _identity())


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(WorkdirError, match="is a file"):
        Workdir(tmp_path / "run", _identity())
