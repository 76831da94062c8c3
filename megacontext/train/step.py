"""One optimizer step: micro-batches forward and backward, one reduction, one check, one update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from megacontext.errors import NonFiniteLossError
from megacontext.train.objective import Objective
from megacontext.train.optim import Optimizer
from megacontext.train.step_plan import StepPlan
from megacontext.train.throughput import Stopwatch


@dataclass(frozen=True)
class StepResult:
    """What a step measured. `loss` is nats per target over all workers; `rows` are this worker's; `metrics` are those of
    the objective."""

    loss: float
    grad_norm: float
    stop: bool
    rows: np.ndarray
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Stepper:
    """Holds what a step needs. `grad_clip` 0 only measures the norm. `every_target_counts`: all targets of all rows do, so
    workers need not ask each other how many there are."""

    objective: Objective
    optimizer: Optimizer
    device: torch.device
    world_size: int
    accum_steps: int
    grad_clip: float
    watch: Stopwatch
    every_target_counts: bool = False

    def run(
        self, step: int, plans: Iterator[StepPlan], lr_multiplier: float, momentum: float, stop: bool
    ) -> StepResult:
        """Take one step in place. Every rank must call it.

        Raises NonFiniteLossError, on every rank and before the update, when the loss or the gradient is not finite.
        """
        self.watch.start()
        micro = [next(plans) for _ in range(self.accum_steps)]
        targets = self._total_targets(micro)
        self.watch.mark("dataloader")
        scale = self.world_size / max(targets, 1)
        losses = []
        self.objective.begin(step)
        for plan in micro:
            loss = self.objective.loss(plan.to(self.device), scale, self.watch)
            self.watch.mark("forward")
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            self.watch.mark("backward")
        rows = np.concatenate([plan.rows for plan in micro])
        self.optimizer.reduce(self.world_size)
        grad_norm = self.optimizer.clip(self.grad_clip if self.grad_clip > 0 else math.inf)
        own = torch.stack([torch.stack(losses).sum().float() / self.world_size, grad_norm.float() / self.world_size,
                           torch.tensor(float(stop), device=self.device)])  # fmt: skip
        report = torch.cat([own, self.objective.totals()])
        if self.world_size > 1:
            dist.all_reduce(report)
        loss_value, norm_value, stop_value, *totals = report.tolist()  # the one wait for the device in a step
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._raise_non_finite(step, loss_value, norm_value, bool(torch.isfinite(torch.stack(losses)).all()), rows)
        self.optimizer.step(lr_multiplier, momentum)
        self.optimizer.zero_grad()
        result = self.objective.finish(loss_value, totals)
        self.watch.mark("optimizer")
        return StepResult(result.loss, norm_value, stop_value > 0, rows, result.metrics)

    def _total_targets(self, micro: list[StepPlan]) -> int:
        """Targets of the step over all workers."""
        count = sum(plan.targets_counted for plan in micro)
        if self.world_size == 1:
            return count
        if self.every_target_counts:
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
