import collections
import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_jax.training.data import BOS, VOCAB_SIZE, DataConfig, PackedRows, make_pipeline

TASKS = ("recall", "needle", "copy", "markov")
KINDS = {"tokens": "int32", "targets": "int32", "weights": "float32", "document_starts": "int32"}


def _config(**changes):
    values = {
        "name": "copy",
        "path": "",
        "seq_len": 32,
        "batch_size": 8,
        "validation_fraction": 0.1,
        "task_validation_rows": 10,
        "task_pairs": 4,
        "task_queries": 2,
        "task_pair_tokens": 2,
        "task_depth": -1.0,
        "task_states": 8,
    }
    return DataConfig(**values | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty documents of 1 to 200 bytes."""
    root = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for index in range(60):
        length = rng.integers(1, 200)
        (root / f"{index:02d}.txt").write_bytes(bytes(rng.integers(97, 123, length, np.uint8)))
    return root


@pytest.fixture(params=["text", *TASKS])
def config(request, folder):
    """One configuration for every kind of data that needs no installed files."""
    return _config(name=request.param, path=str(folder) if request.param == "text" else "")


def _pipeline(config, **changes):
    return make_pipeline(config, **{"alignment": 4, "seed": 5} | changes)


def _assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def _pieces(row):
    """The bytes of the pieces in a row, read off the targets of weight 1."""
    starts = np.flatnonzero(row["tokens"] == BOS)
    for start, stop in zip(starts, [*starts[1:], len(row["tokens"])], strict=True):
        span = slice(start, stop)
        weights = row["weights"][span]
        size = int(weights.sum())
        assert (weights[:size] == 1).all()
        data = row["targets"][span][:size]
        np.testing.assert_array_equal(row["tokens"][start + 1 : start + 1 + size], data)
        assert (row["document_starts"][span] == start).all()
        assert not row["tokens"][start + 1 + size : stop].any()
        yield bytes(data.tolist())


def test_packing_by_hand():
    # Rows of 8 aligned to 4. "abcdefghi" is cut after 7 bytes; "hi" goes on in a row of its own,
    # where "jkl" finds room at 4; "m" opens a third row.
    rows = PackedRows([b"abcdefghi", b"jkl", b"m"], seq_len=8, alignment=4)
    expected = [
        ([BOS, *b"abcdefg"], [*b"abcdefg", 0], [1, 1, 1, 1, 1, 1, 1, 0], [0] * 8),
        (
            [BOS, *b"hi", 0, BOS, *b"jkl"],
            [*b"hi", 0, 0, *b"jkl", 0],
            [1, 1, 0, 0, 1, 1, 1, 0],
            [0, 0, 0, 0, 4, 4, 4, 4],
        ),
        ([BOS, *b"m", *[0] * 6], [*b"m", *[0] * 7], [1, *[0] * 7], [0] * 8),
    ]
    assert len(rows) == len(expected)
    for index, row in enumerate(expected):
        names = ("tokens", "targets", "weights", "document_starts")
        _assert_equal(rows[index], dict(zip(names, row, strict=True)))


def test_a_piece_goes_where_it_leaves_the_least_room():
    # Tokens with BOS: 5, 9, 4, 8 in rows of 16 aligned to 4, which take 8, 12, 4 and 8. The third
    # fits both open rows and goes to the fuller one, so that the fourth fits the other.
    rows = PackedRows([b"aaaa", b"b" * 8, b"ccc", b"d" * 7], seq_len=16, alignment=4)
    assert [list(_pieces(row)) for row in (rows[0], rows[1])] == [
        [b"aaaa", b"d" * 7],
        [b"b" * 8, b"ccc"],
    ]
    assert len(rows) == 2


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=25),
    st.integers(2, 40),
    st.integers(1, 20),
)
def test_packing_predicts_every_byte_once(lengths, seq_len, alignment):
    rng = np.random.default_rng(sum(lengths))
    documents = [bytes(rng.integers(256, size=length, dtype=np.uint8)) for length in lengths]
    rows = PackedRows(documents, seq_len, alignment)
    expected = collections.Counter(
        document[first : first + seq_len - 1]
        for document in documents
        for first in range(0, len(document), seq_len - 1)
    )
    packed = collections.Counter()
    for row in (rows[index] for index in range(len(rows))):
        kinds = {name: (value.shape, value.dtype.name) for name, value in row.items()}
        assert kinds == {name: ((seq_len,), kind) for name, kind in KINDS.items()}
        assert row["tokens"][0] == BOS
        assert row["tokens"].max() < VOCAB_SIZE
        assert not (row["document_starts"] % alignment).any()
        packed.update(_pieces(row))
    assert packed == expected


def test_an_epoch_predicts_every_byte_once(folder):
    config = _config(name="text", path=str(folder), batch_size=1)
    pipeline = _pipeline(config)
    rows = PackedRows(pipeline.train_documents, config.seq_len, 4)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * len(rows), (epoch + 1) * len(rows))
        batches = [pipeline.train[step] for step in steps]
        epochs.append([batch["tokens"].tobytes() for batch in batches])
        pieces = collections.Counter(
            piece
            for batch in batches
            for piece in _pieces({name: value[0] for name, value in batch.items()})
        )
        assert pieces == collections.Counter(
            document[first : first + 31]
            for document in pipeline.train_documents
            for first in range(0, len(document), 31)
        )
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_training_and_validation_text_do_not_overlap(folder):
    pipeline = _pipeline(_config(name="text", path=str(folder)))
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    both = pipeline.train_documents + pipeline.validation_documents
    assert collections.Counter(both) == collections.Counter(files)
    assert pipeline.validation_documents
    assert not set(pipeline.train_documents) & set(pipeline.validation_documents)


def test_batch_is_a_pure_function_of_seed_and_step(config):
    one, two = _pipeline(config), _pipeline(config)
    in_order = {step: one.train[step] for step in (0, 1, 7, 100, 10**6)}
    for step in (10**6, 7, 0, 100, 1, 7):
        _assert_equal(two.train[step], in_order[step])
    assert not np.array_equal(in_order[0]["tokens"], in_order[1]["tokens"])
    kinds = {name: (value.shape, value.dtype.name) for name, value in in_order[0].items()}
    assert kinds == {name: ((8, 32), kind) for name, kind in KINDS.items()}


def test_seeds_differ(config):
    one, two = _pipeline(config, seed=1), _pipeline(config, seed=2)
    assert not np.array_equal(one.train[0]["tokens"], two.train[0]["tokens"])
    if config.name == "text":  # the seed orders the rows, it does not choose them
        assert one.fingerprint == two.fingerprint
        _assert_equal(one.validation[0], two.validation[0])
    else:
        assert one.fingerprint != two.fingerprint
        assert not np.array_equal(one.validation[0]["tokens"], two.validation[0]["tokens"])


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_shards_together_are_the_batch_of_one_process(config, process_count):
    whole = _pipeline(config)
    shards = [
        _pipeline(config, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    assert {len(shard.validation) for shard in shards} == {len(whole.validation)}
    for part in ("train", "validation"):
        for step in range(len(whole.validation) if part == "validation" else 6):
            expected = getattr(whole, part)[step]
            batches = [getattr(shard, part)[step] for shard in shards]
            assert {len(batch["tokens"]) for batch in batches} == {8 // process_count}
            # Row i of the global batch is with process i % process_count.
            together = {
                name: np.stack([batch[name] for batch in batches], axis=1).reshape(8, 32)
                for name in expected
            }
            _assert_equal(together, expected)


def test_validation_is_finite_and_filled_up(config):
    pipeline = _pipeline(config)
    batches = [pipeline.validation[index] for index in range(len(pipeline.validation))]
    weights = np.concatenate([batch["weights"] for batch in batches]).sum(axis=1)
    if config.name == "text":
        rows = PackedRows(pipeline.validation_documents, 32, 4)
        count, predicted = len(rows), sum(map(len, pipeline.validation_documents))
        assert weights.sum() == predicted
        found = [row.tobytes() for batch in batches for row in batch["tokens"]][:count]
        assert sorted(found) == sorted(rows[index]["tokens"].tobytes() for index in range(count))
    else:
        count = 10
    assert count % 8, "the last batch would need no filling up"
    assert len(weights) == -(-count // 8) * 8
    assert (weights[:count] > 0).all()
    assert not weights[count:].any()
    assert not any(value[count % 8 :].any() for value in batches[-1].values())
    _assert_equal(_pipeline(config).validation[0], batches[0])


@pytest.mark.parametrize("name", TASKS)
def test_training_and_validation_rows_of_a_task_differ(name):
    pipeline = _pipeline(_config(name=name, task_validation_rows=8))
    train = {row.tobytes() for step in range(8) for row in pipeline.train[step]["tokens"]}
    assert len(train) == 64
    assert not train & {row.tobytes() for row in pipeline.validation[0]["tokens"]}
    assert pipeline.train_documents == pipeline.validation_documents == ()


def test_a_single_row_of_text_is_repeated(tmp_path):
    for index in range(2):
        (tmp_path / f"{index}.txt").write_bytes(b"0123456789" * 3)
    config = _config(name="text", path=str(tmp_path), batch_size=2, seq_len=31)
    batch = _pipeline(config).train[3]
    np.testing.assert_array_equal(batch["tokens"], [[BOS, *b"0123456789" * 3]] * 2)


def test_fingerprints_tell_data_apart(folder):
    pipelines = [_pipeline(_config(name=name)) for name in TASKS]
    pipelines.append(_pipeline(_config(name="text", path=str(folder))))
    pipelines.append(_pipeline(_config(name="copy", seq_len=33)))
    pipelines.append(_pipeline(_config(name="recall", task_queries=3)))
    assert len({pipeline.fingerprint for pipeline in pipelines}) == len(pipelines)
    # How rows are batched is not a property of the data, nor are settings that a task ignores.
    same = _pipeline(_config(name="recall", batch_size=4, task_states=9))
    assert same.fingerprint == _pipeline(_config(name="recall")).fingerprint


def test_text_fingerprint_is_the_documented_digest(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 40)
    (tmp_path / "b.txt").write_bytes(b"y" * 41)
    digest = hashlib.sha256(b"a.txt\x0040\0" + b"x" * 40 + b"b.txt\x0041\0" + b"y" * 41)
    assert _pipeline(_config(name="text", path=str(tmp_path))).fingerprint == digest.hexdigest()


def test_perfect_bits_and_descriptions(folder):
    text = _pipeline(_config(name="text", path=str(folder)))
    assert text.perfect_bits is None
    assert f"the folder {folder.name}" in text.description
    assert "\n" not in text.description
    assert _pipeline(_config(name="needle")).perfect_bits == 0
    markov = _pipeline(_config(name="markov"))
    assert 0 < markov.perfect_bits < 3
    assert f"{markov.perfect_bits:.4f} bits" in markov.description


def test_markov_matrix_is_the_same_for_training_and_validation():
    # 8 symbols: what follows each of them, counted on both sides.
    pipeline = _pipeline(_config(name="markov", seq_len=2000, task_validation_rows=8))
    tables = []
    for batch in (pipeline.train[0], pipeline.validation[0]):
        table = np.zeros((8, 8))
        np.add.at(table, (batch["tokens"][:, 1:], batch["targets"][:, 1:]), 1)
        tables.append(table / table.sum(axis=1, keepdims=True))
    # 16,000 pairs: at a symbol with a share of 2% an error of 0.03 for each table.
    np.testing.assert_allclose(tables[0], tables[1], atol=0.15)


def test_standard_library():
    pipeline = make_pipeline(_config(name="stdlib", seq_len=512), alignment=16, seed=0)
    assert "the standard library of Python" in pipeline.description
    rows = PackedRows(pipeline.train_documents, 512, 16)
    predicted = sum(map(len, pipeline.train_documents))
    # Measured on Python 3.12: padding, BOS not counted in, takes 0.3%.
    assert predicted / (len(rows) * 512) > 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "stdlb"}, r"name='stdlb' must be one of \('stdlib', 'text', 'recall'"),
        ({"name": "text"}, "name='text' needs path"),
        ({"path": "a.txt"}, "path='a.txt' is read with name='text' only, but name='copy'"),
        ({"path": None}, "path=None must be of type str"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"seq_len": 32.0}, "seq_len=32.0 must be of type int"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": True}, "batch_size=True must be of type int"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 must be a number above 0"),
        ({"validation_fraction": "0.1"}, "validation_fraction='0.1' must be of type float"),
        ({"task_validation_rows": 0}, "task_validation_rows=0 must be at least 1"),
        ({"name": "recall", "task_pairs": 40}, "need seq_len of at least 84, but seq_len=32"),
        ({"name": "needle", "task_depth": 2.0}, "task_depth=2.0 must be from 0"),
        ({"name": "needle", "task_depth": None}, "task_depth=None must be of type float"),
        ({"name": "copy", "seq_len": 2}, "seq_len=2 must be at least 3 for the copy task"),
        ({"name": "markov", "task_states": 1}, "task_states=1 must be from 2 to 256"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        _config(**changes)


def test_settings_of_other_tasks_are_not_checked():
    assert _config(name="copy", task_states=0, task_pairs=10**6).task_states == 0


def test_config_is_frozen_and_has_no_defaults():
    assert all(
        field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        for field in dataclasses.fields(DataConfig)
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        _config().seq_len = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment": 0}, "alignment=0 must be at least 1"),
        ({"seed": -1}, r"seed=-1 must be from 0 to 2\*\*32 - 1"),
        ({"seed": 2**32}, "seed=4294967296 must be"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 must be from 0 to .* 1"),
        ({"process_count": 3}, "batch_size=8 must be a multiple of process_count=3"),
    ],
)
def test_pipeline_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        _pipeline(_config(), **changes)


def test_too_little_text_for_a_row(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"bytes to train on, less than one row of seq_len=32"):
        _pipeline(_config(name="text", path=str(tmp_path)))
