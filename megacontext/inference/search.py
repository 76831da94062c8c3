"""Finding the blocks that a query asks for: best-first descent of the tree by routing keys.

A node's match bounds those below it, so the search ends with what a scan of every block would have found, having read
a small part of them. `max_visits` bounds the work, whatever the length of the history.

In a long history the bounds of the upper levels may all be higher than the match of any block, since a node's keys are
the largest of those it covers. Visits that go to the highest bounds alone then never come down to a block. So a share
of the visits is divided among the levels, the highest level first.
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
_DESCENT_PART = 3  # the last 1/3 of the visits is divided among the levels


@dataclass(frozen=True)
class Found:
    """LOD1 blocks by falling match: `block` int64 [n], `match` float64 [n], all finite. `exact`: no block matches better.

    `others` are the matches of the further blocks that were read on the way, `visits` the nodes whose children were.
    n is 0 when nothing was found: no block ends before the limit of the search, or no match is a finite number.
    """

    block: I64
    match: F64
    others: F64
    visits: int
    exact: bool


def search(tree: Tree, memory: Memory, query: torch.Tensor, top_k: int, max_visits: int, before: int) -> Found:
    """The `top_k` blocks that match a query [K] best among those that end at or before token `before`.

    A visit opens one node: the matches of its children are read. Each visit opens the node with the highest bound. The
    search ends when no bound is above the `top_k`-th match (`exact`), and after `max_visits` visits at the latest.
    The last third of the visits has a cap, the highest level that may be opened (`_caps`).

    So blocks are reached, whatever the keys are and however long the history is. Proof: a visit at level l adds nodes of
    level l - 1, and the cap falls by at most 1 per visit, from the highest level to 2. So a node at or below the cap
    exists before every visit, and the last visit opens a node of level 2. `levels - 1` visits are enough for a block;
    `(levels - 1)·(⌈top_k/r⌉ + 1)` are enough for `top_k` blocks, where as many end before `before`.
    """
    r, blocks = tree.block_size, before // tree.block_size
    leaves, inner = _Nodes(), _Nodes()
    for level in range(1, tree.levels + 1):
        index = np.arange(tree.count(level + 1) * r, tree.count(level))
        index = index[index * r ** (level - 1) < blocks]
        (leaves if level == 1 else inner).add(_matched(tree, memory, query, level, index), level, index)
    steps, wanted = max(1, tree.levels - 1), -(-top_k // r) + 1
    descent = min(max_visits, max(max_visits // _DESCENT_PART, steps * wanted))
    visits = 0
    while True:
        match = leaves.match
        least = np.partition(match, -top_k)[-top_k] if len(match) >= top_k else -np.inf
        worth = np.flatnonzero(inner.match > least)
        if not len(worth) or visits >= max_visits:
            break
        chosen = _chosen(inner, worth, _caps(max_visits - visits, descent, tree.levels), r)
        visits += len(chosen)
        levels, parents = inner.level[chosen], inner.index[chosen]
        inner.match[chosen] = -np.inf  # opened: never worth it again
        for level in np.unique(levels).tolist():
            index = (np.sort(parents[levels == level])[:, None] * r + np.arange(r)).reshape(-1)
            index = index[index * r ** (level - 2) < blocks]
            matches = _matched(tree, memory, query, level - 1, index)
            (leaves if level == 2 else inner).add(matches, level - 1, index)
    return _ranked(leaves.index, leaves.match, top_k, visits, not len(worth))


def _caps(left: int, descent: int, levels: int) -> I64:
    """Caps [n] of the next n visits: the highest level that each may open, when `left` visits are left.

    The last `descent` visits are shared equally among the levels from `levels` down to 2. A level may be opened until
    its share ends; the visits before know no cap.
    """
    share = max(1, descent // max(1, levels - 1))
    after = left - np.arange(min(OPENED_AT_ONCE, left))  # visits left at each of them
    caps: I64 = np.where(after > descent, levels, 1 - (-after // share))
    return caps


def _chosen(inner: _Nodes, worth: npt.NDArray[np.intp], caps: I64, r: int) -> npt.NDArray[np.intp]:
    """Nodes to open: the highest bounds that the caps allow, of equals the lowest level, of these the newest."""
    level = inner.level[worth]
    caps[0] = max(caps[0], level.min())  # one node is opened, also where no bound at or below the cap is high enough
    allowed = worth[level <= caps[0]]
    if len(allowed) > len(caps):
        bound = inner.match[allowed]
        allowed = allowed[bound >= np.partition(bound, -len(caps))[-len(caps)]]
    newest = -inner.index[allowed] * r ** inner.level[allowed]
    order: npt.NDArray[np.intp] = allowed[np.lexsort((newest, inner.level[allowed], -inner.match[allowed]))][
        : len(caps)
    ]
    return order[inner.level[order] <= caps[: len(order)]]


def _ranked(block: I64, match: F64, top_k: int, visits: int, exact: bool) -> Found:
    """The best `top_k` of the blocks whose match is a finite number, of equals the newest."""
    finite = np.isfinite(match)
    block, match = block[finite], match[finite]
    order = np.lexsort((-block, -match))
    block, match = block[order].astype(np.int64), match[order]
    return Found(block[:top_k], match[:top_k], match[top_k:], visits, exact)


class _Nodes:
    """Nodes and their matches: three columns of one length."""

    def __init__(self) -> None:
        self.match, self.level, self.index = np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)

    def add(self, match: F64, level: int, index: I64) -> None:
        self.match = np.concatenate([self.match, match])
        self.level = np.concatenate([self.level, np.full(len(index), level)])
        self.index = np.concatenate([self.index, index])


def _matched(tree: Tree, memory: Memory, query: torch.Tensor, level: int, index: I64) -> F64:
    """Matches [n] of nodes of a level; -inf where the match is no number."""
    if not len(index):
        return np.empty(0)
    keys = memory.keys(tree.records(level, index).to(query.device, torch.float32))
    return _numbers(memory.match(query, keys))


def _numbers(match: torch.Tensor) -> F64:
    found = match.cpu().double().numpy()
    return np.where(np.isnan(found), -np.inf, found)


def scan(tree: Tree, memory: Memory, query: torch.Tensor, top_k: int, before: int, batch: int = 1 << 14) -> Found:
    """What `search` finds, by comparing the query with every block: the slow reference, and a baseline."""
    blocks = min(before // tree.block_size, tree.count(1))
    parts = [
        memory.match(
            query, memory.keys(tree.record_range(1, start, min(start + batch, blocks)).float().to(query.device))
        )
        for start in range(0, blocks, batch)
    ]
    matches = _numbers(torch.cat(parts)) if parts else np.empty(0)
    return _ranked(np.arange(blocks), matches, top_k, blocks, True)
