"""Finding the blocks that a query asks for: best-first descent of the tree by routing keys.

A node's match bounds those below it, so the search ends with what a scan of every block would have found, having read
a small part of them; `max_visits` bounds the work, whatever the length of the history.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megacontext.context.tree import Tree
from megacontext.model.memory import Memory

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

OPENED_AT_ONCE = 32  # reading nodes one by one would cost more than the few that need not have been read


@dataclass(frozen=True)
class Found:
    """LOD1 blocks by falling match: `block` int64 [n], `match` float64 [n]. `exact`: no block matches better.

    `others` are the matches of the further blocks that were read on the way, `visits` the nodes whose children were.
    """

    block: I64
    match: F64
    others: F64
    visits: int
    exact: bool


def search(tree: Tree, memory: Memory, query: torch.Tensor, top_k: int, max_visits: int, before: int) -> Found:
    """The `top_k` blocks that match a query [K] best among those that end at or before token `before`.

    The nodes with the highest bounds are opened a few at a time, at most `max_visits` in all, until no bound is above
    the matches found; `exact` says whether that point was reached.
    """
    r, blocks = tree.block_size, before // tree.block_size
    leaves, inner = _Nodes(), _Nodes()
    for level in range(1, tree.levels + 1):
        index = np.arange(tree.count(level + 1) * r, tree.count(level))
        index = index[index * r ** (level - 1) < blocks]
        (leaves if level == 1 else inner).add(_matched(tree, memory, query, level, index), level, index)
    visits = 0
    while True:
        match = leaves.match
        least = np.partition(match, -top_k)[-top_k] if len(match) >= top_k else -np.inf
        worth = np.flatnonzero(inner.match > least)
        if not len(worth) or visits >= max_visits:
            break
        chosen = worth[np.argsort(-inner.match[worth], kind="stable")[: min(OPENED_AT_ONCE, max_visits - visits)]]
        visits += len(chosen)
        levels, parents = inner.level[chosen], inner.index[chosen]
        inner.match[chosen] = -np.inf  # opened: never worth it again
        for level in np.unique(levels).tolist():
            index = (np.sort(parents[levels == level])[:, None] * r + np.arange(r)).reshape(-1)
            index = index[index * r ** (level - 2) < blocks]
            matches = _matched(tree, memory, query, level - 1, index)
            (leaves if level == 2 else inner).add(matches, level - 1, index)
    order = np.lexsort((-leaves.index, -leaves.match))  # of equals the newest
    block, match = leaves.index[order], leaves.match[order]
    return Found(block[:top_k], match[:top_k], match[top_k:], visits, not len(worth))


class _Nodes:
    """Nodes and their matches: three columns of one length."""

    def __init__(self) -> None:
        self.match, self.level, self.index = np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)

    def add(self, match: F64, level: int, index: I64) -> None:
        self.match = np.concatenate([self.match, match])
        self.level = np.concatenate([self.level, np.full(len(index), level)])
        self.index = np.concatenate([self.index, index])


def _matched(tree: Tree, memory: Memory, query: torch.Tensor, level: int, index: I64) -> F64:
    """Matches [n] of nodes of a level."""
    if not len(index):
        return np.empty(0)
    keys = memory.keys(tree.records(level, index).to(query.device, torch.float32))
    return memory.match(query, keys).cpu().double().numpy()


def scan(tree: Tree, memory: Memory, query: torch.Tensor, top_k: int, before: int, batch: int = 1 << 14) -> Found:
    """What `search` finds, by comparing the query with every block: the slow reference, and a baseline."""
    blocks = min(before // tree.block_size, tree.count(1))
    parts = [
        memory.match(
            query, memory.keys(tree.record_range(1, start, min(start + batch, blocks)).float().to(query.device))
        )
        for start in range(0, blocks, batch)
    ]
    matches = torch.cat(parts).cpu().double().numpy() if parts else np.empty(0)
    order = np.lexsort((-np.arange(blocks), -matches))
    return Found(order[:top_k].astype(np.int64), matches[order[:top_k]], matches[order[top_k:]], blocks, True)
