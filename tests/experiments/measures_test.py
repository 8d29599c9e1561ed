"""What is measured, by hand."""

import jax
import numpy as np
import pytest

from experiments import draw, maps, posthoc, training
from experiments.measures import answers, needle, selection, validation
from experiments.suite import Variant
from nsa_jax import NSAConfig
from nsa_jax.training import tasks
from nsa_jax.training.schema import flatten
from tests.training import tiny_run

TINY = flatten(tiny_run.settings(steps=1, optimizer__warmup_steps=0).to_dict())


@pytest.fixture(scope="module")
def trained():
    """A tiny model on a task, before its first update: no measure needs more."""

    def make(**changes):
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        return training.Plan(training.settings(TINY, changes), Variant()).untrained(3)

    return make


@pytest.mark.parametrize("pair_tokens", [1, 2, 3])
def test_the_answer_stands_where_the_value_does(pair_tokens):
    row = tasks.recall_row(
        np.random.default_rng(0), 120, pairs=24, queries=9, pair_tokens=pair_tokens
    )
    found = answers(row["tokens"], row["weights"], pair_tokens)
    asked = row["weights"] > 0
    assert (found[~asked] == -1).all()
    value = row["tokens"][found[asked]]
    if pair_tokens == 1:
        value = tasks.FUSED_ANSWERS.start + value % tasks.FUSED_VALUES
    np.testing.assert_array_equal(value, row["targets"][asked])
    assert (found[asked] < np.flatnonzero(asked)[0]).all()  # the pair, not an earlier query


def test_validation_splits_by_the_place_in_the_document(trained):
    run = trained(model__attention="dense")
    found = validation(run)
    assert run.run.seed == 3
    # Copying predicts the last 16 of 32 positions; the last quarter is half of them.
    apply, nats = jax.jit(run.model.apply), []
    for batch in run.pipeline.validation:
        logits = apply({"params": run.params}, batch["tokens"])
        logits = np.asarray(logits, np.float64)
        chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        per_token = np.log(np.exp(logits).sum(-1)) - chosen
        nats += [per_token[row, 24:] for row in range(4) if batch["weights"][row].any()]
    assert len(nats) == 6
    assert found["loss_last_quarter"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["loss"] != found["loss_last_quarter"]


def test_everything_selected_hits_and_holds_all(trained):
    recall = {
        "data__name": "recall",
        "data__task_pair_tokens": 1,
        "data__task_pairs": 12,
        "data__task_queries": 8,
    }
    found = selection(trained(nsa__num_selected_blocks=4, **recall))
    assert found["hit_rate"] == 1
    assert found["mass"] == pytest.approx(1, abs=1e-6)
    partial = selection(trained(**recall))
    assert partial["hit_rate"] < 1
    assert partial["mass"] < 1


def test_the_needle_grid(trained, tmp_path):
    found = needle(trained(model__attention="dense", data__name="needle"))
    grid, lengths = found["needle_grid"], found["needle_lengths"]
    assert grid.shape == (6, 10)
    assert lengths.tolist() == [8, 16, 24, 32, 48, 64]
    assert found["accuracy"] == pytest.approx(grid[:4].mean())
    assert found["accuracy_beyond"] == pytest.approx(grid[4:].mean())
    np.savez(tmp_path / "arrays.npz", **{f"a/0/{k}": found[k] for k in found if "needle" in k})
    assert draw.needle(tmp_path, {"variants": ["a"], "seeds": [0]}) is not None


def test_methods_with_every_token_are_full_attention(trained):
    """With a budget of the whole row, all post-hoc methods leave the model as it is."""
    run = trained(model__attention="dense", nsa__num_selected_blocks=4)
    found = posthoc.posthoc(run)
    assert found["token_budget"] == 4 * 8 + 6  # of 32 tokens
    full = validation(run)["loss"]
    for method in posthoc.POSTHOC:
        # Another order of the same sums in float32.
        assert found[f"loss_{method}"] == pytest.approx(full, rel=1e-5), method


def test_clustering_by_hand():
    nsa = NSAConfig(1, 1, 2, num_selected_blocks=3, num_local_blocks=1, window_size=2)
    p = np.zeros((1, 8, 8))
    # Of the middle keys the first two have 3/4 of the attention.
    p[0, :, :] = [0.1, 0.1, 0.3, 0.3, 0.1, 0.1, 0, 0]
    p = p[:, [7] * 8]
    found = maps.clustering(p, nsa)
    # Queries 6 and 7 choose one of two blocks.
    assert found["block_share"] == pytest.approx(0.75)
    # In random order the best of two blocks holds 3/4 in a third of the cases, else 1/2.
    assert 0.5 < found["block_share_shuffled"] < 0.75
    assert found["block_gain"] == found["block_share"] - found["block_share_shuffled"]
    assert found["neighbours"] > found["neighbours_shuffled"]
    # The top fifth of 7 and 8 keys is one key and two keys.
    assert found["top_share"] == pytest.approx((0.3 + 0.6) / 2)


def test_a_reduced_map_keeps_its_sums(monkeypatch):
    monkeypatch.setattr(maps, "_SHOWN", 2)
    full = np.array([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0.25, 0.75, 0], [0, 0.25, 0.25, 0.5]])
    np.testing.assert_array_equal(maps._reduced(full), [[1, 0], [0.25, 0.75]])
    # Of five, the last row and column stand alone.
    odd = maps._reduced(np.eye(5))
    np.testing.assert_array_equal(odd, np.eye(3))


def test_maps_of_both_kinds(trained, tmp_path):
    full, sparse = (maps.maps(trained(model__attention=kind)) for kind in ("dense", "nsa"))
    assert full["attention_map"].shape == (32, 32)
    np.testing.assert_allclose(full["attention_map"].sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(full["attention_blocks"].sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(full["attention_map"], np.tril(full["attention_map"]))
    np.testing.assert_array_equal(sparse["chosen_blocks"][:, 0], 1)  # the forced first block
    arrays = {f"full/0/{k}": x for k, x in full.items() if isinstance(x, np.ndarray)}
    np.savez(tmp_path / "arrays.npz", **arrays, **{"nsa/0/chosen_blocks": sparse["chosen_blocks"]})
    assert draw.maps(tmp_path, {"seeds": [0]}) is not None
