"""The embedded corpus: the documentation and sources of the Python that runs the job, as parquet shards.

Every machine has it, so the `cpu` tier needs no network. What goes in: the standard library's `.py` files and its
tests, the language reference that `help()` shows (`pydoc_data`), and its `.txt` and `.rst` files. What stays out:
installed packages, links, what a build or a machine adds, tables made by programs, repeats.

The same Python gives the same documents in the same order on any machine: nothing depends on folder order, times,
absolute paths, locale or hash seed. Whole source files go to training or to validation, by the hash of their path.
"""

from __future__ import annotations

import ast
import bisect
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megacontext import storage
from megacontext.data import parquet
from megacontext.errors import DataError

FORMAT = 2  # raised when the selection, the split, the order or the fields of corpus.json change
INFO_NAME = "corpus.json"
TRAIN_SHARDS = 8
VALIDATION_SHARE = 0.05
DOCUMENT_CHARS = 6_000  # longest document
MIN_DOCUMENT_CHARS = 64
MIN_LETTER_SHARE = 0.5  # letters among the characters that are not blank; tables of numbers have fewer

_SUFFIXES = (".py", ".txt", ".rst")
_SKIPPED_FOLDERS = re.compile(
    r"site-packages|dist-packages|__pycache__|_bundled|lib-dynload|config-.*|\..*|.*\.(egg|dist)-info"
)
_SKIPPED_FILES = re.compile(
    r"_sysconfigdata.*|_sysconfig_vars.*|build-details\..*|(site|user)customize\.py|EXTERNALLY-MANAGED|\..*|@test.*"
)
_TOPICS = "pydoc_data/topics.py"
_CHARMAP = re.compile(r"^(de|en)coding_(table|map)\b", re.MULTILINE)
_SHARD_NAME = re.compile(r"shard_\d{5}\.parquet")

# Where a long file may be cut, best first: before a top-level statement, at a blank line, at a line.
_CUTS = (re.compile(r"(?<=\n\n)(?=[^\s)\]}'\"])"), re.compile(r"(?<=\n\n)(?=[^\n])"), re.compile(r"(?<=\n)"))


@dataclass(frozen=True)
class CorpusInfo:
    """What an embedded corpus holds; stored as `corpus.json` when all of it is written."""

    format: int
    python: str  # implementation and version it was made from
    digest: str  # SHA-256 over all documents in order
    files: int
    documents_train: int
    documents_val: int
    chars_train: int
    chars_val: int
    shards: tuple[str, ...]  # in name order; the last is validation
    sha256: tuple[str, ...]  # of each shard's file


@dataclass(frozen=True)
class Document:
    """A piece of one source file. `source` is the file's path below the standard library, with `/`."""

    source: str
    index: int
    text: str


def write_embedded_corpus(directory: str, stdlib: str = "") -> CorpusInfo:
    """Write the corpus of the running Python (or of another library folder) to a folder, unless it is there already.

    Shards appear whole or not at all, `corpus.json` comes last. Raises DataError when the folder holds shards of
    somebody else or a shard that is not as it was written, or the library is too small to train on; StorageError when
    it cannot be written.
    """
    done = read_info(directory)
    if done is not None:
        return done
    info_path = storage.join(directory, INFO_NAME)
    found = [name for name in storage.list_dir(directory) if _SHARD_NAME.fullmatch(name)]
    if found and not storage.exists(info_path):
        raise DataError(
            f"{directory!r} holds shards that are not the embedded corpus ({found[0]}, …); choose another folder."
        )
    train, val, files = build_documents(Path(stdlib or sysconfig.get_path("stdlib")))
    storage.write_json(info_path, {"format": FORMAT, "complete": False})
    parts = [train[len(train) * i // TRAIN_SHARDS : len(train) * (i + 1) // TRAIN_SHARDS] for i in range(TRAIN_SHARDS)]
    names, digests = [], []
    for index, part in enumerate([*parts, val]):
        names.append(f"shard_{index:05d}.parquet")
        data = parquet.encode_texts(part)
        digests.append(hashlib.sha256(data).hexdigest())
        storage.write_bytes(storage.join(directory, names[-1]), data)
    for stale in set(found) - set(names):
        storage.remove_tree(storage.join(directory, stale))
    info = CorpusInfo(
        format=FORMAT,
        python=python_name(),
        digest=_digest(train, val),
        files=files,
        documents_train=len(train),
        documents_val=len(val),
        chars_train=sum(map(len, train)),
        chars_val=sum(map(len, val)),
        shards=tuple(names),
        sha256=tuple(digests),
    )
    storage.write_json(info_path, {**asdict(info), "complete": True})
    return info


def read_info(directory: str) -> CorpusInfo | None:
    """The finished corpus in a folder; None if there is none, a shard is missing, or another Python or format made it.

    Raises DataError when a shard was changed or replaced after it was written.
    """
    try:
        value = storage.read_json(storage.join(directory, INFO_NAME))
    except FileNotFoundError:
        return None
    except ValueError:
        return None  # a half-written or foreign file: the corpus is made again
    if not isinstance(value, dict) or not value.pop("complete", False):
        return None
    if value.get("format") != FORMAT or value.get("python") != python_name():
        return None
    try:
        info = CorpusInfo(**{**value, "shards": tuple(value["shards"]), "sha256": tuple(value["sha256"])})
    except (KeyError, TypeError):
        return None
    if not set(info.shards) <= set(storage.list_dir(directory)):
        return None
    for name, sha256 in zip(info.shards, info.sha256, strict=False):
        path = storage.join(directory, name)
        if storage.sha256_file(path) != sha256:
            raise DataError(
                f"{path!r} is not the file that was written there: its content was changed. To train on this text, copy the "
                f"folder and name the copy with --data_dir; to have the embedded corpus again, delete {directory!r}."
            )
    return info


def python_name() -> str:
    """Implementation and full version of the running Python, e.g. `cpython-3.11.7`."""
    return f"{sys.implementation.name}-{sys.version.split()[0]}"


def build_documents(root: Path) -> tuple[list[str], list[str], int]:
    """(training texts, validation texts, number of files used) of a library folder, in their final order.

    Raises DataError when either side has fewer documents than there are shards for it.
    """
    seen: set[bytes] = set()
    kept: list[Document] = []
    for document in read_documents(root):
        key = hashlib.sha256(document.text.encode()).digest()
        if key not in seen and is_prose_or_code(document.text):
            seen.add(key)
            kept.append(document)
    kept.sort(key=lambda d: hashlib.sha256(f"{d.source}\n{d.index}".encode()).digest())
    train = [d.text for d in kept if not is_validation(d.source)]
    val = [d.text for d in kept if is_validation(d.source)]
    if len(train) < TRAIN_SHARDS or not val:
        raise DataError(
            f"{str(root)!r} gives {len(train)} training and {len(val)} validation documents; at least {TRAIN_SHARDS} "
            "and 1 are needed. This Python comes without its library's sources: use --data_dir with parquet shards."
        )
    return train, val, len({d.source for d in kept})


def read_documents(root: Path) -> Iterator[Document]:
    """All candidate documents of a library folder, in path order."""
    for source in list_sources(root):
        text = _read_text(root / source)
        if source == _TOPICS:
            for name, topic in _topics(text):
                for index, piece in enumerate(split_text(topic)):
                    yield Document(f"{source}/{name}", index, piece)
        elif not (source.startswith("encodings/") and _CHARMAP.search(text)):
            for index, piece in enumerate(split_text(text)):
                yield Document(source, index, piece)


def list_sources(root: Path) -> list[str]:
    """Sorted paths, below `root` and with `/`, of the files that are part of a Python release."""
    sources = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not _SKIPPED_FOLDERS.fullmatch(name)]
        for name in files:
            path = Path(folder, name)
            if name.endswith(_SUFFIXES) and not _SKIPPED_FILES.fullmatch(name) and not path.is_symlink():
                sources.append(path.relative_to(root).as_posix())
    return sorted(sources)


def is_validation(source: str) -> bool:
    """Whether a source file belongs to validation: a fixed share of all paths, by hash."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") < VALIDATION_SHARE * 2**64


def is_prose_or_code(text: str) -> bool:
    """False for scraps and for tables of numbers or escapes."""
    solid = sum(not char.isspace() for char in text)
    return len(text) >= MIN_DOCUMENT_CHARS and sum(map(str.isalpha, text)) >= MIN_LETTER_SHARE * solid


def split_text(text: str, limit: int = DOCUMENT_CHARS) -> list[str]:
    """Cut a text into pieces of at most `limit` characters at the best places; joined, they give the text again.

    A piece ends at the last top-level statement that leaves it at least half full, else at such a blank line, else at
    such a line, else after `limit` characters.
    """
    places = [[match.start() for match in cut.finditer(text)] for cut in _CUTS] if len(text) > limit else []
    pieces = []
    start = 0
    while len(text) - start > limit:
        end = start + limit
        end = next((last for cuts in places if (last := _last_between(cuts, start + limit // 2, end))), end)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _last_between(cuts: Sequence[int], low: int, high: int) -> int:
    """The greatest of sorted cuts in (low, high]; 0 if there is none."""
    index = bisect.bisect_right(cuts, high)
    return cuts[index - 1] if index and cuts[index - 1] > low else 0


def _read_text(path: Path) -> str:
    """A file as text with plain newlines; empty if it is no UTF-8 text (some tests carry broken files on purpose)."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text else text.replace("\r\n", "\n").replace("\r", "\n")


def _topics(source: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each topic of the language reference; the file assigns one dictionary literal."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from sorted(ast.literal_eval(node.value).items())


def _digest(train: Sequence[str], val: Sequence[str]) -> str:
    """SHA-256 of all documents in order, with lengths, so that no two corpora share one by concatenation."""
    digest = hashlib.sha256()
    for part in (train, val):
        digest.update(b"%d;" % len(part))
        for text in part:
            data = text.encode()
            digest.update(b"%d;" % len(data) + data)
    return digest.hexdigest()
