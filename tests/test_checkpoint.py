"""Checkpoints are atomic, complete and survive whatever a crash leaves behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megacontext import storage
from megacontext.errors import CheckpointError, StorageError
from megacontext.train import checkpoint as ck


def write(directory: str, step: int, keep: int = 10, best: str | None = None) -> None:
    writer = ck.CheckpointWriter(directory, "base", None, keep)
    writer.save(step, {"w": torch.full((64, 64), float(step))}, {"m": {"w": torch.ones(3)}}, {"best_checkpoint": best})
    writer.close()


@pytest.fixture(params=["local", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints") if request.param == "local" else f"memory://{tmp_path.name}/checkpoints"


def test_round_trip(directory: str) -> None:
    write(directory, 7)
    path = ck.latest_checkpoint(directory, "base")
    assert path is not None
    assert path.endswith("megacontext_base_000007")
    loaded = ck.load_checkpoint(path, with_optimizer=True)
    assert torch.equal(loaded.model["w"], torch.full((64, 64), 7.0))
    assert loaded.optimizer is not None
    assert torch.equal(loaded.optimizer["m"]["w"], torch.ones(3))
    assert loaded.meta["step"] == 7


def test_snapshot_is_taken_when_save_returns(tmp_path: Path) -> None:
    weights = {"w": torch.zeros(512, 512)}
    writer = ck.CheckpointWriter(str(tmp_path), "base", None, 2)
    writer.save(1, weights, {}, {})
    weights["w"].fill_(9)
    writer.close()
    path = ck.latest_checkpoint(str(tmp_path), "base")
    assert path is not None
    assert ck.load_checkpoint(path, with_optimizer=False).model["w"].abs().max() == 0


def test_keeps_newest_and_best(directory: str) -> None:
    for step in (1, 2, 3, 4, 5):
        write(directory, step, keep=2, best=ck.checkpoint_name("base", 2))
    kept = [path.rsplit("_", 1)[1] for path in ck.list_checkpoints(directory, "base")]
    assert kept == ["000002", "000004", "000005"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "no manifest", "bad manifest"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(directory: str, harm: str) -> None:
    write(directory, 1)
    write(directory, 2)
    newest = storage.join(directory, "megacontext_base_000002")
    model, manifest = storage.join(newest, "model.pt"), storage.join(newest, "manifest.json")
    data = bytearray(storage.read_bytes(model))
    if harm == "flip":
        data[len(data) // 2] ^= 1
        storage.write_bytes(model, bytes(data))
    elif harm == "truncate":
        storage.write_bytes(model, bytes(data[:-1]))
    elif harm == "delete":
        storage.remove_tree(model)
    elif harm == "no manifest":
        storage.remove_tree(manifest)
    else:
        storage.write_bytes(manifest, b'{"files": ')
    said: list[str] = []
    path = ck.latest_checkpoint(directory, "base", warn=said.append)
    assert path is not None
    assert path.endswith("000001")
    assert len(said) == 1
    assert "000002" in said[0]
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        ck.load_checkpoint(newest, with_optimizer=False)


def test_full_disk_raises_and_leaves_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = str(tmp_path)
    write(directory, 1)

    def full(path: Path, data: object) -> None:
        if path.name == "optimizer.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data)

    real = ck._write_durably
    monkeypatch.setattr(ck, "_write_durably", full)
    with pytest.raises(StorageError, match=r"No space left.*Earlier checkpoints are whole.*Free space"):
        write(directory, 2)
    assert storage.list_dir(directory) == ["megacontext_base_000001"]
    path = ck.latest_checkpoint(directory, "base")
    assert path is not None
    assert path.endswith("000001")


def test_a_real_file_size_limit_is_a_clear_error(tmp_path: Path) -> None:
    """The kernel refuses bytes in the middle of torch's own writer, as it does on a full disk."""
    code = (
        "import resource, signal, sys, torch\n"
        "from megacontext.train.checkpoint import CheckpointWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "w = CheckpointWriter(sys.argv[1], 'base', None, 2)\n"
        "w.save(1, {'w': torch.zeros(1000, 1000)}, {}, {})\n"
        "w.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "StorageError" in done.stderr
    assert "Earlier checkpoints are whole" in done.stderr
    assert storage.list_dir(str(tmp_path)) == []


def test_killed_while_writing_leaves_the_previous_one(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from megacontext.train.checkpoint import CheckpointWriter\n"
        "w = CheckpointWriter(sys.argv[1], 'base', None, 3)\n"
        "for step in range(10_000):\n"
        "    w.save(step, {'w': torch.full((300, 300), float(step))}, {'o': torch.ones(1000)}, {})\n"
        "    if step == 1: print('ready', flush=True)\n"
    )
    for attempt in range(4):
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.02 + 0.013 * attempt)
            process.send_signal(signal.SIGKILL)
        path = ck.latest_checkpoint(str(tmp_path), "base")
        assert path is not None
        loaded = ck.load_checkpoint(path, with_optimizer=True)
        assert torch.equal(loaded.model["w"], torch.full((300, 300), float(loaded.meta["step"])))
    ck.CheckpointWriter(str(tmp_path), "base", None, 3).close()
    assert not [name for name in storage.list_dir(str(tmp_path)) if name.startswith(".tmp")]


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    write(str(tmp_path), 1)
    path = storage.join(str(tmp_path), "megacontext_base_000001")
    meta = storage.read_json(storage.join(path, "meta.json")) | {"format": 99}
    storage.write_json(storage.join(path, "meta.json"), meta)
    manifest = storage.read_json(storage.join(path, "manifest.json"))
    file = storage.join(path, "meta.json")
    manifest["files"]["meta.json"] = {"bytes": storage.file_size(file), "sha256": storage.sha256_file(file)}
    storage.write_json(storage.join(path, "manifest.json"), manifest)
    with pytest.raises(CheckpointError, match="format 99"):
        ck.load_checkpoint(path, with_optimizer=False)


def test_unreachable_storage_is_named() -> None:
    with pytest.raises(StorageError, match="nosuchstore"):
        ck.CheckpointWriter("nosuchstore://bucket/run", "base", None, 2)
