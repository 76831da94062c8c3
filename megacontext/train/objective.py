"""What a stage minimizes: the protocol between an objective and the training step, and next-token cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megacontext.data.stream import Batch
from megacontext.model.cross_entropy import weighted_cross_entropy
from megacontext.model.gpt import GPT, SOFTCAP
from megacontext.train.step_plan import StepPlan
from megacontext.train.throughput import Stopwatch


@dataclass(frozen=True)
class StepLoss:
    """A step over all workers: `loss` in nats per target of the rows, and the objective's own metrics by full name."""

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """What a stage minimizes. A step calls `begin`, then `loss` for each micro-batch, `totals`, and `finish`."""

    def plan(self, batch: Batch) -> StepPlan:
        """What the loss of a micro-batch needs, on the CPU; a function of the batch alone, called in a thread ahead of use."""

    def begin(self, step: int) -> None:
        """Start a step."""

    def loss(self, plan: StepPlan, scale: float, watch: Stopwatch) -> Tensor:
        """The loss of a micro-batch whose plan is on the device: a scalar with gradient.

        `scale`: workers / targets of the step over all workers, so that gradients averaged over the workers are those of
        the mean over the step's targets. Phases of the pass are marked on `watch` as `forward/<phase>`.
        """

    def totals(self) -> Tensor:
        """Sums of this worker since `begin`, float32 [n]; the sums of several workers add up."""

    def finish(self, loss: float, totals: Sequence[float]) -> StepLoss:
        """The step's result from the loss and the totals of all workers; every worker calls it."""

    def state_dict(self) -> dict[str, Any]:
        """What is carried from step to step, as plain JSON."""


@dataclass
class TokenObjective:
    """Next-token cross-entropy of the rows, weighted by the batch. `model` may be compiled."""

    model: GPT

    def plan(self, batch: Batch) -> StepPlan:
        return StepPlan.of(batch)

    def begin(self, step: int) -> None:
        pass

    def loss(self, plan: StepPlan, scale: float, watch: Stopwatch) -> Tensor:
        """Sum of the weighted cross-entropies in nats, times `scale`; 0 where no target counts."""
        if plan.weights is None:
            return self.model.loss(plan.inputs, plan.targets, reduction="sum") * scale
        hidden = self.model.hidden(plan.inputs).flatten(0, 1)
        head, targets = self.model.lm_head.weight, plan.targets.reshape(-1)
        total, _ = weighted_cross_entropy(hidden, head, targets, plan.weights.reshape(-1), cap=SOFTCAP)
        return total * scale

    def totals(self) -> Tensor:
        return torch.zeros(0, device=self.model.device)

    def finish(self, loss: float, totals: Sequence[float]) -> StepLoss:
        return StepLoss(loss)

    def state_dict(self) -> dict[str, Any]:
        return {}
