"""Plans of working contexts, made one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megacontext.context.views import ViewPlan
from megacontext.context.working_context import WorkingContext


def plan_of(contexts: Sequence[WorkingContext], sequence: Sequence[int] | None = None) -> ViewPlan:
    """A plan from single working contexts (of one block size), padded to the longest."""
    length = np.array([len(context) for context in contexts], np.int64)
    lod = np.zeros((len(contexts), int(length.max(initial=0))), np.int64)
    index = np.zeros_like(lod)
    for view, context in enumerate(contexts):
        lod[view, : len(context)], index[view, : len(context)] = context.lod, context.index
    owner = np.arange(len(contexts)) if sequence is None else np.asarray(sequence)
    return ViewPlan(lod, index, length, owner.astype(np.int64), contexts[0].block_size)


def all_raw_plan(sequences: int, tokens: int, block_size: int) -> ViewPlan:
    """The baseline of a batch: one raw view per sequence."""
    index = np.broadcast_to(np.arange(tokens, dtype=np.int64), (sequences, tokens))
    length = np.full(sequences, tokens, np.int64)
    return ViewPlan(np.zeros((sequences, tokens), np.int64), index, length, np.arange(sequences), block_size)
