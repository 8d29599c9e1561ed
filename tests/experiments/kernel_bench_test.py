"""The benchmark end to end on a CPU at a tiny shape, and what it computes beside the times."""

import contextlib
import csv
import dataclasses
import importlib.util
import itertools
import json
import types

import chex
import jax
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver
from matplotlib import image

from experiments import kernel_bench, kernel_sweep, peers, timing
from nsa_jax.config import NSAConfig
from nsa_jax.ops import dense
from tests.arg_specs import BENCHMARK, ArgSpec

SPEC = ArgSpec(2, 77, 6, 2, 8, 16, NSAConfig(8, 4, 16, num_selected_blocks=3, window_size=20))


@pytest.fixture
def run():
    """Runs the benchmark's main with the given flags."""

    def run(*arguments):
        with flagsaver.flagsaver():
            kernel_bench.main(flags.FLAGS(["kernel_bench", *arguments]))

    return run


def test_it_measures_and_writes(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-3)
    names = "select_blocks,selected_overlap,nsa,dense_cudnn"
    output = tmp_path / "results" / "kernels_v1.2"
    run(
        *("--implementation=xla", "--shapes=tiny", "--lengths=64", f"--only={names}"),
        *("--repeats=2", f"--output={output}"),
    )
    with open(f"{output}.csv", newline="") as file:
        rows = {(row["operation"], row["pass"]): row for row in csv.DictReader(file)}
    assert tuple(rows["nsa", "forward"]) == kernel_bench.COLUMNS
    timed = [(name, which) for name in names.split(",") for which in ("forward", "backward")]
    timed.remove(("select_blocks", "backward"))
    assert list(rows) == timed
    record = json.loads((tmp_path / "results" / "kernels_v1.2.json").read_text())
    reasons = {(x["operation"], x["pass"]): x.get("reason") for x in record["cases"]}
    for key, row in rows.items():
        if jax.default_backend() == "cpu" and key[0] == "dense_cudnn":
            assert row["ms"] == ""
            assert "cuDNN needs an NVIDIA GPU" in reasons[key]
            continue
        assert all(float(row[x]) > 0 for x in kernel_bench.COLUMNS[4:])
        assert reasons[key] is None
    assert record["nsa_forward_and_backward_temporary_mib"]["tiny"]["64"] > 0
    assert min(record["ceilings"].values()) > 0
    assert (tmp_path / "results" / "kernels_v1.2.png").exists()
    assert "select_blocks" in capsys.readouterr().out


def test_mistakes_are_sentences(run):
    for flag, sentence in {
        "--shapes=huge": "'huge' is none of paper",
        "--only=windows": "'windows' is none of compressed",
        "--lengths=4k": "'4k' is no number of tokens",
        "--peers=flash": "'flash' is none of fla, xunhao",
    }.items():
        with pytest.raises(Exception, match=sentence):
            run("--implementation=xla", flag)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels may run here")
def test_a_refusal_ends_the_run_with_its_sentence(run):
    with pytest.raises(SystemExit, match=r"implementation='triton': .*triton"):
        run("--implementation=triton")


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="fla is installed")
def test_a_peer_that_is_not_there_ends_the_run_with_its_sentence(run):
    with pytest.raises(
        SystemExit, match=r"--peers=fla: .*pip install torch flash-linear-attention"
    ):
        run("--implementation=xla", "--shapes=tiny", "--peers=fla")


def test_a_peer_is_timed_on_the_same_arrays(run, tmp_path, monkeypatch):
    """One that is ours in another's clothes differs by nothing; what is not ours is left out."""

    def selected(spec, arrays):
        case = timing.cases(spec, "xla")["selected"]
        function = jax.jit(case.function)
        return lambda: function(*(arrays[x] for x in case.arguments)), []

    operations = {"selected": selected, "selected_overlap": selected}
    monkeypatch.setitem(peers.PEERS, "twin", peers.Peer("json", "", operations))
    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(synchronize=lambda: None, empty_cache=lambda: None),
        no_grad=contextlib.nullcontext,
    )
    monkeypatch.setattr(peers, "_torch", lambda: torch)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-3)
    run(
        *("--implementation=xla", "--shapes=tiny", "--lengths=64", "--only=selected"),
        *("--repeats=2", "--peers=twin", f"--output={tmp_path / 'twins'}"),
    )
    record = json.loads((tmp_path / "twins.json").read_text())
    assert record["peers"]["json"] == json.__version__
    rows = record["cases"]
    assert [(x["operation"], x["pass"]) for x in rows[2:]] == [("selected_twin", "forward")]
    assert rows[2]["difference"] == 0
    assert rows[2]["floor_ms"] == rows[0]["floor_ms"]


def test_a_peer_is_not_timed_with_what_it_does_not_compute():
    spec = BENCHMARK["paper_192"]
    operations = list(peers.PEERS["xunhao"].operations)
    rows = list(peers.measure("xunhao", operations, spec, {}, {}, 1))
    assert [row["operation"] for row in rows] == operations
    for row in rows:
        assert "as many features in v as in k, not 128 and 192" in row["result"]


def test_blocks_of_neighbouring_queries_overlap():
    spec = dataclasses.replace(BENCHMARK["paper"], length=16384, num_heads=32, num_kv_heads=2)
    blocks = np.asarray(timing.overlapping_blocks(spec))
    assert blocks.shape == (1, 16384, 2, 16)
    own = (np.arange(16384) // 64)[:, None, None]
    assert ((blocks >= -1) & (blocks <= own)).all()
    for forced in (0, own - 1, own):
        assert (blocks == np.maximum(forced, 0)).any(axis=3).all()
    shared = []
    for before, after in itertools.pairwise(blocks[0, :, 0].tolist()):
        chosen, earlier = (set(x) - {-1} for x in (after, before))
        assert len(chosen) == 16 - after.count(-1), "distinct"
        shared.append(len(chosen & earlier) / len(chosen))
    # Of 16 blocks, 13 are drawn anew every fourth query: 3.25 / 16 change, less those drawn twice.
    assert 0.79 < np.mean(shared[8192:]) < 0.83


def test_useful_flop_are_those_of_the_visible_pairs():
    blocks = jax.random.randint(jax.random.key(0), (2, 77, 2, 3), -1, 5)
    counted = kernel_bench.visible_pairs(SPEC, {"selected": blocks})
    t, j = np.arange(77)[:, None], np.arange(77)
    complete = np.arange(18) * 4 + 7 <= t
    chosen = (np.asarray(blocks)[..., None] == j // 16).sum(-2) * (j <= t)[:, None]
    assert counted == {
        "compressed": 12 * complete.sum(),
        "window": 12 * ((j <= t) & (j > t - 20)).sum(),
        "dense": 12 * (j <= t).sum(),
        "selected": 3 * chosen.sum(),  # heads a group
    }
    for name in ("window", "window_cudnn"):
        flop = kernel_bench.useful_flop(name, SPEC, counted)
        assert flop["forward"] == counted["window"] * 2 * (8 + 16)
        assert flop["backward"] == counted["window"] * 2 * (3 * 8 + 2 * 16)
    parts = [kernel_bench.useful_flop(x, SPEC, counted) for x in kernel_bench.BRANCHES]
    whole = kernel_bench.useful_flop("nsa", SPEC, counted)
    assert whole["forward"] == sum(x["forward"] for x in parts)
    assert whole["backward"] == sum(x.get("backward", 0) for x in parts)


def test_break_even_lies_between_measured_lengths():
    lengths = [1024, 2048, 4096]
    linear = {x: 3.0 * x for x in lengths}
    for crossing in (1500, 2048, 4000):
        quadratic = {x: 3.0 * x**2 / crossing for x in lengths}
        assert kernel_bench.break_even(linear, quadratic) == crossing
    assert kernel_bench.break_even(linear, {x: 4.0 * x for x in lengths}) == "below 1024"
    assert kernel_bench.break_even(linear, {x: 2.0 * x for x in lengths}) == "not reached"
    assert kernel_bench.break_even(linear, {}) == "not measured"


def test_both_passes_add_up_where_both_were_timed():
    rows = [
        {"shape": "tiny", "length": length, "operation": "nsa", "pass": which, **ms}
        for length, which, ms in (
            (1, "forward", {"ms": 2.0}),
            (1, "backward", {"ms": 3.0}),
            (2, "forward", {"ms": 4.0}),
            (2, "backward", {"reason": "no memory"}),
        )
    ]
    assert kernel_bench.times(rows, "tiny", "nsa", "forward") == {1: 2.0, 2: 4.0}
    assert kernel_bench.times(rows, "tiny", "nsa", "both") == {1: 5.0}


def test_bars_are_drawn_where_both_were_timed(tmp_path):
    names = ("nsa", "selected", "dense_triton", "dense_cudnn")
    rows = [
        {"shape": shape, "length": 4096, "operation": name, "pass": "forward", "ms": 1.0 + i}
        for shape in ("paper", "gqa")
        for i, name in enumerate(names)
        if (shape, name) != ("gqa", "dense_cudnn")
    ]
    kernel_bench.draw(rows, "triton", tmp_path / "bars.png")
    assert image.imread(tmp_path / "bars.png").std() > 0


def test_own_dense_attention_and_its_pull():
    """The dense case is causal attention, and what is timed as its backward is its gradient."""
    spec = dataclasses.replace(SPEC, length=19)
    case = timing.cases(spec, "xla")["dense_xla"]
    arrays = jax.jit(timing.inputs(spec, "xla", ()))()
    q, kv, cotangent = jax.tree.map(
        lambda x: x.astype("float32"), (arrays["q"], arrays["selected"], arrays["cotangent"])
    )
    pull = timing.trace_pull(case, (q, kv))
    backward = timing.trace_backward(pull.out_info, cotangent)
    functions = timing.compiled({"pull": pull, "backward": backward, "none": "no memory"})
    gradients = functions["backward"](functions["pull"](q, kv), cotangent)
    expected = jax.jit(
        lambda q, kv: jax.vjp(lambda q, kv: dense.dense_attention(q, *kv), q, kv)[1](cotangent)
    )(q, kv)
    chex.assert_trees_all_close(gradients, expected, atol=1e-5)
    assert functions["none"] == "no memory"


def test_a_sweep_wants_keys_that_launch_the_kernel():
    for kernel, keys in [
        ("interval_forward", "dense"),
        ("interval_dq_short", "window"),
        ("interval_dkv", "window"),
        ("select_blocks", "dense"),
    ]:
        kernel_sweep.check(kernel, keys)
    for kernel, keys in [("interval_dq_short", "dense"), ("interval_forward", "window")]:
        with pytest.raises(app.UsageError, match="windows, and nothing else"):
            kernel_sweep.check(kernel, keys)
    for kernel in ("step", "step_selected"):
        with pytest.raises(app.UsageError, match="is launched by a decoding step"):
            kernel_sweep.check(kernel, "dense")
    with pytest.raises(app.UsageError, match="is none of interval_forward"):
        kernel_sweep.check("attention", "dense")


def test_candidates_of_a_sweep():
    text = "rows:64,128; keys:32; num_warps:4 ;num_stages:2,3"
    candidates = kernel_sweep.parse(text)
    assert len(candidates) == 4
    assert candidates[1] == {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 3}
    with pytest.raises(ValueError, match="must give values for each of rows, keys"):
        kernel_sweep.parse("rows:64")
    with pytest.raises(ValueError, match="'x' is no positive integer"):
        kernel_sweep.parse(text.replace("32", "x"))
