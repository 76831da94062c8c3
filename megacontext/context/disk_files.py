"""The parts of a tree on disk: flat files of fixed-size records, commit slots, the lock of the one writer, the header."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megacontext import storage
from megacontext.context.store import I64, TreeSpec
from megacontext.errors import DamagedError, DataError, StorageError, UserError
from megacontext.locks import FileLock

U8 = npt.NDArray[np.uint8]

FORMAT = "megacontext-tree"
VERSION = 2  # 1 had commits without tail_crc and all_crc; its programs cannot read those of 2
HEADER = "tree.json"
_SLOT = struct.Struct("<QQQIII")  # the fields of a Commit; the slot's own crc follows
_OLD_SLOT = struct.Struct("<QQQI")  # of earlier trees, which had neither tail_crc nor all_crc
_SLOT_STRIDE = 64
_SLOTS = 5  # two for commits, two for flushed commits, one for the announcement of an append


class RecordFile:
    """Records of `stride` bytes, one after the other: record i is at byte i·stride. OSError passes through.

    A file that does not exist holds 0 records. The first write makes it.
    """

    def __init__(self, path: Path, stride: int, writable: bool) -> None:
        self.path, self.stride = path, stride
        self._fd = -1
        with contextlib.suppress(FileNotFoundError):
            self._fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)

    def create(self) -> None:
        """Make the file if it does not exist."""
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def held(self) -> int:
        """Whole records in the file."""
        return self.size() // self.stride

    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._fd).st_size if self._fd >= 0 else 0

    def write(self, at: int, data: bytes | memoryview) -> None:
        """Write whole records from record `at` on."""
        self.create()
        view, offset = memoryview(data).cast("B"), at * self.stride
        while view:  # a disk that fills takes a part first, and says so at the next call
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def cut(self, records: int) -> None:
        """Drop everything from record `records` on."""
        if self.size() > records * self.stride:
            os.ftruncate(self._fd, records * self.stride)

    def read(self, start: int, stop: int) -> U8:
        """Records [start, stop): uint8 [n, stride], writable memory of its own."""
        data = np.empty((stop - start, self.stride), np.uint8)
        view, offset = data.data.cast("B") if data.size else memoryview(b""), start * self.stride
        while view:
            count = os.preadv(self._fd, [view], offset)
            if count == 0:
                raise StorageError(f"{str(self.path)!r} ends before record {stop}: it was cut while it was open.")
            view, offset = view[count:], offset + count
        return data

    def gather(self, index: I64) -> U8:
        """Any records: uint8 [n, stride], read-only. One read per run of neighbours.

        Reads, not a memory map: a map costs a page fault per record where the file was written little by little, and
        keeps what it touched resident.
        """
        cuts = (np.flatnonzero(np.diff(index) != 1) + 1).tolist()
        runs = zip([0, *cuts], [*cuts, len(index)], strict=True)
        first, stride, fd = index.tolist(), self.stride, self._fd
        data = b"".join([os.pread(fd, (stop - start) * stride, first[start] * stride) for start, stop in runs])
        if len(data) < len(index) * stride:
            raise StorageError(f"{str(self.path)!r} is shorter than its tree: it was cut while it was open.")
        return np.frombuffer(data, np.uint8).reshape(-1, stride)

    def sync(self) -> None:
        if self._fd >= 0:
            os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True)
class Commit:
    """A state of the tree: `tokens` ids are part of it; the last append added the ids [start, tokens).

    The crc32 values: `append_crc` of the ids [start, tokens), `tail_crc` of the ids behind the last complete block, and
    `all_crc` of the ids [0, tokens). Commits of earlier trees lack the last two.
    """

    sequence: int
    start: int
    tokens: int
    append_crc: int
    tail_crc: int | None = 0
    all_crc: int | None = 0


class CommitSlots:
    """Fixed slots: two for commits, two for commits whose data was flushed to the disk before, one to announce appends.

    Commits take turns by their sequence number, so a torn write leaves the state before it. An append that completes
    blocks is announced first: at opening, what it left behind is told apart from ids whose commit is lost.
    """

    def __init__(self, path: Path, writable: bool) -> None:
        self._file = RecordFile(path, 1, writable)

    def read(self) -> list[tuple[Commit, bool]]:
        """Valid commits, latest first, and whether each was flushed."""
        found = [(commit, slot >= 2) for slot in range(_SLOTS - 1) if (commit := self._read(slot))]
        return sorted(found, key=lambda item: -item[0].sequence)

    def announced(self) -> Commit | None:
        """The append that was announced last: its `start` and its `tokens`. None where there is none."""
        return self._read(_SLOTS - 1)

    def write(self, commit: Commit, flushed: bool) -> None:
        """Store a commit; with `flushed` it is on the disk itself when this returns."""
        self._write(2 * flushed + commit.sequence % 2, commit)
        if flushed:
            self._file.sync()

    def announce(self, start: int, stop: int) -> None:
        """Say that ids [start, stop) are about to be written."""
        self._write(_SLOTS - 1, Commit(0, start, stop, 0))

    def create(self) -> None:
        """Make room for all slots, so that a full disk can't stop a commit."""
        held = self._file.held()
        if held < _SLOTS * _SLOT_STRIDE:
            self._file.write(held, bytes(_SLOTS * _SLOT_STRIDE - held))

    def _read(self, slot: int) -> Commit | None:
        first = slot * _SLOT_STRIDE
        data = self._file.read(first, max(first, min(self._file.held(), first + _SLOT_STRIDE))).tobytes()
        for layout, missing in ((_SLOT, ()), (_OLD_SLOT, (None, None))):
            raw, crc = data[: layout.size], data[layout.size : layout.size + 4]
            if len(crc) == 4 and crc == _crc_bytes(raw):
                return Commit(*layout.unpack(raw), *missing)
        return None

    def _write(self, slot: int, commit: Commit) -> None:
        sums = (commit.append_crc, commit.tail_crc, commit.all_crc)
        raw = _SLOT.pack(commit.sequence, commit.start, commit.tokens, *sums)
        self._file.write(slot * _SLOT_STRIDE, raw + _crc_bytes(raw))

    def close(self) -> None:
        self._file.close()


def _crc_bytes(raw: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(raw, 0x4D43))  # a seed, so that a slot of zeros is not valid


class WriterLock(FileLock):
    """The right to write to a tree. The kernel drops it when its process dies, so it can't go stale.

    Raises UserError that names the holder when someone has it.
    """

    def __init__(self, path: Path, folder: str, read_option: str) -> None:
        def refusal(holder: str) -> UserError:
            return UserError(
                f"the tree at {folder!r} is open for writing by {holder}. Close it there first, or open it here with "
                f"{read_option}."
            )

        super().__init__(path, refusal)


@dataclass(frozen=True)
class Header:
    """What `tree.json` says. A new generation has gists of another model over the same ids."""

    spec: TreeSpec
    generation: int = 0
    version: int = VERSION

    def save(self, folder: Path) -> None:
        """Write it atomically. Raises StorageError, e.g. when the disk is full."""
        body = {"format": FORMAT, "version": self.version, "generation": self.generation, "spec": asdict(self.spec)}
        storage.write_json(str(folder / HEADER), {**body, "checksum": _checksum(body)})

    @classmethod
    def load(cls, folder: Path) -> Header | None:
        """The header of a tree, None where there is none.

        Raises DamagedError (which names the file and not the remedy), DataError for one that is too new.
        """
        path = folder / HEADER
        try:
            body = json.loads(path.read_bytes())
            checksum = body.pop("checksum")
            fits = body.get("format") == FORMAT and checksum == _checksum(body)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise DamagedError(f"{str(path)!r} is damaged: {str(error) or type(error).__name__}.") from error
        if not fits:
            raise DamagedError(f"{str(path)!r} is not a tree's header or is damaged: its checksum does not fit.")
        version = body.get("version")
        if version not in range(1, VERSION + 1):
            raise DataError(f"{str(path)!r} has version {version}; this program reads versions 1 to {VERSION}.")
        names = {f.name for f in fields(TreeSpec)}
        try:
            spec = TreeSpec(**{name: value for name, value in body["spec"].items() if name in names})
            return cls(spec, int(body["generation"]), version)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedError(f"{str(path)!r} is damaged: {error}.") from error

    def check(self, wanted: TreeSpec, folder: Path, replace_gists: bool) -> None:
        """Raise DataError when whoever opens the tree wants another kind of tree; `replace_gists` allows other gists."""
        always = ("block_size", "vocab_size")
        gists = ("gist_digest", "record_width", "dtype", "leaf_context_blocks")
        for name in always + (() if replace_gists else gists):
            stored, asked = getattr(self.spec, name), getattr(wanted, name)
            if name == "vocab_size" and 0 in (stored, asked):
                continue
            if stored != asked:
                remedy = (
                    "replace_gists=True keeps its ids and makes the gists anew"
                    if name in gists
                    else "use another folder"
                )
                raise DataError(
                    f"the tree at {str(folder)!r} has {name} {stored!r}, but {asked!r} is asked for. "
                    f"Open it with the model that made it; {remedy}."
                )


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
