"""Does the lens know what is worth expanding? Its scores beside the measured utility of every single expansion.

The utility of an entry is what expanding it, and nothing else, takes off the mean loss of tokens after it: of the raw
tail (what the lens is trained on), and of the tokens that follow (what it is for). All single edits of a context are
one batch. Beside that: how scores of the same old entries change when the tail, the query, is another one (M5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megacontext.context.store_branch import BranchStore
from megacontext.context.tree import Tree
from megacontext.context.working_context import WorkingContext
from megacontext.errors import UserError
from megacontext.eval.bootstrap import Interval, Resampler
from megacontext.eval.counterfactual import entry_utilities
from megacontext.eval.windows import Windows
from megacontext.inference.focus import LensScorer
from megacontext.model.gpt import GPT

F64 = npt.NDArray[np.float64]
SCORERS: Mapping[str, tuple[bool, bool]] = {  # whether LensNet and the search take part
    "ours": (True, True),
    "lens only": (True, False),
    "routing only": (False, True),
}


@dataclass(frozen=True)
class AuditRow:
    """One scorer over all windows. Intervals are over documents; correlations are means of the windows' own."""

    scorer: str
    corr_tail: Interval  # Spearman with the utilities on the tail
    corr_ahead: Interval  # Spearman with the utilities on the tokens ahead
    corr_other_query: Interval  # Spearman of the scores under another tail with the utilities ahead under this one
    picked: Interval  # utility ahead of the entry scored highest, nats per token
    picked_other: Interval  # utility ahead, under this tail, of the entry scored highest under the other
    change: Interval  # mean |difference| of the scores of old entries under two tails
    corr_queries: Interval  # Spearman between the scores of old entries under two tails


@dataclass(frozen=True)
class Audit:
    """`best` and `mean`: utility ahead, nats per token, of the best single expansion and of one at random."""

    rows: tuple[AuditRow, ...]
    windows: int
    gists: float  # per context
    best: Interval
    mean: Interval


def audit(
    model: GPT,
    windows: Windows,
    *,
    budget: int,
    tail: int,
    foreign: Sequence[int] | None = None,
    scorers: Mapping[str, tuple[bool, bool]] = SCORERS,
    seed: int = 0,
) -> Audit:
    """Audit the lens on contexts by age that leave room for one expansion, so that nothing exceeds `budget` entries.

    `tail` raw tokens are the query. The other query of a window is the tail of window `foreign[window]`, unless given of
    the next one of another document.
    Raises UserError when the model has no memory, or a history has nothing to expand.
    """
    if model.memory is None:
        raise UserError("the checkpoint has no memory, so there is no lens to audit; train one with --mc 1.")
    if not 1 < tail < windows.history_tokens:
        raise UserError(f"a tail of {tail} tokens does not fit a history of {windows.history_tokens}; use 2 or more.")
    others = _elsewhere(windows) if foreign is None else list(foreign)
    columns: dict[str, list[list[float]]] = {name: [] for name in scorers}
    best, mean, gists = [], [], []
    for window in range(len(windows)):
        own = windows.history(window)
        shared = Tree(model.memory)
        shared.append(own[:-tail])
        trees = [Tree(model.memory, BranchStore(shared.store)) for _ in range(2)]
        for tree, query in zip(trees, (own[-tail:], windows.history(others[window])[-tail:]), strict=True):
            tree.append(query)
        context = WorkingContext.by_age(len(own), model.memory.block_size, budget - model.memory.block_size + 1, tail)
        found = entry_utilities(model, trees[0], context, windows.continuation(window), tail)
        if len(found.item) < 2:
            raise UserError(
                f"a history of {len(own)} tokens in {budget} entries has {len(found.item)} gists; nothing to compare. "
                "Use a longer history or a smaller budget."
            )
        best.append(float(found.ahead.max()))
        mean.append(float(found.ahead.mean()))
        gists.append(len(found.item))
        old = np.flatnonzero(context.starts + context.spans <= len(own) - tail)
        for name, (lens, route) in scorers.items():
            scores = [LensScorer(model, tree, tail, lens=lens, route=route)(context) for tree in trees]
            mine, theirs = scores[0][found.item], scores[1][found.item]
            columns[name].append(
                [
                    spearman(mine, found.tail),
                    spearman(mine, found.ahead),
                    spearman(theirs, found.ahead),
                    float(found.ahead[np.argmax(mine)]),
                    float(found.ahead[np.argmax(theirs)]),
                    float(np.abs(scores[0][old] - scores[1][old]).mean()),
                    spearman(scores[0][old], scores[1][old]),
                ]
            )
    draws = Resampler.of(windows.document, seed=seed)
    rows = [
        AuditRow(name, *(draws.mean(column) for column in zip(*table, strict=True))) for name, table in columns.items()
    ]
    return Audit(tuple(rows), len(windows), float(np.mean(gists)), draws.mean(best), draws.mean(mean))


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Rank correlation (Spearman, 1904), ties at their mean rank; nan when either is constant."""
    first, second = ranks(np.asarray(a, np.float64)), ranks(np.asarray(b, np.float64))
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt(float((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / scale if scale else math.nan


def ranks(values: F64) -> F64:
    """Ranks 1, 2, … of values [n]; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts).astype(np.float64)
    mean: F64 = (last - (counts - 1) / 2)[inverse]
    return mean


def next_question(windows: Windows) -> list[int]:
    """Of each window the next one of the same document, the first after the last: another question to one history."""
    own = [np.flatnonzero(windows.document == document) for document in windows.document]
    return [int(same[(np.flatnonzero(same == k)[0] + 1) % len(same)]) for k, same in enumerate(own)]


def _elsewhere(windows: Windows) -> list[int]:
    """Of each window the next one of another document, where there is one."""
    count, document = len(windows), windows.document
    order = [(k + 1 + np.arange(count)) % count for k in range(count)]
    return [int(next((at for at in after if document[at] != document[k]), after[0])) for k, after in enumerate(order)]
