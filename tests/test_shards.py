"""Token shards: what is written is read, and every kind of damage is named."""

from __future__ import annotations

import errno
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from megacontext import storage
from megacontext.data.shards import Manifest, ShardSet, ids_dtype, write_shard
from megacontext.errors import DataError, StorageError

ROW_TOKENS = 9


def make(
    folder: str, rows: tuple[int, ...] = (5, 1, 7), mask: bool = False, vocab_size: int = 1000
) -> dict[str, np.ndarray]:
    """A folder of shards; returns all rows of each column."""
    generator = np.random.default_rng(1)
    infos, parts = [], []
    for index, count in enumerate(rows):
        columns: dict[str, Any] = {
            "ids": generator.integers(0, vocab_size, (count, ROW_TOKENS)).astype(ids_dtype(vocab_size))
        }
        if mask:
            columns["mask"] = generator.integers(0, 2, (count, ROW_TOKENS)).astype(np.uint8)
        infos.append(write_shard(storage.join(folder, f"shard_{index:05d}.arrow"), columns))
        parts.append(columns)
    names = ("ids", "mask") if mask else ("ids",)
    Manifest(
        version=1, split="train", row_tokens=ROW_TOKENS, dtype=ids_dtype(vocab_size).name, vocab_size=vocab_size,
        tokenizer_digest="d" * 64, columns=names, shards=tuple(infos), documents=3, tokens_in=100, tokens_kept=99,
        source={"folder": "x"},
    ).write(folder)  # fmt: skip
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("vocab_size", [1000, 65536, 65537])
def test_reads_what_was_written(tmp_path: Path, mask: bool, vocab_size: int) -> None:
    want = make(str(tmp_path), mask=mask, vocab_size=vocab_size)
    shards = ShardSet.open(str(tmp_path))
    assert (shards.num_rows, shards.row_tokens) == (13, ROW_TOKENS)
    shards.verify()
    rows = np.array([12, 0, 5, 5, 4, 6, 11, 0])
    got = shards.read(rows)
    assert set(got) == set(want)
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert np.array_equal(got[name], want[name][rows])
    assert shards.read(np.array([], np.int64))["ids"].shape == (0, ROW_TOKENS)
    assert shards.row_bytes == sum(column[0].nbytes for column in want.values())


def test_views_are_the_mapped_file(tmp_path: Path) -> None:
    make(str(tmp_path))
    view = ShardSet.open(str(tmp_path)).columns(0)["ids"]
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_crosses_processes_and_reads_remote_folders(tmp_path: Path) -> None:
    folder = "memory://tokens/train"
    want = make(folder)
    shards = pickle.loads(pickle.dumps(ShardSet.open(folder, cache_dir=str(tmp_path / "cache"))))
    assert np.array_equal(shards.read(np.arange(13))["ids"], want["ids"])
    shards.verify()
    fsspec.filesystem("memory").rm("/tokens", recursive=True)


def test_the_manifest_survives_a_round_trip(tmp_path: Path) -> None:
    make(str(tmp_path))
    manifest = Manifest.read(str(tmp_path))
    manifest.write(str(tmp_path / "copy"))
    assert Manifest.read(str(tmp_path / "copy")) == manifest


def test_missing_folder_and_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*does not exist.*prepare_data"):
        ShardSet.open(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no manifest.*prepare_data"):
        ShardSet.open(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "{}", '{"version": 1}', "[]", '"x"'])
def test_damaged_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        ShardSet.open(str(tmp_path))


def test_manifest_of_another_version(tmp_path: Path) -> None:
    make(str(tmp_path))
    raw = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**raw, "version": 99}))
    with pytest.raises(DataError, match="version 99, this program reads 1"):
        ShardSet.open(str(tmp_path))


def test_missing_shard(tmp_path: Path) -> None:
    make(str(tmp_path))
    shards = ShardSet.open(str(tmp_path))
    (tmp_path / "shard_00001.arrow").unlink()
    with pytest.raises(DataError, match=r"shard_00001\.arrow.*missing"):
        ShardSet.open(str(tmp_path))
    with pytest.raises(DataError, match=r"shard_00001\.arrow.*missing"):
        shards.read(np.array([5]))


def test_missing_remote_shard(tmp_path: Path) -> None:
    make("memory://lost")
    fsspec.filesystem("memory").rm("/lost/shard_00000.arrow")
    with pytest.raises(DataError, match=r"shard_00000\.arrow.*missing"):
        ShardSet.open("memory://lost", cache_dir=str(tmp_path)).read(np.array([0]))


def test_no_rows(tmp_path: Path) -> None:
    make(str(tmp_path), rows=(3, 0))
    with pytest.raises(DataError, match="empty shard"):
        ShardSet.open(str(tmp_path))


def test_truncated_shard(tmp_path: Path) -> None:
    make(str(tmp_path))
    path = tmp_path / "shard_00002.arrow"
    size = path.stat().st_size
    os.truncate(path, size - 100)
    with pytest.raises(DataError, match=rf"shard_00002\.arrow.*{size - 100} bytes.*{size}.*truncated"):
        ShardSet.open(str(tmp_path))


def test_flipped_byte(tmp_path: Path) -> None:
    make(str(tmp_path))
    path = tmp_path / "shard_00002.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard_00002\.arrow.*checksum"):
        ShardSet.open(str(tmp_path)).verify()


def test_not_an_arrow_file(tmp_path: Path) -> None:
    make(str(tmp_path))
    path = tmp_path / "shard_00000.arrow"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"shard_00000\.arrow.*damaged"):
        ShardSet.open(str(tmp_path)).read(np.array([0]))


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"ids": np.zeros((5, 8), np.uint16)}, r"column 'ids' is fixed_size_list.*\[8\]"),
        ({"ids": np.zeros((5, 9), np.uint32)}, "uint32"),
        ({"ids": np.zeros((4, 9), np.uint16)}, "4 rows, its manifest says 5"),
        ({"ids": np.zeros((5, 9), np.uint16)}, "no column 'mask'"),
    ],
)
def test_shard_of_another_shape(tmp_path: Path, columns: dict[str, np.ndarray], complaint: str) -> None:
    make(str(tmp_path), mask="mask" in complaint)
    info = write_shard(str(tmp_path / "shard_00000.arrow"), columns)
    manifest = Manifest.read(str(tmp_path))
    replace(manifest, shards=(replace(info, rows=5), *manifest.shards[1:])).write(str(tmp_path))
    with pytest.raises(DataError, match=complaint):
        ShardSet.open(str(tmp_path)).read(np.array([0]))


def test_two_record_batches(tmp_path: Path) -> None:
    make(str(tmp_path), rows=(4,))
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(18, np.uint16)), 9)
    batch = pa.record_batch([column], names=["ids"])
    path = tmp_path / "shard_00000.arrow"
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)
    manifest = Manifest.read(str(tmp_path))
    replace(manifest, shards=(replace(manifest.shards[0], bytes=path.stat().st_size),)).write(str(tmp_path))
    with pytest.raises(DataError, match="2 record batches, not 1"):
        ShardSet.open(str(tmp_path)).read(np.array([0]))


def test_check_fits_names_both_values(tmp_path: Path) -> None:
    make(str(tmp_path))
    shards = ShardSet.open(str(tmp_path))
    shards.check_fits(vocab_size=1000, tokenizer_digest="d" * 64, seq_len=8)
    with pytest.raises(DataError, match=r"dddddddddddd.*eeeeeeeeeeee"):
        shards.check_fits(vocab_size=1000, tokenizer_digest="e" * 64, seq_len=8)
    with pytest.raises(DataError, match=r"1000.*999"):
        shards.check_fits(vocab_size=999, tokenizer_digest="d" * 64, seq_len=8)
    with pytest.raises(DataError, match=r"8 tokens.*16.*--max_seq_len 16.*--max_seq_len 8"):
        shards.check_fits(vocab_size=1000, tokenizer_digest="d" * 64, seq_len=16)


def test_full_disk_leaves_the_old_shard_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard.arrow"
    write_shard(str(path), {"ids": np.ones((3, 9), np.uint16)})
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"shard\.arrow.*No space left.*Free space"):
        write_shard(str(path), {"ids": np.zeros((3, 9), np.uint16)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["shard.arrow"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_device(*_: object) -> object:
        return os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb")

    monkeypatch.setattr("megacontext.data.shards.open", full_device, raising=False)
    with pytest.raises(StorageError, match="No space left"):
        write_shard(str(tmp_path / "shard.arrow"), {"ids": np.zeros((30000, 9), np.uint16)})
    assert list(tmp_path.iterdir()) == []
