"""Training through Ray: the same numbers as without it, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_resume import losses, rows, train_here
from tiny import make_task

from jobs import cli
from jobs.launch import run_training
from megacontext.errors import NonFiniteLossError, UserError
from megacontext.train.worker import stop_file

pytestmark = pytest.mark.ray


def arguments(task: Any, **flags: Any) -> cli.Args:
    given = {"tier": "cpu", "run": "run", "base_dir": str(Path(task.run_dir).parent), "wandb": "off",
             "cpus_per_worker": 1, **flags}  # fmt: skip
    return cli.resolve(given)


def test_one_ray_worker_equals_no_ray_bit_for_bit(tmp_path: Path, ray_cluster: Any) -> None:
    train_here(make_task(tmp_path, "whole"))
    task = make_task(tmp_path)
    result = run_training(task, arguments(task))
    assert result["finished"]
    assert losses(tmp_path, "run") == losses(tmp_path, "whole")
    assert rows(tmp_path, "run") == rows(tmp_path, "whole")


def test_killed_worker_of_two_restarts_and_loses_nothing(
    tmp_path: Path, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(make_task(tmp_path, "whole", num_iterations=150, save_every=5))
    task = make_task(tmp_path, num_iterations=150, save_every=5)
    killed = threading.Event()

    def kill_when_training() -> None:
        log = Path(task.run_dir) / "rows" / "base_rank1.jsonl"
        while not (log.exists() and len(log.read_text().splitlines()) >= 12):
            time.sleep(0.02)
        workers = [p for p in psutil.process_iter() if "RayTrainWorker" in p.name() or "RayTrainWorker" in _title(p)]
        assert workers, "no training process found to kill"
        os.kill(workers[0].pid, signal.SIGKILL)
        killed.set()

    threading.Thread(target=kill_when_training, daemon=True).start()
    result = run_training(task, arguments(task, num_workers=2))
    assert killed.is_set()
    assert result["finished"]
    assert "restart 1 of 3 from the newest checkpoint" in capsys.readouterr().out
    assert losses(tmp_path, "run") == pytest.approx(losses(tmp_path, "whole"), abs=1e-5)
    both = [sorted(step) for step in rows(tmp_path, "run", workers=2)]
    assert both == [sorted(step) for step in rows(tmp_path, "whole")]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_stop_file_ends_a_ray_run_with_a_checkpoint_that_another_world_size_continues(
    tmp_path: Path, ray_cluster: Any
) -> None:
    train_here(make_task(tmp_path, "whole", num_iterations=100))
    task = make_task(tmp_path, num_iterations=100)

    def stop_when_training() -> None:
        log = Path(task.run_dir) / "rows" / "base_rank0.jsonl"
        while not (log.exists() and len(log.read_text().splitlines()) >= 3):
            time.sleep(0.02)
        Path(stop_file(task.run_dir)).touch()

    threading.Thread(target=stop_when_training, daemon=True).start()
    stopped = run_training(task, arguments(task, num_workers=2))
    assert not stopped["finished"]
    assert 3 <= stopped["step"] < 100
    assert Path(stopped["checkpoint"]).is_dir()
    assert run_training(task, arguments(task))["finished"]
    assert losses(tmp_path, "run") == pytest.approx(losses(tmp_path, "whole"), abs=1e-5)


def test_bad_worlds_are_refused_before_anything_starts(tmp_path: Path, ray_cluster: Any) -> None:
    task = make_task(tmp_path)
    with pytest.raises(UserError, match="4 rows per step cannot be shared by 3 workers"):
        run_training(task, arguments(task, num_workers=3))
    with pytest.raises(UserError, match="cluster has no GPU"):
        run_training(task, arguments(task, device="cuda"))
    local = make_task(tmp_path, stream="ray")
    with pytest.raises(UserError, match="--stream ray needs --launcher ray"):
        run_training(local, arguments(local, launcher="local"))


def test_divergence_is_raised_once_and_not_retried(
    tmp_path: Path, ray_cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    task = make_task(tmp_path, matrix_lr=float("inf"))
    with pytest.raises(NonFiniteLossError, match=r"step \d+: loss .*stopped before the optimizer step"):
        run_training(task, arguments(task))
    assert "restart" not in capsys.readouterr().out
