import re
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_jax.training import corpus as corpus_lib
from nsa_jax.training.corpus import Corpus, read_stdlib, read_text


def _write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def _corpus(count: int, prefix: str = "document") -> Corpus:
    names = tuple(f"{prefix}{index}" for index in range(count))
    return Corpus(names, tuple(name.encode() for name in names), "a test")


def test_folder_is_read_in_sorted_order_without_what_is_not_text(tmp_path):
    _write(
        tmp_path,
        {
            "b.txt": b"second",
            "a/z.txt": "größer".encode(),
            "a.txt": b"first",  # "." sorts before "/"
            "empty.txt": b"",
            "picture.bin": b"\xff\xfe\x00",
            ".hidden": b"hidden",
            ".git/config": b"hidden too",
        },
    )
    corpus = read_text(tmp_path)
    assert corpus.names == ("a.txt", "a/z.txt", "b.txt")
    assert corpus.documents == (b"first", "größer".encode(), b"second")
    assert "1 left out: not UTF-8" in corpus.origin


def test_a_hidden_parent_of_the_folder_hides_nothing(tmp_path):
    folder = _write(tmp_path / ".cache" / "text", {"a.txt": b"a"})
    assert read_text(folder).documents == (b"a",)


def test_fingerprint_is_the_same_wherever_the_folder_lies(tmp_path):
    files = {"a.txt": b"one", "b/c.txt": b"two"}
    one, two = (read_text(_write(tmp_path / name, files)) for name in ("here", "there"))
    assert one.fingerprint() == two.fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", one.fingerprint())


@pytest.mark.parametrize(
    "files",
    [
        {"a.txt": b"onf", "b.txt": b"two"},  # a changed byte
        {"a.txt": b"one", "c.txt": b"two"},  # a renamed file
        {"a.txt": b"onet", "b.txt": b"wo"},  # the same bytes cut elsewhere
        {"a.txt": b"one"},
    ],
)
def test_fingerprint_differs(tmp_path, files):
    original = read_text(_write(tmp_path / "one", {"a.txt": b"one", "b.txt": b"two"}))
    changed = read_text(_write(tmp_path / "two", files))
    assert original.fingerprint() != changed.fingerprint()


def test_split_keeps_every_document_once_and_in_order():
    corpus = _corpus(500)
    train, validation = corpus.split(0.1)
    assert not set(train) & set(validation)
    assert set(train) | set(validation) == set(corpus.documents)
    place = {document: index for index, document in enumerate(corpus.documents)}
    for side in (train, validation):
        assert [place[document] for document in side] == sorted(place[d] for d in side)
    # 50 expected, standard deviation sqrt(500 * 0.1 * 0.9) = 6.7: four of them.
    assert 23 <= len(validation) <= 77


def test_side_of_a_document_does_not_depend_on_the_others():
    few = _corpus(200).split(0.2)
    many = _corpus(400).split(0.2)
    assert set(few[0]) <= set(many[0])
    assert set(few[1]) <= set(many[1])


@given(st.integers(2, 6), st.floats(1e-9, 1 - 1e-9), st.text("ab", max_size=3))
def test_neither_side_is_empty(count, fraction, prefix):
    train, validation = _corpus(count, prefix).split(fraction)
    assert train
    assert validation
    assert len(train) + len(validation) == count


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan"), "0.1", True])
def test_split_refuses_a_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"validation_fraction=.* above 0 and below 1"):
        _corpus(3).split(fraction)


def test_split_refuses_a_single_document(tmp_path):
    (tmp_path / "only.txt").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"the file only.txt holds 1 document.*at least one each"):
        read_text(tmp_path / "only.txt").split(0.1)


def test_a_file_is_cut_into_documents_that_end_at_blank_lines(tmp_path):
    # 100 paragraphs of 1000 bytes: documents of at most 100000 / 32 = 3125 bytes.
    paragraph = (b"x" * 49 + b"\n") * 19 + b"y" * 48 + b"\n\n"
    path = tmp_path / "book.txt"
    path.write_bytes(paragraph * 100)
    corpus = read_text(path)
    assert b"".join(corpus.documents) == paragraph * 100
    assert set(corpus.documents[:-1]) == {paragraph * 3}
    assert corpus.names[:2] == ("book.txt#000000", "book.txt#000001")
    train, validation = corpus.split(0.05)
    assert train
    assert validation


@given(st.text("aé☃\n", min_size=1, max_size=6000))
def test_cutting_loses_nothing_and_splits_no_character(text):
    documents = list(corpus_lib._cut(text.encode()))
    assert "".join(document.decode() for document in documents) == text
    assert all(0 < len(document) <= 1024 for document in documents)


def test_a_blank_line_in_the_first_half_does_not_cut():
    # Documents of 1024: the blank line at 100 would leave a tiny one, the line end at 900 does not.
    first = b"x" * 98 + b"\n\n" + b"y" * 799 + b"\n"
    assert list(corpus_lib._cut(first + b"z" * 1000)) == [first, b"z" * 1000]


def test_a_large_file_is_cut_at_64_kib(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(b"0123456789abcde\n" * 200_000)
    assert {len(document) for document in read_text(path).documents[:-1]} == {64 * 1024}


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path='.*nowhere' does not exist"):
        read_text(tmp_path / "nowhere")


def test_empty_file(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"path='.*empty.txt' is an empty file"):
        read_text(tmp_path / "empty.txt")


def test_file_that_is_not_text(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"ab\xffcd")
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 0xff at offset 2\)"):
        read_text(tmp_path / "data.bin")


def test_folder_without_text(tmp_path):
    _write(tmp_path, {".hidden": b"a", "empty": b"", "data.bin": b"\xff"})
    with pytest.raises(ValueError, match=r"a folder without text \(1 left out: not UTF-8\)"):
        read_text(tmp_path)


def test_stdlib_leaves_out_tests_packages_and_generated_files(tmp_path):
    kept = {"abc.py": b"a", "json/decoder.py": b"b", "site.py": b"c"}
    left_out = (
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "config-3.12-x86_64-linux-gnu/python-config.py",
        "sitecustomize.py",
        "site-packages/numpy/__init__.py",
        "dist-packages/apt/__init__.py",
        "test/test_abc.py",
        "idlelib/idle_test/test_text.py",
        "ctypes/test/test_a.py",
        "__pycache__/abc.py",
        "lib2to3/pytree.py",
        "pydoc_data/topics.py",
        "LICENSE.txt",
    )
    _write(tmp_path, kept | dict.fromkeys(left_out, b"no") | {"json/__init__.py": b""})
    corpus = read_stdlib(tmp_path)
    assert dict(zip(corpus.names, corpus.documents, strict=True)) == kept
    assert corpus.names == tuple(sorted(kept))


def test_stdlib_of_this_python():
    corpus = read_stdlib()
    root = Path(sysconfig.get_path("stdlib"))
    assert list(corpus.names) == sorted(corpus.names)
    assert corpus.documents[corpus.names.index("abc.py")] == (root / "abc.py").read_bytes()
    assert sum(map(len, corpus.documents)) > 5e6
    assert corpus.fingerprint() == read_stdlib().fingerprint()


def test_stdlib_without_sources(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.py files.*data\.name='text'"):
        read_stdlib(tmp_path)
