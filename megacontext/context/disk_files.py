"""The parts of a tree on disk: flat files of fixed-size records, commit slots, the lock of the one writer, the header."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import time
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megacontext import storage
from megacontext.context.store import I64, TreeSpec
from megacontext.errors import DataError, StorageError, UserError

U8 = npt.NDArray[np.uint8]

FORMAT = "megacontext-tree"
VERSION = 1
HEADER = "tree.json"
_SLOT = struct.Struct("<QQQI")  # sequence, start, tokens, crc of the ids [start, tokens); its own crc follows
_SLOT_STRIDE = 64


class RecordFile:
    """Records of `stride` bytes, one after the other: record i is at byte i·stride. OSError passes through."""

    def __init__(self, path: Path, stride: int, writable: bool) -> None:
        self.path, self.stride = path, stride
        self._fd = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC if writable else os.O_RDONLY | os.O_CLOEXEC, 0o644
        )

    def held(self) -> int:
        """Whole records in the file."""
        return os.fstat(self._fd).st_size // self.stride

    def write(self, at: int, data: bytes | memoryview) -> None:
        """Write whole records from record `at` on."""
        view, offset = memoryview(data).cast("B"), at * self.stride
        while view:  # a disk that fills takes a part first, and says so at the next call
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def cut(self, records: int) -> None:
        """Drop everything from record `records` on."""
        if os.fstat(self._fd).st_size > records * self.stride:
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
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True)
class Commit:
    """`tokens` ids are part of the tree; those of the last append, [start, tokens), have this crc."""

    sequence: int
    start: int
    tokens: int
    ids_crc: int


class CommitSlots:
    """Four fixed slots: two that take turns, and two for commits whose data was flushed to the disk before.

    The slot of the latest commit is never the one that is written next, so a torn write leaves the state before it.
    """

    def __init__(self, path: Path, writable: bool) -> None:
        self._file = RecordFile(path, 1, writable)

    def read(self) -> list[tuple[Commit, bool]]:
        """Valid commits, latest first, and whether each was flushed."""
        size = min(self._file.held(), 4 * _SLOT_STRIDE)
        data = self._file.read(0, size).tobytes()
        found = []
        for slot in range(4):
            raw = data[slot * _SLOT_STRIDE : slot * _SLOT_STRIDE + _SLOT.size + 4]
            if len(raw) == _SLOT.size + 4 and raw[_SLOT.size :] == _crc_bytes(raw[: _SLOT.size]):
                found.append((Commit(*_SLOT.unpack(raw[: _SLOT.size])), slot >= 2))
        return sorted(found, key=lambda item: -item[0].sequence)

    def write(self, commit: Commit, flushed: bool) -> None:
        """Store a commit; with `flushed` it is on the disk itself when this returns."""
        raw = _SLOT.pack(commit.sequence, commit.start, commit.tokens, commit.ids_crc)
        self._file.write((2 * flushed + commit.sequence % 2) * _SLOT_STRIDE, raw + _crc_bytes(raw))
        if flushed:
            self._file.sync()

    def create(self) -> None:
        """Make room for all slots, so that a full disk can't stop a commit."""
        if self._file.held() < 4 * _SLOT_STRIDE:
            self._file.write(self._file.held(), bytes(4 * _SLOT_STRIDE - self._file.held()))

    def close(self) -> None:
        self._file.close()


def _crc_bytes(raw: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(raw, 0x4D43))  # a seed, so that a slot of zeros is not valid


class WriterLock:
    """The right to write to a tree. The kernel drops it when its process dies, so it can't go stale.

    Raises UserError that names the holder when someone has it.
    """

    def __init__(self, path: Path, folder: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip() or "another process"
            self.close()
            raise UserError(
                f"the tree at {folder!r} is open for writing by {holder}. Close it there first, or open it here with writable=False."
            ) from None
        except OSError:
            self.close()
            raise
        with contextlib.suppress(OSError):  # the name in the file is for messages; the lock is what counts
            os.ftruncate(self._fd, 0)
            line = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            os.pwrite(self._fd, line.encode(), 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True)
class Header:
    """What `tree.json` says. A new generation has gists of another model over the same ids."""

    spec: TreeSpec
    generation: int = 0

    def save(self, folder: Path) -> None:
        """Write it atomically. Raises StorageError, e.g. when the disk is full."""
        body = {"format": FORMAT, "version": VERSION, "generation": self.generation, "spec": asdict(self.spec)}
        storage.write_json(str(folder / HEADER), {**body, "checksum": _checksum(body)})

    @classmethod
    def load(cls, folder: Path) -> Header | None:
        """The header of a tree, None where there is none. Raises DataError for one that is damaged or too new."""
        path = folder / HEADER
        try:
            body = json.loads(path.read_bytes())
            checksum = body.pop("checksum")
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
            raise DataError(
                f"{str(path)!r} is damaged ({error}); restore it from a copy, or use another folder."
            ) from error
        if body.get("format") != FORMAT or checksum != _checksum(body):
            raise DataError(
                f"{str(path)!r} is not a tree's header or is damaged: its checksum does not fit. Restore it from a copy."
            )
        if body["version"] != VERSION:
            raise DataError(f"{str(path)!r} has version {body['version']}; this program reads version {VERSION}.")
        names = {f.name for f in fields(TreeSpec)}
        return cls(TreeSpec(**{k: v for k, v in body["spec"].items() if k in names}), int(body["generation"]))

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
