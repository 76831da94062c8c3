"""What the training loop asks of the process it runs in; Ray Train is one answer, a plain process another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from megacontext import precision, storage
from megacontext.errors import UserError


class Worker(Protocol):
    """One training process. `stop_requested` is asked on rank 0 only; the loop tells the others."""

    rank: int
    world_size: int
    device: torch.device

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tell whoever launched the run how it goes. Called on every rank, at validations, never per step."""

    def stop_requested(self) -> bool:
        """Whether the run should write a checkpoint and end after this step."""


@dataclass
class LocalWorker:
    """A worker without Ray: this process alone, or one of several started by torchrun.

    Under torchrun it joins the process group (NCCL with GPUs, Gloo without).
    """

    run_dir: str
    device: torch.device
    rank: int = 0
    world_size: int = 1

    @classmethod
    def start(cls, run_dir: str, device: str = "auto") -> LocalWorker:
        """Read torchrun's environment. Raises UserError when CUDA is asked for and absent."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        local = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
        if world_size > 1 and not dist.is_initialized():
            backend = "nccl" if local.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=600))
        return cls(run_dir=run_dir, device=local, rank=rank, world_size=world_size)

    def report(self, metrics: Mapping[str, float]) -> None:
        """Nobody to tell: metrics.jsonl has them."""

    def stop_requested(self) -> bool:
        return storage.exists(stop_file(self.run_dir))


def stop_file(run_dir: str) -> str:
    """The file whose presence asks a run to save and end."""
    return storage.join(run_dir, "STOP")


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device of this process. Raises UserError when CUDA is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but no CUDA device is visible; use --device cpu or auto.")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def prepare_process(threads: int) -> None:
    """Set up this process for training: how many cores torch may use (0: all), and how freed memory is kept."""
    precision.set_threads(threads)
    precision.keep_freed_memory()
