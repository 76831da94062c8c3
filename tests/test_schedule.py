"""Learning rate and momentum schedules at their corners."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacontext.train.schedule import lr_multiplier, muon_momentum


def test_default_is_flat_then_falls_to_zero_over_the_last_fifth() -> None:
    values = [lr_multiplier(step, 100) for step in range(101)]
    assert values[:81] == [1.0] * 81
    assert values[81:] == pytest.approx([(100 - step) / 20 for step in range(81, 101)])


def test_warmup_and_final_share() -> None:
    values = [lr_multiplier(step, 50, warmup_ratio=0.1, warmdown_ratio=0.5, final_lr_frac=0.2) for step in range(51)]
    assert values[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert values[50] == pytest.approx(0.2)
    assert values[40] == pytest.approx(0.4 + 0.6 * 0.2)


@given(st.integers(1, 5000), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1), st.data())
def test_never_leaves_zero_to_one(
    steps: int, warmup: float, warmdown: float, final: float, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, steps))
    assert 0.0 <= lr_multiplier(step, steps, warmup, warmdown, final) <= 1.0


def test_momentum_rises_for_300_steps() -> None:
    assert muon_momentum(0) == 0.85
    assert muon_momentum(150) == pytest.approx(0.90)
    assert muon_momentum(300) == muon_momentum(10_000) == pytest.approx(0.95)
