"""The loss of LensNet: preferences between pairs of random working contexts of one row.

Of a pair, the context that predicts the newest tokens better is to be preferred (Bradley and Terry, 1952). Further terms
keep the scores in range. Single edits whose effect was measured are compared with the scores directly.

Shapes: B rows, N variants of a row, P = N·(N-1)/2 pairs, n blocks before the raw tail.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megacontext.config import MemoryConfig


@dataclass
class RunningScales:
    """What the lens loss remembers from step to step, the same on every worker: plain numbers that a checkpoint holds.

    Means are exponential with bias correction. A step uses what the steps before it measured.
    """

    gap_square: float = 0.0
    score_mean: float = 0.0
    utility_square: float = 0.0
    updates: int = 0
    utility_updates: int = 0

    def advantage_scale(self, beta: float) -> float:
        """Spread in nats of the variants of a row around their mean; 1 until there is a measurement."""
        if not self.updates or self.gap_square <= 0:
            return 1.0
        return math.sqrt(
            self.gap_square / (1 - beta**self.updates) / 2
        )  # a gap has twice the variance of one of the two

    def utility_scale(self, beta: float) -> float:
        """Root mean square in nats of the measured effects of single edits; 1 until there is a measurement."""
        if not self.utility_updates or self.utility_square <= 0:
            return 1.0
        return math.sqrt(self.utility_square / (1 - beta**self.utility_updates))

    def mean_score(self, beta: float) -> float:
        """Running mean of the scores."""
        return self.score_mean / (1 - beta**self.updates) if self.updates else 0.0

    def update(self, config: MemoryConfig, measured: Mapping[str, float]) -> None:
        """Take in what a whole step measured: keys gap_square, score_mean, utility_square; absent ones are passed over."""
        if "gap_square" in measured:
            beta = config.mc_lens_adv_norm_beta
            self.gap_square = beta * self.gap_square + (1 - beta) * measured["gap_square"]
            beta = config.mc_lens_budget_smooth_beta
            self.score_mean = beta * self.score_mean + (1 - beta) * measured["score_mean"]
            self.updates += 1
        if "utility_square" in measured:
            beta = config.mc_lens_adv_norm_beta
            self.utility_square = beta * self.utility_square + (1 - beta) * measured["utility_square"]
            self.utility_updates += 1

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Preferences:
    """Pairs of variants: `preference` [B, N] what the lens thinks of each, `gap` [B, P] by how many spreads the first
    of a pair is better, `margin` [B, P] by how much the lens prefers the first. Gradient flows through the lens's."""

    preference: Tensor
    gap: Tensor
    margin: Tensor


def compare(block_scores: Tensor, raw: Tensor, advantage: Tensor, scale: float) -> Preferences:
    """Preferences of the lens, and the truth, over all pairs of variants of a row.

    block_scores [B, n] in (-1, 1); raw [B, N, n], 1 where a variant shows the block as tokens and -1 where as a gist;
    advantage [B, N], nats by which the newest tokens are predicted worse than from the raw context; scale: `advantage_scale`.
    A variant is preferred by the mean agreement of its levels of detail with the scores.
    """
    preference = torch.einsum("bn,bvn->bv", block_scores, raw) / block_scores.shape[1]
    first, second = torch.triu_indices(raw.shape[1], raw.shape[1], 1, device=raw.device)
    gap = (advantage[:, second] - advantage[:, first]) / scale
    return Preferences(preference, gap, preference[:, first] - preference[:, second])


def preference_loss(pairs: Preferences, temperature: float, kept: Tensor) -> Tensor:
    """Mean over kept pairs of the divergence of the lens's preference from the measured one, [B, P] to a scalar in nats.

    The measured preference is as sure as the gap is large in spreads. 0 when the lens is right about all of them.
    """
    truth = torch.sigmoid(pairs.gap)
    cross = F.binary_cross_entropy_with_logits(pairs.margin / temperature, truth, reduction="none")
    return _mean(cross - _entropy(truth), kept)


def rank_loss(pairs: Preferences, margin: float, kept: Tensor) -> Tensor:
    """Mean over kept pairs of how far the better variant is from being preferred by `margin`; ties count less."""
    short = F.relu(margin - torch.sign(pairs.gap) * pairs.margin) * pairs.gap.abs().clamp(max=1)
    return _mean(short, kept)


def hardest(pairs: Preferences, ratio: float) -> Tensor:
    """[B, P] 1 for the share `ratio` of each row's pairs that the lens gets most wrong (at least one), 0 for the rest."""
    count = pairs.gap.shape[1]
    keep = min(count, max(1, math.ceil(ratio * count)))
    if keep == count:
        return torch.ones_like(pairs.gap)
    wrong = -(pairs.gap * pairs.margin.detach())
    return torch.zeros_like(wrong).scatter_(1, wrong.topk(keep, dim=1).indices, 1.0)


def spread_loss(block_scores: Tensor, temperature: float) -> Tensor:
    """Divergence in nats of softmax(scores / temperature) over a row's blocks from the even distribution, mean of rows."""
    logs = F.log_softmax(block_scores / temperature, dim=1)
    return (logs.exp() * logs).sum(1).mean() + math.log(block_scores.shape[1])


def lens_terms(
    block_scores: Tensor, pairs: Preferences, config: MemoryConfig, running: RunningScales
) -> dict[str, Tensor]:
    """The weighted terms of the lens loss by name; their sum is the loss before `mc_lens_loss_weight`.

    Terms whose weight is 0 are left out, and so are those of pairs when there are none.
    """
    terms: dict[str, Tensor] = {}
    if pairs.gap.shape[1]:
        kept = hardest(pairs, config.mc_lens_hard_negative_ratio)
        terms["preference"] = preference_loss(pairs, config.mc_lens_temperature, kept)
        if config.mc_lens_rank_weight:
            terms["rank"] = config.mc_lens_rank_weight * rank_loss(pairs, config.mc_lens_margin, kept)
    mean = block_scores.mean(1)
    if config.mc_lens_budget_weight:
        terms["budget"] = config.mc_lens_budget_weight * mean.square().mean()
    if config.mc_lens_budget_smooth_weight:
        before = running.mean_score(config.mc_lens_budget_smooth_beta)
        terms["budget_smooth"] = config.mc_lens_budget_smooth_weight * (mean - before).square().mean()
    if config.mc_lens_kl_weight:
        terms["kl"] = config.mc_lens_kl_weight * spread_loss(block_scores, config.mc_lens_temperature)
    return terms


def utility_loss(chosen_scores: Tensor, utility: Tensor, scale: float) -> Tensor:
    """Mean squared distance of scores [B, k] from the measured utilities of expanding those blocks, squashed to (-1, 1).

    utility [B, k]: nats by which the expansion helps the newest tokens. This gives scores their size, not only their order.
    """
    return (chosen_scores - torch.tanh(utility / scale)).square().mean()


def _mean(values: Tensor, kept: Tensor) -> Tensor:
    return (values * kept).sum() / kept.sum()


def _entropy(p: Tensor) -> Tensor:
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
