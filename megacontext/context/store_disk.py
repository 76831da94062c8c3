"""A tree's store on disk. Opens in constant memory, and as a durable prefix whatever byte the writer died at.

    tree.json             what the tree is (block size, dtype, width, gist digest, version, checksum); replaced atomically
    ids.bin               uint32 per token
    ids.crc               crc32 of the ids of each complete block
    gists_<g>_<l>.bin     records of level l, generation g: R values and a crc32 each
    commit.bin            four slots: how many tokens are part of the tree, and the crc of the last append
    lock                  held by the one writer

An append writes ids, then block checksums, then records, and last one commit slot. Opening takes the latest commit that
its ids bear out, checks everything since the last flush to the disk, and cuts what lies behind. Ids that pass are kept
even if their gists did not arrive: gists can always be made again.
"""

from __future__ import annotations

import contextlib
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megacontext import storage
from megacontext.context.disk_files import U8, Commit, CommitSlots, Header, RecordFile, WriterLock
from megacontext.context.store import I64, U32, Recovery, TreeSpec
from megacontext.errors import DataError, StorageError, UserError

_log = logging.getLogger(__name__)
_CHECK_ROWS = 4096  # records read at once while checking
_FLUSH_TOKENS = 1 << 20  # flushed at least this often, which bounds what opening after a crash has to check


class DiskStore:
    """A tree's ids and records in a local folder. One writer, any number of readers, which see what was committed when they opened.

    Raises UserError when the tree is open for writing elsewhere or the path is a URI, DataError when it is damaged or
    of another kind, StorageError when the folder cannot be used.
    """

    def __init__(
        self,
        path: str,
        spec: TreeSpec,
        *,
        writable: bool = True,
        durable: bool = False,
        replace_gists: bool = False,
        salvage: bool = False,
    ) -> None:
        if not storage.is_local(path):
            raise UserError(
                f"a tree on disk needs a local folder, not {path!r}; copy the folder to shared storage when it is closed."
            )
        self.spec, self.writable, self._durable = spec, writable, durable
        self._folder = storage.local_path(path)
        self._open: list[RecordFile | CommitSlots | WriterLock] = []
        self._levels: list[RecordFile] = []
        self._counts: list[int] = []
        self._ready = False
        self._commit = Commit(0, 0, 0, 0)
        self._flushed = 0  # tokens that are on the disk itself
        self._tail = np.empty(0, np.uint32)  # ids of the block that is not complete yet
        try:
            self._open_files(replace_gists)
            self.recovery = self._recover(salvage)
            self._ready = True
        except OSError as error:
            self.close()
            if isinstance(error, StorageError):
                raise
            raise StorageError(
                f"cannot open the tree at {path!r}: {error}. Check the path, permissions and free space."
            ) from error
        except BaseException:
            self.close()
            raise

    @property
    def tokens(self) -> int:
        return self._commit.tokens

    def count(self, level: int) -> int:
        return self._counts[level - 1] if level <= len(self._counts) else 0

    def append(self, ids: U32, records: Sequence[Tensor]) -> None:
        start, stop, r = self.tokens, self.tokens + len(ids), self.spec.block_size
        open_ids = np.concatenate([self._tail, ids]) if len(self._tail) else ids
        blocks, raw_ids = len(open_ids) // r, ids.tobytes()
        with self._writing(
            f"{start:,} tokens are safe, the append of {len(ids):,} was undone; free space and repeat it"
        ):
            self._ids.write(start, raw_ids)
            if blocks:
                self._crcs.write(start // r, _crcs(open_ids[: blocks * r].reshape(blocks, r)).tobytes())
            for level, new in enumerate(records, 1):
                if len(new):
                    self._level(level).write(self.count(level), self._packed(new))
            commit = Commit(self._commit.sequence + 1, start, stop, zlib.crc32(raw_ids))
            flush = self._durable or stop - self._flushed >= _FLUSH_TOKENS
            if flush:
                self._flush_data()
            self._slots.write(commit, flush)
        self._commit = commit
        self._flushed = stop if flush else self._flushed
        self._tail = np.array(open_ids[blocks * r :])
        for level, new in enumerate(records, 1):
            if len(new):
                self._counts[level - 1] += len(new)

    def add_records(self, level: int, records: Tensor) -> None:
        with self._writing("its ids are safe; free space and open it again"):
            self._level(level).write(self.count(level), self._packed(records))
        self._counts[level - 1] += len(records)
        self._dirty = True

    def ids(self, start: int, stop: int) -> U32:
        return self._ids.read(start, stop).reshape(-1).view(np.uint32)

    def records(self, level: int, start: int, stop: int) -> Tensor:
        return self._unpacked(self._levels[level - 1].read(start, stop))

    def gather(self, level: int, index: I64) -> Tensor:
        return self._unpacked(self._levels[level - 1].gather(index))

    def sync(self) -> None:
        if self.writable and (self._dirty or self._flushed < self.tokens):
            with self._writing("everything appended is kept; free space and sync again"):
                self._flush_data()
                last = self._commit
                commit = Commit(last.sequence + 1, last.start, last.tokens, last.ids_crc)
                self._slots.write(commit, flushed=True)
            self._commit, self._flushed, self._dirty = commit, commit.tokens, False

    def close(self) -> None:
        try:
            if self._ready:
                self.sync()
        finally:
            for file in self._open:
                file.close()
            self._open, self._ready = [], False

    def verify(self) -> None:
        """Check every id and record against its checksum, in constant memory. Raises DataError naming the first bad one."""
        r = self.spec.block_size
        good = self._good_blocks(0, self.tokens // r)
        if good < self.tokens // r:
            raise DataError(f"ids [{good * r}, {(good + 1) * r}) of the tree at {str(self._folder)!r} are damaged.")
        for level, file in enumerate(self._levels, 1):
            good = _good_rows(file, 0, self.count(level))
            if good < self.count(level):
                raise DataError(
                    f"node ({level}, {good}) of the tree at {str(self._folder)!r} is damaged; open it with replace_gists=True."
                )

    # Opening

    def _open_files(self, replace_gists: bool) -> None:
        if self.writable:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._open.append(WriterLock(self._folder / "lock", str(self._folder)))
        header = Header.load(self._folder)
        if header is None:
            if not self.writable:
                raise DataError(f"there is no tree at {str(self._folder)!r}; open it with writable=True to make one.")
            if any(self._folder.glob("*.bin")):
                raise DataError(
                    f"{str(self._folder)!r} holds the files of a tree without tree.json; restore it, or use another folder."
                )
            header = Header(self.spec)
            header.save(self._folder)
        header.check(self.spec, self._folder, replace_gists)
        if replace_gists:
            if not self.writable:
                raise UserError("replace_gists changes the tree; open it with writable=True.")
            header = Header(self.spec, header.generation + 1)
            header.save(self._folder)
        self.spec, self._generation = header.spec, header.generation
        self._slots = CommitSlots(self._folder / "commit.bin", self.writable)
        self._open.append(self._slots)
        self._ids = self._opened("ids.bin", 4)
        self._crcs = self._opened("ids.crc", 4)
        if self.writable:
            self._slots.create()
        self._open_levels()

    def _open_levels(self) -> None:
        """Open the level files of this generation; the writer removes those of others."""
        for path in self._folder.glob("gists_*.bin"):
            match = re.fullmatch(r"gists_(\d+)_(\d+)\.bin", path.name)
            if self.writable and match and int(match[1]) != self._generation:
                path.unlink()
        while self._level_path(len(self._levels) + 1).exists():
            self._add_level()

    def _opened(self, name: str, stride: int) -> RecordFile:
        file = RecordFile(self._folder / name, stride, self.writable)
        self._open.append(file)
        return file

    def _level_path(self, level: int) -> Path:
        return self._folder / f"gists_{self._generation}_{level:02d}.bin"

    def _add_level(self) -> None:
        width = self.spec.record_width * self.spec.torch_dtype.itemsize
        self._levels.append(self._opened(self._level_path(len(self._levels) + 1).name, width + 4))
        self._counts.append(0)

    def _level(self, level: int) -> RecordFile:
        while level > len(self._levels):
            self._add_level()
        return self._levels[level - 1]

    def _recover(self, salvage: bool) -> Recovery:
        """Find the durable state, and as the writer cut the files to it."""
        r, slots = self.spec.block_size, self._slots.read()
        flushed = next((commit for commit, was_flushed in slots if was_flushed), None)
        if flushed and flushed.tokens <= self._ids.held() and not self._ids_fit(flushed) and not salvage:
            raise DataError(
                f"ids [{flushed.start}, {flushed.tokens}) of the tree at {str(self._folder)!r} were stored safely and have "
                "changed since. Restore it from a copy; or keep what comes before the damage with salvage=True."
            )
        self._flushed = flushed.tokens if flushed else 0
        commit = next((commit for commit, _ in slots if self._borne_out(commit)), None)
        latest = slots[0][0].sequence if slots else 0
        if commit is None:  # a new tree, or one whose last appends are all damaged: keep the blocks that pass
            self._flushed = 0
            tokens = min(self._ids.held() // r, self._crcs.held()) * r
            commit = Commit(latest, tokens, tokens, 0)
        self._flushed = min(self._flushed, commit.tokens)
        good = self._good_blocks(self._flushed // r, commit.tokens // r)
        if good < commit.tokens // r:
            commit = Commit(commit.sequence, good * r, good * r, 0)
        self._commit, dropped = commit, self._ids.held() - commit.tokens
        cut = 0
        for level, file in enumerate(self._levels, 1):
            held = file.held()
            keep = min(held, commit.tokens // r**level)
            self._counts[level - 1] = _good_rows(file, min(keep, self._flushed // r**level), keep)
            cut += held - self._counts[level - 1]
        self._tail = self.ids(commit.tokens // r * r, commit.tokens).copy()
        self._dirty = bool(dropped or cut or not slots or slots[0][0] != commit)
        if self.writable and (self._dirty or self._flushed < commit.tokens):
            self._cut_files()
            spare = latest + (latest % 2 != commit.sequence % 2)  # the next commit must not take this one's slot
            self._commit = Commit(spare, commit.start, commit.tokens, commit.ids_crc)
            self._dirty = True
            self.sync()
        recovery = Recovery(commit.tokens, dropped, cut)
        if not recovery.clean and self.writable:
            text = "the tree at %s was not closed: kept %d tokens, dropped %d unfinished ids and %d gists"
            _log.warning(text, self._folder, recovery.tokens, dropped, cut)
        return recovery

    def _borne_out(self, commit: Commit) -> bool:
        """Whether the files hold what a commit says."""
        long_enough = commit.tokens <= self._ids.held() and commit.tokens // self.spec.block_size <= self._crcs.held()
        return long_enough and self._ids_fit(commit)

    def _ids_fit(self, commit: Commit) -> bool:
        return zlib.crc32(self._ids.read(commit.start, commit.tokens).tobytes()) == commit.ids_crc

    def _good_blocks(self, start: int, stop: int) -> int:
        """First block of [start, stop) whose ids do not fit their checksum; `stop` if all do."""
        r = self.spec.block_size
        for first in range(start, stop, _CHECK_ROWS):
            last = min(stop, first + _CHECK_ROWS)
            found = _crcs(self.ids(first * r, last * r).reshape(-1, r))
            bad = np.flatnonzero(found != self._crcs.read(first, last).reshape(-1).view(np.uint32))
            if bad.size:
                return first + int(bad[0])
        return stop

    # Writing

    def _cut_files(self) -> None:
        self._ids.cut(self.tokens)
        self._crcs.cut(self.tokens // self.spec.block_size)
        for file, count in zip(self._levels, self._counts, strict=True):
            file.cut(count)

    def _flush_data(self) -> None:
        for file in (self._ids, self._crcs, *self._levels):
            file.sync()
        storage.sync_dir(self._folder)

    @contextlib.contextmanager
    def _writing(self, state: str) -> Iterator[None]:
        """Undo a write that fails: cut the files to what is committed, and raise StorageError."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(
                OSError
            ):  # what can't be cut now is overwritten by the next append or cut at opening
                self._cut_files()
            if isinstance(error, OSError):
                raise StorageError(f"cannot write to the tree at {str(self._folder)!r}: {error}. {state}.") from error
            raise

    def _packed(self, records: Tensor) -> bytes:
        """Records [m, R] with their checksums, as bytes."""
        values = records.contiguous().view(torch.uint8).numpy()
        packed = np.empty((len(values), values.shape[1] + 4), np.uint8)
        packed[:, :-4] = values
        packed[:, -4:] = _crcs(values).view(np.uint8).reshape(-1, 4)
        return packed.tobytes()

    def _unpacked(self, rows: U8) -> Tensor:
        """Rows of a level file [n, bytes + 4] -> records [n, R]."""
        return torch.from_numpy(np.array(rows[:, :-4])).view(self.spec.torch_dtype)


def _crcs(rows: npt.NDArray[Any]) -> U32:
    """crc32 of each row: uint32 [n]."""
    return np.fromiter(map(zlib.crc32, np.ascontiguousarray(rows)), np.uint32, len(rows))


def _good_rows(file: RecordFile, start: int, stop: int) -> int:
    """First record of [start, stop) of a level file that does not bear its own checksum; `stop` if all do."""
    for first in range(start, stop, _CHECK_ROWS):
        last = min(stop, first + _CHECK_ROWS)
        rows = file.read(first, last)
        stored = np.ascontiguousarray(rows[:, -4:]).view(np.uint32).reshape(-1)
        bad = np.flatnonzero(_crcs(rows[:, :-4]) != stored)
        if bad.size:
            return first + int(bad[0])
    return stop
