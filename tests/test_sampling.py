"""Sampling: greedy, top-k, frequencies against the softmax, and rows that do not depend on each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.errors import UserError
from megacontext.inference.sampling import row_generators, sample


def test_temperature_zero_is_argmax_and_draws_nothing() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert torch.equal(sample(logits, 0.0, None, generator), logits.argmax(-1))
    assert torch.equal(sample(logits, 0.0, 3, None), logits.argmax(-1))
    assert torch.equal(before, generator.get_state())


@pytest.mark.parametrize("top_k", [None, 3, 7, 100])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_softmax(temperature: float, top_k: int | None) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0, -3.0, 0.7])
    kept = logits.clone()
    if top_k is not None:
        kept[logits < logits.topk(min(top_k, 7)).values[-1]] = float("-inf")
    expected = (kept / temperature).softmax(-1)
    draws = 40_000
    ids = sample(logits.expand(draws, 7), temperature, top_k, torch.Generator().manual_seed(1))
    found = torch.bincount(ids, minlength=7) / draws
    assert (found - expected).abs().max() < 5 * (0.25 / draws) ** 0.5
    assert found[expected == 0].sum() == 0


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1000, 6), float("-inf"))
    logits[:, 4] = 1.0
    assert (sample(logits, 1.0, None, torch.Generator().manual_seed(0)) == 4).all()


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 10
    assert torch.equal(sample(logits, 1e-30, None, torch.Generator().manual_seed(0)), logits.argmax(-1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 6), st.integers(1, 6))
def test_a_rows_draws_do_not_depend_on_the_other_rows(seed: int, rows: int, more: int) -> None:
    logits = torch.randn(rows + more, 20, generator=torch.Generator().manual_seed(5))
    few, many = row_generators(seed, rows), row_generators(seed, rows + more)
    for _ in range(3):
        assert torch.equal(sample(logits[:rows], 1.0, 5, few), sample(logits, 1.0, 5, many)[:rows])


def test_seeds_and_rows_differ() -> None:
    logits = torch.zeros(8, 1000)
    one, again, other = (sample(logits, 1.0, None, row_generators(seed, 8)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(set(one.tolist())) > 5


@pytest.mark.parametrize(("temperature", "top_k"), [(-1.0, None), (float("nan"), None), (float("inf"), None), (1.0, 0)])
def test_bad_settings_are_named(temperature: float, top_k: int | None) -> None:
    with pytest.raises(UserError, match=r"temperature|top_k"):
        sample(torch.zeros(1, 3), temperature, top_k, None)
