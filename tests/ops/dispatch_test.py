"""Who runs a call, and what is said when nobody can."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
import pallas_kernels
from nsa_jax.ops import dispatch, xla
from tests import fake_kernels
from tests.arg_specs import SMALL, random_inputs


@pytest.fixture
def fake_kernel(monkeypatch):
    """Registers a Triton kernel for interval_attention; returns how it was called."""
    calls = []

    def interval_attention(*args, **kwargs):
        calls.append("run")
        return xla.interval_attention(*args, **kwargs)

    def refusal(operation, *args, **kwargs):
        if args and args[0].shape[-1] > 8:
            return f"{operation} takes at most 8 features a head, not {args[0].shape[-1]}."
        return None

    fake_kernels.register(monkeypatch, refusal, interval_attention=interval_attention)
    return calls


def window(head_dim, implementation):
    q, k, v = (jnp.ones((1, 6, 1, head_dim)) for _ in range(3))
    config = nsa_jax.NSAConfig(window_size=3)
    return nsa_jax.sliding_window_attention(q, k, v, config=config, implementation=implementation)


def test_auto_takes_the_first_that_can(fake_kernel):
    assert dispatch.resolve("interval_attention", "auto")[0] == "triton"
    assert dispatch.resolve("selected_attention", "auto")[0] == "xla"
    window(8, "auto")
    assert fake_kernel == ["run"]


def test_auto_goes_on_where_a_kernel_refuses(fake_kernel):
    out, _ = window(16, "auto")
    assert fake_kernel == []
    np.testing.assert_array_equal(out, jnp.ones_like(out))


def test_auto_logs_once_why_it_goes_on(fake_kernel, caplog):
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(2):
            window(24, "auto")  # a size that no other test here has been told of
    sentence = "interval_attention takes at most 8 features a head, not 24."
    told = [record.getMessage() for record in caplog.records]
    assert [x for x in told if sentence in x] == [
        f"auto runs interval_attention without triton: {sentence}"
    ]
    assert {record.levelname for record in caplog.records} <= {"INFO"}


def test_an_explicit_choice_never_falls_back(fake_kernel):
    window(8, "triton")
    with pytest.raises(nsa_jax.UnsupportedError, match="at most 8 features a head, not 16"):
        window(16, "triton")
    with pytest.raises(nsa_jax.UnsupportedError, match="mosaic_gpu needs an NVIDIA GPU"):
        window(8, "mosaic_gpu")


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(
        pallas_kernels.KERNELS["interval_attention"], "triton", "not_installed_here:kernel"
    )
    with pytest.raises(nsa_jax.UnsupportedError, match=r"not_installed_here.*nsa-jax\[cuda13\]"):
        window(8, "triton")
    window(8, "auto")


def test_unknown_names_are_refused_with_the_known_ones():
    arrays = random_inputs(SMALL["even"])
    with pytest.raises(ValueError, match=r"'cuda' must be one of .*'auto'.*'reference'"):
        nsa_jax.native_sparse_attention(**arrays, config=SMALL["even"].nsa, implementation="cuda")


def test_a_mistake_in_a_kernel_module_is_no_missing_package(monkeypatch):
    table = pallas_kernels.KERNELS["interval_attention"]
    monkeypatch.setitem(table, "triton", "pallas_kernels.not_there:kernel")
    with pytest.raises(ModuleNotFoundError, match=r"pallas_kernels\.not_there"):
        window(8, "auto")


def test_explain_says_what_was_chosen_and_why():
    record = dispatch.explain("auto")
    assert set(record) == {"interval_attention", "select_blocks", "selected_attention"}
    for operation, entry in record.items():
        assert entry["chosen"] in ("mosaic_gpu", "triton", "xla")
        for name, sentence in entry["refused"].items():
            assert sentence.endswith(".")
            assert name in sentence
            assert operation in sentence or "needs" in sentence
    assert dispatch.explain("reference")["select_blocks"]["chosen"] == "reference"
    with pytest.raises(ValueError, match="must be one of"):
        dispatch.explain("fastest")


def test_what_was_decided_is_recorded_for_the_calls_of_the_context(fake_kernel):
    sentence = "interval_attention takes at most 8 features a head, not 16."
    with dispatch.recorded() as record:
        window(16, "auto")
        with dispatch.recorded() as inner:
            window(8, "triton")
    window(8, "auto")
    entry = record["interval_attention"]
    assert entry["chosen"] == "xla"
    assert entry["refused"]["triton"] == sentence
    assert inner == {"interval_attention": {"chosen": "triton", "refused": {}}}
    with dispatch.recorded() as record:
        window(16, "auto")
        window(8, "auto")
    assert record["interval_attention"]["chosen"] == "xla and triton"
    assert record["interval_attention"]["refused"]["triton"] == sentence


def test_the_table_names_known_operations():
    operations = {*dispatch.OPERATIONS, *dispatch.STEPS}
    assert set(pallas_kernels.KERNELS) == operations | {"gated_sum"}
    for operation in operations:
        assert dispatch.resolve(operation, "xla")[1] is getattr(xla, operation)
    for kernels in pallas_kernels.KERNELS.values():
        assert set(kernels) <= {"mosaic_gpu", "triton"}
