"""One optimizer step: micro-batches forward and backward, one reduction, one check, one update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from megacontext.data.stream import Batch
from megacontext.errors import NonFiniteLossError
from megacontext.model.gpt import GPT
from megacontext.train.memory_objective import MemoryObjective
from megacontext.train.objective import count_targets, next_token_loss
from megacontext.train.optim import Optimizer
from megacontext.train.throughput import Stopwatch


@dataclass(frozen=True)
class StepResult:
    """What a step measured. `loss` is nats per target over all workers, of the raw rows; `rows` are this worker's;
    `metrics` are those of a memory (`mc/…`)."""

    loss: float
    grad_norm: float
    stop: bool
    rows: np.ndarray
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Stepper:
    """Holds what a step needs. `model` may be compiled; `grad_clip` 0 only measures the norm; `memory` is the objective
    of a model with a memory."""

    model: GPT
    optimizer: Optimizer
    device: torch.device
    world_size: int
    accum_steps: int
    grad_clip: float
    watch: Stopwatch
    memory: MemoryObjective | None = None

    def run(self, step: int, batches: Iterator[Batch], lr_multiplier: float, momentum: float, stop: bool) -> StepResult:
        """Take one step in place. Every rank must call it.

        Raises NonFiniteLossError, on every rank and before the update, when the loss or the gradient is not finite.
        """
        self.watch.start()
        micro = [next(batches) for _ in range(self.accum_steps)]
        targets = self._total_targets(micro)
        self.watch.mark("dataloader")
        scale = self.world_size / max(targets, 1)
        losses = []
        if self.memory is not None:
            self.memory.begin(step)
        for batch in micro:
            if self.memory is None:
                loss = next_token_loss(self.model, batch, self.device, scale)
            else:
                loss = self.memory.loss(batch, self.device, scale, self.watch)
            self.watch.mark("forward")
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            self.watch.mark("backward")
        rows = np.concatenate([batch.rows for batch in micro])
        self.optimizer.reduce(self.world_size)
        grad_norm = self.optimizer.clip(self.grad_clip if self.grad_clip > 0 else math.inf)
        report = torch.stack([torch.stack(losses).sum().float() / self.world_size, grad_norm.float() / self.world_size,
                              torch.tensor(float(stop), device=self.device)])  # fmt: skip
        if self.memory is not None:
            report = torch.cat([report, self.memory.meter.totals()])
        if self.world_size > 1:
            dist.all_reduce(report)
        loss_value, norm_value, stop_value, *totals = report.tolist()  # the one wait for the device in a step
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._raise_non_finite(step, loss_value, norm_value, bool(torch.isfinite(torch.stack(losses)).all()), rows)
        self.optimizer.step(lr_multiplier, momentum)
        self.optimizer.zero_grad()
        metrics: dict[str, float] = {}
        if self.memory is not None:
            metrics = {"mc/loss": loss_value, **self.memory.finish(totals)}
            loss_value = metrics["mc/token_loss"]
        self.watch.mark("optimizer")
        return StepResult(loss_value, norm_value, stop_value > 0, rows, metrics)

    def _total_targets(self, micro: list[Batch]) -> int:
        """Targets of the step over all workers; known without asking when nothing is masked."""
        count = sum(count_targets(batch) for batch in micro)
        if self.world_size == 1:
            return count
        if all(batch.mask is None for batch in micro):
            return count * self.world_size
        total = torch.tensor(count, device=self.device)
        dist.all_reduce(total)
        return int(total)

    def _raise_non_finite(self, step: int, loss: float, norm: float, finite_here: bool, rows: np.ndarray) -> None:
        suspects = [[] if finite_here and not math.isfinite(loss) else rows.tolist()]
        if self.world_size > 1:
            suspects = [[] for _ in range(self.world_size)]
            dist.all_gather_object(suspects, [] if finite_here and not math.isfinite(loss) else rows.tolist())
        self.optimizer.zero_grad()
        raise NonFiniteLossError(
            f"step {step}: loss {loss}, gradient norm {norm}; stopped before the optimizer step, so the weights are "
            f"those of step {step}. Token shard rows involved: {[row for part in suspects for row in part]}. "
            "Look at these rows, or lower the learning rates, or train in fp32."
        )
