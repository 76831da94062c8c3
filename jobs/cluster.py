"""Joining or starting Ray, and what each training process may use of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megacontext.config import RunConfig
from megacontext.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
# Settings of a one-machine cluster: training needs its cores. No process is started before there is a task for it, and
# the daemons tell each other of resources once a second (each Ray process costs 1 % of a core by being there).
QUIET = {
    "RAY_prestart_worker_first_driver": "0",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_raylet_report_loads_period_milliseconds": "1000",
    "RAY_metrics_report_interval_ms": "60000",
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
        }


def start_ray() -> None:
    """Join the cluster this job was submitted to (or `RAY_ADDRESS`), else start a one-machine cluster for this process."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    # An actor that asks for coming node losses; a lost node is met by a restart from the newest checkpoint anyway.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it would show every printed line twice
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True)
        return
    os.environ.update(QUIET | os.environ)
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=512 * 2**20,
        logging_level="WARNING",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}},
    )


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
