"""Finding the blocks that a query asks for: best-first descent of the tree by routing keys.

A node's match bounds those below it, so the search ends with what a scan of every block would have found, having read
a small part of them; `max_visits` bounds the work, whatever the length of the history.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megacontext.context.tree import Tree
from megacontext.model.memory import Memory

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


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

    At most `max_visits` nodes are opened (32 reads each); `exact` says whether that was enough.
    """
    r, blocks = tree.block_size, before // tree.block_size
    heap: list[tuple[float, int, int]] = []  # (-match, level, index)

    def push(level: int, index: I64) -> None:
        index = index[index * r ** (level - 1) < blocks]
        if len(index):
            keys = memory.keys(tree.records(level, index).float().to(query.device))
            matches = memory.match(query, keys).cpu().double().numpy()
            for node, found in zip(index.tolist(), matches.tolist(), strict=True):
                heapq.heappush(heap, (-found, level, node))

    for level in range(tree.levels, 0, -1):  # the nodes without a parent
        push(level, np.arange(tree.count(level + 1) * r, tree.count(level), dtype=np.int64))
    best: list[tuple[float, int]] = []
    visits = 0
    while heap and len(best) < top_k and (visits < max_visits or heap[0][1] == 1):
        bound, level, index = heapq.heappop(heap)
        if level == 1:
            best.append((-bound, index))
            continue
        visits += 1
        push(level - 1, np.arange(index * r, (index + 1) * r, dtype=np.int64))
    exact = len(best) == top_k or not heap
    leaves = sorted((-bound, -index) for bound, level, index in heap if level == 1)[::-1]
    missing = top_k - len(best)
    best += [(found, -index) for found, index in leaves[:missing]]
    rest = leaves[missing:]
    return Found(
        np.array([index for _, index in best], np.int64),
        np.array([match for match, _ in best]),
        np.array([match for match, _ in rest]),
        visits,
        exact,
    )


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
