"""The client behind `make speedrun`: submit, follow, stop with a checkpoint, leave nothing behind and leak nothing."""

from __future__ import annotations

import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import environment, one_machine, submit
from jobs.follow import LogPrinter, progress_bar
from megacontext.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SECRET = "wandb-s3cr3t-" + "0123456789abcdef" * 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def client(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "WANDB_"))}
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "jobs.submit", *arguments],
        cwd=ROOT, env={**clean, **(env or {})}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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
    output, _ = process.communicate(timeout=150)
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
    script = tmp_path / "train.py"
    script.write_text(  # a driver whose checkpoint takes longer than the 3 s after which Ray kills by default
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    print('saving', flush=True); time.sleep(5); pathlib.Path(sys.argv[1]).write_text('saved'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready', flush=True)\n"
        "time.sleep(300)\n"
    )
    process = client("--", "python", str(script), str(tmp_path / "checkpoint"))
    seen = []
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if line.startswith("ready"):
            process.send_signal(signal.SIGINT)
            break
    below = one_machine.descendants(process.pid)
    seen += list(process.stdout)
    output = "".join(seen)
    assert process.wait(timeout=120) == 130, output
    assert (tmp_path / "checkpoint").read_text() == "saved", output
    assert "run the same command again to continue" in output
    assert len(below) > 5
    assert not one_machine.alive(below)
    folder = next(line.split()[-1] for line in output.splitlines() if "one-machine Ray cluster in" in line)
    assert not Path(folder).exists()
    assert cluster._answers()  # the other cluster on this machine was left alone


@pytest.mark.ray
def test_the_cluster_asks_for_its_token(cluster: one_machine.OneMachineCluster) -> None:
    import urllib.error
    import urllib.request

    assert stat.S_IMODE((cluster.folder / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(cluster.folder.stat().st_mode) == 0o700
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=20)


@pytest.mark.ray
def test_a_cluster_ends_when_its_client_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from jobs.one_machine import OneMachineCluster\n"
        "c = OneMachineCluster(os.environ, 1); c.start(); print(c.folder, flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert process.stdout is not None
    folder = process.stdout.readline().strip()
    below = one_machine.descendants(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 240
    while one_machine.alive(below) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(below) > 3
    assert not one_machine.alive(below)
    shutil.rmtree(folder)


def test_an_address_that_does_not_answer_is_named() -> None:
    port = one_machine.free_ports(1)[0]
    process = client("--address", f"http://127.0.0.1:{port}", "--", "python", "x.py", env={"RAY_AUTH_MODE": "disabled"})
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert f"`ray job submit` to http://127.0.0.1:{port} failed" in output
    assert "Check the address" in output


def test_an_unknown_flag_and_a_missing_command_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--adress", "x", "--", "python", "x.py"], [], ["--"]):
        with pytest.raises(SystemExit) as caught:
            submit.parse(argv)
        assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err
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
        "jobs/__pycache__/a.pyc",
        ".mypy_cache/x",
        "runs/a",
    ):
        assert rules.match_file(out), out


def test_env_file_is_read_and_does_not_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".mc_env"
    file.write_text("# settings\nWANDB_API_KEY=abc\nexport HF_TOKEN='d e'  # note\nMC_OTEL_ENDPOINT=\n\nWANDB_RUN=r\n")
    monkeypatch.setenv("MEGACONTEXT_ENV_FILE", str(file))
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        environment.load({})
    file.chmod(0o600)
    settings = {"WANDB_RUN": "mine"}
    assert environment.load(settings) == file
    assert settings == {"WANDB_RUN": "mine", "WANDB_API_KEY": "abc", "HF_TOKEN": "d e"}


@pytest.mark.parametrize("line", ["NAME", "A=b c", "A='b", "1A=b"])
def test_a_bad_line_of_an_env_file_is_named(line: str) -> None:
    with pytest.raises(UserError, match="line 2 of"):
        environment.parse_env_file(f"A=b\n{line}\n")


def test_secrets_are_never_sent() -> None:
    base = {
        "WANDB_API_KEY": SECRET,
        "HF_TOKEN": SECRET,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "WANDB_PROJECT": "p",
        "HOME": "/x",
    }
    sent = environment.job_env_vars(base, "rev")
    assert sent == {"WANDB_PROJECT": "p", "RAY_JOB_STOP_WAIT_TIME_S": "120", "MEGACONTEXT_REVISION": "rev"}
    assert environment.secrets_kept_back(base) == ["WANDB_API_KEY", "HF_TOKEN"]
