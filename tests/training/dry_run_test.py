import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_jax.config import NSAConfig
from nsa_jax.training import dry_run
from tests.training import tiny_run


@given(
    stride=st.integers(1, 4),
    overlap=st.integers(1, 3),
    blocks=st.integers(1, 3),
    selected=st.integers(3, 6),
    window=st.integers(1, 40),
    length=st.integers(1, 70),
)
def test_keys_attended_against_counting_one_by_one(
    stride, overlap, blocks, selected, window, length
):
    nsa = NSAConfig(
        compress_block_size=stride * overlap,
        compress_stride=stride,
        select_block_size=stride * overlap * blocks,
        num_selected_blocks=selected,
        window_size=window,
    )
    counts = dict.fromkeys(("compressed", "selected", "window", "full"), 0)
    for t in range(length):
        counts["full"] += t + 1
        counts["window"] += sum(t - window < j <= t for j in range(length))
        counts["compressed"] += sum(
            i * stride + nsa.compress_block_size - 1 <= t for i in range(length)
        )
        size = nsa.select_block_size
        chosen = {*range(min(t // size, selected - 1)), t // size}
        counts["selected"] += sum(j // size in chosen for j in range(t + 1))
    expected = {name: count / length for name, count in counts.items()}
    assert dry_run.keys_attended(nsa, length) == pytest.approx(expected)


def test_attention_lines_say_whether_it_pays():
    nsa = NSAConfig()
    # About T/32 compressed keys, 16 * 64 selected and 512 of the window, against T/2.
    assert "NSA attends 15.3% of the keys" in "\n".join(dry_run.attention_lines(nsa, 32768, "nsa"))
    short = "\n".join(dry_run.attention_lines(nsa, 512, "nsa"))
    assert "times the keys of full attention at this length" in short
    (dense,) = dry_run.attention_lines(nsa, 512, "dense")
    assert dense == "attention at T=512: 256.5 keys a query, full attention"


def test_the_report_of_a_run():
    settings = tiny_run.settings(model__attention="dense")
    report = dry_run.report(settings)
    # Embedding 257 * 16, three norms of 16, MLP 3 * 16 * 16, attention 16 * (16 + 8 + 8 + 16).
    parameters = 257 * 16 + 3 * 16 + 3 * 16 * 16 + 16 * (16 + 8 + 8 + 16)
    assert report.startswith(f"parameters: {parameters:,}\n")
    assert "16.5 keys a query" in report
    memory = float(report.split("temporaries")[1].split("MiB")[0])
    assert memory > 0


def test_more_rows_take_more_memory():
    def temporaries(rows):
        settings = tiny_run.settings(model__attention="dense", data__batch_size=rows)
        report = dry_run.report(settings)
        return float(report.split("temporaries")[1].split("MiB")[0].replace(",", ""))

    assert temporaries(512) > 4 * temporaries(64)


def test_a_field_of_the_geometry_matters():
    nsa = NSAConfig()
    fewer = dataclasses.replace(nsa, num_selected_blocks=4)
    before, after = (dry_run.keys_attended(config, 8192) for config in (nsa, fewer))
    assert after["selected"] < before["selected"] / 3
    assert after["compressed"] == before["compressed"]
