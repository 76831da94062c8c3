"""A stop loses nothing: signals at any moment, through Ray and without; and what a log shows of Ray itself."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_task

from jobs import training
from jobs.runtime import cli, launch, stage, stopping
from jobs.runtime.own_lines import OwnLines
from megacontext.checkpoint import latest_checkpoint, read_meta
from megacontext.stages import BASE, BASE_EVAL
from megacontext.telemetry.tracker import Tracker
from megacontext.train.loop import train as train_loop
from megacontext.train.worker import LocalWorker, stop_file

ROOT = Path(__file__).resolve().parents[1]
SOAK = bool(os.environ.get("MC_SOAK"))
MOMENTS = 10 if SOAK else 1
KEPT = "everything finished before is kept. Run the same command to continue."


@pytest.fixture
def handlers() -> Iterator[None]:
    """The handlers of this process are those of before when the test ends."""
    before = {number: signal.getsignal(number) for number in stopping.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(folder: Path, run: str, launcher: str, **env: str) -> subprocess.Popen[str]:
    """A job that trains for longer than any test lasts; its data is prepared."""
    make_task(folder, run)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_JOB")}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "stop_tiny.py"), str(folder), run, launcher, *LONG],
        env={**clean, "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1", **env},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


LONG = ["num_iterations=1000000", "save_every=37", "eval_every=5"]


def steps_logged(run_dir: Path) -> int:
    log = run_dir / "rows" / "base_rank0.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for_steps(run_dir: Path, step: int, check: Callable[[], None]) -> int:
    """Wait until `step` steps are logged; returns the number of logged steps. `check` raises when waiting is in vain."""
    while steps_logged(run_dir) < step:
        check()
        time.sleep(0.01)
    return steps_logged(run_dir)


def check_saved(run_dir: Path, begun: int, output: str) -> None:
    """The newest checkpoint is not older than the last step logged before the stop, and the log names it.

    A stop before the first step writes none, and the log says that nothing is lost.
    """
    path = latest_checkpoint(str(run_dir / "checkpoints"), "base")
    assert "Traceback" not in output, output
    if path is None:
        assert begun == 0, output
        assert KEPT in output or "stopped at step 0; no step was done, nothing is lost." in output, output
        return
    assert read_meta(path)["step"] >= begun, output
    assert f"stopped at step {read_meta(path)['step']}; checkpoint {path}" in output, output


def stop_and_check(process: subprocess.Popen[str], run_dir: Path, dice: random.Random, number: int) -> None:
    """Send a signal once some steps are logged; of many, every third is sent some time after the start instead."""
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said == "ready\n", said + process.communicate()[0]

    def check() -> None:
        assert process.poll() is None, process.communicate()[0]

    if SOAK and dice.random() < 1 / 3:
        time.sleep(dice.uniform(0, 12))
        begun = steps_logged(run_dir)
    else:
        begun = wait_for_steps(run_dir, dice.randrange(1, 60), check)
    process.send_signal(number)
    output = process.communicate(timeout=280)[0]
    assert process.returncode == 128 + number, output
    check_saved(run_dir, begun, output)
    print(f"{signal.Signals(number).name} after {begun} steps: {output.splitlines()[-1]}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP] if SOAK else [signal.SIGHUP])
def test_a_signal_ends_a_local_run_with_a_checkpoint(tmp_path: Path, number: int) -> None:
    dice = random.Random(number)
    for moment in range(MOMENTS):
        run_dir = tmp_path / f"run{moment}"
        stop_and_check(train(tmp_path, run_dir.name, "local"), run_dir, dice, number)


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT] if SOAK else [signal.SIGTERM])
def test_a_signal_ends_a_run_on_ray_with_a_checkpoint(tmp_path: Path, ray_cluster: Any, number: int) -> None:
    """The data is prepared, so training itself starts Ray, which installs handlers of its own."""
    dice = random.Random(number)
    address = ray_cluster.address_info["gcs_address"]
    for moment in range(MOMENTS):
        run_dir = tmp_path / f"run{moment} é"
        stop_and_check(train(tmp_path, run_dir.name, "ray", RAY_ADDRESS=address), run_dir, dice, number)


def test_a_reader_that_goes_away_ends_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    """`… | tee log` and Ctrl-C: the same signal ends tee, and the next line of the job meets a closed pipe."""
    process = train(tmp_path, "run", "local")
    wait_for_steps(tmp_path / "run", 2, lambda: None)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=240) == 128 + signal.SIGHUP
    path = latest_checkpoint(str(tmp_path / "run" / "checkpoints"), "base")
    assert path is not None
    assert read_meta(path)["step"] >= 2


def test_a_stop_while_data_are_opened_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], handlers: None
) -> None:
    import megacontext.train.loop as loop

    task = make_task(tmp_path)
    args = cli.resolve({"tier": "cpu", "run": "run", "base_dir": str(tmp_path), "wandb": "off", "launcher": "local"})
    monkeypatch.setattr(loop, "build", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        cli.finish(lambda: launch.run_training(task, args))
    assert caught.value.code == 143
    assert capsys.readouterr().err == f"stopped; {KEPT}\n"


def test_a_stop_while_the_horizon_is_measured_starts_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    task = make_task(tmp_path)
    monkeypatch.setattr(launch, "start_ray", lambda: None)
    monkeypatch.setattr(launch, "worker_resources", lambda run: launch.WorkerResources(1, False, {"CPU": 1.0}, 1))
    monkeypatch.setattr(launch, "sizes_on_cluster", lambda *_: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(launch, "_trainer", lambda *_: pytest.fail("training was started after the stop"))
    args = cli.resolve({"tier": "cpu", "run": "run", "base_dir": str(tmp_path), "wandb": "off"})
    with pytest.raises(stopping.Ended):
        launch.run_training(task, args)


def test_a_stop_between_two_worker_groups_starts_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    """The workers died, and the signal arrives before the next group: the newest checkpoint is what is kept."""
    task = make_task(tmp_path, num_iterations=6)
    train_loop(task, LocalWorker(task.run_dir, torch.device("cpu")), tracker(task))
    groups = []

    def fit() -> Any:
        groups.append(1)
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("a worker died")

    monkeypatch.setattr(stopping.StopSignals, "beside", lambda self, work: work())
    monkeypatch.setattr(launch, "start_ray", lambda: None)
    monkeypatch.setattr(launch, "worker_resources", lambda run: launch.WorkerResources(1, False, {"CPU": 1.0}, 1))
    monkeypatch.setattr(launch, "_trainer", lambda *_: SimpleNamespace(fit=fit))
    monkeypatch.setattr(launch, "_training_failure", lambda error: error)
    args = cli.resolve({"tier": "cpu", "run": "run", "base_dir": str(tmp_path), "wandb": "off"})
    result = launch.run_training(task, args)
    assert len(groups) == 1
    assert (result["finished"], result["step"]) == (False, 6)
    assert Path(result["checkpoint"]).is_dir()


def tracker(task: Any) -> Tracker:
    return Tracker(run_dir=task.run_dir, run_name="run", config={}, wandb_mode="off")


def test_a_worker_that_finds_the_stop_before_its_first_step_trains_none(tmp_path: Path) -> None:
    task = make_task(tmp_path, num_iterations=6)
    worker = LocalWorker(task.run_dir, torch.device("cpu"))
    Path(task.run_dir).mkdir()
    Path(stop_file(task.run_dir)).touch()
    result = train_loop(task, worker, tracker(task))
    assert (result.finished, result.step, result.checkpoint) == (False, 0, "")
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").glob("mega*"))
    with pytest.raises(stopping.Stopped, match="stopped at step 0; no step was done, nothing is lost"):
        training.result_of(BASE, {"finished": False, "step": 0, "checkpoint": ""})
    Path(stop_file(task.run_dir)).unlink()
    assert train_loop(task, worker, tracker(task)).finished


def test_a_stop_file_of_an_earlier_job_does_not_stop_the_next(tmp_path: Path) -> None:
    task = make_task(tmp_path, num_iterations=2)
    Path(task.run_dir).mkdir()
    Path(stop_file(task.run_dir)).touch()
    args = cli.resolve({"tier": "cpu", "run": "run", "base_dir": str(tmp_path), "wandb": "off", "launcher": "local"})
    assert launch.run_training(task, args)["finished"]


def test_the_third_signal_no_longer_waits(tmp_path: Path, handlers: None, capsys: pytest.CaptureFixture[str]) -> None:
    with stopping.handled() as stop:
        with pytest.raises(KeyboardInterrupt), stop.saving(str(tmp_path)):  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked == 2
            signal.raise_signal(signal.SIGINT)
        assert stop.exit_status == 130
        assert "without a checkpoint of the last steps" in stop.last_words
    assert (tmp_path / "STOP").exists()
    said = capsys.readouterr().out
    assert said.startswith("SIGINT: writing a checkpoint, then stopping\nSIGTERM: already stopping; one more signal")


def test_a_stop_in_the_last_step_keeps_the_stage_and_starts_no_other(
    tmp_path: Path, handlers: None, capsys: pytest.CaptureFixture[str]
) -> None:
    args = cli.resolve({"tier": "cpu", "run": "run", "base_dir": str(tmp_path), "wandb": "off"})
    begun = []

    def last_step(_: Any) -> dict[str, Any]:
        begun.append("first")
        with stopping.handled() as stop, stop.saving(str(tmp_path)):
            signal.raise_signal(signal.SIGTERM)
        return {"base_train/steps": 6}

    def work() -> None:
        stage.run_stage(stage.Job(BASE, last_step), args)
        stage.run_stage(stage.Job(BASE_EVAL, lambda _: begun.append("second") or {}), args)

    with pytest.raises(SystemExit) as caught:
        cli.finish(work)
    assert caught.value.code == 143
    assert begun == ["first"]
    assert (tmp_path / "runs" / "run" / "stages" / "base_train.json").exists()
    assert KEPT in capsys.readouterr().err


def test_handlers_survive_libraries_that_replace_them(tmp_path: Path, handlers: None) -> None:
    """Ray's handler of SIGTERM raises SystemExit inside `ray.init`; later ones are replaced while training runs."""

    def start_of_ray() -> None:
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))

    def start_that_is_stopped() -> None:
        start_of_ray()
        signal.raise_signal(signal.SIGTERM)

    with stopping.handled() as stop:
        stopping.start_kept(start_of_ray)
        assert signal.getsignal(signal.SIGTERM) is stop
        with pytest.raises(stopping.Ended):
            stopping.start_kept(start_that_is_stopped)
        assert stop.exit_status == 143

        def work() -> int:
            while signal.getsignal(signal.SIGTERM) is not stop:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            while not stop.asked:
                time.sleep(0.01)
            return 7

        with stop.saving(str(tmp_path)):
            start_of_ray()
            assert stop.beside(work) == 7
    assert (tmp_path / "STOP").exists()


def test_signals_that_are_ignored_stay_ignored(handlers: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with stopping.handled():
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(stopping.Ended):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_stop_inside_a_library_that_python_cannot_interrupt_ends_at_once() -> None:
    code = (
        "import os, signal; from jobs.runtime import cli, stopping\n"
        "def work():\n"
        "    with stopping.unhandled():\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "cli.finish(work)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stderr == ""


def test_handlers_are_back_after_a_library_that_python_cannot_interrupt(handlers: None) -> None:
    with stopping.handled() as stop:
        with stopping.unhandled():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is stop
    before = signal.getsignal(signal.SIGTERM)
    with stopping.unhandled():  # outside of a job nothing is changed
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_job_that_ray_will_not_wait_for_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(stopping.RAY_STOP_WAIT, raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    stopping.ask_ray_to_wait()
    assert capsys.readouterr().out == ""  # not a submitted job
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # no name of a job, so its supervisor is not found
    stopping.ask_ray_to_wait()
    said = capsys.readouterr().out
    assert "kills this job after 3 s" in said
    quoted = said[said.index("{") : said.rindex("}") + 1]
    assert json.loads(quoted) == {"env_vars": {stopping.RAY_STOP_WAIT: "120"}}
    monkeypatch.setenv(stopping.RAY_STOP_WAIT, "120")
    stopping.warn_of_short_stop()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["mine", "run-1.5_b"])
def test_plain_names_go_to_ray_as_they_are(name: str) -> None:
    assert launch.ray_name(name) == name


def test_other_names_become_plain_ones_and_stay_apart() -> None:
    names = ["é", "è", "a b", "a/b", "日本語", "x" * 300, "x" * 301]
    made = [launch.ray_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(name.isascii() and len(name) < 80 and not set(name) & set(" /") for name in made)


def test_a_log_shows_the_runs_own_lines() -> None:
    out, err = io.StringIO(), io.StringIO()
    own, rest = OwnLines(out, False), OwnLines(err, True)
    print("plain", file=own)
    for line in ("(RayTrainWorker pid=7) step 1", "\x1b[36m(RayTrainWorker pid=7, ip=192.0.2.1)\x1b[0m step 2"):
        print(line, file=own)
    print("(pid=9) from a task", file=own)
    print("(TrainController pid=3) Requesting resources", file=rest)
    print("(RayTrainWorker pid=7) Progress bars disabled. To enable, …", file=rest)
    print("(RayTrainWorker pid=7) Reporting training result 1: …", file=rest)
    rest.write("2026-11-27 07:39:02,305\tWARNING arrow.py:346 -- Failed to convert column 'job' into …\n")
    print("(RayTrainWorker pid=7) RuntimeError: something is wrong", file=rest)
    print("\x1b[33m(raylet)\x1b[0m a worker was killed: out of memory", file=rest)
    print("\x1b[36m(autoscaler +5s)\x1b[0m Error: no node fits", file=rest)
    own.write("10 %\r")
    assert out.getvalue() == "plain\nstep 1\nstep 2\nfrom a task\n10 %\r"
    assert err.getvalue() == (
        "RuntimeError: something is wrong\n(raylet) a worker was killed: out of memory\n"
        "(autoscaler +5s) Error: no node fits\n"
    )
