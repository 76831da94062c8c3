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

OPENED_AT_ONCE = 16  # reading nodes one by one would cost more than the few that need not have been read


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
    roots = [np.arange(tree.count(level + 1) * r, tree.count(level)) for level in range(1, tree.levels + 1)]
    opened = [
        _matched(tree, memory, query, level, index[index * r ** (level - 1) < blocks])
        for level, index in enumerate(roots, 1)
    ]
    nodes = np.concatenate(opened) if opened else np.empty((0, 3))  # match, level, index
    visits, exact = 0, False
    while True:
        leaf = nodes[:, 1] == 1
        matches = nodes[leaf, 0]
        least = np.partition(matches, -top_k)[-top_k] if len(matches) >= top_k else -np.inf
        worth = np.flatnonzero(~leaf & (nodes[:, 0] > least))
        exact = not len(worth)
        if exact or visits >= max_visits:
            break
        chosen = worth[np.argsort(-nodes[worth, 0], kind="stable")[: min(OPENED_AT_ONCE, max_visits - visits)]]
        visits += len(chosen)
        parts = [np.delete(nodes, chosen, axis=0)]
        for level in np.unique(nodes[chosen, 1]).astype(int).tolist():
            parents = nodes[chosen[nodes[chosen, 1] == level], 2].astype(np.int64)
            children = np.sort((parents[:, None] * r + np.arange(r)).reshape(-1))
            children = children[children * r ** (level - 2) < blocks]
            parts.append(_matched(tree, memory, query, level - 1, children))
        nodes = np.concatenate(parts)
    found = nodes[nodes[:, 1] == 1]
    found = found[np.lexsort((-found[:, 2], -found[:, 0]))]  # of equals the newest
    return Found(found[:top_k, 2].astype(np.int64), found[:top_k, 0], found[top_k:, 0], visits, exact)


def _matched(
    tree: Tree, memory: Memory, query: torch.Tensor, level: int, index: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """Nodes of a level as rows (match, level, index)."""
    rows = np.empty((len(index), 3))
    rows[:, 1], rows[:, 2] = level, index
    if len(index):
        keys = memory.keys(tree.records(level, index).to(query.device, torch.float32))
        rows[:, 0] = memory.match(query, keys).cpu().numpy()
    return rows


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
