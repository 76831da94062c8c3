"""Numbers beside the ids: packed with them, stored, read, and taken into a batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import make_tokenizer

from megacontext.data.binarize import write_rows
from megacontext.data.packing import PackStats, pack_rows
from megacontext.data.shards import Manifest, ShardSet, write_shard
from megacontext.data.stream import CHAT, BatchPlan, MmapStream, RowOrder, make_batch
from megacontext.errors import DataError

BOS, WIDTH = 9, 33


def documents(count: int = 60) -> list[np.ndarray]:
    """Documents [n, 2] of ids and, as their mask, whether an id is odd."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(10, 200, generator.integers(1, 90)) for _ in range(count)]
    return [np.stack([one, one % 2], 1).astype(np.uint32) for one in ids]


def write_manifest(folder: Path, columns: tuple[str, ...], infos: tuple) -> None:  # type: ignore[type-arg]
    rows = sum(info.rows for info in infos)
    Manifest(version=1, split="train", row_tokens=WIDTH, dtype="uint16", vocab_size=300, tokenizer_digest="x", columns=columns,
             shards=infos, documents=1, tokens_in=1, tokens_kept=1, source={"rows": rows}).write(str(folder))  # fmt: skip


def test_columns_are_packed_with_their_ids() -> None:
    given = documents()
    both = np.concatenate(list(pack_rows(iter(given), WIDTH, BOS, columns=2)))
    alone = np.concatenate(list(pack_rows((one[:, 0].copy() for one in given), WIDTH, BOS)))
    assert np.array_equal(both[..., 0], alone), "the same rows as without a second column"
    assert np.array_equal(both[..., 1], np.where(both[..., 0] == BOS, 0, both[..., 0] % 2))


def test_columns_are_stored_and_read(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    infos = write_rows(iter(documents()), str(tmp_path / "rows"), tokenizer, WIDTH, PackStats(), ("ids", "mask"), 2048)
    assert len(infos) > 3
    write_manifest(tmp_path, ("ids", "mask"), infos)
    shards = ShardSet.open(str(tmp_path))
    read = shards.read(np.arange(shards.num_rows))
    assert read["mask"].dtype == np.uint8
    assert np.array_equal(read["mask"], np.where(read["ids"] == tokenizer.bos_id, 0, read["ids"] % 2))
    plan = BatchPlan(2, 2, 1)
    for batch in MmapStream(shards, RowOrder(shards.num_rows, 1), plan, 0, 0, 3):
        assert batch.weights is not None
        assert np.array_equal(batch.weights.numpy(), read["mask"][batch.rows][:, 1:])


def test_numbers_of_rows(tmp_path: Path) -> None:
    ids = np.arange(5 * WIDTH).reshape(5, WIDTH).astype(np.uint16)
    kind, end = np.full(5, CHAT, np.uint8), np.array([32, 30, 1, 32, 7], np.uint32)
    info = write_shard(str(tmp_path / "a.arrow"), {"ids": ids, "kind": kind, "end": end})
    write_manifest(tmp_path, ("ids", "kind", "end"), (info,))
    shards = ShardSet.open(str(tmp_path))
    assert shards.row_bytes == 2 * WIDTH + 1 + 4
    batch = make_batch(shards.read(np.array([4, 0])), np.arange(2), np.array([4, 0]))
    assert batch.end.tolist() == [7, 32]
    assert batch.kind.tolist() == [CHAT, CHAT]
    assert batch.weights is None
    with pytest.raises(AssertionError, match="column end has shape"):
        write_shard(str(tmp_path / "b.arrow"), {"ids": ids, "end": end[:4]})


def test_unknown_columns_are_refused(tmp_path: Path) -> None:
    info = write_shard(str(tmp_path / "a.arrow"), {"ids": np.zeros((2, WIDTH), np.uint16)})
    write_manifest(tmp_path, ("ids",), (info,))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "columns": ["ids", "mood"]}))
    with pytest.raises(DataError, match="has columns mood that this program does not know"):
        ShardSet.open(str(tmp_path))
