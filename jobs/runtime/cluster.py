"""Joining or starting Ray, and what each training process may use of it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.runtime.address import joining
from jobs.runtime.patience import PATIENT, wait_for_own_node
from jobs.runtime.stopping import ask_ray_to_wait, start_kept
from megacontext.config import RunConfig
from megacontext.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# Settings of a one-machine cluster: training needs its cores. No process is started before there is a task for it, and
# the daemons tell each other of resources once a second (each Ray process costs 1 % of a core by being there).
QUIET = {
    "RAY_prestart_worker_first_driver": "0",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_raylet_report_loads_period_milliseconds": "1000",
    "RAY_metrics_report_interval_ms": "60000",
}
# Settings of the driver, which Ray reads when it is first imported.
DRIVER_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # An actor that asks for coming node losses; a lost node is met by a restart from the newest checkpoint anyway.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would show every printed line twice
    "RAY_COLOR_PREFIX": "0",
    "RAY_DATA_LOG_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class WorkerResources:
    """How many training processes, and what each reserves."""

    count: int
    use_gpu: bool
    resources: dict[str, float]
    threads: int

    @property
    def env_vars(self) -> dict[str, str]:
        """Environment of a training process: its threads, and a compile cache that outlives it."""
        cache = os.path.join(os.path.expanduser("~"), ".cache", "megacontext", "inductor")
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "GOMP_SPINCOUNT": os.environ["GOMP_SPINCOUNT"],
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "RAY_DATA_LOG_LEVEL": os.environ.get("RAY_DATA_LOG_LEVEL", "WARNING"),
        }


def start_ray() -> None:
    """Join the cluster this job was submitted to (or `RAY_ADDRESS`), else start a one-machine cluster for this process.

    The handlers of stop signals that the process has installed stay in force. Every process of the job knows the
    cluster's address: Ray's helpers look for it, and on a machine with several clusters would ask another one.
    """
    for name, value in (PATIENT | DRIVER_SETTINGS).items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    context = start_kept(_join if os.environ.get("RAY_ADDRESS") else _start_one_machine)
    ask_ray_to_wait()
    print(f"Ray's own logs: {os.path.join(context.address_info['session_dir'], 'logs')}", flush=True)


def _join() -> Any:
    import ray

    address = os.environ["RAY_ADDRESS"]
    with joining(address):
        return ray.init(logging_level="WARNING", runtime_env={"env_vars": {"RAY_ADDRESS": address}})


def _start_one_machine() -> Any:
    """`ray.init` of a new cluster. Its processes inherit PYTHONPATH: in a runtime environment Ray would replace a `$`."""
    import ray

    of_python = python_for_ray()
    port = free_ports(1)[0]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    os.environ.update(QUIET | os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    wait_for_own_node()
    try:
        return ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=512 * 2**20,
            logging_level="WARNING",
            runtime_env={**of_python, "env_vars": {"RAY_ADDRESS": address}},
        )
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"]


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that nothing listens on at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def python_for_ray() -> dict[str, str]:
    """Settings of a runtime environment with which Ray's processes start where the path of Python has spaces or `&`.

    Ray writes that path into a shell line as it is, so it gets a quoted one. Raises UserError for the paths that no
    quoting helps: Ray takes its command lines apart itself, and their quotes and backslashes get lost.
    """
    packages = importlib.util.find_spec("ray")
    for path in (sys.executable, (packages and packages.origin) or ""):
        try:
            arrives = shlex.split(subprocess.list2cmdline([path])) == [path]
        except ValueError:
            arrives = False
        if not arrives or "\\" in path:
            raise UserError(
                f"Ray cannot start from {path!r}: a quote or a backslash is in this path. "
                "Move the checkout to another folder and run `make install` there."
            )
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def worker_resources(run: RunConfig) -> WorkerResources:
    """Resources of the training processes from the flags and the cluster.

    One logical CPU of the cluster always stays free for Ray Data's read tasks; without it streaming would wait for
    ever. Raises UserError when more GPUs are asked for than the cluster has: Ray would wait for them silently.
    """
    import ray

    total = ray.cluster_resources()
    gpus, cpus = int(total.get("GPU", 0)), total.get("CPU", 1.0)
    if run.device == "cuda" and gpus == 0:
        raise UserError("--device cuda was asked for, but the cluster has no GPU; use --device cpu or auto.")
    use_gpu = gpus > 0 and run.device != "cpu"
    count = run.num_workers or (gpus if use_gpu else 1)
    if use_gpu and count > gpus:
        raise UserError(
            f"--num_workers {count} needs {count} GPUs, the cluster has {gpus}; use --num_workers {gpus} or fewer."
        )
    if count < 1:
        raise UserError(f"--num_workers {run.num_workers} is below 1.")
    reserved = round(max(0.1, min((cpus - 1) / count, float(run.cpus_per_worker or cpus))), 2)
    resources = {"CPU": reserved, **({"GPU": 1.0} if use_gpu else {})}
    return WorkerResources(count, use_gpu, resources, run.cpus_per_worker or max(1, int(cpus // count)))
