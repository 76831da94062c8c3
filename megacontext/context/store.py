"""Where a tree's ids and records live: the protocol that a tree needs, and the store in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class TreeSpec:
    """What must agree between a stored tree and whoever opens it. `vocab_size` 0 is not known."""

    block_size: int
    record_width: int
    dtype: str
    leaf_context_blocks: int
    gist_digest: str
    vocab_size: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Recovery:
    """What opening a store found: tokens kept, whole ids dropped after them, records cut from the level files."""

    tokens: int
    ids_dropped: int = 0
    records_dropped: int = 0

    @property
    def clean(self) -> bool:
        return not (self.ids_dropped or self.records_dropped)


class TreeStore(Protocol):
    """Append-only ids and records. Counts of records may lag behind the ids after a recovery; the tree then rebuilds."""

    spec: TreeSpec
    recovery: Recovery
    writable: bool
    where: str  # a folder, or "memory": for messages

    @property
    def tokens(self) -> int:
        """Committed tokens."""

    def count(self, level: int) -> int:
        """Records held of a level >= 1; 0 for a level that does not exist."""

    def append(self, ids: U32, records: Sequence[Tensor]) -> None:
        """Add ids [n] and the new records [m_l, R] of levels 1, 2, … in one commit: all of it or nothing.

        Raises StorageError when it cannot be written; the store is then as before.
        """

    def add_records(self, level: int, records: Tensor) -> None:
        """Add records [m, R] to a level that lags behind the ids."""

    def ids(self, start: int, stop: int) -> U32:
        """Ids of tokens [start, stop)."""

    def records(self, level: int, start: int, stop: int) -> Tensor:
        """Records [stop - start, R] of consecutive nodes, in the stored dtype. Must not be written to."""

    def gather(self, level: int, index: I64) -> Tensor:
        """Records [n, R] of any nodes, in the stored dtype."""

    def sync(self) -> None:
        """Make everything appended so far survive a power cut."""

    def verify(self) -> None:
        """Check every id and record against its checksum. Raises DamagedError for the first that has changed."""

    def close(self) -> None:
        """Release files and locks. Closing twice is fine."""


class MemoryStore:
    """A store in memory: one contiguous tensor per level, grown by doubling."""

    writable = True
    where = "memory"

    def __init__(self, spec: TreeSpec) -> None:
        self.spec = spec
        self.recovery = Recovery(0)
        self._ids = np.empty(0, np.uint32)
        self._tokens = 0
        self._levels: list[Tensor] = []
        self._counts: list[int] = []

    @property
    def tokens(self) -> int:
        return self._tokens

    def count(self, level: int) -> int:
        return self._counts[level - 1] if level <= len(self._counts) else 0

    def append(self, ids: U32, records: Sequence[Tensor]) -> None:
        stop = self._tokens + len(ids)
        if stop > len(self._ids):
            grown = np.empty(max(stop, 2 * len(self._ids), 1024), np.uint32)
            grown[: self._tokens] = self._ids[: self._tokens]
            self._ids = grown
        for level, new in enumerate(records, 1):
            if len(new):
                self.add_records(level, new)
        self._ids[self._tokens : stop] = ids
        self._tokens = stop

    def add_records(self, level: int, records: Tensor) -> None:
        while level > len(self._levels):
            self._levels.append(torch.empty(0, self.spec.record_width, dtype=self.spec.torch_dtype))
            self._counts.append(0)
        held, stop = self._levels[level - 1], self._counts[level - 1] + len(records)
        if stop > len(held):
            with torch.inference_mode(False):  # records are added in other modes than the one of this call
                grown = torch.empty(max(stop, 2 * len(held), 16), self.spec.record_width, dtype=self.spec.torch_dtype)
            grown[: self._counts[level - 1]] = held[: self._counts[level - 1]]
            self._levels[level - 1] = held = grown
        held[self._counts[level - 1] : stop] = records
        self._counts[level - 1] = stop

    def ids(self, start: int, stop: int) -> U32:
        return self._ids[start:stop]

    def records(self, level: int, start: int, stop: int) -> Tensor:
        return self._levels[level - 1][start:stop]

    def gather(self, level: int, index: I64) -> Tensor:
        return self._levels[level - 1].index_select(0, torch.from_numpy(index))

    def sync(self) -> None:
        """Nothing to do: memory does not survive anything."""

    def verify(self) -> None:
        """Nothing to do: memory has no checksums."""

    def close(self) -> None:
        """Forget everything."""
        self._ids, self._levels, self._counts, self._tokens = np.empty(0, np.uint32), [], [], 0
