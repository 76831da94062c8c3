"""Trees on disk: T4, whatever byte the writer dies at; full disks, locks, foreign trees."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tree_programs
from patience import PATIENCE_S
from tree_programs import BLOCK, ENV, STREAM, append_error, assert_prefix, open_tree

from megacontext.context import disk_files, recovery, store_disk
from megacontext.context.disk_files import RecordFile
from megacontext.context.tree import all_records
from megacontext.errors import DamagedError, StorageError, UserError


@pytest.fixture
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed processes lose nothing that is not flushed; flushing hundreds of times only makes a test slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_reopened_tree_is_the_same(tmp_path: Path) -> None:
    with open_tree(tmp_path / "t") as tree:
        for start in range(0, 700, 7):
            tree.append(STREAM[start : start + 7])
    with open_tree(tmp_path / "t") as tree:
        assert tree.store.recovery.clean
        assert not tree.gist_runs  # nothing was made again
        assert_prefix(tree, 700)
        tree.append(STREAM[700:800])
    with open_tree(tmp_path / "t", writable=False) as reader:
        assert_prefix(reader, 800)
        with pytest.raises(UserError, match="reading only"):
            reader.append([1])


def test_reading_far_apart_nodes(tmp_path: Path) -> None:
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[:4000])
        wanted = np.array([999, 3, 500, 3])
        assert torch.equal(tree.records(1, wanted), tree.record_range(1, 0, 1000)[wanted])


def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, list[tuple[str, int, bytes]]]:
    """The folder before and after an append of 30 tokens to 71, not closed, and the writes of the append in order."""
    folder, before, after = tmp_path / "t", tmp_path / "before", tmp_path / "after"
    tree = open_tree(folder)
    tree.append(STREAM[:50])
    tree.append(STREAM[50:71])
    shutil.copytree(folder, before)
    writes: list[tuple[str, int, bytes]] = []
    plain = RecordFile.write

    def recorded(self: RecordFile, at: int, data: bytes) -> None:
        writes.append((self.path.name, at * self.stride, bytes(data)))
        plain(self, at, data)

    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "write", recorded)
        tree.append(STREAM[71:101])
    shutil.copytree(folder, after)
    tree.close()
    return before, after, writes


@pytest.mark.usefixtures("no_flush")
def test_t4_death_at_every_byte_of_an_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _, writes = snapshots(tmp_path, monkeypatch)
    total = sum(len(data) for _, _, data in writes)
    names = [name for name, _, _ in writes]
    assert (names[:2], names[-1]) == (["commit.bin", "ids.bin"], "commit.bin")  # announced, written, committed
    for budget in range(total + 1):
        folder = tmp_path / "cut"
        shutil.copytree(before, folder)
        left = budget
        for name, offset, data in writes:
            with open(folder / name, "r+b" if (folder / name).exists() else "w+b") as file:
                file.seek(offset)
                file.write(data[:left])
            left -= min(left, len(data))
        with open_tree(folder) as tree:
            assert_prefix(tree, 101 if budget == total else 71)
            tree.append(STREAM[tree.tokens : 130])
        with open_tree(folder) as tree:
            assert_prefix(tree, 130)
        shutil.rmtree(folder)


@pytest.mark.usefixtures("no_flush")
def test_t4_any_file_truncated_at_every_byte_of_the_last_append(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, _ = snapshots(tmp_path, monkeypatch)
    for path in sorted(after.glob("*.*")):
        small = (before / path.name).stat().st_size if (before / path.name).exists() else 0
        size = path.stat().st_size
        for cut in [*range(small, size), *(range(0, size, 7) if path.name == "commit.bin" else [])]:
            folder = tmp_path / "cut"
            shutil.copytree(after, folder)
            os.truncate(folder / path.name, cut)
            with open_tree(folder) as tree:
                kept = tree.tokens
                # Of an append whose commit is not borne out, the blocks that have their checksum are kept.
                allowed = {101} if path.name.startswith("gists") else {71, 101, *range(72, 101, BLOCK)}
                assert kept in allowed, (path.name, cut)
                assert_prefix(tree, kept)
            shutil.rmtree(folder)


@pytest.mark.usefixtures("no_flush")
def test_t4_dying_again_while_recovering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot of the state that recovery falls back to is not the one it writes."""
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[:71])
    tree = open_tree(tmp_path / "t")
    tree.append(STREAM[71:101])
    shutil.copytree(tmp_path / "t", tmp_path / "base")
    tree.close()
    os.truncate(tmp_path / "base" / "ids.bin", 80 * 4)

    class Died(BaseException):
        pass

    for budget in range(0, 40, 3):
        folder = tmp_path / "cut"
        shutil.copytree(tmp_path / "base", folder)

        def dying(self: RecordFile, at: int, data: bytes, budget: int = budget) -> None:
            os.pwrite(self._fd, data[:budget], at * self.stride)
            raise Died

        with monkeypatch.context() as patch:
            patch.setattr(RecordFile, "write", dying)
            with pytest.raises(Died):
                open_tree(folder)
        with open_tree(folder) as tree:
            assert_prefix(tree, 80)
        shutil.rmtree(folder)


@pytest.mark.usefixtures("no_flush")
def test_t4_garbage_behind_the_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _, _ = snapshots(tmp_path, monkeypatch)
    rng = random.Random(0)
    for _ in range(30):
        folder = tmp_path / "cut"
        shutil.copytree(before, folder)
        for path in folder.glob("*.*"):
            if path.name.startswith(("ids", "gists")):
                with open(path, "ab") as file:
                    file.write(rng.randbytes(rng.randrange(200)))
        with open_tree(folder) as tree:
            assert_prefix(tree, 71)
        shutil.rmtree(folder)


@pytest.mark.usefixtures("no_flush")
def test_t4_damage_since_the_last_flush_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut can do to bytes that were written but not flushed, before the last append as well."""
    before, _, _ = snapshots(tmp_path, monkeypatch)
    for name, offset, kept in (("ids.bin", 10 * 4, 8), ("ids.crc", 3 * 4, 71), ("gists_0_01.bin", 5, 71)):
        folder = tmp_path / "cut"
        shutil.copytree(before, folder)
        damage(folder / name, offset)
        with open_tree(folder) as tree:
            assert_prefix(tree, kept)
        shutil.rmtree(folder)


def damage(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff\xfe\xfd")


def test_damage_of_flushed_ids_is_not_cut_away_unasked(tmp_path: Path) -> None:
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[:100])
    damage(tmp_path / "t" / "ids.bin", 10 * 4)
    with pytest.raises(DamagedError, match=r"ids \[8, 12\) in .*ids.bin.* have changed.*8 tokens are intact"):
        open_tree(tmp_path / "t")
    with open_tree(tmp_path / "t", writable=False) as reader:
        assert np.array_equal(reader.ids(0, reader.tokens), STREAM[:8])
        with pytest.raises(DamagedError, match=r"ids \[8, 12\)"):
            reader.verify()
    with open_tree(tmp_path / "t", salvage=True) as tree:
        assert_prefix(tree, 8)
    kept = np.fromfile(tmp_path / "t" / "ids.bin.damaged-1.from-8", np.uint32)
    assert np.array_equal(kept[4:], STREAM[12:100])


def test_damage_further_back_is_found_by_reads_and_by_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening checks the newest part of a long tree; here that is nothing."""
    for name in ("CHECKED_TOKENS", "CHECKED_BYTES"):
        monkeypatch.setattr(recovery, name, 0)
    monkeypatch.setattr(recovery, "CHECKED_IN_ALL", -1)
    for name, offset, what in (
        ("ids.bin", 10 * 4, r"ids \[8, 12\) in .*ids.bin.*salvage=True"),
        ("gists_0_01.bin", 50, r"node \(1, 2\) in .*gists_0_01.bin.*salvage=True"),
    ):
        with open_tree(tmp_path / name) as tree:
            tree.append(STREAM[:100])
            tree.append(STREAM[100:110])
        damage(tmp_path / name / name, offset)
        with open_tree(tmp_path / name) as tree:
            readers = (tree.verify, lambda: tree.ids(9, 10)) if name == "ids.bin" else (
                tree.verify, lambda: tree.records(1, [9, 2]), lambda: tree.record_range(1, 0, 5),
            )  # fmt: skip
            for read in readers:
                with pytest.raises(DamagedError, match=what):
                    read()
            assert np.array_equal(tree.ids(12, 110), STREAM[12:110])
        with open_tree(tmp_path / name, salvage=True) as tree:
            assert_prefix(tree, 8 if name == "ids.bin" else 110)


def test_damage_of_checksums_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "CHECKED_TOKENS", 0)
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[:100])
    damage(tmp_path / "t" / "ids.crc", 8)
    with open_tree(tmp_path / "t") as tree:
        assert np.array_equal(tree.ids(0, 100), STREAM[:100])
        with pytest.raises(DamagedError, match=r"ids.crc.* has changed.*the ids are intact.*salvage=True"):
            tree.verify()
    with open_tree(tmp_path / "t", salvage=True) as tree:
        assert_prefix(tree, 100)


@pytest.mark.usefixtures("no_flush")
def test_a_closed_tree_truncated_at_every_byte_of_its_last_append(tmp_path: Path) -> None:
    """What was flushed cannot be lost in a crash: shorter ids are refused, and what is derived from the ids is made anew."""
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[:71])
        tree.append(STREAM[71:81])
    for name, cuts in (
        ("ids.bin", range(71 * 4, 81 * 4)),
        ("ids.crc", range(17 * 4, 20 * 4)),
        ("gists_0_01.bin", range(17 * 24, 20 * 24)),
    ):
        for cut in cuts:
            shutil.copytree(tmp_path / "t", tmp_path / "cut")
            os.truncate(tmp_path / "cut" / name, cut)
            if name == "ids.bin":
                with pytest.raises(DamagedError, match=rf"ids.bin' holds {cut // 4} of the 81 ids .*salvage=True"):
                    open_tree(tmp_path / "cut")
                assert (tmp_path / "cut" / name).stat().st_size == cut
            with open_tree(tmp_path / "cut", salvage=name == "ids.bin") as tree:
                assert_prefix(tree, 81 if name != "ids.bin" else max(71, cut // 16 * 4))
            shutil.rmtree(tmp_path / "cut")


def test_lost_gists_are_rebuilt(tmp_path: Path) -> None:
    with open_tree(tmp_path / "t", batch_tokens=64) as tree:
        tree.append(STREAM[:999])
        expected = all_records(tree)
    for path in (tmp_path / "t").glob("gists_*"):
        path.unlink()
    with open_tree(tmp_path / "t", writable=False) as reader:  # in memory
        assert all(torch.equal(a, b) for a, b in zip(all_records(reader), expected, strict=True))
        with pytest.raises(UserError, match="reading only"):
            reader.append([1])
    assert not list((tmp_path / "t").glob("gists_*"))
    with open_tree(tmp_path / "t", batch_tokens=64) as tree:
        assert tree.gist_runs[1] == 999 // BLOCK
        assert_prefix(tree, 999)


def test_a_higher_cap_adds_the_levels_that_a_lower_one_left_out(tmp_path: Path) -> None:
    with open_tree(tmp_path / "t", max_lod=1) as tree:
        tree.append(STREAM[:300])
        assert tree.levels == 1
    with open_tree(tmp_path / "t") as tree:
        assert_prefix(tree, 300)
    with open_tree(tmp_path / "t", max_lod=2) as tree:
        tree.append(STREAM[300:600])
        assert tree.levels == 2
    with open_tree(tmp_path / "t") as tree:
        assert_prefix(tree, 600)


def test_t4_killed_at_random_moments() -> None:
    """The kills happen in a process of their own, which forks a writer at a time."""
    kills = os.environ.get("MEGACONTEXT_TREE_KILLS", "20")
    command = [sys.executable, tree_programs.__file__, "kill", kills]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout


class Full:
    """An os.pwrite of a disk with `room` bytes left."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, fd: int, data: memoryview, offset: int) -> int:
        fits = min(len(data), self.room)
        if fits == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= fits
        return _pwrite(fd, data[:fits], offset)


_pwrite = os.pwrite


@pytest.mark.usefixtures("no_flush")
def test_a_disk_that_fills_at_every_byte_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = open_tree(tmp_path / "t")
    tree.append(STREAM[:71])
    room, full = 0, True
    while full:
        monkeypatch.setattr(disk_files.os, "pwrite", Full(room))
        message = append_error(tree, 20)
        monkeypatch.setattr(disk_files.os, "pwrite", _pwrite)
        full = bool(message)
        if full:
            assert "71 tokens are safe" in message
            assert "No space left" in message
            assert tree.tokens == 71
        if full and room % 25 == 0:
            assert_prefix(tree, 71)
        room += 1
    assert room > 100
    assert_prefix(tree, 91)
    tree.close()
    with open_tree(tmp_path / "t") as reopened:
        assert_prefix(reopened, 91)


def test_a_file_size_limit_of_the_kernel(tmp_path: Path) -> None:
    tree = open_tree(tmp_path / "t")
    tree.append(STREAM[:500])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StorageError, match="500 tokens are safe"):
            tree.append(STREAM[500:9000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_prefix(tree, 500)
    tree.append(STREAM[500:9000])
    assert_prefix(tree, 9000)
    tree.close()


def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    """A 100 KiB tmpfs, where user namespaces are allowed."""
    mount = f"mount -t tmpfs -o size=100k tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let users mount a tmpfs")
    run = f"{mount} && {sys.executable} {tree_programs.__file__} full {tmp_path}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", run], capture_output=True, text=True, check=False, env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "full and fine" in done.stdout


def test_durable_appends_flush_before_they_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(store_disk.DiskStore, "_flush_data", lambda self: flushed.append(self.tokens))
    with open_tree(tmp_path / "lazy") as tree:
        flushed.clear()
        tree.append(STREAM[:10])
        assert not flushed
        tree.sync()
        assert flushed == [10]
    with open_tree(tmp_path / "durable", durable=True) as tree:
        flushed.clear()
        tree.append(STREAM[:10])
        tree.append(STREAM[10:20])
        assert flushed == [0, 10]  # before each commit
