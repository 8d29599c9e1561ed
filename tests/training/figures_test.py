import numpy as np
import pytest
from matplotlib import image

from nsa_jax.training import figures
from nsa_jax.training.setup import prepare
from tests.training import tiny_run


def test_selection_share_by_hand():
    # Five queries in blocks of 2, one group, two blocks each; the last block has one query.
    chosen = np.array([[[0, -1]], [[0, -1]], [[0, 1]], [[1, -1]], [[0, 2]]])
    np.testing.assert_array_equal(
        figures.selection_share(chosen, 2), [[1, 0, 0], [0.5, 1, 0], [1, 0, 1]]
    )


def test_selection_share_is_a_mean_over_groups():
    chosen = np.array([[[0], [-1]], [[0], [0]]])
    np.testing.assert_array_equal(figures.selection_share(chosen, 2), [[0.75]])


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_record_of_a_model(scan_layers):
    setup = prepare(tiny_run.settings(model__num_layers=2, model__scan_layers=scan_layers))
    batch = {
        "tokens": np.arange(64, dtype=np.int32).reshape(2, 32),
        "document_starts": np.zeros((2, 32), np.int32),
    }
    record = figures.attention_record(setup.model, setup.make_state().params, batch)
    assert record["block_indices"].shape == (2, 32, 1, 3)
    assert record["gates"].shape == (2, 32, 2, 3)
    share = figures.selection_share(record["block_indices"][1], 8)
    np.testing.assert_array_equal(np.diag(share), 1)  # one's own block is always chosen
    np.testing.assert_array_equal(share[:, 0], 1)  # and the first one
    np.testing.assert_array_equal(share, np.tril(share))  # and none that is to come


def test_figures_are_drawn(tmp_path):
    rows = [
        {"step": step, "kind": kind, "bits_per_byte": 8 / step}
        for step in (1, 2, 3)
        for kind in ("train", "validation")
    ]
    rows.insert(0, {"step": 4, "kind": "train", "bits_per_byte": None})  # it was not finite
    figures.draw_loss(rows, 2.5, tmp_path / "loss.png")
    figures.draw_loss([], None, tmp_path / "nothing.png")
    record = {
        "block_indices": np.zeros((1, 16, 1, 1), np.int32),
        "gates": np.full((1, 16, 2, 3), 0.5),
    }
    figures.draw_selection(record, 8, tmp_path / "selection.png")
    for name in ("loss", "nothing", "selection"):
        assert image.imread(tmp_path / f"{name}.png").std() > 0


def test_a_missing_matplotlib_is_told(monkeypatch):
    assert figures.missing() is None
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'nsa-jax[plots]'" in figures.missing()
