"""Submit a job to Ray, follow its log to the end, stop it cleanly on Ctrl-C, and say where everything lies.

    python -m jobs.runtime.submit [--address URL] -- python jobs/speedrun.py [flags]

With `--address` or RAY_ADDRESS the job goes to that cluster; otherwise a private one-machine cluster is started for
it and ended after it. The exit status is 0 when the job succeeded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.runtime import environment
from jobs.runtime.address import VARIABLES, address_of, check_dashboard, client_settings
from jobs.runtime.follow import Follower, LogPrinter
from jobs.runtime.one_machine import RAY, OneMachineCluster
from jobs.runtime.own_lines import lasting_lines
from jobs.runtime.parser import FlagsAreRightError, Parser
from jobs.runtime.user_paths import CALLER_DIR, user_path
from megacontext import storage
from megacontext.config import default_base_dir
from megacontext.errors import MegaContextError, UserError
from megacontext.telemetry import provenance

ROOT = Path(__file__).resolve().parents[2]
# Patterns as in .gitignore; the leading slash keeps megacontext/data in.
EXCLUDES = ("/.git/", "/.venv/", "/venv/", "/data/", "/runs/", "/wandb/", "/build/", "/dist/", ".mc_env*", "*.egg-info", "__pycache__", ".*_cache")  # fmt: skip
_SUBMIT_TIMEOUT_S = 300
_SHOWN_LINES = 5  # of what Ray's client printed when it failed; what went wrong comes last
_STOPPED_BY = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class Signals:
    """Counts stop signals instead of dying from them: the first asks for a clean stop, the third gives up waiting."""

    def __init__(self) -> None:
        self.received: list[int] = []
        for number in _STOPPED_BY:
            signal.signal(number, lambda signum, frame: self.received.append(signum))

    @property
    def count(self) -> int:
        return len(self.received)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the client; returns the exit status."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        used = environment.load()
        if used:
            say(f"settings from {used}")
        check_flags(args.command)
        signals = Signals()
        with lasting_lines():
            return submit(args, signals)
    except MegaContextError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Flags before `--`, the job's command after it."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--address", default="", help="URL of a Ray dashboard [default RAY_ADDRESS, else a cluster is started here]"
    )
    parser.add_argument("--submission-id", default="", help="name of the job in Ray [default: script name and time]")
    parser.add_argument(
        "--num-cpus", type=int, default=0, help="logical CPUs of a cluster that is started here [default: its cores]"
    )
    parser.add_argument(
        "command", nargs="+", metavar="-- command", help="for example: python jobs/speedrun.py --run mine"
    )
    return parser.parse_args(list(argv))


def check_flags(command: Sequence[str]) -> None:
    """End the program as the job itself would for a flag of a job of ours that is wrong, before anything is started."""
    name, flags = job_module(command)
    if not name or not flags:
        return
    try:
        job = importlib.import_module(name)
    except ImportError:  # the packages of the job may be on the cluster alone
        return
    before, Parser.only_check = sys.argv, True
    try:
        sys.argv = [f"{name.replace('.', '/')}.py", *flags]
        job.main()
    except FlagsAreRightError:
        pass
    finally:
        sys.argv, Parser.only_check = before, False


def job_module(command: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Module and flags of `python jobs/x.py …` or `python -m jobs.x …`; an empty name for what is no job of ours."""
    python, *words = command
    if words[:1] == ["-m"]:
        found, flags = re.fullmatch(r"jobs\.(\w+)", " ".join(words[1:2])), words[2:]
    else:
        found, flags = re.fullmatch(r"(?:\S*/)?jobs/(\w+)\.py", " ".join(words[:1])), words[1:]
    ours = found and Path(python).name.startswith("python") and (ROOT / "jobs" / f"{found[1]}.py").is_file()
    return (f"jobs.{found[1]}" if found and ours else ""), flags


def submit(args: argparse.Namespace, signals: Signals) -> int:
    """Find or start a cluster, run the job on it, clean up."""
    address = address_of(args.address, os.environ)
    if address:
        environment.fix_paths(os.environ, same_machine=False)
        settings = client_settings(os.environ)
        check_dashboard(address, settings)
        kept = environment.secrets_kept_back(os.environ)
        if kept:
            say(
                f"{', '.join(kept)}: set here, not sent, because Ray logs what it is sent. Set it on the cluster, or in ~/.mc_env there."
            )
        return run_job(args, address, settings, environment.forwarded(settings), signals)
    default_base_dir()  # a process without a home folder is told so before Ray is started
    environment.fix_paths(os.environ, same_machine=True)
    # The processes of this cluster inherit our variables; Ray would replace each $ in those that it is sent.
    cluster = OneMachineCluster({**os.environ, CALLER_DIR: user_path(".", "the current folder")}, args.num_cpus or None)
    status = 1
    try:
        say(f"starting a one-machine Ray cluster in {cluster.folder}")
        cluster.start()
        say(f"Ray is up; dashboard {cluster.address} (this machine only)")
        status = run_job(args, cluster.address, cluster.client_environment, {}, signals)
    finally:
        failed = status != 0 and not signals.count
        say("ending the Ray cluster" + (f"; its logs stay in {cluster.folder}" if failed else ""))
        cluster.stop(keep_logs=failed)
    return status


def run_job(
    args: argparse.Namespace, address: str, env: Mapping[str, str], sent: Mapping[str, str], signals: Signals
) -> int:
    """Submit, follow, stop when asked, and report.

    env: the client's environment, with what authentication needs. sent: variables that the job gets beside those of every
    job; Ray shows them to whoever may see the job.
    """
    job_id = args.submission_id or job_name(args.command)
    if signals.count:
        return _STOPPED_BY[signal.Signals(signals.received[0])]
    ray_submit(args.command, job_id, address, env, sent)
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(env)  # the Ray client reads its settings from here when it is first imported
    try:
        follower = Follower(address, job_id, LogPrinter())
        follower.start()
        info = watch(follower, signals)
        follower.finish()
    except (ConnectionError, RuntimeError, OSError) as error:  # the follower has waited and asked again
        raise UserError(
            f"the Ray cluster at {address} does not answer any more ({_first_line(error)}). "
            "Where it still runs the job goes on; otherwise the same command continues from the newest checkpoint."
        ) from None
    places(follower.printer, info.status, shlex.join(args.command), bool(signals.count))
    if info.status == "SUCCEEDED":
        return 0
    if signals.count:
        return _STOPPED_BY[signal.Signals(signals.received[0])]
    return int(info.driver_exit_code or 1)


def ray_submit(
    command: Sequence[str], job_id: str, address: str, env: Mapping[str, str], sent: Mapping[str, str]
) -> None:
    """`ray job submit`, with the runtime environment in a file that only we can read. Raises UserError if refused."""
    variables = {**sent, **environment.job_env_vars(env, provenance.source_revision())}
    runtime_env = {"working_dir": str(ROOT), "excludes": list(EXCLUDES), "env_vars": variables}
    with tempfile.TemporaryDirectory(prefix="mc-submit-") as folder:
        file = Path(folder, "runtime_env.yaml")
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as sink:
            json.dump(runtime_env, sink)  # JSON is YAML
        line = ["job", "submit", "--address", address, "--working-dir", str(ROOT), "--submission-id", job_id,
                "--runtime-env", str(file), "--no-wait", "--", *command]  # fmt: skip
        say("ray job submit --working-dir . -- " + shlex.join(command))
        try:
            done = subprocess.run(
                [sys.executable, *RAY, *line], env=dict(env), cwd=ROOT, capture_output=True, text=True,
                timeout=_SUBMIT_TIMEOUT_S, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UserError(f"`ray job submit` to {address} took more than {_SUBMIT_TIMEOUT_S} s. Check the network.") from None  # fmt: skip
    if done.returncode != 0:
        lines = provenance.redact((done.stdout + done.stderr).strip()).splitlines()
        output = "\n".join(lines[-_SHOWN_LINES:])
        raise UserError(
            f"`ray job submit` to {address} failed:\n{output}\nCheck the address, RAY_AUTH_MODE and the token."
        )
    say(f"submitted as {job_id}; Ctrl-C stops it with a checkpoint")


def watch(follower: Follower, signals: Signals) -> Any:
    """Wait for the job's end; the first signal asks Ray to stop it, which gives the driver time for a checkpoint."""
    asked = False
    while True:
        info = follower.info()
        if info.status in ("SUCCEEDED", "FAILED", "STOPPED"):
            return info
        if signals.count and not asked:
            asked = True
            say("stopping: waiting until the job has written its checkpoint (Ctrl-C twice more to give up)")
            follower.client.stop_job(follower.job_id)
        if signals.count >= 3:
            say("giving up; the newest checkpoint that is complete will be used")
            return info
        time.sleep(0.3)


def places(printer: LogPrinter, status: str, command: str, stopped_here: bool) -> None:
    """Say how it ended, where everything lies, and how to continue."""
    run_dir = printer.run_dir
    say(f"job {status.lower()}" + (f" ({command})" if status != "SUCCEEDED" else ""))
    if run_dir:
        known = {
            "report": "report/report.md",
            "numbers": "report/report.json",
            "metrics": "metrics.jsonl",
            "checkpoints": "checkpoints",
        }
        say(f"run folder: {run_dir}")
        for name, part in known.items():
            path = storage.join(run_dir, part)
            if storage.exists(path):
                say(f"  {name + ':':<13}{path}")
    if status == "STOPPED" or stopped_here:
        say("stopped; run the same command again to continue where it stopped")
    elif status == "FAILED":
        folder = storage.join(run_dir, "checkpoints") if run_dir else ""
        saved = folder and any(name.startswith("megacontext_") for name in storage.list_dir(folder))
        how = "continues from the newest checkpoint" if saved else "begins anew what was not complete"
        say(f"failed; its log is above. After a fix, the same command {how}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def job_name(command: Sequence[str]) -> str:
    """A submission id that Ray has not seen: script, time to the second, process."""
    script = next((Path(word).stem for word in command if word.endswith(".py")), "job")
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', script)}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def say(text: str) -> None:
    """A line of the client itself, told apart from the job's."""
    print(f"[submit] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
