"""What turns children into a gist. The bookkeeping of this package sees vectors and counts, never a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megacontext.errors import UserError


class GistFunction(Protocol):
    """A gist function: r children in, one record out, the same at every level.

    A node's record is one flat vector of R floats: the content gist, with routing keys or anything else beside it.
    Leaf gists may see a causal window of up to c aligned blocks; everything above sees its r children.
    Shapes: n nodes or windows, m blocks of a window (m <= c), r children, R record width.
    """

    @property
    def block_size(self) -> int:
        """r, children of a gist."""

    @property
    def record_width(self) -> int:
        """R, floats of a record."""

    @property
    def leaf_context_blocks(self) -> int:
        """c >= 1, blocks of a leaf window. Windows start at blocks 0, c, 2c, …"""

    @property
    def digest(self) -> str:
        """Identity of the function and its weights. Records of two digests never share a tree."""

    def leaf(self, ids: Tensor) -> Tensor:
        """Records [n, m, R] of windows of whole blocks, ids [n, m, r] int64.

        Each window starts at a block whose number is a multiple of c; record j depends on blocks <= j of its window.
        """

    def inner(self, records: Tensor, level: int) -> Tensor:
        """Records [n, R] of nodes of `level` >= 2 from those of their children, [n, r, R]."""


class MeanGist:
    """The mean of what a node covers: the oracle of the tree, and the gist of checkpoints that never learned one.

    `embed` is a table [V, R], or a function from ids [...] int64 to vectors [..., R]; a table is many times faster,
    since the vectors of the tokens are never written down. Sums run in a fixed order, so a record's bits do not depend
    on how many nodes were computed together. Raises UserError for a block size below 2.
    """

    leaf_context_blocks = 1

    def __init__(
        self, embed: Tensor | Callable[[Tensor], Tensor], block_size: int, width: int, digest: str = "mean"
    ) -> None:
        check_block_size(block_size)
        self.block_size = block_size
        self.record_width = width
        self.digest = digest
        self._embed = embed

    def leaf(self, ids: Tensor) -> Tensor:
        """[n, m, r] int64 -> [n, m, R]."""
        if isinstance(self._embed, Tensor):
            means = torch.nn.functional.embedding_bag(
                ids.flatten(0, -2).to(self._embed.device), self._embed, mode="mean"
            )
            return means.view(*ids.shape[:-1], -1)
        return mean_of_children(self._embed(ids))

    def inner(self, records: Tensor, level: int) -> Tensor:
        """[n, r, R] -> [n, R]."""
        return mean_of_children(records)


def mean_of_children(x: Tensor) -> Tensor:
    """Mean over the last axis but one, [..., r, D] -> [..., D] float32; pairwise, in an order that batching can't change."""
    count = x.shape[-2]
    total = x.float()
    while (rows := total.shape[-2]) > 1:
        half = rows // 2
        paired = total[..., :half, :] + total[..., half : 2 * half, :]
        total = torch.cat([paired, total[..., 2 * half :, :]], dim=-2) if rows % 2 else paired
    return total.squeeze(-2) / count


def build_levels(ids: Tensor, gist: GistFunction, max_lod: int | None = None) -> list[Tensor]:
    """Records of every complete node of a batch of histories, with gradient: ids [B, T] -> [B, floor(T/r^l), R], l = 1, 2, …

    The form that training uses, and the one-shot reference of `Tree`. Stops below `max_lod` when a level would be empty.
    """
    r, c, batch = gist.block_size, gist.leaf_context_blocks, ids.shape[0]
    blocks = ids.shape[1] // r
    levels: list[Tensor] = []
    if blocks == 0 or max_lod == 0:
        return levels
    whole = blocks // c
    parts = []
    if whole:
        windows = ids[:, : whole * c * r].reshape(batch * whole, c, r)
        parts.append(gist.leaf(windows).reshape(batch, whole * c, -1))
    if blocks % c:
        parts.append(gist.leaf(ids[:, whole * c * r : blocks * r].reshape(batch, blocks % c, r)))
    levels.append(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
    while (count := levels[-1].shape[1] // r) and (max_lod is None or len(levels) < max_lod):
        children = levels[-1][:, : count * r].reshape(batch * count, r, -1)
        levels.append(gist.inner(children, len(levels) + 1).reshape(batch, count, -1))
    return levels


def check_block_size(block_size: int) -> None:
    """Raise UserError for a block size that compresses nothing."""
    if block_size < 2:
        raise UserError(
            f"block_size is {block_size}; a gist needs at least 2 children. Use 32, or any number from 2 up."
        )


def levels_of(tokens: int, block_size: int, max_lod: int | None = None) -> int:
    """Levels above the tokens that hold at least one complete node of a history of `tokens` tokens."""
    levels, span = 0, block_size
    while span <= tokens and (max_lod is None or levels < max_lod):
        levels, span = levels + 1, span * block_size
    return levels
