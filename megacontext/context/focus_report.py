"""What a refocus did, in the numbers that telemetry and the report card show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megacontext.context.working_context import F64, I64, WorkingContext


@dataclass(frozen=True, kw_only=True)
class FocusReport:
    """One refocus. Ages and residencies in refocuses; `nan` where there was nothing to average.

    `forced_collapses` made room for the budget since the refocus before; `forced_reversals` of them undid an expansion
    within its cooldown, because nothing else was left. `removed_*` are ages of entries at the moment they were edited
    away, `age_mean` is of those that are there now.
    """

    refocus: int
    entries: int
    budget: int
    expands: int
    collapses: int
    forced_collapses: int
    forced_reversals: int
    removed_age_mean: float
    removed_age_p95: float
    age_mean: float
    score_mean: float
    score_std: float
    score_min: float
    score_max: float

    @property
    def edits(self) -> int:
        return self.expands + self.collapses

    @property
    def swap_rate(self) -> float:
        """Chosen edits per entry."""
        return self.edits / self.entries if self.entries else 0.0

    @property
    def utilization(self) -> float:
        """Share of the budget in use."""
        return self.entries / self.budget


def summarize(
    before: WorkingContext, after: WorkingContext, born: I64, refocus: int, scores: F64 | None
) -> dict[str, Any]:
    """Ages of the entries that left and of those that stayed (`born` [L] of `before`), and the spread of the scores."""
    stayed = np.isin(before.starts * 64 + before.lod, after.starts * 64 + after.lod)
    gone, ages = refocus - born[~stayed], refocus - born[stayed]
    known = scores is not None and scores.size > 0
    return {
        "removed_age_mean": float(gone.mean()) if gone.size else float("nan"),
        "removed_age_p95": float(np.percentile(gone, 95)) if gone.size else float("nan"),
        "age_mean": float(ages.mean()) if ages.size else float("nan"),
        "score_mean": float(scores.mean()) if known and scores is not None else float("nan"),
        "score_std": float(scores.std()) if known and scores is not None else float("nan"),
        "score_min": float(scores.min()) if known and scores is not None else float("nan"),
        "score_max": float(scores.max()) if known and scores is not None else float("nan"),
    }
