"""Packing: every token of every document arrives, in order, in full rows that start with BOS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.data import parquet
from megacontext.data.packing import PackStats, pack_rows

BOS = 0


def numbered(lengths: list[int]) -> list[np.ndarray]:
    """Documents in which every token is another number, so that each can be found again."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n + 1, end + 1, dtype=np.uint32) for end, n in zip(ends, lengths, strict=True)]


def pieces_of(rows: np.ndarray) -> list[np.ndarray]:
    """What stands between BOS ids, row by row."""
    found = []
    for row in rows:
        starts = np.flatnonzero(row == BOS)
        found += [row[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]
    return [piece for piece in found if len(piece)]


def pack(documents: list[np.ndarray], row_tokens: int, **options: int) -> tuple[np.ndarray, PackStats]:
    stats = PackStats()
    blocks = list(pack_rows(documents, row_tokens, BOS, stats, **options))
    rows = np.concatenate(blocks) if blocks else np.empty((0, row_tokens), np.uint32)
    return rows, stats


@settings(deadline=None, max_examples=300)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 8), st.integers(0, 60)), max_size=60),
    row_tokens=st.integers(2, 17),
    pool_tokens=st.integers(0, 200),
    block_rows=st.integers(1, 5),
)
def test_tokens_are_conserved(lengths: list[int], row_tokens: int, pool_tokens: int, block_rows: int) -> None:
    documents = numbered(lengths)
    rows, stats = pack(documents, row_tokens, pool_tokens=pool_tokens, block_rows=block_rows)
    assert rows.shape == (stats.rows, row_tokens)
    assert rows.dtype == np.uint32
    assert (rows[:, 0] == BOS).all()
    assert stats.documents == sum(n > 0 for n in lengths)
    assert stats.tokens_in == sum(lengths)
    pieces = pieces_of(rows)
    assert stats.tokens_kept == sum(map(len, pieces))
    assert 0 <= stats.tokens_in - stats.tokens_kept < row_tokens - 1  # less than one row
    # Each piece is a run of one document, the runs of a document follow each other, and only ends are missing.
    ends = np.cumsum(lengths)
    seen: dict[int, list[int]] = {}
    for piece in pieces:
        assert (np.diff(piece.astype(np.int64)) == 1).all()
        owners = np.searchsorted(ends, piece, side="left")
        assert len(set(owners)) == 1
        seen.setdefault(int(owners[0]), []).extend(piece.tolist())
    for owner, tokens in seen.items():
        assert tokens == documents[owner][: len(tokens)].tolist()
    whole = sum(any(np.array_equal(piece, document) for piece in pieces) for document in documents if len(document))
    assert stats.whole_documents <= whole  # a document that fills a row exactly may be counted either way


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=80))
def test_the_pool_changes_no_row_of_a_stream_that_is_packed_again(lengths: list[int]) -> None:
    first, _ = pack(numbered(lengths), 16, pool_tokens=64, block_rows=3)
    again, _ = pack(numbered(lengths), 16, pool_tokens=64, block_rows=7)
    assert np.array_equal(first, again)


def test_best_fit_takes_the_largest_that_fits() -> None:
    rows, stats = pack(numbered([4, 3, 6, 1]), 8)  # costs with BOS: 5, 4, 7, 2
    assert [len(piece) for piece in pieces_of(rows)][:1] == [6]  # 7 of 8, then a gap of one id
    assert rows[0, -1] == BOS
    assert stats.whole_documents >= 2


def test_rests_of_long_documents_are_cut_before_whole_ones() -> None:
    # A document of 2 rows and 5 tokens, and two of 6 that leave room for 2 after BOS in a row of 10.
    rows, stats = pack(numbered([9 * 2 + 5, 6, 6]), 10)
    assert [len(piece) for piece in pieces_of(rows)] == [9, 9, 6, 2, 6, 2]
    assert stats.whole_documents == 2
    assert stats.tokens_in - stats.tokens_kept == 1


def test_rejects_a_row_without_room() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        pack([], 1)


def test_memory_is_bounded_by_the_pool() -> None:
    taken = 0

    def documents() -> object:
        nonlocal taken
        for _ in range(10_000):
            taken += 1
            yield np.ones(50, np.uint32)

    blocks = pack_rows(documents(), 101, BOS, pool_tokens=1000, block_rows=1)  # type: ignore[arg-type]
    next(blocks)
    assert taken <= 1000 / 50 + 2


@pytest.mark.parametrize("seq_len", [512, 2048])
def test_real_documents_are_kept(shared_data: Path, seq_len: int) -> None:
    path = parquet.list_parquet(str(shared_data / "pretrain"))[-1]
    documents = [
        np.frombuffer(text.encode(), np.uint8).astype(np.uint32) + 1 for g in parquet.read_texts(path) for text in g
    ]
    stats = PackStats()
    rows = sum(len(block) for block in pack_rows(documents, seq_len + 1, BOS, stats))
    assert stats.tokens_kept > 0.999 * stats.tokens_in
    could_be_whole = sum(0 < len(document) <= seq_len for document in documents)
    assert stats.whole_documents >= 0.95 * could_be_whole
    assert rows * (seq_len + 1) < 1.05 * stats.tokens_in  # BOS is nearly all that was added
