"""The gist tree of one history: append-only, level l has a node for every complete aligned span of r^l tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megacontext import arguments
from megacontext.context.gist_function import GistFunction, check_block_size, levels_of
from megacontext.context.store import DTYPES, U32, MemoryStore, TreeSpec, TreeStore
from megacontext.context.store_branch import ReadingStore
from megacontext.context.store_disk import DiskStore
from megacontext.errors import DataError, UserError

_log = logging.getLogger(__name__)


class Tree:
    """Ids and gist records of a history of T tokens; `floor(T/r^l)` nodes at level l, nothing padded.

    The tree depends on the ids alone, not on how they were chunked (T2): ids are bit-equal, and so are records when the
    gist function's bits do not depend on its batch (`MeanGist`); a network's records agree to its rounding.
    Levels grow with the history up to `max_lod`, without limit when it is None. Gists are computed without gradient
    (training uses `build_levels`), at most `batch_tokens` tokens at a time. One thread uses a tree at a time.

    Raises UserError for a block size below 2 or a cap below 0.
    """

    def __init__(
        self,
        gist: GistFunction,
        store: TreeStore | None = None,
        *,
        vocab_size: int = 0,
        max_lod: int | None = None,
        dtype: str = "float32",
        batch_tokens: int = 1 << 16,
    ) -> None:
        self.gist = gist
        self.block_size = gist.block_size
        self.max_lod = max_lod
        self.gist_runs: dict[int, int] = {}  # records made and stored by this object, by level (T3)
        if max_lod is not None and max_lod < 0:
            raise UserError(f"max_lod is {max_lod}; use 0 for raw tokens only, or None for as many levels as needed.")
        window = gist.block_size * gist.leaf_context_blocks
        self._batch_tokens = max(1, batch_tokens // window) * window
        self._store = MemoryStore(tree_spec(gist, vocab_size, dtype)) if store is None else store
        self._vocab_size = self._store.spec.vocab_size
        self._closed = False
        try:
            if not self._store.writable and any(first < last for _, first, last in self._missing()):
                self._store = ReadingStore(self._store)
            self._rebuild()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        path: str,
        gist: GistFunction,
        *,
        vocab_size: int = 0,
        max_lod: int | None = None,
        dtype: str = "float32",
        writable: bool = True,
        durable: bool = False,
        replace_gists: bool = False,
        salvage: bool = False,
        batch_tokens: int = 1 << 16,
    ) -> Tree:
        """Open the tree in a local folder, or make one there; gists that a crash took are made again.

        `durable`: every append is on the disk itself before it returns (survives a power cut; a killed process loses
        nothing either way). `replace_gists`: keep the ids of a tree of another model and make its gists anew.
        `writable=False` opens the tree for reading: nothing on the disk changes, and of a damaged tree what is intact is
        shown. `salvage`: go on from the intact tokens of a damaged tree; ids that it cuts are kept in a file named
        `ids.bin.damaged-<n>…`, and all checksums are compared. Damage that costs no ids is mended by every writer: gists
        and checksums are made anew from ids that are intact.
        Raises UserError when another process has it open for writing, DamagedError when ids that were stored safely are
        damaged and the tree is opened for writing without `salvage`, DataError when it is of another model, block
        size, dtype or width, StorageError when the folder cannot be used.
        """
        spec = tree_spec(gist, vocab_size, dtype)
        store = DiskStore(path, spec, writable=writable, durable=durable, replace_gists=replace_gists, salvage=salvage)
        return cls(gist, store, max_lod=max_lod, batch_tokens=batch_tokens)

    @property
    def tokens(self) -> int:
        """T, tokens of the history."""
        self._check_open()
        return self._store.tokens

    @property
    def levels(self) -> int:
        """Levels above the tokens that hold at least one node."""
        return levels_of(self.tokens, self.block_size, self.max_lod)

    @property
    def store(self) -> TreeStore:
        """Where the ids and records live."""
        return self._store

    def count(self, level: int) -> int:
        """Nodes of a level: floor(T/r^level), 0 above the highest level."""
        return self.tokens // self.block_size**level if level == 0 or level <= self.levels else 0

    def append(self, ids: Sequence[int] | npt.NDArray[np.integer] | Tensor) -> int:
        """Add tokens at the end and make every node that they complete; returns T.

        Each batch of `batch_tokens` is one commit: an error leaves the batches before it in place, and `tokens` says
        how far that is. Raises DataError for an id outside the vocabulary (nothing is added then), StorageError when
        the disk is full.
        """
        self._check_open()
        if not self._store.writable:
            raise UserError("the tree was opened for reading only; open it with writable=True to append.")
        new = self._valid_ids(ids)
        done = 0
        while done < len(new):
            room = self._batch_tokens - self._store.tokens % self._batch_tokens  # batches end at window boundaries
            self._append_batch(new[done : done + room])
            done += room
        return self._store.tokens

    def ids(self, start: int, stop: int) -> Tensor:
        """Ids of tokens [start, stop), int64. Raises UserError outside the history."""
        if not 0 <= start <= stop <= self.tokens:
            raise UserError(f"tokens [{start}, {stop}) are not in a history of {self.tokens} tokens.")
        return torch.from_numpy(self._store.ids(start, stop).astype(np.int64))

    def records(self, level: int, index: npt.NDArray[np.integer] | Sequence[int] | Tensor) -> Tensor:
        """Records [n, R] of nodes of a level >= 1, in the stored dtype. Raises UserError for a node that does not exist."""
        wanted = np.ascontiguousarray(np.asarray(index), dtype=np.int64)
        if wanted.size:
            self._check_nodes(level, int(wanted.min()), int(wanted.max()) + 1)
        elif level < 1:
            raise UserError("level 0 holds ids, not records.")
        if not wanted.size:
            return torch.empty(0, self.gist.record_width, dtype=self._store.spec.torch_dtype)
        return self._store.gather(level, wanted)

    def record_range(self, level: int, start: int, stop: int) -> Tensor:
        """Records [stop - start, R] of consecutive nodes; in memory a view that must not be written to."""
        self._check_nodes(level, start, stop)
        return self._store.records(level, start, stop)

    def sync(self) -> None:
        """Make everything appended so far survive a power cut."""
        self._check_open()
        self._store.sync()

    def verify(self) -> None:
        """Check every id and gist on the disk against its checksum, in constant memory.

        Raises DamagedError that names the file, what has changed in it and the remedy. A tree in memory has no checksums.
        """
        self._check_open()
        self._store.verify()

    def close(self) -> None:
        """Release the store; the tree can't be used afterwards. Closing twice is fine."""
        self._closed = True
        self._store.close()

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f"at {self._store.where!r}" if isinstance(self._store, DiskStore) else "in memory"
        if self._closed:
            return f"<Tree: blocks of {self.block_size}, {where}, closed>"
        return f"<Tree: {self.tokens:,} tokens, {self.levels} levels, blocks of {self.block_size}, {where}>"

    def _append_batch(self, new: U32) -> None:
        """One commit: ids and the records of every node that they complete, one gist call a level (two with windows)."""
        before, r = self._store.tokens, self.block_size
        after = before + len(new)
        made: list[Tensor] = []
        for level in range(1, levels_of(after, r, self.max_lod) + 1):
            first, last = before // r**level, after // r**level
            if first == last:
                break  # a level without a new node has none above it either
            if level == 1:
                window_start = first // self.gist.leaf_context_blocks * self.gist.leaf_context_blocks * r
                ids = np.concatenate([self._store.ids(window_start, before), new]) if window_start < before else new
                made.append(self._leaf(ids, first, last))
            else:
                old = before // r ** (level - 1) - first * r  # children made by earlier appends
                children = made[-1]
                if old:
                    children = torch.cat([self._store.records(level - 1, first * r, first * r + old), children])
                made.append(self._inner(children[: (last - first) * r], level, first))
        self._store.append(new, made)
        for level, records in enumerate(made, 1):
            self.gist_runs[level] = self.gist_runs.get(level, 0) + len(records)

    def _leaf(self, ids: U32, first: int, last: int) -> Tensor:
        """Records of blocks [first, last); `ids` starts at the start of the window that block `first` lies in."""
        r, c = self.block_size, self.gist.leaf_context_blocks
        context = first % c
        blocks = last - first + context
        block_ids = torch.from_numpy(ids[: blocks * r].astype(np.int64)).view(blocks, r)
        whole = blocks // c * c
        parts = []
        with torch.no_grad():
            if whole:
                parts.append(self.gist.leaf(block_ids[:whole].view(-1, c, r)).flatten(0, 1))
            if blocks > whole:
                parts.append(self.gist.leaf(block_ids[whole:].unsqueeze(0)).squeeze(0))
        records = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._checked(records[context:], last - first, 1, first)

    def _inner(self, children: Tensor, level: int, first: int) -> Tensor:
        """Records of nodes first, first + 1, … of a level from their children [n·r, R]."""
        r = self.block_size
        with torch.no_grad():
            records = self.gist.inner(children.float().view(-1, r, children.shape[-1]), level)
        return self._checked(records, len(children) // r, level, first)

    def _checked(self, records: Tensor, count: int, level: int, first: int) -> Tensor:
        """What is stored: right shape, finite, on the CPU, in the store's dtype."""
        assert records.shape == (count, self.gist.record_width), f"gist function returned {tuple(records.shape)}"
        stored = records.detach().to(device="cpu", dtype=self._store.spec.torch_dtype)
        if not bool(torch.isfinite(stored.sum(dtype=torch.float32))) and not bool(torch.isfinite(stored).all()):
            bad = first + int((~torch.isfinite(stored).all(1)).nonzero()[0, 0])
            raise DataError(
                f"the gist of node ({level}, {bad}) is not finite in {self._store.spec.dtype}; nothing was appended. "
                "Check the model, or use dtype float32."
            )
        return stored

    def _missing(self) -> list[tuple[int, int, int]]:
        """(level, records stored, records due) of each level."""
        total, r = self._store.tokens, self.block_size
        levels = range(1, levels_of(total, r, self.max_lod) + 1)
        return [(level, self._store.count(level), total // r**level) for level in levels]

    def _rebuild(self) -> None:
        """Make the records that the store lacks: lost in a crash, damaged, or of levels that an earlier cap left out."""
        r, window = self.block_size, self.gist.leaf_context_blocks
        for level, first, due in self._missing():
            nodes = max(
                1, self._batch_tokens // (r if level == 1 else r * r)
            )  # a batch reads as many rows at any level
            if first < due:
                text = "%d of %d gists of level %d are not stored in the tree at %s; they are made from its ids"
                _log.warning(text, due - first, due, level, self._store.where)
            while first < due:
                last = min(due, (first // nodes + 1) * nodes)
                if level == 1:
                    start = first // window * window * r
                    records = self._leaf(self._store.ids(start, last * r), first, last)
                else:
                    records = self._inner(self._store.records(level - 1, first * r, last * r), level, first)
                self._store.add_records(level, records)
                self.gist_runs[level] = self.gist_runs.get(level, 0) + len(records)
                first = last
        if self.gist_runs:
            self._store.sync()

    def _valid_ids(self, ids: Sequence[int] | npt.NDArray[np.integer] | Tensor) -> U32:
        """The ids as uint32 [n]. Raises DataError for one outside the vocabulary."""
        return arguments.token_ids("the append", ids, self._vocab_size or 1 << 32).astype(np.uint32)

    def _check_nodes(self, level: int, start: int, stop: int) -> None:
        if level < 1:
            raise UserError("level 0 holds ids, not records; use ids(start, stop).")
        if not 0 <= start <= stop <= self.count(level):
            raise UserError(
                f"nodes [{start}, {stop}) of level {level} are not in the tree; it has {self.count(level)}."
            )

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("the tree is closed; open it again.")


def tree_spec(gist: GistFunction, vocab_size: int, dtype: str) -> TreeSpec:
    """What a store of this gist function's records must agree with. Raises UserError for impossible settings."""
    check_block_size(gist.block_size)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one a tree can store; use {', '.join(DTYPES)}.")
    return TreeSpec(
        block_size=gist.block_size,
        record_width=gist.record_width,
        dtype=dtype,
        leaf_context_blocks=gist.leaf_context_blocks,
        gist_digest=gist.digest,
        vocab_size=vocab_size,
    )


def all_records(tree: Tree) -> list[Tensor]:
    """Every level's records [count, R], level 1 first: for tests and small trees."""
    return [tree.record_range(level, 0, tree.count(level)) for level in range(1, tree.levels + 1)]
