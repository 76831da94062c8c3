"""The client behind `make speedrun`: submit, follow, stop with a checkpoint, leave nothing behind and leak nothing."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import plain_shell
import pytest
from patience import PATIENCE_S
from test_stopping import LONG, MOMENTS, check_saved, wait_for_steps
from tiny import make_task

from jobs.runtime import environment, one_machine, submit
from jobs.runtime.cluster import python_for_ray
from jobs.runtime.follow import LogPrinter, progress_bar
from jobs.runtime.stopping import RAY_STOP_WAIT
from megacontext.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SECRET = "wandb-s3cr3t-" + "0123456789abcdef" * 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def client(
    *arguments: str, env: dict[str, str] | None = None, python: str = sys.executable, folder: Path = ROOT
) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "WANDB_"))}
    return subprocess.Popen(
        [python, "-u", str(ROOT / "jobs" / "runtime" / "submit.py"), *arguments],
        cwd=folder, env={**clean, **(env or {})}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[one_machine.OneMachineCluster]:
    """A cluster as the client starts it, with a secret in its environment."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    found = one_machine.OneMachineCluster({**base, "WANDB_API_KEY": SECRET}, num_cpus=2)
    try:
        found.start()
        yield found
    finally:
        found.stop()
        assert not found.folder.exists()


@pytest.mark.ray
def test_a_job_runs_with_our_python_and_settings_and_no_secret_is_written(
    cluster: one_machine.OneMachineCluster, tmp_path: Path
) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import os, sys\nimport jobs, megacontext\n"
        "assert 'runtime_resources' in megacontext.__file__, megacontext.__file__\n"
        f"assert os.environ['WANDB_API_KEY'] == {SECRET[::-1]!r}[::-1]\n"
        "print('python', sys.executable)\n"
        "print('arguments', sys.argv[1:])\n"
        "print('env', *(os.environ[n] for n in ('RAY_JOB_STOP_WAIT_TIME_S', 'MEGACONTEXT_REVISION', 'WANDB_PROJECT')))\n"
        f"print('run folder: {tmp_path}/run')\n"
        "sys.exit(7)\n"
    )
    auth = {key: value for key, value in cluster.client_environment.items() if key.startswith("RAY_AUTH")}
    settings = {"WANDB_API_KEY": SECRET, "WANDB_PROJECT": "p-1", "MEGACONTEXT_REVISION": "rev-1", **auth}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    process = client("--address", cluster.address, "--", "python", str(script), "--a b", "$HOME", env=settings)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 7, output
    assert f"python {os.path.dirname(sys.executable)}" in output
    assert "arguments ['--a b', '$HOME']" in output
    assert "env 120 rev-1 p-1" in output
    assert "WANDB_API_KEY: set here, not sent" in output
    assert f"metrics:     {tmp_path}/run/metrics.jsonl" in output
    assert "failed; its log is above" in output
    assert SECRET not in output
    files = [path for path in cluster.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.ray
def test_a_signal_stops_the_job_after_its_checkpoint_and_ends_only_our_cluster(
    cluster: one_machine.OneMachineCluster, tmp_path: Path
) -> None:
    """And the whole of it from a folder whose name a shell would read, with a relative path that means this folder."""
    folder = tmp_path / "it's $HOME & é"
    folder.mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    script = folder / "train.py"
    script.write_text(  # a driver whose checkpoint takes longer than the 3 s after which Ray kills by default
        "import pathlib, signal, sys, time\n"
        "from jobs.runtime.user_paths import user_path\n"
        "path = user_path(sys.argv[1], '--storage')\n"
        "def save(*_):\n"
        "    print('saving', flush=True); time.sleep(5); pathlib.Path(path).write_text('saved'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready', flush=True)\n"
        "time.sleep(300)\n"
    )
    python = str(folder / ".venv" / Path(sys.executable).relative_to(sys.prefix))
    process = client("--", "python", str(script), "checkpoint", python=python, folder=folder)
    seen = []
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if line.startswith("ready"):
            process.send_signal(signal.SIGINT)
            break
    below = one_machine.descendants(process.pid)
    with process.stdout:
        seen += list(process.stdout)
    output = "".join(seen)
    assert process.wait(timeout=PATIENCE_S) == 130, output
    assert (folder / "checkpoint").read_text() == "saved", output
    assert "run the same command again to continue" in output
    assert len(below) > 5
    assert not one_machine.alive(below)
    of_ray = next(line.split()[-1] for line in output.splitlines() if "one-machine Ray cluster in" in line)
    assert not Path(of_ray).exists()
    assert Path(python).exists()
    assert cluster._answers()  # the other cluster on this machine was left alone


@pytest.mark.ray
def test_ray_job_stop_of_a_plain_submission_ends_with_a_checkpoint(
    cluster: one_machine.OneMachineCluster, tmp_path: Path
) -> None:
    """Submitted with Ray's own client and an empty wait time: the job gives itself one, else Ray would fail to read it."""
    ray = [sys.executable, *one_machine.RAY, "job"]
    env = {**cluster.client_environment, "RAY_ADDRESS": cluster.address}
    unset = json.dumps({"env_vars": {RAY_STOP_WAIT: ""}})
    dice = random.Random(0)
    for moment in range(MOMENTS):
        run_dir, job = tmp_path / f"run{moment}", f"stop-{moment}"
        make_task(tmp_path, run_dir.name)
        line = ["python", str(ROOT / "tests" / "stop_tiny.py"), str(tmp_path), run_dir.name, "ray", *LONG]
        submitted = [*ray, "submit", "--working-dir", str(ROOT), "--no-wait", "--submission-id", job,
                     "--runtime-env-json", unset, "--", *line]  # fmt: skip
        subprocess.run(submitted, env=env, check=True, capture_output=True)
        begun = wait_for_steps(run_dir, dice.randrange(1, 60), lambda: None)
        stopped = subprocess.run([*ray, "stop", job], env=env, check=True, capture_output=True, text=True, timeout=240)
        assert f"Job '{job}' was stopped" in stopped.stdout + stopped.stderr
        logs = subprocess.run([*ray, "logs", job], env=env, capture_output=True, text=True, check=True)
        check_saved(run_dir, begun, logs.stdout + logs.stderr)
        assert "kills this job after" not in logs.stdout + logs.stderr
        print(f"ray job stop after {begun} steps: a checkpoint")


@pytest.mark.ray
def test_rays_own_client_submits_as_in_the_readme_and_relative_paths_are_refused(
    cluster: one_machine.OneMachineCluster, tmp_path: Path
) -> None:
    settings = {key: value for key, value in cluster.client_environment.items() if key.startswith("RAY_AUTH")}
    done = plain_shell.run(
        ".venv/bin/ray job submit --working-dir . -- python jobs/speedrun.py --storage out",
        plain_shell.checkout(tmp_path, links=False), RAY_ADDRESS=cluster.address, NANOCHAT_BASE_DIR=str(tmp_path), **settings,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "--storage is 'out', a relative path, and this job runs in a temporary folder of Ray" in done.stdout
    assert "Give an absolute path or a URI." in done.stdout


@pytest.mark.parametrize("name", ["a b", "a&b", "é", "(a)", "$HOME", "it's mine"])
def test_ray_gets_a_path_of_python_that_a_shell_can_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"/folder/{name}/.venv/bin/python"
    monkeypatch.setattr(sys, "executable", path)
    (quoted,) = python_for_ray().values()
    shown = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, text=True, check=True)
    assert shown.stdout == path


@pytest.mark.parametrize("name", ["it's", "a\\b", "a\\ b"])
def test_a_path_that_ray_would_take_apart_is_refused_before_it_starts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", f"/folder/{name}/.venv/bin/python")
    with pytest.raises(UserError, match=r"Ray cannot start from .* Move the checkout to another folder"):
        python_for_ray()


@pytest.mark.ray
def test_the_cluster_asks_for_its_token(cluster: one_machine.OneMachineCluster) -> None:
    import urllib.error
    import urllib.request

    assert stat.S_IMODE((cluster.folder / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(cluster.folder.stat().st_mode) == 0o700
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=PATIENCE_S)


@pytest.mark.ray
def test_a_cluster_ends_when_its_client_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from jobs.runtime.one_machine import OneMachineCluster\n"
        "c = OneMachineCluster(os.environ, 1); c.start(); print(c.folder, flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert process.stdout is not None
    folder = process.stdout.readline().strip()
    below = one_machine.descendants(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + PATIENCE_S
    while one_machine.alive(below) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(below) > 3
    assert not one_machine.alive(below)
    shutil.rmtree(folder)


def test_an_address_that_does_not_answer_is_named_in_a_line() -> None:
    port = one_machine.free_ports(1)[0]
    for arguments, env in (
        (["--address", f"http://127.0.0.1:{port}"], {}),
        ([], {"RAY_ADDRESS": f"http://127.0.0.1:{port}"}),
    ):
        output, _ = (process := client(*arguments, "--", "python", "x.py", env=env)).communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
        assert output.startswith(f"UserError: no Ray dashboard answers at http://127.0.0.1:{port} (Connection refused)")
        assert len(output.splitlines()) == 1


def test_an_unknown_flag_and_a_missing_command_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--adress", "x", "--", "python", "x.py"], [], ["--"]):
        with pytest.raises(SystemExit) as caught:
            submit.parse(argv)
        assert caught.value.code == 2
    assert "did you mean --address?" in capsys.readouterr().err
    assert submit.parse(["--", "python", "x.py", "--run", "a", "--", "b"]).command == [
        "python",
        "x.py",
        "--run",
        "a",
        "--",
        "b",
    ]


def test_lines_are_printed_once_and_the_run_folder_is_found() -> None:
    out = io.StringIO()
    printer = LogPrinter(out)
    for piece in ("run fol", "der: s3://b/r", "\nstep 00001/00010 (10.0%) loss 2", ".5\nlast"):
        printer.feed(piece)
    printer.close()
    assert out.getvalue() == "run folder: s3://b/r\nstep 00001/00010 (10.0%) loss 2.5\nlast\n"
    assert printer.run_dir == "s3://b/r"


def test_steps_share_a_line_on_a_terminal() -> None:
    out = Terminal()
    printer = LogPrinter(out)
    printer.feed("step 00005/00010 (50.0%) loss 2\nstep 00006/00010 (60.0%) loss 1\nother\n")
    printer.close()
    assert out.getvalue().count("\n") == 2
    assert out.getvalue().endswith("loss 1\nother\n")
    assert progress_bar(5, 10) == "[##########----------]"
    assert progress_bar(11, 10) == "[" + "#" * 20 + "]"


def test_object_store_is_bounded() -> None:
    gib = 2**30
    assert one_machine.object_store_bytes(0) == gib // 4
    assert one_machine.object_store_bytes(20 * gib) == gib
    assert one_machine.object_store_bytes(2048 * gib) == 8 * gib


@pytest.mark.parametrize(
    ("command", "module", "flags"),
    [
        (["python", "jobs/speedrun.py", "--dept", "6"], "jobs.speedrun", ["--dept", "6"]),
        (["/usr/bin/python3.12", "./jobs/run10.py", "--gpu", "cpu"], "jobs.run10", ["--gpu", "cpu"]),
        (["python3", "-m", "jobs.base_train", "--mc"], "jobs.base_train", ["--mc"]),
        (["python", "jobs/mine.py", "--x"], "", ["--x"]),
        (["python", "-c", "print(1)"], "", ["print(1)"]),
        (["bash", "jobs/speedrun.py"], "", []),
        (["python"], "", []),
    ],
)
def test_which_commands_are_jobs_of_ours(command: list[str], module: str, flags: list[str]) -> None:
    assert submit.job_module(command) == (module, flags)


def test_a_wrong_flag_is_told_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "submit", lambda args, signals: 0)
    monkeypatch.setattr(submit, "Signals", lambda: None)
    for flags, status in ((["--dept", "6"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as ended:
            submit.main(["--", "python", "jobs/speedrun.py", *flags])
        assert ended.value.code == status
    out, err = capsys.readouterr()
    assert "jobs/speedrun.py" not in sys.argv
    assert err.startswith("speedrun.py: unrecognized arguments: --dept 6 (did you mean --depth?)")
    assert "--mc" in out
    for command in (["python", "jobs/speedrun.py", "--depth", "6"], ["python", "elsewhere.py", "--dept", "6"]):
        assert submit.main(["--", *command]) == 0


@pytest.mark.parametrize("saved", [False, True])
def test_a_failed_job_names_a_checkpoint_only_where_there_is_one(
    saved: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if saved:
        (tmp_path / "checkpoints" / "megacontext_base_000010").mkdir(parents=True)
    printer = LogPrinter()
    printer.run_dir = str(tmp_path)
    submit.places(printer, "FAILED", "python jobs/speedrun.py", False)
    assert ("continues from the newest checkpoint" in capsys.readouterr().out) is saved


def test_excludes_keep_the_library_in() -> None:
    import pathspec

    rules = pathspec.PathSpec.from_lines("gitignore", submit.EXCLUDES)
    for kept in ("megacontext/data/tokenizer.py", "jobs/speedrun.py", "tests/test_submit.py", "cluster/setup.sh"):
        assert not rules.match_file(kept), kept
    for out in (
        ".git/config",
        ".venv/bin/python",
        "data/x",
        ".mc_env",
        ".mc_env.before",
        "jobs/__pycache__/a.pyc",
        ".mypy_cache/x",
        "runs/a",
    ):
        assert rules.match_file(out), out


def test_secrets_are_never_sent() -> None:
    base = {
        "WANDB_API_KEY": SECRET,
        "HF_TOKEN": SECRET,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "WANDB_PROJECT": "p",
        "HOME": "/x",
    }
    assert environment.forwarded(base) == {"WANDB_PROJECT": "p"}
    assert environment.job_env_vars(base, "rev") == {"RAY_JOB_STOP_WAIT_TIME_S": "120", "MEGACONTEXT_REVISION": "rev"}
    assert environment.secrets_kept_back(base) == ["WANDB_API_KEY", "HF_TOKEN"]
