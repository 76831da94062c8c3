"""The training loop's worker inside a Ray Train process. Only what Ray must know crosses here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megacontext import storage
from megacontext.data.stream import Batch, BatchPlan
from megacontext.telemetry.tracker import Tracker
from megacontext.train.loop import train
from megacontext.train.worker import prepare_process, stop_file


@dataclass
class RayTrainWorker:
    """A `megacontext.train.worker.Worker` over `ray.train`."""

    run_dir: str
    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def start(cls, run_dir: str) -> RayTrainWorker:
        """Read rank and device from the Ray Train context of this process."""
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return cls(run_dir, context.get_world_rank(), context.get_world_size(), device)

    def report(self, metrics: Mapping[str, float]) -> None:
        """Show a validation in Ray's dashboards. Every rank reports; the checkpoints are our own, not Ray's."""
        import ray.train

        ray.train.report(dict(metrics))

    def stop_requested(self) -> bool:
        return storage.exists(stop_file(self.run_dir))


def train_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs: the library's loop, fed by this rank's Ray Data stream.

    `config`: task (TrainTask), streaming (bool; else a memory map), threads, tracker (arguments of the Tracker).
    """
    prepare_process(config["threads"])
    task = config["task"]
    worker = RayTrainWorker.start(task.run_dir)

    def stream(plan: BatchPlan, start_step: int, end_step: int) -> Iterator[Batch]:
        from jobs.runtime.ray_data import RayStream

        return RayStream.of_worker(plan, worker.rank, start_step, end_step)

    tracker = Tracker(**config["tracker"], enabled=worker.rank == 0)
    return asdict(train(task, worker, tracker, stream if config["streaming"] else None))
