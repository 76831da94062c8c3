"""Random views for training: legal, seeded, of the right length; targets by the book (M1)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plans import all_raw_plan, plan_of

from megacontext.context.gist_function import levels_of
from megacontext.context.invariants import check_working_context
from megacontext.context.variants import sample_variants
from megacontext.context.views import ViewPlan, next_token_targets
from megacontext.context.working_context import InvariantError, WorkingContext, smallest_budget
from megacontext.errors import UserError


def slow_targets(plan: ViewPlan, tokens: np.ndarray) -> list[list[int]]:  # type: ignore[type-arg]
    """The oracle of M1, entry by entry."""
    rows = []
    for view in range(len(plan.length)):
        row = [-1] * plan.lod.shape[1]
        entries = plan.context(view).entries
        history = tokens[plan.sequence[view]]
        for number, (lod, index) in enumerate(entries):
            end = (index + 1) * plan.block_size**lod
            next_is_raw = number + 1 == len(entries) or entries[number + 1][0] == 0
            if next_is_raw and end < len(history):
                row[number] = int(history[end])
        rows.append(row)
    return rows


@st.composite
def plans(draw: st.DrawFn) -> tuple[ViewPlan, int, int, int | None]:
    r = draw(st.sampled_from([2, 3, 4, 8]))
    tokens, tail = draw(st.integers(1, 300)), draw(st.integers(0, 12))
    max_lod = draw(st.sampled_from([None, 0, 1, 2, 3]))
    least = smallest_budget(tokens, r, tail, max_lod)
    targets = np.array(draw(st.lists(st.integers(least, max(least, tokens)), min_size=1, max_size=6)))
    sequence = np.arange(len(targets)) // 2
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    plan = sample_variants(tokens, r, targets, tail, max_lod, sequence, rng)
    for view, target in enumerate(targets):
        context = plan.context(view)
        check_working_context(context, budget=int(target), tail=tail, tokens=tokens, max_lod=max_lod)
        assert len(context) > target - (r - 1)  # no collapse more than needed
    return plan, tokens, tail, max_lod


@settings(max_examples=200, deadline=None)
@given(plans(), st.booleans())
def test_variants_are_legal_and_targets_are_m1(drawn: tuple[ViewPlan, int, int, int | None], one_more: bool) -> None:
    plan, tokens, tail, _ = drawn
    plan.check()
    assert plan.tokens.tolist() == [tokens] * len(plan.length)
    history = np.random.default_rng(1).integers(0, 99, (int(plan.sequence.max()) + 1, tokens + one_more))
    assert next_token_targets(plan, history).tolist() == slow_targets(plan, history)
    columns = plan.length[:, None] + np.arange(-min(tail, tokens), 0)
    starts = np.take_along_axis(plan.starts, columns, 1)
    assert (starts == np.arange(tokens - min(tail, tokens), tokens)).all()  # variants share the tail


@settings(max_examples=50, deadline=None)
@given(plans())
def test_the_gather_finds_each_node(drawn: tuple[ViewPlan, int, int, int | None]) -> None:
    plan, tokens, _, _ = drawn
    r = plan.block_size
    counts = [tokens // r**level for level in range(levels_of(tokens, r) + 1)]
    sequences = int(plan.sequence.max()) + 1
    names = [(s, lod, i) for s in range(sequences) for lod, n in enumerate(counts) for i in range(n)]
    rows = plan.gather_index(counts)
    for view, at in np.argwhere(plan.valid):
        assert names[rows[view, at]] == (plan.sequence[view], plan.lod[view, at], plan.index[view, at])
    assume(plan.lod.max() > 0)
    with pytest.raises(UserError, match="views use level"):
        plan.gather_index(counts[: int(plan.lod.max())])
    with pytest.raises(UserError, match="does not hold"):
        plan.gather_index([count // 2 for count in counts])


def test_m2_a_token_changes_no_target_before_it() -> None:
    plan = sample_variants(200, 4, 80, 16, None, np.zeros(8, np.int64), np.random.default_rng(0))
    tokens = np.arange(201)[None]
    changed = tokens.copy()
    changed[0, 120] = 999
    differs = next_token_targets(plan, tokens) != next_token_targets(plan, changed)
    assert (plan.target_tokens()[differs] == 120).all()
    assert ((plan.starts + plan.spans)[differs] == 120).all()  # all it saw ends before the token


def test_seeds_decide_and_variants_differ() -> None:
    def sample(seed: int) -> ViewPlan:
        return sample_variants(512, 8, 120, 32, 2, np.arange(6), np.random.default_rng(seed))

    assert np.array_equal(sample(1).lod, sample(1).lod)
    assert np.array_equal(sample(1).index, sample(1).index)
    assert not np.array_equal(sample(1).index, sample(2).index)
    rows = {sample(3).index[view].tobytes() for view in range(6)}
    assert len(rows) == 6


def test_every_block_and_level_is_drawn() -> None:
    plan = sample_variants(512, 8, 200, 32, 2, np.zeros(400, np.int64), np.random.default_rng(0))
    for level, count in ((1, 60), (2, 7)):
        drawn = np.bincount(plan.index[plan.valid & (plan.lod == level)], minlength=count)
        assert drawn.min() > 40
    raw = np.bincount(plan.index[plan.valid & (plan.lod == 0)], minlength=512)
    assert raw[480:].tolist() == [400] * 32
    assert raw[:480].min() > 40


def test_the_baseline_is_plain_next_token_prediction() -> None:
    plan = all_raw_plan(2, 5, 32)
    plan.check()
    tokens = np.arange(12).reshape(2, 6)
    assert next_token_targets(plan, tokens).tolist() == tokens[:, 1:].tolist()
    assert next_token_targets(plan, tokens[:, :5])[:, -1].tolist() == [-1, -1]
    assert plan.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert (plan.sigmas == 0).all()


def test_plans_of_single_contexts() -> None:
    contexts = [WorkingContext.all_raw(6, 4), WorkingContext.from_entries([(1, 0), (0, 4), (0, 5)], 4)]
    plan = plan_of(contexts)
    plan.check()
    assert [plan.context(view) for view in range(2)] == contexts
    assert plan.valid.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    broken = ViewPlan(plan.lod, plan.index + 1, plan.length, plan.sequence, 4)
    with pytest.raises(InvariantError, match="padding"):
        broken.check()
    with pytest.raises(InvariantError, match="view 0 entry 0"):
        plan_of([WorkingContext(np.array([0]), np.array([1]), 4)]).check()


def test_a_target_that_cannot_be_is_refused() -> None:
    least = smallest_budget(512, 8, 32, 2)
    with pytest.raises(UserError, match=f"below the {least} of the coarsest"):
        sample_variants(512, 8, least - 1, 32, 2, np.zeros(1, np.int64), np.random.default_rng(0))
