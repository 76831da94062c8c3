"""metrics.jsonl and rows/*.jsonl: damaged lines are named or written again, and a full disk costs no step done."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from test_resume import losses, rows, train_here
from tiny import make_task

from megacontext import storage
from megacontext.errors import StorageError, UserError
from megacontext.telemetry import metrics_file
from megacontext.telemetry.metrics_file import drop_from, read_metrics
from megacontext.telemetry.rows import RowLog

DAMAGE = [b"not json", b"", b"\0" * 40, b"\xff\xfe", b"7", b"[1]", b'{"step": 3', b"[" * 100_000]


def line(step: int, stage: str = "base") -> bytes:
    return f'{{"step": {step}, "stage": "{stage}"}}'.encode()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_that_is_kept_is_named_and_the_file_stays(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    data = b"\n".join([line(0), damage, line(2), line(3), b""])
    path.write_bytes(data)
    for read in (lambda: drop_from(str(path), "base", 3), lambda: read_metrics(str(tmp_path))):
        with pytest.raises(UserError, match=r"line 2 of .*metrics.jsonl.*damaged.*delete the line"):
            read()
    assert path.read_bytes() == data


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("place", [2, 3])
def test_a_damaged_line_among_those_written_again_is_one_of_them(tmp_path: Path, damage: bytes, place: int) -> None:
    """A power cut leaves holes where the newest lines were."""
    path = tmp_path / "metrics.jsonl"
    lines = [line(0), line(1), line(2), damage]
    lines[2], lines[3] = (lines[2], lines[3]) if place == 3 else (lines[3], line(3))
    path.write_bytes(b"\n".join([line(9, "sft"), *lines, b""]))
    if place == 2:  # it may have been that of step 1, which is kept
        with pytest.raises(UserError, match="line 4 of"):
            drop_from(str(path), "base", 2)
    drop_from(str(path), "base", 1 if place == 2 else 2)
    kept = [line(9, "sft"), line(0)] + ([line(1)] if place == 3 else [])
    assert path.read_bytes() == b"\n".join([*kept, b""])


def test_a_file_that_is_nothing_but_damage_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"what is this\n")
    with pytest.raises(UserError, match="line 1 of"):
        drop_from(str(path), "base", 0)
    assert path.read_bytes() == b"what is this\n"


@pytest.mark.parametrize("name", ["metrics.jsonl", "rows/base_rank0.jsonl"])
def test_training_is_refused_over_a_damaged_line_and_goes_on_after_a_cut_one(tmp_path: Path, name: str) -> None:
    train_here(make_task(tmp_path))
    path = tmp_path / "run" / name
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\xff damaged", *lines[2:]]))
    with pytest.raises(UserError, match=rf"line 2 of .*{name}.*damaged"):
        train_here(make_task(tmp_path))
    path.write_bytes(b"\n".join(lines[:-1]) + b'\n{"step": 12, "ro')
    train_here(make_task(tmp_path))
    assert path.read_bytes() == whole


class FullDisk:
    """os.write that has no room for lines of one file, from the n-th on."""

    def __init__(self, name: str, after: int) -> None:
        self.name, self.left, self.real = name, after, os.write

    def __call__(self, file: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{file}").endswith(self.name):
            if self.left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= 1
        return self.real(file, data)


@pytest.mark.parametrize("name", ["metrics.jsonl", "rows/base_rank0.jsonl"])
def test_a_full_disk_stops_training_with_a_checkpoint(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = make_task(tmp_path, save_every=-1, eval_every=-1)
    monkeypatch.setattr(metrics_file.os, "write", FullDisk(name, after=5))
    with pytest.raises(StorageError, match=rf"cannot write .*{name}.*No space left.*Free space"):
        train_here(task)
    monkeypatch.undo()
    assert "the 6 steps done are kept" in capsys.readouterr().out
    assert train_here(task).finished
    assert "resuming at step 6 of 12" in capsys.readouterr().out
    train_here(make_task(tmp_path, "whole", save_every=-1, eval_every=-1))
    mine, whole = losses(tmp_path, "run"), losses(tmp_path, "whole")
    missing = whole.keys() - mine.keys()
    assert missing == (set() if "rows" in name else {6}), "the line that found no room, and no other"
    assert mine == {step: loss for step, loss in whole.items() if step not in missing}


def test_a_full_disk_for_everything_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megacontext.train import checkpoint as ck

    def full(path: Path, data: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    task = make_task(tmp_path, save_every=3)
    monkeypatch.setattr(metrics_file.os, "write", FullDisk("rows/base_rank0.jsonl", after=8))
    real = ck._write_durably
    monkeypatch.setattr(ck, "_write_durably", lambda path, data: (full if "000009" in str(path) else real)(path, data))
    with pytest.raises(StorageError, match=r"rows/base_rank0.jsonl"):
        train_here(task)
    assert "step 9 could not be saved: " in capsys.readouterr().out
    monkeypatch.undo()
    assert train_here(task).finished
    assert "resuming at step 6 of 12" in capsys.readouterr().out
    train_here(make_task(tmp_path, "whole", save_every=3))
    assert losses(tmp_path, "run") == losses(tmp_path, "whole")
    assert rows(tmp_path, "run") == rows(tmp_path, "whole")


def test_a_row_log_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("a file")
    with pytest.raises(StorageError, match=r"base_rank0.jsonl"):
        RowLog(str(tmp_path), "base", 0, 0, enabled=True)


def test_a_remote_curve_has_no_hole_before_its_checkpoint(tmp_path: Path) -> None:
    sink = metrics_file.RemoteSink(f"memory://lines-{tmp_path.name}/metrics.jsonl", [], every_s=600)
    sink.append('{"step": 1}')
    sink.sync()
    assert storage.read_bytes(f"memory://lines-{tmp_path.name}/metrics.jsonl") == b'{"step": 1}\n'
    sink.close()
