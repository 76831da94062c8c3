"""The focus allocator: a knapsack against its slow definition, budget, cooldown, determinism, state."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from allocators import allocator_config
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.context.allocator import FocusAllocator
from megacontext.context.edits import collapsible
from megacontext.context.invariants import check_working_context
from megacontext.context.working_context import WorkingContext, smallest_budget
from megacontext.errors import UserError

R = 4


def random_score(seed: int) -> Callable[[WorkingContext], np.ndarray]:  # type: ignore[type-arg]
    """Scores that depend on the node alone."""

    def score(context: WorkingContext) -> np.ndarray:  # type: ignore[type-arg]
        mixed = (context.lod * 7919 + context.index * 104_729 + seed * 15_485_863) % 10_007
        return mixed / 10_007 * 2 - 1

    return score


def slow_choice(
    context: WorkingContext, scores: list[float], budget: int, tail: int, edits: int, low: float, high: float
) -> tuple[list[int], list[int]]:
    """The oracle without a cooldown: the best expansions one by one; where room is short, the worst group that is still
    whole pays, if its mean is below the expansion's score by both thresholds; the edits that are left go to the worst raw
    groups whose mean is below zero by the threshold."""
    r = context.block_size
    best = sorted((e for e, (lod, _) in enumerate(context.entries) if lod > 0), key=lambda e: (-scores[e], -e))[:edits]
    best = [e for e in best if scores[e] > high]
    means = {g: sum(scores[g : g + r]) / r for g in collapsible(context, tail).tolist()}
    room, expand, collapse = budget - len(context), [], []
    for entry in best:
        if room >= r - 1:
            expand.append(entry)
            room, edits = room - (r - 1), edits - 1
            continue
        if edits < 2:
            break
        if any(entry in range(g, g + r) for g in collapse):
            continue
        whole = [g for g in means if g not in collapse and not {entry, *expand} & set(range(g, g + r))]
        worst = min(whole, key=lambda g: (means[g], g), default=None)
        if worst is None or scores[entry] - means[worst] <= low + high:
            continue
        collapse.append(worst)
        expand.append(entry)
        edits -= 2
    raw = [g for g in means if context.lod[g] == 0 and g not in collapse and means[g] < -low]
    collapse += sorted(raw, key=lambda g: (means[g], g))[:edits]
    return sorted(expand), sorted(collapse)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(10, 400), st.integers(0, 60), st.integers(0, 8), st.integers(0, 12), st.integers(0, 999),
    st.sampled_from([0.0, 0.1, 0.6]), st.sampled_from([0.0, 0.1, 0.6]),
)  # fmt: skip
def test_the_knapsack_equals_its_definition(
    tokens: int, spare: int, tail: int, edits: int, seed: int, low: float, high: float
) -> None:
    budget = max(tail + 1, smallest_budget(tokens, R, tail) + spare)
    context = WorkingContext.by_age(tokens, R, max(tail + 1, budget - spare // 2), tail)
    config = allocator_config(
        budget=budget, recent_tokens=tail, max_replacements=edits, iterations=1, expand_threshold=high, collapse_threshold=low
    )  # fmt: skip
    scores = random_score(seed)(context)
    expand, collapse = slow_choice(context, scores.tolist(), budget, tail, edits, low, high)
    after, report = FocusAllocator(config).refocus(context, lambda _: scores)
    touched = set(context.entries) - set(after.entries)
    members = {e for group in collapse for e in context.entries[group : group + R]}
    assert touched == {context.entries[e] for e in expand} | members
    assert (report.expands, report.collapses) == (len(expand), len(collapse))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["greedy", "stochastic_greedy"]), st.sampled_from([None, 1, 2]))
def test_laws_hold_over_a_long_session(seed: int, kind: str, max_lod: int | None) -> None:
    """W1 to W4, A1 and A3 over appends and refocuses, with scores that change their mind at every refocus."""
    rng = np.random.default_rng(seed)
    budget, tail = 60, 6
    allocator = FocusAllocator(
        allocator_config(
            budget=budget, recent_tokens=tail, allocator_type=kind, max_replacements=6, iterations=3, max_lod=max_lod
        )
    )
    context, last_seen = WorkingContext.all_raw(0, R), {}
    for step in range(25):
        context = allocator.extend(context, int(rng.integers(0, 6)))
        check_working_context(context, budget=budget, tail=tail, tokens=context.tokens, max_lod=max_lod)
        before = set(context.entries)
        context, report = allocator.refocus(
            context, random_score(int(rng.integers(0, 99))), headroom=int(rng.integers(0, 8))
        )
        check_working_context(context, budget=budget, tail=tail, tokens=context.tokens, max_lod=max_lod)
        assert report.edits <= 18
        for lod, index in set(context.entries) - before:  # A3 by the entries alone: nothing comes back too soon
            gone = last_seen.get((lod, index))
            assert gone is None or step - gone > 2 or report.forced_reversals
        for node in before - set(context.entries):
            last_seen[node] = step


def test_a2_scores_inside_the_thresholds_give_no_edit() -> None:
    context = WorkingContext.by_age(500, R, 60, 8)
    allocator = FocusAllocator(allocator_config(budget=60, recent_tokens=8))
    for value in (-0.1, 0.0, 0.1, np.random.default_rng(0).uniform(-0.1, 0.1, len(context))):
        after, report = allocator.refocus(context, lambda c, value=value: np.broadcast_to(value, len(c)))
        assert after == context
        assert report.edits == 0


def test_raw_text_that_nobody_wants_goes_and_gists_stay() -> None:
    context = WorkingContext.by_age(500, R, 60, 8)
    allocator = FocusAllocator(allocator_config(budget=60, recent_tokens=8, iterations=9))
    after, report = allocator.refocus(context, lambda c: np.full(len(c), -1.0))
    gone = set(context.entries) - set(after.entries)
    assert gone == {(0, index) for index in range(context.starts[context.lod == 0][0], (500 - 8) // R * R)}
    assert report.expands == 0
    assert report.collapses == len(gone) // R == 3


def test_a3_the_cooldown_ends() -> None:
    """One node is wanted, then not: it stays expanded for two refocuses and then pays for another."""
    context = WorkingContext.from_entries([(1, 0), (1, 1), *((0, i) for i in range(8, 12))], R)
    allocator = FocusAllocator(allocator_config(budget=9, recent_tokens=2, iterations=1))

    def want(node: tuple[int, int]) -> Callable[[WorkingContext], np.ndarray]:  # type: ignore[type-arg]
        lod, index = node
        return lambda c: np.where((c.lod == lod) & (c.index == index), 1.0, -1.0)

    context, _ = allocator.refocus(context, want((1, 1)))
    assert (0, 4) in context.entries
    for _ in range(2):
        context, report = allocator.refocus(context, want((1, 0)))
        assert report.edits == 0  # the only payer was expanded a moment ago
    context, report = allocator.refocus(context, want((1, 0)))
    assert context.entries[:5] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1)]
    assert (report.expands, report.collapses) == (1, 1)
    assert report.removed_age_mean == pytest.approx((4 * 2 + 3) / 5, abs=1)


def test_stochastic_allocator_is_seeded_and_near_greedy_at_low_temperature() -> None:
    context = WorkingContext.by_age(2000, R, 90, 8)

    def run(kind: str, seed: int = 0, temperature: float = 1.0, top_k: int = 4) -> WorkingContext:
        config = allocator_config(
            budget=120,
            recent_tokens=8,
            allocator_type=kind,
            seed=seed,
            sample_temperature=temperature,
            sample_top_k=top_k,
        )
        return FocusAllocator(config).refocus(context, random_score(5))[0]

    assert run("stochastic_greedy", 1) == run("stochastic_greedy", 1)
    assert len({str(run("stochastic_greedy", seed).entries) for seed in range(8)}) > 1
    assert run("stochastic_greedy", 1, temperature=1e-9) == run("greedy")
    assert run("stochastic_greedy", 1, top_k=1) == run("greedy")


def test_detail_fades_with_age_when_room_is_made() -> None:
    allocator = FocusAllocator(allocator_config(budget=200, recent_tokens=32))
    context = allocator.extend(WorkingContext.all_raw(0, R), 100_000)
    check_working_context(context, budget=200, tail=32, tokens=100_000)
    assert (np.diff(context.lod) <= 0).mean() > 0.9
    assert len(context) > 200 - R
    gists = context.lod > 0
    distance = 100_000 - (context.starts + context.spans)[gists]
    assert (context.spans[gists] <= distance).all()  # a node is small beside its distance


def test_scores_decide_who_makes_room() -> None:
    context = WorkingContext.all_raw(40, R)
    allocator = FocusAllocator(allocator_config(budget=37, recent_tokens=4))
    scores = np.ones(40)
    scores[20:24] = -1
    after = allocator.make_room(context, scores=scores)
    assert (1, 5) in after.entries
    assert len(after) == 37


def test_a_refocus_makes_room_by_its_scores() -> None:
    """The oldest block is wanted and stays, the one that scores lowest goes."""
    context = WorkingContext.all_raw(40, R)
    allocator = FocusAllocator(allocator_config(budget=40, recent_tokens=4))
    after, report = allocator.refocus(
        context, lambda c: np.where((c.index >= 20) & (c.index < 24), -0.1, 0.1), headroom=3
    )
    assert set(context.entries) - set(after.entries) == {(0, i) for i in range(20, 24)}
    assert (report.forced_collapses, report.edits) == (1, 0)


def test_what_an_append_folded_away_can_be_expanded_at_once() -> None:
    """No cooldown holds it back: nothing has been predicted from it as it was."""
    allocator = FocusAllocator(allocator_config(budget=60, recent_tokens=6, iterations=8))
    context = allocator.extend(WorkingContext.all_raw(0, R), 700)

    def wants_a_block(context: WorkingContext) -> np.ndarray:  # type: ignore[type-arg]
        return np.where((np.arange(len(context)) == context.at_token(101)) | (context.starts // R == 25), 1.0, -0.5)

    assert context.lod[context.at_token(101)] >= 2
    after, report = allocator.refocus(context, wants_a_block)
    assert (0, 101) in after.entries
    assert report.forced_reversals == 0


def test_a_budget_that_cannot_hold_the_roots_is_refused() -> None:
    allocator = FocusAllocator(allocator_config(budget=20, recent_tokens=8, max_lod=1))
    with pytest.raises(UserError, match="Raise the budget to"):
        allocator.extend(WorkingContext.all_raw(0, R), 200)
    with pytest.raises(UserError, match="leaves no room"):
        allocator_config(budget=8, recent_tokens=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocator_type": "lucky"}, "choose one of greedy"),
        ({"expand_threshold": 1.5}, "expand_threshold"),
        ({"sample_temperature": 0.0}, "sample_temperature"),
        ({"sample_top_k": 0}, "sample_top_k"),
        ({"cooldown": -1}, "cooldown"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        allocator_config(budget=100, recent_tokens=8, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("scores", [np.zeros(3), np.full(40, np.nan), np.full(40, 1.5)])
def test_scores_that_cannot_be_are_refused(scores: np.ndarray) -> None:  # type: ignore[type-arg]
    allocator = FocusAllocator(allocator_config(budget=100, recent_tokens=8))
    with pytest.raises(UserError, match="score"):
        allocator.refocus(WorkingContext.all_raw(40, R), lambda _: scores)


def test_a_restored_allocator_goes_on_as_if_it_had_never_stopped() -> None:
    config = allocator_config(budget=60, recent_tokens=6, allocator_type="stochastic_greedy")
    one = FocusAllocator(config)
    context = one.extend(WorkingContext.all_raw(0, R), 500)
    for step in range(12):
        if step % 3 == 0:  # a restart
            state, restored = json.loads(json.dumps(one.state())), FocusAllocator(config)
            restored.restore(state, R)
            again, other = restored.refocus(restored.extend(context, 3), random_score(step))
            one, two = restored, one
            context, report = two.refocus(two.extend(context, 3), random_score(step))
            assert again == context
            assert repr(report) == repr(other)
        else:
            context, _ = one.refocus(one.extend(context, 3), random_score(step))


def test_report_adds_up() -> None:
    allocator = FocusAllocator(allocator_config(budget=60, recent_tokens=6, max_replacements=8, iterations=2))
    context = allocator.extend(WorkingContext.all_raw(0, R), 700)
    after, report = allocator.refocus(context, random_score(3))
    assert len(after) == report.entries == len(context) + (report.expands - report.collapses) * (R - 1)
    assert report.forced_collapses >= (700 - 60) // (R - 1)
    assert report.swap_rate == report.edits / len(after)
    assert report.utilization == len(after) / 60 <= 1
    assert -1 <= report.score_min <= report.score_mean <= report.score_max <= 1
