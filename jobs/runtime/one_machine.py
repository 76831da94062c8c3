"""A private one-machine Ray cluster: own ports, own token, own folder, and it ends with the process that started it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from jobs.runtime.cluster import QUIET, free_ports
from jobs.runtime.patience import PATIENT, START_TIMEOUT_S
from jobs.runtime.stopping import RAY_STOP_WAIT
from megacontext.errors import UserError
from megacontext.telemetry.provenance import ram_bytes

# Arguments of Python for Ray's command line. The script `ray` names its Python in a way that not every path survives.
RAY = ("-m", "ray.scripts.scripts")
STOP_TIMEOUT_S = 40.0
_ATTEMPTS = 2  # another process may take a port between our look and Ray's


class OneMachineCluster:
    """`ray start --head --block` as a child in its own process group.

    environment: what the cluster's processes inherit, secrets included. After `start`, `address` is the dashboard's
    URL and `client_environment` what a client needs to reach it. Token authentication is on: an open Jobs API would
    let anyone who reaches the port run code.
    """

    def __init__(self, environment: Mapping[str, str], num_cpus: int | None = None) -> None:
        self._base = dict(environment)
        self._num_cpus = num_cpus
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""
        # Below /tmp because paths of Unix sockets have at most 107 bytes; only we can enter it (Ray opens its own to all).
        self.folder = Path(tempfile.mkdtemp(prefix="mc-ray-", dir="/tmp" if os.path.isdir("/tmp") else None))
        self._token = secrets.token_hex(32)
        self._python = _plain_python(self.folder)
        token_file = self.folder / "token"
        with open(os.open(token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(self._token)
        ours = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            RAY_STOP_WAIT: "120",  # for jobs that somebody submits here without our client
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # there is no other node that work could drain to
        }
        dropped = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")
        self.client_environment = QUIET | PATIENT | {k: v for k, v in self._base.items() if k not in dropped} | ours

    def start(self) -> None:
        """Start the cluster and wait until its Jobs API answers. Raises UserError with the end of its log otherwise."""
        for attempt in range(1, _ATTEMPTS + 1):
            if self._try_start():
                return
            log = self.log_tail()
            self._kill()
            if attempt == _ATTEMPTS:
                raise UserError(f"Ray did not start; the end of {self.folder}/head.log:\n{log}")

    def _try_start(self) -> bool:
        ports = free_ports(4)
        self.address = f"http://127.0.0.1:{ports[1]}"
        command = [
            self._python, *RAY, "start", "--head", "--block", "--disable-usage-stats",
            f"--port={ports[0]}", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}",
            f"--dashboard-agent-listen-port={ports[2]}", f"--ray-client-server-port={ports[3]}",
            f"--temp-dir={self.folder}/r", f"--object-store-memory={object_store_bytes(ram_bytes())}",
        ]  # fmt: skip
        if self._num_cpus:
            command.append(f"--num-cpus={self._num_cpus}")
        # The job's `python` must be the one that has the package.
        path = os.pathsep.join([os.path.dirname(self._python), self._base.get("PATH", os.defpath)])
        with open(self.folder / "head.log", "ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**self.client_environment, "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal is for the client alone
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._answers():
                return True
            time.sleep(0.2)
        return False

    def _answers(self) -> bool:
        request = urllib.request.Request(
            f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {self._token}"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=10) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def log_tail(self, lines: int = 25) -> str:
        """The end of what `ray start` printed."""
        return "\n".join((self.folder / "head.log").read_text(errors="replace").splitlines()[-lines:])

    def stop(self, keep_logs: bool = False) -> None:
        """End every process of this cluster and of no other; its folder goes too, unless logs are wanted."""
        self._kill()
        if not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _kill(self) -> None:
        if self._process is None:
            return
        ours = descendants(self._process.pid)
        self._process.terminate()  # `ray start --block` ends its children itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S / 2)
        deadline = time.monotonic() + STOP_TIMEOUT_S / 2
        while alive(ours) and self._process.poll() is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in [*alive(ours), *([] if self._process.poll() is not None else [self._process.pid])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._process = None


def _plain_python(folder: Path) -> str:
    """A path of the running Python that Ray can write into a shell line as it is: its own, or one through a link in `folder`.

    Raises UserError when Ray is not installed, or lies below another folder whose path needs quoting.
    """
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:
        raise UserError("Ray is not installed in this environment; run `make install`, or pip install '.[ray]'.")
    if all(shlex.quote(path) == path for path in (sys.executable, found.origin)):
        return sys.executable
    prefix = sys.prefix + os.sep
    if not (sys.executable.startswith(prefix) and found.origin.startswith(prefix)):
        raise UserError(
            f"Ray cannot start {sys.executable!r} with the packages of {os.path.dirname(found.origin)!r}: a path has a space or "
            "a sign that a shell reads. Use the .venv that `make install` makes."
        )
    link = folder / "python"
    link.symlink_to(sys.prefix)
    return os.path.join(link, sys.executable.removeprefix(prefix))


def object_store_bytes(ram: int) -> int:
    """A twentieth of memory, between 256 MiB and 8 GiB: the stream needs a few blocks, the model needs the rest."""
    return min(max(ram // 20, 256 * 2**20), 8 * 2**30)


def _stat(pid: int) -> tuple[int, int, str] | None:
    """(parent, start time, state) of a process from /proc, or None when it is gone or there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return int(fields[1]), int(fields[19]), fields[0]


def descendants(pid: int) -> dict[int, int]:
    """Every process below `pid` and when it started; empty on systems without /proc."""
    if not os.path.isdir("/proc/self"):
        return {}
    known = {int(name): stat for name in os.listdir("/proc") if name.isdigit() and (stat := _stat(int(name)))}
    found: dict[int, int] = {}
    border = [pid]
    while border:
        parent = border.pop()
        for child, (its_parent, started, _) in known.items():
            if its_parent == parent and child not in found:
                found[child] = started
                border.append(child)
    return found


def alive(processes: Mapping[int, int]) -> list[int]:
    """Those of `{pid: start time}` that still run; a pid that was used again is not one of them."""
    return [pid for pid, started in processes.items() if (stat := _stat(pid)) and stat[1] == started and stat[2] != "Z"]


def _die_with_parent() -> None:
    """In the child: end when the client ends, even by SIGKILL; else a forgotten cluster would train on beside a new one."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
