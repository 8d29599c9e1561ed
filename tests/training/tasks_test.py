import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_jax.training import tasks
from nsa_jax.training.corpus import BOS, VOCAB_SIZE

SEEDS = st.integers(0, 2**32 - 1)


def _check_form(row, seq_len):
    """What holds for the rows of every task."""
    kinds = {name: (value.shape, value.dtype.name) for name, value in row.items()}
    assert kinds == {
        "tokens": ((seq_len,), "int32"),
        "targets": ((seq_len,), "int32"),
        "weights": ((seq_len,), "float32"),
        "document_starts": ((seq_len,), "int32"),
    }
    assert row["tokens"][0] == BOS
    assert (row["tokens"][1:] < BOS).all()
    assert row["tokens"].min() >= 0
    assert row["targets"].min() >= 0
    assert row["targets"].max() < VOCAB_SIZE
    assert set(np.unique(row["weights"])) <= {0, 1}
    assert not row["document_starts"].any()


def _rng(seed=0):
    return np.random.default_rng(seed)


@st.composite
def _recall_settings(draw):
    pair_tokens = draw(st.sampled_from([1, 2, 3]))
    pairs = draw(st.integers(1, 48))
    queries = draw(st.integers(1, pairs))
    needed = 1 + (pairs + queries) * pair_tokens - (pair_tokens > 1)
    return {
        "seq_len": needed + draw(st.integers(0, 20)),
        "pairs": pairs,
        "queries": queries,
        "pair_tokens": pair_tokens,
    }


@given(SEEDS, _recall_settings())
def test_recall_answers_follow_from_the_pairs(seed, settings):
    seq_len, pairs, queries, pair_tokens = settings.values()
    row = tasks.recall_row(_rng(seed), **settings)
    _check_form(row, seq_len)
    tokens = row["tokens"].tolist()
    predicted = np.flatnonzero(row["weights"])
    assert len(predicted) == queries
    context = tokens[1 : predicted[0] - max(pair_tokens - 2, 0)]

    answers = {}
    if pair_tokens == 1:
        for token in context:
            if token != tasks.BLANK:
                key, value = divmod(token, 4)
                assert key not in answers
                answers[193 + key,] = 241 + value
    else:
        # Pairs end where the queries begin; what is left over is blank.
        spare = len(context) % pair_tokens
        assert set(context[:spare]) <= {tasks.BLANK}
        for place in range(spare, len(context), pair_tokens):
            *key, value = context[place : place + pair_tokens]
            if value == tasks.BLANK:
                assert set(key) == {tasks.BLANK}
                continue
            assert max(key) < 128
            assert 128 <= value < 192
            assert tuple(key) not in answers
            answers[tuple(key)] = value
    assert len(answers) == pairs

    asked = []
    for position in predicted:
        asked.append(tuple(tokens[position + 1 - max(pair_tokens - 1, 1) : position + 1]))
        assert row["targets"][position] == answers[asked[-1]]
        if pair_tokens > 1 and position + 1 < seq_len:
            assert tokens[position + 1] == row["targets"][position]
    assert len(set(asked)) == queries


def test_recall_fills_the_row():
    row = tasks.recall_row(_rng(), 256, pairs=64, queries=64, pair_tokens=2)
    assert tasks.BLANK not in row["tokens"]
    np.testing.assert_array_equal(row["tokens"][1:], row["targets"][:-1])
    np.testing.assert_array_equal(np.flatnonzero(row["weights"]), np.arange(129, 256, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair_tokens": 4}, "task_pair_tokens=4 must be 1, 2 or 3"),
        ({"pairs": 129}, "task_pairs=129 must be from 1 to 128"),
        ({"pairs": 49, "pair_tokens": 1}, "task_pairs=49 must be from 1 to 48"),
        ({"pairs": 0}, "task_pairs=0 must be from 1"),
        ({"queries": 9}, "task_queries=9 must be from 1 to task_pairs=8"),
        ({"queries": 0}, "task_queries=0 must be from 1"),
        ({"seq_len": 23}, "need seq_len of at least 24, but seq_len=23"),
        ({"seq_len": 12, "pair_tokens": 1}, "need seq_len of at least 13, but seq_len=12"),
        ({"seq_len": 35, "pair_tokens": 3}, "need seq_len of at least 36, but seq_len=35"),
    ],
)
def test_recall_refuses(change, message):
    settings = {"seq_len": 24, "pairs": 8, "queries": 4, "pair_tokens": 2} | change
    with pytest.raises(ValueError, match=message):
        tasks.recall_row(_rng(), **settings)


@given(SEEDS, st.integers(6, 80), st.floats(-1, 1))
def test_needle_answer_follows_its_key(seed, seq_len, depth):
    row = tasks.needle_row(_rng(seed), seq_len, depth=depth)
    _check_form(row, seq_len)
    tokens = row["tokens"].tolist()
    np.testing.assert_array_equal(np.flatnonzero(row["weights"]), [seq_len - 1])
    needle, query = (place for place, token in enumerate(tokens) if token == tasks.MARK)
    assert query == seq_len - 2
    assert tokens[query + 1] == tokens[needle + 1]
    assert 64 <= tokens[query + 1] < 128
    assert row["targets"][-1] == tokens[needle + 2]
    assert 128 <= row["targets"][-1] < 192
    filler = tokens[1:needle] + tokens[needle + 3 : query]
    assert all(token < 64 for token in filler)


@pytest.mark.parametrize(("depth", "place"), [(0, 1), (0.5, 48), (1, 95)])
def test_needle_depth(depth, place):
    # T = 100: MARK, key, value at 1 to 95, and the query at 98 and 99.
    for seed in range(3):
        row = tasks.needle_row(_rng(seed), 100, depth=depth)
        assert row["tokens"][place] == tasks.MARK


def test_needle_at_random_depths_reaches_everywhere():
    rows = [tasks.needle_row(_rng(seed), 10, depth=-1) for seed in range(100)]
    assert {row["tokens"].tolist().index(tasks.MARK) for row in rows} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("seq_len", "depth", "message"),
    [
        (5, 0.5, "seq_len=5 must be at least 6"),
        (9, 1.5, r"task_depth=1.5 must be from 0 .* to 1"),
        (9, float("nan"), "task_depth=nan must be from 0"),
    ],
)
def test_needle_refuses(seq_len, depth, message):
    with pytest.raises(ValueError, match=message):
        tasks.needle_row(_rng(), seq_len, depth=depth)


@given(SEEDS, st.integers(3, 60))
def test_copy_repeats_what_stands_before_the_separator(seed, seq_len):
    row = tasks.copy_row(_rng(seed), seq_len)
    _check_form(row, seq_len)
    tokens = row["tokens"].tolist()
    separator = tokens.index(tasks.SEPARATOR)
    predicted = np.flatnonzero(row["weights"])
    np.testing.assert_array_equal(predicted, np.arange(separator, seq_len))
    first = [token for token in tokens[1:separator] if token != tasks.BLANK]
    assert len(first) == (seq_len - 1) // 2
    assert max(first) < 64
    assert row["targets"][predicted].tolist() == first
    assert tokens[separator + 1 :] == first[:-1]


def test_copy_refuses_a_row_too_short():
    with pytest.raises(ValueError, match="seq_len=2 must be at least 3"):
        tasks.copy_row(_rng(), 2)


def test_markov_entropy_by_hand():
    # Two symbols: 0 stays with 0.5, 1 stays with 0.75; the chain is at 0 for a third of the time.
    source = tasks.MarkovSource(_FixedMatrix([[0.5, 0.5], [0.25, 0.75]]), 2)
    np.testing.assert_allclose(source.stationary, [1 / 3, 2 / 3], rtol=1e-12)
    expected = (1 + 2 * (2 - 0.75 * np.log2(3))) / 3
    np.testing.assert_allclose(source.entropy_rate, expected, rtol=1e-12)


def test_markov_certain_successor_has_no_entropy():
    source = tasks.MarkovSource(_FixedMatrix([[0.0, 1.0], [1.0, 0.0]]), 2)
    assert source.entropy_rate == 0
    tokens = source.row(_rng(), 9)["tokens"].tolist()
    assert tokens[1:] in ([0, 1] * 4, [1, 0] * 4)


class _FixedMatrix:
    """Stands for the generator that draws the matrix."""

    def __init__(self, matrix):
        self._matrix = np.array(matrix)

    def dirichlet(self, concentration, size):
        assert self._matrix.shape == (size, len(concentration))
        return self._matrix


def test_markov_entropy_agrees_with_counts():
    states = 6
    source = tasks.MarkovSource(_rng(3), states)
    np.testing.assert_allclose(
        source.stationary @ source.transitions, source.stationary, atol=1e-12
    )
    np.testing.assert_allclose(source.stationary.sum(), 1, rtol=1e-12)
    counts = np.zeros((states, states))
    mean_loss = []
    for seed in range(40):
        row = source.row(_rng(seed), 5000)
        _check_form(row, 5000)
        np.testing.assert_array_equal(np.flatnonzero(row["weights"]), np.arange(1, 5000))
        before, after = row["tokens"][1:], row["targets"][1:]
        np.add.at(counts, (before, after), 1)
        mean_loss.append(-np.log2(source.transitions[before, after]).mean())
    share = counts / counts.sum()
    given_before = (counts / counts.sum(1, keepdims=True))[counts > 0]
    brute_force = -(share[counts > 0] * np.log2(given_before)).sum()
    # 200,000 draws whose information has a standard deviation of about 1 bit: 0.002 bits of error.
    np.testing.assert_allclose(brute_force, source.entropy_rate, atol=0.01)
    np.testing.assert_allclose(np.mean(mean_loss), source.entropy_rate, atol=0.01)
    np.testing.assert_allclose(share.sum(1), source.stationary, atol=0.01)


def test_markov_entropy_at_64_symbols_leaves_something_to_learn():
    assert 4.5 < tasks.MarkovSource(_rng(0), 64).entropy_rate < 5.5


@pytest.mark.parametrize("states", [1, 257])
def test_markov_refuses(states):
    with pytest.raises(ValueError, match=f"task_states={states} must be from 2 to 256"):
        tasks.MarkovSource(_rng(), states)
    with pytest.raises(ValueError, match="seq_len=1 must be at least 2"):
        tasks.MarkovSource(_rng(), 4).row(_rng(), 1)


def test_task_rows_depend_on_seed_stream_and_index_alone():
    def rows(seed, stream):
        return tasks.TaskRows(lambda rng: tasks.copy_row(rng, 33), seed, stream, 5)

    def tokens(seed, stream, index):
        return rows(seed, stream)[index]["tokens"].tobytes()

    assert len(rows(0, 0)) == 5
    assert tokens(1, 0, 3) == tokens(1, 0, 3)
    places = [(seed, stream, index) for seed in (0, 1) for stream in (0, 1) for index in range(5)]
    assert len({tokens(*place) for place in places}) == len(places)
