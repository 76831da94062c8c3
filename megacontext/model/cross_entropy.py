"""Cross-entropy of a softcapped linear head without the [B·T, V] logits: chunk by chunk, gradients in the same pass.

The logits of a batch are the largest tensor of a small model by far (16 GB for 128k tokens and 32k ids). Since the
loss is a weighted sum, the gradient of each chunk is known the moment its logits are, so the forward pass computes
loss, input gradient and weight gradient together and keeps no logits. The idea is that of Liger Kernel's
FusedLinearCrossEntropy (Hsu et al., 2024, arXiv:2410.10989), written here with plain tensor operations so that it runs
anywhere, and blocked twice: the matrix products run over `_OUTER_ROWS` tokens, the element-wise passes over a block that
stays in the cache. A teacher's states through the same head can be part of the target (Hinton et al., 2015, arXiv:1503.02531).

The softcap, cap·tanh(z/cap), bounds logits to ±cap. So the softmax needs no maximum to be safe: e^cap fits float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from megacontext.model.norm import wide

IGNORE = -1
_CPU_OUTER_ROWS, _CPU_BLOCK_ELEMENTS = 1024, 1 << 17  # measured; a block's floats stay in a 1–2 MB L2 cache
_GPU_OUTER_ELEMENTS = 1 << 27


def _chunks(rows: int, vocab: int, device: torch.device) -> tuple[int, int]:
    """Tokens per matrix product, and per element-wise block."""
    if device.type == "cpu":
        return min(rows, _CPU_OUTER_ROWS), max(1, _CPU_BLOCK_ELEMENTS * torch.get_num_threads() // vocab)
    outer = min(rows, max(256, _GPU_OUTER_ELEMENTS // vocab))
    return outer, outer


def _blocks(begin: int, end: int, size: int) -> Iterator[slice]:
    for start in range(begin, end, size):
        yield slice(start, min(start + size, end))


def softcapped(z: torch.Tensor, cap: float) -> torch.Tensor:
    """cap·tanh(z/cap) in at least float32, for logits of any shape."""
    return torch.tanh(z.to(wide(z.dtype)) / cap) * cap


def _losses_and_grad_(
    z: torch.Tensor,
    dz: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    cap: float,
    lesson: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weighted losses [n] of raw logits z [n, V]; writes the gradient with respect to z into dz (which may be z).

    With a lesson, a teacher's raw logits [n, V], which are used up, and a share [n], that share of the target is the
    teacher's prediction; second result: weighted divergences [n] from it.
    """
    capped = z.to(wide(z.dtype)) if z.dtype != wide(z.dtype) else z
    unit = capped.mul(1 / cap) if capped is z else capped.mul_(1 / cap)
    unit.tanh_()
    p = torch.mul(unit, cap).exp_()
    total = p.sum(dim=-1, keepdim=True)
    column = targets.unsqueeze(-1)
    losses = (total.log() - unit.gather(-1, column).mul_(cap)).squeeze(-1).mul_(weights)
    p.mul_(weights.unsqueeze(-1) / total)
    own, divergences = -weights, None
    if lesson is not None:
        taught, share = lesson
        theirs = taught.to(p.dtype).mul_(1 / cap).tanh_()
        q = torch.mul(theirs, cap).exp_()
        total_q = q.sum(dim=-1, keepdim=True)
        further = torch.linalg.vecdot(q, theirs.sub_(unit)).mul_(cap) / total_q.squeeze(-1)
        divergences = (further + (total.log() - total_q.log()).squeeze(-1)).mul_(weights)
        p.addcmul_(q, (weights * share).unsqueeze(-1) / total_q, value=-1)
        own = weights * (share - 1)
    p.scatter_add_(-1, column, own.unsqueeze(-1))
    squares = unit.mul_(unit)  # the slope of the softcap is 1 − tanh²
    if dz.dtype == p.dtype:
        torch.addcmul(p, p, squares, value=-1, out=dz)
    else:
        dz.copy_(p.addcmul_(p, squares, value=-1))
    return losses, divergences


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        cap: float,
        need: tuple[bool, bool],
        teacher: torch.Tensor | None,
        share: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cast = weight.to(x.dtype)
        rows, vocab = x.shape[0], weight.shape[0]
        outer, inner = _chunks(rows, vocab, x.device)
        columns = targets.clamp(min=0)
        losses, divergences = torch.empty_like(weights), torch.zeros_like(weights)
        dx = torch.empty_like(x) if need[0] else None
        dweight: torch.Tensor | None = None
        logits = x.new_empty((outer, vocab))
        taught = None if teacher is None else torch.empty_like(logits)
        for chunk in _blocks(0, rows, outer):
            z = logits[: chunk.stop - chunk.start]
            torch.mm(x[chunk], cast.t(), out=z)
            if taught is not None and teacher is not None:
                torch.mm(teacher[chunk], cast.t(), out=taught[: len(z)])
            for block in _blocks(chunk.start, chunk.stop, inner):
                at = slice(block.start - chunk.start, block.stop - chunk.start)
                lesson = None if taught is None or share is None else (taught[at], share[block])
                losses[block], far = _losses_and_grad_(z[at], z[at], columns[block], weights[block], cap, lesson)
                if far is not None:
                    divergences[block] = far
            if dx is not None:
                torch.mm(z, cast, out=dx[chunk])
            if need[1]:
                product = torch.mm(z.t(), x[chunk])
                dweight = product.to(weight.dtype) if dweight is None else dweight.add_(product)
        ctx.save_for_backward(dx, dweight)
        ctx.mark_non_differentiable(losses, divergences)
        total = losses.sum() if share is None else torch.lerp(losses, divergences, share).sum()
        return total, losses, divergences

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        grad = grads[0]
        return (
            None if dx is None else (dx * grad).to(dx.dtype),
            None if dweight is None else dweight * grad,
            *(None for _ in range(6)),
        )


def _losses(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float) -> torch.Tensor:
    """Losses [N] with autograd, 0 where the target is ignored; logits of all rows given are materialized."""
    logits = softcapped(F.linear(x, weight.to(x.dtype)), cap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, cap: float, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy in nats of softcapped logits x @ weightᵀ against targets; targets of -1 do not count.

    x [N, D] float32 or bfloat16 (also float64); weight [V, D], cast to the dtype of x; targets [N] int64.
    reduction "mean" (over counted targets), "sum", both scalars, 0 when nothing counts, or "none": [N], 0 where ignored.
    With "none" and gradients wanted, all logits are materialized.
    """
    assert reduction in ("mean", "sum", "none"), reduction
    assert 0 < cap <= 80, f"e^{cap} must fit float32"
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if reduction == "none" or not wants_grad:
        if wants_grad:
            return _losses(x, weight, targets, cap)
        cast = weight.to(x.dtype)
        _, step = _chunks(x.shape[0], weight.shape[0], x.device)
        losses = torch.cat([_losses(x[rows], cast, targets[rows], cap) for rows in _blocks(0, x.shape[0], step)])
        if reduction == "none":
            return losses
        total = losses.sum()
    else:
        total, *_ = _fused(x, weight, targets, (targets != IGNORE).to(wide(x.dtype)), cap)
    return total if reduction == "sum" else total / (targets != IGNORE).sum().clamp(min=1)


def weighted_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, row_weights: torch.Tensor, *, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropies times `row_weights` [N], and the weighted losses [N] themselves, without gradient.

    For sums whose rows count differently and whose parts are looked at; otherwise as `linear_cross_entropy`. Rows with
    a target of -1 need a weight of 0.
    """
    assert 0 < cap <= 80, f"e^{cap} must fit float32"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _fused(x, weight, targets, row_weights.to(wide(x.dtype)), cap)[:2]
    losses = linear_cross_entropy(x, weight, targets, cap=cap, reduction="none") * row_weights
    return losses.sum(), losses


def distillation_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    teacher: torch.Tensor,
    share: torch.Tensor,
    *,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `weighted_cross_entropy`, but for a `share` [N] the target is what the states `teacher` [N, D] predict through the
    same head: the sum of row_weights·((1 - share)·cross-entropy + share·KL(teacher ‖ x)), and weighted cross-entropies
    [N] and divergences [N], without gradient. None flows to the teacher.
    """
    assert 0 < cap <= 80, f"e^{cap} must fit float32"
    return _fused(
        x, weight, targets, row_weights.to(wide(x.dtype)), cap, teacher.detach().to(x.dtype), share.to(wide(x.dtype))
    )


def _fused(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    cap: float,
    teacher: torch.Tensor | None = None,
    share: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    need = (x.requires_grad, weight.requires_grad)
    arguments = (x, weight, targets, weights, cap, need, teacher, share)
    total, losses, divergences = _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return total, losses, divergences
