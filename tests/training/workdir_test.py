import json
import subprocess
import sys

import pytest

from nsa_jax.training import workdir
from nsa_jax.training.errors import WorkdirError
from nsa_jax.training.workdir import Workdir

CONFIG = {
    "steps": 10,
    "log_every": 1,
    "checkpoint": {"every_steps": 5},
    "model": {"dims": (1, 2)},
    "data": {"path": "here"},
}


def _identity(corpus="a" * 64, parameters=None, **changes):
    return workdir.identity(CONFIG | changes, corpus, parameters or {"kernel": "float32[2, 3]"})


def _started(path):
    place = Workdir(path, _identity())
    place.record_start({"device": "cpu"})
    place.close()
    return path


def test_the_same_run_may_go_on_and_every_start_is_on_record(tmp_path):
    first = Workdir(tmp_path / "run", _identity())
    assert not first.started_before
    first.record_start({"device": "cpu"})
    first.close()
    second = Workdir(tmp_path / "run", _identity())
    assert second.started_before
    second.record_start({"device": "gpu"})
    second.record_result({"loss": 1.5})
    second.close()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [start["device"] for start in run["starts"]] == ["cpu", "gpu"]
    assert run["result"]["loss"] == 1.5
    assert run["identity"]["config"]["model"]["dims"] == [1, 2]


def test_keys_that_change_no_parameter_may_change_and_the_new_value_is_kept(tmp_path):
    _started(tmp_path)
    changed = _identity(log_every=7, checkpoint={"every_steps": 1}, data={"path": "there"})
    place = Workdir(tmp_path, changed)
    place.record_start({})
    place.close()
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


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        '{"identity": {}}',
        '{"identity"',
        '{"identity": {"config": {}, "corpus": ""}, "starts": []}',
        '{"identity": ["config", "corpus", "parameters"], "starts": []}',
    ],
)
def test_a_run_file_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(WorkdirError, match=r"run.json cannot be read"):
        Workdir(tmp_path, _identity())


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(WorkdirError, match="is a file"):
        Workdir(tmp_path / "run", _identity())


def test_two_processes_do_not_run_in_one_folder(tmp_path):
    code = (
        "import sys\n"
        "from nsa_jax.training.workdir import Workdir\n"
        "identity = {'config': {}, 'corpus': '', 'parameters': {}}\n"
        "place = Workdir(sys.argv[1], identity)\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(WorkdirError, match=rf"another process \(pid {other.pid}\) is running"):
            Workdir(tmp_path, _identity())
        Workdir(tmp_path, _identity(), main_process=False).close()  # one of the same run
        other.kill()  # its lock goes with it
        other.wait()
        Workdir(tmp_path, _identity()).close()


def test_a_refused_folder_is_not_left_locked(tmp_path):
    _started(tmp_path)
    with pytest.raises(WorkdirError, match="steps: was 10"):
        Workdir(tmp_path, _identity(steps=20))
    Workdir(tmp_path, _identity()).close()


@pytest.mark.parametrize(
    ("start", "rows", "folder", "expected"),
    [
        (0, [], False, False),
        (0, [5], False, False),  # killed before the save of step 5 had begun
        (0, [6], False, True),
        (0, [10], True, False),  # the first save may have failed
        (0, [11], True, True),
        (5, [], True, True),
    ],
)
def test_what_is_on_record_tells_whether_there_was_a_checkpoint(
    tmp_path, start, rows, folder, expected
):
    place = Workdir(tmp_path, _identity())
    assert not place.had_checkpoint
    place.record_start({"from_step": start})
    place.close()
    lines = [json.dumps({"step": step, "kind": "train"}) + "\n" for step in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    if folder:
        (tmp_path / "checkpoints").mkdir()
    # The setting of the start that wrote the rows counts, not the present one.
    place = Workdir(tmp_path, _identity(checkpoint={"every_steps": 1}))
    assert place.had_checkpoint == expected
    place.record_result({})
    assert place.had_checkpoint
    place.close()
