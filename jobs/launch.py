"""From a training task to running workers: the one place that builds a TorchTrainer.

Our checkpoints are the truth, not Ray's: a worker group, new or restarted, takes up the newest intact one itself.
So Ray Train keeps no checkpoint state that could be damaged, and a run resumes the same way with Ray or without.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from jobs.cli import Args, flat_config
from jobs.cluster import WorkerResources, start_ray, worker_resources
from megacontext import storage
from megacontext.data.stream import BatchPlan
from megacontext.errors import MegaContextError, UserError
from megacontext.telemetry.tracker import Tracker
from megacontext.train.checkpoint import latest_checkpoint, read_meta
from megacontext.train.loop import train
from megacontext.train.setup import known_horizon, measure_horizon
from megacontext.train.task import TrainTask
from megacontext.train.worker import LocalWorker, choose_device, prepare_process, stop_file


def run_training(task: TrainTask, args: Args) -> dict[str, Any]:
    """Train a stage and return its TrainResult as a dict; a stop signal ends it early with a checkpoint.

    Raises what training raised: MegaContextError for bad input or divergence (never retried), RuntimeError when the
    workers crashed more than `--max_failures` times.
    """
    storage.makedirs(task.run_dir)
    storage.remove_tree(stop_file(task.run_dir))
    with stop_on_signal(task.run_dir):
        if args.run.launcher == "local":
            return _run_here(task, args)
        return _run_on_ray(task, args)


@contextmanager
def stop_on_signal(run_dir: str) -> Iterator[None]:
    """SIGTERM or Ctrl-C asks the workers to save and end, instead of ending this process."""

    def ask(signum: int, frame: Any) -> None:
        print(f"{signal.Signals(signum).name}: writing a checkpoint, then stopping", flush=True)
        storage.write_bytes(stop_file(run_dir), b"")

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals; its owner then writes the stop file
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _run_here(task: TrainTask, args: Args) -> dict[str, Any]:
    if task.train.stream == "ray":
        raise UserError("--stream ray needs --launcher ray; use --stream mmap (or auto) with --launcher local.")
    worker = LocalWorker.start(task.run_dir, args.run.device)
    prepare_process(args.run.cpus_per_worker)
    return asdict(train(task, worker, Tracker(**tracker_settings(task, args), enabled=worker.rank == 0)))


def _run_on_ray(task: TrainTask, args: Args) -> dict[str, Any]:
    import ray

    start_ray()
    workers = worker_resources(args.run)
    check_world(task, workers.count)
    stream = "ray" if task.train.stream == "auto" else task.train.stream
    failures = 0
    while True:
        try:
            return _fit(task, args, workers, stream, failures)
        except Exception as error:
            cause = _training_failure(error)
            if cause is None:
                raise
            if isinstance(cause, MegaContextError):
                raise cause from None
            failures += 1
            if failures > args.run.max_failures:
                raise RuntimeError(
                    f"training failed {failures} times, more than --max_failures {args.run.max_failures}: {error}"
                ) from error
            print(f"worker group failed ({type(cause).__name__}: {str(cause).strip().splitlines()[-1:]}); "
                  f"restart {failures} of {args.run.max_failures} from the newest checkpoint", flush=True)  # fmt: skip
            assert ray.is_initialized()


def check_world(task: TrainTask, world_size: int) -> None:
    """Fail before any worker starts when the batch does not divide. Raises UserError."""
    BatchPlan(task.rows_per_step, task.train.device_batch_size, world_size)


def _fit(task: TrainTask, args: Args, workers: WorkerResources, stream: str, attempt: int) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from jobs.ray_data import RankDataConfig
    from jobs.ray_worker import train_loop

    num_iterations = horizon_on_cluster(task, workers)
    streaming = stream == "ray" and num_iterations > 0
    trainer = TorchTrainer(
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
        datasets=ray_datasets(task, workers.count, num_iterations) if streaming else None,
        dataset_config=RankDataConfig() if streaming else None,
        run_config=RunConfig(
            name=f"{args.run.run}-{task.stage}-{int(time.time())}-{attempt}",
            storage_path=storage.join(task.run_dir, "ray"),
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": workers.env_vars},
        ),
    )
    box: dict[str, Any] = {}

    def fit() -> None:
        try:
            box["result"] = trainer.fit().return_value
        except BaseException as error:  # handed to the main thread, which raises it
            box["error"] = error

    # fit() in the main thread would install Ray's own Ctrl-C handler, which ends a run without a checkpoint.
    thread = threading.Thread(target=fit, name="trainer", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.5)
    if "error" in box:
        raise box["error"]
    result: dict[str, Any] = box["result"]
    return result


def ray_datasets(task: TrainTask, world_size: int, num_iterations: int) -> dict[str, Callable[[], Any]]:
    """One Ray dataset a rank, built anew for every worker group from where the newest checkpoint stopped."""
    from jobs.ray_data import rank_datasets

    def start_step() -> int:
        path = latest_checkpoint(storage.join(task.run_dir, "checkpoints"), task.stage, warn=lambda message: None)
        return int(read_meta(path)["step"]) if path else 0

    plan = BatchPlan(task.rows_per_step, task.train.device_batch_size, world_size)
    return rank_datasets(task.train_tokens_dir, task.seed, plan, start_step, num_iterations)


def horizon_on_cluster(task: TrainTask, workers: WorkerResources) -> int:
    """Steps of the stage; when the clock decides, timed on the cluster with the resources of one training process."""
    import ray

    known = known_horizon(task)
    if known is not None:
        return known

    @ray.remote(
        num_cpus=workers.resources["CPU"],
        num_gpus=workers.resources.get("GPU", 0),
        max_calls=1,  # the process, and the device memory it took, ends with the measurement
        runtime_env={"env_vars": workers.env_vars},
    )
    def measure() -> int:
        prepare_process(workers.threads)
        device = choose_device("cuda" if workers.use_gpu else "cpu")
        return measure_horizon(task, device, workers.count)

    steps: int = ray.get(measure.remote())
    return steps


def _training_failure(error: BaseException) -> BaseException | None:
    """The exception of the first failed worker, or None when the failure is not one of workers or controller."""
    from ray.train import ControllerError, WorkerGroupError

    if isinstance(error, WorkerGroupError):
        causes = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
        ours = [cause for cause in causes if isinstance(cause, MegaContextError)]
        return (ours or causes or [error])[0]
    return error if isinstance(error, ControllerError) else None
