"""The laws of the tree and the working context (T1–T4, W1–W5, A1–A3), each a check that raises.

Checks are vectorised and cost O(entries): they run at every public border, not in tests alone.
"""

from __future__ import annotations

import numpy as np

from megacontext.context.edits import Edits
from megacontext.context.gist_function import levels_of
from megacontext.context.tree import Tree
from megacontext.context.working_context import I64, InvariantError, WorkingContext


def check_budget(context: WorkingContext, budget: int) -> None:
    """W1: no more entries than the budget."""
    if len(context) > budget:
        raise InvariantError(f"W1: {len(context)} entries in a budget of {budget}.")


def check_tail(context: WorkingContext, tail: int) -> None:
    """W3: the last `tail` tokens are raw."""
    ends = context.starts + context.spans
    wrong = np.flatnonzero((ends > context.tokens - tail) & (context.lod > 0))
    if wrong.size:
        raise InvariantError(f"W3: {context.describe(int(wrong[0]))} lies in the raw tail of {tail} tokens.")


def check_exists(context: WorkingContext, tokens: int, max_lod: int | None = None) -> None:
    """W4: every entry is a node of a tree over `tokens` tokens."""
    levels = levels_of(tokens, context.block_size, max_lod)
    wrong = np.flatnonzero((context.lod > levels) | (context.starts + context.spans > tokens))
    if wrong.size:
        raise InvariantError(
            f"W4: {context.describe(int(wrong[0]))} is not in a tree of {tokens} tokens and {levels} levels."
        )


def check_working_context(
    context: WorkingContext, *, budget: int, tail: int, tokens: int, max_lod: int | None = None
) -> None:
    """W1 to W4 at once, and that the context covers the whole history."""
    context.check()
    check_budget(context, budget)
    check_tail(context, tail)
    check_exists(context, tokens, max_lod)
    if context.tokens != tokens:
        raise InvariantError(f"W2: the entries cover {context.tokens} of {tokens} tokens.")


def check_edit(before: WorkingContext, after: WorkingContext, edits: Edits) -> None:
    """W5: every entry that was not edited is still there, with the position and σ it had; the cost is as accounted."""
    touched = np.zeros(len(before), bool)
    touched[edits.expand] = True
    touched[edits.members(before.block_size).reshape(-1)] = True
    kept = np.flatnonzero(~touched)
    where = np.searchsorted(after.starts, before.starts[kept])
    inside = np.minimum(where, max(0, len(after) - 1))
    same = (after.lod[inside] == before.lod[kept]) & (after.index[inside] == before.index[kept])
    same &= (after.positions[inside] == before.positions[kept]) & (after.sigmas[inside] == before.sigmas[kept])
    if not same.all():
        raise InvariantError(
            f"W5: {before.describe(int(kept[np.flatnonzero(~same)[0]]))} changed though it was not edited."
        )
    if len(after) != len(before) + edits.cost(before.block_size):
        raise InvariantError(
            f"W5: {len(before)} entries became {len(after)}, not {len(before) + edits.cost(before.block_size)}."
        )


def check_no_reversal(made: I64, undone: I64, refocus: int, cooldown: int) -> None:
    """A3: `undone` node keys of this refocus are not among those edited the other way, (key, refocus) rows of `made`."""
    recent = made[refocus - made[:, 1] <= cooldown, 0]
    wrong = undone[np.isin(undone, recent)]
    if wrong.size:
        raise InvariantError(f"A3: node {int(wrong[0]):#x} was reversed within {cooldown} refocuses.")


def check_prefix(before: I64, tree: Tree) -> None:
    """T1: committed ids have not changed. `before` holds the ids of an earlier time."""
    now = tree.ids(0, len(before)).numpy() if len(before) <= tree.tokens else None
    if now is None or not np.array_equal(now, before):
        raise InvariantError(f"T1: the first {len(before)} committed ids changed.")


def check_counts(tree: Tree) -> None:
    """T3: the store holds floor(T/r^l) records of each level, no more and no fewer."""
    for level in range(1, tree.levels + 2):
        held, due = tree.store.count(level), tree.count(level)
        if held != due and level <= tree.levels:
            raise InvariantError(f"T3: {held} records at level {level} of {tree.tokens} tokens, not {due}.")
