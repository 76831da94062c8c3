"""The loss of the router: the block that answers a question against all other blocks, questions against other text.

Shapes: Q questions, C blocks of the micro-batch, Z windows without a question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megacontext.model.memory import Memory
from megacontext.train.memory_plan import RouteTensors


@dataclass(frozen=True)
class Routing:
    """Of questions: cross-entropy in nats and top-1 accuracy, [Q] each."""

    loss: Tensor
    correct: Tensor


@dataclass(frozen=True)
class RouteResult:
    """`positive_loss`, `negative_loss`: weighted sums over questions and over windows without one, scalars with gradient.
    `positives` [Q], `negatives` [Z]: logits of "something is asked", without gradient."""

    positive_loss: Tensor
    negative_loss: Tensor
    routing: Routing
    positives: Tensor
    negatives: Tensor


def route_loss(memory: Memory, leaves: Tensor, questions: RouteTensors) -> RouteResult:
    """Losses of a micro-batch whose LOD1 records are `leaves` [B, blocks, width]."""
    keys = memory.keys(leaves).flatten(0, 1)
    count = len(questions.windows)
    queries, asked = memory.query(torch.cat([questions.windows, questions.negatives]))
    logits = memory.route_logits(queries[:count], keys)
    routing = route(logits, questions.allowed, questions.positives, questions.probability)
    positive = ((routing.loss + F.softplus(-asked[:count])) * questions.weights).sum()
    negative = (F.softplus(asked[count:]) * questions.negative_weights).sum()
    return RouteResult(positive, negative, routing, asked[:count].detach(), asked[count:].detach())


def route(logits: Tensor, allowed: Tensor, positives: Tensor, probability: Tensor) -> Routing:
    """Questions over blocks: logits [Q, C]; allowed bool [Q, C]; positives int64 [Q, n], the blocks that answer, and the
    target probability [Q, n] of each, 0 where a question has fewer."""
    masked = logits.masked_fill(~allowed, -math.inf)
    loss = -(masked.log_softmax(1).gather(1, positives) * probability).sum(1)
    return Routing(loss, (masked.argmax(1, keepdim=True) == positives).any(1).float())
