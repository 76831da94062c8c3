"""Metrics `mc/…` of a step: what the losses of a micro-batch returned, as sums that several workers can add.

Shapes: B rows, T tokens, N variants of a row, V = B·N views, M entries with a target, R rows of LensNet, n blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megacontext.train.lens_loss import Preferences
from megacontext.train.memory_plan import ViewTensors
from megacontext.train.meter import Meter
from megacontext.train.route_loss import RouteResult

LENS_TERMS = ("preference", "rank", "budget", "budget_smooth", "kl", "utility", "attention")
INTERNAL = ("gap_square", "score_mean", "utility_square")  # for the running scales of the lens loss, not shown


@dataclass(frozen=True)
class RawResult:
    """The raw rows: `loss` with gradient; `hidden` [B, T, D]; `losses` [B, T] in nats, unweighted, 0 where a target does
    not count; `counted` [B, T] 1 or 0; `answers` [B, T] 1 where the loss weight is above 1, None without weights;
    `newest` [B] mean loss of the last H tokens."""

    loss: Tensor
    hidden: Tensor
    losses: Tensor
    counted: Tensor
    answers: Tensor | None
    newest: Tensor


@dataclass(frozen=True)
class VariantsResult:
    """The variants: `loss` with gradient, a sum over views; `nats` [M] cross-entropies, unweighted; `divergences` [M]
    weighted KL from the raw row's predictions, None without distillation; `penalty` mean distance of the tails' states;
    `newest` [V] mean loss of the last H tokens."""

    loss: Tensor
    nats: Tensor
    divergences: Tensor | None
    penalty: Tensor
    newest: Tensor


@dataclass(frozen=True)
class LensResult:
    """LensNet: `loss` with gradient, a mean over rows; its weighted `terms` by name; `scores` [R, n]; `pairs` of the R rows'
    variants; `advantage` [R, N] nats by which a variant is worse than the raw row; `scale` of the advantages in nats;
    `labels` [R, n'] scores that the attention asks for, of the newest n' blocks; `utility` [R, k] nats of single edits."""

    loss: Tensor
    terms: Mapping[str, Tensor]
    scores: Tensor
    pairs: Preferences
    advantage: Tensor
    scale: float
    labels: Tensor | None = None
    utility: Tensor | None = None


def metric_names(levels: int) -> tuple[str, ...]:
    """Names without `mc/`, of a memory with levels 0 to `levels`."""
    names = [
        "token_loss",
        "answer_loss",
        "gist_loss",
        "gist_ce",
        "gist_kl",
        "gist_penalty",
        "lens_loss",
        "route_loss",
        "route_accuracy",
        "route_asked",
        "route_false_alarm",
        "adv_delta_mean",
        "adv_delta_std",
        "adv_delta_p95",
        "preference_corr_mean",
        "preference_agreement",
        "preference_pair_count",
        "policy_score_abs_mean",
        "policy_score_std_mean",
        "attention_corr",
    ]
    numbered = [f"{name}/{level}" for name in ("lod_loss", "lod_count") for level in range(levels + 1)]
    return (*names, *INTERNAL, *(f"lens_{name}" for name in LENS_TERMS), *numbered)


def record_raw(meter: Meter, raw: RawResult) -> None:
    """Losses of the raw rows."""
    if raw.answers is not None:
        meter.add("answer_loss", (raw.losses * raw.answers).sum(), (raw.counted * raw.answers).sum())
    meter.add("token_loss", raw.losses.sum(), raw.counted.sum())


def record_variants(meter: Meter, variants: VariantsResult, views: ViewTensors) -> None:
    """Losses of the variants, and by level of the entry that predicts."""
    count, levels = views.shape[0], len(views.of_level)
    meter.add("gist_loss", variants.loss, count)
    meter.add("gist_ce", (variants.nats * views.share).sum(), count)
    meter.add("gist_penalty", variants.penalty * count, count)
    if variants.divergences is not None:
        meter.add("gist_kl", (variants.divergences * views.inverse * views.share).sum(), count)
    by_level = torch.zeros(2, levels, device=variants.nats.device)
    by_level[0].index_add_(0, views.level, variants.nats.float())
    by_level[1].index_add_(0, views.level, (views.inverse > 0).float())
    for level in range(levels):
        meter.add(f"lod_loss/{level}", by_level[0, level], by_level[1, level])
        meter.add(f"lod_count/{level}", views.of_level[level], count)


def record_lens(meter: Meter, lens: LensResult, world_size: int) -> None:
    """LensNet's scores, and how they agree with the advantages, the attention labels and the measured edits."""
    scores, rows = lens.scores, len(lens.scores)
    meter.add("policy_score_abs_mean", scores.abs().mean(1).sum(), rows)
    meter.add("policy_score_std_mean", scores.std(1, correction=0).sum(), rows)
    meter.add("score_mean", scores.mean(1).sum(), rows)
    for name, term in lens.terms.items():
        meter.add(f"lens_{name}", term * rows, rows)
    meter.add("lens_loss", lens.loss * rows, rows)
    if lens.labels is not None:
        agreement, exists = correlation(scores[:, scores.shape[1] - lens.labels.shape[1] :].detach(), lens.labels)
        meter.add("attention_corr", agreement.sum(), exists.sum())
    if lens.utility is not None:
        meter.add("utility_square", lens.utility.square().sum(), lens.utility.numel())
    gap, margin, advantage = lens.pairs.gap, lens.pairs.margin.detach(), lens.advantage
    if not gap.numel():
        return
    meter.add("gap_square", (gap * lens.scale).square().sum(), gap.numel())
    meter.add("adv_delta_mean", advantage.sum(), advantage.numel())
    meter.add("adv_delta_std", advantage.std(correction=0), 1)
    meter.add("adv_delta_p95", advantage.flatten().quantile(0.95), 1)
    agreement, exists = correlation(lens.pairs.preference.detach(), advantage)
    meter.add("preference_corr_mean", agreement.sum(), exists.sum())
    differs = (gap != 0).float()
    meter.add("preference_agreement", ((gap * margin > 0).float() * differs).sum(), differs.sum())
    meter.add("preference_pair_count", differs.sum(), world_size)


def record_route(meter: Meter, route: RouteResult) -> None:
    """Questions answered by the right block, and how sure the router is that something, or nothing, is asked."""
    count, negatives = len(route.positives), len(route.negatives)
    meter.add("route_loss", route.routing.loss.sum(), count)
    meter.add("route_accuracy", route.routing.correct.sum(), count)
    meter.add("route_asked", route.positives.sigmoid().sum(), count)
    meter.add("route_false_alarm", route.negatives.sigmoid().sum(), negatives)


def correlation(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Pearson correlation within each row of [B, N], and 1 for rows where it exists (both sides vary), else 0 and 0."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    spread = (x.square().sum(1) * y.square().sum(1)).sqrt()
    exists = spread > 1e-12
    return torch.where(exists, (x * y).sum(1) / spread.clamp(min=1e-12), 0.0), exists.float()
