"""A small bidirectional transformer: what GistNet and LensNet are made of.

Pre-norm blocks of the GPT's width with QK norm and relu² MLPs; output projections start at zero, so a new encoder is
the identity and a new memory is what its pooling makes of the embeddings.
"""

from __future__ import annotations

import torch
from torch import nn

from megacontext.config import GPTConfig
from megacontext.model.attention import Linear
from megacontext.model.mlp import MLP
from megacontext.model.norm import rms_norm
from megacontext.model.rotary import Rotary, rotate_and_norm


class EncoderBlock(nn.Module):
    """Attention of every entry to every other, then the MLP; [N, L, D] to [N, L, D]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.n_head, config.head_dim
        self.c_qkv = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
        """x [N, L, D]; rotary: positions of the entries, or None."""
        batch, length, _ = x.shape
        qkv = self.c_qkv(rms_norm(x)).view(batch, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.unbind(2)
        q, k = (rms_norm(part) if rotary is None else rotate_and_norm(part, rotary) for part in (q, k))
        y = nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.c_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return x + self.mlp(rms_norm(x))  # type: ignore[no-any-return]


class Head(nn.Module):
    """`linear`: one matrix. `mlp`: two with relu² between, added to the linear one's input; [..., D] to [..., out]."""

    def __init__(self, kind: str, width: int, out: int) -> None:
        super().__init__()
        self.hidden = Linear(width, 2 * width) if kind == "mlp" else None
        self.c_proj = Linear(2 * width if kind == "mlp" else width, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.hidden is not None:
            x = self.hidden(x).clamp(min=0).square()
        return self.c_proj(x)  # type: ignore[no-any-return]
