"""A run that is killed continues on the very next row with the very same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S
from tiny import make_task

from megacontext.errors import CheckpointError, DataError, NonFiniteLossError, UserError
from megacontext.telemetry.tracker import Tracker
from megacontext.train.loop import TrainResult, train
from megacontext.train.objective import TokenObjective
from megacontext.train.step_plan import StepPlan
from megacontext.train.task import TrainTask
from megacontext.train.throughput import Stopwatch
from megacontext.train.worker import LocalWorker, stop_file

HERE = Path(__file__).resolve().parent


def start(folder: Path, run: str, *settings: str, workers: int = 1, timeout_s: float = PATIENCE_S) -> str:
    command = [sys.executable]
    if workers > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={workers}", "--master_port=0", "--standalone"]
    command += [str(HERE / "train_tiny.py"), str(folder), run, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(folder: Path, run: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for line in (folder / run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "train/loss" in record:
            assert record["step"] not in found, f"step {record['step']} is recorded twice"
            found[record["step"]] = record["train/loss"]
    return found


def rows(folder: Path, run: str, workers: int = 1) -> list[list[int]]:
    """Row ids of each step, those of all workers together."""
    steps: dict[int, list[int]] = {}
    for rank in range(workers):
        for line in (folder / run / "rows" / f"base_rank{rank}.jsonl").read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], []).extend(record["rows"])
    assert list(steps) == list(range(len(steps)))
    return list(steps.values())


def train_here(task: TrainTask, worker: LocalWorker | None = None) -> TrainResult:
    tracker = Tracker(run_dir=task.run_dir, run_name="run", config={}, wandb_mode="off")
    return train(task, worker or LocalWorker(task.run_dir, torch.device("cpu")), tracker)


def test_two_workers_equal_one_and_either_continues_the_other(tmp_path: Path) -> None:
    train_here(make_task(tmp_path, "one"))
    start(tmp_path, "two", workers=2)
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), abs=1e-5)
    assert [sorted(step) for step in rows(tmp_path, "two", 2)] == [sorted(step) for step in rows(tmp_path, "one")]
    for path in (tmp_path / "two" / "checkpoints").iterdir():
        if not path.name.endswith("000006"):
            for file in sorted(path.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            path.rmdir()
    train_here(make_task(tmp_path, "two"))  # one worker takes up step 6
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), abs=1e-5)


class StoppedAtThird(LocalWorker):
    """A worker that is asked to stop when the loop looks for the third time: before the run, and at each step."""

    looks = 0

    def stop_requested(self) -> bool:
        self.looks += 1
        return self.looks == 3


def test_stop_file_saves_and_ends_then_continues(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    train_here(make_task(tmp_path, "whole"))
    Path(task.run_dir).mkdir()
    Path(stop_file(task.run_dir)).touch()
    unbegun = train_here(task)
    assert (unbegun.finished, unbegun.step, unbegun.checkpoint) == (False, 0, "")
    Path(stop_file(task.run_dir)).unlink()
    stopped = train_here(task, StoppedAtThird(task.run_dir, torch.device("cpu")))
    assert (stopped.finished, stopped.step) == (False, 2)
    assert Path(stopped.checkpoint).is_dir()
    assert train_here(task).finished
    assert losses(tmp_path, "run") == losses(tmp_path, "whole")


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    first = train_here(task)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = train_here(task)
    assert again.finished
    assert again.step == first.step == 12
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed was 5, is 6"),
        ({"matrix_lr": 0.5}, "matrix_lr was 0.02, is 0.5"),
        ({"num_iterations": 13}, "a run of 12 steps and 13"),
    ],
)
def test_continuing_with_other_settings_is_refused(tmp_path: Path, change: dict[str, float], message: str) -> None:
    train_here(make_task(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        train_here(make_task(tmp_path, **change))


def test_batch_that_does_not_divide_names_what_does(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--total_batch_size 100 .* nearest that is: 96"):
        train_here(make_task(tmp_path, total_batch_size=100))
    with pytest.raises(UserError, match="4 rows per step cannot be shared by 1 workers with a device batch of 3"):
        train_here(make_task(tmp_path, device_batch_size=3))


def test_changed_shards_are_refused(tmp_path: Path) -> None:
    from tiny import make_shards

    from megacontext.data.tokenizer import Tokenizer

    train_here(make_task(tmp_path))
    make_shards(tmp_path / "train", Tokenizer.load(str(tmp_path / "tokenizer")), seed=9)
    with pytest.raises(DataError, match="are not those"):
        train_here(make_task(tmp_path, num_iterations=12))


def test_nan_stops_before_the_update_and_names_step_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = TokenObjective.loss

    def poisoned(self: TokenObjective, plan: StepPlan, scale: float, watch: Stopwatch) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = real(self, plan, scale, watch)
        return loss * float("nan") if calls == 2 * 5 + 1 else loss  # first micro-batch of step 5

    monkeypatch.setattr(TokenObjective, "loss", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 5: loss nan.*before the optimizer step.*rows involved: \[\d+"):
        train_here(make_task(tmp_path))
    monkeypatch.setattr(TokenObjective, "loss", real)
    resumed = train_here(make_task(tmp_path))  # nothing was lost: step 5 is taken up with good weights
    assert resumed.finished
    train_here(make_task(tmp_path, "whole"))
    assert losses(tmp_path, "run") == losses(tmp_path, "whole")


def test_state_continues_through_a_damaged_newest_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(make_task(tmp_path))
    newest = tmp_path / "run" / "checkpoints" / "megacontext_base_000012"
    (newest / "model.pt").write_bytes(b"half")
    result = train_here(make_task(tmp_path))
    assert result.finished
    said = capsys.readouterr().out
    assert "megacontext_base_000012" in said
    assert "damaged" in said
    train_here(make_task(tmp_path, "whole"))
    assert losses(tmp_path, "run") == losses(tmp_path, "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_job_saves_and_says_so(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import sys; from pathlib import Path; from tiny import make_task\n"
        "from jobs.runtime import cli; from jobs.runtime.launch import run_training\n"
        "task = make_task(Path(sys.argv[1]), num_iterations=100_000, save_every=-1, eval_every=-1)\n"
        "args = cli.resolve({'tier': 'cpu', 'base_dir': sys.argv[1], 'wandb': 'off', 'launcher': 'local'})\n"
        "result = run_training(task, args); print('finished', result['finished'], result['step'], flush=True)\n"
    )
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 00003/"):
                process.send_signal(number)
                break
        said = process.stdout.read()
    assert f"{number.name}: writing a checkpoint, then stopping" in said
    assert "finished False" in said
    step = int(said.split("finished False ")[1])
    assert step >= 3
    assert (tmp_path / "run" / "checkpoints" / f"megacontext_base_{step:06d}" / "manifest.json").is_file()
