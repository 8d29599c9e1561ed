import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.training import checkpoint
from nsa_jax.training.checkpoint import Checkpoints
from nsa_jax.training.errors import CheckpointError, NonFiniteError, WorkdirError


def _state(step):
    # Large enough that the bytes of a parameter lie in a file of their own.
    kernel = jax.random.normal(jax.random.key(step), (100, 50))
    return {"params": {"kernel": kernel, "scale": jnp.ones(3)}, "step": jnp.int32(step)}


def _abstract():
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _state(0)
    )


def _accept(identity):
    assert identity == {"name": "mine"}


def _write(folder, steps, max_to_keep=3):
    checkpoints = Checkpoints(folder, max_to_keep)
    for step in steps:
        checkpoints.save(step, _state(step), {"name": "mine"})
    checkpoints.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    _write(root / "checkpoints", [1, 2])
    return root


@pytest.fixture
def copy(written, tmp_path):
    shutil.copytree(written / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def _assert_is_state(restored, step):
    assert restored.step == step
    jax.tree.map(np.testing.assert_array_equal, restored.state, _state(step))


def test_the_newest_comes_back_bit_for_bit(copy):
    checkpoints = Checkpoints(copy, 3)
    _assert_is_state(checkpoints.restore(_abstract(), _accept), 2)
    assert checkpoints.set_aside == []


def test_an_empty_or_absent_folder_holds_none(tmp_path):
    assert Checkpoints(tmp_path / "absent", 3).restore(_abstract(), _accept) is None


def test_only_so_many_are_kept(tmp_path):
    _write(tmp_path / "checkpoints", [1, 2, 3, 4], max_to_keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


DAMAGE = {
    "zero-length": lambda path, data: path.write_bytes(b""),
    "half": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "gone": lambda path, data: path.unlink(),
    "one bit flipped": lambda path, data: path.write_bytes(
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_is_harmless_or_noticed(written, tmp_path, kind, capfd):
    """Whatever happens to a file of the newest: its state comes back whole, or the one before."""
    files = [path for path in (written / "checkpoints" / "2").rglob("*") if path.is_file()]
    noticed = 0
    for number, file in enumerate(files):
        root = tmp_path / str(number)
        shutil.copytree(written, root)
        damaged = root / file.relative_to(written)
        DAMAGE[kind](damaged, damaged.read_bytes())
        checkpoints = Checkpoints(root / "checkpoints", 3)
        restored = checkpoints.restore(_abstract(), _accept)
        if checkpoints.set_aside:
            noticed += 1
            _assert_is_state(restored, 1)
            assert len(checkpoints.set_aside) == 1
            assert f"{root}/checkpoints/2 is not usable (" in checkpoints.set_aside[0]
            assert (root / "checkpoints_set_aside" / "2").is_dir()
            assert not (root / "checkpoints" / "2").exists()
        else:
            _assert_is_state(restored, 2)
    # The storage keeps copies of some of its files, so that not all of them are needed; the arrays,
    # their index and the two JSON files are.
    assert noticed >= 4
    assert "Traceback" not in capfd.readouterr().err


def test_after_a_damaged_one_the_same_step_can_be_written_again(copy):
    (copy / "2" / "meta" / "metadata").write_text("")
    checkpoints = Checkpoints(copy, 3)
    assert checkpoints.restore(_abstract(), _accept).step == 1
    checkpoints.save(2, _state(2), {"name": "mine"})
    assert checkpoints.wait() == 2
    checkpoints.close()
    _assert_is_state(Checkpoints(copy, 3).restore(_abstract(), _accept), 2)


def test_what_a_crash_left_half_written_is_set_aside(copy):
    (copy / "3.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(copy, 3)
    _assert_is_state(checkpoints.restore(_abstract(), _accept), 2)
    assert "3.orbax-checkpoint-tmp was never finished" in checkpoints.set_aside[0]
    assert (copy.with_name("checkpoints_set_aside") / "3.orbax-checkpoint-tmp").is_dir()


def test_files_of_a_person_stay_where_they_are(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "backup").mkdir()
    checkpoints = Checkpoints(copy, 3)
    _assert_is_state(checkpoints.restore(_abstract(), _accept), 2)
    checkpoints.save(3, _state(3), {"name": "mine"})
    assert checkpoints.wait() == 3
    checkpoints.close()
    assert checkpoints.set_aside == []
    assert {path.name for path in copy.iterdir()} == {"1", "2", "3", "notes.txt", "backup"}


def test_without_a_usable_one_there_is_an_error_and_nothing_moves(copy):
    for name in ("1", "2"):
        (copy / name / "state" / "manifest.ocdbt").write_bytes(b"")
    before = sorted(copy.rglob("*"))
    with pytest.raises(CheckpointError, match="none of the checkpoints is usable") as caught:
        Checkpoints(copy, 3).restore(_abstract(), _accept)
    assert str(copy / "1") in str(caught.value)
    assert sorted(copy.rglob("*")) == before


def test_a_refused_identity_is_not_taken_for_damage(copy):
    def refuse(identity):
        raise WorkdirError("another run")

    with pytest.raises(WorkdirError, match="another run"):
        Checkpoints(copy, 3).restore(_abstract(), refuse)
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_state_that_is_not_finite_is_never_written(copy, value):
    checkpoints = Checkpoints(copy, 3)
    state = _state(3)
    state["params"]["scale"] = state["params"]["scale"].at[1].set(value)
    with pytest.raises(NonFiniteError, match="after step 3 is not finite in params/scale; no"):
        checkpoints.save(3, state, {"name": "mine"})
    assert checkpoints.wait() == 2
    checkpoints.close()
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    double = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2, x), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 9)
    state = {"kernel": jax.random.normal(jax.random.key(0), (500, 500))}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    kept = np.array(state["kernel"])
    for step in range(4):
        checkpoints.save(step, state, {"name": "mine"})
        state = double(state)
    checkpoints.close()
    restored = Checkpoints(tmp_path / "checkpoints", 9).restore(abstract, _accept)
    assert restored.step == 3
    np.testing.assert_array_equal(restored.state["kernel"], kept * 8)


def test_a_failed_write_is_told(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)

    def full(*_, **__):
        raise OSError("writing " + "/a/long/path" * 20 + " failed: No space left on device")

    monkeypatch.setattr(checkpoints._open(), "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(1, _state(1), {"name": "mine"})


def test_shapes_are_named():
    assert checkpoint.shapes(_state(0)["params"]) == {
        "kernel": "float32[100, 50]",
        "scale": "float32[3]",
    }


def test_folders_are_absolute_whatever_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Checkpoints(Path("here"), 1).path(5) == tmp_path / "here" / "5"
