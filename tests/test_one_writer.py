"""A stage of a run has one writer: the second is refused by name, and a dead one hinders nobody."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S
from test_damaged_checkpoints import content, path_of, write
from test_resume import HERE, train_here
from tiny import make_task

from jobs.runtime import cli
from jobs.runtime.launch import run_training
from megacontext import locks, storage
from megacontext.errors import StorageError, UserError
from megacontext.train import checkpoint as ck
from megacontext.train.resume import check_start, newest_to_resume
from megacontext.train.worker import stop_file


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ck, "WAIT_S", 0.0)


@pytest.fixture(params=["local", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints") if request.param == "local" else f"memory://{tmp_path.name}/checkpoints"


def writer_of(directory: str, stage: str = "base") -> ck.CheckpointWriter:
    return ck.CheckpointWriter(directory, stage, None, 2)


def names(directory: str) -> list[str]:
    return [name for name in storage.list_dir(directory) if not name.startswith(".writer")]


def test_the_second_writer_is_refused_by_name_and_the_first_goes_on(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = writer_of(directory)
    half, go_on = threading.Event(), threading.Event()
    real = ck.CheckpointWriter._contents

    def slow(self: ck.CheckpointWriter, parts: object, meta: object) -> object:
        for item in real(self, parts, meta):  # type: ignore[arg-type]
            yield item
            half.set()
            assert go_on.wait(60)

    monkeypatch.setattr(ck.CheckpointWriter, "_contents", slow)
    first.save(1, {"w": torch.ones(9)}, {}, {})
    assert half.wait(60)
    before = names(directory)
    me = rf"process {os.getpid()} on {socket.gethostname()} since \d{{4}}-.* another --run"
    with pytest.raises(UserError, match=me):
        writer_of(directory)
    with pytest.raises(UserError, match=me):
        ck.refuse_second_writer(directory, "base")
    assert names(directory) == before, "nothing of what the first is writing is touched"
    writer_of(directory, "sft").close()
    go_on.set()
    first.close()
    assert names(directory) == ["megacontext_base_000001"]
    assert ck.load_checkpoint(storage.join(directory, "megacontext_base_000001"), with_optimizer=True).meta["step"] == 1
    writer_of(directory).close()
    assert storage.list_dir(directory) == ["megacontext_base_000001"], "the lock's file is gone as well"


def test_a_writer_that_was_killed_hinders_nobody(tmp_path: Path) -> None:
    code = (
        "import sys, time; from megacontext.train.checkpoint import CheckpointWriter\n"
        "w = CheckpointWriter(sys.argv[1], 'base', None, 2); print('ready', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=f"process {other.pid} on "):
            writer_of(str(tmp_path))
        other.send_signal(signal.SIGKILL)
    writer_of(str(tmp_path)).close()


def test_a_dying_writer_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = writer_of(str(tmp_path))
    monkeypatch.setattr(ck, "WAIT_S", 60.0)
    threading.Timer(0.3, first.close).start()
    writer_of(str(tmp_path)).close()


def test_a_second_training_of_a_run_changes_nothing(tmp_path: Path) -> None:
    task = make_task(tmp_path, num_iterations=2)
    train_here(task)
    stop = Path(stop_file(task.run_dir))
    stop.touch()
    first = writer_of(str(tmp_path / "run" / "checkpoints"))
    before = content(tmp_path / "run")
    args = cli.resolve({"tier": "cpu", "run": "run", "base_dir": str(tmp_path), "wandb": "off", "launcher": "local"})
    for start in (lambda: run_training(task, args), lambda: train_here(task), lambda: check_start(task)):
        with pytest.raises(UserError, match="trained already"):
            start()
    first.close()
    before.pop("checkpoints/.writer-base")
    assert content(tmp_path / "run") == before
    check_start(task)


def test_every_rank_of_a_second_training_ends(tmp_path: Path) -> None:
    """Rank 0 alone has the lock, and tells the others that it did not get it."""
    make_task(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               str(HERE / "train_tiny.py"), str(tmp_path), "run", "num_iterations=2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "MC_TEST_WAIT_S": "0"}
    holder = writer_of(str(tmp_path / "run" / "checkpoints"))
    refused = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=PATIENCE_S)
    holder.close()
    assert refused.returncode != 0
    assert refused.stderr.count("trained already") >= 2, refused.stderr[-3000:]


def test_what_is_published_is_what_was_written(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ck.CheckpointWriter._check

    def meddle(self: ck.CheckpointWriter, step: int, path: str) -> None:
        storage.remove_tree(storage.join(path, "model.pt"))
        real(self, step, path)

    write(directory, 1)
    monkeypatch.setattr(ck.CheckpointWriter, "_check", meddle)
    with pytest.raises(StorageError, match=r"step 2 was not published .*model.pt is missing.*Earlier checkpoints are"):
        write(directory, 2)
    monkeypatch.undo()
    assert newest_to_resume(directory, "base", warn=lambda _: None) == storage.join(
        directory, "megacontext_base_000001"
    )
    write(directory, 3)
    assert names(directory) == ["megacontext_base_000001", "megacontext_base_000003"]


def test_what_a_dead_writer_left_half_done_is_finished_or_removed(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    path_of(tmp_path, 2).rename(tmp_path / ".old-megacontext_base_000002")  # it died between two renames
    path_of(tmp_path, 1).rename(tmp_path / ".tmp-megacontext_base_000001")  # it died while deleting
    (tmp_path / ".tmp-megacontext_base_000004-77").mkdir()  # it died while writing
    (tmp_path / ".tmp-megacontext_sft_000001-78").mkdir()  # another stage's
    write(tmp_path, 5)
    assert storage.list_dir(str(tmp_path)) == [
        ".tmp-megacontext_sft_000001-78", *(ck.checkpoint_name("base", step) for step in (2, 3, 5))
    ]  # fmt: skip


def test_a_first_remote_checkpoint_that_was_half_written_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no renames there, so a folder without a manifest may be our own; a mark beside it says so."""
    directory = f"memory://{tmp_path.name}/checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(ck.CheckpointWriter, "_check", lambda self, step, path: os._exit(1))  # never reached
        patch.setattr(storage, "write_json", _power_cut)
        with pytest.raises(_PowerCutError):
            write(directory, 1)
    assert storage.exists(f"{directory}/megacontext_base_000001/model.pt")
    said: list[str] = []
    assert newest_to_resume(directory, "base", warn=said.append) is None
    assert "half written" in said[0]
    write(directory, 2)
    assert names(directory) == ["megacontext_base_000002"]


class _PowerCutError(Exception):
    pass


def _power_cut(*_: object) -> None:
    raise _PowerCutError


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr(ck.CheckpointWriter, "_delete", lambda self, path: os.rmdir(path))
    write(tmp_path, 2, keep=1)
    assert "could not be deleted" in capsys.readouterr().out
    assert newest_to_resume(str(tmp_path), "base") == str(path_of(tmp_path, 2))


def lease(path: str) -> locks.Lease:
    return locks.Lease(path, lambda holder: UserError(f"held by {holder}"))


def test_a_lease_of_a_process_that_is_gone_is_free_at_once() -> None:
    path = "memory://locks/gone"
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    said = {"id": "x", "holder": "process x", "place": locks._place(), "pid": gone.pid, "beat": 7}
    storage.write_json(path, said)
    lease(path).release()
    assert not storage.exists(path)


def test_a_lease_of_another_machine_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "memory://locks/far"
    said = {"id": "x", "holder": "process 7 on far", "place": "far", "pid": 7, "beat": 7}
    monkeypatch.setattr(locks, "WATCH_S", 0.5)
    for silent in (said, {"id": ["damaged"]}):
        storage.write_json(path, silent)
        lease(path).release()  # nobody writes it any more
    beats = iter(range(8, 10**6))
    real = locks.Lease._read

    def read(self: locks.Lease) -> object:
        storage.write_json(path, said | {"beat": next(beats)})
        return real(self)

    monkeypatch.setattr(locks.Lease, "_read", read)
    with pytest.raises(UserError, match="held by process 7 on far"):
        lease(path)


def test_a_writer_that_lost_its_lease_writes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.01)
    writer = writer_of("memory://locks-lost/checkpoints")
    storage.write_json("memory://locks-lost/checkpoints/.writer-base", {"id": "y", "holder": "process 8 on far"})
    writer._lock._thread.join(60)  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="process 8 on far writes here now"):
        writer.save(1, {}, {}, {})
    writer.close()
    assert names("memory://locks-lost/checkpoints") == []
    assert storage.exists("memory://locks-lost/checkpoints/.writer-base"), "it is the other's"


def test_a_file_system_without_locks_gets_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(locks.errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    first = writer_of(str(tmp_path))
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        writer_of(str(tmp_path))
    first.close()
    writer_of(str(tmp_path)).close()
