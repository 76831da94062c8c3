"""The only two edits of a working context: a node becomes its r children, or r complete siblings become their parent."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megacontext.context.working_context import I64, WorkingContext
from megacontext.errors import UserError


def _none() -> I64:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Edits:
    """A batch of edits that do not overlap. Numbers are entries of the context they are for, int64.

    `expand`: entries that become their children. `collapse`: the first entry of each sibling group that becomes its parent.
    """

    expand: I64 = field(default_factory=_none)
    collapse: I64 = field(default_factory=_none)

    def __len__(self) -> int:
        return len(self.expand) + len(self.collapse)

    def cost(self, block_size: int) -> int:
        """Entries that the edits add; each adds or frees r - 1."""
        return (len(self.expand) - len(self.collapse)) * (block_size - 1)

    def members(self, block_size: int) -> I64:
        """All entries of the groups that collapse: [groups, r]."""
        return np.asarray(self.collapse[:, None] + np.arange(block_size), np.int64)


def collapsible(context: WorkingContext, tail: int = 0, max_lod: int | None = None) -> I64:
    """First entries of every group of r complete siblings that may become their parent: ascending [groups].

    In a tiling, entries p and p + r - 1 being the first and the last child of one node proves the r - 2 between them.
    Groups that reach into the last `tail` tokens, or whose parent would be above `max_lod`, are not among them.
    """
    lod, index, r = context.lod, context.index, context.block_size
    if len(context) < r:
        return _none()
    first = np.flatnonzero(index[: len(index) - r + 1] % r == 0)
    last = first + r - 1
    fits = (lod[last] == lod[first]) & (index[last] == index[first] + r - 1)
    fits &= (index[last] + 1) * context.spans[first] <= context.tokens - tail
    if max_lod is not None:
        fits &= lod[first] < max_lod
    found: I64 = first[fits]
    return found


def apply(context: WorkingContext, edits: Edits, tail: int = 0, max_lod: int | None = None) -> WorkingContext:
    """The context after a batch of edits, in one pass. Raises UserError for an edit that is not legal, naming it."""
    _check(context, edits, tail, max_lod)
    r = context.block_size
    counts = np.ones(len(context), np.int64)  # entries that each entry becomes
    lod, index = context.lod.copy(), context.index.copy()
    counts[edits.expand] = r
    lod[edits.expand] -= 1
    index[edits.expand] *= r
    counts[edits.members(r)[:, 1:].reshape(-1)] = 0
    lod[edits.collapse] += 1
    index[edits.collapse] //= r
    source = np.repeat(np.arange(len(context)), counts)
    child = np.arange(len(source)) - (np.cumsum(counts) - counts)[source]
    return WorkingContext(lod[source], index[source] + child, r)


def kept_prefix(before: WorkingContext, after: WorkingContext) -> int:
    """Leading entries that two contexts share: what a causal cache over entries may keep."""
    shared = min(len(before), len(after))
    differs = (before.lod[:shared] != after.lod[:shared]) | (before.index[:shared] != after.index[:shared])
    return int(np.argmax(differs)) if differs.any() else shared


def expand_node(context: WorkingContext, token: int) -> Edits:
    """The edit that expands the entry covering a token."""
    return Edits(expand=np.array([context.at_token(token)], np.int64))


def collapse_node(context: WorkingContext, lod: int, index: int) -> Edits:
    """The edit that makes node (lod, index) of its r children. Raises UserError when they are not all entries."""
    first = int(np.searchsorted(context.starts, index * context.block_size**lod))
    if first not in collapsible(context) or context.lod[first] != lod - 1:
        raise UserError(f"the children of node ({lod}, {index}) are not entries of the working context.")
    return Edits(collapse=np.array([first], np.int64))


def _check(context: WorkingContext, edits: Edits, tail: int, max_lod: int | None) -> None:
    expand, collapse = np.asarray(edits.expand), np.asarray(edits.collapse)
    named = np.concatenate([expand, collapse])
    outside = named[(named < 0) | (named >= len(context))]
    if outside.size:
        raise UserError(f"entry {int(outside[0])} is not in a working context of {len(context)} entries.")
    raw = expand[context.lod[expand] < 1]
    if raw.size:
        raise UserError(f"entry {int(raw[0])} is a token; only gists can be expanded.")
    illegal = collapse[~np.isin(collapse, collapsible(context, tail, max_lod))] if collapse.size else collapse
    if illegal.size:
        at = int(illegal[0])
        raise UserError(
            f"entry {at} (lod {int(context.lod[at])}, index {int(context.index[at])}) does not begin a group of "
            f"{context.block_size} complete siblings that may collapse (tail {tail}, highest level {max_lod})."
        )
    touched = np.concatenate([expand, edits.members(context.block_size).reshape(-1)])
    if len(np.unique(touched)) < len(touched):
        raise UserError("two edits of one batch touch the same entry; apply them one after the other.")
