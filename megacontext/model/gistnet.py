"""GistNet: r children in, one vector of the GPT's width out; the same network at every level of the tree.

The default, a transformer over the block and the mean of its outputs, is what compared best among simple compressors
(mean pooling of contextual states, arXiv:2510.20797).
"""

from __future__ import annotations

import torch
from torch import nn

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.model.encoder import EncoderBlock, Head
from megacontext.model.norm import rms_norm


class GistNet(nn.Module):
    """Children [N, r, D] to gists [N, D] with root mean square 1, like the embeddings they stand beside.

    A new GistNet returns the normed mean of the children: every learned path adds to it and starts at zero.
    """

    def __init__(self, gpt: GPTConfig, config: MemoryConfig) -> None:
        super().__init__()
        self.kind, self.pooling = config.gistnet_type, config.gistnet_pooling
        if self.kind == "mean":
            return
        width = gpt.n_embd
        self.positions = nn.Parameter(torch.empty(config.block_size, width))
        self.blocks = nn.ModuleList([EncoderBlock(gpt) for _ in range(config.gistnet_layers)])
        self.head = Head(config.gistnet_head, width, width)
        if self.pooling != "mean":
            self.query = nn.Parameter(torch.empty(width))

    def forward(self, children: torch.Tensor) -> torch.Tensor:
        """[N, r, D] to [N, D]."""
        mean = children.mean(1)
        if self.kind == "mean":
            return rms_norm(mean)
        x = children + self.positions.to(children.dtype)
        if self.pooling == "cls":
            x = torch.cat([x, self.query.to(x.dtype).expand(len(x), 1, -1)], 1)
        for block in self.blocks:
            x = block(x, None)
        return rms_norm(mean + self.head(rms_norm(self._pooled(x))))

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        if self.pooling == "mean":
            return x.mean(1)
        if self.pooling == "cls":
            return x[:, -1]
        weights = torch.softmax(rms_norm(x) @ self.query.to(x.dtype) / x.shape[-1] ** 0.5, dim=1)
        return torch.einsum("nr,nrd->nd", weights, x)
