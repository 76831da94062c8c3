"""The open files of a tree on disk, and what their checksums say about them."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megacontext import storage
from megacontext.context.disk_files import U8, Commit, CommitSlots, RecordFile
from megacontext.context.store import I64, U32, TreeSpec
from megacontext.errors import DamagedError

_CHECK_ROWS = 4096  # records read at once while checking
_CRC_OF_WHOLE = 0x2144DF1C  # crc32 of any bytes that end in the crc32, little-endian, of those before


class TreeFiles:
    """Ids, block checksums, levels and commits of one generation of gists. OSError passes through.

    Files that are missing hold nothing; writing makes them.
    """

    def __init__(self, folder: Path, spec: TreeSpec, generation: int, writable: bool) -> None:
        self.folder, self.spec, self.writable = folder, spec, writable
        self._generation = generation
        self._open: list[RecordFile | CommitSlots] = []
        self.levels: list[RecordFile] = []
        try:
            self.slots, self.copy = self._commits("commit.bin"), self._commits("commit.copy")
            self.ids, self.crcs = self._records("ids.bin", 4), self._records("ids.crc", 4)
            stored = [level for number, level, _ in level_files(folder) if number == generation]
            self.grow(max(stored, default=0))
        except BaseException:
            self.close()
            raise

    def grow(self, levels: int) -> None:
        """Open the files of levels up to `levels`."""
        width = self.spec.record_width * self.spec.torch_dtype.itemsize
        while levels > len(self.levels):
            name = f"gists_{self._generation}_{len(self.levels) + 1:02d}.bin"
            self.levels.append(self._records(name, width + 4))

    def create(self) -> None:
        """Make the files that do not exist, and room for the commits."""
        for commits in (self.slots, self.copy):
            commits.create()
        for file in (self.ids, self.crcs, *self.levels):
            file.create()

    def remove_older_generations(self) -> None:
        """Delete the gists that a later generation has replaced."""
        for generation, _, path in level_files(self.folder):
            if generation < self._generation:
                path.unlink()

    def cut(self, tokens: int, counts: list[int]) -> None:
        """Drop what lies behind `tokens` ids and `counts` records of each level."""
        self.ids.cut(tokens)
        self.crcs.cut(tokens // self.spec.block_size)
        for file, count in zip(self.levels, counts, strict=True):
            file.cut(count)

    def sync(self) -> None:
        """Put everything but the commits on the disk itself."""
        for file in (self.ids, self.crcs, *self.levels):
            file.sync()
        storage.sync_dir(self.folder)

    def close(self) -> None:
        for file in self._open:
            file.close()
        self._open = []

    # Checks

    def read_ids(self, start: int, stop: int) -> U32:
        """Ids [start, stop) as they are in the file, unchecked."""
        return self.ids.read(start, stop).reshape(-1).view(np.uint32)

    def ids_crc(self, start: int, stop: int, crc: int = 0) -> int:
        """crc32 of the ids [start, stop), continued from `crc`, in constant memory."""
        step = _CHECK_ROWS * 256
        for first in range(start, stop, step):
            crc = zlib.crc32(self.ids.read(first, min(stop, first + step)).data, crc)
        return crc

    def good_blocks(self, start: int, stop: int) -> int:
        """First block of [start, stop) whose ids do not fit their checksum; `stop` if all do."""
        r = self.spec.block_size
        for first in range(start, stop, _CHECK_ROWS):
            last = min(stop, first + _CHECK_ROWS)
            wrong = self.wrong_blocks(self.read_ids(first * r, last * r), first)
            if len(wrong):
                return first + int(wrong[0])
        return stop

    def wrong_blocks(self, ids: U32, first: int) -> I64:
        """Which complete blocks of `ids`, read from block `first` on, do not fit their checksums."""
        blocks = ids.reshape(-1, self.spec.block_size)
        stored = self.crcs.read(first, first + len(blocks)).reshape(-1).view(np.uint32)
        return np.flatnonzero(row_crcs(blocks) != stored)

    def good_records(self, level: int, start: int, stop: int) -> int:
        """First record of [start, stop) of a level that does not fit its checksum; `stop` if all do."""
        file = self.levels[level - 1]
        for first in range(start, stop, _CHECK_ROWS):
            wrong = _wrong_rows(file.read(first, min(stop, first + _CHECK_ROWS)))
            if len(wrong):
                return first + int(wrong[0])
        return stop

    def fits(self, commit: Commit) -> bool:
        """Whether the ids of a commit's last append, and those behind its last complete block, are as they were stored."""
        whole = commit.tokens // self.spec.block_size * self.spec.block_size
        tail_fits = commit.tail_crc in (None, self.ids_crc(whole, commit.tokens))
        return tail_fits and self.ids_crc(commit.start, commit.tokens) == commit.append_crc

    def write_crcs(self, start: int, stop: int) -> None:
        """Make the checksums of blocks [start, stop) from their ids."""
        r = self.spec.block_size
        for first in range(start, stop, _CHECK_ROWS):
            last = min(stop, first + _CHECK_ROWS)
            self.crcs.write(first, row_crcs(self.read_ids(first * r, last * r).reshape(-1, r)).tobytes())

    # Records

    def pack(self, records: Tensor) -> bytes:
        """Records [m, R] with their checksums, as bytes."""
        values = records.contiguous().view(torch.uint8).numpy()
        packed = np.empty((len(values), values.shape[1] + 4), np.uint8)
        packed[:, :-4] = values
        packed[:, -4:] = row_crcs(values).view(np.uint8).reshape(-1, 4)
        return packed.tobytes()

    def unpack(self, rows: U8) -> Tensor:
        """Rows [n, bytes + 4] of a level file -> records [n, R]."""
        return torch.from_numpy(np.array(rows[:, :-4])).view(self.spec.torch_dtype)

    def check_rows(self, level: int, index: I64, rows: U8) -> None:
        """Raise DamagedError when one of the nodes `index` of a level, read as `rows`, does not have its checksum."""
        wrong = _wrong_rows(rows)
        if len(wrong):
            raise DamagedError(
                f"node ({level}, {int(index[int(wrong[0])])}) in {str(self.levels[level - 1].path)!r} has changed since "
                "it was stored. Close the tree or session and open it with salvage=True, which makes damaged gists anew "
                "from the ids."
            )

    def _records(self, name: str, stride: int) -> RecordFile:
        file = RecordFile(self.folder / name, stride, self.writable)
        self._open.append(file)
        return file

    def _commits(self, name: str) -> CommitSlots:
        file = CommitSlots(self.folder / name, self.writable)
        self._open.append(file)
        return file


def level_files(folder: Path) -> list[tuple[int, int, Path]]:
    """(generation, level, path) of every level file in a folder."""
    found = [(re.fullmatch(r"gists_(\d+)_(\d\d)\.bin", path.name), path) for path in folder.glob("gists_*.bin")]
    return [(int(match[1]), int(match[2]), path) for match, path in found if match]


def row_crcs(rows: npt.NDArray[Any]) -> U32:
    """crc32 of each row: uint32 [n]."""
    return np.fromiter(map(zlib.crc32, np.ascontiguousarray(rows)), np.uint32, len(rows))


def _wrong_rows(rows: U8) -> I64:
    """Which rows [n, bytes + 4] do not end in the crc32 of what comes before it."""
    return np.flatnonzero(row_crcs(rows) != _CRC_OF_WHOLE)
