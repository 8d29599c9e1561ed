import json
import subprocess

import jax

from nsa_jax.training import environment


def _git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_git_state_of_a_clean_and_of_a_changed_tree(tmp_path):
    _git(tmp_path, "init")
    (tmp_path / "file").write_text("1")
    _git(tmp_path, "add", "file")
    _git(tmp_path, "commit", "-m", "first")
    clean = environment.git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "untracked").write_text("3")
    assert environment.git_state(tmp_path) == clean
    (tmp_path / "file").write_text("2")
    assert environment.git_state(tmp_path) == {**clean, "dirty": True}
    _git(tmp_path, "add", "file")  # nor does a change that waits to be committed hide
    assert environment.git_state(tmp_path) == {**clean, "dirty": True}


def test_untracked_sources_are_not_those_of_the_repository_around_them(tmp_path):
    _git(tmp_path, "init")
    inside = tmp_path / "environment" / "package"
    inside.mkdir(parents=True)
    (inside / "module.py").write_text("")
    state = environment.git_state(inside)
    assert state == {"commit": None, "reason": "the sources are not tracked by git"}


def test_without_a_repository_or_git_the_reason_is_given(tmp_path, monkeypatch):
    assert "not a git repository" in environment.git_state(tmp_path)["reason"]
    monkeypatch.setenv("PATH", "")
    assert environment.git_state(tmp_path) == {"commit": None, "reason": "git is not installed"}


def test_the_description_is_json_and_names_the_versions():
    described = json.loads(json.dumps(environment.describe()))
    assert described["versions"]["jax"] == jax.__version__
    assert described["devices"]["count"] == jax.device_count()
