"""What a session did, in the numbers of the report card (`runtime/*`)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from megacontext.context.focus_report import FocusReport

WINDOW = 4096  # newest tokens whose latencies are kept, and refocuses whose reports are


@dataclass
class SessionStats:
    """Counts since the session was opened. An entry is recomputed when it is not a token that is computed at last.

    `latencies_ms` of the newest generated tokens, refocus included; `reports` of the newest refocuses.
    """

    appended: int = 0
    generated: int = 0
    entries_computed: int = 0
    entries_recomputed: int = 0
    refocuses: int = 0
    swap_rate_sum: float = 0.0
    utilization_sum: float = 0.0
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    reports: deque[FocusReport] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add_refocus(self, report: FocusReport) -> None:
        self.refocuses += 1
        self.swap_rate_sum += report.swap_rate
        self.reports.append(report)

    def add_token(self, entries: int, budget: int, latency_ms: float) -> None:
        """A generated token, predicted from `entries` entries."""
        self.generated += 1
        self.utilization_sum += entries / budget
        self.latencies_ms.append(latency_ms)

    @property
    def swap_rate(self) -> float:
        """Chosen edits per entry, mean over refocuses."""
        return self.swap_rate_sum / self.refocuses if self.refocuses else float("nan")

    @property
    def residency(self) -> float:
        """Refocuses that an entry stayed: mean age of those that left, over the refocuses in which some did."""
        ages = np.array([report.removed_age_mean for report in self.reports])
        known = ages[np.isfinite(ages)]
        return float(known.mean()) if known.size else float("nan")

    @property
    def token_budget_utilization(self) -> float:
        """Share of the budget in use, mean over generated tokens."""
        return self.utilization_sum / self.generated if self.generated else float("nan")

    @property
    def recompute_tokens_per_token(self) -> float:
        """Entries recomputed per generated token."""
        return self.entries_recomputed / self.generated if self.generated else float("nan")

    @property
    def latency_ms(self) -> float:
        """Median time to a token."""
        return float(np.median(self.latencies_ms)) if self.latencies_ms else float("nan")

    @property
    def latency_p99_ms(self) -> float:
        return float(np.percentile(self.latencies_ms, 99)) if self.latencies_ms else float("nan")

    def metrics(self) -> dict[str, float]:
        """The `runtime/*` metrics; nan where there was nothing to measure."""
        names = (
            "swap_rate",
            "residency",
            "token_budget_utilization",
            "latency_ms",
            "latency_p99_ms",
            "recompute_tokens_per_token",
        )
        return {f"runtime/{name}": float(getattr(self, name)) for name in names}
