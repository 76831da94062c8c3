"""A store that begins with what another holds: many continuations of one history without a copy of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megacontext.context.store import I64, U32, MemoryStore, Recovery, TreeStore


class BranchStore:
    """What `base` holds now, and in memory what is appended here. The base stays as it is, and must not grow meanwhile.

    Closing the branch leaves the base open.
    """

    writable = True

    def __init__(self, base: TreeStore) -> None:
        self.spec = base.spec
        self.recovery, self.where = Recovery(base.tokens), base.where
        self._base, self._own = base, MemoryStore(base.spec)
        self._tokens = base.tokens

    @property
    def tokens(self) -> int:
        return self._tokens + self._own.tokens

    def count(self, level: int) -> int:
        return self._base.count(level) + self._own.count(level)

    def append(self, ids: U32, records: Sequence[Tensor]) -> None:
        self._own.append(ids, records)

    def add_records(self, level: int, records: Tensor) -> None:
        self._own.add_records(level, records)

    def ids(self, start: int, stop: int) -> U32:
        split = self._tokens
        if stop <= split:
            return self._base.ids(start, stop)
        own = self._own.ids(max(start - split, 0), stop - split)
        return own if start >= split else np.concatenate([self._base.ids(start, split), own])

    def records(self, level: int, start: int, stop: int) -> Tensor:
        split = self._base.count(level)
        if stop <= split:
            return self._base.records(level, start, stop)
        own = self._own.records(level, max(start - split, 0), stop - split)
        return own if start >= split else torch.cat([self._base.records(level, start, split), own])

    def gather(self, level: int, index: I64) -> Tensor:
        split = self._base.count(level)
        old = torch.from_numpy(index < split)
        found = torch.empty(len(index), self.spec.record_width, dtype=self.spec.torch_dtype)
        if bool(old.any()):
            found[old] = self._base.gather(level, index[index < split])
        if not bool(old.all()):
            found[~old] = self._own.gather(level, index[index >= split] - split)
        return found

    def sync(self) -> None:
        """Nothing to do: what was added lives in memory."""

    def verify(self) -> None:
        self._base.verify()

    def close(self) -> None:
        self._own.close()


class ReadingStore(BranchStore):
    """A store that is open for reading, with the records that it lacks made anew in memory. Closing it closes both."""

    writable = False

    def __init__(self, base: TreeStore) -> None:
        super().__init__(base)
        self.recovery = base.recovery

    def close(self) -> None:
        super().close()
        self._base.close()
