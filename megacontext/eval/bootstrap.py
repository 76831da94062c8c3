"""Paired bootstrap (Efron, 1979): how sure a comparison of methods on the same windows is.

All methods are resampled with the same draws, so what the windows have in common cancels. Windows of one document are
not independent: they are drawn together, as one group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megacontext.errors import UserError

F64 = npt.NDArray[np.float64]
SAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure and the percentile interval of its resampled values; the bounds are nan where there are none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampler:
    """The draws that all figures of one table share: how often each of K windows counts, in each of S samples [S, K]."""

    counts: F64

    @classmethod
    def of(cls, groups: npt.ArrayLike, samples: int = SAMPLES, seed: int = 0) -> Resampler:
        """Draw whole groups with replacement; `groups` [K] names the document of each window.

        Raises UserError without windows.
        """
        names, member = np.unique(np.asarray(groups), return_inverse=True)
        if not len(names):
            raise UserError("a bootstrap needs at least one window; give longer documents or a shorter history.")
        rng = np.random.default_rng(seed)
        draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
        return cls(draws[:, member].astype(np.float64))

    def mean(self, values: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Interval:
        """Mean of `values` [K], of weights [K] (such as tokens a window contributes) if given."""
        value = np.asarray(values, np.float64)
        weight = np.ones_like(value) if weights is None else np.asarray(weights, np.float64)
        return self.ratio(value * weight, weight)

    def ratio(self, numerators: npt.ArrayLike, denominators: npt.ArrayLike) -> Interval:
        """Sum of numerators over sum of denominators, [K] each: the ratio of means, not the mean of ratios.

        Windows that are nan in either count nowhere. Samples whose denominators sum to zero are left out; if the whole
        is so, everything is nan.
        """
        above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
        known = np.isfinite(above) & np.isfinite(below)
        above, below = np.where(known, above, 0.0), np.where(known, below, 0.0)
        total = float(below.sum())
        if not known.any() or total == 0:
            return Interval(math.nan, math.nan, math.nan)
        tops, bottoms = self.counts @ above, self.counts @ below
        kept = bottoms != 0
        low, high = np.quantile(tops[kept] / bottoms[kept], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(above.sum()) / total, float(low), float(high))
