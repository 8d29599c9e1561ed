import pickle

import pytest

from nsa_jax.training import config as config_lib
from nsa_jax.training.config import ConfigError, run_config
from tests.training import tiny_run


def _problems(settings):
    with pytest.raises(ConfigError) as caught:
        run_config(settings)
    return caught.value.problems


def test_a_right_configuration_becomes_dataclasses():
    run = run_config(tiny_run.settings(optimizer__learning_rate=0.5, implementation="xla"))
    assert run.steps == 6
    assert run.optimizer.learning_rate == 0.5
    assert run.model.nsa.select_block_size == 8
    assert run.model.implementation == "xla"
    assert run.model.vocab_size == 257
    assert run.model.v_head_dim is None


def test_every_problem_is_told_at_once():
    settings = tiny_run.settings().to_dict()
    settings["stepz"] = settings.pop("steps")
    settings["optimizer"]["learning_rat"] = 1.0
    settings["model"]["num_layers"] = "two"
    settings["nsa"]["compress_stride"] = 3
    settings["data"]["batch_size"] = 0
    assert set(_problems(settings)) == {
        "steps: missing",
        "stepz: there is no such key; the nearest is steps",
        "optimizer.learning_rat: there is no such key; the nearest is optimizer.learning_rate",
        "model.num_layers='two': must be an integer, not a string",
        "nsa: compress_stride=3 must divide compress_block_size=4",
        "data: batch_size=0 must be at least 1",
    }


def test_the_message_lists_the_problems():
    settings = tiny_run.settings(steps=0)
    with pytest.raises(ConfigError, match=r"has 2 problems:\n  steps=0: must be at least 1\n  opt"):
        run_config(settings)


def test_the_message_comes_whole_from_another_process():
    error = ConfigError(["one", "two"])
    sent = pickle.loads(pickle.dumps(error))
    assert (str(sent), sent.problems) == (str(error), ("one", "two"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 2}, "optimizer.warmup_steps=2: must be below steps=2"),
        ({"optimizer__accumulate": 3}, "optimizer.accumulate=3: must divide data.batch_size=4"),
        ({"data__seq_len": 36}, "data.seq_len=36: must be a multiple of nsa.select_block_size=8"),
        (
            {"sample__length": 31, "data__name": "stdlib"},
            "sample.length=31: the document start, the prompt of 1 bytes",
        ),
        ({"log_every": 0}, "log_every=0: must be at least 1"),
        ({"nsa__num_selected_blocks": 2}, "nsa: num_initial_blocks=1 and num_local_blocks=2 force"),
        ({"nsa__compress_block_size": 16}, "nsa: compress_block_size=16 must be at most"),
        ({"model__num_kv_heads": 3}, "model: num_kv_heads=3 must divide num_heads=2"),
        ({"implementation": "cuda"}, "implementation='cuda' must be one of"),
        ({"data__name": "stdlb"}, "data: name='stdlb' must be one of"),
        ({"checkpoint__every_steps": 0}, "checkpoint: every_steps=0 must be at least 1"),
        ({"sample__temperature": -1.0}, "sample: temperature=-1.0 must be"),
        ({"sample__prompt": "\udcff"}, "sample: prompt='\\udcff' cannot be encoded as UTF-8"),
        (
            {"optimizer__learning_rate": float("nan")},
            "optimizer.learning_rate=nan: must be a finite number",
        ),
    ],
)
def test_values_that_do_not_fit_are_refused_with_a_sentence(changes, expected):
    problems = _problems(tiny_run.settings(**changes))
    assert len(problems) == 1
    assert problems[0].startswith(expected)


def test_a_batch_is_divided_over_devices_and_microbatches():
    run = run_config(tiny_run.settings(optimizer__accumulate=2))
    config_lib.check_devices(run, 2)
    with pytest.raises(ConfigError, match=r"data.batch_size=4: must be a multiple of 8, the 4 dev"):
        config_lib.check_devices(run, 4)
