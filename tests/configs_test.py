"""The config files: whole, consistent, and sparse and dense of the same size."""

import importlib
from pathlib import Path

import pytest

from nsa_jax.training import config as config_lib
from nsa_jax.training.setup import parameter_count, prepare

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RUNS = sorted(
    path.stem for path in CONFIGS.glob("*.py") if path.stem not in ("default", "__init__")
)


def _config(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", ["default", *RUNS])
def test_a_config_is_right_as_it_stands(name):
    config_lib.run_config(_config(name))


@pytest.mark.parametrize("name", RUNS)
def test_the_docstring_says_how_to_run_it_and_what_comes_of_it(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"nsa-train --config=configs/{name}.py --workdir=" in text
    assert "\nCost: " in text
    assert "\nExpected: " in text


@pytest.mark.parametrize("name", ["tiny_cpu", "small_gpu"])
def test_the_dense_counterpart_has_as_many_parameters(name):
    sparse, dense = (
        parameter_count(prepare(_config(file)).abstract_state.params)
        for file in (name, f"{name}_dense")
    )
    assert dense == pytest.approx(sparse, rel=0.001)


@pytest.mark.parametrize("name", ["tiny_cpu", "small_gpu"])
def test_the_dense_counterpart_differs_in_attention_and_width_alone(name):
    sparse, dense = _config(name).to_dict(), _config(f"{name}_dense").to_dict()
    for key in ("attention", "mlp_dim"):
        assert sparse["model"].pop(key) != dense["model"].pop(key)
    assert sparse == dense


def test_every_key_of_default_is_explained():
    lines = (CONFIGS / "default.py").read_text().splitlines()
    for index, line in enumerate(lines):
        if " = " in line and "ConfigDict" not in line:
            before = lines[index - 1].strip()
            assert "  # " in line or before.startswith("#"), line
