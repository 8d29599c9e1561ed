import math
import subprocess
import sys

import pytest

from nsa_jax.training import schema

KNOWN = ["steps", "seed", "optimizer.learning_rate", "optimizer.beta1", "model.dtype"]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("stepz", "steps"),
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),  # the right name in the wrong section
        ("model.beta1", "optimizer.beta1"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("optimizr.learning_rte", "optimizer.learning_rate"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_right_one(key, nearest):
    assert schema.unknown_key(key, KNOWN).endswith(f"the nearest is {nearest}")


def test_a_key_like_no_other_gets_no_suggestion():
    assert schema.unknown_key("xyzzy", KNOWN) == "xyzzy: there is no such key"


def test_differences_name_dotted_keys_with_both_values():
    old = {"a": {"b": 1, "c": 2}, "d": [1, 2], "log": {"every": 1}, "gone": 0}
    new = {"a": {"b": 1, "c": 3}, "d": [1, 2], "log": {"every": 5}, "came": "x"}
    assert schema.differences(old, new, ignore=["log"]) == [
        "a.c: was 2, is 3",
        "gone: was 0, is not there",
        "came: was not there, is 'x'",
    ]
    assert schema.differences(old, new, ignore=["log.ever"])[1] == "log.every: was 1, is 5"


@pytest.mark.parametrize(
    ("kind", "value", "read"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (int | None, None, None),
        (int | None, 4, 4),
        (tuple[int, ...], [1, 2], (1, 2)),
    ],
)
def test_values_of_a_fitting_type_are_read(kind, value, read):
    reader = schema.Reader({"x": value}, {"x": kind})
    assert reader.problems == []
    assert reader.values == {"x": read}
    assert type(reader.values["x"]) is type(read)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 3.0),
        (int, True),
        (float, "3"),
        (float, True),
        (float, math.nan),
        (float, -math.inf),
        (float, 10**400),
        (bool, 1),
        (str, 3),
        (int | None, "4"),
    ],
)
def test_values_of_another_type_are_refused_with_key_and_value(kind, value):
    reader = schema.Reader({"a": {"x": value}}, {"a": {"x": kind}})
    assert reader.values == {"a": {}}
    assert len(reader.problems) == 1
    assert reader.problems[0].startswith(f"a.x={value!r}: must be")


def test_a_section_and_a_value_are_not_taken_for_each_other():
    reader = schema.Reader({"a": 1, "b": {"c": 1}}, {"a": {"x": int}, "b": int})
    assert reader.problems == ["a: must be a section", "b: must be a single value"]


def test_the_nearest_name_is_found_without_jax():
    # The command line answers a typo before anything heavy is loaded; the package's own front door
    # is left out here, because it is the library's and does import JAX.
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('schema', {schema.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['schema'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
