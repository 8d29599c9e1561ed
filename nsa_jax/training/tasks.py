"""Synthetic tasks: rows made from a random generator, whose right answers are known.

Every row is one document: a dict of tokens, targets, document_starts (int32 [T]) and weights
(float32 [T], 1 where the target is to be predicted, else 0). It starts with BOS, and where a task
needs fewer than T tokens, BLANK fills the rest. Scores are bits a predicted target.
"""

import bisect
import math
from collections.abc import Callable

import numpy as np

from nsa_jax.training.corpus import BOS

Row = dict[str, np.ndarray]

# Recall and needle: keys, values and fillers are drawn from disjoint ranges of ids.
RECALL_KEYS = 128  # ids 0 to 127
NEEDLE_FILLERS = 64  # ids 0 to 63
NEEDLE_KEYS = range(64, 128)
VALUES = range(128, 192)
BLANK = 192
MARK = 193
SEPARATOR = 194
COPY_SYMBOLS = 64  # ids 0 to 63

# Recall with key and value in one token: ids 4 * key + value, then BLANK, queries and answers.
FUSED_KEYS = 48
FUSED_VALUES = 4
FUSED_QUERIES = range(193, 193 + FUSED_KEYS)
FUSED_ANSWERS = range(241, 241 + FUSED_VALUES)

# Rows of the Markov source's matrix are drawn from a symmetric Dirichlet distribution: uneven
# enough that a model has much to learn (about 1 bit of 6 with 64 symbols).
_MARKOV_CONCENTRATION = 0.5


def check_recall(seq_len: int, pairs: int, queries: int, pair_tokens: int) -> None:
    """Raises a ValueError if `recall_row` cannot lay these settings out; see there."""
    if pair_tokens not in (1, 2, 3):
        raise ValueError(f"task_pair_tokens={pair_tokens!r} must be 1, 2 or 3")
    keys = {1: FUSED_KEYS, 2: RECALL_KEYS, 3: RECALL_KEYS**2}[pair_tokens]
    if not 1 <= pairs <= keys:
        raise ValueError(
            f"task_pairs={pairs} must be from 1 to {keys}, the different keys that "
            f"task_pair_tokens={pair_tokens} has"
        )
    if not 1 <= queries <= pairs:
        raise ValueError(f"task_queries={queries} must be from 1 to task_pairs={pairs}")
    # The value of the last query is only ever a target, so it needs no room.
    needed = 1 + (pairs + queries) * pair_tokens - (pair_tokens > 1)
    if needed > seq_len:
        raise ValueError(
            f"task_pairs={pairs} and task_queries={queries} at task_pair_tokens={pair_tokens} need "
            f"seq_len of at least {needed}, but seq_len={seq_len}"
        )


def recall_row(
    rng: np.random.Generator, seq_len: int, *, pairs: int, queries: int, pair_tokens: int
) -> Row:
    """Multi-query associative recall: pairs of a key and a value, then queries for their values.

    Pairs stand at random among the places that the queries leave at the end of the row, which they
    fill if there are that many, and no key occurs twice. The queries ask for different pairs. A
    pair takes `pair_tokens` tokens:

    - 1: key and value fused in one of 48 * 4 tokens; the query is a token of its own, and the
      target at its position is one of 4 answer tokens. One layer of attention can solve it.
    - 2: key, value; a query is the key, answered by and followed by the value. 128 keys, 64
      values. Attention must find what came after an earlier token, which takes two layers.
    - 3: two key tokens, value; queries likewise. 128 * 128 keys, for rows of more than 128 pairs.

    A perfect model scores 0 bits (accuracy 1). Chance, for one that knows the layout but not the
    pairs, is log2(64) = 6 bits (accuracy 1/64); with one token a pair 2 bits (accuracy 1/4).

    Args:
      rng: what is drawn, and nothing else, depends on it.
      seq_len: T.
      pairs: how many pairs, at most as many as there are keys.
      queries: how many of them are asked for, and so the number of targets with weight 1.
      pair_tokens: 1, 2 or 3.

    Raises:
      ValueError: if a number is out of range or the row is too short.
    """
    check_recall(seq_len, pairs, queries, pair_tokens)
    if pair_tokens == 1:
        return _fused_recall_row(rng, seq_len, pairs, queries)
    keys = rng.choice(RECALL_KEYS ** (pair_tokens - 1), pairs, replace=False)
    cells = np.empty((pairs, pair_tokens), np.int32)
    for digit in range(pair_tokens - 1):
        cells[:, digit] = keys // RECALL_KEYS**digit % RECALL_KEYS
    cells[:, -1] = rng.integers(VALUES.start, VALUES.stop, pairs)

    sequence = np.full(seq_len + 1, BLANK, np.int32)
    sequence[0] = BOS
    queries_start = seq_len + 1 - queries * pair_tokens
    places = (queries_start - 1) // pair_tokens
    context = sequence[queries_start - places * pair_tokens : queries_start]
    context.reshape(places, pair_tokens)[_places(rng, places, pairs)] = cells
    sequence[queries_start:] = cells[rng.choice(pairs, queries, replace=False)].reshape(-1)
    predicted = queries_start + np.arange(queries) * pair_tokens + pair_tokens - 2
    return _row(sequence[:-1], sequence[1:], predicted)


def _fused_recall_row(rng: np.random.Generator, seq_len: int, pairs: int, queries: int) -> Row:
    keys = rng.choice(FUSED_KEYS, pairs, replace=False)
    values = rng.integers(FUSED_VALUES, size=pairs)
    asked = rng.choice(pairs, queries, replace=False)
    tokens = np.full(seq_len, BLANK, np.int32)
    tokens[0] = BOS
    places = seq_len - 1 - queries
    tokens[1 + _places(rng, places, pairs)] = keys * FUSED_VALUES + values
    tokens[1 + places :] = FUSED_QUERIES.start + keys[asked]
    targets = np.roll(tokens, -1)
    targets[1 + places :] = FUSED_ANSWERS.start + values[asked]
    return _row(tokens, targets, np.arange(1 + places, seq_len))


def check_needle(seq_len: int, depth: float) -> None:
    """Raises a ValueError if `needle_row` cannot lay these settings out; see there."""
    if seq_len < 6:
        raise ValueError(f"seq_len={seq_len} must be at least 6 for the needle task")
    if not depth <= 1:
        raise ValueError(
            f"task_depth={depth} must be from 0 (start) to 1 (end), or negative for a random depth "
            "in each row"
        )


def needle_row(rng: np.random.Generator, seq_len: int, *, depth: float) -> Row:
    """A needle in filler: one [MARK key value] among 64 symbols, asked for by a last [MARK key].

    The one target with weight 1 is the value, at the last position. A perfect model scores 0 bits
    (accuracy 1); chance is log2(64) = 6 bits (accuracy 1/64).

    Args:
      rng: what is drawn, and nothing else, depends on it.
      seq_len: T, at least 6.
      depth: where the needle stands: 0 is right after BOS, 1 right before the query; drawn for
        each row if negative.

    Raises:
      ValueError: if depth is above 1 or the row is too short.
    """
    check_needle(seq_len, depth)
    sequence = rng.integers(NEEDLE_FILLERS, size=seq_len + 1, dtype=np.int32)
    key = rng.integers(NEEDLE_KEYS.start, NEEDLE_KEYS.stop)
    value = rng.integers(VALUES.start, VALUES.stop)
    last = seq_len - 5  # the last start that leaves room for the needle and the query
    start = 1 + round(depth * (last - 1)) if depth >= 0 else rng.integers(1, last + 1)
    sequence[0] = BOS
    sequence[start : start + 3] = sequence[-3:] = MARK, key, value
    return _row(sequence[:-1], sequence[1:], [seq_len - 1])


def check_copy(seq_len: int) -> None:
    """Raises a ValueError if a row is too short to copy one symbol."""
    if seq_len < 3:
        raise ValueError(f"seq_len={seq_len} must be at least 3 for the copy task")


def copy_row(rng: np.random.Generator, seq_len: int) -> Row:
    """Copying: (T - 1) // 2 symbols of 64, SEPARATOR, the same symbols again.

    The targets with weight 1 are the second copy. A perfect model scores 0 bits (accuracy 1);
    chance is log2(64) = 6 bits (accuracy 1/64).

    Args:
      rng: what is drawn, and nothing else, depends on it.
      seq_len: T, at least 3.

    Raises:
      ValueError: if the row is too short.
    """
    check_copy(seq_len)
    length = (seq_len - 1) // 2
    symbols = rng.integers(COPY_SYMBOLS, size=length, dtype=np.int32)
    sequence = np.full(seq_len + 1, BLANK, np.int32)
    sequence[0] = BOS
    sequence[-2 * length - 1 : -length - 1] = symbols
    sequence[-length - 1] = SEPARATOR
    sequence[-length:] = symbols
    return _row(sequence[:-1], sequence[1:], np.arange(seq_len - length, seq_len))


def check_markov(seq_len: int, states: int) -> None:
    """Raises a ValueError if `MarkovSource` has no rows of these settings."""
    if not 2 <= states <= BOS:
        raise ValueError(f"task_states={states} must be from 2 to {BOS}, the ids below BOS")
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len} must be at least 2 for the markov task")


class MarkovSource:
    """Symbols each of which depends on the one before it, by a random transition matrix.

    A perfect model scores `entropy_rate` bits in the mean over rows; chance, for one that knows
    nothing, is log2(states) bits. The first symbol is drawn from the stationary distribution and
    has weight 0, so that the mean is exact for rows of any length.

    Attributes:
      transitions: float64 [states, states]; row i holds the probabilities of what follows i.
      stationary: float64 [states], the share of each symbol in the long run.
      entropy_rate: bits a symbol given the one before it.
    """

    def __init__(self, rng: np.random.Generator, states: int):
        """Draws the transition matrix.

        Args:
          rng: decides the matrix; rows are drawn with generators of their own.
          states: symbols, ids 0 to states - 1; from 2 to 256.
        """
        check_markov(2, states)
        self.transitions = rng.dirichlet(np.full(states, _MARKOV_CONCENTRATION), states)
        # stationary (transitions - 1) = 0 and its sum = 1.
        equations = np.vstack([self.transitions.T - np.eye(states), np.ones(states)])
        self.stationary = np.linalg.lstsq(equations, np.append(np.zeros(states), 1))[0]
        logs = np.log2(self.transitions, where=self.transitions > 0, out=np.zeros((states, states)))
        self.entropy_rate = float(-self.stationary @ (self.transitions * logs).sum(axis=1))
        # A cumulative sum that rounds to less than 1 must not let a draw fall off its end.
        self._start = [*np.cumsum(self.stationary)[:-1].tolist(), math.inf]
        self._next = [[*row, math.inf] for row in np.cumsum(self.transitions, 1)[:, :-1].tolist()]

    def row(self, rng: np.random.Generator, seq_len: int) -> Row:
        """Draws T symbols; the targets with weight 1 are all but the first of them."""
        check_markov(seq_len, len(self.stationary))
        sequence = [BOS]
        cumulative = self._start
        for draw in rng.random(seq_len).tolist():
            sequence.append(bisect.bisect_right(cumulative, draw))
            cumulative = self._next[sequence[-1]]
        sequence = np.array(sequence, np.int32)
        return _row(sequence[:-1], sequence[1:], np.arange(1, seq_len))


class TaskRows:
    """Rows of a task, each a pure function of the seed, the stream and its index."""

    def __init__(
        self, make_row: Callable[[np.random.Generator], Row], seed: int, stream: int, length: int
    ):
        self._make_row = make_row
        self._key = (seed, stream)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        return self._make_row(np.random.default_rng([*self._key, index]))


def _places(rng: np.random.Generator, places: int, count: int) -> np.ndarray:
    return np.sort(rng.choice(places, count, replace=False))


def _row(tokens: np.ndarray, targets: np.ndarray, predicted) -> Row:
    weights = np.zeros(len(tokens), np.float32)
    weights[predicted] = 1
    return {
        "tokens": np.array(tokens),  # copies: a row must not share memory with its own targets
        "targets": np.array(targets),
        "weights": weights,
        "document_starts": np.zeros(len(tokens), np.int32),
    }
