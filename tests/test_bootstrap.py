"""The paired bootstrap against a plain loop, against theory, and on what cannot be resampled."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.errors import UserError
from megacontext.eval.bootstrap import Interval, Resampler

NUMBERS = st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(values=NUMBERS, seed=st.integers(0, 99))
def test_ratio_equals_a_plain_loop(values: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    below = rng.uniform(0.5, 2, len(values))
    groups = rng.integers(0, 4, len(values))
    draws = Resampler.of(groups, samples=50, seed=seed)
    found = draws.ratio(values, below)
    ratios = []
    for counts in draws.counts:
        picked = [k for k, count in enumerate(counts) for _ in range(int(count))]
        if picked:
            ratios.append(sum(values[k] for k in picked) / sum(below[k] for k in picked))
    assert found.value == pytest.approx(sum(values) / below.sum())
    assert found.low == pytest.approx(np.quantile(ratios, 0.025))
    assert found.high == pytest.approx(np.quantile(ratios, 0.975))


def test_windows_of_a_document_are_drawn_together() -> None:
    draws = Resampler.of(["a", "b", "a", "c", "b"], samples=200)
    assert (draws.counts[:, 0] == draws.counts[:, 2]).all()
    assert (draws.counts[:, 1] == draws.counts[:, 4]).all()
    assert (draws.counts[:, [0, 1, 3]].sum(1) == 3).all()
    assert len(np.unique(draws.counts[:, 0])) > 2


def test_interval_of_a_mean_is_that_of_theory_and_covers() -> None:
    rng = np.random.default_rng(3)
    covered, widths = 0, []
    for trial in range(200):
        sample = rng.normal(1.0, 2.0, 60)
        found = Resampler.of(np.arange(60), samples=400, seed=trial).mean(sample)
        covered += found.low <= 1.0 <= found.high
        widths.append(found.high - found.low)
    assert 0.90 <= covered / 200 <= 0.98
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2 / math.sqrt(60), rel=0.05)


def test_pairing_removes_what_windows_share() -> None:
    rng = np.random.default_rng(0)
    hardness = rng.normal(4, 2, 80)
    better, worse = hardness + rng.normal(0, 0.01, 80), hardness + 0.05 + rng.normal(0, 0.01, 80)
    draws = Resampler.of(np.arange(80))
    assert draws.mean(worse).low < draws.mean(better).value
    assert draws.mean(worse - better).low > 0


def test_weights_and_unknown_windows() -> None:
    draws = Resampler.of(np.arange(3))
    assert draws.mean([1.0, 4.0, math.nan], [3.0, 1.0, 9.0]).value == pytest.approx(7 / 4)
    assert math.isnan(draws.mean([math.nan] * 3).value)
    assert math.isnan(draws.ratio([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]).low)


def test_one_window_has_an_interval_of_no_width_and_none_is_an_error() -> None:
    assert Resampler.of([7]).mean([2.5]) == Interval(2.5, 2.5, 2.5)
    with pytest.raises(UserError, match="at least one window"):
        Resampler.of([])
