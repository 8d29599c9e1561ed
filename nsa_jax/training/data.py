"""From documents or tasks to batches: packing, shuffling, sharding.

A batch is a dict of numpy arrays: tokens, targets, document_starts (int32 [B, T]) and weights
(float32 [B, T]), where B is this process's share of the global batch and T is seq_len. The target
of a position with weight 1 is to be predicted from the tokens up to it; where the weight is 0 there
is nothing to predict. document_starts holds, for each token, the position in the row of its
document's first token.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import grain
import numpy as np

from nsa_jax.training import corpus as corpus_lib
from nsa_jax.training import tasks
from nsa_jax.training.corpus import BOS
from nsa_jax.training.corpus import VOCAB_SIZE as VOCAB_SIZE  # part of this module's interface
from nsa_jax.training.tasks import Row


class _Task(NamedTuple):
    check: Callable[..., None]
    make_row: Callable[..., Row] | None  # None: depends on a source that is drawn first
    settings: tuple[str, ...]  # of DataConfig, without "task_"


_TASKS = {
    "recall": _Task(tasks.check_recall, tasks.recall_row, ("pairs", "queries", "pair_tokens")),
    "needle": _Task(tasks.check_needle, tasks.needle_row, ("depth",)),
    "copy": _Task(tasks.check_copy, tasks.copy_row, ()),
    "markov": _Task(tasks.check_markov, None, ("states",)),
}
NAMES = ("stdlib", "text", *_TASKS)

# Generators of a task's rows are seeded with [seed, stream, index], each below 2**32.
_SEEDS = 2**32
_TRAIN, _VALIDATION, _MATRIX = range(3)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on. Of the task_ settings, only those of the task named are used.

    Attributes:
      name: "stdlib" (the running Python's standard library), "text" (the file or folder `path`),
        or a task of `nsa_jax.training.tasks`: "recall", "needle", "copy", "markov".
      path: the text file or folder of "text"; empty with every other name.
      seq_len: T, tokens in a row.
      batch_size: rows in a batch over all processes.
      validation_fraction: the share of a text's documents held out.
      task_validation_rows: rows of a task held out.
      task_pairs: pairs in a row of "recall".
      task_queries: queries in a row of "recall".
      task_pair_tokens: tokens in a pair of "recall": 1, 2 or 3.
      task_depth: where the needle of "needle" stands, from 0 (start) to 1 (end); negative for a
        random depth in each row.
      task_states: symbols of "markov".

    Raises:
      ValueError: if a value is out of range or two do not fit each other.
    """

    name: str
    path: str
    seq_len: int
    batch_size: int
    validation_fraction: float
    task_validation_rows: int
    task_pairs: int
    task_queries: int
    task_pair_tokens: int
    task_depth: float
    task_states: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            allowed = {int: int, float: int | float, str: str}[field.type]
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise ValueError(f"{field.name}={value!r} must be of type {field.type.__name__}")
        if self.name not in NAMES:
            raise ValueError(f"name={self.name!r} must be one of {NAMES}")
        if self.name == "text" and not self.path:
            raise ValueError("name='text' needs path, a text file or a folder of text files")
        if self.name != "text" and self.path:
            raise ValueError(
                f"path={self.path!r} is read with name='text' only, but name={self.name!r}"
            )
        for name, minimum in {"seq_len": 2, "batch_size": 1, "task_validation_rows": 1}.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {minimum}")
        corpus_lib.check_validation_fraction(self.validation_fraction)
        if self.name in _TASKS:
            _TASKS[self.name].check(self.seq_len, **self.task_settings())

    def task_settings(self) -> dict[str, int | float]:
        """The settings that the task named reads, under the names of its function's arguments."""
        return {name: getattr(self, f"task_{name}") for name in _TASKS[self.name].settings}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Batches by step, and what identifies them.

    Attributes:
      train: `train[step]` is the batch of that step, a pure function of the data, the seed and the
        step; it goes on for as many steps as anyone will take.
      validation: `len(validation)` batches, the same with every seed for a text. Rows of weight 0
        fill the last one up.
      fingerprint: sha256 (hex) of the text, or of a task's settings and seed.
      description: one line for a person.
      train_documents: of a text; empty for a task.
      validation_documents: likewise.
      perfect_bits: the mean bits a target that a perfect model of a task needs; None for a text,
        where nobody knows.
    """

    train: grain.MapDataset
    validation: grain.MapDataset
    fingerprint: str
    description: str
    train_documents: tuple[bytes, ...]
    validation_documents: tuple[bytes, ...]
    perfect_bits: float | None


def make_pipeline(
    config: DataConfig,
    *,
    alignment: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Pipeline:
    """Reads the data and lays out the batches.

    A text's training rows are shuffled anew in every epoch; a batch may span two. A task's rows
    never repeat. Row i of a global batch goes to process i % process_count.

    Args:
      config: what to read and how.
      alignment: every document starts at a multiple of it: NSA's select_block_size.
      seed: of the order of rows (text) or of the rows themselves (task), from 0 to 2**32 - 1.
      process_index: which share of every batch to return.
      process_count: into how many shares a batch is cut; must divide batch_size.

    Raises:
      ValueError: if an argument is out of range, or there is less text than one row holds.
      FileNotFoundError: if `config.path` does not exist.
    """
    if alignment < 1:
        raise ValueError(f"alignment={alignment} must be at least 1")
    if not 0 <= seed < _SEEDS:
        raise ValueError(f"seed={seed} must be from 0 to 2**32 - 1")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} must be from 0 to process_count - 1 = "
            f"{process_count - 1}"
        )
    if config.batch_size % process_count:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of process_count={process_count}: "
            "every process takes the same number of rows"
        )

    def batches(rows: grain.MapDataset) -> grain.MapDataset:
        share = rows.slice(slice(process_index, None, process_count))
        return share.batch(config.batch_size // process_count, drop_remainder=True)

    if config.name in _TASKS:
        return _task_pipeline(config, seed, batches)
    return _text_pipeline(config, alignment, seed, batches)


def _text_pipeline(config: DataConfig, alignment: int, seed: int, batches: Callable) -> Pipeline:
    stdlib = config.name == "stdlib"
    corpus = corpus_lib.read_stdlib() if stdlib else corpus_lib.read_text(config.path)
    train_documents, validation_documents = corpus.split(config.validation_fraction)
    train_bytes = sum(map(len, train_documents))
    if train_bytes < config.seq_len - 1:  # BOS takes a place
        raise ValueError(
            f"{corpus.origin} has {train_bytes} bytes to train on, less than one row of "
            f"seq_len={config.seq_len}: add text or shorten the rows"
        )
    train_rows = PackedRows(train_documents, config.seq_len, alignment)
    validation_rows = PackedRows(validation_documents, config.seq_len, alignment)
    validation_bytes = sum(map(len, validation_documents))
    description = (
        f"{corpus.origin} in rows of {config.seq_len}: {train_bytes / 1e6:.2f} MB to train on "
        f"({len(train_documents)} documents, {len(train_rows)} rows), {validation_bytes / 1e6:.2f} "
        f"MB held out ({len(validation_documents)} documents, {len(validation_rows)} rows)"
    )
    train = grain.MapDataset.source(train_rows).seed(seed).shuffle().repeat()
    # In one order for ever, but mixed: the first batches are then a fair sample of all.
    mixed = grain.MapDataset.source(validation_rows).shuffle(seed=0)
    validation = grain.MapDataset.source(FilledRows(mixed, config.batch_size))
    return Pipeline(
        train=batches(train),
        validation=batches(validation),
        fingerprint=corpus.fingerprint(),
        description=description,
        train_documents=train_documents,
        validation_documents=validation_documents,
        perfect_bits=None,
    )


def _task_pipeline(config: DataConfig, seed: int, batches: Callable) -> Pipeline:
    settings = config.task_settings()
    perfect_bits = 0.0
    if config.name == "markov":
        source = tasks.MarkovSource(np.random.default_rng([seed, _MATRIX, 0]), **settings)
        perfect_bits = source.entropy_rate
        make_row = source.row
    else:
        make_row = functools.partial(_TASKS[config.name].make_row, **settings)
    make_row = functools.partial(make_row, seq_len=config.seq_len)
    identity = {"name": config.name, "seq_len": config.seq_len, "seed": seed, **settings}
    listed = "".join(f", {name} {value}" for name, value in settings.items())
    train = grain.MapDataset.source(tasks.TaskRows(make_row, seed, _TRAIN, _SEEDS)).repeat()
    held_out = tasks.TaskRows(make_row, seed, _VALIDATION, config.task_validation_rows)
    return Pipeline(
        train=batches(train),
        validation=batches(grain.MapDataset.source(FilledRows(held_out, config.batch_size))),
        fingerprint=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        description=(
            f"the task {config.name!r}: rows of {config.seq_len}{listed}; "
            f"{config.task_validation_rows} rows held out; a perfect model needs "
            f"{perfect_bits:.4f} bits a target"
        ),
        train_documents=(),
        validation_documents=(),
        perfect_bits=perfect_bits,
    )


class PackedRows:
    """Documents cut into pieces and packed into rows, each row made when it is asked for.

    A piece is BOS and up to seq_len - 1 bytes, and is a document of its own to the model: attention
    never leaves it. It starts at a multiple of `alignment`. A document's pieces are taken in order,
    and each goes to the row where it leaves the least room, or else to a new one.

    Each byte is the target of exactly one position of weight 1, the one before it. The positions of
    a piece's last byte and of the padding have weight 0; padding is id 0 and counts as a part of
    the piece before it.

    On the standard library of Python 3.12, padding takes 0.1% of rows of 512 aligned to 16, and
    1.0% of rows of 8192 aligned to 64. (Keeping only the latest row open, it takes 1.4% and 12%.)
    """

    def __init__(self, documents: Sequence[bytes], seq_len: int, alignment: int):
        """Lays the pieces out.

        Args:
          documents: none of them empty.
          seq_len: T, at least 2.
          alignment: at least 1; need not divide seq_len.
        """
        self._documents = documents
        self._seq_len = seq_len
        room = seq_len - 1  # beside BOS
        lengths = np.array([len(document) for document in documents])
        counts = -(-lengths // room)
        document = np.repeat(np.arange(len(documents)), counts)
        first = (np.arange(counts.sum()) - (counts.cumsum() - counts)[document]) * room
        size = np.minimum(lengths[document] - first, room)
        row, start = _place(size.tolist(), seq_len, alignment)
        order = np.lexsort((start, row))
        # A line for each piece: document, first byte in it, bytes, where it starts in the row.
        self._pieces = np.stack([document, first, size, start], axis=1)[order]
        self._ends = np.bincount(row).cumsum()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Row:
        tokens, targets, document_starts = np.zeros((3, self._seq_len), np.int32)
        weights = np.zeros(self._seq_len, np.float32)
        begin = self._ends[index - 1] if index else 0
        for document, first, size, start in self._pieces[begin : self._ends[index]].tolist():
            data = np.frombuffer(self._documents[document], np.uint8, size, first)
            tokens[start] = BOS
            tokens[start + 1 : start + 1 + size] = data
            targets[start : start + size] = data
            weights[start : start + size] = 1
            document_starts[start:] = start
        return {
            "tokens": tokens,
            "targets": targets,
            "weights": weights,
            "document_starts": document_starts,
        }


def _place(sizes: list[int], seq_len: int, alignment: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds for each piece the row and the position where it starts, see `PackedRows`.

    Args:
      sizes: the bytes of each piece; it takes one token more.
      seq_len: T.
      alignment: of the starts.

    Returns:
      int64 [pieces], int64 [pieces].
    """
    rows, starts = np.zeros((2, len(sizes)), np.int64)
    num_rows = 0
    open_rows = {}  # by the next start free in them; all starts are multiples of alignment
    next_starts = []  # the keys of open_rows in ascending order: few, however many rows are open
    for piece, size in enumerate(sizes):
        fitting = bisect.bisect_right(next_starts, seq_len - (size + 1))
        if fitting:
            start = next_starts[fitting - 1]
            row = open_rows[start].pop()
            if not open_rows[start]:
                del open_rows[start], next_starts[fitting - 1]
        else:
            row, start = num_rows, 0
            num_rows += 1
        rows[piece], starts[piece] = row, start
        end = -(-(start + size + 1) // alignment) * alignment
        if seq_len - end >= 2:  # room for BOS and a byte
            if end not in open_rows:
                bisect.insort(next_starts, end)
                open_rows[end] = []
            open_rows[end].append(row)
    return rows, starts


class FilledRows:
    """Rows followed by as many of weight 0 as a multiple of `multiple` needs."""

    def __init__(self, rows: Sequence[Row], multiple: int):
        self._rows = rows
        self._length = -(-len(rows) // multiple) * multiple
        self._blank = {name: np.zeros_like(value) for name, value in rows[0].items()}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        return self._rows[index] if index < len(self._rows) else self._blank
