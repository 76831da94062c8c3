"""A tree's store on disk. Opens in constant memory, and as a durable prefix whatever byte the writer died at.

    tree.json             what the tree is (block size, dtype, width, gist digest, version, checksum); replaced atomically
    ids.bin               uint32 per token
    ids.crc               crc32 of the ids of each complete block
    gists_<g>_<l>.bin     records of level l, generation g: R values and a crc32 each
    commit.bin            slots of commits: how many tokens are part of the tree, and the crc of their ids
    commit.copy           the last flushed commit once more, for a commit.bin that is lost
    lock                  held by the one writer
    *.damaged-<n>         what `salvage` cut or replaced; read by nothing

An append writes ids, then block checksums, then records, and last one commit slot. Opening is told in `recovery`. What
opening does not compare with its checksums, the first read of it does (a byte of memory for each such record).
"""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megacontext import storage
from megacontext.context.disk_files import HEADER, U8, Commit, Header, WriterLock
from megacontext.context.recovery import Finding, examine, move_aside, repair
from megacontext.context.store import I64, U32, TreeSpec
from megacontext.context.tree_files import TreeFiles, level_files, row_crcs
from megacontext.errors import DamagedError, DataError, StorageError, UserError

_log = logging.getLogger(__name__)
_SALVAGE = (
    "Restore the file from a copy; or close the tree or session and open it with salvage=True, which goes on from what is "
    "intact."
)
_FLUSH_TOKENS = 1 << 20  # flushed at least this often, which bounds what opening after a crash has to check


class DiskStore:
    """A tree's ids and records in a local folder. One writer, any number of readers, which see what was committed when they opened.

    `writable=False` changes nothing on the disk, and shows of a damaged tree what is intact. `salvage` goes on from what
    is intact, and keeps what it cuts in files named `*.damaged-<n>`. `read_option` is how messages call the reader's option.
    Raises UserError when the tree is open for writing elsewhere or the path is a URI, DamagedError when it is damaged
    (a reader raises that only when nothing can be shown), DataError when it is of another kind, StorageError when the
    folder cannot be used.
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
        read_option: str = "writable=False",
    ) -> None:
        if not storage.is_local(path):
            raise UserError(
                f"a tree on disk needs a local folder, not {path!r}; copy the folder to shared storage when it is closed."
            )
        if not writable and (replace_gists or salvage):
            raise UserError(f"replace_gists and salvage change the tree; leave out {read_option}.")
        self.spec, self.writable, self._durable, self._read_option = spec, writable, durable, read_option
        self._folder = storage.local_folder(path)
        self.where = str(self._folder)
        self._lock: WriterLock | None = None
        self._files: TreeFiles | None = None
        self._commit = Commit(0, 0, 0, 0)
        self._copied: Commit | None = None  # what commit.copy says
        self._flushed = 0  # tokens that are on the disk itself
        self._counts: list[int] = []  # records of each level
        self._tail: U32 = np.empty(0, np.uint32)  # ids behind the last complete block
        self._ready = self._dirty = False
        self._damage = ""  # what a reader found damaged
        self._unchecked = 0  # ids at the start that every read compares with their checksums
        self._doubted: list[npt.NDArray[np.bool_]] = []  # which records at the start of each level likewise
        try:
            self._open(replace_gists, salvage)
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
        blocks, raw_ids, files = len(open_ids) // r, ids.tobytes(), self._opened
        tail: U32 = np.array(open_ids[blocks * r :])
        with self._writing(
            f"{start:,} tokens are safe, the append of {len(ids):,} was undone; free space and repeat it"
        ):
            if blocks:
                files.slots.announce(start, stop)
            files.ids.write(start, raw_ids)
            if blocks:
                files.crcs.write(start // r, row_crcs(open_ids[: blocks * r].reshape(blocks, r)).tobytes())
            for level, new in enumerate(records, 1):
                if len(new):
                    self._write_records(level, new)
            commit = Commit(
                self._commit.sequence + 1,
                start,
                stop,
                append_crc=zlib.crc32(raw_ids),
                tail_crc=zlib.crc32(tail.tobytes()),
                all_crc=zlib.crc32(raw_ids, self._commit.all_crc or 0),
            )
            flush = self._durable or stop - self._flushed >= _FLUSH_TOKENS
            if flush:
                self._flush_data()
            files.slots.write(commit, flush)
        self._commit = commit
        self._flushed = stop if flush else self._flushed
        self._tail = tail
        for level, new in enumerate(records, 1):
            if len(new):
                self._counts[level - 1] += len(new)

    def add_records(self, level: int, records: Tensor) -> None:
        with self._writing("its ids are safe; free space and open it again"):
            self._write_records(level, records)
        self._counts[level - 1] += len(records)
        self._dirty = True

    def ids(self, start: int, stop: int) -> U32:
        if start >= self._unchecked:
            return self._opened.read_ids(start, stop)
        r = self.spec.block_size
        first, last = start // r, -(-min(stop, self._unchecked) // r)  # whole blocks: _unchecked is a multiple of r
        found = self._opened.read_ids(first * r, max(stop, last * r))
        wrong = self._opened.wrong_blocks(found[: (last - first) * r], first)
        if len(wrong):
            self._doubt_ids(first + int(wrong[0]))
        return found[start - first * r : stop - first * r]

    def records(self, level: int, start: int, stop: int) -> Tensor:
        rows = self._opened.levels[level - 1].read(start, stop)
        self._check_once(level, np.arange(start, min(stop, len(self._doubted[level - 1]))), rows)
        return self._opened.unpack(rows)

    def gather(self, level: int, index: I64) -> Tensor:
        rows = self._opened.levels[level - 1].gather(index)
        old = index < len(self._doubted[level - 1])
        self._check_once(level, index[old], rows[old] if not old.all() else rows)
        return self._opened.unpack(rows)

    def _check_once(self, level: int, index: I64, rows: U8) -> None:
        """Compare those of the first `len(index)` rows with their checksums that were not compared before."""
        doubted = self._doubted[level - 1]
        doubtful = doubted[index]
        if doubtful.any():
            self._opened.check_rows(level, index[doubtful], rows[: len(index)][doubtful])
            doubted[index] = False

    def sync(self) -> None:
        if self.writable and (self._dirty or self._flushed < self.tokens):
            with self._writing("everything appended is kept; free space and sync again"):
                self._flush_data()
                commit = replace(self._commit, sequence=self._commit.sequence + 1)
                self._opened.slots.write(commit, flushed=True)
            self._commit, self._flushed, self._dirty = commit, commit.tokens, False
        if self.writable and self._copied != self._commit:
            with self._writing("everything appended is kept; free space and sync again"):
                self._opened.copy.write(self._commit, flushed=True)
            self._copied = self._commit

    def close(self) -> None:
        try:
            if self._ready:
                self.sync()
        finally:
            for file in (self._files, self._lock):
                if file is not None:
                    file.close()
            self._files, self._lock, self._ready = None, None, False

    def verify(self) -> None:
        """Check every id and record against its checksum, in constant memory. Raises DamagedError for the first bad one."""
        if self._damage:
            raise DamagedError(self._damage)
        files, blocks = self._opened, self.tokens // self.spec.block_size
        if Header.load(self._folder) is None:
            raise DamagedError(f"'tree.json' of the tree at {self.where!r} is missing. {self._remedy()}")
        good = files.good_blocks(0, min(blocks, files.crcs.held()))
        if good < blocks:
            self._doubt_ids(good)
            raise DamagedError(
                f"{str(files.crcs.path)!r} has changed since it was stored; the ids are intact. {_SALVAGE}"
            )
        if files.ids_crc(0, self.tokens) != self._commit.all_crc:
            raise DamagedError(
                f"ids [{blocks * self.spec.block_size:,}, {self.tokens:,}) in {str(files.ids.path)!r} have changed since "
                f"they were stored. {_SALVAGE}"
            )
        for level in range(1, len(files.levels) + 1):
            good = files.good_records(level, 0, self.count(level))
            if good < self.count(level):
                files.check_rows(level, np.arange(good, good + 1), files.levels[level - 1].read(good, good + 1))

    # Opening

    def _open(self, replace_gists: bool, salvage: bool) -> None:
        """Nothing is changed before the tree is known to be whole, or `salvage` was asked for."""
        if self.writable:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = WriterLock(self._folder / "lock", self.where, self._read_option)
        stored = self._header(salvage)
        header = stored or Header(
            self.spec, 1 + max((number for number, _, _ in level_files(self._folder)), default=-1)
        )
        if stored is not None:
            stored.check(self.spec, self._folder, replace_gists)
            header = Header(stored.spec, stored.generation)  # of this program's version
            if replace_gists:
                newest = max([stored.generation, *(number for number, _, _ in level_files(self._folder))])
                header = Header(self.spec, newest + 1)
        self.spec = header.spec
        self._files = TreeFiles(self._folder, header.spec, header.generation, self.writable)
        found = examine(self._files, thorough=salvage)
        if found.damage:
            self._damage = self._damage or (
                f"{found.damage} {found.commit.tokens:,} tokens are intact. {self._remedy()}"
            )
        if self._damage and self.writable and not salvage:
            raise DamagedError(self._damage)
        self._commit, self._flushed, self._counts = found.commit, found.flushed, found.counts
        self._unchecked, self._doubted = found.unchecked, [np.ones(n, bool) for n in found.unchecked_records]
        tokens, r = found.commit.tokens, header.spec.block_size
        self._tail = self._files.read_ids(tokens // r * r, tokens).copy()
        self._copied = next((commit for commit, _ in self._files.copy.read()), None)
        self.recovery = found.recovery
        if self.writable:
            self._repair(found, header if header != stored else None)
        elif self._damage:
            _log.warning("reading what is intact of the tree at %s: %s", self._folder, self._damage)
        self._ready = True

    def _header(self, salvage: bool) -> Header | None:
        """What tree.json says; None for a new tree, and for one without it of which the rest is to be read."""
        try:
            header = Header.load(self._folder)
            why = f"{str(self._folder / HEADER)!r} is missing, and the tree's other files are there."
        except DamagedError as error:
            header, why = None, str(error)
        if header is not None:
            return header
        absent = not (self._folder / HEADER).exists()
        if absent and not any(self._folder.glob("ids.*")) and not any(self._folder.glob("*.bin")):
            if not self.writable:
                raise DataError(f"there is no tree at {self.where!r}; leave out {self._read_option} to make one.")
            return None
        self._damage = f"{why} {self._remedy()}"
        if self.writable and not salvage:
            raise DamagedError(self._damage)
        return None

    def _repair(self, found: Finding, header: Header | None) -> None:
        """Make the files agree with what was found, and store a new header."""
        files = self._opened
        if header is not None:
            if self._damage and (self._folder / HEADER).exists():
                move_aside(self._folder / HEADER)
            header.save(self._folder)
        self._damage = ""  # salvaged, from here on
        files.create()
        files.remove_older_generations()
        self._dirty = not found.clean
        if not self._dirty and self._flushed == self.tokens:
            return
        kept = repair(files, found)
        # The next flushed commit takes the slot that does not hold the flushed commit found.
        spare = found.latest + (found.latest % 2 != found.safe % 2)
        self._commit, self._dirty = replace(self._commit, sequence=spare), True
        self.sync()
        self._log_repair(found, "" if kept is None else f"; what was cut is kept in {kept.name}")

    def _log_repair(self, found: Finding, kept: str) -> None:
        recovery = found.recovery
        if found.damage:
            _log.warning(
                "salvaged the tree at %s: %s %d tokens are kept%s", self._folder, found.damage, recovery.tokens, kept
            )
        elif not recovery.clean:
            text = "the tree at %s was not closed: kept %d tokens, dropped %d unfinished ids and %d gists%s"
            _log.warning(text, self._folder, recovery.tokens, recovery.ids_dropped, recovery.records_dropped, kept)
        if found.commits_lost:
            _log.warning(
                "commit.bin of the tree at %s was damaged or older than commit.copy; it is mended", self._folder
            )
        if found.crcs_wrong:
            _log.warning(
                "ids.crc of the tree at %s was damaged; it was made anew from its ids, all intact", self._folder
            )

    def _remedy(self) -> str:
        return (
            f"Restore it from a copy; or open it with {self._read_option} to read what is intact; or with "
            "salvage=True to go on from that (what it cuts is kept in a file named *.damaged-1)."
        )

    def _doubt_ids(self, block: int) -> None:
        """Find out whether a block or its checksum has changed. Raises DamagedError if it is the block."""
        files, r = self._opened, self.spec.block_size
        if files.ids_crc(0, self.tokens) != self._commit.all_crc:
            raise DamagedError(
                f"ids [{block * r:,}, {(block + 1) * r:,}) in {str(files.ids.path)!r} have changed since they were "
                f"stored. {_SALVAGE}"
            )
        self._unchecked = 0
        _log.warning("%s is damaged and its tree's ids are intact; salvage=True makes it anew", files.crcs.path)

    # Writing

    @property
    def _opened(self) -> TreeFiles:
        assert self._files is not None, "the store is closed"
        return self._files

    def _write_records(self, level: int, records: Tensor) -> None:
        self._opened.grow(level)
        self._counts += [0] * (level - len(self._counts))
        self._doubted += [np.zeros(0, bool)] * (level - len(self._doubted))
        self._opened.levels[level - 1].write(self.count(level), self._opened.pack(records))

    def _flush_data(self) -> None:
        self._opened.sync()

    @contextlib.contextmanager
    def _writing(self, state: str) -> Iterator[None]:
        """Undo a write that fails: cut the files to what is committed, and raise StorageError."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(
                OSError
            ):  # what can't be cut now is overwritten by the next append or cut at opening
                self._opened.cut(self.tokens, self._counts)
            if isinstance(error, OSError):
                if not self._folder.is_dir():  # files that are open can be written to after their folder was deleted
                    state = "its folder was deleted while it was open, and what it held is gone"
                raise StorageError(f"cannot write to the tree at {self.where!r}: {error}. {state}.") from error
            raise
