"""The fused linear cross-entropy against plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.model import cross_entropy
from megacontext.model.cross_entropy import distillation_cross_entropy, linear_cross_entropy, weighted_cross_entropy

CAP = 15.0


def plain(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    logits = CAP * torch.tanh((x @ weight.T) / CAP)
    losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    if reduction == "none":
        return losses
    return losses.sum() / (1 if reduction == "sum" else max(1, int((targets >= 0).sum())))


def problem(rows: int, vocab: int, width: int = 12, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64).mul_(3).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=generator)
    return x, weight, targets


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and blocks smaller than the problems, and not dividing them."""
    monkeypatch.setattr(cross_entropy, "_CPU_OUTER_ROWS", 19)
    monkeypatch.setattr(cross_entropy, "_CPU_BLOCK_ELEMENTS", 7 * 37)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [1, 7, 19, 64])
def test_equals_plain_autograd(reduction: str, rows: int) -> None:
    x, weight, targets = problem(rows, 37)
    targets[::3] = -1
    weights = torch.linspace(0.5, 2, rows) if reduction == "none" else torch.tensor(0.7)
    results = []
    for function in (plain, lambda *a: linear_cross_entropy(*a[:3], cap=CAP, reduction=a[3])):
        loss = function(x, weight, targets, reduction)
        grads = torch.autograd.grad((loss * weights).sum(), (x, weight))
        results.append((loss, *grads))
    (expected, dx, dw), (loss, got_dx, got_dw) = results
    assert loss.shape == expected.shape
    assert relative(loss, expected) < 1e-6
    assert relative(got_dx, dx) < 1e-6
    assert relative(got_dw, dw) < 1e-6


def test_gradcheck_in_float64() -> None:
    x, weight, targets = problem(9, 11, width=4, dtype=torch.float64)
    targets[4] = -1
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets, cap=CAP), (x, weight))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 50), st.integers(2, 60), st.integers(0, 10_000))
def test_sum_is_the_sum_of_none_and_mean_its_average(rows: int, vocab: int, seed: int) -> None:
    x, weight, targets = problem(rows, vocab, seed=seed)
    targets[torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.3] = -1
    with torch.no_grad():
        each = linear_cross_entropy(x, weight, targets, cap=CAP, reduction="none")
    total = linear_cross_entropy(x, weight, targets, cap=CAP, reduction="sum")
    mean = linear_cross_entropy(x, weight, targets, cap=CAP)
    assert not each[targets < 0].any()
    assert total.item() == pytest.approx(each.sum().item(), rel=1e-5, abs=1e-6)
    assert mean.item() == pytest.approx(each.sum().item() / max(1, int((targets >= 0).sum())), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_to_predict_is_zero_loss_and_zero_gradient(reduction: str) -> None:
    x, weight, targets = problem(30, 37)
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, -1), cap=CAP, reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_extreme_logits_stay_finite() -> None:
    x, weight, targets = problem(30, 37)
    loss = linear_cross_entropy(x * 1e4, weight, targets, cap=CAP)
    grads = torch.autograd.grad(loss, (x, weight))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not torch.isfinite(linear_cross_entropy(x * float("nan"), weight, targets, cap=CAP))


def test_frozen_inputs_get_no_gradient() -> None:
    x, weight, targets = problem(20, 37)
    linear_cross_entropy(x, weight.detach(), targets, cap=CAP).backward()
    assert weight.grad is None
    expected = x.grad.clone()
    x.grad = None
    linear_cross_entropy(x, weight, targets, cap=CAP).backward()
    assert relative(x.grad, expected) < 1e-6
    weight.grad = None
    linear_cross_entropy(x.detach(), weight, targets, cap=CAP).backward()
    assert weight.grad is not None


def test_bf16_inputs_with_fp32_master_weight() -> None:
    x, weight, targets = problem(64, 37)
    low = x.detach().bfloat16().requires_grad_()
    loss = linear_cross_entropy(low, weight, targets, cap=CAP)
    loss.backward()
    expected = plain(x, weight, targets, "mean")
    dx, dw = torch.autograd.grad(expected, (x, weight))
    assert loss.dtype == weight.grad.dtype == torch.float32
    assert low.grad.dtype == torch.bfloat16
    assert abs(loss - expected) < 0.02
    assert relative(low.grad.float(), dx) < 0.03
    assert relative(weight.grad, dw) < 0.03


def test_the_logits_of_the_batch_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that the forward pass makes is as large as [N, V]."""
    x, weight, targets = problem(400, 37)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_cross_entropy(x, weight, targets, cap=CAP)
    assert largest <= max(19 * 37, 400 * 12)


@pytest.mark.parametrize("rows", [1, 19, 64])
def test_a_teacher_is_part_of_the_target(rows: int) -> None:
    share = torch.linspace(0, 1, rows)
    x, weight, targets = problem(rows, 37)
    teacher, weights = problem(rows, 37, seed=1)[0], torch.linspace(0, 2, rows)
    logs = [F.log_softmax(CAP * torch.tanh(states @ weight.T / CAP), -1) for states in (x, teacher.detach())]
    taught = logs[1].detach()
    divergences = (taught.exp() * (taught - logs[0])).sum(-1)
    losses = -logs[0].gather(-1, targets[:, None])[:, 0]
    expected = (weights * ((1 - share) * losses + share * divergences)).sum()
    dx, dw = torch.autograd.grad(expected, (x, weight))
    total, each, apart = distillation_cross_entropy(x, weight, targets, weights, teacher, share, cap=CAP)
    got_dx, got_dw = torch.autograd.grad(2 * total, (x, weight))
    assert relative(total, expected) < 1e-6
    assert relative(each, weights * losses) < 1e-5
    assert relative(apart, weights * divergences) < 1e-5
    assert relative(got_dx, 2 * dx) < 1e-5
    assert relative(got_dw, 2 * dw) < 1e-5
    assert not each.requires_grad
    assert not apart.requires_grad


def test_no_gradient_reaches_the_teacher_and_a_share_of_nothing_is_no_teacher() -> None:
    x, weight, targets = problem(30, 37)
    teacher, weights = problem(30, 37, seed=1)[0], torch.ones(30)
    total, *_ = distillation_cross_entropy(x, weight, targets, weights, teacher, torch.full((30,), 0.5), cap=CAP)
    assert torch.autograd.grad(total, (x, teacher), allow_unused=True)[1] is None
    alone, _ = weighted_cross_entropy(x, weight, targets, weights, cap=CAP)
    total, *_ = distillation_cross_entropy(x, weight, targets, weights, teacher, torch.zeros(30), cap=CAP)
    assert total.item() == pytest.approx(alone.item(), rel=1e-6)
