"""Documents to rows of exactly `row_tokens` ids that all start with BOS, with (almost) no token thrown away.

Best-fit packing with a splitting fallback. Sources of the idea: "Fewer Truncations Improve Language Modeling"
(Ding et al., 2024, best fit) and nanochat's BOS-aligned best-fit loader, which crops what does not fit; here the
crop goes back into the pool instead.

1. A document longer than a row gives full rows at once; what is left of it is a *rest*.
2. A row is filled with the largest waiting piece that fits, again and again.
3. When nothing fits the gap, the longest rest is cut so that the gap is filled to the last id, and its tail waits on.
   Rests are cut first because they are broken already: cutting them costs no whole document. The longest is taken
   because one long rest serves many gaps before it is used up. Only when no rest is long enough is the longest whole
   document cut.

Every piece, also a continuation, starts with BOS, so the model never attends to a row that begins mid-air. Memory is
bounded by `pool_tokens`, however long the stream is. The output is a pure function of the input.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint32]
POOL_TOKENS = 4 << 20
BLOCK_ROWS = 1024


@dataclass
class PackStats:
    """Counts over one packed stream. Token counts are those of the documents, without BOS."""

    documents: int = 0
    whole_documents: int = 0
    tokens_in: int = 0
    tokens_kept: int = 0
    rows: int = 0


class _Pool:
    """Pieces by length, first in first out within a length; finds the longest that is at most a given length."""

    def __init__(self) -> None:
        self._lengths: list[int] = []  # sorted lengths that have pieces
        self._buckets: dict[int, deque[Ids]] = {}

    def put(self, piece: Ids, *, first: bool = False) -> None:
        bucket = self._buckets.setdefault(len(piece), deque())
        if not bucket:
            insort(self._lengths, len(piece))
        if first:
            bucket.appendleft(piece)
        else:
            bucket.append(piece)

    def longest_up_to(self, limit: int) -> int:
        """Length of the longest piece of at most `limit` tokens; 0 if there is none."""
        index = bisect_right(self._lengths, limit)
        return self._lengths[index - 1] if index else 0

    def longest(self) -> int:
        return self._lengths[-1] if self._lengths else 0

    def take(self, length: int) -> Ids:
        bucket = self._buckets[length]
        piece = bucket.popleft()
        if not bucket:
            del self._lengths[bisect_right(self._lengths, length) - 1]
        return piece


class Packer:
    """Takes documents one by one and gives packed rows; `pack_rows` is the plain way to use it.

    `row_tokens` is T+1, at least 2. Rows come out when more than `pool_tokens` tokens wait, and from `finish`. With
    `columns` above 1 a token is that many numbers, its id first (a mask, say): documents are [n, columns], rows
    [rows, row_tokens, columns]. The other numbers of BOS are 0.
    """

    def __init__(self, row_tokens: int, bos_id: int, pool_tokens: int = POOL_TOKENS, columns: int = 1) -> None:
        if row_tokens < 2:
            raise ValueError(f"row_tokens is {row_tokens}; a row holds BOS and at least one token, so at least 2.")
        self.stats = PackStats()
        self._row_tokens = row_tokens
        self._bos = np.array([bos_id] if columns == 1 else [[bos_id] + [0] * (columns - 1)], dtype=np.uint32)
        self._pool_tokens = max(pool_tokens, row_tokens)
        self._waiting_tokens = 0
        self._whole = _Pool()  # documents that are still in one piece
        self._rests = _Pool()  # what is left of documents that were cut

    def add(self, document: Ids) -> list[Ids]:
        """Take one document (uint32 ids without BOS); returns the rows [n, row_tokens] that are ready."""
        if not len(document):
            return []
        self.stats.documents += 1
        self.stats.tokens_in += len(document)
        ready: list[Ids] = []
        body_tokens = self._row_tokens - 1
        if len(document) > body_tokens:
            full = len(document) // body_tokens
            rows = np.empty((full, self._row_tokens, *document.shape[1:]), dtype=np.uint32)
            rows[:, 0] = self._bos[0]
            rows[:, 1:] = document[: full * body_tokens].reshape(full, body_tokens, *document.shape[1:])
            ready.append(rows)
            self._count(full, full * body_tokens)
            # A copy, so that the pool holds the rest alone and not the whole long document behind a view.
            self._keep(self._rests, document[full * body_tokens :].copy())
        else:
            self._keep(self._whole, document)
        while self._waiting_tokens > self._pool_tokens:
            ready.append(self._fill_row())
        return ready

    def finish(self) -> list[Ids]:
        """Pack what still waits; less than one row of it is dropped (`tokens_in - tokens_kept`)."""
        ready: list[Ids] = []
        # One row of pieces is enough even if each brings its own BOS, because BOS only adds to the row.
        while self._waiting_tokens >= self._row_tokens - 1:
            ready.append(self._fill_row())
        return ready

    def _keep(self, pool: _Pool, piece: Ids) -> None:
        if len(piece):
            pool.put(piece)
            self._waiting_tokens += len(piece)

    def _count(self, rows: int, tokens: int) -> None:
        self.stats.rows += rows
        self.stats.tokens_kept += tokens

    def _fill_row(self) -> Ids:
        """One row [1, row_tokens]. The pools must hold at least row_tokens - 1 tokens."""
        parts: list[Ids] = []
        gap = self._row_tokens
        tokens = 0
        while gap:
            parts.append(self._bos)
            piece = self._next_piece(gap - 1)
            parts.append(piece)
            tokens += len(piece)
            gap -= 1 + len(piece)
        self._waiting_tokens -= tokens
        self._count(1, tokens)
        return np.concatenate(parts)[None]

    def _next_piece(self, room: int) -> Ids:
        """The best piece for a gap with room for that many tokens after BOS; empty if there is no room."""
        if room == 0:
            return self._bos[:0]  # a gap of one id: BOS alone, as the target that ends the last document
        whole, rest = self._whole.longest_up_to(room), self._rests.longest_up_to(room)
        if whole >= rest and whole:
            self.stats.whole_documents += 1
            return self._whole.take(whole)
        if rest:
            return self._rests.take(rest)
        pool = self._rests if self._rests.longest() > room else self._whole
        piece = pool.take(pool.longest())
        self._rests.put(piece[room:], first=True)
        return piece[:room]


def pack_rows(
    documents: Iterable[Ids],
    row_tokens: int,
    bos_id: int,
    stats: PackStats | None = None,
    pool_tokens: int = POOL_TOKENS,
    block_rows: int = BLOCK_ROWS,
    columns: int = 1,
) -> Iterator[Ids]:
    """Pack documents into rows, lazily.

    Args:
        documents: uint32 ids of each document, without BOS: [n], or [n, columns]. Empty ones are skipped.
        row_tokens: ids of a row, T+1.
        bos_id: the id that starts every piece.
        stats: filled in as rows are made; complete when the iterator ends.
        pool_tokens: tokens that may wait for a fitting gap; more fits better and takes more memory (4 bytes each).
        block_rows: rows of each yielded block, except the last.
        columns: numbers of a token, as of `Packer`.

    Yields:
        uint32 arrays [rows, row_tokens], or [rows, row_tokens, columns].
    """
    packer = Packer(row_tokens, bos_id, pool_tokens, columns)
    if stats is not None:
        packer.stats = stats
    waiting: list[Ids] = []
    count = 0
    for rows in _all_rows(packer, documents):
        waiting.append(rows)
        count += len(rows)
        if count >= block_rows:
            block = np.concatenate(waiting)
            whole = count - count % block_rows
            for start in range(0, whole, block_rows):
                yield block[start : start + block_rows]
            waiting, count = [block[whole:]], count - whole
    if count:
        yield np.concatenate(waiting)


def _all_rows(packer: Packer, documents: Iterable[Ids]) -> Iterator[Ids]:
    for document in documents:
        yield from packer.add(document)
    yield from packer.finish()
