"""The model of a workdir: what is read, and what is said where it cannot be."""

import json
import shutil

import chex
import jax
import pytest

from nsa_jax.training import checkpoint, trained
from nsa_jax.training.errors import CheckpointError, WorkdirError
from tests.training import tiny_run


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("original") / "run"
    return workdir, tiny_run.write_run(workdir, steps=(2, 4))


@pytest.fixture
def workdir(original, tmp_path):
    return shutil.copytree(original[0], tmp_path / "run")


def change_run(workdir, *keys, value):
    """Changes one value of the identity in run.json; None takes it away."""
    run = json.loads((workdir / "run.json").read_text())
    section = run["identity"]
    for key in keys[:-1]:
        section = section[key]
    if value is None:
        del section[keys[-1]]
    else:
        section[keys[-1]] = value
    (workdir / "run.json").write_text(json.dumps(run))


def test_the_newest_parameters_are_read(original):
    workdir, state = original
    found = trained.load(workdir)
    assert (found.step, found.notes) == (4, [])
    assert found.model.config.implementation == "auto"
    chex.assert_trees_all_equal(found.params, state.params)
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(found.params))


def test_a_damaged_checkpoint_is_passed_over_and_left(workdir):
    for path in (workdir / "checkpoints" / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = sorted(workdir.rglob("*"))
    found = trained.load(workdir)
    assert found.step == 2
    (note,) = found.notes
    assert "checkpoints/4 is not usable" in note
    assert sorted(workdir.rglob("*")) == before


def test_what_is_not_there_is_said(workdir, tmp_path):
    with pytest.raises(WorkdirError, match="absent: there is no such folder"):
        trained.load(tmp_path / "absent")
    with pytest.raises(WorkdirError, match=r"holds no run: there is no run\.json in it"):
        trained.load(tmp_path)
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(CheckpointError, match=r"no checkpoint yet; .* after update 2"):
        trained.load(workdir)


def test_a_configuration_that_does_not_match_is_refused(workdir):
    change_run(workdir, "config", "seed", value=7)
    with pytest.raises(WorkdirError, match=r"the checkpoint holds another run.*\n.*seed: was 0"):
        trained.load(workdir)
    change_run(workdir, "config", "model", "mlp_dim", value=24)
    with pytest.raises(WorkdirError, match=r"are not those of its configuration") as raised:
        trained.load(workdir)
    assert "mlp/up/kernel: was 'float32[16, 16]', is 'float32[16, 24]'" in str(raised.value)
    change_run(workdir, "config", "nsa", "window_size", value=None)
    with pytest.raises(WorkdirError, match=r"run\.json: the configuration .*\n.*window_size"):
        trained.load(workdir)
    (workdir / "run.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"run\.json cannot be read"):
        trained.load(workdir)


def test_the_shapes_on_record_are_those_of_the_parameters(original):
    workdir, state = original
    run = json.loads((workdir / "run.json").read_text())
    assert run["identity"]["parameters"] == checkpoint.shapes(state.params)
