"""Documents of bytes: the standard library's sources, a text file or a folder of text files.

A document is the unit that is split off for validation and that attention never leaves.
"""

import dataclasses
import hashlib
import platform
import sysconfig
from pathlib import Path

# The token ids that every data set here shares: a byte is its own id.
BOS = 256
VOCAB_SIZE = 257

# Folders that a distribution may leave out, or that hold what was installed or generated.
# pydoc_data is text of the manual, generated into one file of 0.8 MB, which alone would be most of
# the validation bytes where it is held out with 5% of the documents.
_STDLIB_SKIPPED_FOLDERS = frozenset(
    (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        "lib2to3",
        "pydoc_data",
    )
)
_STDLIB_SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")

# A single file is cut into documents of about this size, smaller ones if it would yield fewer than
# _FILE_DOCUMENTS, so that some of them can be held out.
_FILE_DOCUMENT_BYTES = 64 * 1024
_FILE_DOCUMENTS = 32
_FILE_DOCUMENT_MINIMUM = 1024


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Named documents in a fixed order.

    Attributes:
      names: of the documents; a file's path relative to the folder read, with forward slashes.
      documents: their bytes, none of them empty.
      origin: where they come from, in a few words for a person.
    """

    names: tuple[str, ...]
    documents: tuple[bytes, ...]
    origin: str

    def fingerprint(self) -> str:
        """The sha256 (hex) over the name, the length and the bytes of every document in order."""
        digest = hashlib.sha256()
        for name, document in zip(self.names, self.documents, strict=True):
            digest.update(b"%s\0%d\0" % (_encode(name), len(document)))
            digest.update(document)
        return digest.hexdigest()

    def split(self, validation_fraction: float) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Splits the documents into training and validation.

        A document's side depends on the hash of its name alone, so that adding or removing others
        does not move it. The one exception: where that leaves a side empty, the document nearest
        to the threshold goes there.

        Args:
          validation_fraction: the expected share of documents (not of bytes) held out, above 0 and
            below 1.

        Returns:
          The training documents and the validation documents, each in the corpus's order.

        Raises:
          ValueError: if validation_fraction is out of range or there are fewer than two documents.
        """
        check_validation_fraction(validation_fraction)
        if len(self.documents) < 2:
            raise ValueError(
                f"{self.origin} holds {len(self.documents)} document, but training and validation "
                "need at least one each: add text (a single file is cut into documents of "
                f"{_FILE_DOCUMENT_MINIMUM} bytes or more, a file in a folder is one document)"
            )
        places = [_place(name) for name in self.names]
        held_out = [place < validation_fraction for place in places]
        if not any(held_out):
            held_out[places.index(min(places))] = True
        elif all(held_out):
            held_out[places.index(max(places))] = False
        sides = ([], [])
        for document, side in zip(self.documents, held_out, strict=True):
            sides[side].append(document)
        return tuple(sides[0]), tuple(sides[1])


def check_validation_fraction(value: float) -> None:
    """Raises a ValueError unless value lies strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"validation_fraction={value!r} must be a number above 0 and below 1")


def read_stdlib(root: str | Path | None = None) -> Corpus:
    """Reads the sources of the running Python's standard library.

    Left out is what differs from one distribution of the same version to the next: tests, installed
    packages, and files that the build wrote.

    Args:
      root: the library's folder; the running Python's own if None.

    Returns:
      One document a file, sorted by relative path; empty files are left out.

    Raises:
      ValueError: if the folder holds no sources.
    """
    root = Path(sysconfig.get_path("stdlib") if root is None else root)
    files = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        generated = any(part.startswith(_STDLIB_SKIPPED_PREFIXES) for part in relative.parts)
        if generated or _STDLIB_SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        if path.is_file():
            files[relative.as_posix()] = path.read_bytes()
    files = {name: files[name] for name in sorted(files) if files[name]}
    if not files:
        raise ValueError(
            f"the standard library's folder {str(root)!r} holds no .py files (this Python may keep "
            "them zipped): set data.name='text' and data.path to a text file or a folder"
        )
    origin = f"the standard library of Python {platform.python_version()}"
    return Corpus(tuple(files), tuple(files.values()), origin)


def read_text(path: str | Path) -> Corpus:
    """Reads a UTF-8 text file or a folder of them.

    A folder yields one document a file, sorted by relative path. Left out are hidden files and
    folders (a leading dot), empty files, and files that are not UTF-8; `origin` says how many of
    the last kind there were. A file is cut into documents of at most 64 KiB (1/32 of the file if
    that is less, but not below 1 KiB), each ending after the last blank line in its second half,
    else after the last line end there, else between two characters.

    Args:
      path: of the file or folder; a leading ~ stands for the home folder.

    Returns:
      The documents; those of a single file are named name#000000, name#000001 and so on.

    Raises:
      FileNotFoundError: if there is nothing at path.
      ValueError: if the file is empty or not UTF-8, or the folder holds no text.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f"path={str(path)!r} does not exist: it must be a text file or a folder of text files"
        )
    data = path.read_bytes()
    if not data:
        raise ValueError(f"path={str(path)!r} is an empty file")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"path={str(path)!r} is not UTF-8 text (byte {data[error.start]:#04x} at offset "
            f"{error.start}): convert it first"
        ) from None
    documents = tuple(_cut(data))
    names = tuple(f"{path.name}#{index:06d}" for index in range(len(documents)))
    return Corpus(names, documents, f"the file {path.name}")


def _read_folder(root: Path) -> Corpus:
    files = {}
    not_text = 0
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        data = path.read_bytes()
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            not_text += 1
            continue
        if data:
            files[relative.as_posix()] = data
    left_out = f" ({not_text} left out: not UTF-8)" if not_text else ""
    if not files:
        raise ValueError(
            f"path={str(root)!r} is a folder without text{left_out}: it must hold UTF-8 text files "
            "that are neither empty nor hidden"
        )
    files = {name: files[name] for name in sorted(files)}
    return Corpus(tuple(files), tuple(files.values()), f"the folder {root.name or root}{left_out}")


def _cut(data: bytes):
    """Yields the documents of a single file, see `read_text`."""
    size = min(_FILE_DOCUMENT_BYTES, max(_FILE_DOCUMENT_MINIMUM, len(data) // _FILE_DOCUMENTS))
    start = 0
    while len(data) - start > size:
        end = start + size
        for boundary in (b"\n\n", b"\n"):
            found = data.rfind(boundary, start + size // 2, end)
            if found >= 0:
                end = found + len(boundary)
                break
        else:
            while data[end] & 0xC0 == 0x80:  # a continuation byte of UTF-8
                end -= 1
        yield data[start:end]
        start = end
    yield data[start:]


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(_encode(name)).digest()[:6]) / 2**48
