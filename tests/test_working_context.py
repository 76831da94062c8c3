"""Working contexts: tilings from the coarsest to the finest, derived positions, the two edits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megacontext.context.edits import Edits, apply, collapse_node, collapsible, expand_node, kept_prefix
from megacontext.context.invariants import check_edit, check_working_context
from megacontext.context.working_context import MAX_TOKENS, InvariantError, WorkingContext, smallest_budget
from megacontext.errors import UserError


def slow_coarsest(tokens: int, r: int, tail: int, max_lod: int | None) -> list[tuple[int, int]]:
    """The oracle: from the left, always the largest aligned node that ends before the tail."""
    entries, at = [], 0
    while at < tokens:
        lod = 0
        while (
            (max_lod is None or lod < max_lod)
            and at % r ** (lod + 1) == 0
            and at + r ** (lod + 1) <= max(0, tokens - tail)
        ):
            lod += 1
        entries.append((lod, at // r**lod))
        at += r**lod
    return entries


def slow_tiles(entries: list[tuple[int, int]], r: int, tokens: int) -> bool:
    covered: list[int] = []
    for lod, index in entries:
        covered += range(index * r**lod, (index + 1) * r**lod)
    return covered == list(range(tokens))


sizes = st.tuples(st.integers(0, 400), st.sampled_from([2, 3, 4]), st.integers(0, 12), st.sampled_from([None, 0, 1, 2]))


@settings(max_examples=200, deadline=None)
@given(sizes)
def test_the_smallest_budget_gives_the_coarsest_tiling(size: tuple[int, int, int, int | None]) -> None:
    tokens, r, tail, max_lod = size
    expected = slow_coarsest(tokens, r, tail, max_lod)
    least = smallest_budget(tokens, r, tail, max_lod)
    assert least == len(expected)
    assume(least > tail)
    context = WorkingContext.initial(tokens, r, least, tail, max_lod)
    assert context.entries == expected or tokens <= least
    if least - 1 > tail:
        with pytest.raises(UserError, match=f"Raise the budget to {least}"):
            WorkingContext.initial(tokens, r, least - 1, tail, max_lod)


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(1, 120), st.booleans())
def test_w1_to_w4_hold_for_every_first_context(size: tuple[int, int, int, int | None], budget: int, aged: bool) -> None:
    tokens, r, tail, max_lod = size
    assume(budget > tail and budget >= smallest_budget(tokens, r, tail, max_lod))
    make = WorkingContext.by_age if aged else WorkingContext.initial
    context = make(tokens, r, budget, tail, max_lod)
    assert slow_tiles(context.entries, r, tokens)
    check_working_context(context, budget=budget, tail=tail, tokens=tokens, max_lod=max_lod)
    if aged:
        assert (np.diff(context.lod) <= 0).all()  # never finer than what is newer
        expandable = context.lod.max(initial=0) > 0
        assert not expandable or len(context) + r - 1 > budget  # nothing is left that could pay for an expansion


def test_the_pyramid_by_age_shares_the_budget() -> None:
    context = WorkingContext.by_age(1_000_000, 32, 256, 32)
    assert 256 - 31 < len(context) <= 256
    raw, middle = (context.lod == 0).sum(), (context.lod == 1).sum()
    assert raw >= 32
    assert middle > 32


def test_positions_and_sigmas_are_exact_far_beyond_single_precision() -> None:
    r, lod, index = 32, 2, (1 << 40) + 1
    context = WorkingContext(np.array([lod]), np.array([index]), r)
    span = r**lod
    assert context.positions[0] == index * span + (span - 1) / 2
    assert context.sigmas[0] == span / math.sqrt(12)
    assert float(context.positions[0]) % 1 == 0.5
    mean = np.arange(32, 64).mean()
    assert WorkingContext(np.array([1]), np.array([1]), 32).positions[0] == mean
    assert WorkingContext.all_raw(5, 32).sigmas.tolist() == [0.0] * 5


def test_append_and_entries() -> None:
    context = WorkingContext.from_entries([(1, 0), (0, 4), (0, 5)], 4)
    assert context.tokens == 6
    assert context.append(2).entries == [(1, 0), (0, 4), (0, 5), (0, 6), (0, 7)]
    assert [context.at_token(t) for t in range(6)] == [0, 0, 0, 0, 1, 2]
    with pytest.raises(UserError, match="only grows"):
        context.append(-1)
    with pytest.raises(UserError, match="not in a history"):
        context.at_token(6)
    with pytest.raises(ValueError, match="read-only"):
        context.lod[0] = 3
    assert context == WorkingContext.from_entries(context.entries, 4)
    assert context != context.append(1)
    assert WorkingContext.all_raw(0, 4).tokens == 0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(0, 1)], "entry 0 .* starts at token 1, but 0 is due"),
        ([(0, 0), (0, 2)], "entry 1 .* starts at token 2, but 1 is due"),
        ([(0, 0), (0, 0)], "entry 1 .* starts at token 0"),
        ([(1, 0), (0, 3)], "starts at token 3, but 4 is due"),
        ([(-1, 0)], "not a node"),
        ([(0, 0), (40, 1)], "entry 1 .*not a node"),
    ],
)
def test_w2_a_fault_is_named(entries: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(InvariantError, match=message):
        WorkingContext.from_entries(entries, 4)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="tail of 8 tokens leaves no room in a budget of 8"):
        WorkingContext.initial(100, 4, 8, 8)
    with pytest.raises(UserError, match="block_size is 1"):
        WorkingContext.initial(100, 1, 8, 2)
    with pytest.raises(UserError, match="Raise the budget to"):
        WorkingContext.initial(10_000, 4, 100, 50, max_lod=1)
    with pytest.raises(UserError, match="positions are exact"):
        WorkingContext.initial(MAX_TOKENS + 1, 4, 100, 50)
    assert WorkingContext.initial(3, 4, 8, 2).entries == [(0, 0), (0, 1), (0, 2)]  # shorter than a block


def slow_apply(entries: list[tuple[int, int]], expand: list[int], collapse: list[int], r: int) -> list[tuple[int, int]]:
    out, skip = [], 0
    for number, (lod, index) in enumerate(entries):
        if skip:
            skip -= 1
        elif number in expand:
            out += [(lod - 1, index * r + child) for child in range(r)]
        elif number in collapse:
            out.append((lod + 1, index // r))
            skip = r - 1
        else:
            out.append((lod, index))
    return out


def slow_collapsible(entries: list[tuple[int, int]], r: int, tokens: int, tail: int, max_lod: int | None) -> list[int]:
    found = []
    for first in range(len(entries) - r + 1):
        lod, index = entries[first]
        siblings = index % r == 0 and entries[first : first + r] == [(lod, index + child) for child in range(r)]
        if siblings and (index + r) * r**lod <= tokens - tail and (max_lod is None or lod < max_lod):
            found.append(first)
    return found


@st.composite
def contexts(draw: st.DrawFn) -> WorkingContext:
    """Any legal tiling: random nodes from left to right."""
    r, tokens = draw(st.sampled_from([2, 3, 4])), draw(st.integers(0, 150))
    entries, at = [], 0
    while at < tokens:
        lods = [lod for lod in range(8) if at % r**lod == 0 and at + r**lod <= tokens]
        lod = draw(st.sampled_from(lods))
        entries.append((lod, at // r**lod))
        at += r**lod
    return WorkingContext.from_entries(entries, r)


@settings(max_examples=300, deadline=None)
@given(contexts(), st.integers(0, 10), st.sampled_from([None, 1, 2]), st.randoms(use_true_random=False))
def test_w5_a_batch_of_edits_equals_the_slow_one(context: WorkingContext, tail: int, max_lod: int | None, rng) -> None:  # type: ignore[no-untyped-def]
    r = context.block_size
    groups = collapsible(context, tail, max_lod)
    assert groups.tolist() == slow_collapsible(context.entries, r, context.tokens, tail, max_lod)
    collapse = [int(g) for g in groups if rng.random() < 0.5]
    taken = {g + k for g in collapse for k in range(r)}
    expand = [e for e in np.flatnonzero(context.lod).tolist() if e not in taken and rng.random() < 0.5]
    edits = Edits(np.array(expand, np.int64), np.array(collapse, np.int64))
    after = apply(context, edits, tail, max_lod)
    assert after.entries == slow_apply(context.entries, expand, collapse, r)
    after.check()
    check_edit(context, after, edits)
    assert len(after) - len(context) == edits.cost(r)
    same = [a == b for a, b in zip(context.entries, after.entries, strict=False)]
    assert kept_prefix(context, after) == ([*same, False].index(False))


def test_edits_that_are_not_legal_are_refused() -> None:
    context = WorkingContext.from_entries([(1, 0), *((0, i) for i in range(4, 13))], 4)
    one = np.array([1])
    for edits, options, message in [
        (Edits(expand=one), {}, "is a token"),
        (Edits(expand=np.array([10])), {}, "entry 10 is not in"),
        (Edits(collapse=np.array([2])), {}, "does not begin a group"),
        (Edits(collapse=np.array([5])), {"tail": 2}, "tail 2"),
        (Edits(collapse=one), {"max_lod": 0}, "highest level 0"),
        (Edits(collapse=np.array([1, 1])), {}, "touch the same entry"),
    ]:
        with pytest.raises(UserError, match=message):
            apply(context, edits, **options)
    with pytest.raises(UserError, match="are not entries"):
        collapse_node(context, 2, 0)
    both = apply(context, expand_node(context, 2))
    assert both == WorkingContext.all_raw(13, 4)
    assert apply(both, collapse_node(both, 1, 0)) == context
