"""RMS norm without weights (Zhang and Sennrich, 2019, arXiv:1910.07467), with a backward that keeps only its output.

Autograd through the plain formula keeps several copies of the input and walks over memory a dozen times; on a CPU that
costs more than the attention it surrounds. Under a compiler, which makes one kernel of it, the plain formula it is.
"""

from __future__ import annotations

from typing import Any

import torch

EPS = torch.finfo(torch.float32).eps


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of `dtype` values are taken: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def inverse_rms(x: torch.Tensor) -> torch.Tensor:
    """1/√(mean(x²) + eps) over the last dimension, kept with size 1, in at least float32."""
    size: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    return size.square_().mul_(1 / x.shape[-1]).add_(EPS).rsqrt_()


def norm_backward(grad: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Gradient of the input from the output y = x·scale: scale·(grad − y·mean(grad·y)), in the dtype of `scale`."""
    grad, y = grad.to(scale.dtype), y.to(scale.dtype)
    along = torch.sum(grad * y, dim=-1, keepdim=True).mul_(-1 / y.shape[-1])
    return torch.addcmul(grad, y, along).mul_(scale)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scale = inverse_rms(x)
        y = (x * scale).to(dtype)
        ctx.save_for_backward(y, scale)
        ctx.input_dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        y, scale = ctx.saved_tensors
        return norm_backward(grads[0], y, scale).to(ctx.input_dtype), None


def rms_norm(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x / rms(x) over the last dimension; the result has `dtype`, that of x unless given. Any shape [..., D]."""
    if torch.compiler.is_compiling():  # a compiler fuses the plain formula, and cannot trace the other in every case
        full = x.to(wide(x.dtype))
        return (full * full.square().mean(-1, keepdim=True).add(EPS).rsqrt()).to(dtype or x.dtype)
    return _RMSNorm.apply(x, dtype or x.dtype)  # type: ignore[no-any-return, no-untyped-call]
