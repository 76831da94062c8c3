"""Causal self-attention with rotary positions, QK norm and grouped key/value heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megacontext.config import GPTConfig
from megacontext.model.kv_cache import KVCache
from megacontext.model.rotary import Rotary, rotate_and_norm


class Linear(nn.Linear):
    """A matrix without bias whose weight is cast to the dtype of its input at use, so masters can stay float32."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """Attention of q [B, H, Tq, K] over k, v [B, Hkv, Tk, K]: causal, the last query at the last key, unless `mask`
    (bool, True = may attend, broadcast to [B, H, Tq, Tk]) says otherwise. Returns [B, H, Tq, K]. `scale` of the
    products is 1/√K unless given.
    """
    queries, keys = q.shape[2], k.shape[2]
    causal = False
    if mask is None and queries > 1:  # in statements: to a compiler lengths are symbols, and so is what compares them
        if queries == keys:
            causal = True
        else:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def biased(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values with one channel more, whose product adds slope·bias to the logits of keys [B, Tk].

    Slopes halve from head to head, as ALiBi's: 2^(-8h/H) of head h = 1 … H. So neither a mask nor another kernel is
    needed, and a KV cache holds the bias with the keys. The scale of the products must stay 1/√K of the narrow keys.
    """
    heads, width = q.shape[1], q.shape[3]
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=q.device) / heads)
    asks = (slopes * width**0.5).to(q.dtype)[None, :, None, None].expand(*q.shape[:3], 1)
    says = bias.to(k.dtype)[:, None, :, None].expand(*k.shape[:3], 1)
    return torch.cat([q, asks], 3), torch.cat([k, says], 3), nn.functional.pad(v, (0, 1))


class CausalSelfAttention(nn.Module):
    """Projects, rotates, normalizes, attends, projects back; [B, T, D] to [B, T, D]."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.c_q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.c_k = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_v = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.fused_qkv: torch.Tensor | None = None  # set for inference, where weights do not change

    def fuse(self) -> None:
        """Keep the three input projections as one matrix [(H + 2·Hkv)·K, D], sharing memory with the parameters."""
        parts = (self.c_q.weight, self.c_k.weight, self.c_v.weight)
        self.fused_qkv = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, self.fused_qkv.split([len(part) for part in parts]), strict=True):  # type: ignore[no-untyped-call]
            part.data = view

    def project(self, x: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated, normed queries [B, H, T, K] and keys, and values [B, Hkv, T, K], of x [B, T, D]."""
        batch, tokens, _ = x.shape
        weight = self.fused_qkv
        if weight is None:
            weight = torch.cat([self.c_q.weight, self.c_k.weight, self.c_v.weight]).to(x.dtype)
        qkv = F.linear(x, weight).view(batch, tokens, -1, self.head_dim)
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)  # type: ignore[no-untyped-call]
        q, k = rotate_and_norm(qk, rotary).split([self.n_head, self.n_kv_head], dim=2)  # type: ignore[no-untyped-call]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(
        self, x: torch.Tensor, rotary: Rotary, cache: KVCache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.project(x, rotary)
        scale = None
        if rotary.bias is not None:
            q, k, v = biased(q, k, v, rotary.bias)
            scale = self.head_dim**-0.5
        if cache is not None:
            k, v = cache.insert(self.layer, k, v)
        y = attend(q, k, v, mask, scale)[..., : self.head_dim]
        projected: torch.Tensor = self.c_proj(y.transpose(1, 2).reshape(batch, tokens, -1))
        return projected
