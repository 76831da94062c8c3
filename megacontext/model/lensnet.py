"""LensNet: scores every entry of a working context for the query that its raw tail is.

It attends both ways, so the score of an old entry depends on the newest tokens (M5): a causal lens cannot know what is
relevant. Positive: more detail would help; negative: less would do.
"""

from __future__ import annotations

import torch
from torch import nn

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.model.encoder import EncoderBlock, Head
from megacontext.model.norm import rms_norm
from megacontext.model.rotary import Rotary


class LensNet(nn.Module):
    """Entries [B, L, D] to one logit each [B, L] float32. A new LensNet says 0 everywhere."""

    def __init__(self, gpt: GPTConfig, config: MemoryConfig) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.empty(config.max_lod + 1, gpt.n_embd))
        self.blocks = nn.ModuleList([EncoderBlock(gpt) for _ in range(config.lensnet_layers)])
        self.head = Head(config.lensnet_head, gpt.n_embd, 1)

    def forward(self, x: torch.Tensor, lod: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """x [B, L, D], lod int64 [B, L] and the rotary of the entries to logits [B, L]."""
        x = x + self.levels.to(x.dtype)[lod.clamp(max=len(self.levels) - 1)]
        for block in self.blocks:
            x = block(x, rotary)
        return self.head(rms_norm(x)).squeeze(-1).float()  # type: ignore[no-any-return]
