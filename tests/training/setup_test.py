"""What a run says about what runs its attention."""

import pytest

from nsa_jax.ops import dense, dispatch
from nsa_jax.training.config import run_config
from nsa_jax.training.setup import explain_attention
from tests import fake_kernels
from tests.training import tiny_run


def record(**settings):
    run = run_config(tiny_run.settings(**settings))
    return explain_attention(run.model, run.data.seq_len)


@pytest.mark.parametrize("layers", ["as they are", "scanned", "recomputed"])
def test_refusals_are_those_of_the_shapes_of_the_run(monkeypatch, layers):
    def refusal(operation, *args, **kwargs):
        assert args, "asked without shapes"
        return f"{operation} of {args[0].dtype} takes no {args[0].shape[1]} queries."

    fake_kernels.register(monkeypatch, refusal, **dict.fromkeys(dispatch.OPERATIONS))
    options = {"scanned": {"model__scan_layers": True}, "recomputed": {"model__remat": True}}
    told = record(model__dtype="bfloat16", **options.get(layers, {}))
    seq_len = run_config(tiny_run.settings()).data.seq_len
    assert set(told) == {*dispatch.OPERATIONS, "gated_sum"}
    assert {entry["chosen"] for entry in told.values()} == {"xla"}
    assert set(told.pop("gated_sum")["refused"]) == {"mosaic_gpu"}
    for operation, entry in told.items():
        sentence = f"{operation} of bfloat16 takes no {seq_len} queries."
        assert entry["refused"]["triton"] == sentence


def test_dense_attention_and_the_oracle_are_told_as_well():
    told = record(model__attention="dense")
    assert set(told) == {"dense_attention"}
    assert told["dense_attention"]["chosen"] in ("cudnn", "xla")
    oracle = {"chosen": "reference", "refused": {}}
    assert record(implementation="reference") == dict.fromkeys(dispatch.OPERATIONS, oracle)


def test_dense_attention_is_told_with_the_mask_of_documents(monkeypatch):
    """cuDNN takes none of odd sizes."""

    def refusal(dtype, head_dim, *, odd_mask=False):
        return f"odd_mask={odd_mask}."

    monkeypatch.setattr(dense, "cudnn_refusal", refusal)
    odd = {"nsa__select_block_size": 5, "nsa__compress_block_size": 5, "nsa__compress_stride": 5}
    told = record(model__attention="dense", data__seq_len=35, **odd)
    assert told["dense_attention"]["refused"] == {"cudnn": "odd_mask=True."}
