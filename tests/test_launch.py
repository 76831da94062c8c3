"""Training through Ray: the same numbers as without it, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_mc_training import make_mc_task
from test_resume import losses, rows, train_here
from tiny import make_task

from jobs.runtime import cli, one_machine, patience
from jobs.runtime.cluster import WorkerResources
from jobs.runtime.launch import run_training, sizes_on_cluster
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


def test_a_killed_worker_and_a_stop_cost_nothing_and_another_world_size_continues(
    tmp_path: Path, ray_cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers; one is killed, the group restarts; a stop file ends it with a checkpoint; one worker ends the run."""
    steps = {"num_iterations": 100, "save_every": 5}
    train_here(make_task(tmp_path, "whole", **steps))
    task = make_task(tmp_path, **steps)
    killed = threading.Event()

    def wait_for(rank: int, step: int) -> None:
        log = Path(task.run_dir) / "rows" / f"base_rank{rank}.jsonl"
        while not (log.exists() and len(log.read_text().splitlines()) > step):
            time.sleep(0.02)

    def kill_then_stop() -> None:
        wait_for(rank=1, step=11)
        below = psutil.Process().children(recursive=True)  # never those of another cluster on this machine
        workers = [p for p in below if "RayTrainWorker" in _title(p)]
        assert workers, "no training process found to kill"
        os.kill(workers[0].pid, signal.SIGKILL)
        killed.set()
        restarted = len((Path(task.run_dir) / "rows" / "base_rank0.jsonl").read_text().splitlines())
        wait_for(rank=0, step=restarted + 5)
        Path(stop_file(task.run_dir)).touch()

    threading.Thread(target=kill_then_stop, daemon=True).start()
    stopped = run_training(task, arguments(task, num_workers=2))
    assert killed.is_set()
    assert "restart 1 of 3 from the newest checkpoint" in capsys.readouterr().out
    assert not stopped["finished"]
    assert 12 <= stopped["step"] < 100
    assert Path(stopped["checkpoint"]).is_dir()
    both = [sorted(step) for step in rows(tmp_path, "run", workers=2)]
    assert both == [sorted(step) for step in rows(tmp_path, "whole")][: stopped["step"]]
    assert run_training(task, arguments(task))["finished"]
    assert losses(tmp_path, "run") == pytest.approx(losses(tmp_path, "whole"), abs=1e-5)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return ""


def test_clock_and_memory_are_read_on_the_cluster_once(
    tmp_path: Path, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of the rows needs both before any training process is there."""
    task = make_mc_task(tmp_path, "run", num_iterations=-1, max_minutes=0.001, min_tokens=3 * 512)
    result = run_training(task, arguments(task))
    assert (result["finished"], result["step"]) == (True, 3)  # the floor, since nothing fits
    batch = json.loads((tmp_path / "run" / "horizon" / "base_batch.json").read_text())
    assert batch["chosen"] == batch["asked"] == 2
    monkeypatch.setattr("ray.get", None)  # now they are known
    assert sizes_on_cluster(task, WorkerResources(1, False, {"CPU": 1.0}, 1), time.time()) == (3, 2)


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
    task = make_task(tmp_path, matrix_lr=1e38)
    with pytest.raises(NonFiniteLossError, match=r"step \d+: loss .*stopped before the optimizer step"):
        run_training(task, arguments(task))
    assert "restart" not in capsys.readouterr().out


def test_a_node_that_comes_up_slowly_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the node of `ray.init` needs more than the half minute that Ray gives it."""
    from ray._private import services

    answers = iter([RuntimeError("not there"), RuntimeError("not there"), {"node": 1}])

    def look(*_: object) -> object:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(services, "get_node", look)
    patience.wait_for_own_node()
    patience.wait_for_own_node()
    assert services.get_node("address", "id") == {"node": 1}
    cluster = one_machine.OneMachineCluster({}, 1)
    cluster.stop()
    assert cluster.client_environment.items() >= patience.PATIENT.items()
