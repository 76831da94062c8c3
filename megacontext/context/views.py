"""Plans of many working contexts at once, and everything that is arithmetic on them: no loop over contexts, no tensors.

Shapes: V views, L entries (padded to the longest), B sequences of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megacontext.context import working_context
from megacontext.context.working_context import F64, I64, InvariantError, WorkingContext
from megacontext.errors import UserError

Bool = npt.NDArray[np.bool_]
IGNORED = -1  # a target that has no loss


@dataclass(frozen=True, eq=False)
class ViewPlan:
    """V working contexts: `lod`, `index` int64 [V, L], `length` int64 [V], `sequence` int64 [V] (which of a batch's).

    Entries at or after a view's length are padding, (0, 0), and count nowhere. Views of a sequence tile the same tokens.
    """

    lod: I64
    index: I64
    length: I64
    sequence: I64
    block_size: int

    @property
    def valid(self) -> Bool:
        """[V, L]: which entries are there."""
        return np.asarray(np.arange(self.lod.shape[1]) < self.length[:, None])

    @property
    def spans(self) -> I64:
        """[V, L] tokens that each entry covers."""
        return working_context.spans(self.lod, self.block_size)

    @property
    def starts(self) -> I64:
        """[V, L] first token of each entry."""
        return self.index * self.spans

    @property
    def positions(self) -> F64:
        """[V, L] mean position of what each entry covers."""
        return working_context.positions(self.lod, self.index, self.block_size)

    @property
    def sigmas(self) -> F64:
        """[V, L] spread of what each entry covers."""
        return working_context.sigmas(self.lod, self.block_size)

    @property
    def tokens(self) -> I64:
        """[V] tokens that each view covers."""
        last, rows = np.maximum(self.length - 1, 0), np.arange(len(self.length))
        return np.where(self.length > 0, (self.starts + self.spans)[rows, last], 0)

    def context(self, view: int) -> WorkingContext:
        """One view as a working context."""
        count = int(self.length[view])
        return WorkingContext(self.lod[view, :count], self.index[view, :count], self.block_size)

    def gather_index(self, level_counts: Sequence[int]) -> I64:
        """[V, L] rows in the concatenation, per sequence, of all levels: [B, sum(level_counts)] flattened to one axis.

        `level_counts` is T and then the nodes of levels 1, 2, …; padding points at the sequence's first token.
        Raises UserError for a node that the levels do not hold.
        """
        counts = np.asarray(level_counts, np.int64)
        top = int(self.lod.max()) if self.lod.size else 0
        if top >= len(counts):
            raise UserError(f"the views use level {top}, but the tree has {len(counts) - 1} levels above the tokens.")
        if (self.index >= counts[self.lod]).any():
            view, at = (int(n) for n in np.argwhere(self.index >= counts[self.lod])[0])
            raise UserError(
                f"view {view} uses node ({self.lod[view, at]}, {self.index[view, at]}), which the tree does not hold."
            )
        offsets = np.cumsum(counts) - counts
        return self.sequence[:, None] * int(counts.sum()) + offsets[self.lod] + self.index

    def target_tokens(self) -> I64:
        """[V, L] the token that each entry predicts, -1 where it has no loss (M1).

        An entry covering [s, e) predicts token e, and counts only where the next entry is raw; the last entry predicts
        the token after the context.
        """
        ends, valid = self.starts + self.spans, self.valid
        next_raw = np.zeros_like(valid)
        next_raw[:, :-1] = self.lod[:, 1:] == 0  # padding looks raw, but only the last entry precedes it
        is_last = np.arange(self.lod.shape[1]) == self.length[:, None] - 1
        return np.where(valid & (next_raw | is_last), ends, IGNORED)

    def check(self) -> None:
        """Raise InvariantError unless every view tiles its tokens and padding is as promised."""
        if (self.lod[~self.valid] != 0).any() or (self.index[~self.valid] != 0).any():
            raise InvariantError("W2: padding of a plan is not (0, 0).")
        ends = self.starts + self.spans
        due = np.concatenate([np.zeros((len(ends), 1), np.int64), ends[:, :-1]], 1)
        wrong = np.argwhere(self.valid & ((self.starts != due) | (self.lod < 0) | (self.index < 0)))
        if wrong.size:
            view, at = (int(n) for n in wrong[0])
            raise InvariantError(
                f"W2: view {view} entry {at} (lod {self.lod[view, at]}, index {self.index[view, at]}) "
                f"starts at token {self.starts[view, at]}, but {due[view, at]} is due."
            )


def next_token_targets(plan: ViewPlan, tokens: npt.NDArray[np.integer]) -> I64:
    """Targets of a plan: [V, L] int64, -1 without loss. `tokens` [B, N] holds each sequence, N >= T.

    The entry that predicts the token after the context has a target only where N > T.
    """
    at = plan.target_tokens()
    at = np.where(at < tokens.shape[1], at, IGNORED)
    found = tokens[plan.sequence[:, None], np.maximum(at, 0)]
    return np.where(at >= 0, found, IGNORED).astype(np.int64)
