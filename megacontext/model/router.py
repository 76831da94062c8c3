"""Routing keys: how a block says which facts it holds, apart from the gist that says what it is about.

A token's feature is a non-negative unit vector of the four tokens that end there. A key is the largest of the features
of the tokens it covers, number by number, and a parent's key the largest of its children's; so a node's match with a
query bounds every match below it, and best-first descent of the tree finds what a flat scan would.

A query is a mixture of the newest tokens' features, by how much each of them asks; that none of them does is one more
choice of that softmax, at a logit of zero. So most text asks nothing, and then whatever matches best is not wanted.
"""

from __future__ import annotations

import torch
from torch import nn

from megacontext.config import MemoryConfig
from megacontext.model.attention import Linear

WINDOW = 4  # tokens a feature sees
QUERY_TOKENS = 32  # newest tokens a query is made of
HIDDEN = 256


class Router(nn.Module):
    """From token embeddings to keys and queries. D width, S slots a block, K numbers a key."""

    def __init__(self, width: int, config: MemoryConfig) -> None:
        super().__init__()
        self.slots, self.width = config.routing_slots, config.routing_width
        self.conv = Linear(WINDOW * width, HIDDEN)
        self.out = Linear(HIDDEN, self.width)
        self.gate = Linear(HIDDEN, 1)
        self.recency = nn.Parameter(torch.empty(QUERY_TOKENS))
        self.log_scale = nn.Parameter(torch.empty(()))

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [N, T, D] to features [N, T, K] and the hidden states [N, T, 256] they come from."""
        padded = nn.functional.pad(x, (0, 0, WINDOW - 1, 0))
        length = x.shape[1]
        window = torch.cat([padded[:, WINDOW - 1 - back : WINDOW - 1 - back + length] for back in range(WINDOW)], -1)
        hidden = self.conv(window).relu()
        return nn.functional.normalize(self.out(hidden).float().relu(), dim=-1, eps=1e-6), hidden

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings of blocks [N, r, D] to their keys [N, S, K]: slot s covers tokens [s·r/S, (s+1)·r/S)."""
        feature, _ = self.features(x)
        return feature.view(len(x), self.slots, -1, self.width).amax(2)

    def query(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the newest tokens [N, Q, D], Q <= 32, to unit queries [N, K] and the logits [N] that something
        is asked: which tokens ask, and whether any does, is learned."""
        feature, hidden = self.features(x)
        asks = self.gate(hidden).squeeze(-1).float() + self.recency[-x.shape[1] :]
        mixed = torch.einsum("nq,nqk->nk", asks.softmax(-1), feature)
        return nn.functional.normalize(mixed, dim=-1, eps=1e-6), asks.logsumexp(-1)

    def logits(self, match: torch.Tensor) -> torch.Tensor:
        """Matches to logits of a softmax over nodes, at the learned scale."""
        return match * self.log_scale.exp()


def match(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Matches [..., N] of queries [..., K] with keys [..., N, S, K]: the best slot's inner product."""
    if query.dim() == 1:  # one query for all: a matrix product, several times as fast
        return (keys @ query).amax(-1)
    return torch.einsum("...k,...nsk->...ns", query, keys).amax(-1)
