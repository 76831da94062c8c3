"""Random working contexts for training: which aligned blocks, and aligned groups of blocks, are shown as gists."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megacontext.context.gist_function import check_block_size, levels_of
from megacontext.context.views import ViewPlan
from megacontext.context.working_context import I64, smallest_budget
from megacontext.errors import UserError

Bool = npt.NDArray[np.bool_]


def sample_variants(
    tokens: int,
    block_size: int,
    target_entries: int | npt.NDArray[np.integer],
    tail: int,
    max_lod: int | None,
    sequence: npt.NDArray[np.integer],
    rng: np.random.Generator,
    keep: Bool | None = None,
) -> ViewPlan:
    """Random legal tilings of [0, tokens) with at most `target_entries` entries: one view per item of `sequence` [V].

    The last `tail` tokens stay raw in every view, so views of a sequence share them. A view has as few collapses as its
    target needs: `target - (r - 2) .. target` entries. How many of them are spent on high levels is drawn uniformly
    over what is possible, and nodes of a level uniformly; a loop over levels is the only loop.
    `target_entries` is one number or [V]. `keep` [V, n] marks blocks of the first n that collapse last.
    Raises UserError when a target is below the coarsest tiling.
    """
    check_block_size(block_size)
    views = len(sequence)
    old = max(0, tokens - tail)
    top = levels_of(old, block_size, max_lod)
    target = np.broadcast_to(np.asarray(target_entries, np.int64), (views,))
    least = smallest_budget(tokens, block_size, tail, max_lod)
    if views and int(target.min()) < least:
        raise UserError(
            f"a target of {int(target.min())} entries is below the {least} of the coarsest context of {tokens} tokens "
            f"with a raw tail of {tail}; raise the target or shorten the tail."
        )
    left = np.maximum(0, -(-(tokens - target) // (block_size - 1)))  # [V] collapses to spend
    lod_of_token = np.zeros((views, tokens), np.int8)  # level of the node that shows each token
    free = [np.ones((views, old // block_size**level), bool) for level in range(1, top + 1)]
    for level in range(top, 0, -1):
        last = (
            np.zeros(free[level - 1].shape, bool) if keep is None else _holds(keep, free[level - 1], block_size, level)
        )
        chosen = _choose(free[level - 1], free[: level - 1], left, level, block_size, rng, last)
        left = left - chosen.sum(1) * _collapses(level, block_size)
        for lower in range(1, level):
            covered = np.repeat(chosen, block_size ** (level - lower), axis=1)
            free[lower - 1][:, : covered.shape[1]] &= ~covered
        covered = np.repeat(chosen, block_size**level, axis=1)
        lod_of_token[:, : covered.shape[1]][covered] = level
    assert not left.any(), "collapses left over"
    return _plan(lod_of_token, sequence, block_size)


def _collapses(level: int, block_size: int) -> int:
    """Collapses that make one node of a level out of raw tokens: 1 + r + … + r^(level-1)."""
    return int((block_size**level - 1) // (block_size - 1))


def _holds(keep: Bool, nodes: Bool, block_size: int, level: int) -> Bool:
    """Which nodes of a level [V, n] hold a block to keep."""
    width = block_size ** (level - 1)
    padded = np.zeros((len(keep), nodes.shape[1] * width), bool)
    count = min(padded.shape[1], keep.shape[1])
    padded[:, :count] = keep[:, :count]
    return np.asarray(padded.reshape(*nodes.shape, width).any(2))


def _choose(
    free: Bool, below: list[Bool], left: I64, level: int, block_size: int, rng: np.random.Generator, last: Bool
) -> Bool:
    """Which free nodes of a level become entries [V, n]: as many as leaves a number that lower levels can spend exactly.

    Those in `last` only when the others are used up.
    """
    most = np.minimum(free.sum(1), left // _collapses(level, block_size))
    if level == 1:
        count = left
    else:
        spare = sum((lower.sum(1) for lower in below), np.zeros_like(left))
        least = np.maximum(0, left - spare)  # each node chosen here is one collapse that the levels below lack
        count = least + np.floor(rng.random(len(left)) * (most - least + 1)).astype(np.int64)
    keys = np.where(free, rng.random(free.shape) + last, 2.0)
    rank = np.argsort(np.argsort(keys, axis=1), axis=1)
    return np.asarray(rank < count[:, None])


def _plan(lod_of_token: npt.NDArray[np.int8], sequence: npt.NDArray[np.integer], block_size: int) -> ViewPlan:
    """Entries from the level that shows each token: an entry begins where a token is the first of its node."""
    views, tokens = lod_of_token.shape
    lod = lod_of_token.astype(np.int64)
    powers = np.array([block_size**level for level in range(int(lod.max(initial=0)) + 1)], np.int64)
    begins = np.arange(tokens) % powers[lod] == 0
    length = begins.sum(1)
    view, token = np.nonzero(begins)
    column = np.arange(len(view)) - np.repeat(np.cumsum(length) - length, length)
    out_lod = np.zeros((views, int(length.max(initial=0))), np.int64)
    out_index = np.zeros_like(out_lod)
    out_lod[view, column] = lod[view, token]
    out_index[view, column] = token // powers[lod[view, token]]
    return ViewPlan(out_lod, out_index, length, np.asarray(sequence, np.int64), block_size)
