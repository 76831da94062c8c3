"""From a training task to running workers: the one place that builds a TorchTrainer.

Our checkpoints are the truth, not Ray's: a worker group, new or restarted, takes up the newest intact one itself.
So Ray Train keeps no checkpoint state that could be damaged, and a run resumes the same way with Ray or without.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime.cli import Args, flat_config
from jobs.runtime.cluster import WorkerResources, start_ray, worker_resources
from jobs.runtime.stopping import StopSignals, handled, warn_of_short_stop
from megacontext import storage
from megacontext.checkpoint import latest_checkpoint, read_meta
from megacontext.data.stream import BatchPlan
from megacontext.errors import CheckpointError, MegaContextError, UserError
from megacontext.telemetry import otel
from megacontext.telemetry.tracker import Tracker
from megacontext.train.loop import train
from megacontext.train.resume import check_start, checkpoints_dir, newest_to_resume
from megacontext.train.setup import choose_sizes, known_batch, known_horizon, with_batch
from megacontext.train.task import TrainTask
from megacontext.train.worker import LocalWorker, choose_device, prepare_process, stop_file

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


def run_training(task: TrainTask, args: Args) -> dict[str, Any]:
    """Train a stage and return its TrainResult as a dict; a stop signal ends it early with a checkpoint.

    Raises what training raised: MegaContextError for bad input or divergence (never retried), RuntimeError when the
    workers crashed more than `--max_failures` times.
    """
    storage.makedirs(task.run_dir)
    check_start(task)
    if int(os.environ.get("RANK", "0")) == 0:  # rank 0 alone reads the file; a later process must not delete a new one
        storage.remove_tree(stop_file(task.run_dir))
    with handled() as stop:
        if args.run.launcher == "local":
            return _run_here(task, args, stop)
        return _run_on_ray(task, args, stop)


def tracker_settings(task: TrainTask, args: Args) -> dict[str, Any]:
    """Arguments of the Tracker, as plain data."""
    return {
        "run_dir": task.run_dir,
        "run_name": args.run.run,
        "stage": task.stage,
        "config": flat_config(args),
        "wandb_mode": args.run.wandb,
        "log_every": task.train.log_every,
    }


def _run_here(task: TrainTask, args: Args, stop: StopSignals) -> dict[str, Any]:
    if task.train.stream == "ray":
        raise UserError("--stream ray needs --launcher ray; use --stream mmap (or auto) with --launcher local.")
    worker = _WatchedWorker.start(task.run_dir, args.run.device)
    prepare_process(args.run.cpus_per_worker)
    warn_of_short_stop()
    with ExitStack() as steps:

        def begin() -> None:
            steps.enter_context(stop.saving(task.run_dir))

        if worker.world_size == 1:
            worker.before_steps = begin  # a signal while data are opened and steps are timed ends the job at once
        else:
            begin()
        return asdict(train(task, worker, Tracker(**tracker_settings(task, args), enabled=worker.rank == 0)))


@dataclass
class _WatchedWorker(LocalWorker):
    """A worker without Ray that calls `before_steps` once, before the first step."""

    before_steps: Callable[[], None] | None = None

    def stop_requested(self) -> bool:
        begin, self.before_steps = self.before_steps, None
        if begin is not None:
            begin()
        return super().stop_requested()


def _run_on_ray(task: TrainTask, args: Args, stop: StopSignals) -> dict[str, Any]:
    began = time.time()
    start_ray()
    workers = worker_resources(args.run)
    check_world(task, workers.count)
    stream = "ray" if task.train.stream == "auto" else task.train.stream
    sizes = sizes_on_cluster(task, workers, began)
    with stop.saving(task.run_dir):
        return _fit_with_restarts(task, args, workers, stream, sizes, stop)


def _fit_with_restarts(
    task: TrainTask, args: Args, workers: WorkerResources, stream: str, sizes: tuple[int, int], stop: StopSignals
) -> dict[str, Any]:
    import ray

    failures = 0
    while True:
        try:
            trainer = _trainer(task, args, workers, stream, sizes, failures)
            # fit() in the main thread would install Ray's own Ctrl-C handler, which ends a run without a checkpoint.
            result: dict[str, Any] = stop.beside(trainer.fit).return_value
            return result
        except Exception as error:
            cause = _training_failure(error)
            if cause is None:
                raise
            if isinstance(cause, MegaContextError):
                raise cause from None
            said = f"worker group failed ({type(cause).__name__}: {str(cause).strip().splitlines()[-1:]})"
            if stop.asked:
                print(f"{said}; the job was asked to stop, so it is not started again", flush=True)
                return _untrained(task)
            failures += 1
            if failures > args.run.max_failures:
                raise RuntimeError(
                    f"training failed {failures} times, more than --max_failures {args.run.max_failures}: {error}"
                ) from error
            print(f"{said}; restart {failures} of {args.run.max_failures} from the newest checkpoint", flush=True)
            assert ray.is_initialized()


def check_world(task: TrainTask, world_size: int) -> None:
    """Fail before any worker starts when the batch does not divide. Raises UserError."""
    BatchPlan(task.rows_per_step, task.train.device_batch_size, world_size)


def _untrained(task: TrainTask) -> dict[str, Any]:
    """The result of a stage that was stopped while no training process ran: where its newest checkpoint stands."""
    path = latest_checkpoint(storage.join(task.run_dir, "checkpoints"), task.stage)
    step = int(read_meta(path)["step"]) if path else 0
    return {"finished": False, "step": step, "checkpoint": path or "", "metrics": {}}


def ray_name(name: str) -> str:
    """A name that Ray accepts: the name itself where it is plain ASCII, else its ASCII part and a hash of all of it."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:60].strip("-.")
    return name if plain == name else f"{plain or 'run'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _trainer(
    task: TrainTask, args: Args, workers: WorkerResources, stream: str, sizes: tuple[int, int], attempt: int
) -> TorchTrainer:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from jobs.runtime.ray_data import RankDataConfig
    from jobs.runtime.ray_worker import train_loop

    num_iterations, device_batch = sizes
    streaming = stream == "ray" and num_iterations > 0
    return TorchTrainer(
        train_loop,
        train_loop_config={
            "task": task,
            "streaming": streaming,
            "threads": workers.threads,
            "tracker": tracker_settings(task, args),
        },
        torch_config=TorchConfig(timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=workers.count, use_gpu=workers.use_gpu, resources_per_worker=workers.resources
        ),
        datasets=ray_datasets(with_batch(task, device_batch), workers.count, num_iterations) if streaming else None,
        dataset_config=RankDataConfig() if streaming else None,
        run_config=RunConfig(
            name=ray_name(f"{args.run.run}-{task.stage}-{int(time.time())}-{attempt}"),
            storage_path=storage.join(task.run_dir, "ray"),
            failure_config=FailureConfig(max_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": workers.env_vars | otel.carrier()},
        ),
    )


def ray_datasets(task: TrainTask, world_size: int, num_iterations: int) -> dict[str, Callable[[], Any]]:
    """One Ray dataset a rank, built anew for every worker group from where the newest checkpoint stopped."""
    from jobs.runtime.ray_data import rank_datasets

    def start_step() -> int:
        try:
            path = newest_to_resume(checkpoints_dir(task), task.stage, warn=lambda message: None)
        except CheckpointError:
            return 0  # the workers find the same and raise it, where its message reaches the user
        return int(read_meta(path)["step"]) if path else 0

    plan = BatchPlan(task.rows_per_step, task.train.device_batch_size, world_size)
    return rank_datasets(task.train_tokens_dir, task.seed, plan, start_step, num_iterations)


def sizes_on_cluster(task: TrainTask, workers: WorkerResources, began: float) -> tuple[int, int]:
    """Steps of the stage and rows of a micro-batch; where clock or memory decide, measured on the cluster with the
    resources of one training process. `began`: when the stage began, in seconds since 1970."""
    import ray

    steps, batch = known_horizon(task), known_batch(task)
    if steps is not None and batch is not None:
        return steps, batch

    @ray.remote(
        num_cpus=workers.resources["CPU"],
        num_gpus=workers.resources.get("GPU", 0),
        max_calls=1,  # the process, and the device memory it took, ends with the measurement
        runtime_env={"env_vars": workers.env_vars},
    )
    def measure() -> tuple[int, int]:
        prepare_process(workers.threads)
        device = choose_device("cuda" if workers.use_gpu else "cpu")
        return choose_sizes(task, device, workers.count, began)

    sizes: tuple[int, int] = ray.get(measure.remote())
    return sizes


def _training_failure(error: BaseException) -> BaseException | None:
    """The exception of the first failed worker, or None when the failure is not one of workers or controller."""
    from ray.train import ControllerError, WorkerGroupError

    if isinstance(error, WorkerGroupError):
        causes = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
        ours = [cause for cause in causes if isinstance(cause, MegaContextError)]
        return (ours or causes or [error])[0]
    return error if isinstance(error, ControllerError) else None
