"""Trees after a power cut, with commits that are lost, and trees of earlier programs."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tree_programs import STREAM, assert_prefix, gist, open_tree

from megacontext.context import disk_files
from megacontext.context.disk_files import CommitSlots, Header
from megacontext.context.tree import Tree, all_records
from megacontext.errors import DamagedError, DataError, UserError


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush changes nothing here but the time that a test takes."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def unclosed(folder: Path, sizes: list[int], closed: int = 0) -> Path:
    """A copy of a tree that was closed with `closed` tokens and then had appends of these sizes."""
    with open_tree(folder / "t") as tree:
        tree.append(STREAM[:closed])
    tree = open_tree(folder / "t")
    for size in sizes:
        tree.append(STREAM[tree.tokens : tree.tokens + size])
    shutil.copytree(folder / "t", folder / "copy")
    tree.close()
    return folder / "copy"


def zero(path: Path, start: int, stop: int | None = None) -> None:
    """What a power cut leaves of pages that were not written: zeros."""
    data = bytearray(path.read_bytes())
    stop = len(data) if stop is None else stop
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


@pytest.mark.parametrize("with_checksums", [False, True])
@pytest.mark.parametrize("sizes", [[100] * 100, [10_000]])
def test_a_power_cut_keeps_every_block_that_has_its_checksum(
    tmp_path: Path, sizes: list[int], with_checksums: bool, caplog: pytest.LogCaptureFixture
) -> None:
    copy = unclosed(tmp_path, sizes)
    zero(copy / "ids.bin", 4 * 9_700)
    if with_checksums:
        zero(copy / "ids.crc", 9_700)
    with open_tree(copy, writable=False) as reader:
        assert reader.tokens == 9_700
    with open_tree(copy) as tree:
        assert_prefix(tree, 9_700)
        tree.append(STREAM[9_700:9_800])
    assert "kept 9700 tokens, dropped 300 unfinished ids" in caplog.text
    assert (copy / "ids.bin.damaged-1.from-9700").stat().st_size == 4 * 300
    with open_tree(copy) as tree:
        assert_prefix(tree, 9_800)


def test_a_power_cut_never_takes_what_was_flushed(tmp_path: Path) -> None:
    """71 tokens were flushed, three of them in a block that was completed later."""
    copy = unclosed(tmp_path, [30], closed=71)
    zero(copy / "ids.bin", 4 * 71)
    with open_tree(copy) as tree:
        assert_prefix(tree, 71)


def test_a_power_cut_that_took_the_commits(tmp_path: Path) -> None:
    """commit.bin is on the disk as it was when the tree was flushed; the ids arrived. Blocks with a checksum are kept."""
    copy = unclosed(tmp_path, [30, 30, 30], closed=71)
    with open_tree(tmp_path / "flushed") as tree:
        tree.append(STREAM[:71])
    shutil.copy(tmp_path / "flushed" / "commit.bin", copy)
    with open_tree(copy) as tree:
        assert_prefix(tree, 160)
    assert (copy / "ids.bin.damaged-1.from-160").stat().st_size == 4


def test_an_unfinished_append_is_dropped_without_a_copy(tmp_path: Path) -> None:
    copy = unclosed(tmp_path, [30], closed=71)
    zero(copy / "commit.bin", 64, 128)  # the commits of the append
    zero(copy / "commit.bin", 0, 64)
    with open_tree(copy) as tree:
        assert_prefix(tree, 71)
    assert not list(copy.glob("*damaged*"))


@pytest.mark.parametrize("size", [0, 1, 3, 4, 64])
def test_ids_behind_a_closed_tree_are_no_crash(tmp_path: Path, size: int) -> None:
    """They are kept as far as their checksums go, and otherwise put aside."""
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[:71])
    commits = {name: (tmp_path / "t" / name).read_bytes() for name in ("commit.bin", "commit.copy")}
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[71 : 71 + size])
    for name, data in commits.items():
        (tmp_path / "t" / name).write_bytes(data)
    with open_tree(tmp_path / "t") as tree:
        assert_prefix(tree, max(71, (71 + size) // 4 * 4))


def test_commits_are_stored_twice(tmp_path: Path) -> None:
    for durable in (False, True):
        folder = tmp_path / str(durable)
        with open_tree(folder, durable=durable) as tree:
            tree.append(STREAM[:50])
            tree.append(STREAM[50:71])
        for name in ("commit.bin", "commit.copy"):
            (folder / name).unlink()
            with open_tree(folder) as tree:
                assert_prefix(tree, 71)
        assert len(list(folder.glob("commit.*"))) == 2


def test_a_header_that_is_lost(tmp_path: Path) -> None:
    """Readers see everything; salvage makes the header anew, and the gists, of which it is not known who made them."""
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[:203])
        expected = all_records(tree)
    (tmp_path / "t" / "tree.json").write_text("[" * 200_000)
    with pytest.raises(DamagedError, match=r"tree.json' is damaged: .*writable=False.*salvage=True"):
        open_tree(tmp_path / "t")
    with open_tree(tmp_path / "t", writable=False) as reader:
        assert all(torch.equal(a, b) for a, b in zip(all_records(reader), expected, strict=True))
        with pytest.raises(DamagedError, match=r"tree.json"):
            reader.verify()
    other = gist(block_size=8, width=2, digest="other")  # the ids are borne out whatever their blocks were
    with Tree.open(str(tmp_path / "t"), other, salvage=True) as tree:
        assert np.array_equal(tree.ids(0, 203), STREAM[:203])
        tree.verify()
    assert (tmp_path / "t" / "tree.json.damaged-1").read_text() == "[" * 200_000
    header = Header.load(tmp_path / "t")
    assert header is not None
    assert header.generation == 1


def test_a_newer_header_is_not_salvaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(disk_files.Header.__init__, "__defaults__", (0, 3))
        open_tree(tmp_path / "t").close()
    before = (tmp_path / "t" / "tree.json").read_bytes()
    for options in ({}, {"salvage": True}, {"writable": False}):
        with pytest.raises(DataError, match="version 3"):
            open_tree(tmp_path / "t", **options)
    assert (tmp_path / "t" / "tree.json").read_bytes() == before


def test_gists_of_a_later_generation_stay(tmp_path: Path) -> None:
    """tree.json of an older copy: the gists made since are neither deleted nor taken for another model's."""
    path = str(tmp_path / "t")
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[:100])
    older = (tmp_path / "t" / "tree.json").read_bytes()
    with Tree.open(path, gist(digest="second"), vocab_size=1000, replace_gists=True) as tree:
        expected = all_records(tree)
    (tmp_path / "t" / "tree.json").write_bytes(older)
    with open_tree(tmp_path / "t") as tree:
        assert_prefix(tree, 100)
    assert list((tmp_path / "t").glob("gists_1_*"))
    third = gist(width=2, digest="third")
    with Tree.open(path, third, vocab_size=1000, replace_gists=True) as tree:
        assert tree.record_range(1, 0, 25).shape == (25, 2)
        assert len(expected) == tree.levels


def test_replacing_gists_of_a_damaged_tree_changes_nothing(tmp_path: Path) -> None:
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[:100])
    os.truncate(tmp_path / "t" / "ids.bin", 200)
    before = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir() if path.name != "lock"}
    with pytest.raises(DamagedError, match=r"ids.bin' holds 50 of the 100 ids"):
        Tree.open(str(tmp_path / "t"), gist(digest="other"), vocab_size=1000, replace_gists=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir() if path.name != "lock"} == before
    with pytest.raises(UserError, match="leave out writable=False"):
        open_tree(tmp_path / "t", writable=False, salvage=True)


def test_salvage_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dying in the middle of it, or a second damage, overwrites no copy of the first."""
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[:100])
    data = bytearray((tmp_path / "t" / "ids.bin").read_bytes())
    data[200] ^= 1
    (tmp_path / "t" / "ids.bin").write_bytes(data)

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CommitSlots, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            open_tree(tmp_path / "t", salvage=True)
    with pytest.raises(DamagedError, match="holds 48 of the 100"):
        open_tree(tmp_path / "t")
    with open_tree(tmp_path / "t", salvage=True) as tree:
        assert_prefix(tree, 48)
    assert np.array_equal(np.fromfile(tmp_path / "t" / "ids.bin.damaged-1.from-48", np.uint32)[4:], STREAM[52:100])


def test_trees_of_earlier_programs(tmp_path: Path) -> None:
    """Their commits know the last append alone, and there is no copy of them. The first writer adds what is missing."""
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[:50])
        tree.append(STREAM[50:71])
    slots = bytearray(256)
    commits = [(1, 0, 0, 0), (2, 0, 50, 0), (3, 50, 71, 0), (4, 50, 71, 0)]
    for slot, (sequence, start, stop, _) in zip((3, 0, 1, 2), commits, strict=True):
        ids = STREAM[start:stop].astype(np.uint32).tobytes()
        raw = struct.pack("<QQQI", sequence, start, stop, zlib.crc32(ids))
        slots[64 * slot : 64 * slot + 32] = raw + struct.pack("<I", zlib.crc32(raw, 0x4D43))
    (tmp_path / "t" / "commit.bin").write_bytes(slots)
    (tmp_path / "t" / "commit.copy").unlink()
    header = Header.load(tmp_path / "t")
    assert header is not None
    replace(header, version=1).save(tmp_path / "t")
    shutil.copytree(tmp_path / "t", tmp_path / "damaged")
    with open_tree(tmp_path / "t", writable=False) as reader:
        assert_prefix(reader, 71)
    assert Header.load(tmp_path / "t") == replace(header, version=1)
    with open_tree(tmp_path / "t") as tree:
        assert_prefix(tree, 71)
    assert Header.load(tmp_path / "t") == header  # an earlier program refuses it from here on
    (tmp_path / "t" / "ids.crc").unlink()
    with open_tree(tmp_path / "t") as tree:
        assert_prefix(tree, 71)
    (tmp_path / "damaged" / "ids.crc").unlink()
    with pytest.raises(DamagedError, match=r"ids.crc' holds 0 of the 17 checksums"):
        open_tree(tmp_path / "damaged")
