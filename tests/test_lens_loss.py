"""The lens loss against one pair at a time, what each term does, and that a lens trained on it finds what helps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megacontext.config import MemoryConfig
from megacontext.train import lens_loss
from megacontext.train.lens_loss import RunningScales, compare, lens_terms
from megacontext.train.memory_metrics import correlation
from megacontext.train.route_loss import route

B, N, BLOCKS = 3, 5, 7
CONFIG = MemoryConfig(mc=1)


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, BLOCKS, generator=generator).tanh().requires_grad_()
    raw = torch.randint(2, (B, N, BLOCKS), generator=generator) * 2.0 - 1
    return scores, raw, torch.randn(B, N, generator=generator) * 0.2


def slow_pairs(
    scores: torch.Tensor, raw: torch.Tensor, advantage: torch.Tensor, scale: float
) -> list[list[tuple[float, float]]]:
    """(gap, margin) of every pair of every row."""
    rows, scores = [], scores.detach()
    for row in range(B):
        liked = [sum(float(scores[row, b]) * float(raw[row, v, b]) for b in range(BLOCKS)) / BLOCKS for v in range(N)]
        rows.append(
            [
                ((float(advantage[row, j]) - float(advantage[row, i])) / scale, liked[i] - liked[j])
                for i in range(N)
                for j in range(i + 1, N)
            ]
        )
    return rows


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("ratio", [1.0, 0.45, 0.01])
def test_terms_of_pairs_equal_one_pair_at_a_time(temperature: float, ratio: float) -> None:
    scores, raw, advantage = problem()
    config = replace(CONFIG, mc_lens_temperature=temperature, mc_lens_hard_negative_ratio=ratio, mc_lens_margin=0.3)
    terms = lens_terms(scores, compare(scores, raw, advantage, 0.5), config, RunningScales())
    divergence, rank = [], []
    for pairs in slow_pairs(scores, raw, advantage, 0.5):
        hardest = sorted(pairs, key=lambda pair: pair[0] * pair[1])[: max(1, math.ceil(ratio * len(pairs)))]
        for gap, margin in hardest:
            p, q = 1 / (1 + math.exp(-gap)), 1 / (1 + math.exp(-margin / temperature))
            divergence.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
            rank.append(max(0.0, 0.3 - math.copysign(1, gap) * margin) * min(1, abs(gap)))
    assert terms["preference"].item() == pytest.approx(sum(divergence) / len(divergence), rel=1e-4)
    assert terms["rank"].item() == pytest.approx(0.5 * sum(rank) / len(rank), rel=1e-4)


def test_terms_of_the_scores_alone() -> None:
    scores, raw, advantage = problem()
    config = replace(CONFIG, mc_lens_kl_weight=1.0, mc_lens_budget_weight=2.0, mc_lens_budget_smooth_weight=3.0)
    running = RunningScales(score_mean=0.05, updates=1)
    terms = lens_terms(scores, compare(scores, raw, advantage, 1.0), config, running)
    means = scores.mean(1)
    assert terms["budget"].item() == pytest.approx(2 * means.square().mean().item(), rel=1e-5)
    before = 0.05 / (1 - 0.9)
    assert terms["budget_smooth"].item() == pytest.approx(3 * (means - before).square().mean().item(), rel=1e-5)
    p = scores.softmax(1)
    assert terms["kl"].item() == pytest.approx((p * (p * BLOCKS).log()).sum(1).mean().item(), rel=1e-4)
    even = torch.full((2, BLOCKS), 0.3)
    assert lens_loss.spread_loss(even, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_terms_without_weight_or_without_pairs_are_left_out() -> None:
    scores, raw, advantage = problem()
    off = replace(CONFIG, mc_lens_rank_weight=0.0, mc_lens_budget_weight=0.0)
    assert set(lens_terms(scores, compare(scores, raw, advantage, 1.0), off, RunningScales())) == {"preference"}
    lonely = compare(scores, raw[:, :1], advantage[:, :1], 1.0)
    assert set(lens_terms(scores, lonely, CONFIG, RunningScales())) == {"budget"}


def test_a_lens_that_is_right_has_no_loss_and_equal_variants_teach_nothing() -> None:
    scores, raw, advantage = problem()
    pairs = compare(scores, raw, advantage, 1.0)
    right = lens_loss.Preferences(pairs.preference, pairs.margin.detach(), pairs.margin)
    loss = lens_loss.preference_loss(right, 1.0, torch.ones_like(pairs.gap))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    same = compare(torch.zeros(B, BLOCKS, requires_grad=True), raw, torch.zeros(B, N), 1.0)
    loss = lens_loss.preference_loss(same, 1.0, torch.ones_like(same.gap))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_scores_trained_on_it_order_the_blocks_by_what_they_help() -> None:
    """A planted truth: showing block 2 raw saves 0.3 nats, block 5 costs 0.1. Better variants are to be preferred."""
    worth = torch.zeros(BLOCKS)
    worth[2], worth[5] = 0.3, -0.1
    logits = torch.zeros(1, BLOCKS, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    generator, running = torch.Generator().manual_seed(1), RunningScales()
    config = replace(CONFIG, mc_lens_temperature=0.1)
    for _ in range(300):
        raw = torch.randint(2, (1, N, BLOCKS), generator=generator) * 2.0 - 1
        advantage = -((raw + 1) / 2 @ worth) + 0.02 * torch.randn(1, N, generator=generator)
        scale = running.advantage_scale(config.mc_lens_adv_norm_beta)
        pairs = compare(logits.tanh(), raw, advantage, scale)
        loss = torch.stack(list(lens_terms(logits.tanh(), pairs, config, running).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running.update(config, {"gap_square": (pairs.gap * scale).square().mean().item(), "score_mean": 0.0})
    found = logits.tanh()[0].detach()
    assert found.argmax() == 2
    assert found.argmin() == 5
    assert found[2] > 0.3
    corr, exists = correlation(pairs.preference.detach(), advantage)
    assert exists.item() == 1
    assert corr.item() < -0.8


def test_running_scales_are_bias_corrected_means_and_plain_numbers() -> None:
    running = RunningScales()
    assert running.advantage_scale(0.9) == running.utility_scale(0.9) == 1.0
    assert running.mean_score(0.9) == 0.0
    seen = [0.5, 0.3, 0.1]
    for number in seen:
        running.update(CONFIG, {"gap_square": number, "score_mean": -number, "utility_square": 2 * number})
    weights = [0.9 ** (2 - step) for step in range(3)]
    mean = sum(w * x for w, x in zip(weights, seen, strict=True)) / sum(weights)
    assert running.advantage_scale(0.9) == pytest.approx(math.sqrt(mean / 2))
    assert running.mean_score(0.9) == pytest.approx(-mean)
    assert running.utility_scale(0.9) == pytest.approx(math.sqrt(2 * mean))
    assert RunningScales(**running.state_dict()) == running
    running.update(CONFIG, {})
    assert running.updates == 3


def test_advantages_in_spreads_do_not_depend_on_their_unit() -> None:
    scores, raw, advantage = problem()
    losses = []
    for unit in (1.0, 1000.0):
        running = RunningScales()
        gaps = compare(scores, raw, advantage * unit, 1.0).gap
        running.update(CONFIG, {"gap_square": gaps.square().mean().item(), "score_mean": 0.0})
        pairs = compare(scores, raw, advantage * unit, running.advantage_scale(0.9))
        losses.append(lens_terms(scores, pairs, CONFIG, running)["preference"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_utility_gives_scores_their_size() -> None:
    scores = torch.tensor([[0.5, -0.5]], requires_grad=True)
    utility = torch.tensor([[0.2, -0.1]])
    loss = lens_loss.utility_loss(scores, utility, 0.1)
    expected = ((0.5 - math.tanh(2)) ** 2 + (-0.5 - math.tanh(-1)) ** 2) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_correlation_within_rows_and_none_where_nothing_varies() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [3.0, 2.0, 1.0]])
    y = torch.tensor([[2.0, 4.0, 6.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    found, exists = correlation(x, y)
    assert found.tolist() == pytest.approx([1.0, 0.0, -1.0])
    assert exists.tolist() == [1.0, 0.0, 1.0]


def test_routing_chooses_among_what_is_allowed() -> None:
    logits = torch.tensor([[5.0, 1.0, 2.0], [0.0, 1.0, 2.0]], requires_grad=True)
    allowed = torch.tensor([[False, True, True], [True, True, True]])
    result = route(logits, allowed, torch.tensor([[2, 2], [0, 0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert result.correct.tolist() == [1.0, 0.0]
    assert result.loss[0].item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-5)
    result.loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] == 0
    assert torch.isfinite(logits.grad).all()
    both = route(logits, allowed, torch.tensor([[2, 1], [0, 1]]), torch.full((2, 2), 0.5))
    assert both.correct.tolist() == [1.0, 0.0]
    assert both.loss[0].item() == pytest.approx(
        0.5 + math.log(1 + math.exp(-1)), rel=1e-5
    )  # least where both match alike
